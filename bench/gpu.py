"""`python3 -m bench.gpu`: checks and times every op on this machine's GPU, from a bare checkout with torch and triton.

Sections run in a child process that saves after each piece of work. If it dies, hangs or breaks its CUDA context, that
section is reported as failed and another child runs the rest. Results: bench/results/<gpu>/ (results.json and
report.md), rewritten after every section. Exit status: 0, 1 if a check or a section failed, 2 without a GPU.

`--tune` measures which route of an op is faster from how many tokens on, and writes it to where lora_ops reads it
(runtime/crossovers.py). Without it the same is measured, used for the times that follow, and told in the report.
"""

# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path

# A bare checkout is not installed, and may not be the current folder.
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import argparse
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from bench.device.aims import judge
from bench.device.child import load_progress, run_sections
from bench.device.sections import SECTIONS, Progress
from bench.environment import command_line, describe, slug, traceback_text
from bench.files import write_json
from bench.measure import Run
from bench.report import write_report
from lora_ops.runtime import crossovers

BUDGET_S = 450.0
SILENCE_S = 120.0  # without a sign of life a section hangs: the largest comparison takes well under a minute
GRACE_S = 20.0  # beyond the budget, for the piece of work in hand: with it, the whole takes less than 8 minutes


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", type=float, help=f"seconds ({BUDGET_S:g}); what is left over is skipped")
    parser.add_argument("--sections", type=_sections, default=tuple(SECTIONS), help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--output", type=Path, help="folder of the results; default bench/results/<gpu>/")
    parser.add_argument("--tune", action="store_true", help="measure this GPU's crossovers; lora_ops uses them after")
    parser.add_argument("--dry-run", action="store_true", help="every section on the CPU, tiny shapes, no limits")
    parser.add_argument("--silence", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.tune:
        args.sections = ("tune",)
    # A GPU is lent for minutes, and may hang; a CPU does neither, but may be slow and busy.
    if args.budget is None:
        args.budget = math.inf if args.dry_run else BUDGET_S
    if args.silence is None:
        args.silence = math.inf if args.dry_run else SILENCE_S
    return args


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"expected of {', '.join(SECTIONS)}; got {', '.join(unknown)}")
    return names


def supervise(args: argparse.Namespace, folder: Path, about: dict) -> Run:
    """Run the sections in children until all are done or the time is up; report after each."""
    deadline = time.time() + args.budget

    def report(run: Run) -> None:
        if any(name.startswith("time") for name in args.sections):
            run.aims = judge(run.rows)
        try:
            write_report(folder, about, [run])
        except Exception:  # it must not cost what is still to be measured
            run.failures.append({"section": "report", "reason": traceback_text()})
            write_json(folder / "results.json", {"about": about, "runs": [asdict(run)]})

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "progress.json"
        write_json(path, asdict(Progress(Run(about.get("gpu") or "dry run on the CPU"))))
        left = list(args.sections)
        while left and time.time() < deadline:
            status = _run_child(args, left, path, deadline, lambda: report(load_progress(path).run))
            progress = load_progress(path)
            if status and progress.current:
                # It ended inside a section, without the chance to say why.
                progress.run.failures.append({"section": progress.current, "reason": status})
                progress.done.append(progress.current)
                progress.current = ""
                write_json(path, asdict(progress))
            elif status and len(progress.done) == len(args.sections) - len(left):
                progress.run.failures.append({"section": left[0], "reason": f"before it began: {status}"})
                progress.done.append(left[0])
                write_json(path, asdict(progress))
            left = [name for name in left if name not in progress.done and name not in progress.skipped]
        run = load_progress(path).run
        skipped = [*load_progress(path).skipped, *left]
        run.notes += [f"- {name}: not run, its share of the {args.budget:g} s was spent" for name in skipped]
    report(run)
    return run


def _run_child(
    args: argparse.Namespace, left: list[str], path: Path, deadline: float, report: Callable[[], None]
) -> str:
    """One child: "" if it ended well, else how it ended."""
    command = child_command(left, path, deadline, args.dry_run)
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": os.pathsep.join(
        p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p
    )}  # fmt: skip
    child = subprocess.Popen(command, cwd=ROOT, env=environment)
    done, seen = len(load_progress(path).done), path.stat().st_mtime_ns
    alive = time.time()
    while child.poll() is None:
        time.sleep(0.2)
        changed = path.stat().st_mtime_ns
        if changed != seen:
            seen, alive = changed, time.time()
            if len(load_progress(path).done) != done:
                done = len(load_progress(path).done)
                report()
        silent = time.time() - alive > args.silence
        if silent or time.time() > deadline + GRACE_S:
            child.kill()
            child.wait()
            return f"killed: no sign of life for {args.silence:g} s" if silent else "killed: far beyond the budget"
    return "" if child.returncode == 0 else f"the process ended with status {child.returncode}"


def child_command(sections: list[str], path: Path, deadline: float, dry_run: bool) -> list[str]:
    """The command that runs sections and saves their progress in `path`."""
    command = [sys.executable, "-m", "bench.gpu", "--child", str(path), "--deadline", str(deadline)]
    return [*command, "--sections", ",".join(sections), *["--dry-run"] * dry_run]


def main(argv: list[str] | None = None) -> int:
    """Run, report, and answer the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device on this machine; try --dry-run, or `python -m bench` for the CPU")
        return 2
    if args.child:
        return run_sections(args.sections, args.child, deadline=args.deadline, dry=args.dry_run)
    about = {**describe(), "command": command_line("bench.gpu", argv)}
    if args.output:
        folder = args.output
    elif args.dry_run or args.tune:
        folder = Path(tempfile.mkdtemp(prefix="lora_ops_bench_"))
    else:
        folder = ROOT / "bench" / "results" / slug(about["gpu"])
    run = supervise(args, folder, about)
    print(f"wrote {folder / 'report.md'}")
    if args.tune:
        _install(run, folder, about)
    for failure in run.failures:
        print(f"FAILED {failure['section']}: {failure['reason'].strip().splitlines()[-1]}")
    for check in run.checks:
        if check["status"] == "wrong":
            print(f"WRONG {check['op']} on {check['backend']}, {check['case']}: {check['reason']}")
    for aim in run.aims:
        worst = "" if aim["worst"] is None else f", worst {aim['worst']:.3g}"
        print(f"{aim['verdict'].upper()} {aim['aim']}: {aim['limit']}{worst}")
    for row in run.rows:
        if row.bad:
            print(f"{row.status.upper()} {row.where}: {row.reason}")
    return int(run.bad)


def _install(run: Run, folder: Path, about: dict) -> None:
    """Write the crossovers where lora_ops reads them; what could not be measured keeps its value."""
    name = about.get("gpu") or run.name
    path = folder / "crossovers.json" if "gpu" not in about else crossovers.table_path()
    if run.bad or not run.crossovers:
        print(f"{path}: not written, because {'a route is wrong or broke' if run.bad else 'nothing was measured'}")
        return
    entry = replace(crossovers.of(name), **run.crossovers)
    crossovers.write(path, name, entry)
    print(f"wrote {path}, which lora_ops reads from now on.")
    print(f"For all who have this chip, a line of MEASURED in lora_ops/runtime/crossovers.py:\n    {name!r}: {entry},")


if __name__ == "__main__":
    sys.exit(main())
