"""Whether packed rows stay apart: found by running the model, since not every model keeps them so."""

from __future__ import annotations

from typing import Any

import torch

from lora_ops.trainer._say import one_line

_ROW, _TRIES = 12, 3


def require_isolation(trainer: Any) -> None:
    """Check that what a model says to a packed row does not depend on the row before it.

    TRL marks the rows of a pack by position_ids that begin anew. Models whose attention goes by them keep the rows
    apart; others (OPT, Bloom, MPT, most state-space models) run on from one row into the next. So a row of random
    tokens is run through the model as the trainer's own collator packs it, in evaluation mode, with another row before
    it each time; how much that may matter is told by the same tokens as one unbroken row.

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
            [_logits(trainer, before, rows[-1], lengths) for before in rows[:-1]]
            for lengths in ([length, length], [2 * length])
        )
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"packing: this model cannot run packed rows ({one_line(error)}); leave packing out"
        ) from error
    finally:
        model.train(training)
    leak, possible = (sum((logits - runs[0]).abs().mean().item() for logits in runs[1:]) for runs in (packed, whole))
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    eps = max(eps, torch.finfo(torch.bfloat16).eps if trainer.args.bf16 else 0.0)
    if leak > max(1e-3, 8 * eps) * possible + eps * packed[0].abs().mean().item():
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise ValueError(
            f"packing: rows of a pack see each other in {type(base).__name__} (attention "
            f"{getattr(text, '_attn_implementation', None) or 'unknown'}), which does not go by position_ids; "
            "leave packing out"
        )


def _logits(trainer: Any, before: list[int], row: list[int], lengths: list[int]) -> torch.Tensor:
    """What the model says at the positions of `row` [L, V], in a pack behind `before`."""
    batch = trainer.data_collator([{"input_ids": before + row, "seq_lengths": lengths}])
    inputs = {k: v.to(trainer.args.device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return trainer.model(**inputs, use_cache=False).logits[0, len(before) :].float()
