"""Messages need a chat template, and the assistant's turns alone one that marks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ops.trainer import sft
from lora_ops.trainer.arguments import SFTArguments

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }};{%- endgeneration -%}{% else %}{{ m.content }};{% endif %}{% endfor %}"
)
CHAT = {"messages": [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"},
]}  # fmt: skip
PAIR = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:2]}


@pytest.fixture
def counted(tiny_model: Path, tmp_path: Path) -> Any:
    """The text of the tokens that count in the first row."""

    def run(template: str | None, *rows: dict[str, Any], **options: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        if "eos_token" in options:
            tokenizer.eos_token = options.pop("eos_token")
        args = SFTArguments("x", "x", str(tmp_path), full=True, quantize="none", use_cpu=True, disable_tqdm=True,
                            **options)  # fmt: skip
        data = sft.to_trl_format(Dataset.from_list(list(rows)))
        sft.check_tokenizer(tokenizer, data, assistant_only=args.assistant_only_loss)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        row = sft._trainer(args, model, tokenizer, data, (), None).train_dataset[0]
        return tokenizer.decode([label for label in row["labels"] if label != -100])

    return run


def test_messages_train_on_every_token_unless_told_otherwise(counted: Any) -> None:
    assert counted(MARKED, CHAT) == "user:hi;assistant:ok;user:so;assistant:no;"
    assert counted(MARKED, CHAT, assistant_only_loss=True) == "ok;no;"


def test_a_completion_counts_alone_and_by_its_marks(counted: Any) -> None:
    assert counted(PLAIN, PAIR) == "assistant:ok;"
    assert counted(MARKED, PAIR, assistant_only_loss=True) == "ok;"


def test_trl_has_marked_versions_of_known_templates(counted: Any) -> None:
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    assert "generation %" not in template
    assert counted(template, CHAT, assistant_only_loss=True).replace("\n", "").split("<|im_end|>") == ["ok", "no", ""]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (PLAIN, CHAT, r"assistant_only_loss: the chat template does not mark .*put {% generation %} and"),
        (PLAIN, PAIR, r"assistant_only_loss: the chat template does not mark"),
        (MARKED, {"text": "a"}, r"assistant_only_loss: expected messages, got the columns text of text; leave it out"),
        (MARKED, {"prompt": "a", "completion": "b"}, r"assistant_only_loss: expected messages, got the columns"),
        (MARKED, {"messages": CHAT["messages"][:1]},
         r"assistant_only_loss: no turn of the assistant in 1 of 2 rows \(row 2\)"),
        (None, CHAT, r"dataset: messages need a chat template, and this model's tokenizer has none; take"),
    ],
)  # fmt: skip
def test_what_the_template_cannot_do_is_said(
    template: str | None, row: dict[str, Any], message: str, counted: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        counted(template, CHAT if "messages" in row else row, row, assistant_only_loss=True)


def test_messages_without_a_template_and_text_without_an_end(counted: Any) -> None:
    with pytest.raises(ValueError, match="dataset: messages need a chat template"):
        counted(None, CHAT)
    with pytest.raises(ValueError, match=r"model_name_or_path: the tokenizer has no eos_token .*tokenizer_config.json"):
        counted(None, {"text": "a"}, eos_token=None)
