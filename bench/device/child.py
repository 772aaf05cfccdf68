"""The process that runs sections, and saves after each piece of work.

It ends itself with BROKEN when the CUDA context no longer works (an illegal address is for the whole process), so that
its parent can start another for the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.clocks import clock_for
from bench.device.sections import DRY_PLAN, PLAN, SECTIONS, Context, Progress, cuda_works, share
from bench.environment import traceback_text
from bench.files import write_json
from bench.report import run_from_dict

BROKEN = 3


def load_progress(path: Path) -> Progress:
    """Read what a child has saved."""
    data = json.loads(path.read_text())
    return Progress(run_from_dict(data["run"]), data["current"], data["done"], data["skipped"])


def section_end(now: float, deadline: float, shares: Sequence[float]) -> float:
    """When the first of the sections that are left must stop, if each is to have its share of the time."""
    return now + (deadline - now) * shares[0] / sum(shares) if deadline < float("inf") else deadline


def run_sections(names: Sequence[str], path: Path, *, deadline: float, dry: bool) -> int:
    """Run sections in order, adding to the progress in `path`; answers the exit status."""
    progress = load_progress(path)
    context: Context | None = None
    for index, name in enumerate(names):
        if time.time() > deadline:
            progress.skipped.append(name)
            continue
        progress.current = name
        write_json(path, asdict(progress))
        until = section_end(time.time(), deadline, [share(n) for n in names[index:]])
        broken = False
        try:
            if context is None:
                plan = DRY_PLAN if dry else PLAN
                context = Context(plan, clock_for(plan.device), progress.run, dry)
            for what in SECTIONS[name](context):
                print(f"[{name}] {what}", flush=True)
                write_json(path, asdict(progress))
                if time.time() > until:
                    progress.skipped.append(f"the rest of {name}")
                    break
        except Exception:
            progress.run.failures.append({"section": name, "reason": traceback_text()})
            print(f"[{name}] FAILED\n{traceback_text()}", flush=True)
            broken = not dry and not cuda_works()
        progress.done.append(name)
        progress.current = ""
        write_json(path, asdict(progress))
        if broken:
            return BROKEN
        if not dry:
            torch.cuda.empty_cache()
    write_json(path, asdict(progress))
    return 0
