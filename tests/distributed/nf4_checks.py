"""QLoRA models under FSDP2: what each rank checks. Run by test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lora_ops
from lora_ops.nn import LoRALinear, NF4Linear
from tests.models import llama, qwen2, token_ids

FULL = StateDictOptions(full_state_dict=True)


def qlora(seed: int = 0, build: Any = llama) -> Any:
    torch.manual_seed(seed)
    return lora_ops.inject(build(seed=seed), r=4, quantize="nf4", init_lora_weights=False)


def shard(model: Any, **kwargs: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def assert_same(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for key, t in expected.items():
        value = got[key].full_tensor() if isinstance(got[key], DTensor) else got[key]
        assert value.dtype == t.dtype, key
        assert torch.equal(value, t), key


def logits(model: Any) -> Tensor:
    return model(input_ids=token_ids()).logits.detach()


def check_state_dicts_are_those_of_one_process(folder: Path) -> None:
    """Sharded, whole, and of the adapters alone; before and after a step, under each policy; qwen2 has biases."""
    policies: dict[str, dict[str, Any]] = {
        "as it is": {},
        "bfloat16, not resharded": {
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16), "reshard_after_forward": False,
        },
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }  # fmt: skip
    for build in (llama, qwen2):
        one = qlora(build=build)
        expected = {k: v.clone() for k, v in one.state_dict().items()}
        adapters = {k: v for k, v in expected.items() if "lora_" in k}
        tied = {k: v for k, v in expected.items() if build is qwen2 and k.endswith("lm_head.weight")}
        y = logits(one)
        for name, kwargs in policies.items() if build is llama else [("as it is", {})]:
            model = shard(qlora(build=build), **kwargs)
            assert_same(model.state_dict(), expected)
            z = logits(model)
            assert torch.equal(z, y) if "bfloat16" not in name else (z - y).norm() < 0.05 * y.norm()
            if "not resharded" in name:  # the root's and the last layer's Parameters are whole now
                model.reshard()
                for layer in model.get_base_model().model.layers:
                    layer.reshard()
            assert_same(get_model_state_dict(model), expected)
            assert_same(get_model_state_dict(model, options=FULL), expected)
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            assert_same(whole, expected if dist.get_rank() == 0 else {})
            for options in (
                StateDictOptions(ignore_frozen_params=True),
                StateDictOptions(True, ignore_frozen_params=True),
            ):
                # torch takes a tied weight out under its first name only
                assert_same(get_model_state_dict(model, options=options), adapters | tied)
            assert_same(get_peft_model_state_dict(model), {k.replace(".default", ""): v for k, v in adapters.items()})


def check_state_dicts_load(folder: Path) -> None:
    """Sharded, whole, sent by one rank, and by DCP: into another model of the same shapes, and into one on meta."""
    one = qlora()
    expected = {k: v.clone() for k, v in one.state_dict().items()}
    y = logits(one)
    first = shard(qlora())
    whole = {k: v.clone() for k, v in get_model_state_dict(first, options=FULL).items()}
    dcp.save(get_model_state_dict(first), checkpoint_id=str(folder / "nf4"))
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for way in ("sharded", "full", "broadcast", "broadcast to meta", "module", "DCP"):
        model = qlora(seed=1)
        model = shard(model.to("meta") if "meta" in way else model)
        if way == "sharded":
            set_model_state_dict(model, get_model_state_dict(first))
        elif way == "full":
            set_model_state_dict(model, dict(whole), options=FULL)
        elif way == "broadcast":
            set_model_state_dict(model, dict(whole) if dist.get_rank() == 0 else {}, options=broadcast)
        elif way == "broadcast to meta":
            model.to_empty(device="cpu")
            set_model_state_dict(model, dict(whole) if dist.get_rank() == 0 else {}, options=broadcast)
            model.get_base_model().model.rotary_emb.inv_freq.copy_(one.get_base_model().model.rotary_emb.inv_freq)
        elif way == "module":
            model.load_state_dict(first.state_dict())
        else:
            model.load_state_dict(first.state_dict())
            for p in model.parameters():
                p.detach().to_local().zero_()
            state = get_model_state_dict(model)
            dcp.load(state, checkpoint_id=str(folder / "nf4"))
            set_model_state_dict(model, state)
        assert_same(get_model_state_dict(model, options=FULL), expected)
        assert torch.equal(logits(model), y), way


def check_adapters_are_saved_by_peft(folder: Path) -> None:
    """From the whole state dict that torch gathers, after a step of training; a model of one process loads it."""
    model = shard(qlora())
    optimizer = lora_ops.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    y = logits(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)
        assert load_file(folder / "adapter" / "adapter_model.safetensors").keys() == {
            key.replace(".default", "") for key in state
        }
        again = PeftModel.from_pretrained(qlora().unload(), folder / "adapter")
        assert torch.equal(logits(lora_ops.inject(again)), y)


def check_the_report_is_that_of_one_process(folder: Path) -> None:
    """Dense and NF4, before and after a forward; nothing of the model is changed by it."""
    for quantize in (None, "nf4"):
        one = lora_ops.inject(llama(), r=4, quantize=quantize)
        two = shard(lora_ops.inject(llama(), r=4, quantize=quantize))
        for _ in range(2):
            ours, expected = lora_ops.injection_report(two), lora_ops.injection_report(one)
            assert list(ours) == list(expected)
            assert ours.weights == expected.weights
            assert not ours.unfused
            logits(two)
            logits(one)
        assert all(isinstance(p, DTensor) for p in two.get_base_model().model.layers[0].parameters())


def check_plain_modules(folder: Path) -> None:
    """NF4Linear and LoRALinear in a model of one's own; bytes of all parts together are those of one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(2)
    model = nn.Sequential(
        LoRALinear.from_linear(nn.Linear(100, 67), r=3, quantize="nf4"),
        NF4Linear.from_linear(nn.Linear(67, 5), 32, False),
    )
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(3, 100)
    y = model(x)
    fully_shard(model, mesh=mesh)
    assert torch.equal(model(x), y)
    assert_same(model.state_dict(), expected)
    rows = lora_ops.injection_report(model)
    assert [row.fused for row in rows] == [True, True]
    here = torch.tensor(sum(p.to_local().numel() * p.element_size() for p in model.parameters()))
    dist.all_reduce(here)
    assert int(here) == frozen
    with pytest.raises(
        RuntimeError, match=r"NF4Linear\(67, 5\): this rank has a part of the weight only; call unshard"
    ):
        model[1].dequantize()
    model.unshard()
    assert model[1].dequantize().shape == (5, 67)
    model.reshard()
    other = NF4Linear.from_linear(nn.Linear(67, 5), block_size=64, double_quant=False)
    with pytest.raises(
        ValueError, match=r"q: expected block_size=32, double_quant=False, as when the layer was sharded"
    ):
        model[1].quantized = other.quantized
