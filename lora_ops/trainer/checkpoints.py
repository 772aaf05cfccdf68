"""Checkpoints that are whole or not there: written beside their place and renamed, and looked through on resume."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ops.trainer._say import one_line, warn

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer

    from lora_ops.trainer.arguments import SFTArguments
else:
    _Trainer = object

_STATE = "trainer_state.json"
_UNFINISHED = ".unfinished-checkpoint"
_WEIGHTS = "adapter_model.safetensors", "model.safetensors"


class WholeCheckpoints(_Trainer):
    """A mixin for transformers' Trainer: a checkpoint stands in output_dir whole, or not at all.

    The Trainer writes a dozen files into the folder's final place; a run that is killed meanwhile leaves a folder that
    looks like the newest checkpoint. Here they go into a hidden folder, which is renamed when all processes are done.
    """

    _beside: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._beside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        beside = output_dir / _UNFINISHED
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._beside = str(beside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for folder in beside.iterdir():
                place = output_dir / folder.name
                if place.exists():  # of an earlier run; it goes only now that there is a whole one in its stead
                    place.replace(beside / f"old-{folder.name}")
                folder.replace(place)
            shutil.rmtree(beside)
        self.accelerator.wait_for_everyone()


def resume_folder(args: SFTArguments) -> str | None:
    """Find the checkpoint that `resume_from_checkpoint` names.

    Args:
        args: the run's arguments.

    Returns:
        Its folder, or None to start anew.

    Raises:
        ValueError: if there is no whole checkpoint, or nothing is left to train after it.
    """
    wanted = args.resume_from_checkpoint
    if wanted in (None, ""):
        return None
    if wanted == "last":
        folder = _newest_whole(Path(args.output_dir), args.full)
    else:
        folder = Path(str(wanted))
        if not folder.is_dir():
            raise ValueError(f"resume_from_checkpoint: there is no folder {wanted}")
        if reason := fault(folder, args.full):
            raise ValueError(
                f"resume_from_checkpoint: {folder} is not a whole checkpoint: {reason}; name an earlier one"
            )
    _check_steps_left(folder, args)
    return str(folder)


def fault(folder: Path, full: bool = False) -> str | None:
    """Say what a checkpoint lacks.

    Args:
        folder: the checkpoint.
        full: whether it is to hold a model's own weights, not adapters.

    Returns:
        The reason in words, or None if it is whole.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        state["global_step"] + 0
    except OSError:
        return f"there is no {_STATE}"
    except (ValueError, KeyError, TypeError):
        return f"{_STATE} is cut off or is none of the Trainer's"
    sharded = any(folder.glob("pytorch_model_fsdp*"))  # FSDP's own layout, read by accelerate
    if not sharded and (reason := _weights_fault(folder, _WEIGHTS[full])):
        return reason
    if not sharded and not (folder / "optimizer.pt").is_file():
        return "there is no optimizer.pt"
    for path in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        if not zipfile.is_zipfile(path):  # torch.save writes a zip; its directory comes last
            return f"{path.name} is cut off"
    return None


def _weights_fault(folder: Path, name: str) -> str | None:
    from safetensors import SafetensorError, safe_open

    index = folder / f"{name}.index.json"
    names = [name]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError):
            return f"{index.name} is cut off"
    for part in names:
        if not (folder / part).is_file():
            return f"there is no {part}"
        try:
            with safe_open(folder / part, framework="pt"):  # compares the file's size with what its header says
                pass
        except (SafetensorError, OSError) as error:
            return f"{part} cannot be read ({one_line(error)})"
    return None


def _newest_whole(output_dir: Path, full: bool) -> Path:
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    passed: list[str] = []
    for step in sorted(found, reverse=True):
        reason = fault(found[step], full)
        if reason is None:
            if passed:
                warn(f"resume_from_checkpoint: resuming from {found[step]}, passing over {'; '.join(passed)}")
            return found[step]
        passed.append(f"{found[step].name} ({reason})")
    raise ValueError(
        f"resume_from_checkpoint: there is no whole checkpoint in {output_dir}"
        + (f": {'; '.join(passed)}" if passed else "")
        + "; leave it out to start anew"
    )


def _check_steps_left(folder: Path, args: SFTArguments) -> None:
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if args.max_steps > 0 and state["global_step"] >= args.max_steps:
        raise ValueError(
            f"max_steps: {folder.name} is at step {state['global_step']} already, got {args.max_steps}; "
            "nothing is left to train: raise it"
        )
    if args.max_steps < 0 and (state.get("epoch") or 0) >= args.num_train_epochs:
        raise ValueError(
            f"num_train_epochs: {folder.name} is at epoch {state['epoch']:g} already, got {args.num_train_epochs:g}; "
            "nothing is left to train: raise it"
        )
