"""Layers whose weight the model's own code reads: found in its source, left dense and without an adapter, and said."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ops
from lora_ops.injection import InjectionError
from lora_ops.injection.reads import weight_reads
from lora_ops.injection.source import Use
from lora_ops.nn import NF4Linear
from tests import models

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def multiply(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight)


def pass_on(x: Tensor, owner: Any) -> Tensor:
    return multiply(x, layer=owner.fc)


def untouched(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return method(*args, **kwargs)

    return wrapper


def opaque(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(self: Any, x: Tensor) -> Tensor:
        return method(self, x)

    return wrapper


class Layers(nn.Module):
    """`fc` is called or read, as the subclass has it; `other` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.items = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc(x))


class Directly(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.linear(x, self.fc.weight))


class ThroughNames(Layers):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.fc
        weight, bias = layer.weight, layer.bias
        return self.other(x @ weight.t() + bias)


class InALoop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, scale) in enumerate(zip((self.fc,), (1.0,), strict=True)):
            x = x @ layer.weight.T * scale + i
        return self.other(x)


class InAComprehension(Layers):
    def forward(self, x: Tensor) -> Tensor:
        total = sum(w.sum() for w in [m.weight for m in [self.fc]])
        return self.other(x) + total


class ByGetattr(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(x @ getattr(self.fc, "weight"))  # noqa: B009


class InAFunction(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(pass_on(x, self))


class InAMethod(Layers):
    @property
    def matrix(self) -> Tensor:
        return self.fc.weight

    def project(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.project(x))


class InABase(Directly):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Decorated(Layers):
    @untouched
    def forward(self, x: Tensor) -> Tensor:
        return self.other(x @ self.fc.weight)


class DecoratedBlindly(Layers):
    @opaque
    def forward(self, x: Tensor) -> Tensor:
        return self.other(x @ self.fc.weight)


class InALambda(Layers):
    def forward(self, x: Tensor) -> Tensor:
        product = lambda t: t @ self.fc.weight  # noqa: E731
        return self.other(product(x))


class OnOneBranch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.training:
            return torch.addmm(x, x, self.fc.weight.data)
        return self.other(self.fc(x))


READ = [
    Directly, ThroughNames, InALoop, InAComprehension, ByGetattr, InAFunction, InAMethod, InABase, Decorated,
    DecoratedBlindly, InALambda, OnOneBranch,
]  # fmt: skip


class Casts(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.fc.weight, Tensor) and x.dtype != self.fc.weight.dtype:
            x = x.to(self.fc.weight.dtype)
        return self.other(self.fc(x))


class CastsToTheFirst(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc(x.to(next(self.fc.parameters()).dtype)))


class CastsLike(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc(x.type_as(self.fc.weight).view(-1, self.fc.weight.shape[1])))


class NeverByItsConstants(Layers):
    parts = 1

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(parts=1, exact=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.parts > 1 and self.config.exact:
            return self.other(F.linear(x, self.fc.weight))
        return self.other(self.fc(x))


class SparesBytes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if self.fc.weight.dtype != torch.uint8 and x.dtype != self.fc.weight.dtype:
            x = x.to(self.fc.weight.dtype)
        return self.other(self.fc(x))


class LooksThroughAll(Layers):
    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc(x.to(self.dtype)))


class AsksForTheDevice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        assert self.fc.weight is not None
        assert hasattr(self.fc, "weight")
        x = x.to(self.fc.weight.device)
        for layer in self.items:
            x = layer(x)
        return self.other(self.fc(x)) * self.fc.bias.sum()


def names_read(model: nn.Module) -> dict[str, Use]:
    reads = weight_reads(model)
    return {name: reads[m].use for name, m in model.named_modules() if m in reads}


@pytest.mark.parametrize("cls", READ)
def test_a_weight_that_is_read_is_found(cls: type[Layers]) -> None:
    assert names_read(nn.Sequential(cls(), cls())) == {"0.fc": Use.VALUE, "1.fc": Use.VALUE}


@pytest.mark.parametrize("cls", [Casts, CastsToTheFirst, CastsLike])
def test_a_weight_whose_form_alone_is_read_keeps_its_adapter_and_its_dtype(cls: type[Layers]) -> None:
    model = nn.Sequential(cls(), cls())
    assert names_read(model) == {"0.fc": Use.FORM, "1.fc": Use.FORM}
    model = lora_ops.inject(model, r=2, quantize="nf4")
    model(torch.randn(2, 8)).sum().backward()
    formats = {
        row.name.removeprefix("base_model.model."): row.weight_format for row in lora_ops.injection_report(model)
    }
    assert formats["0.fc"] == "dense float32"
    assert formats["0.other"] == "nf4"
    assert model.base_model.model[0].fc.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("cls", [Layers, AsksForTheDevice, NeverByItsConstants, LooksThroughAll])
def test_what_is_called_is_not_read(cls: type[Layers]) -> None:
    """Whatever other methods do, such as the initialization."""
    assert names_read(cls()) == {}


def test_a_test_on_constants_is_one_of_each_module() -> None:
    model = nn.Sequential(NeverByItsConstants(), NeverByItsConstants(), NeverByItsConstants())
    model[1].config.parts, model[1].config.exact = 2, True
    model[2].config.parts, model[2].config.exact = 2, None
    assert names_read(model) == {"1.fc": Use.VALUE}


def test_code_that_spares_bytes_may_meet_them() -> None:
    model = lora_ops.inject(SparesBytes(), r=2, quantize="nf4")
    assert {row.weight_format for row in lora_ops.injection_report(model)} == {"nf4"}
    assert model(torch.randn(2, 8)).dtype == torch.float32


class Recursive(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def flatten(module: nn.Module) -> list[nn.Module]:
            found = [module]
            for child in module.children():
                found += flatten(child)
            return found

        return x @ flatten(self.items)[1].weight


def test_functions_that_call_themselves() -> None:
    assert {"items.0", "items.1"} <= names_read(Recursive()).keys()


class Holder(nn.Module):
    """Reads what lies further down, by path and by item, and hands a layer of its own to a child."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.child, self.layer = Layers(), Taker(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.block.items[1].weight
        x = self.child(x, self.layer)
        return self.child.project(self.block(x))


class Taker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def project(self, x: Tensor) -> Tensor:
        return x @ self.own.weight

    def forward(self, x: Tensor, given: nn.Linear) -> Tensor:
        return self.called(x @ given.weight)


def test_reads_across_modules() -> None:
    expected = {"block.items.1": Use.VALUE, "layer": Use.VALUE, "child.own": Use.VALUE}
    assert names_read(Holder()) == expected


def test_code_without_source_counts_what_it_names() -> None:
    namespace: dict[str, Any] = {"nn": nn, "Layers": Layers}
    code = "class Typed(Layers):\n    def forward(self, x):\n        return self.other(x @ self.fc.weight)\n"
    exec(code, namespace)
    assert names_read(namespace["Typed"]())["fc"] is Use.VALUE


def test_a_forward_of_the_instance_is_read_too() -> None:
    model = Layers()
    model.forward = functools.partial(Directly.forward, model)  # type: ignore[method-assign]
    assert names_read(model) == {"fc": Use.VALUE}


# Models of others


def reformer() -> nn.Module:
    config = transformers.ReformerConfig(
        vocab_size=64, hidden_size=32, attn_layers=["lsh", "local"], num_attention_heads=2, attention_head_size=16,
        feed_forward_size=32, axial_pos_embds=False, max_position_embeddings=64, is_decoder=False, num_buckets=2,
        lsh_attn_chunk_length=8, local_attn_chunk_length=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.ReformerForMaskedLM(config)


def zamba() -> nn.Module:
    config = transformers.ZambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=8, intermediate_size=32, num_attention_heads=4,
        n_mamba_heads=2, num_key_value_heads=4, attn_layer_period=2, attn_layer_offset=1,
    )  # fmt: skip
    return transformers.ZambaForCausalLM(config)


def falcon_mamba() -> nn.Module:
    config = transformers.FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.FalconMambaForCausalLM(config)


def attention() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention, self.fc = nn.Embedding(64, 32), nn.MultiheadAttention(32, 4), nn.Linear(32, 32)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.fc(self.attention(x, x, x)[0])

    return Block()


@pytest.mark.parametrize(
    ("build", "read"),
    [
        (reformer, {"0.attention.self_attention.query_key", "0.attention.self_attention.value"}),
        (falcon_mamba, {"x_proj", "dt_proj", "out_proj"}),
        (attention, {"out_proj"}),
        (zamba, set()),
    ],
)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_adapter_that_is_put_in_gets_a_gradient(
    build: Callable[[], nn.Module], read: set[str], quantize: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = build()
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model = lora_ops.inject(model, r=2, quantize=quantize).train()
    if isinstance(model.get_base_model(), transformers.PreTrainedModel):
        model.enable_input_require_grads()  # Reformer's reversible layers differentiate nothing else
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("no adapter for layers")]
    assert len(told) == bool(read)
    assert all(name.rpartition(".")[2] in told[0] for name in read)
    output = model(input_ids=models.token_ids(2, 16))
    (output if isinstance(output, Tensor) else output.logits).float().pow(2).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert grads
    assert not [name for name, grad in grads.items() if grad is None]
    report = lora_ops.injection_report(model)
    assert {row.state for row in report} == {"fused"}
    assert not [row.name for row in report if read and row.name.endswith(tuple(read))]
    dense = {name for row in report.weights.dense for name in row.names}
    assert all(any(f".{name}.weight" in d for d in dense) for name in read)


def test_an_adapter_that_the_user_asks_for_is_put_in_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model = lora_ops.inject(reformer(), r=2, target_modules=["value", "key"], quantize="nf4")
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("adapters without effect")] == [
        "adapters without effect where the model's own code reads the layer's weight instead of calling it: "
        "reformer.encoder.layers.*.attention.self_attention.value "
        "(read by LSHSelfAttention._value_per_attn_head); leave them out of target_modules"
    ]
    rows = {row.name: row for row in lora_ops.injection_report(model)}
    row = rows["base_model.model.reformer.encoder.layers.0.attention.self_attention.value"]
    assert (row.fused, row.state, row.weight_format) == (False, "weight read", "dense float32")
    assert row.reason == "LSHSelfAttention._value_per_attn_head reads its weight"
    assert rows["base_model.model.reformer.encoder.layers.1.attention.self_attention.value"].state == "fused"
    assert rows["base_model.model.reformer.encoder.layers.1.attention.self_attention.key"].weight_format == "nf4"
    assert not lora_ops.injection_report(model).unfused
    with pytest.raises(InjectionError, match=r"strict: 1 targeted layers.*\n.*self_attention.value: LSHSelfAttention"):
        lora_ops.inject(reformer(), r=2, target_modules=["value"], strict=True)


def test_nothing_left_to_adapt() -> None:
    """torch's encoder multiplies with its layers' weights itself when it is not trained."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"finds no layer in TransformerEncoder that is always called: .*out_proj"):
        lora_ops.inject(model, r=2)
    model = lora_ops.inject(model, r=2, target_modules=["linear1"], quantize="nf4")
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert {row.state for row in lora_ops.injection_report(model)} == {"weight read"}


def test_exclude_modules_of_the_user_stay_excluded() -> None:
    for given in (["dense"], r".*\.dense"):
        model = lora_ops.inject(reformer(), r=2, exclude_modules=given)
        assert {row.name.rpartition(".")[2] for row in lora_ops.injection_report(model)} == {"query", "key", "value"}


def test_reading_a_deep_model_reads_each_function_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    source = weight_reads.__globals__["summarize"].__globals__
    tree = source["tree_of"]
    monkeypatch.setitem(source, "tree_of", lambda function: read.append(function.__code__) or tree(function))
    monkeypatch.setitem(source, "_summaries", {})
    weight_reads(nn.Sequential(*(Directly() for _ in range(100))))
    assert len(read) == len(set(read))
