"""A tiny library to build questions from, and a tiny model to train on them; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODULES = 40


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a standard library: 40 modules, a package, and things that must be skipped."""
    root = tmp_path_factory.mktemp("stdlib")
    for number in range(MODULES):
        (root / f"module{number}.py").write_text(
            f'def first{number}(a, *, b={number}):\n    """Return the sum of a and number {number}."""\n\n'
            f'class Thing{number}:\n    async def go(self):\n        """Walk {number} steps.\n\n        More."""\n'
            "    def silent(self): pass\n",
            encoding="utf-8",
        )
    package = root / "package"
    (package / "test").mkdir(parents=True)
    (package / "__init__.py").write_text('def top():\n    """Give back the topmost entry."""\n', encoding="utf-8")
    (package / "inner.py").write_text('def deep():\n    """Give back the deepest entry."""\n', encoding="utf-8")
    (package / "test" / "test_it.py").write_text('def hidden():\n    """Never to be seen here."""\n', encoding="utf-8")
    (root / "_sysconfigdata_x.py").write_text("build_time_vars = {}\n", encoding="utf-8")
    (root / "broken.py").write_text("def (:\n", encoding="utf-8")
    (root / "latin.py").write_bytes(b'def latin():\n    """Caf\xe9 is not UTF-8."""\n')
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama-architecture model of one layer with random weights, and a tokenizer of 300 tokens."""
    pytest.importorskip("transformers")
    from examples.demo.base_model import BaseConfig, new_model, train_tokenizer

    config = BaseConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_layers=1)
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n", "Question: what?\nAnswer:\n"] * 20, 300)
    folder = tmp_path_factory.mktemp("tiny_model")
    new_model(config, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(library: Path, tmp_path: Path) -> Path:
    """A .jsonl file of questions, as a user would bring one."""
    from examples.demo.data import instruction_items

    path = tmp_path / "questions.jsonl"
    rows = [{k: item[k] for k in ("prompt", "completion")} for item in instruction_items("base", root=library)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sft_main(tiny_model: Path, questions: Path, tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: options in, exit status, stdout and stderr out."""
    from lora_ops.trainer import sft

    def run(*flags: str, **options: object) -> tuple[int, str, str]:
        settings = {
            "model_name_or_path": tiny_model, "dataset": questions, "output_dir": tmp_path / "out", "max_steps": 2,
            "lora_r": 2, "per_device_train_batch_size": 2, "max_length": 128, "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        argv = [f"--{name}={value}" for name, value in (settings | options).items()]
        capsys.readouterr()
        try:
            status = sft.main([*argv, *flags])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run
