"""Frozen layers without adapters and attention, on a CPU that torch is slow on in the model's dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lora_ops
from lora_ops.quant import native_abi
from lora_ops.runtime import machine, native
from tests import models

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is missing: make native builds it")


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that torch is slow on at 16 bits, whatever this one is."""
    monkeypatch.setattr(native_abi, "takes_dense", lambda weight: weight.dtype in SIXTEEN_BITS)
    monkeypatch.setattr(machine, "_onednn_takes", lambda dtype: False)
    machine.slow_16bit_reason.cache_clear()
    monkeypatch.setattr(machine, "_told", set())
    yield
    machine.slow_16bit_reason.cache_clear()


MODELS: dict[str, Callable[..., Any]] = {"llama": models.llama, "gpt2": models.gpt2}
IDS = torch.arange(18).view(2, 9)


def step(model: nn.Module, **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the gradients of what is trained."""
    out = model(input_ids=IDS, labels=IDS, **kwargs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.logits.detach(), grads


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("name", MODELS)
def test_all_products_of_a_step_are_ours(name: str, dtype: torch.dtype) -> None:
    model = lora_ops.inject(MODELS[name](dtype=dtype), r=2)
    with lora_ops.trace() as t:
        step(model)
    n_adapted = sum(hasattr(m, "lora_A") for m in model.modules())
    calls = {(r["op"], r["backend"]): r["count"] for r in t.summary()}
    assert calls == {
        ("lora_linear", "native"): n_adapted,
        ("lora_linear_backward", "native"): n_adapted,
        ("frozen_linear", "native"): 1,  # the output head
        ("frozen_linear_dx", "native"): 1,
        ("attention in float32", "torch"): 2,
    }
    report = lora_ops.injection_report(model)
    assert (len(report), report.frozen) == (n_adapted, ("base_model.model.lm_head",))
    assert "1 other layers on frozen_linear (base_model.model.lm_head)" in str(report)
    assert {r.backend for r in report} == {"native"}
    assert {r.kind for r in report} <= {"Linear", "Conv1D"}


@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_float32(name: str) -> None:
    """Within what 16 bits lose in a whole model: a product or a mask in the wrong place is an error of 1."""
    ours = lora_ops.inject(MODELS[name](dtype=torch.float16), r=2, init_lora_weights=False)
    exact = lora_ops.eject(copy.deepcopy(ours)).float()
    (y, grads), (expected, expected_grads) = step(ours), step(exact)
    assert (y.float() - expected).norm() <= 2**-5 * expected.norm()
    if name == "gpt2":  # in Llama's norms torch's own backward overflows in float16
        for key, grad in expected_grads.items():
            assert (grads[key].float() - grad).norm() <= 2**-2 * grad.norm(), key


def test_layers_beside_the_targets_are_served() -> None:
    model = lora_ops.inject(models.llama(dtype=torch.float16), r=2, target_modules=["q_proj"])
    with lora_ops.trace() as t:
        step(model)
    assert sum(c.op == "frozen_linear" for c in t.calls) == 13  # 6 of each of 2 layers, and the output head
    with lora_ops.trace() as t, model.disable_adapter(), torch.no_grad():
        model(input_ids=IDS)
    assert sum(c.op == "frozen_linear" for c in t.calls) == 15


def test_nothing_is_touched_in_float32_and_on_a_fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_ops.inject(models.llama(dtype=torch.float32), r=2)
    assert not any(hasattr(m, "runs_frozen_linear") or "_lora_ops_attention" in m.__dict__ for m in model.modules())
    monkeypatch.setattr(native_abi, "takes_dense", lambda weight: False)
    monkeypatch.setattr(machine, "_onednn_takes", lambda dtype: True)
    machine.slow_16bit_reason.cache_clear()
    model = lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2)
    assert not any(hasattr(m, "runs_frozen_linear") or "_lora_ops_attention" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_ways_back(name: str) -> None:
    """eject, PEFT's unload and merge leave the classes that the model had; a second inject changes nothing."""
    model = MODELS[name](dtype=torch.bfloat16)
    before, keys = classes(model), list(model.state_dict())
    injected = lora_ops.inject(model, r=2)
    adopted = classes(injected)
    assert classes(lora_ops.inject(injected)) == adopted
    lora_ops.eject(injected)
    assert not any(hasattr(m, "runs_frozen_linear") or "_lora_ops_attention" in m.__dict__ for m in injected.modules())
    lora_ops.inject(injected)
    assert classes(injected) == adopted
    bare = injected.unload()
    assert not any("_lora_ops_attention" in m.__dict__ for m in bare.modules())
    assert (classes(bare), list(bare.state_dict())) == (before, keys)
    assert classes(lora_ops.merge(lora_ops.inject(bare, r=2))) == before


def test_a_dense_model_may_become_nf4_later() -> None:
    model = lora_ops.inject(lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2), quantize="nf4")
    kinds = {m.source_cls for m in model.modules() if isinstance(m, lora_ops.nn.NF4Linear)}
    assert kinds == {nn.Linear}
    with lora_ops.trace() as t:
        step(model)
    assert {c.op for c in t.calls if "frozen" in c.op} == {"frozen_linear", "frozen_linear_dx"}  # the output head


def test_a_frozen_adapter_stays_fused(tmp_path: Path) -> None:
    """As PEFT loads one for inference."""
    lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2).save_pretrained(tmp_path)
    model = lora_ops.inject(PeftModel.from_pretrained(models.llama(dtype=torch.bfloat16), tmp_path))
    assert not any(p.requires_grad for p in model.parameters())
    report = lora_ops.injection_report(model)
    assert not report.unfused
    assert report.frozen == ("base_model.model.lm_head",)


def test_a_weight_that_is_trained_later_gets_its_gradient() -> None:
    model = lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2)
    head = model.get_base_model().lm_head
    head.weight.requires_grad_()
    step_grads = step(model)[1]
    assert any(name.endswith("lm_head.weight") for name in step_grads)


def test_a_layer_moved_to_another_dtype_is_torchs() -> None:
    model = lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2).float()
    with lora_ops.trace() as t:
        step(model)
    assert "attention in float32" not in {c.op for c in t.calls}
    assert {c.dtype for c in t.calls} == {"float32"}


def test_hooks_and_compile() -> None:
    model = lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2)
    seen: list[Any] = []
    model.get_base_model().lm_head.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    expected, _ = step(model)
    assert len(seen) == 1
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(step(compiled)[0], expected)


def head() -> tuple[nn.Module, nn.Linear]:
    """A model whose second layer is frozen and without an adapter, and that layer as it was."""
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).bfloat16()
    theirs = copy.deepcopy(layers[1]).requires_grad_(False)
    ours = lora_ops.inject(layers, r=2, target_modules=["0"]).get_base_model()[1]
    assert getattr(ours, "runs_frozen_linear", False)
    return ours, theirs


X = torch.linspace(-2, 2, 5 * 64).view(5, 64).bfloat16()
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (X.flip(0),))[1],
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x).sum(0))(X),
    "vmap": lambda f: torch.func.vmap(f)(X),
    "trace": lambda f: torch.jit.trace(f, X)(X),
    "sparse": lambda f: f(X.to_sparse()),
    "nested": lambda f: f(torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)).values(),
    "under a meta device": lambda f: _under_meta(f),
    "hessian": lambda f: torch.autograd.functional.hessian(lambda x: f(x[None]).float().square().sum(), X[0]),
}


def _under_meta(f: nn.Module) -> torch.Tensor:
    with torch.device("meta"):
        return f(X)


@pytest.mark.parametrize("call", CALLS)
def test_whatever_torch_does_with_a_linear_layer(call: str) -> None:
    ours, theirs = head()
    expected = CALLS[call](theirs)
    got = CALLS[call](ours)
    assert got.device == expected.device
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


def test_a_wrong_shape_is_torchs_error() -> None:
    ours, _ = head()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(X[:, 1:])


def test_a_stored_forward_outlives_eject() -> None:
    """As hooks of accelerate keep one."""
    model = lora_ops.inject(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).bfloat16(), r=2, target_modules=["0"])
    forward = model.get_base_model()[1].forward
    lora_ops.eject(model).requires_grad_()
    forward(X).sum().backward()


def test_small_and_narrow_layers_stay_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op costs more than their products where torch is not slow, and a head of few outputs fills no tile."""
    monkeypatch.undo()
    machine.slow_16bit_reason.cache_clear()
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    model = lora_ops.inject(model, r=2, target_modules=["0"])
    assert not lora_ops.injection_report(model).frozen


def test_attention_that_wraps_ours_is_not_called_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lora_ops.inject(models.llama(dtype=torch.float16), r=2)
    ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", lambda *args, **kwargs: ours(*args, **kwargs))
        lora_ops.inject(models.llama(dtype=torch.float16), r=2)
        first(input_ids=IDS)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", ours)


def test_attention_breaks_no_graph() -> None:
    model = lora_ops.inject(models.llama(dtype=torch.float16), r=2)
    with torch.no_grad():
        torch.compile(model.get_base_model().model, backend="aot_eager", fullgraph=True)(IDS)


def test_other_models_attention_passes_through() -> None:
    lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2)
    other = models.llama(dtype=torch.bfloat16)
    with lora_ops.trace() as t:
        other(input_ids=IDS, labels=IDS).loss.backward()
    assert not t.calls
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__name__ == "_attention"
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_attention_in_16_bits_where_that_is_faster(dtype: torch.dtype) -> None:
    """Without gradients bfloat16 is, and one token at a time."""
    model = lora_ops.inject(models.llama(dtype=dtype), r=2)
    for ids, expected in ((IDS, dtype == torch.float16), (IDS[:, :1], False)):
        with lora_ops.trace() as t, torch.no_grad():
            model(input_ids=ids)
        assert ("attention in float32" in {c.op for c in t.calls}) == expected


def test_padding_is_masked() -> None:
    model = lora_ops.inject(models.llama(dtype=torch.float16), r=2)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        padded = model(input_ids=IDS, attention_mask=mask).logits[0, 4:]
        short = model(input_ids=IDS[:1, 4:], position_ids=torch.arange(4, 9)[None]).logits[0]
    torch.testing.assert_close(padded, short, atol=2e-3, rtol=2e-3)
