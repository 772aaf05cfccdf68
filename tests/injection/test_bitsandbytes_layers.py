"""bitsandbytes' 4-bit layers: all in nf4 are converted, wherever they are, and keep the dtype that they compute in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_ops
from lora_ops.nn import LoRALinear, NF4Linear
from tests import models

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear4bit(k: int = 64, n: int = 48, **kwargs: Any) -> Any:
    layer = bnb.nn.Linear4bit(k, n, **{"quant_type": "nf4", **kwargs})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Linear(k, n, bias=layer.bias is not None)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def peft_model(compute_dtype: torch.dtype | None) -> Any:
    net = nn.ModuleDict({"q": linear4bit(compute_dtype=compute_dtype)})
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["q"]))
    nn.init.normal_(model.base_model.model["q"].lora_B["default"].weight, std=0.1)
    return model


@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_runs_in_the_compute_dtype(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> None:
    """With an adapter and without: y, its dtype and the gradients are those of bitsandbytes."""
    model = peft_model(compute_dtype)
    layer = model.base_model.model["q"]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run() -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.float().square().sum().backward()
        grads = [p.grad.clone() for n, p in model.named_parameters() if "lora_" in n]
        model.zero_grad()
        return y.detach(), leaf.grad, *grads

    plain, theirs = layer.base_layer(x), run()
    state = layer.base_layer.state_dict()
    lora_ops.inject(model)
    base = layer.base_layer
    assert isinstance(base, NF4Linear)
    assert base.compute_dtype == (compute_dtype or (None if dtype == torch.float16 else dtype))
    assert base.state_dict().keys() == state.keys()
    with lora_ops.trace() as trace:
        ours = run()
        alone = base(x)
    ran = base.compute_dtype or dtype
    assert {str(call.dtype).removeprefix("torch.") for call in trace.calls} == {str(ran).removeprefix("torch.")}
    # PEFT adds the low-rank branch in the adapter's float32, one rounding to the compute dtype apart from ours.
    unit = torch.finfo(ran).eps if ran != torch.float32 else 64 * torch.finfo(ran).eps
    unit = max(unit, torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    for a, b in zip((*ours, alone), (*theirs, plain), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), atol=4 * unit * b.float().abs().max().item(), rtol=0)


def test_drop_in_modules_keep_it_too() -> None:
    base = NF4Linear.from_linear(nn.Linear(64, 48))
    base.compute_dtype = torch.bfloat16
    layer = LoRALinear.from_linear(base, r=4)
    x = torch.randn(3, 64)
    with lora_ops.trace() as trace:
        assert layer(x).dtype == base(x).dtype == torch.float32
    assert {str(call.dtype) for call in trace.calls} <= {"torch.bfloat16", "bfloat16"}
    assert "compute_dtype=bfloat16" in repr(base)
    with pytest.raises(ValueError, match="x: expected dtype"):
        base(torch.ones(2, 64, dtype=torch.int64))


def quantized_llama(**quant_types: str) -> Any:
    """Llama of which some linear layers are bitsandbytes'."""
    base = models.llama()
    for name, module in list(base.named_modules()):
        last = name.rpartition(".")[2]
        if last in quant_types:
            layer = linear4bit(module.in_features, module.out_features, bias=False, quant_type=quant_types[last])
            setattr(base.get_submodule(name.rpartition(".")[0]), last, layer)
    base.is_loaded_in_4bit = True
    return base


def test_every_layer_of_bitsandbytes_is_converted_or_in_the_report() -> None:
    base = quantized_llama(q_proj="nf4", k_proj="fp4", up_proj="nf4", down_proj="fp4")
    model = lora_ops.inject(base, r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    rows = {row.name.rpartition(".")[2]: row for row in lora_ops.injection_report(model)}
    assert (rows["q_proj"].fused, rows["q_proj"].kind) == (True, "NF4Linear")
    assert (rows["up_proj"].fused, rows["up_proj"].kind) == (True, "NF4Linear")  # no adapter's target
    fp4 = "bitsandbytes fp4: lora_ops has nf4 only; load with bnb_4bit_quant_type='nf4'"
    assert (rows["k_proj"].fused, rows["down_proj"].fused) == (False, False)
    assert rows["down_proj"].reason == fp4
    left = [name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {name.rpartition(".")[2] for name in left} <= {"base_layer", "down_proj"}
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_layer_without_values_is_left_and_said() -> None:
    net = nn.ModuleDict({"a": bnb.nn.Linear4bit(8, 8, quant_type="nf4"), "b": nn.Linear(8, 8)})
    model = lora_ops.inject(net, r=2, target_modules=["b"])
    (row,) = [row for row in lora_ops.injection_report(model) if row.name.endswith(".a")]
    assert row.reason.startswith("a bitsandbytes layer without quantized values")


def test_a_model_that_is_not_injected_yet_says_so() -> None:
    report = lora_ops.injection_report(nn.ModuleDict({"a": linear4bit()}))
    assert [row.reason for row in report] == ["bitsandbytes' own layer: call lora_ops.inject(model)"]


def test_layers_that_bitsandbytes_repacked_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """What a forward in eval() does on a CPU with AVX-512-BF16: generating a sample before inject is enough."""
    net = nn.Sequential(linear4bit(64, 64), linear4bit(64, 64))
    expected = [bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in net]
    for m in net:
        m.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(m.weight.data, m.weight.quant_state)
    with caplog.at_level("WARNING", "lora_ops"):
        model = lora_ops.inject(net, target_modules=["0", "1"])
    assert "rounded the scales of 2 NF4 layers (0, ...)" in caplog.text
    assert "before the first forward" in caplog.text
    for layer, w in zip(model.base_model.model, expected, strict=True):
        got = layer.base_layer.quantized.dequantize()
        assert (got - w.float()).abs().max() <= 2**-6 * w.abs().max()
