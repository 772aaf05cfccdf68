"""What stays dense under quantize="nf4": said with names, bytes and shares; what can share NF4 weights does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ops
from lora_ops.injection import InjectionError
from lora_ops.nn import LoRALinear, NF4Linear
from tests import models

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def moe() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def falcon() -> nn.Module:
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return transformers.FalconForCausalLM(config)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class Gathered(nn.Linear):
    """As tensor-parallel layers are: the same product in other words."""

    group = None

    def forward(self, input: Tensor) -> Tensor:
        y = torch.matmul(input, self.weight.t())
        return y if self.bias is None else y + self.bias


class Inherited(nn.Linear):
    scale = 3.0


class Tower(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("quantize='nf4'")]


def all_bytes(model: nn.Module) -> int:
    """What the tensors of a model take, each storage once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("build", [moe, falcon, models.t5, models.gpt2])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_report_counts_every_byte_of_the_model(build: Callable[[], nn.Module], quantize: str | None) -> None:
    model = lora_ops.inject(build(), r=2, quantize=quantize)
    weights = lora_ops.injection_report(model).weights
    assert weights.total == all_bytes(model)
    assert weights.adapters == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(len(row.names) for row in weights.dense) == sum(
        1
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if "lora_" not in name and t.is_floating_point()
    )
    nf4 = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert weights.nf4 == sum(m.quantized.nbytes for m in nf4)
    assert weights.nf4_before == sum(4 * m.in_features * m.out_features for m in nf4)


def test_experts_are_named_and_strict_refuses_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model = lora_ops.inject(moe(), r=2, quantize="nf4")
    (told,) = messages(caplog)
    assert told.splitlines()[1].lstrip() == (
        "0.094 MiB (69.3%) stacks of matrices, as of experts, of MixtralExperts: "
        "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj"
    )
    report = lora_ops.injection_report(model)
    (row,) = [row for row in report.weights.dense if not row.by_design]
    assert row.nbytes == 2 * 4 * (3 * 32 * 32) * 4
    assert all("mlp.experts" in name for name in row.names)
    assert "of experts" in str(report)
    options = {"r": 2, "target_modules": ["q_proj"], "quantize": "nf4", "strict": True}
    with pytest.raises(InjectionError, match=r"would leave dense.*\n.*MiB.*MixtralExperts.*\n.*in skip_modules"):
        lora_ops.inject(moe(), **options)
    lora_ops.inject(moe(), **options, skip_modules=["experts"])


def test_what_is_dense_by_design_is_said_and_strict_lets_it_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model = lora_ops.inject(models.llama(), r=2, quantize="nf4", modules_to_save=["o_proj"], strict=True)
    (told,) = messages(caplog)
    reasons = {row.reason for row in lora_ops.injection_report(model).weights.dense}
    assert reasons >= {
        "output embedding", "embeddings", "biases, norms and other vectors", "modules that are trained whole",
    }  # fmt: skip
    assert all(reason in told for reason in reasons)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(8, 8), "the forward of tests.injection.test_dense.Doubled is not that of nn.Linear"),
        (Noisy(8, 8), "the forward of tests.injection.test_dense.Noisy is not that of nn.Linear"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is computed from others"),
        (nn.utils.spectral_norm(nn.Linear(8, 8)), "its weight is computed from others"),
    ],
)
def test_linear_layers_that_cannot_be_replaced_are_named(
    layer: nn.Linear, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Tower(layer, nn.Linear(8, 8)).eval()
    x = torch.randn(2, 8)
    expected = layer(x).detach()
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model = lora_ops.inject(model, r=2, target_modules=["layers.1"], quantize="nf4").eval()
    torch.testing.assert_close(model.base_model.model.layers[0](x), expected)
    assert reason in messages(caplog)[0]
    with pytest.raises(InjectionError, match="strict: quantize='nf4' would leave dense"):
        lora_ops.inject(Tower(layer, nn.Linear(8, 8)), r=2, target_modules=["layers.1"], quantize="nf4", strict=True)


def test_a_layer_with_hooks_keeps_them_and_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    hooked = nn.Linear(8, 8)
    calls: list[int] = []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model = lora_ops.inject(Tower(hooked, nn.Linear(8, 8)), r=2, target_modules=["layers.1"], quantize="nf4")
    model(torch.randn(2, 8))
    assert calls == [1]
    assert "it has hooks or a forward of its own): layers.*.weight" in messages(caplog)[0]


@pytest.mark.parametrize("cls", [Gathered, Inherited])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_subclasses_that_compute_a_linear_layer_are_taken(
    cls: type[nn.Linear], bias: bool, quantize: str | None
) -> None:
    torch.manual_seed(0)
    layer = cls(64, 32, bias=bias)
    model = lora_ops.inject(Tower(layer), r=2, quantize=quantize, strict=True)
    (row,) = lora_ops.injection_report(model)
    assert (row.state, row.weight_format) == ("fused", quantize or "dense float32")
    lora = model.base_model.model.layers[0]
    nn.init.normal_(lora.lora_B["default"].weight)
    x = torch.randn(3, 64)
    base = lora.base_layer
    weight = (base.dequantize() if quantize else base.weight) + lora.get_delta_weight("default")
    torch.testing.assert_close(model(x), F.linear(x, weight, layer.bias), atol=1e-4, rtol=1e-4)


def test_falcon_has_linear_layers_of_its_own() -> None:
    model = lora_ops.inject(falcon(), r=2, quantize="nf4", strict=True)
    report = lora_ops.injection_report(model)
    assert len(report) == 2 * 4
    assert {(row.state, row.weight_format) for row in report} == {("fused", "nf4")}
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    dense = lora_ops.injection_report(lora_ops.inject(falcon(), r=2))
    assert {(row.state, row.kind) for row in dense} == {("fused", "FalconLinear")}


# Weights that layers share


def replicated() -> nn.Module:
    return lora_ops.inject(models.llama(), r=2, quantize="nf4", layer_replication=[[0, 2], [0, 2]])


def tied() -> nn.Module:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    return lora_ops.inject(Tower(first, second, nn.Linear(64, 64)), r=2, quantize="nf4")


def one_layer_twice() -> nn.Module:
    layer = nn.Linear(64, 64)
    return lora_ops.inject(
        Tower(layer, Tower(layer), nn.Linear(64, 64)), r=2, quantize="nf4", target_modules=["layers.2"]
    )


@pytest.mark.parametrize(("build", "weights"), [(replicated, 14), (tied, 2), (one_layer_twice, 2)])
def test_layers_that_share_a_weight_share_one_in_nf4(build: Callable[[], nn.Module], weights: int) -> None:
    model = build()
    linears = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert len({m.weight for m in linears}) == len({m.weight_absmax for m in linears}) == weights
    dense = {
        row.reason for row in lora_ops.injection_report(model).weights.dense if any("layers" in n for n in row.names)
    }
    assert dense <= {"biases, norms and other vectors"}
    assert lora_ops.injection_report(model).weights.total == all_bytes(model)
    assert {row.weight_format for row in lora_ops.injection_report(model)} == {"nf4"}


def test_a_replicated_model_computes_what_peft_does_over_the_same_weights() -> None:
    ours = replicated().eval()
    config = peft.LoraConfig(r=2, target_modules="all-linear", layer_replication=[[0, 2], [0, 2]])
    theirs = peft.get_peft_model(models.llama(), config).eval()
    for name, module in ours.named_modules():
        if isinstance(module, NF4Linear):
            theirs.get_submodule(name).weight.data = module.dequantize()
    ids = models.token_ids()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_updates_of_layers_that_share_a_weight_are_not_merged_into_it() -> None:
    model = replicated()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"merge: model.layers.0.*q_proj and model.layers.2.*q_proj share one NF4"):
            merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    ids = models.token_ids()
    y = model.eval()(ids).logits
    merged = lora_ops.merge(model)
    assert not any(isinstance(m, NF4Linear) for m in merged.modules())
    torch.testing.assert_close(merged(ids).logits, y, atol=1e-3, rtol=1e-3)


def test_a_weight_that_is_shared_with_what_stays_dense_stays_dense() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.out = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.fc.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.fc(self.embed(ids)))

    model = lora_ops.inject(Shared(), r=2, quantize="nf4", strict=True)
    formats = {row.name.rpartition(".")[2]: row.weight_format for row in lora_ops.injection_report(model)}
    assert formats == {"fc": "dense float32", "out": "nf4"}


# States of a report


def test_weight_formats_of_layers_without_a_weight() -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    rows = lora_ops.injection_report(lora_ops.inject(peft.get_peft_model(moe(), config)))
    assert {row.weight_format for row in rows} == {"dense float32"}
    attention = Tower(nn.MultiheadAttention(8, 2))
    rows = lora_ops.injection_report(peft.get_peft_model(attention, peft.LoraConfig(r=2, target_modules=["layers.0"])))
    assert {row.weight_format for row in rows} == {"dense float32"}


def states(model: nn.Module) -> dict[str, str]:
    return {row.name.rpartition(".")[2]: row.state for row in lora_ops.injection_report(model)}


def test_states_without_an_adapter_to_run_are_not_unfused(caplog: pytest.LogCaptureFixture) -> None:
    model = lora_ops.inject(models.llama(), r=2, target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = models.token_ids()
    model.set_adapter("second")
    with caplog.at_level(logging.WARNING, "lora_ops"):
        model(ids)
    assert not caplog.records
    assert states(model) == {"q_proj": "fused", "v_proj": "no active adapter"}
    model.set_adapter("default")
    with model.disable_adapter():
        model(ids)
        assert states(model) == {"q_proj": "disabled", "v_proj": "disabled"}
    model.merge_adapter()
    assert states(model) == {"q_proj": "merged", "v_proj": "merged"}
    report = lora_ops.injection_report(model)
    assert not report.unfused
    assert "0 of 4 layers fused, 4 merged" in str(report)


class Unused(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_adapter_that_is_never_called_is_reported_so(quantize: str | None) -> None:
    model = lora_ops.inject(Unused(nn.Linear(8, 8), nn.Linear(8, 8)), r=2, quantize=quantize)
    assert states(model) == {"0": "fused", "1": "fused"}  # no forward yet
    model(torch.randn(2, 8))
    assert states(model) == {"0": "fused", "1": "never called"}
    report = lora_ops.injection_report(model)
    assert not report.unfused
    assert not report[1].fused
    assert "1 of 2 layers fused, 1 never called" in str(report)
    model.base_model.model.layers[1](torch.randn(2, 8))
    assert states(model) == {"0": "fused", "1": "fused"}


def test_a_layer_that_joins_later_has_not_been_passed_by() -> None:
    model = lora_ops.inject(Unused(nn.Linear(8, 8), nn.Linear(8, 8)), r=2, target_modules=["layers.0"])
    model(torch.randn(2, 8))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["layers.0", "layers.1"]))
    model.set_adapter("second")
    assert states(model) == {"0": "fused", "1": "fused"}
    model(torch.randn(2, 8))
    assert states(model) == {"0": "fused", "1": "never called"}


def test_a_compiled_model_is_not_said_to_be_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_ops.injection import peft_layers

    monkeypatch.setattr(peft_layers, "traced", False)
    model: Any = lora_ops.inject(Tower(nn.Linear(8, 8), nn.Linear(8, 8)), r=2)
    model.base_model.model.layers[1] = torch.compile(model.base_model.model.layers[1], backend="eager", fullgraph=True)
    model(torch.randn(2, 8))
    assert "never called" not in states(model).values()


def test_modules_without_peft_are_counted() -> None:
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(64, 64), r=2, quantize="nf4"), nn.Linear(64, 64))
    weights = lora_ops.injection_report(model).weights
    assert weights.total == all_bytes(model)
    assert weights.adapters == 2 * 2 * 64 * 4
    assert weights.nf4_before == 64 * 64 * 4
