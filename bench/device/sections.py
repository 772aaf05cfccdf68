"""The sections of the GPU suite. Adding one is a function with `@section`; it reports into `context.run`.

A section that yields is interrupted where it yields when the time is up, and saved there; what it has put into the run
until then stays, whatever happens afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from bench.ceilings import measure_ceilings
from bench.device.checks import CHECKS, Check, checks_on
from bench.device.context import Context
from bench.device.discover import backends_of, registered_ops
from bench.device.end_to_end import end_to_end
from bench.device.graphs import CAPTURES, SYNCHRONIZES
from bench.device.paging import paging
from bench.device.tune import tune
from bench.device.warm import warm
from bench.environment import exception_line
from bench.measure import Run, measure, one_line
from bench.peers import notes
from bench.plan import Effort, Plan
from bench.suites import GPU_SUITES, SUITES
from lora_ops import BackendError, use_backend
from lora_ops.runtime.backends import BACKENDS
from lora_ops.runtime.crossovers import force
from lora_ops.runtime.dispatch import OPS, Op

PLAN = Plan(
    device="cuda",
    shapes=((4096, 4096), (14336, 4096)),
    tokens=(1, 16, 64, 256, 1024, 4096, 8192),
    lora_shapes=((4096, 4096),),
    lora_tokens=(8192, 2048),  # what the aims ask for first
    dropouts=(0.0, 0.1),
    gpu_contenders=True,
    effort=Effort(min_rounds=10, max_rounds=100, seconds=0.7, warmup=3),
)
DRY_PLAN = Plan(
    shapes=((64, 96),),
    tokens=(1, 5),
    lora_shapes=((64, 96),),
    lora_tokens=(5,),
    ranks=(4,),
    adapter_dtypes=(torch.float32,),
    gpu_contenders=True,
    compiler="aot_eager",
    effort=Effort(min_rounds=1, max_rounds=1, seconds=0.0, warmup=0),
)


# The op that a suite is about, where it has another name.
LEADS = {
    "quantize": "quantize_nf4",
    "dequantize": "dequantize_nf4",
    "lora_generation": "lora_linear",
    "lora_compiled": "lora_linear",
    "adamw": "adamw_",
    "adamw_pages": "adamw_",
}


def with_backends(plan: Plan, op: Op, wrong: Collection[str] = ()) -> Plan:
    """The plan with each fast backend of an op as a contender of its own, where there is more than one.

    Those of which a check was wrong take no part; where it serves by itself, "auto" still shows it.
    """
    fast = {name for name, unavailable in backends_of(op, plan.device).items() if unavailable is None}
    fast -= {"reference", *wrong}
    return replace(plan, backends=("auto", *sorted(fast)) if len(fast) > 1 else ("auto",))


Section = Callable[[Context], Iterator[str]]
SECTIONS: dict[str, Section] = {}
# Seconds that a section is thought to need on an H200, where that is not DEFAULT_SHARE. Too little costs it cases, too
# much costs the others nothing, unless all of it is used.
DEFAULT_SHARE = 8.0
EXPECTED_S = {
    "peers": 0.5, "unchecked": 0.5, "compile": 45.0, "check lora_linear": 45.0, "check nf4_linear": 20.0, "tune": 50.0,
    "time lora_linear": 70.0, "time nf4_linear": 45.0, "time nf4_linear_dx": 40.0, "time dequantize": 15.0,
    "time adamw": 20.0, "time paged_adamw": 40.0,
    "end to end": 75.0, "time lora_compiled": 50.0,
}  # fmt: skip


def section(name: str) -> Callable[[Section], Section]:
    """Register a section: a generator that yields after each piece of work what it did, in a few words.

    Of the time that is left when it begins it may take its share among the sections that are still to come (`share`);
    what it does not need is theirs.
    """

    def register(fn: Section) -> Section:
        SECTIONS[name] = fn
        return fn

    return register


def share(name: str) -> float:
    """A section's part of the time, in the unit that all sections have theirs in."""
    return EXPECTED_S.get(name, DEFAULT_SHARE)


@section("ceilings")
def _ceilings(context: Context) -> Iterator[str]:
    """Copy bandwidth and GEMM speed."""
    size = {"copy_bytes": 1 << 20, "gemm": 64} if context.dry else {"copy_bytes": 1 << 30, "gemm": 8192}
    context.run.ceilings = measure_ceilings(context.clock, context.plan.device, context.plan.dtype, **size).as_dict()
    yield ", ".join(f"{name} {value:.3g}" for name, value in context.run.ceilings.items())


def cuda_works() -> bool:
    """Whether the process can still use its GPU: after an illegal address, or a failed capture, it may not."""
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def _checking(ops: list[Op], *, captured: bool = False) -> Section:
    """Check ops that share their cases (a forward and its backward) on every backend that has them.

    Captured in a graph the fast backends are checked, which are what a GPU runs.
    """

    def run(context: Context) -> Iterator[str]:
        device, lead = context.plan.device, ops[0]
        cases = (CAPTURES if captured else checks_on(device))[lead.name]
        # Those that serve by themselves first: one that does not yet may break the process.
        for backend, unavailable in sorted(
            backends_of(lead, device).items(), key=lambda b: not BACKENDS[b[0]].automatic
        ):
            if unavailable:
                context.run.notes.append(f"- {lead.name} on {backend}: not available: {unavailable}")
                continue
            if captured and backend == "reference" and not context.dry:
                continue
            for number, (case, check) in enumerate(cases.items()):
                if context.dry and not captured and number % 7:
                    continue
                status, reason = _judge(backend, device, check)
                record = {"op": lead.name, "backend": backend, "case": case, "status": status, "reason": reason}
                context.run.checks.append(record | {"captured": captured})
                yield f"on {backend}, {case}: {status} {reason}"
                if device == "cuda" and status == "wrong" and not cuda_works():
                    raise RuntimeError(f"the GPU does not work any more after {case}")

    run.__doc__ = f"{', '.join(op.name for op in ops)} against {'eager, from a CUDA graph' if captured else 'float64'}."
    return run


def _judge(backend: str, device: str, check: Check) -> tuple[str, str]:
    try:
        with use_backend(backend):
            wrong = check(device)
    except BackendError as error:
        return "declined", str(error)
    except Exception as error:  # a broken kernel is a wrong one
        return "wrong", exception_line(error)
    return ("wrong", wrong) if wrong else ("ok", "")


section("compile")(warm)


@section("peers")
def _peers(context: Context) -> Iterator[str]:
    """Say which peers take no part in any comparison, and why."""
    context.run.notes += [f"- {note}" for note in notes()]
    yield f"{len(notes())} notes"


@section("unchecked")
def _unchecked(context: Context) -> Iterator[str]:
    """Say which registered ops have no check here, and which cannot be captured."""
    for op in registered_ops():
        if op.name not in CHECKS:
            context.run.notes.append(f"- {op.name}: registered, but bench/device/checks.py has no check of it")
            yield f"{op.name} has no check"
        if op.name in SYNCHRONIZES:
            context.run.notes.append(f"- {op.name} cannot be captured in a CUDA graph: it {SYNCHRONIZES[op.name]}")
        elif op.name not in CAPTURES:
            context.run.notes.append(f"- {op.name}: registered, but bench/device/graphs.py does not capture it")
            yield f"{op.name} is not captured"


def _tune(context: Context) -> Iterator[str]:
    """The crossovers of this GPU, with which the times that follow are taken."""
    lead = OPS["nf4_linear"]
    if not context.dry and backends_of(lead, context.plan.device).get("triton", "no such backend"):
        context.run.notes.append("- crossovers: not measured, the Triton backend is not available")
        yield "no routes to choose from"
        return
    yield from tune(context)


def _timing(op: str) -> Section:
    def run(context: Context) -> Iterator[str]:
        wrong = {check["backend"] for check in context.run.checks if check["status"] == "wrong"}
        plan, clock = with_backends(context.plan, OPS[LEADS.get(op, op)], wrong), context.clock
        with force(**context.run.crossovers):
            for comparison in {**SUITES, **GPU_SUITES}[op](plan):
                begin = time.perf_counter()
                rows = measure(comparison, clock, context.ceilings, plan.effort)
                context.run.rows += rows
                yield f"{comparison.id}: {one_line(rows)}; took {time.perf_counter() - begin:.1f} s"

    run.__doc__ = f"Times of {op}."
    return run


def _weight(name: str) -> tuple[bool, bool]:
    """What matters most comes first, in case the time runs out."""
    return "linear" not in name, "lora" not in name


def _register() -> None:
    """One section a group of checks, so that a kernel that breaks the process costs no other op its checks."""
    for verb, table in (("check", CHECKS), ("capture", CAPTURES)):
        groups: dict[int, list[Op]] = {}
        for op in sorted(registered_ops(), key=lambda op: _weight(op.name)):
            if op.name in table:
                groups.setdefault(id(table[op.name]), []).append(op)
        for ops in groups.values():
            section(f"{verb} {ops[0].name}")(_checking(ops, captured=verb == "capture"))
    section("tune")(_tune)
    for op_name in sorted(SUITES, key=_weight):
        section(f"time {op_name}")(_timing(op_name))
    section("time paged_adamw")(paging)
    section("end to end")(end_to_end)
    for op_name in GPU_SUITES:
        section(f"time {op_name}")(_timing(op_name))


_register()


@dataclass
class Progress:
    """What a child process tells its parent, in a file: the run so far, and where it is."""

    run: Run
    current: str = ""
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
