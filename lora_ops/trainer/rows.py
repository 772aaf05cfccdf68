"""The rows of a training set: which columns are used, and what no run can learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_ops.trainer._say import some, warn

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = (("prompt", "completion"), ("messages",), ("text",))
_WITH_MESSAGES = ("tools", "chat_template_kwargs")  # TRL hands them to the chat template
_INSTRUCTION = ("instruction", "input", "output")
_OPTIONAL = (*_WITH_MESSAGES, "input")


def to_trl_format(dataset: Dataset) -> Dataset:
    """Choose the columns that TRL trains on, and check every row.

    Args:
        dataset: with the columns prompt + completion, messages, text, or instruction (+ input) + output.

    Returns:
        The dataset with these columns, and with messages also tools and chat_template_kwargs. Instructions become
        prompt and completion.

    Raises:
        ValueError: if the columns are none of those, there is no row, or rows hold nothing to train on; the message
            names the first of them.
    """
    present = set(dataset.column_names)
    if not len(dataset):
        raise ValueError("dataset: expected at least one row, got none")
    wanted = next((columns for columns in _FORMATS if present.issuperset(columns)), None)
    if wanted is None and present.issuperset(("instruction", "output")):
        used = [name for name in _INSTRUCTION if name in present]
        _name_ignored(present - set(used))
        dataset = dataset.select_columns(used)
        _check_rows(dataset, used)
        return dataset.map(_from_instruction, remove_columns=used)
    if wanted is None:
        raise ValueError(
            "dataset: expected the columns prompt + completion, messages, text, or instruction (+ input) + output; "
            f"got {', '.join(sorted(present)) or 'none'}"
        )
    used = list(wanted)
    if not isinstance(dataset[0][wanted[-1]], str):
        used += [name for name in _WITH_MESSAGES if name in present]
    _name_ignored(present - set(used))
    dataset = dataset.select_columns(sorted(used))
    _check_rows(dataset, used)
    return _without_filled_nulls(dataset)


def _name_ignored(names: set[str]) -> None:
    if names:
        warn(f"dataset: columns that are not used: {some(sorted(names))}")


def _from_instruction(row: dict[str, Any]) -> dict[str, str]:
    parts = [row["instruction"], row.get("input") or ""]
    return {"prompt": "\n".join(part for part in parts if part) + "\n", "completion": row["output"]}


def _check_rows(dataset: Dataset, used: list[str]) -> None:
    found: dict[str, list[int]] = {}
    blank = []
    kinds = {name: type(dataset[0][name]) for name in used}
    for number, row in enumerate(dataset, 1):
        for fault in _faults(row, used, kinds):
            found.setdefault(fault, []).append(number)
        answer = row.get("completion", row.get("output"))
        if isinstance(answer, str) and not answer.strip():
            blank.append(number)
    if found:
        faults = [
            f"{fault} in {len(numbers):,} of {len(dataset):,} rows (row {some(numbers)})"
            for fault, numbers in found.items()
        ]
        raise ValueError(f"dataset: {'; '.join(faults)}; mend or take out these rows")
    if blank:
        warn(
            f"dataset: the answer is blank in {len(blank):,} of {len(dataset):,} rows (row {some(blank)}): "
            "they teach the model to say nothing"
        )


def _faults(row: dict[str, Any], used: list[str], kinds: dict[str, type]) -> Iterator[str]:
    """What is wrong with a row, in words; each word stands for one kind of fault."""
    blank = True
    for name in used:
        value = row[name]
        if name in _OPTIONAL:
            if name == "tools" and isinstance(value, str) and not _is_json(value):
                yield "tools is text that is not JSON"
            continue
        if value is None:
            yield f"{name} is null"
            blank = False
        elif isinstance(value, str):
            if kinds[name] is list:
                yield f"{name} is text where row 1 has messages"
            blank = blank and not value.strip()
        elif isinstance(value, list):
            if kinds[name] is str:
                yield f"{name} is messages where row 1 has text"
            yield from _turn_faults(name, value)
            blank = False
        else:
            yield f"{name} is {type(value).__name__}, not text"
            blank = False
    if blank:
        yield f"{' and '.join(name for name in used if name not in _OPTIONAL)} blank"
    if {kinds[name] for name in used if name in ("prompt", "completion")} == {str, list}:
        yield "one of prompt and completion is text and the other messages"


def _turn_faults(name: str, turns: list[Any]) -> Iterator[str]:
    if not turns:
        yield f"{name} is empty"
        return
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        yield f"a turn of {name} has no role"
        return
    said = [[value for key, value in turn.items() if key != "role" and value is not None] for turn in turns]
    if not all(said):
        yield f"a turn of {name} has neither content nor tool_calls"
    elif all(isinstance(value, str) and not value.strip() for values in said for value in values):
        yield f"{name} is blank"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _without_filled_nulls(dataset: Dataset) -> Dataset:
    """Take out the keys that Arrow has put into each turn and tool because another one has them.

    A struct column has one set of keys, null where a row has none. A chat template would see a name or a parameter
    that the data never had, so such columns become JSON, which keeps each row's own keys.
    """
    from datasets import Json

    features = dataset.features.copy()
    nested = [name for name in features if _has_struct(features[name])]
    if not nested and "chat_template_kwargs" not in features:
        return dataset
    nested += [name for name in ("chat_template_kwargs",) if name in features and name not in nested]
    for name in nested:
        features[name] = Json()

    def strip(row: dict[str, Any]) -> dict[str, Any]:
        stripped = {name: _strip(row[name]) for name in nested}
        if "chat_template_kwargs" in stripped:  # TRL unpacks it
            stripped["chat_template_kwargs"] = stripped["chat_template_kwargs"] or {}
        return stripped

    return dataset.map(strip, features=features, desc="Dropping filled-in keys")


def _has_struct(feature: Any) -> bool:
    if isinstance(feature, dict):
        return True
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return inner is not None and _has_struct(inner)


def _strip(value: Any) -> Any:
    if isinstance(value, list):
        return [_strip(item) for item in value]
    if isinstance(value, dict):
        return {key: _strip(item) for key, item in value.items() if item is not None or key == "content"}
    return value
