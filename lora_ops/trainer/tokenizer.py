"""Whether a tokenizer can do what the rows ask of it: an end token for text, a chat template for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_ops.trainer._say import some

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, assistant_only: bool) -> None:
    """Check the tokenizer before the rows are turned into tokens.

    Args:
        tokenizer: the model's.
        dataset: the rows, in TRL's format.
        assistant_only: whether only the assistant's turns count.

    Raises:
        ValueError: if the rows are text and there is no end token, or they are messages and there is no template, or
            only the assistant's turns are to count and the template does not mark them, or a row has none.
    """
    columns = [name for name in ("messages", "prompt", "completion") if name in dataset.column_names]
    columns = [name for name in columns if isinstance(dataset[0][name], list)]
    if not columns:
        if assistant_only:
            raise ValueError(
                "assistant_only_loss: expected messages, got the columns "
                f"{' + '.join(dataset.column_names)} of text; leave it out (completions alone count anyway)"
            )
        if tokenizer.eos_token is None:
            raise ValueError(
                "model_name_or_path: the tokenizer has no eos_token to end a text with; name one in its "
                "tokenizer_config.json"
            )
        return
    if not tokenizer.chat_template:
        raise ValueError(
            "dataset: messages need a chat template, and this model's tokenizer has none; take the model's instruct "
            "version, put a chat_template.jinja into its folder, or give prompt + completion as text"
        )
    if assistant_only:
        _check_marks(tokenizer)
        _check_turns(dataset, columns)


def _check_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)  # TRL has marked versions of well-known templates
    except ValueError as error:
        raise ValueError(
            "assistant_only_loss: the chat template does not mark the assistant's turns; put {% generation %} and "
            "{% endgeneration %} around them in chat_template.jinja, or give prompt + completion, where the completion "
            "alone counts"
        ) from error


def _check_turns(dataset: Dataset, columns: list[str]) -> None:
    without = [
        number
        for number, row in enumerate(dataset, 1)
        if not any(turn["role"] == "assistant" for name in columns for turn in row[name])
    ]
    if without:
        raise ValueError(
            f"assistant_only_loss: no turn of the assistant in {len(without):,} of {len(dataset):,} rows "
            f"(row {some(without)}); take them out"
        )
