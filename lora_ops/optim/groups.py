"""Parameter groups for parameters whose states keep 32 bits, as those of embeddings do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


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
