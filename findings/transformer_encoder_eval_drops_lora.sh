#!/usr/bin/env bash
# An adapter on torch's nn.TransformerEncoder works in train() and is dropped in eval(), without a word.
#
# One would guess: a LoRA adapter of PEFT on linear1 and linear2 of nn.TransformerEncoderLayer acts in eval() as in
# train(): without dropout both give the same output.
# Seen (torch 2.13.0, peft 0.21.2, CPU): in eval() the encoder layer takes a fused path that reads the weights of its
# linear layers and never calls them. PEFT's layer answers `.weight` with the base layer's, so the adapter has no part
# in it: the output equals that of disable_adapter() bit for bit. Gradients being enabled does not prevent it, since the
# path asks whether the *base* weights need one, and those are frozen. What was trained is lost at evaluation.
# torch.backends.mha.set_fastpath_enabled(False) brings it back.
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6 \
  transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$folder/run.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
base = nn.Sequential(nn.TransformerEncoder(layer, num_layers=2))
config = LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
model = get_peft_model(base, config)
x = torch.randn(2, 5, 32)

trained = model.train()(x).detach()
evaluated = model.eval()(x).detach()
with model.disable_adapter():
    disabled = model(x).detach()
torch.backends.mha.set_fastpath_enabled(False)
slow = model(x).detach()

print("eval() equals disable_adapter() bit for bit:", torch.equal(evaluated, disabled))
print("train() and eval() differ by", float((trained - evaluated).abs().max()))
print("without the fused path they differ by", float((trained - slow).abs().max()))
as_seen = torch.equal(evaluated, disabled) and not torch.allclose(trained, evaluated, atol=1e-2)
as_seen = as_seen and torch.allclose(trained, slow, atol=1e-5)
print("as seen" if as_seen else "this has changed")
sys.exit(not as_seen)
PY
"$folder/env/bin/python" "$folder/run.py"
