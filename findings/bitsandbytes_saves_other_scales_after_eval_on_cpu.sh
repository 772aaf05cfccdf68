#!/usr/bin/env bash
# On a CPU with AVX-512-BF16 one forward in eval() changes what a bitsandbytes 4-bit layer saves.
#
# One would guess: a forward without gradients leaves a layer as it is, so that state_dict() before and after it are
# equal, and training after an evaluation goes on from the same weights.
# Seen (bitsandbytes 0.50.2, torch 2.13.0; CPU whose flags list avx512_bf16): the first forward in eval() repacks the
# weight in place for a kernel of its own and rounds the scales to bfloat16. state_dict() takes the repacking back, but
# not the scales: without double quantization `weight.absmax` comes out as bfloat16 of shape (K / 64, N), transposed,
# where it was float32 (N K / 64,) before. Read in the old order these are the scales of other blocks: the same layer,
# back in train(), gives outputs that are off by a quarter. With double quantization codes and nested scales are computed
# anew from the rounded ones, and outputs are off by some 1e-3. On CPUs without AVX-512-BF16 nothing of it happens.
#
# Exits 0 while that is so, 1 when it changes; 2 where the CPU has no AVX-512-BF16 and so cannot show it.
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
  echo "this needs a CPU with AVX-512-BF16 (avx512_bf16 in /proc/cpuinfo)"
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cat > "$folder/run.py" <<'PY'
import sys

import bitsandbytes as bnb
import torch


def run(double_quant: bool) -> tuple[str, float]:
    """The scales before and after, and how far the outputs in train() are apart, over the largest of them."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 64, bias=False, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": torch.randn(64, 128)})
    layer = layer.to("cpu")  # quantizes
    x = torch.randn(5, 128)
    before, y = layer.state_dict()["weight.absmax"].clone(), layer.train()(x)
    with torch.no_grad():
        layer.eval()(x)
    after, again = layer.state_dict()["weight.absmax"], layer.train()(x)
    described = f"{before.dtype} {tuple(before.shape)} -> {after.dtype} {tuple(after.shape)}"
    return described, float((again - y).abs().max() / y.abs().max())


plain, double = run(False), run(True)
print("plain scales: ", plain)
print("double-quantized:", double)
as_seen = plain[0] == "torch.float32 (128,) -> torch.bfloat16 (2, 64)" and plain[1] > 0.1
as_seen = as_seen and 1e-4 < double[1] < 1e-2
print("as seen" if as_seen else "this has changed")
sys.exit(not as_seen)
PY
"$folder/env/bin/python" "$folder/run.py"
