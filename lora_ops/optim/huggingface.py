"""The optimizer names of Hugging Face's Trainer, served by `AdamW`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lora_ops.optim.adamw import AdamW
from lora_ops.optim.aliases import DEFAULT_BUDGET
from lora_ops.optim.groups import embedding_weights

_BITS = {
    "adamw": 32,
    "adamw_32bit": 32,
    "adamw_8bit": 8,
    "adamw_bnb_8bit": 8,
    "adamw_torch": 32,
    "adamw_torch_fused": 32,
}
NAMES = (*_BITS, "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit")


def trainer_optimizer(
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    model: nn.Module | None = None,
    page_budget: int | str | None = None,
    page_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[type[AdamW], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` and TRL's trainers take, for an optimizer name that HF users know.

    Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer("adamw_8bit", lr=args.learning_rate, model=model)).
    Weight decay is the trainer's: it makes the groups. Trainers without that argument, such as TRL's DPOTrainer and
    GRPOTrainer, take `optimizers=(cls(groups, **kwargs), None)`.

    Args:
        name: one of `NAMES`. A paged one has a budget of "2GiB" if `page_budget` does not say otherwise.
        lr, betas, eps: args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon.
        model: with an 8-bit name, states of its nn.Embedding weights keep 32 bits, as the Trainer has it with
            bitsandbytes; they get a group of their own, the last one.
        page_budget, page_dir, kwargs: as for `AdamW`.

    Returns:
        The class and its keyword arguments.

    Raises:
        ValueError: if the name is none of `NAMES`.
    """
    bits = _BITS.get(name.removeprefix("paged_"))
    if name not in NAMES or bits is None:
        raise ValueError(f"optim: expected one of {', '.join(NAMES)}, got {name!r}")
    if page_budget is None and name.startswith("paged_"):
        page_budget = DEFAULT_BUDGET
    chosen: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "state_bits": bits, **kwargs}
    if bits == 8 and model is not None:
        chosen["params_32bit"] = [*chosen.get("params_32bit", ()), *embedding_weights(model)]
    return AdamW, {**chosen, "page_budget": page_budget, "page_dir": page_dir}
