#!/usr/bin/env bash
# PEFT's "all-linear" adapts the routers of Llama 4 and Phi-3.5-MoE, and the model's next forward raises.
#
# One would guess: LoraConfig(target_modules="all-linear") gives a model that runs, as for other mixtures of experts,
# whose routers are plain parameters or return one tensor.
# Seen (peft 0.21.2, transformers 5.23.0, torch 2.13.0, CPU): both routers are subclasses of nn.Linear whose forward
# returns a tuple (scores and logits). "all-linear" takes whatever is an instance of nn.Linear, PEFT's layer reads the
# dtype of what the base layer returns, and the forward ends in
#   AttributeError: 'tuple' object has no attribute 'dtype'
# get_peft_model itself says nothing. With exclude_modules=["router"] both models run.
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$folder/seen.py" <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import Llama4ForCausalLM, Llama4TextConfig, PhimoeConfig, PhimoeForCausalLM

warnings.filterwarnings("ignore")
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
models = {
    "Llama 4": lambda: Llama4ForCausalLM(Llama4TextConfig(head_dim=16, intermediate_size_mlp=96, num_experts_per_tok=1, **sizes)),
    "Phi-3.5-MoE": lambda: PhimoeForCausalLM(PhimoeConfig(num_experts_per_tok=2, **sizes)),
}
ids = torch.randint(3, 64, (2, 6))
as_seen = True
for name, make in models.items():
    make()(input_ids=ids)
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    routers = [n for n, m in model.named_modules() if n.endswith("router") and hasattr(m, "lora_A")]
    try:
        model(input_ids=ids)
        outcome = "runs"
    except AttributeError as error:
        outcome = f"AttributeError: {error}"
    without = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["router"], task_type="CAUSAL_LM"))
    without(input_ids=ids)
    print(f"{name}: {len(routers)} routers adapted; forward: {outcome}; without the routers it runs")
    as_seen &= len(routers) == 2 and outcome == "AttributeError: 'tuple' object has no attribute 'dtype'"
print("as seen" if as_seen else "this has changed")
sys.exit(not as_seen)
PY
"$folder/env/bin/python" "$folder/seen.py" 2>/dev/null
