"""Two processes under torchrun's variables, gloo on the CPU: one writes, both stop, and the counts are of both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# Importing takes longer than all the steps, so a process does both runs.
_TWICE = """
import sys
from lora_ops.trainer import sft
rest = sys.argv[1:]
print("first", sft.main([*rest, "--max_steps=2", "--save_steps=1"]))
try:
    sft.main([*rest, "--max_steps=6", "--learning_rate=1e20", "--max_grad_norm=0", "--lora_r=4"])
except SystemExit as stopped:
    print("second", stopped.code)
"""


def _launch(arguments: list[str]) -> list[tuple[str, str]]:
    """Stdout and stderr of the two ranks."""
    port = str(_free_port())
    ranks = []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _TWICE, *arguments]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=os.environ | env | quiet, stdout=pipe, stderr=pipe, text=True))
    return [rank.communicate() for rank in ranks]


def test_one_rank_writes_and_both_stop(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    # The rows carry an id, which is not used and has to be named: by one of the two.
    rows = [json.loads(line) | {"id": 1} for line in questions.read_text(encoding="utf-8").splitlines()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    first, second = _launch(
        [f"--model_name_or_path={tiny_model}", f"--dataset={questions}", f"--output_dir={out}", "--max_length=128",
         "--lora_r=2", "--per_device_train_batch_size=1", "--use_cpu", "--disable_tqdm", "--logging_steps=1"]
    )  # fmt: skip
    for printed, errors in (first, second):
        assert "first 0" in printed, errors
        assert "second 2" in printed, errors
        assert "error: training diverged: " in errors
        assert " at step 2. Nothing of it was saved" in errors
    assert "2 steps, mean loss" in first[0]
    assert "mean loss" not in second[0]
    assert first[1].count("columns that are not used: id") == 2
    assert "columns that are not used" not in second[1]

    names = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "checkpoint-1", "checkpoint-2"} <= names
    assert not [name for name in names if name.startswith(".")]
    newest = {path.name for path in (out / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "adapter_model.safetensors", "trainer_state.json"} <= newest
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 2, "of the first run"
