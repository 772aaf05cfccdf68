"""Columns and rows: what TRL can use arrives, what it cannot is named, and no key is invented."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

pytest.importorskip("trl")

import datasets

from lora_ops.trainer import sft
from lora_ops.trainer.arguments import SFTArguments
from lora_ops.trainer.rows import to_trl_format

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]


def _tool(name: str, **properties: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def _rows(*rows: dict[str, Any]) -> Any:
    return datasets.Dataset.from_list(list(rows))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "tools": [_tool("f")], "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "tools": [_tool("f")]},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "chat_template_kwargs": {"a": 1}},
        {"messages": TURNS, "tools": json.dumps([_tool("f")])},
    ],
)
def test_optional_columns_stay(row: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert set(to_trl_format(_rows(row)).column_names) == set(row)
    assert not caplog.records


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": TURNS, "id": 1, "source": "x"}, "id, source"),
        ({"text": "a", "tools": "[]"}, "tools"),
        ({"prompt": "a", "completion": "b", "chat_template_kwargs": "{}", "text": "c"}, "chat_template_kwargs, text"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history"),
        ({"text": "a"} | {f"c{n}": n for n in range(9)}, "c0, c1, c2, c3, c4, ..."),
    ],
)
def test_columns_that_are_not_used_are_named_once(
    row: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lora_ops"):
        to_trl_format(_rows(row, row))
    assert [record.getMessage() for record in caplog.records] == [f"dataset: columns that are not used: {named}"]


def test_arrow_invents_no_keys() -> None:
    """A struct column has one set of keys: what one row has, all others get as null."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = to_trl_format(
        _rows(
            {"messages": [TURNS[0] | {"name": "bob"}, call], "tools": [_tool("f", city={"type": "string"})],
             "chat_template_kwargs": {"enable_thinking": True}},
            {"messages": TURNS, "tools": [_tool("g", date={"type": "string"})], "chat_template_kwargs": None},
            {"messages": TURNS, "tools": None, "chat_template_kwargs": {"other": 1}},
        )
    )  # fmt: skip
    assert rows[0]["messages"] == [TURNS[0] | {"name": "bob"}, call]
    assert [row["messages"] for row in rows][1:] == [TURNS, TURNS]
    assert rows[1]["tools"] == [_tool("g", date={"type": "string"})]
    assert rows[2]["tools"] is None
    assert [row["chat_template_kwargs"] for row in rows] == [{"enable_thinking": True}, {}, {"other": 1}]


def test_tools_reach_the_chat_template(tiny_model: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}<{{ t.function.name }}:{{ t.function.parameters.properties | tojson }}>{% endfor %}"
        "{{ style }}{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    )
    rows = to_trl_format(
        _rows(
            {"messages": TURNS, "tools": [_tool("f", city={})], "chat_template_kwargs": {"style": "!"}},
            {"messages": TURNS, "tools": [_tool("g", date={})], "chat_template_kwargs": None},
        )
    )
    args = SFTArguments("x", "x", str(tmp_path), full=True, quantize="none", use_cpu=True, disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = sft._trainer(args, model, tokenizer, rows, (), None)
    assert [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset] == [
        '<f:{"city": {}}>!user=hi;assistant=ok;', '<g:{"date": {}}>user=hi;assistant=ok;',
    ]  # fmt: skip


GOOD_PAIR, GOOD_CHAT = {"prompt": "a", "completion": "b"}, {"messages": TURNS}


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        (GOOD_PAIR, {"prompt": "a", "completion": None}, "completion is null"),
        (GOOD_PAIR, {"prompt": None, "completion": "b"}, "prompt is null"),
        (GOOD_PAIR, {"prompt": " ", "completion": "\n"}, "prompt and completion blank"),
        ({"text": "a"}, {"text": ""}, "text blank"),
        ({"text": "a"}, {"text": " \t\n"}, "text blank"),
        ({"text": "a"}, {"text": None}, "text is null"),
        (GOOD_CHAT, {"messages": []}, "messages is empty"),
        (GOOD_CHAT, {"messages": None}, "messages is null"),
        (GOOD_CHAT, {"messages": [{"role": None, "content": "a"}]}, "a turn of messages has no role"),
        (GOOD_CHAT, {"messages": [*TURNS, {"role": "user", "content": None}]},
         "a turn of messages has neither content nor tool_calls"),
        (GOOD_CHAT, {"messages": [{"role": "user", "content": " "}]}, "messages is blank"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"prompt": TURNS[:1], "completion": []},
         "completion is empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, "output is null"),
        ({"instruction": "a", "input": "", "output": "b"}, {"instruction": "", "input": "", "output": ""},
         "instruction and output blank"),
        ({"messages": TURNS, "tools": "[]"}, {"messages": TURNS, "tools": "[{"}, "tools is text that is not JSON"),
    ],
)  # fmt: skip
def test_rows_with_nothing_to_train_on_are_named(good: dict[str, Any], bad: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset: {fault} in 2 of 4 rows \(row 2, 4\); mend or take out"):
        to_trl_format(_rows(good, bad, good, bad))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": 5}, "completion is int, not text"),
        ({"text": {"a": "b"}}, "text is dict, not text"),
        ({"prompt": TURNS[:1], "completion": "b"}, "one of prompt and completion is text and the other messages"),
    ],
)
def test_columns_of_another_kind_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"dataset: {message} in 1 of 1 rows"):
        to_trl_format(_rows(row))


def test_a_blank_answer_is_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lora_ops"):
        assert len(to_trl_format(_rows(GOOD_PAIR, {"prompt": "a", "completion": ""}))) == 2
    assert "the answer is blank in 1 of 2 rows (row 2)" in caplog.text
