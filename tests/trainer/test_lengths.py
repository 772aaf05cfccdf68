"""Rows longer than max_length, and a max_length beyond the model's positions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
import transformers
from datasets import Dataset

from lora_ops.trainer import sft
from lora_ops.trainer.arguments import SFTArguments
from lora_ops.trainer.lengths import max_length_for, positions_of
from tests.models import gpt2, llama

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path) -> Any:
    """Rows as the trainer would train on them: their tokens that count, in order; a token is a byte."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)

    def run(rows: list[dict[str, str]], max_length: int, packing: bool) -> list[str]:
        args = SFTArguments("x", "x", str(tmp_path), full=True, quantize="none", use_cpu=True, disable_tqdm=True,
                            max_length=max_length, packing=packing)  # fmt: skip
        trainer = sft._trainer(args, model, tokenizer, Dataset.from_list(rows), (), None)
        counted = [
            tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset
        ]
        return sorted("".join(counted).split(tokenizer.eos_token)) if packing else counted

    return run


def _pair(prompt: int, completion: str) -> dict[str, str]:
    return {"prompt": "7" * prompt, "completion": completion}


@pytest.mark.parametrize("packing", [False, True])
def test_rows_without_an_answer_left_are_dropped_and_said(packing: bool, prepared: Any, caplog: Any) -> None:
    rows = [_pair(40, "a"), _pair(4, "b"), _pair(31, "cc"), _pair(32, "d"), _pair(4, "e" * 60), {**_pair(400, "f")}]
    with caplog.at_level(logging.WARNING, logger="lora_ops"):
        counted = prepared(rows, 32, packing)
    assert "".join(counted).replace("<|endoftext|>", "").replace("e", "").strip() in ("bc", "cb")
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "3 of 6 rows are left out: max_length 32 leaves no token of their answers",
        "2 of 6 rows are longer than max_length 32 and lose their ends",
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_is_said_when_every_row_fits(packing: bool, prepared: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="lora_ops"):
        prepared([_pair(4, "b"), _pair(29, "cc")], 32, packing)  # exactly 32 with the end token
    assert not caplog.records


@pytest.mark.parametrize("packing", [False, True])
def test_no_row_with_an_answer_left(packing: bool, prepared: Any) -> None:
    with pytest.raises(
        ValueError, match=r"max_length: cut to 32 tokens, none of the 2 rows .* begin at token 41; raise"
    ):
        prepared([_pair(40, "a"), _pair(90, "b")], 32, packing)


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_of_one_token_teaches_nothing(packing: bool, prepared: Any, caplog: Any) -> None:
    """Nothing predicts the first token. TRL takes such rows for trained ones."""
    alone = {"text": "<|endoftext|>"}
    with pytest.raises(ValueError, match="dataset: none of the 2 rows has a token to learn"):
        prepared([alone, alone], 32, packing)
    with caplog.at_level(logging.WARNING, logger="lora_ops"):
        assert prepared([alone, {"text": "abc"}], 32, packing)
    assert "1 of 2 rows are left out: they hold no token to learn" in caplog.text


def test_max_length_goes_by_the_models_positions() -> None:
    model = llama()
    assert max_length_for(model, None) == 64
    assert max_length_for(model, 64) == 64
    with pytest.raises(
        ValueError, match=r"max_length: expected at most 64, .* got 65; lower it, or raise max_position"
    ):
        max_length_for(model, 65)
    model.config.max_position_embeddings = 4096
    assert max_length_for(model, None) == 1024
    assert max_length_for(model, 4096) == 4096


@pytest.mark.parametrize(
    ("make", "positions"),
    [
        (gpt2, 64),
        (lambda: transformers.OPTForCausalLM(transformers.OPTConfig(
            **SMALL, ffn_dim=16, max_position_embeddings=20, word_embed_proj_dim=16)), 20),
        (lambda: transformers.RobertaForCausalLM(transformers.RobertaConfig(
            **SMALL, intermediate_size=16, max_position_embeddings=20, is_decoder=True)), 18),
        (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
            **SMALL, intermediate_size=16, max_position_embeddings=20)), 20),
        (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(
            vocab_size=64, hidden_size=16, n_layer=1, n_head=2)), None),
    ],
    ids=["GPT-2", "OPT", "RoBERTa", "GPT-NeoX", "Bloom"],
)  # fmt: skip
def test_as_many_positions_as_the_model_can_run(make: Any, positions: int | None) -> None:
    model = make().eval()
    assert positions_of(model) == positions
    ids = torch.full((1, positions or 40), 5)
    assert model(input_ids=ids).logits.isfinite().all()
    if any(isinstance(m, torch.nn.Embedding) and "position" in n for n, m in model.named_modules()):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))
