"""Packs are refused where their rows would see each other, and nowhere else: held against each row's own loss."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
import transformers as hf
from datasets import Dataset

import lora_ops
from lora_ops.trainer import sft
from lora_ops.trainer.arguments import SFTArguments

BASE = {"vocab_size": 300, "initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DEEP = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {**BASE, **WIDE, "intermediate_size": 32, "num_key_value_heads": 2}

MODELS = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "Llama, eager": lambda: hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**LLAMA), attn_implementation="eager"),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=6)),
    "Phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**BASE, **WIDE, intermediate_size=32)),
    "StableLM": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**LLAMA)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=4, router_aux_loss_coef=0.0)),
    "Mixtral, with the routers' loss": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**LLAMA, num_local_experts=4, router_aux_loss_coef=1.0)
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**BASE, **DEEP)),
    "GPT-J": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**BASE, **DEEP, rotary_dim=4)),
    "GPT-Neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(**BASE, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    ),
    "OPT": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=300, **WIDE, ffn_dim=32, word_embed_proj_dim=32, init_std=0.5)
    ),
    "Bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**BASE, hidden_size=32, n_layer=2, n_head=4)),
    "MPT": lambda: hf.MptForCausalLM(hf.MptConfig(**BASE, d_model=32, n_heads=4, n_layers=2)),
    "Falcon, ALiBi": lambda: hf.FalconForCausalLM(hf.FalconConfig(**BASE, **WIDE, alibi=True)),
    "BioGPT": lambda: hf.BioGptForCausalLM(hf.BioGptConfig(**BASE, **WIDE, intermediate_size=32)),
    "XGLM": lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(vocab_size=300, d_model=32, ffn_dim=32, num_layers=2, attention_heads=4, init_std=0.5)
    ),
    "Mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**BASE, hidden_size=32, num_hidden_layers=2, state_size=4)),
}
# A list of what is true today, so that a check that refuses everything, or nothing, does not pass.
APART = {"Llama", "Llama, eager", "Mistral", "Phi", "StableLM", "Mixtral", "GPT-2"}
REFUSED = {"OPT", "Bloom", "MPT", "Mamba"}


@pytest.mark.parametrize("name", [name for name in MODELS if "routers' loss" not in name])
def test_a_packed_loss_is_the_rows_own_or_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    texts = ["def add(a, b):", "return 12 + 34"]
    total = count = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            logits = model(input_ids=ids).logits
            total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    args = SFTArguments("x", "x", str(tmp_path), full=True, quantize="none", packing=True, max_length=64, max_steps=1,
                        per_device_train_batch_size=1, use_cpu=True, disable_tqdm=True)  # fmt: skip
    data = Dataset.from_list([{"text": text} for text in texts])
    try:
        packed = sft.train(args, model=model, tokenizer=tokenizer, train_dataset=data).train_loss
    except ValueError as error:
        refused = str(error)
    else:
        assert packed == pytest.approx(total / count, rel=1e-4)
        assert name not in REFUSED
        return
    assert refused.startswith("packing: ")
    assert refused.endswith("leave packing out")
    assert name not in APART


def test_a_loss_over_all_tokens_is_no_leak(tiny_model: Path, tmp_path: Path) -> None:
    """The routers' balance counts the tokens of the whole pack; in NF4 too."""
    args = SFTArguments("x", "x", str(tmp_path), packing=True, max_length=64, use_cpu=True, disable_tqdm=True)
    model = lora_ops.inject(MODELS["Mixtral, with the routers' loss"](), r=2, quantize="nf4")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    sft._trainer(args, model, tokenizer, Dataset.from_list([{"text": "ab"}, {"text": "cd"}]), (), None)


def test_bf16_rounding_is_no_leak(tiny_model: Path, tmp_path: Path) -> None:
    args = SFTArguments("x", "x", str(tmp_path), full=True, quantize="none", packing=True, max_length=64, max_steps=1,
                        bf16=True, use_cpu=True, disable_tqdm=True)  # fmt: skip
    for name in ("Llama", "Mixtral, with the routers' loss"):
        model = MODELS[name]().to(torch.bfloat16)
        tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
        sft._trainer(args, model, tokenizer, Dataset.from_list([{"text": "ab"}, {"text": "cd"}]), (), None)
    with pytest.raises(ValueError, match="packing: rows of a pack see each other in BloomForCausalLM"):
        sft._trainer(
            args, MODELS["Bloom"]().to(torch.bfloat16), tokenizer, Dataset.from_list([{"text": "ab"}]), (), None
        )


def test_the_check_leaves_the_model_and_the_random_numbers_alone(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_model)
    before = load_file(tiny_model / "model.safetensors")
    args = SFTArguments("x", "x", str(tmp_path), full=True, quantize="none", packing=True, max_length=64, use_cpu=True)
    data = Dataset.from_list([{"text": "ab"}, {"text": "cd"}])
    draws = []
    for packing in (True, False):
        args.packing = packing
        sft._trainer(args, model, tokenizer, data, (), None)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
