"""Whether packed rows stay apart: found by running the model, since not every model keeps them so."""

from __future__ import annotations

from typing import Any

import torch

from lora_ops.trainer._say import one_line

_ROW, _TRIES = 12, 3


def require_isolation(trainer: Any) -> None:
    """Check that the loss of a packed row does not depend on the row before it.

    TRL marks the rows of a pack by position_ids that begin anew. Models whose attention goes by them keep the rows
    apart; others (OPT, Bloom, MPT, most state-space models) run on from one row into the next. So rows of random
    tokens are run through the trainer's own collator and loss, in evaluation mode, with another row before them each
    time; how much that may matter is told by the same tokens as one unbroken row.

    Args:
        trainer: TRL's SFTTrainer with packing on.

    Raises:
        ValueError: if rows of a pack see each other, or the model cannot run a pack.
    """
    model = trainer.model
    text = model.config.get_text_config()
    length = min(_ROW, (getattr(text, "max_position_embeddings", None) or 2 * _ROW) // 2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, max(text.vocab_size, 4), (_TRIES + 1, length), generator=generator).tolist()
    training = model.training
    model.eval()
    try:
        packed, whole = (
            [_loss(trainer, before, rows[-1], lengths) for before in rows[:-1]]
            for lengths in ([length, length], [2 * length])
        )
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"packing: this model cannot run packed rows ({one_line(error)}); leave packing out"
        ) from error
    finally:
        model.train(training)
    leak, possible = (sum(abs(loss - losses[0]) for loss in losses[1:]) for losses in (packed, whole))
    rounding = torch.finfo(next(model.parameters()).dtype).eps if not trainer.args.bf16 else 2**-7
    if leak > max(1e-3, 8 * rounding) * possible + rounding * abs(packed[0]):
        raise ValueError(
            f"packing: rows of a pack see each other in {type(_base(model)).__name__} (attention "
            f"{getattr(text, '_attn_implementation', None) or 'unknown'}), which does not go by position_ids; "
            "leave packing out"
        )


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _loss(trainer: Any, before: list[int], row: list[int], lengths: list[int]) -> float:
    """The loss of `row` alone, in a pack behind `before`."""
    labels = [-100] * (len(before) + 1) + row[1:]
    batch = trainer.data_collator([{"input_ids": before + row, "labels": labels, "seq_lengths": lengths}])
    inputs = {k: v.to(trainer.args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, inputs).item()
