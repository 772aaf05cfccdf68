"""A run that leaves the finite numbers stops, says at which step, and leaves what an earlier run saved alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lora_ops.trainer import sft
from lora_ops.trainer.arguments import SFTArguments
from lora_ops.trainer.divergence import DivergedError

TOO_FAST = {"learning_rate": 1e20, "max_grad_norm": 0}


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "nf4"},
        {"quantize": "none", "optim": "adamw_8bit"},
        {"full": True, "quantize": "none"},
        {"full": True, "quantize": "none", "optim": "paged_adamw_8bit"},
        {"bf16": True, "lora_dropout": 0.1},
        {"packing": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_an_earlier_run_survives(options: dict[str, Any], sft_main: Callable[..., Any], tmp_path: Path) -> None:
    assert sft_main(max_steps=1, **options)[0] == 0
    before = _files(tmp_path / "out")
    assert before
    status, out, err = sft_main(max_steps=6, **(options | TOO_FAST))
    assert status == 2
    assert re.search(r"error: training diverged: (the loss|the gradients' norm) is nan at step 2\. ", err)
    assert "Nothing of it was saved" in err
    assert "lower learning_rate (1e+20), clip with max_grad_norm 1" in err
    assert "mean loss" not in out
    assert _files(tmp_path / "out") == before


@pytest.mark.parametrize("full", [False, True])
def test_no_checkpoint_of_a_diverged_state(full: bool, sft_main: Callable[..., Any], tmp_path: Path) -> None:
    """The update of step 1 is finite and far too large: only the loss or the gradients after it tell."""
    kind = {"full": True, "quantize": "none"} if full else {}
    assert sft_main(max_steps=1, save_steps=1, **kind)[0] == 0
    before = _files(tmp_path / "out")
    assert any(name.startswith("checkpoint-1/") for name in before)
    status, _, err = sft_main(max_steps=6, save_steps=1, **kind, **TOO_FAST)
    assert status == 2
    assert re.search(r"training diverged: .* is nan after step 1\. ", err)
    assert _files(tmp_path / "out") == before


def test_the_last_step_counts(sft_main: Callable[..., Any], tmp_path: Path) -> None:
    assert sft_main(max_steps=1, **TOO_FAST)[0] == 2
    assert not list((tmp_path / "out").glob("*"))


def _arguments(model: Path, questions: Path, output: Path, **changes: Any) -> SFTArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 128, "use_cpu": True,
                "disable_tqdm": True, "lora_r": 2, "logging_steps": 1}  # fmt: skip
    return SFTArguments(str(model), str(questions), str(output), **(settings | changes))


class Spoil(TrainerCallback):
    """From a step on, the gradients or the weights of the adapters are no numbers; the loss stays one."""

    def __init__(self, what: str, value: float, step: int) -> None:
        self.what, self.value, self.step = what, value, step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step + 1 == self.step and self.what == "gradient":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: grad * self.value)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step + 1 == self.step and self.what == "weight":
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] = self.value


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("gradient", float("nan"), "the gradients' norm is nan at step 3"),
        ("gradient", float("inf"), r"the gradients' norm is (inf|nan) at step 3"),
        ("weight", float("nan"), "a trained weight is not finite after step 3"),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_finite_loss_does_not_hide_it(
    what: str, value: float, message: str, max_grad_norm: float, tiny_model: Path, questions: Path, tmp_path: Path
) -> None:
    args = _arguments(tiny_model, questions, tmp_path / "out", max_steps=3, max_grad_norm=max_grad_norm)
    with pytest.raises(DivergedError, match=message):
        sft.train(args, callbacks=[Spoil(what, value, 3)])
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_model_that_gives_nan_itself_is_told_apart(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    args = _arguments(tiny_model, questions, tmp_path, full=True, quantize="none")
    with pytest.raises(
        DivergedError, match=r"the loss is nan at step 1\. .* no update had been made, so the model gives"
    ):
        sft.train(args, model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_model))


def test_looking_changes_nothing(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    """A run that saves, and so looks, at each step is bit for bit the run that does not, dropout and all."""
    from safetensors.torch import load_file

    adapters = []
    for name, save_steps in (("looks", 1), ("does_not", 0)):
        sft.train(_arguments(tiny_model, questions, tmp_path / name, save_steps=save_steps, lora_dropout=0.3))
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
