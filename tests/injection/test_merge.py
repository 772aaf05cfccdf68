"""lora_ops.merge: a plain dense model, rounded once, that is saved and loaded as any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_ops
from lora_ops.nn import LoRALinear, NF4Linear
from tests import models
from tests.injection.test_inject import assert_same_logits, first_layer, logits, randomize, stock

peft = pytest.importorskip("peft")


def adapted(arch: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return randomize(lora_ops.inject(models.DECODERS[arch](dtype=dtype), r=4, **options)).eval()


@pytest.mark.parametrize("arch", models.DECODERS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_dense_model_that_loads_as_any_other(arch: str, quantize: str | None, tmp_path: Path) -> None:
    model = adapted(arch, quantize=quantize)
    y = logits(model)
    merged = lora_ops.merge(model)
    assert type(merged) is type(models.DECODERS[arch]())
    assert_same_logits(merged, y)
    original = models.DECODERS[arch]()
    assert {k: (v.shape, v.dtype) for k, v in merged.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in original.state_dict().items()
    }
    assert [type(m) for m in merged.modules()] == [type(m) for m in original.modules()]  # Conv1D where it was
    assert not hasattr(merged.config, "quantization_config")
    assert not hasattr(merged.config, "_is_quantized")  # which models ask before they read a weight
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(merged))
    assert_same_logits(lora_ops.inject(loaded, r=2), merged)  # and takes adapters again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_sum_is_rounded_once(dtype: torch.dtype, quantize: str | None) -> None:
    model = adapted("qwen2", torch.bfloat16, quantize=quantize)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomize(model)
    model.base_model.set_adapter(["default", "second"])
    layer = first_layer(model)
    base = layer.get_base_layer()
    expected = (base.dequantize(torch.float32) if quantize else base.weight.float()).clone()
    for name in ("default", "second"):
        delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
        expected += layer.scaling[name] * delta
    merged = lora_ops.merge(model, dtype)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, expected.to(dtype))
    assert {p.dtype for p in merged.parameters()} == {dtype}


def test_adapters_in_16_bits_are_multiplied_in_float32() -> None:
    model = adapted(dtype=torch.bfloat16, quantize="nf4", target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    layer = first_layer(model)
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = layer.base_layer.dequantize(torch.float32) + layer.scaling["default"] * delta
    merged = lora_ops.merge(model, torch.float32)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected)


def test_a_small_update_survives_that_nf4_would_round_away() -> None:
    model = randomize(lora_ops.inject(models.llama(), r=4, quantize="nf4"), std=1e-3)
    layer = first_layer(model)
    before, delta = layer.base_layer.dequantize(torch.float32), layer.get_delta_weight("default")
    weight = lora_ops.merge(model).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight - before, delta, atol=1e-7, rtol=0)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merged_adapters_merge_from_the_bytes_before(quantize: str | None) -> None:
    model = adapted(quantize=quantize)
    y = logits(model)
    model.merge_adapter()
    assert_same_logits(lora_ops.merge(model), y)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_kinds_of_lora_over_dense_layers(options: dict[str, Any]) -> None:
    targets = ["q_proj", "v_proj"]  # which have a bias
    model = adapted("qwen2", target_modules=targets, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    y = logits(model)
    assert_same_logits(lora_ops.merge(model), y)


def test_lora_bias_over_nf4_and_where_it_has_no_place() -> None:
    model = adapted("qwen2", target_modules=["q_proj"], quantize="nf4", lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    y = logits(model)
    assert_same_logits(lora_ops.merge(model), y)
    model = adapted(target_modules=["q_proj"], quantize="nf4", lora_bias=True)
    y = logits(model)
    with pytest.raises(RuntimeError, match=r"q_proj: Impossible to merge LoRA with `lora_bias=True`"):
        lora_ops.merge(model)
    assert isinstance(first_layer(model).base_layer, NF4Linear)
    assert_same_logits(model, y)


def test_embeddings_and_modules_trained_whole() -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = randomize(peft.get_peft_model(models.llama(), config)).eval()
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight, std=0.1)
    y = logits(model)
    merged = lora_ops.merge(model)
    assert_same_logits(merged, y)
    assert type(merged.lm_head) is nn.Linear


def test_attention_of_torch() -> None:
    """PEFT's layer for it makes plain tensors of the Parameters, and merges its output projection itself."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    block = Block().bfloat16()
    model = randomize(peft.get_peft_model(block, peft.LoraConfig(target_modules=["attention"], r=2))).eval()
    x = torch.randn(2, 3, 16).bfloat16()
    y = model(x)
    merged = lora_ops.merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.state_dict().keys() == Block().state_dict().keys()
    torch.testing.assert_close(merged(x), y, atol=0.05, rtol=0.05)


def test_a_model_without_adapters_becomes_dense() -> None:
    nf4 = lora_ops.quantize(models.gpt2())
    y = logits(nf4)
    dense = lora_ops.merge(nf4)
    assert_same_logits(dense, y)
    assert not any(isinstance(m, NF4Linear) for m in dense.modules())
    assert dense.num_parameters() == models.gpt2().num_parameters()
    dropin = nn.Sequential(LoRALinear.from_linear(nn.Linear(8, 8), r=2, quantize="nf4"), LoRALinear(8, 8, r=2))
    nn.init.normal_(dropin[0].lora_B.weight)
    nn.init.normal_(dropin[1].lora_B.weight)
    x = torch.randn(3, 8)
    y = dropin(x)
    merged = lora_ops.merge(dropin)
    assert [type(m) for m in merged] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(merged(x), y)
    assert type(lora_ops.merge(NF4Linear.from_linear(nn.Linear(8, 8)))) is nn.Linear


def test_modules_that_the_model_keeps_in_float32() -> None:
    model = lora_ops.merge(lora_ops.inject(models.t5(), quantize="nf4"), torch.float16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name.split(".")[-2] for name in kept} == {"wo"}
    assert {p.dtype for name, p in model.named_parameters() if name not in kept} == {torch.float16}


def test_what_is_not_finite_is_named_and_nothing_is_merged() -> None:
    model = adapted(quantize="nf4")
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    message = r"model: .*layers\.1\.mlp\.up_proj\.lora_B\.default\.weight is not finite: .*nothing was merged"
    with pytest.raises(ValueError, match=message):
        lora_ops.merge(model)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    large = adapted(target_modules=["q_proj"])
    first_layer(large).base_layer.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"dtype: .*q_proj\.weight exceeds the range of float16; merge into another"):
        lora_ops.merge(large, torch.float16)


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        lora_ops.merge("llama")
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, .* or None, got torch\.int8"):
        lora_ops.merge(adapted(), torch.int8)
    meta = stock()
    meta.get_base_model().lm_head.to("meta")
    with pytest.raises(ValueError, match=r"lm_head\.weight is on the meta device"):
        lora_ops.merge(meta)


def test_bitsandbytes_layers_are_refused_with_the_way_to_take_them_over() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"))
    with pytest.raises(ValueError, match=r"got 0\.weight, a Params4bit; inject or quantize takes over"):
        lora_ops.merge(model)
