"""How many tokens a row may have, and what is left to learn from where rows are cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lora_ops.trainer._say import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object

DEFAULT_MAX_LENGTH = 1024


def positions_of(model: PreTrainedModel) -> int | None:
    """Tell how many positions a model has.

    Args:
        model: the model, with or without adapters.

    Returns:
        The count, or None where its configuration sets no limit (relative positions).
    """
    import torch

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    tokens = model.get_input_embeddings()
    for table in model.modules():  # RoBERTa and its kin begin to count after the padding's index
        if isinstance(table, torch.nn.Embedding) and table is not tokens and table.num_embeddings == positions:
            return positions - (0 if table.padding_idx is None else table.padding_idx + 1)
    return positions


def max_length_for(model: PreTrainedModel, asked: int | None) -> int:
    """Choose the greatest length of a row.

    Args:
        model: the model to train.
        asked: `max_length` as given, or None.

    Returns:
        `asked`, or else 1024 or the model's positions if they are fewer.

    Raises:
        ValueError: if more is asked than the model has positions.
    """
    positions = positions_of(model)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and asked > positions:
        raise ValueError(
            f"max_length: expected at most {positions}, the positions of this model, got {asked}; "
            "lower it, or raise max_position_embeddings in the model's config.json if it can be stretched (RoPE)"
        )
    return asked


class CutRows(_Trainer):
    """A mixin for TRL's SFTTrainer: says which rows max_length cuts, and drops those with nothing left to learn.

    TRL drops them without a word, with packing not at all, and trains on nothing where none is left.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any, **options: Any
    ) -> Any:
        limit, args.max_length = args.max_length, None
        try:
            rows = super()._prepare_dataset(dataset, processing_class, args, False, *others, **options)
        finally:
            args.max_length = limit
        kept = _learnable(rows, limit)
        if len(kept) < len(rows):
            rows = rows.select(kept)
        return super()._prepare_dataset(rows, processing_class, args, packing, *others, **options)


def _learnable(rows: Any, limit: int) -> list[int]:
    """Numbers of the rows that keep a label within the limit; says how many are cut and how many are dropped."""
    kept, cut, starts = [], 0, []
    for number, labels in enumerate(_labels(rows)):
        learned = (labels[1:] != -100).nonzero()[0]  # nothing predicts the first token
        cut += len(labels) > limit
        if len(learned) and learned[0] + 2 <= limit:
            kept.append(number)
        elif len(learned):
            starts.append(int(learned[0]) + 2)  # tokens up to and with the first that counts
    count = len(rows)
    if not kept and starts:
        raise ValueError(
            f"max_length: cut to {limit} tokens, none of the {count} rows has an answer left to learn from: "
            f"the first answers begin at token {min(starts)}; raise max_length, or shorten the prompts"
        )
    if not kept:
        raise ValueError(f"dataset: none of the {count} rows has a token to learn; give it answers, or longer texts")
    if starts:
        warn(f"{len(starts)} of {count} rows are left out: max_length {limit} leaves no token of their answers")
    if empty := count - len(kept) - len(starts):
        warn(f"{empty} of {count} rows are left out: they hold no token to learn")
    if still := cut - len(starts):
        warn(f"{still} of {count} rows are longer than max_length {limit} and lose their ends")
    return kept


def _labels(rows: Any) -> Iterable[Any]:
    for batch in rows.select_columns(["labels"]).with_format("numpy").iter(1000):
        yield from batch["labels"]
