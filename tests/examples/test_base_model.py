"""The base model: its training learns, its files load without remote code, and the shipped one is small and sane."""

from __future__ import annotations

import json
import os
import stat

import pytest

pytest.importorskip("transformers")

import torch

from examples.demo.base_model import DEMO_MODEL, BaseConfig, save_base, train_base, train_tokenizer

TEXTS = [f"def add{i}(a, b):\n    return a + b + {i}\n" * 6 for i in range(30)]
SMALL = BaseConfig(
    vocab_size=300, hidden_size=64, intermediate_size=64, num_layers=1, sequence_length=32, batch_size=4,
    max_steps=25, warmup_steps=2, learning_rate=1e-2,
)  # fmt: skip


def test_tokenizer_gives_back_any_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert 258 < len(tokenizer) <= 300
    for text in ("def f(x):\n\treturn  x\n\n\n", "Grüße, 世界! \x00 1234  ", "", " \n \n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_learns_and_is_repeatable():
    first, tokenizer, record = train_base(SMALL, TEXTS, TEXTS[:8])
    second, _, _ = train_base(SMALL, TEXTS, TEXTS[:8])
    assert record["validation_loss"] < 3.0 < torch.log(torch.tensor(float(len(tokenizer))))
    assert record["trained_tokens"] == 25 * 4 * 32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="train_texts: expected at least one batch"):
        train_base(SMALL, ["x = 1\n"], [])


def test_saved_model_is_whole_and_readable_by_everyone(tmp_path):
    from dataclasses import asdict

    model, tokenizer, record = train_base(SMALL, TEXTS, TEXTS[:8])
    folder = save_base(model, tokenizer, {"config": asdict(SMALL), "files": 30, "python": "3"} | record, tmp_path / "m")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    if os.name == "posix":
        umask = os.umask(0)
        os.umask(umask)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


def test_the_shipped_model_loads_and_predicts_python():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = list(DEMO_MODEL.iterdir())
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    record = json.loads((DEMO_MODEL / "training.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    ids = AutoTokenizer.from_pretrained(DEMO_MODEL)(
        "class Thing:\n    def __init__(self, name, value=None):\n        self.name = name\n",
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 3.0  # a model that knows nothing is at ln 3072 = 8.0
