#!/usr/bin/env bash
# Inductor's cache on disk does not know the CPU capability that it compiled for: a hit gives wrong values.
#
# One would guess: torch.compile on the CPU looks up its compiled code by all that it depends on, so that
# ATEN_CPU_CAPABILITY=avx2, torch's own switch to keep it to AVX2, compiles anew and gives eager's values.
# Seen (torch 2.13.0, CPU with AVX-512): the code that a first process compiled for AVX-512 is found in the second one,
# which runs with ATEN_CPU_CAPABILITY=avx2 and the same cache folder ("fxgraph_cache_hit" is 1), and fits no longer: of
# x.sin() of 128 numbers only some are written, the others are what was in memory before. There is no error and no
# warning. With a cache folder of its own for each capability both are right.
#
# Exits 0 while that is so, 1 when it changes; 2 where the CPU has no AVX-512 or there is no C++ compiler.
set -euo pipefail
if ! grep -q avx512f /proc/cpuinfo || ! command -v g++ > /dev/null; then
  echo "this needs a CPU with AVX-512 (avx512f in /proc/cpuinfo) and g++"
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cat > "$folder/run.py" <<'PY'
import torch

torch.manual_seed(0)
x = torch.randn(8, 16)
compiled = torch.compile(lambda t: t.sin())(x)
error = (compiled - x.sin()).abs().nan_to_num(torch.inf).max().item()
print(error, torch.backends.cpu.get_cpu_capability(), torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
PY
run() { # CACHE [VARIABLE=VALUE]
  env TORCHINDUCTOR_CACHE_DIR="$folder/$1" ${2:+"$2"} "$folder/env/bin/python" "$folder/run.py" 2> /dev/null
}
first=$(run shared)
second=$(run shared ATEN_CPU_CAPABILITY=avx2)
apart=$(run apart ATEN_CPU_CAPABILITY=avx2)
printf '%-42s%s\n' "error, capability, cache hits:" "$first" "ATEN_CPU_CAPABILITY=avx2, same cache:" "$second" \
  "ATEN_CPU_CAPABILITY=avx2, its own cache:" "$apart"
python3 - "$first" "$second" "$apart" <<'PY'
import sys

first, second, apart = (text.split() for text in sys.argv[1:])
as_seen = float(first[0]) < 1e-6 and float(apart[0]) < 1e-6 and float(second[0]) > 1e-2
as_seen = as_seen and (second[1], second[2]) == ("AVX2", "1")
print("as seen" if as_seen else "this has changed")
sys.exit(not as_seen)
PY
