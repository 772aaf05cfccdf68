"""Names that transformers must know, and a folder that must take files: asked before anything is loaded."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ops.trainer._say import one_line

if TYPE_CHECKING:
    from lora_ops.trainer.arguments import SFTArguments


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name an unknown one may be meant for, or all that are known.

    Args:
        name: what was given.
        known: what may be given.

    Returns:
        "did you mean cosine?" or "expected one of ...".
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"


def check_choices(args: SFTArguments) -> None:
    """Check the names of optimizer, schedule and reporting integration, and that files can be written.

    Args:
        args: the run's arguments.

    Raises:
        ValueError: if a name is unknown or needs what cannot be given here, or output_dir takes no files.
        ImportError: if the reporting integration's package is missing.
    """
    from transformers.training_args import OptimizerNames

    names = [name.value for name in OptimizerNames]
    if args.optim not in names:
        raise ValueError(f"optim: {args.optim!r} is unknown; {nearest(args.optim, names)}")
    _check_schedule(args.lr_scheduler_type)
    _check_report(args.report_to)
    _check_folder(Path(args.output_dir))


def _check_schedule(name: str) -> None:
    """Build the schedule for a parameter of its own: some names need settings that the command line has not."""
    import torch
    from transformers import SchedulerType, get_scheduler

    names = [kind.value for kind in SchedulerType]
    if name not in names:
        raise ValueError(f"lr_scheduler_type: {name!r} is unknown; {nearest(name, names)}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    try:
        schedule = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"lr_scheduler_type: {name!r} needs settings that cannot be given here ({one_line(error)}); "
            "take another, as cosine or linear"
        ) from error
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"lr_scheduler_type: {name!r} goes by an evaluation, and there is none; take cosine or linear")


def _check_report(name: str) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to: {name!r} is unknown; {nearest(name, ['none', 'all', *INTEGRATION_TO_CALLBACK])}")
    if name not in get_available_reporting_integrations():
        raise ImportError(f"report_to: {name} is not installed; install it, or set report_to none")


def _check_folder(folder: Path) -> None:
    """Make the folder and a file in it; permissions alone do not tell (full or read-only disks, root)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {folder} ({error.strerror}); name another folder") from error
