"""Parameter groups: their hyperparameters, and those whose states keep 32 bits, as those of embeddings do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_ops.kernels.adamw import constants
from lora_ops.runtime.sharding import is_sharded

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """Weights of a model's nn.Embedding layers, which 8-bit optimizers leave in 32 bits.

    Their gradients are large in a few rows and zero elsewhere, so that the rows of a block share a scale that fits few.

    Source: 8-bit Optimizers via Block-wise Quantization (Dettmers et al. 2022), section 2.3.
    """
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def with_32bit_groups(params: Any, params_32bit: Iterable[Tensor]) -> Any:
    """The parameters or groups with `params_32bit` in groups with state_bits=32, of which new ones come last.

    Args:
        params: as an optimizer takes them: parameters, groups, or either with names.
        params_32bit: those that the optimizer does not have are passed over: frozen ones, for example.

    Raises:
        TypeError: if params_32bit is a tensor and not several.
    """
    if isinstance(params_32bit, Tensor):
        raise TypeError("params_32bit: expected several parameters, got one tensor")
    wide = {id(p) for p in params_32bit}
    if not wide:
        return params
    params = list(params)
    if not params:
        return params
    groups = [dict(group) for group in params] if params and isinstance(params[0], dict) else [{"params": params}]
    own: list[dict[str, Any]] = []
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        inside: list[Any] = []
        outside: list[Any] = []
        for member in members:
            p = member[1] if isinstance(member, tuple) else member
            (inside if id(p) in wide else outside).append(member)
        group["params"] = members
        if inside and not outside:
            group["state_bits"] = 32
        elif inside:
            group["params"] = outside
            own.append({**group, "params": inside, "state_bits": 32})
    return groups + own


def group_constants(step: int, group: dict[str, Any]) -> tuple[float, ...]:
    """The constants of a step with a group's hyperparameters."""
    return constants(
        step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
        weight_decay=group["weight_decay"], maximize=group["maximize"],
    )  # fmt: skip


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Names for a message."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError unless hyperparameters are in range and parameters of a kind that can be stepped."""
    for name in ("lr", "eps", "weight_decay"):
        if not _number(name, group[name]) >= 0:
            raise ValueError(f"{name}: expected at least 0, got {_number(name, group[name])}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= _number("betas", b) < 1 for b in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    for name in ("amsgrad", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name}: expected False, which is all that this optimizer does, got {group[name]!r}")
    if group["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits: expected 32 or 8, got {group['state_bits']}")
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError("params: expected each parameter once, got one twice in a group")
    for p in group["params"]:
        if p.dtype not in FLOAT_DTYPES:
            raise ValueError(f"params: expected dtype {dtype_names(FLOAT_DTYPES)}, got {dtype_names([p.dtype])}")
        if p.layout is not torch.strided:
            raise ValueError(f"params: expected dense tensors, got layout {p.layout}")
        if is_sharded(p) and any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"params: expected DTensors that are sharded or replicated, got {p.placements}")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):  # "1e-5" is one to PyYAML
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
