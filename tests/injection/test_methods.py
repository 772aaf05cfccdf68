"""PEFT's methods over NF4: each trains as over the same weights held dense and merges, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ops
from lora_ops.injection import methods
from lora_ops.nn import NF4Linear
from tests import models

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")

TARGETS = ["q_proj", "v_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 10},
    "beft": {"target_modules": ["q_proj", "v_proj"]},  # trains biases, which these have
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 50},
    "gralora": {"r": 4, "gralora_k": 2},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "oft": {"oft_block_size": 8},
    "osf": {"effective_rank": 4},
    "pvera": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "vblora": {"vector_length": 32, "num_vectors": 16},
    "vera": {"r": 4},
    "waveft": {"n_frequency": 50},
}
# Prompts, gates and token rows: they wrap no linear layer, so that NF4 is nothing to them.
WRAP_NO_LINEAR = {
    "adaption_prompt", "cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning",
    "trainable_tokens", "shadow", "xlora",
}  # fmt: skip
NO_MERGE = {"lily"}  # PEFT has none


def method_of(config_cls: type) -> str:
    return config_cls.__module__.split(".")[2]


METHODS = {method_of(cls): cls for cls in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()}


def dense_twin(model: nn.Module) -> nn.Module:
    twin = models.qwen2()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            twin.get_submodule(name).weight.data = module.dequantize(torch.float32)
    return twin


def adapted(model: nn.Module, method: str, **others: Any) -> nn.Module:
    cls = METHODS[method]
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **OPTIONS.get(method, {}), **others}
    torch.manual_seed(1)
    return peft.get_peft_model(model, cls(**{k: v for k, v in options.items() if k in _fields(cls)}))


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def trained(model: nn.Module) -> tuple[Tensor, float]:
    """Logits after three steps, and how far the trained parameters went."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ids = models.token_ids()
    for step in range(3):
        torch.manual_seed(step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model.eval()), sum((p - q).abs().sum().item() for p, q in zip(parameters, start, strict=True))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=models.token_ids()).logits


@pytest.mark.parametrize("method", methods.TESTED)
def test_trains_and_merges_as_over_dense_weights(method: str) -> None:
    nf4 = lora_ops.quantize(models.qwen2())
    dense = adapted(dense_twin(nf4), method)
    model = adapted(nf4, method)
    (ours, change), (theirs, expected_change) = trained(model), trained(dense)
    assert expected_change > 0
    assert change == pytest.approx(expected_change, rel=1e-3)
    # Three steps carry the last bit of a sum on; the update itself moves the logits by far more.
    torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)
    assert model.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    if method in NO_MERGE:
        with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn\.q_proj"):
            lora_ops.merge(model)
        torch.testing.assert_close(logits(model), ours)
        return
    merged = lora_ops.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), ours, atol=1e-4 * ours.abs().max().item(), rtol=0)
    assert merged.state_dict().keys() == models.qwen2().state_dict().keys()
    if method != "lora":  # PEFT's own merge would add numbers to codes
        with pytest.raises(TypeError, match=r"merge: PEFT's .* cannot write into NF4Linear\(64, 64\); lora_ops.merge"):
            model.merge_and_unload()
        assert torch.equal(logits(model), ours)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(methods.TESTED) - WRAP_NO_LINEAR))
def test_others_are_refused_by_name(method: str) -> None:
    if method == "adamss":
        pytest.importorskip("sklearn", reason="PEFT's AdaMSS needs it: pip install scikit-learn")
    nf4 = lora_ops.quantize(models.qwen2())
    before = copy.deepcopy(nf4.state_dict())
    with pytest.raises(TypeError, match=rf"{method}: expected a PEFT method that can stand on NF4 weights \(beft, "):
        adapted(nf4, method)
    after = nf4.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    adapted(models.qwen2(), method)  # the options are right


def test_mixed_models_are_judged_by_the_adapter() -> None:
    nf4 = lora_ops.quantize(models.llama())
    model = peft.get_peft_model(nf4, peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(TypeError, match=r"loha: expected a PEFT method that can stand on NF4 .* LoHaConfig"):
        model.add_adapter("second", peft.LoHaConfig(target_modules=["v_proj"]))


def test_dense_targets_take_any_method() -> None:
    model = adapted(lora_ops.quantize(models.llama()), "ln_tuning", target_modules=["input_layernorm"])
    with pytest.raises(TypeError, match="ln_tuning: "):
        adapted(lora_ops.quantize(models.llama()), "ln_tuning", target_modules=["q_proj"])
    y, change = trained(model)
    assert change > 0
    assert_close_to_merged(model, y)
    lora_ops.merge(peft.get_peft_model(lora_ops.quantize(models.llama()), peft.LoHaConfig(target_modules=["lm_head"])))


def assert_close_to_merged(model: nn.Module, y: Tensor) -> None:
    torch.testing.assert_close(logits(lora_ops.merge(model)), y, atol=1e-4 * y.abs().max().item(), rtol=0)


@pytest.mark.parametrize("config_cls", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
def test_methods_that_wrap_no_linear_layer(config_cls: type) -> None:
    nf4 = lora_ops.quantize(models.qwen2())
    dense = dense_twin(nf4)
    config = config_cls(task_type="CAUSAL_LM", num_virtual_tokens=3)
    results = []
    for base in (nf4, dense):
        torch.manual_seed(0)
        results.append(trained(peft.get_peft_model(base, config)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert results[0][1] > 0
    with pytest.raises(ValueError, match="_TUNING adapters are no weights to merge"):
        lora_ops.merge(peft.get_peft_model(nf4, config))


def test_stock_lora_over_nf4_is_ours() -> None:
    model = adapted(lora_ops.quantize(models.qwen2()), "lora")
    assert not lora_ops.injection_report(model.base_model.model.model.layers[0].self_attn.q_proj).unfused
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: an NF4 base layer takes plain LoRA adapters only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: .* got 'pissa', which changes the dense weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: .* got 'olora'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights: .* got 'mica'"),
        ({"velora_config": peft.VeloraConfig()}, "velora_config: an NF4 base layer takes plain"),
    ],
)
def test_adapters_that_need_the_dense_weight_are_refused_everywhere(options: dict[str, Any], message: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(lora_ops.quantize(models.llama()), config)
    model = lora_ops.inject(models.llama(), target_modules=["v_proj"], quantize="nf4")
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config)
    assert not any(name.endswith(".second") for name, _ in model.named_modules())


@pytest.mark.parametrize("name", ["o_proj", "mlp"])
def test_modules_to_save_over_nf4_name_what_cannot_be_trained(name: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
    message = r"modules_to_save: expected modules that can be trained whole, got .*NF4Linear\(.*skip_modules"
    with pytest.raises(TypeError, match=message):
        peft.get_peft_model(lora_ops.quantize(models.llama()), config)
    model = lora_ops.inject(models.llama(), target_modules=["v_proj"], quantize="nf4")
    with pytest.raises(TypeError, match=message):
        model.add_adapter("second", config)
    assert not any(name.endswith(".second") for name, _ in model.named_modules())


# Initializations and trained adapters


def _data() -> list[dict[str, Tensor]]:
    ids = models.token_ids(8, 16)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_eva_initializes_over_nf4(arch: str) -> None:
    """Ranks are redistributed, which makes new adapters of other ranks on layers that have one already."""
    options = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}
    model = lora_ops.inject(models.DECODERS[arch](), r=4, quantize="nf4", **options)
    peft.initialize_lora_eva_weights(model, _data(), show_progress_bar=False)
    ranks = {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert len(ranks) > 1
    for module in model.modules():
        if hasattr(module, "lora_A"):  # orthonormal rows, as the SVD gives them
            a = module.lora_A["default"].weight
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
    assert not lora_ops.injection_report(model).unfused


@pytest.mark.parametrize("init", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("stock", [False, True])
def test_initializations_from_shapes(init: str, stock: bool) -> None:
    """Drawn as over a dense layer with the same seed."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    states = []
    for base in (lora_ops.quantize(models.llama()), models.llama()):
        torch.manual_seed(0)
        if stock or base.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32:
            model = peft.get_peft_model(base, config)
        else:
            model = lora_ops.inject(base, r=4, target_modules=["q_proj"], init_lora_weights=init, lora_alpha=8)
        states.append({name: p.detach() for name, p in model.named_parameters() if "lora_" in name})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("init", ["eva", "orthogonal", "olora", "pissa", "corda"])
def test_trained_adapters_load_over_nf4(init: str, tmp_path: Path) -> None:
    """Whatever they started from: those that changed the base are saved as the difference to it."""
    model = peft.get_peft_model(models.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    config = model.peft_config["default"]
    if init in ("olora", "pissa", "corda"):  # as path_initial_model_for_weight_conversion writes it
        config.init_lora_weights = True
    else:
        config.init_lora_weights = init
        config.eva_config = peft.EvaConfig() if init == "eva" else None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    ours = lora_ops.inject(models.llama(), r=2, quantize="nf4", target_modules=["k_proj"])
    ours.load_adapter(tmp_path, "trained")
    ours.set_adapter("trained")
    twin = models.llama()
    for name, module in ours.get_base_model().named_modules():
        if isinstance(module, NF4Linear):
            twin.get_submodule(name.replace(".base_layer", "")).weight.data = module.dequantize(torch.float32)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), atol=1e-5, rtol=1e-4)
    direct = peft.PeftModel.from_pretrained(lora_ops.quantize(models.llama()), tmp_path)
    torch.testing.assert_close(logits(direct.eval()), logits(theirs), atol=1e-5, rtol=1e-4)


# As PEFT's layers are over bitsandbytes


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_layers_are_called_as_in_peft(quantize: str | None) -> None:
    model = lora_ops.inject(models.llama(), target_modules=["q_proj"], quantize=quantize)
    assert {status.module_type for status in model.get_layer_status()} == {"lora.Linear"}
    assert repr(model.base_model.model.model.layers[0].self_attn.q_proj).startswith("lora.Linear(")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_adapters_take_the_dtype_of_the_weight_if_peft_casts_none(dtype: torch.dtype) -> None:
    model = lora_ops.inject(models.llama(dtype=dtype), target_modules=["q_proj"], quantize="nf4")
    for autocast in (True, False):
        name = f"autocast_{autocast}"
        config = peft.LoraConfig(target_modules=["q_proj"])
        model.add_adapter(name, config, autocast_adapter_dtype=autocast)
        found = {p.dtype for key, p in model.named_parameters() if f".{name}." in key}
        assert found == {torch.float32 if autocast else dtype}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_safe_merge_refuses_a_lora_bias_that_is_not_finite(quantize: str | None, value: float) -> None:
    model = lora_ops.inject(models.qwen2(), quantize=quantize, target_modules=["q_proj"], lora_bias=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].bias.data[3] = value
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    after = layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "lora_" not in key)
    assert not layer.merged


def test_a_module_of_pefts_that_registers_none() -> None:
    """As its trainable tokens do."""
    methods.watch()
    layer = peft.tuners.lora.Linear(torch.nn.Linear(4, 4), "default", peft.LoraConfig(), r=2)
    layer.register_module("absent", None)
    assert layer.absent is None
