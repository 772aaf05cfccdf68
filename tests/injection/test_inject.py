"""inject: the same model as PEFT's, fused, with all that PEFT can do to it; and the way back."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_ops
from lora_ops.injection import InjectionError, InjectionReport
from lora_ops.nn import LoRALinear, NF4Linear
from tests import models

peft = pytest.importorskip("peft")
peft_layers = pytest.importorskip("lora_ops.injection.peft_layers")

ARCHITECTURES = list(models.DECODERS)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, since the models are too small for two, and reasons that no other test has told yet."""
    monkeypatch.setattr(peft_layers, "_told", set())
    monkeypatch.setattr(peft_layers, "traced", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(model: nn.Module, seed: int = 1, std: float = 0.1) -> nn.Module:
    """Give lora_A and lora_B values, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * std).to(parameter.dtype)
    return model


def injected(arch: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: object) -> nn.Module:
    return randomize(lora_ops.inject(models.DECODERS[arch](dtype=dtype), r=4, **kwargs)).eval()


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: object) -> nn.Module:
    """PEFT's own model with the adapters of `injected`."""
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=arch == "gpt2", **kwargs
    )
    return randomize(peft.get_peft_model(models.DECODERS[arch](dtype=dtype), config)).eval()


def logits(model: nn.Module, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(models.token_ids(), **kwargs).logits


def assert_same_logits(a: nn.Module | Tensor, b: nn.Module | Tensor) -> None:
    a, b = (v if isinstance(v, Tensor) else logits(v) for v in (a, b))
    assert a.dtype == b.dtype
    # Sums run in another order and are rounded once instead of several times; two blocks of layers feed each other.
    # Random adapters amplify that: over 24 seeds stock PEFT is up to 283 units in the last place of the largest float32
    # logit from float64, and ours up to 187. A lost bias, scale or adapter is 1e-2 and more.
    tolerance = {torch.float32: 256 * 2**-23, torch.bfloat16: 5 * 2**-7}[a.dtype]
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance * b.float().abs().max().item(), rtol=0)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def weight_bytes(model: nn.Module) -> dict[str, bytes]:
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()}


def first_layer(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def backward(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """The adapters' gradients of one training step."""
    ids = models.token_ids()
    model.train()
    torch.manual_seed(seed)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in adapters(model).items() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return grads


# The same function as PEFT's


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_peft(arch: str, dtype: torch.dtype) -> None:
    ours = injected(arch, dtype)
    assert not lora_ops.injection_report(ours).unfused
    with lora_ops.trace() as trace:
        y = logits(ours)
    assert len([c for c in trace.calls if c.op == "lora_linear"]) == len(lora_ops.injection_report(ours))
    assert_same_logits(y, stock(arch, dtype))
    assert adapters(ours).keys() == adapters(stock(arch, dtype)).keys()
    assert all(p.dtype == torch.float32 for p in adapters(ours).values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_those_of_peft(arch: str) -> None:
    ours, theirs = backward(injected(arch)), backward(stock(arch))
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(adapters(injected(arch)))
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-5 * theirs[name].abs().max().item(), rtol=1e-4)


def test_rslora_and_patterns_are_those_of_peft() -> None:
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}}
    assert_same_logits(injected(**options), stock(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    ours, theirs = injected(dtype=dtype), stock(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_logits(ours, theirs)
        assert not lora_ops.injection_report(ours).unfused


def test_dropout_in_training_only_and_of_the_right_probability() -> None:
    model = injected(lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    assert_same_logits(model, stock())
    model.train()
    assert not torch.equal(logits(model), logits(model))
    # E[drop(x)] = x, so the mean over many masks is the output without dropout.
    layer = first_layer(model)
    x = torch.randn(1, 64).expand(20000, 64).contiguous()
    with torch.no_grad():
        mean, expected = layer(x).mean(0), layer.eval()(x[:1])[0]
        spread = layer.train()(x).std(0).mean().item()
    torch.testing.assert_close(mean, expected, atol=6 * spread / 20000**0.5, rtol=0)
    assert spread > 0.05


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_generate(arch: str) -> None:
    ids = models.token_ids(1, 4)
    ours, theirs = (m.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for m in (injected(arch), stock(arch)))
    assert torch.equal(ours, theirs)


def test_compiles_without_graph_breaks() -> None:
    model = injected(quantize="nf4")
    for layer in (first_layer(model), first_layer(injected(lora_dropout=0.5)), first_layer(injected("gpt2"))):
        layer.train()
        x = torch.randn(3, 64, requires_grad=True)
        torch.manual_seed(0)
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
        torch.manual_seed(0)
        torch.testing.assert_close(y, layer(x))


def test_compiles_where_not_fused_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    layer = first_layer(injected(lora_bias=True, target_modules=["q_proj"]))
    x = torch.randn(3, 64)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert [r.getMessage() for r in caplog.records if "has lora_bias" in r.getMessage()]
    torch.testing.assert_close(y, layer(x))


def test_t5_keeps_wo_in_float32() -> None:
    model = randomize(lora_ops.inject(models.t5(), r=4, quantize="nf4"))
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    formats = {row.name.rpartition(".")[2]: row.weight_format for row in lora_ops.injection_report(model)}
    assert formats == {**dict.fromkeys(("q", "k", "v", "o", "wi"), "nf4"), "wo": "dense float32"}
    ids = models.token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapters(model).values())


# Adapters go to stock PEFT and back


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_trained_adapter_loads_in_stock_peft(arch: str, quantize: str | None, tmp_path: Path) -> None:
    ours = injected(arch, quantize=quantize)
    optimizer = torch.optim.SGD(adapters(ours).values(), lr=0.1)
    ids = models.token_ids()
    for _ in range(2):
        ours(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.save_pretrained(tmp_path)
    base = models.DECODERS[arch]()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert not any(type(m).__module__.startswith("lora_ops") for m in theirs.modules())
    assert adapters(theirs).keys() == adapters(ours).keys()
    for name, parameter in adapters(theirs).items():
        assert torch.equal(parameter, adapters(ours)[name])
    if quantize:  # stock PEFT on the same rounded weights
        for name, module in ours.named_modules():
            if isinstance(module, NF4Linear):
                weight = theirs.get_submodule(name).weight
                weight.data = module.dequantize() if arch != "gpt2" else module.dequantize().T.contiguous()
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_stock_adapter_is_injected_in_place(arch: str, tmp_path: Path) -> None:
    stock(arch).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(models.DECODERS[arch](), tmp_path, is_trainable=True).eval()
    y, names = logits(model), [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    modules = list(model.modules())
    optimizer = torch.optim.SGD(adapters(model).values(), lr=0.1)
    calls: list[int] = []
    first_layer(model).register_forward_hook(lambda *_: calls.append(1))
    assert lora_ops.inject(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not lora_ops.injection_report(model).unfused
    assert_same_logits(model, y)
    assert calls == [1]
    backward_before = {name: p.detach().clone() for name, p in adapters(model).items()}
    model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, backward_before[name]) for name, p in adapters(model).items())


def test_inject_twice_changes_nothing() -> None:
    model = injected()
    report, y = str(lora_ops.injection_report(model)), logits(model)
    assert lora_ops.inject(model) is model
    assert str(lora_ops.injection_report(model)) == report
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_eject(quantize: str | None) -> None:
    model = injected(quantize=quantize)
    y, parameters = logits(model), list(model.parameters())
    assert lora_ops.eject(model) is model
    assert type(first_layer(model)) is peft.tuners.lora.Linear
    assert type(model.base_model) is peft.tuners.lora.LoraModel
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with lora_ops.trace() as trace:
        assert_same_logits(model, y)
    assert trace.backends("lora_linear") == set()
    report = lora_ops.injection_report(model)
    assert {row.reason for row in report} == {"PEFT's own layer: call lora_ops.inject(model)"}
    lora_ops.inject(model)
    assert not lora_ops.injection_report(model).unfused
    assert torch.equal(logits(model), y)


def test_eject_refuses_what_peft_could_not_unmerge() -> None:
    model = injected(quantize="nf4")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its NF4 weight"):
        lora_ops.eject(model)
    with pytest.raises(TypeError, match="expected a PeftModel, got LlamaForCausalLM"):
        lora_ops.eject(models.llama())


def test_deepcopy() -> None:
    model = injected(quantize="nf4")
    assert_same_logits(copy.deepcopy(model), model)


# Disabled, several, merged


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_disable_adapter(quantize: str | None) -> None:
    model = injected(quantize=quantize)
    y = logits(model)
    bare = logits(lora_ops.inject(models.llama(), r=4, quantize=quantize))  # lora_B is zero
    with model.disable_adapter():
        assert_same_logits(model, bare)
        assert "disabled" in lora_ops.injection_report(model)[0].reason
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_second_adapter(arch: str, quantize: str | None) -> None:
    """Added, chosen, both at once, mixed in a batch, deleted: as PEFT's own layers do over the same base."""
    ours, theirs = injected(arch, quantize=quantize), injected(arch, quantize=quantize)
    lora_ops.eject(theirs)
    for model in (ours, theirs):
        model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "c_attn"]))
        randomize(model, seed=5)
    assert_same_logits(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("second")
    assert_same_logits(ours, theirs)
    report = lora_ops.injection_report(ours)
    assert {row.state for row in report if not row.fused} == {"no active adapter"}
    assert not report.unfused
    assert {row.name.rpartition(".")[2] for row in report if row.fused} == {"c_attn" if arch == "gpt2" else "q_proj"}
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    assert_same_logits(ours, theirs)
    assert any(row.reason == "2 active adapters: default, second" for row in lora_ops.injection_report(ours))
    names = ["default", "second"]
    assert_same_logits(logits(ours, adapter_names=names), logits(theirs, adapter_names=names))
    for model in (ours, theirs):
        model.set_adapter("default")
    assert_same_logits(logits(ours, adapter_names=names), logits(theirs, adapter_names=names))
    assert "adapter_names" in lora_ops.injection_report(ours)[0].reason
    for model in (ours, theirs):
        model.set_adapter("second")
        model.delete_adapter("default")
    assert_same_logits(ours, theirs)
    assert not any("default" in name for name in adapters(ours))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_second_adapter_on_other_layers_is_fused_too(quantize: str | None) -> None:
    model = injected(target_modules=["q_proj"], quantize=quantize)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    report = lora_ops.injection_report(model)
    assert not report.unfused
    assert len([row for row in report if row.name.endswith(("q_proj", "v_proj"))]) == 4
    logits(model)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_model_that_has_nf4_layers_already(arch: str) -> None:
    """Such as a merged one: its layers take adapters, first and later ones, if they are plain LoRA."""
    base = injected(arch, quantize="nf4").merge_and_unload()
    with pytest.raises(ValueError, match="init_lora_weights: expected True, False, 'gaussian', 'eva'"):
        lora_ops.inject(base, init_lora_weights="pissa")
    y, first, later = logits(base), *(("q_proj", "v_proj") if arch == "llama" else ("c_attn", "c_fc"))
    model = lora_ops.inject(base, r=4, target_modules=[first])
    assert_same_logits(model, y)
    config = {"target_modules": [later], "fan_in_fan_out": arch == "gpt2"}
    with pytest.raises(ValueError, match="use_dora: an NF4 base layer takes plain LoRA"):
        model.add_adapter("dora", peft.LoraConfig(use_dora=True, **config))
    model.add_adapter("second", peft.LoraConfig(**config))
    model.set_adapter("second")
    randomize(model, std=0.02)
    rows = [row for row in lora_ops.injection_report(model) if row.fused and row.name.endswith(later)]
    assert [row.weight_format for row in rows] == ["nf4", "nf4"]
    layer = model.get_submodule(rows[0].name)
    dense = layer.base_layer.dequantize() + layer.get_delta_weight("second")
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.base_layer.bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merge_of_dense_layers_is_that_of_peft(arch: str) -> None:
    ours, theirs = injected(arch), stock(arch)
    y = logits(ours)
    for model in (ours, theirs):
        model.merge_adapter(safe_merge=True)
    assert_same_logits(ours, theirs)
    assert "merged" in lora_ops.injection_report(ours)[0].reason
    ours.unmerge_adapter()
    assert_same_logits(ours, y)
    merged = ours.merge_and_unload()
    assert not isinstance(merged, peft.PeftModel)
    assert_same_logits(merged, y)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_of_nf4_layers(arch: str, safe_merge: bool) -> None:
    model = injected(arch, quantize="nf4")
    y, before = logits(model), weight_bytes(model)
    layer = first_layer(model)
    base = layer.get_base_layer()
    dense = base.dequantize() + layer.get_delta_weight("default")
    expected = lora_ops.functional.quantize_nf4(dense, double_quant=True)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(base.weight, expected.packed)
    assert torch.equal(base.dequantize(), expected.dequantize())
    assert not torch.equal(logits(model), y)
    model.unmerge_adapter()
    assert weight_bytes(model) == before
    assert torch.equal(logits(model), y)


def test_nf4_merge_and_unload() -> None:
    model = injected(quantize="nf4")
    twin = copy.deepcopy(model)
    twin.merge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, NF4Linear)
    assert torch.equal(logits(merged), logits(twin))
    assert not any("lora_" in name for name, _ in merged.named_modules())


def test_nf4_merge_of_two_adapters_rounds_once_and_unmerges_exactly() -> None:
    model = injected(quantize="nf4")
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=7, target_modules="all-linear"))
    randomize(model)
    before = weight_bytes(model)
    layer = first_layer(model)
    dense = layer.base_layer.dequantize() + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    expected = lora_ops.functional.quantize_nf4(dense, double_quant=True)
    for calls in ([["default", "second"]], [["default"], ["second"]]):
        for names in calls:
            model.merge_adapter(names)
        torch.testing.assert_close(layer.base_layer.dequantize(), expected.dequantize())
        assert layer.merged_adapters == ["default", "second"]
        model.unmerge_adapter()
        assert weight_bytes(model) == before
        assert not layer.merged


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_safe_merge_refuses_nan_and_changes_nothing(quantize: str | None) -> None:
    model = injected(quantize=quantize)
    layer = first_layer(model)
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    before = weight_bytes(layer)
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert weight_bytes(layer) == before
    assert not layer.merged


def test_nf4_merge_with_lora_bias() -> None:
    model = randomize(lora_ops.inject(models.qwen2(), r=4, quantize="nf4", target_modules=["q_proj"], lora_bias=True))
    assert {row.reason for row in lora_ops.injection_report(model).unfused} == {"adapter 'default' has lora_bias"}
    layer = first_layer(model)
    for parameter in (layer.lora_B["default"].bias,):
        nn.init.normal_(parameter)
    before, bias = weight_bytes(model), layer.base_layer.bias.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.bias, bias + layer.scaling["default"] * layer.lora_B["default"].bias)
    model.unmerge_adapter()
    assert weight_bytes(model) == before


# Quantization


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_quantize_takes_every_linear_layer_but_the_output_embedding(arch: str) -> None:
    model = injected(arch, quantize="nf4")
    names = {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert len(names) == len(lora_ops.injection_report(model))
    assert not any("lm_head" in name for name in names)
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert {row.weight_format for row in lora_ops.injection_report(model)} == {"nf4"}
    # The same layer that from_linear makes of the dense one.
    for name in names:
        dense = models.DECODERS[arch]().get_submodule(
            name.removeprefix("base_model.model.").removesuffix(".base_layer")
        )
        assert weight_bytes(NF4Linear.from_linear(dense)) == weight_bytes(model.get_submodule(name))
    few = injected(arch, quantize="nf4", target_modules=["q_proj", "c_attn"])
    assert sum(isinstance(m, NF4Linear) for m in few.modules()) == len(names)
    report = lora_ops.injection_report(few)
    assert {row.weight_format for row in report} == {"nf4"}
    assert not report.unfused


def test_quantize_leaves_modules_that_are_trained_whole() -> None:
    model = lora_ops.inject(models.llama(), r=4, target_modules=["q_proj"], modules_to_save=["o_proj"], quantize="nf4")
    dense = {name.rpartition("layers.")[2] for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert any("o_proj" in name for name in dense)
    assert not any("down_proj" in name for name in dense)


def test_an_output_embedding_that_is_targeted_stays_dense() -> None:
    model = injected(quantize="nf4", target_modules=["q_proj", "lm_head"])
    formats = {row.name.rpartition(".")[2]: (row.weight_format, row.fused) for row in lora_ops.injection_report(model)}
    assert formats.pop("lm_head") == ("dense float32", True)
    assert set(formats.values()) == {("nf4", True)}


def test_quantize_an_existing_peft_model() -> None:
    model = stock("gpt2")
    parameters = adapters(model)
    lora_ops.inject(model, quantize="nf4")
    assert all(parameters[name] is p for name, p in adapters(model).items())
    assert {(row.kind, row.weight_format, row.fused) for row in lora_ops.injection_report(model)} == {
        ("NF4Linear", "nf4", True)
    }
    assert_same_logits(model, injected("gpt2", quantize="nf4"))
    lora_ops.inject(model, quantize="nf4")  # a second time there is nothing to do


def bnb_model(**config: object) -> nn.Module:
    """Qwen2 (with biases) whose q_proj is bitsandbytes nf4 and k_proj fp4, as PEFT takes a model loaded in 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    base = models.qwen2()
    for layer in base.model.layers:
        for name, quant_type in (("q_proj", "nf4"), ("k_proj", "fp4")):
            linear = getattr(layer.self_attn, name)
            quantized = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type=quant_type)
            quantized.weight.data, quantized.bias = linear.weight.data, linear.bias
            setattr(layer.self_attn, name, quantized.to("cpu"))
    base.is_loaded_in_4bit = True
    targets = ["q_proj", "k_proj", "v_proj"]
    return randomize(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, **config)))


def test_bitsandbytes_layers_are_converted_over_the_same_bytes() -> None:
    model = bnb_model()
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear4bit)]
    assert len(layers) == 4
    states = [{k: (v.data_ptr(), v.clone()) for k, v in m.base_layer.state_dict().items()} for m in layers]
    lora_ops.inject(model)
    converted = [(m, state) for m, state in zip(layers, states, strict=True) if isinstance(m.base_layer, NF4Linear)]
    assert len(converted) == 2
    for layer, state in converted:
        after = layer.base_layer.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[k], v) for k, (_, v) in state.items())
        assert after["weight"].data_ptr() == state["weight"][0]
    rows = {row.name.rpartition(".")[2]: row for row in lora_ops.injection_report(model)}
    assert (rows["q_proj"].fused, rows["q_proj"].weight_format) == (True, "nf4")
    assert (rows["v_proj"].fused, rows["v_proj"].weight_format) == (True, "dense float32")
    assert not rows["k_proj"].fused
    assert "bnb.Linear4bit" in rows["k_proj"].reason
    logits(model.train())
    lora_ops.eject(model)
    assert type(layers[0]) is peft.tuners.lora.Linear


def test_bitsandbytes_layers_with_dora_stay_bitsandbytes() -> None:
    model = bnb_model(use_dora=True)
    lora_ops.inject(model)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert len(lora_ops.injection_report(model).unfused) == 6


def test_inject_warns_of_nothing() -> None:
    """PEFT warns where fan_in_fan_out does not fit Conv1D."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for arch in ARCHITECTURES:
            lora_ops.inject(models.DECODERS[arch](), quantize="nf4")


def test_pissa_quantizes_the_residual() -> None:
    """The adapter takes the largest singular directions from the dense weight; what is left is quantized."""
    dense = models.llama().model.layers[0].self_attn.q_proj.weight
    model = lora_ops.inject(models.llama(), r=4, lora_alpha=4, quantize="nf4", init_lora_weights="pissa")
    layer = first_layer(model)
    residual = dense - layer.get_delta_weight("default")
    assert (layer.base_layer.dequantize() - residual).abs().max() < 0.3 * residual.abs().max()
    assert not lora_ops.injection_report(model).unfused


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("after", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, quantize: str | None, after: bool) -> None:
    plain = backward(injected(lora_dropout=0.1, quantize=quantize))
    base = models.llama()

    def enable(model: nn.Module) -> None:
        # Older versions of transformers have the second name alone, newer ones warn of it.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})

    if not after:
        enable(base)
    model = randomize(lora_ops.inject(base, r=4, lora_dropout=0.1, quantize=quantize))
    if after:
        enable(model)
    assert all(layer.gradient_checkpointing for layer in base.model.layers)
    checkpointed = backward(model)
    assert checkpointed.keys() == plain.keys()
    assert len(plain) == len(adapters(model))
    assert all(torch.equal(checkpointed[name], grad) for name, grad in plain.items())


def test_no_gradient_that_nobody_needs() -> None:
    """Without checkpointing the embedding's output asks for no gradient, so the first layer computes no dX."""
    model = injected()
    seen = []
    first_layer(model).register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    backward(model)
    assert seen == [False]


# Reasons


def test_dora_runs_pefts_math_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_ops"):
        ours = injected(use_dora=True)
        assert_same_logits(ours, stock(use_dora=True))
        logits(ours)
    report = lora_ops.injection_report(ours)
    assert len(report.unfused) == len(report)
    assert {row.reason for row in report} == {"adapter 'default' is not plain LoRA: DoraLinearVariant"}
    told = [r.getMessage() for r in caplog.records if "DoraLinearVariant" in r.getMessage()]
    assert len(told) == 1  # not once a layer


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = injected()
    layer = first_layer(model)
    layer.base_layer.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        logits(model)
        logits(model)
    assert [r.getMessage() for r in caplog.records if "hooks" in r.getMessage()] == [
        "a LoRA layer runs PEFT's math instead of lora_linear: base layer has hooks or a forward of its own, "
        "which the fused op would not call"
    ]
    assert_same_logits(model, stock())


def _hook(layer: nn.Module) -> None:
    layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _own_forward(layer: nn.Module) -> None:
    layer.base_layer.forward = layer.base_layer.forward


def _train_base(layer: nn.Module) -> None:
    layer.base_layer.weight.requires_grad_(True)


def _parametrize(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer.lora_A["default"])


def _dropout(layer: nn.Module) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "lora_A has hooks"),
        (_own_forward, "base layer has hooks or a forward of its own"),
        (_train_base, "requires a gradient"),
        (_parametrize, "lora_A: expected Linear, got"),
        (_dropout, "lora_dropout: expected Identity or Dropout"),
    ],
)
def test_what_the_fused_op_would_miss_is_not_fused(change: Callable[[nn.Module], None], reason: str) -> None:
    ours, theirs = injected(), stock()
    for model in (ours, theirs):
        change(first_layer(model))
    assert reason in lora_ops.injection_report(ours)[0].reason
    assert_same_logits(ours, theirs)


def test_a_call_that_is_not_fused_is_in_the_report_until_one_is() -> None:
    layer = first_layer(injected())
    layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)
    assert layer(torch.randn(2, 64)).dtype == torch.float32
    (row,) = lora_ops.injection_report(layer)
    assert (row.fused, row.reason) == (False, "lora_A is bfloat16 under float32 activations")
    layer.float()
    layer(torch.randn(2, 64))
    assert lora_ops.injection_report(layer)[0].fused


def test_float64_goes_to_peft_where_adapters_are_float32() -> None:
    layer = first_layer(injected(quantize="nf4"))
    x = torch.randn(2, 64, dtype=torch.float64)
    y = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), layer(x.float()), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="x: expected dtype"):
        layer(torch.ones(2, 64, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_nf4_base_follows_the_dtype_of_x(dtype: torch.dtype) -> None:
    """As bitsandbytes does, and unlike a dense layer; Qwen2's q_proj has a bias."""
    layer = first_layer(injected("qwen2", torch.bfloat16, quantize="nf4"))
    x = torch.randn(2, 64).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.unfused_call is None
    dense = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    expected = nn.functional.linear(x.float(), dense, layer.base_layer.bias.float())
    torch.testing.assert_close(y.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_embeddings_are_reported() -> None:
    model = injected(target_modules=["q_proj", "embed_tokens"])
    (row,) = lora_ops.injection_report(model).unfused
    assert (row.kind, row.weight_format) == ("Embedding", "dense float32")
    assert row.reason.startswith("lora_ops fuses PEFT's lora.Linear only")
    assert_same_logits(model, randomize(lora_ops.eject(injected(target_modules=["q_proj", "embed_tokens"]))))


def test_strict_names_the_layers_and_leaves_the_model() -> None:
    base = models.llama()
    before = weight_bytes(base)
    with pytest.raises(InjectionError, match=r"1 targeted layers cannot be fused:\n.*embed_tokens: lora_ops fuses"):
        lora_ops.inject(base, target_modules=["q_proj", "embed_tokens"], quantize="nf4", strict=True)
    assert weight_bytes(base) == before
    model = stock(use_dora=True)
    with pytest.raises(InjectionError, match="DoraLinearVariant"):
        lora_ops.inject(model, strict=True)
    assert type(first_layer(model)) is peft.tuners.lora.Linear
    assert not lora_ops.injection_report(lora_ops.inject(models.llama(), quantize="nf4", strict=True)).unfused


def test_report_of_modules_without_peft() -> None:
    model = nn.Sequential(LoRALinear(8, 8, r=2), NF4Linear.from_linear(nn.Linear(8, 8)), nn.Linear(8, 8))
    report = lora_ops.injection_report(model)
    assert isinstance(report, InjectionReport)
    assert [(r.name, r.kind, r.fused, r.weight_format) for r in report] == [
        ("0", "LoRALinear", True, "dense float32"), ("1", "NF4Linear", True, "nf4"),
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "state", "backend", "weight", "reason"]
    assert lines[3] == "2 of 2 layers fused"
    assert str(lora_ops.injection_report(nn.Linear(2, 2))).startswith("no LoRA or NF4 layer in this model\n")


def test_report_names_the_backend() -> None:
    model = injected()
    with lora_ops.use_backend("reference"):
        assert {row.backend for row in lora_ops.injection_report(model)} == {"reference"}
    with lora_ops.use_backend("triton"):
        report = lora_ops.injection_report(model)
        assert not any(row.fused for row in report)
        assert all("triton" in row.reason for row in report)


# Arguments


def test_any_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = lora_ops.inject(Block(), r=2, quantize="nf4")
    assert len(lora_ops.injection_report(model)) == 2
    assert model(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"quantize": "int3"}, ValueError, "quantize: expected one of None, 'nf4', got 'int3'"),
        ({"r": 0}, ValueError, "r: expected an integer of at least 1, got 0"),
        ({"r": 2.5}, ValueError, "r: expected an integer"),
        ({"lora_dropout": 2.0}, ValueError, "lora_dropout: expected a probability"),
        ({"lora_rank": 4}, TypeError, "lora_rank: neither an argument of inject nor a field of PEFT's LoraConfig"),
        ({"quantize": "nf4", "use_dora": True}, ValueError, "use_dora: an NF4 base layer takes plain LoRA"),
    ],
)
def test_bad_arguments_name_themselves(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    model = models.llama()
    with pytest.raises(error, match=message):
        lora_ops.inject(model, **kwargs)
    assert not any("lora_" in name for name, _ in model.named_modules())


def test_bad_models() -> None:
    for function in (lora_ops.inject, lora_ops.injection_report):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
            function("llama")
    with pytest.raises(ValueError, match=r"r: the model is a PeftModel.*takes no r, use_rslora for it"):
        lora_ops.inject(stock(), r=8, use_rslora=True)
    with pytest.raises(ValueError, match="expected a PeftModel with LoRA adapters, got IA3Model"):
        lora_ops.inject(peft.get_peft_model(models.llama(), peft.IA3Config()))
    with pytest.raises(ValueError, match="without a PeftModel around them"):
        lora_ops.inject(stock().get_base_model())
    merged = stock()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="has merged adapters"):
        lora_ops.inject(merged, quantize="nf4")


def test_an_infinite_weight_is_named() -> None:
    model = models.llama()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj: .*finite"):
        lora_ops.inject(model, quantize="nf4")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_later_adapters_on_nf4_must_be_plain(options: dict[str, object]) -> None:
    model = injected(quantize="nf4")
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*NF4 base layer"):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], **options))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs peft, transformers: install with  pip install "lora_ops\[train\]"'):
        lora_ops.inject(nn.Linear(2, 2))
