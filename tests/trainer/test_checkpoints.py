"""Checkpoints are whole or not there; a resume takes the newest whole one, and counts its own steps alone."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch

from lora_ops.trainer import sft
from lora_ops.trainer.arguments import SFTArguments
from lora_ops.trainer.checkpoints import fault, resume_folder


@pytest.fixture(scope="module")
def saved(tiny_model: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of 4 steps leaves that saves every 2."""
    from examples.demo.data import instruction_items

    folder = tmp_path_factory.mktemp("run")
    rows = [{k: item[k] for k in ("prompt", "completion")} for item in instruction_items("base", root=library)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sft.train(_arguments(tiny_model, folder, max_steps=4))
    return folder


def _arguments(model: Path, folder: Path, **changes: Any) -> SFTArguments:
    settings = {"num_train_epochs": 99, "save_steps": 2, "per_device_train_batch_size": 2, "max_length": 128,
                "lora_r": 2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}  # fmt: skip
    return SFTArguments(str(model), str(folder / "data.jsonl"), str(folder / "out"), **(settings | changes))


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("trainer_state.json", _cut, "trainer_state.json is cut off"),
        ("trainer_state.json", Path.unlink, "there is no trainer_state.json"),
        ("trainer_state.json", lambda path: path.write_text("[]"), "trainer_state.json is .* none of the Trainer's"),
        ("adapter_model.safetensors", _cut, "adapter_model.safetensors cannot be read"),
        ("adapter_model.safetensors", Path.unlink, "there is no adapter_model.safetensors"),
        ("adapter_model.safetensors", lambda path: path.write_bytes(b""), "adapter_model.safetensors cannot be read"),
        ("optimizer.pt", _cut, "optimizer.pt is cut off"),
        ("optimizer.pt", Path.unlink, "there is no optimizer.pt"),
        ("scheduler.pt", _cut, "scheduler.pt is cut off"),
        ("rng_state.pth", lambda path: path.write_bytes(b""), "rng_state.pth is cut off"),
    ],
)  # fmt: skip
def test_last_is_the_newest_whole_one(
    name: str, damage: Callable[[Path], Any], reason: str, run: Path, tiny_model: Path, caplog: Any
) -> None:
    newest = run / "out" / "checkpoint-4"
    assert fault(newest) is None
    damage(newest / name)
    with caplog.at_level(logging.WARNING, logger="lora_ops"):
        assert resume_folder(_arguments(tiny_model, run, resume_from_checkpoint="last")) == str(
            run / "out/checkpoint-2"
        )
    assert len(caplog.records) == 1
    assert "passing over checkpoint-4 (" in caplog.text
    with pytest.raises(
        ValueError, match=rf"resume_from_checkpoint: .*checkpoint-4 is not a whole checkpoint: {reason}"
    ):
        resume_folder(_arguments(tiny_model, run, resume_from_checkpoint=str(newest)))


def test_no_whole_checkpoint_is_named(run: Path, tiny_model: Path) -> None:
    for step in (2, 4):
        _cut(run / f"out/checkpoint-{step}/optimizer.pt")
    last = _arguments(tiny_model, run, resume_from_checkpoint="last")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*checkpoint-4 \(optimizer.pt .*; leave it out"):
        resume_folder(last)
    shutil.rmtree(run / "out")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*; leave it out to start anew"):
        resume_folder(last)
    with pytest.raises(ValueError, match="resume_from_checkpoint: there is no folder nowhere"):
        resume_folder(_arguments(tiny_model, run, resume_from_checkpoint="nowhere"))


def test_adapters_do_not_resume_a_full_run(run: Path, tiny_model: Path) -> None:
    args = _arguments(tiny_model, run, resume_from_checkpoint="last", full=True, quantize="none")
    with pytest.raises(ValueError, match=r"there is no model\.safetensors"):
        resume_folder(args)


def test_shards_of_a_full_checkpoint(run: Path) -> None:
    newest = run / "out" / "checkpoint-4"
    (newest / "adapter_model.safetensors").rename(newest / "model-1.safetensors")
    index = newest / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert fault(newest, full=True) == "there is no model-2.safetensors"
    shutil.copy(newest / "model-1.safetensors", newest / "model-2.safetensors")
    assert fault(newest, full=True) is None
    _cut(index)
    assert fault(newest, full=True) == "model.safetensors.index.json is cut off"


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_steps": 4}, "max_steps: checkpoint-4 is at step 4 already, got 4; nothing is left to train: raise it"),
        ({"max_steps": 1}, "max_steps: checkpoint-4 is at step 4 already, got 1"),
        ({"num_train_epochs": 0.01}, "num_train_epochs: checkpoint-4 is at epoch 0\\.\\d+ already, got 0.01"),
    ],
)
def test_a_finished_run_is_not_trained_again(limit: dict[str, Any], message: str, run: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sft.train(_arguments(tiny_model, run, resume_from_checkpoint="last", **limit))


def test_a_resumed_run_counts_its_own_loss_tokens_and_seconds(run: Path, tiny_model: Path) -> None:
    whole = sft.train(_arguments(tiny_model, run, max_steps=6, save_steps=0))
    losses = [entry["loss"] for entry in whole.log_history if "loss" in entry]
    tokens = [entry["num_input_tokens_seen"] for entry in whole.log_history if "loss" in entry]
    assert whole.train_loss == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert whole.tokens == tokens[5]

    # The schedule is another for 6 steps than for 4, so the losses are those of the resumed run's own log.
    resumed = sft.train(_arguments(tiny_model, run, max_steps=6, resume_from_checkpoint="last"))
    own = [entry["loss"] for entry in resumed.log_history if "loss" in entry][4:]
    assert resumed.global_step == 6
    assert len(own) == 2
    assert resumed.train_loss == pytest.approx(sum(own) / 2, rel=1e-6)
    assert resumed.tokens == tokens[5] - tokens[3]
    assert resumed.tokens_per_second == pytest.approx(resumed.tokens / resumed.seconds)


@pytest.mark.parametrize("full", [False, True])
def test_a_save_that_breaks_leaves_the_earlier_checkpoint(
    full: bool, run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk would: all but the last files of checkpoint-2 are written when it breaks."""
    from transformers import Trainer

    kind = {"full": True, "quantize": "none"} if full else {}
    out = run / "out"
    if full:
        shutil.rmtree(out)
        sft.train(_arguments(tiny_model, run, max_steps=2, **kind))
    before = {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()}

    def broken(self: Any, output_dir: str) -> None:
        assert Path(output_dir).is_dir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", broken)
        with pytest.raises(OSError, match="No space left"):
            sft.train(_arguments(tiny_model, run, max_steps=2, seed=1, **kind))
    assert {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()} == before
    assert (out / ".unfinished-checkpoint").is_dir(), "what was begun does not look like a checkpoint"

    sft.train(_arguments(tiny_model, run, max_steps=2, seed=1, **kind))
    assert (out / "checkpoint-2" / "trainer_state.json").read_bytes()
    assert fault(out / "checkpoint-2", full) is None
    assert (out / "checkpoint-2" / "rng_state.pth").read_bytes() != before["rng_state.pth"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_the_optimizer_lets_go_of_its_pages_when_a_run_fails(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("on purpose")

    pages = {"full": True, "quantize": "none", "optim": "paged_adamw_32bit", "page_budget": "128KiB",
             "page_dir": str(tmp_path / "pages")}  # fmt: skip
    with pytest.raises(RuntimeError, match="on purpose"):
        sft.train(_arguments(tiny_model, run, max_steps=2, **pages), callbacks=[Fail()])
    assert not any((tmp_path / "pages").iterdir())
    assert torch.isfinite(torch.tensor(sft.train(_arguments(tiny_model, run, max_steps=1, **pages)).train_loss))
