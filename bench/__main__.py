"""`python -m bench`: every op against dense torch, bitsandbytes and PEFT on this CPU, under both allocator policies.

Each policy is a child process of its own (see policies.py); the report joins them. Exit status 1 if a result of ours is
wrong or an op of ours failed, or a child ended badly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.ceilings import measure_ceilings
from bench.clocks import clock_for
from bench.environment import ROOT, command_line, cpu_name, describe, slug
from bench.files import write_json
from bench.measure import Run, measure, one_line
from bench.plan import Effort, Plan
from bench.policies import ISAS, POLICIES, environment_of
from bench.report import run_from_dict, write_report
from bench.suites import SUITES

QUICK = Plan(
    shapes=((512, 512),),
    tokens=(1, 8, 64),
    lora_shapes=((512, 512),),
    lora_tokens=(64,),
    adapter_dtypes=(torch.bfloat16,),
    effort=Effort(min_rounds=3, max_rounds=20, seconds=0.1, warmup=1),
)

WIDE = Plan(
    shapes=((4096, 4096), (14336, 4096), (4096, 14336), (2048, 5632), (4095, 4097)),
    tokens=(1, 4, 16, 64, 128, 2048),
    lora_shapes=((2048, 2048), (4096, 4096)),
    ranks=(16, 64),
    adapter_dtypes=(torch.bfloat16,),
    effort=Effort(min_rounds=5, max_rounds=100, seconds=2.0),
)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes, seconds instead of minutes")
    size.add_argument("--wide", action="store_true", help="more shapes and ranks")
    parser.add_argument("--shapes", type=_shapes, help="N x K of the weights, as in 4096x4096,14336x4096")
    parser.add_argument("--tokens", type=_numbers, help="values of M for nf4_linear and frozen_linear, as in 1,8,64")
    parser.add_argument("--lora-tokens", type=_numbers, help="values of M for lora_linear")
    parser.add_argument("--ops", type=_ops, default=tuple(SUITES), help=f"of {', '.join(SUITES)}")
    parser.add_argument("--policy", choices=[*POLICIES, "both"], default="both", help="of the allocator")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations and dense weights")
    parser.add_argument("--isa", choices=ISAS, help="keep lora_ops, torch and oneDNN to this instruction set")
    parser.add_argument("--output", type=Path, help="folder of the report; default bench/results/cpu/<cpu>/")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [tuple(int(side) for side in part.split("x")) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected NxK,NxK, got {text!r}")
    return tuple((n, k) for n, k in pairs)


def _ops(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SUITES]:
        raise argparse.ArgumentTypeError(f"expected of {', '.join(SUITES)}, got {', '.join(unknown)}")
    return names


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    plan = QUICK if args.quick else WIDE if args.wide else Plan()
    dtype = DTYPES[args.dtype]
    adapters = [torch.float32 if t == torch.float32 else dtype for t in plan.adapter_dtypes]
    plan = replace(plan, dtype=dtype, adapter_dtypes=tuple(dict.fromkeys(adapters)))
    if args.shapes:
        plan = replace(plan, shapes=args.shapes, lora_shapes=args.shapes)
    if args.tokens:
        plan = replace(plan, tokens=args.tokens)
    if args.lora_tokens:
        plan = replace(plan, lora_tokens=args.lora_tokens)
    return plan


def run_policy(name: str, args: argparse.Namespace) -> Run:
    """Measure everything in this process; what is done so far is saved after each comparison."""
    plan, clock = plan_of(args), clock_for("cpu")
    variables = " ".join(f"{key}={value}" for key, value in POLICIES[name].items())
    small = {"copy_bytes": 32 << 20, "gemm": 512} if args.quick else {}
    ceilings = measure_ceilings(clock, "cpu", plan.dtype, **small)
    run = Run(name, ceilings.as_dict(), notes=[f"- environment: {variables or 'no allocator variables'}"])
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        run.notes.append("- bitsandbytes eval: without the kernel that it downloads when it is imported (offline)")
    for op in args.ops:
        for comparison in SUITES[op](plan):
            rows = measure(comparison, clock, ceilings, plan.effort)
            run.rows += rows
            print(f"[{name}] {comparison.id}: {one_line(rows)}", flush=True)
            write_json(args.child, asdict(run))
    return run


def run_child(policy: str, argv: list[str], isa: str | None = None) -> tuple[Run, int]:
    """Measure one policy in a process of its own; what it wrote before a bad end is kept."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "run.json"
        command = [sys.executable, "-m", "bench", *argv, "--policy", policy, "--child", str(result)]
        status = subprocess.run(command, cwd=ROOT, env=environment_of(policy, isa), check=False).returncode
        run = run_from_dict(json.loads(result.read_text())) if result.exists() else Run(policy)
        if status:
            run.failures.append({"section": policy, "reason": f"the process ended with status {status}"})
        return run, status


def main(argv: list[str] | None = None) -> int:
    """Run, report, and answer the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.child:
        run_policy(args.policy, args)
        return 0
    os.environ.update(ISAS[args.isa] if args.isa else {})  # what describe says of the native kernels
    about = {**describe(), "command": command_line("bench", argv)}
    name = slug(cpu_name()) + "".join(f"-{part}" for part in (args.isa, args.dtype) if part not in (None, "bfloat16"))
    folder = args.output or ROOT / "bench" / "results" / "cpu" / name
    runs = []
    for policy in POLICIES if args.policy == "both" else (args.policy,):
        runs.append(run_child(policy, argv, args.isa)[0])
        write_report(folder, about, runs)
    print(f"wrote {folder / 'report.md'}")
    for run in runs:
        for row in run.rows:
            if row.bad:
                print(f"{row.status.upper()} [{run.name}] {row.where}: {row.reason}")
    return int(any(run.bad for run in runs))


if __name__ == "__main__":
    sys.exit(main())
