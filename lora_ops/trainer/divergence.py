"""A run whose loss or gradient is no longer finite stops before the update, and before anything of it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object  # trl takes seconds to import: `sft.train` puts it under the mixins


class DivergedError(FloatingPointError):
    """Training has left the finite numbers. The message says at which step, what was kept, and what to change."""


class StopWhenDiverged(_Trainer):
    """A mixin for transformers' Trainer: raises DivergedError where the Trainer would log 0 and go on.

    transformers leaves NaN and infinity out of the logged loss, so a diverged run looks like a perfect one. Looked at
    are the loss of each batch and the gradients' norm before each update. The last update before a save can be the
    one that goes wrong, so before each save the trained weights are looked at, and the loss and gradients that they
    give on the last batch, which takes as long as a step. All processes of a distributed run see the same values, so
    all of them stop at the same step.
    """

    _last_batch: tuple[dict[str, Any], Any] | None = None
    _updates = 0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._last_batch = (inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._require_finite(loss, "the loss is", self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A loss scaler (fp16) skips updates with infinite gradients by itself: they are its way to find the scale.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None:
            self._require_finite(torch.as_tensor(norm), "the gradients' norm is", self.state.global_step + 1)
        self._updates += 1
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite_state()
        super()._save_checkpoint(model, trial)

    def require_finite_state(self) -> None:
        """Check what is about to be saved.

        Raises:
            DivergedError: if a trained weight, or the loss or gradients on the last batch with these weights, are not
                finite.
        """
        step = self.state.global_step
        finite = [p.detach().isfinite().all() for p in self.model.parameters() if p.requires_grad]
        finite = [f.full_tensor() if hasattr(f, "full_tensor") else f for f in finite]  # FSDP's shards
        if not all(map(bool, finite)):
            raise DivergedError(self._diagnosis("a trained weight is not finite after", step))
        if self._last_batch is None:
            return
        inputs, count = self._last_batch
        model = self.model_wrapped
        training = model.training
        model.eval()  # draws no dropout mask, so the checks leave the run's random numbers alone
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=count)
        self._require_finite(loss, "the loss is", step, "after")
        if not self.is_deepspeed_enabled:  # whose backward belongs to an update
            loss.backward()
            norm = super()._get_grad_norm(model)
            model.zero_grad()
            self._require_finite(torch.as_tensor(norm), "the gradients' norm is", step, "after")
        model.train(training)

    def _require_finite(self, value: torch.Tensor, what: str, step: int, when: str = "at") -> None:
        value = value.detach()
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if not bool(self.accelerator.gather(value.float().to(self.args.device)).isfinite().all()):
            raise DivergedError(self._diagnosis(f"{what} {value.item():g} {when}", step))

    def _diagnosis(self, what: str, step: int) -> str:
        args = self.args
        if not self._updates:
            advice = "no update had been made, so the model gives it for this batch: try float32, or look at the rows"
        else:
            advice = f"lower learning_rate ({args.learning_rate:g})"
            if not args.max_grad_norm:
                advice += ", clip with max_grad_norm 1"
            if not args.warmup_steps:
                advice += ", or give warmup_steps"
        return f"training diverged: {what} step {step}. Nothing of it was saved in {args.output_dir}; {advice}"
