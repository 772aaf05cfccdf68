"""A run's own loss, tokens and seconds: what was trained before a resume is not counted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object


@dataclass(frozen=True)
class Figures:
    """Steps of this run, their mean loss, the tokens in them without padding, and the seconds that they took."""

    steps: int = 0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class RunFigures(_Trainer):
    """A mixin for transformers' Trainer. Its state counts from the first run on; `figures` counts this run alone.

    The clock starts with the first batch: loading a checkpoint and skipping the batches before it is not training.
    """

    _begin: tuple[float, int, int] | None = None  # seconds, steps and tokens before this run
    _loss_sum: torch.Tensor | float = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self._begin is None:
            self._begin = (time.perf_counter(), self.state.global_step, self.state.num_input_tokens_seen)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_sum = self._loss_sum + loss.detach()  # the losses of a step's batches add up to the step's
        return loss

    def figures(self) -> Figures:
        """Give the figures from the first batch until now."""
        if self._begin is None:
            return Figures()
        seconds, steps, tokens = self._begin
        count = self.state.global_step - steps
        total = self.accelerator.gather(torch.as_tensor(self._loss_sum)).mean().item()
        return Figures(
            steps=count,
            loss=total / max(count, 1),
            tokens=self.state.num_input_tokens_seen - tokens,
            seconds=time.perf_counter() - seconds,
        )
