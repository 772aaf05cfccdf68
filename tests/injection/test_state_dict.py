"""The state dict of a model with NF4 weights, as torch.distributed takes frozen Parameters out of it."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import lora_ops
from lora_ops.nn import NF4Linear
from tests.models import llama

SCALE = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight_absmax"


@pytest.mark.parametrize("part", ["PeftModel", "base", "quantized"])
def test_what_is_trained_alone(part: str) -> None:
    if part == "quantized":
        whole = lora_ops.quantize(llama())
        whole.lm_head.requires_grad_(True)
    else:
        model = lora_ops.inject(llama(), r=4, quantize="nf4")
        whole = model if part == "PeftModel" else model.get_base_model()
    state = get_model_state_dict(whole, options=StateDictOptions(ignore_frozen_params=True))
    assert state.keys() == {name for name, p in whole.named_parameters() if p.requires_grad}
    set_model_state_dict(whole, state, options=StateDictOptions(strict=False))


def test_injecting_again_changes_nothing() -> None:
    model = lora_ops.inject(lora_ops.inject(llama(), r=4), quantize="nf4")
    assert SCALE in dict(model.named_parameters())
    assert len(get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))) == 28


def test_it_is_saved_as_a_plain_dict() -> None:
    """torch.load with weights_only knows no class of ours."""
    state = lora_ops.inject(llama(), r=4, quantize="nf4").state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for again in (loaded, copy.deepcopy(state)):
        assert type(again) is OrderedDict
        assert list(again) == list(state)
        assert again._metadata == state._metadata
        assert all(map(torch.equal, again.values(), state.values()))


def test_what_pop_takes() -> None:
    state = lora_ops.inject(llama(), r=4, quantize="nf4").state_dict()
    weight = SCALE.removesuffix("_absmax")
    assert isinstance(state.pop(weight), torch.Tensor)
    assert {key for key in state if key.startswith(weight)} > {weight + ".absmax"}
    state.pop(SCALE)
    state.pop(weight + "_nested_absmax")
    assert not [key for key in state if key.startswith(weight)]
    assert state.pop("other", None) is None
    with pytest.raises(KeyError, match="other"):
        state.pop("other")


def test_a_shared_weight_keeps_one_offset() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(2)))
    model[1].weight = model[0].weight
    lora_ops.inject(model, r=4, quantize="nf4")
    one, two = (m for m in model.modules() if isinstance(m, NF4Linear))
    one.quantized = NF4Linear.from_linear(torch.nn.Linear(64, 64)).quantized
    assert torch.equal(one.dequantize(), two.dequantize())
