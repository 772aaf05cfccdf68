#!/usr/bin/env bash
# On AMD CPUs with AVX-512 F.linear in float32 takes twice as long as the same product by torch's own oneDNN.
#
# One would guess: torch, which says that it runs with the CPU capability AVX512 and carries two libraries that have
# AVX-512 kernels for float32, multiplies matrices with them; bfloat16 on the same CPU does.
# Seen (torch 2.13.0 for CPU from the package index, oneMKL 2024.0 Update 2 inside; AMD EPYC of family 26 with AVX-512, two
# threads): F.linear, x @ w and their backwards go to oneMKL's SGEMM, which takes the CPU for a generic one ("Intel(R)
# Architecture processors" in MKL_VERBOSE, where an Intel CPU is named by its instructions) and reaches 200 GFLOP/s.
# torch.ops.mkldnn._linear_pointwise, which torch.compile may choose, runs oneDNN's brg_matmul:avx512_core on the same
# tensors in 0.4 to 0.5 of the time, with sums in another order. NumPy's OpenBLAS is faster than F.linear as well.
# Whoever fine-tunes in float32 on such a CPU waits twice as long as the machine asks for.
#
# Exits 0 while that is so, 1 when it changes; 2 where the CPU is not AMD's or has no AVX-512 and so cannot show it.
set -euo pipefail
if ! grep -q AuthenticAMD /proc/cpuinfo || ! grep -q avx512dq /proc/cpuinfo; then
  echo "this needs an AMD CPU with AVX-512 (AuthenticAMD and avx512dq in /proc/cpuinfo)"
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import statistics
import time

import torch


def by_onednn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


x, w = torch.randn(512, 2048), torch.randn(2048, 2048)
contenders = {"F.linear": torch.nn.functional.linear, "oneDNN": by_onednn}
times: dict[str, list[float]] = {name: [] for name in contenders}
torch.testing.assert_close(by_onednn(x, w), torch.nn.functional.linear(x, w), rtol=1e-4, atol=1e-3)
for _ in range(15):  # in turn
    for name, run in contenders.items():
        begin = time.perf_counter()
        run(x, w)
        times[name].append(time.perf_counter() - begin)
medians = {name: statistics.median(t) for name, t in times.items()}
for name, t in medians.items():
    print(f"{name}: {t * 1e3:.2f} ms, {2 * x.numel() * len(w) / t / 1e9:.0f} GFLOP/s")
print(f"ratio: {medians['F.linear'] / medians['oneDNN']:.2f}")
PY
cat > "$folder/once.py" <<'PY'
import torch

x, w = torch.randn(64, 128), torch.randn(96, 128)
torch.nn.functional.linear(x, w)
torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
PY
python="$folder/env/bin/python"
"$python" -c 'import torch; print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())'
MKL_VERBOSE=1 ONEDNN_VERBOSE=1 "$python" "$folder/once.py" > "$folder/verbose"
grep -o 'MKL_VERBOSE one.*Lnx' "$folder/verbose"
grep -o 'exec,cpu,[^:]*:[a-z0-9_]*' "$folder/verbose"
"$python" "$folder/run.py" | tee "$folder/times"
if grep -q 'MKL_VERBOSE.*Intel(R) Architecture processors' "$folder/verbose" && grep -q 'avx512_core' "$folder/verbose" &&
  awk '/^ratio/ { slow = $2 > 1.3 } END { exit !slow }' "$folder/times"; then
  echo "as seen"
else
  echo "this has changed"
  exit 1
fi
