"""The compile gate: every shipped (kernel, config) is compiled for every chip, and its machine code is read.

    python -m tests.gpu_proof.gate              # compile what changed, write bench/compile_gate.json
    python -m tests.gpu_proof.gate nf4_codec    # only the ops named; adds their results to the others'
    python -m tests.gpu_proof.gate --all        # trust no recorded result
    python -m tests.gpu_proof.gate --check      # leaves bench/ as it is: for another version of Triton

No GPU is needed. The launchers run on meta tensors, so signatures, alignment and options are those that a GPU would
see. The .json records results by fingerprint (source, signature, options, Triton, rules.py): what stands there need
not be compiled again, which keeps `make test` short. `--check` has a record of its own in build/ for each version, so
that an interrupted run goes on. Each run writes build/compile_gate.md, a table to read. Not to be run with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton

from tests.gpu_proof import cuda_code, machine_code, registry, rules
from tests.gpu_proof.machine_code import CHIPS, Chip, compiled

CUDA = cuda_code.SOURCE.name  # in the place of an op: kernels of nvcc and not of Triton
ROOT = Path(__file__).parents[2]
RECORD = ROOT / "bench" / "compile_gate.json"
CHECKED = ROOT / "build" / f"compile_gate-{triton.__version__}.json"  # of --check
TABLE = ROOT / "build" / "compile_gate.md"
WORKERS = 2


@dataclass(frozen=True)
class Result:
    """What the gate found in one kernel's code for one chip."""

    summary: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One shipped launch on one chip; `key` is the same for tasks whose result must be the same."""

    op: str
    index: int
    chip: str
    id: str
    key: str


def check(item: registry.Shipped, chip: Chip) -> Result:
    """Compile a launch for a chip and read its code."""
    try:
        code = rules.read(compiled(item.launch, chip))
    except (triton.TritonError, RuntimeError) as e:
        return Result("", (f"does not compile: {' '.join(str(e).split())[-300:]}",))
    found = [op.split(".")[0] for op in code.ops if re.match("(U?T?C?HG?MMA|v_mfma)", op)]
    mma = min(found, key=len).split("_f32")[0] if found else ""
    shared = f"{code.shared / 1024:.3g} K" if code.shared else ""
    summary = ", ".join(part for part in (f"{code.registers} r", shared, mma) if part)
    return Result(summary, tuple(rules.problems(code, chip, item.expect)))


@functools.cache
def _rules() -> str:
    return hashlib.sha256(machine_code.code_of(Path(rules.__file__)).encode()).hexdigest()


@functools.cache
def _shipped(op: str, chip: Chip) -> tuple[registry.Shipped, ...]:
    return tuple(registry.shipped_by(op, chip))


def tasks(ops: Iterable[str]) -> list[Task]:
    """Every shipped launch of the ops on every chip."""
    found = []
    for op in ops:
        for chip in CHIPS:
            for index, item in enumerate(_shipped(op, chip)):
                item.launch.kernel.device_caches.clear()  # a kernel that is compiled already has no fingerprint
                parts = (machine_code.fingerprint(item.launch, chip), repr(chip), repr(item.expect), _rules())
                key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
                found.append(Task(op, index, chip.name, item.id, key))
    return found


def cuda_tasks() -> list[Task]:
    """Every CUDA C++ kernel on every NVIDIA chip."""
    return [
        Task(CUDA, index, chip.name, kernel.id, cuda_code.fingerprint(kernel, chip)[:20])
        for chip in cuda_code.NVIDIA
        for index, kernel in enumerate(cuda_code.KERNELS)
    ]


def _job(task: Task) -> Result:
    chip = next(chip for chip in CHIPS if chip.name == task.chip)
    if task.op == CUDA:
        return Result(*cuda_code.check(cuda_code.KERNELS[task.index], chip))
    return check(_shipped(task.op, chip)[task.index], chip)


def recorded(path: Path = RECORD) -> dict[str, Result]:
    """Results by key, as committed."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    held.pop("triton", None)
    return {key: Result(summary, tuple(wrong)) for key, (summary, *wrong) in held.items()}


def is_of_this_triton(path: Path = RECORD) -> bool:
    """Whether the record was written with the Triton that is installed."""
    return path.exists() and json.loads(path.read_text()).get("triton") == triton.__version__


def record(results: dict[str, Result], path: Path = RECORD) -> None:
    lines = [f'"triton": {json.dumps(triton.__version__)}']
    lines += [f"{json.dumps(key)}: {json.dumps([r.summary, *r.wrong])}" for key, r in sorted(results.items())]
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(todo: Sequence[Task], known: dict[str, Result], *, save: Path | None = None) -> dict[str, Result]:
    """Results of all tasks by key; those that are not known are compiled, in two processes, and added to `save`."""
    results = {t.key: known[t.key] for t in todo if t.key in known}
    missing = list({t.key: t for t in todo if t.key not in known}.values())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        for n, (task, result) in enumerate(zip(missing, pool.map(_job, missing), strict=True), start=1):
            results[task.key] = result
            if save and n % 50 == 0:  # an interrupted run goes on from here
                print(f"{n} of {len(missing)} compiled", file=sys.stderr, flush=True)
                record({**recorded(save), **results}, save)
    return results


def sample(todo: Sequence[Task]) -> list[Task]:
    """The first launch of every kernel on every chip, and every 16th of all."""
    firsts: dict[tuple[str, str, str], Task] = {}
    for t in todo:
        firsts.setdefault((t.op, t.id.split(" | ")[-1], t.chip), t)
    return list(dict.fromkeys([*firsts.values(), *todo[::16]]))


def failures(todo: Sequence[Task], results: dict[str, Result]) -> list[str]:
    """What is wrong, in lines."""
    return [f"{t.id} on {t.chip}: {'; '.join(results[t.key].wrong)}" for t in todo if results[t.key].wrong]


def table(todo: Sequence[Task], results: dict[str, Result]) -> str:
    """Markdown: a line for each shipped launch, a column for each chip."""
    cells: dict[str, dict[str, Result]] = {}
    for t in todo:
        cells.setdefault(t.id, {})[t.chip] = results[t.key]
    names = [chip.name for chip in CHIPS]
    lines = [
        "# Compile gate",
        "",
        f"Written by `python -m tests.gpu_proof.gate` with Triton {triton.__version__}: {len(cells)} launches on "
        f"{len(names)} chips, {len({t.key for t in todo})} different kernels, {len(failures(todo, results))} failures.",
        "",
        "Each cell: registers a thread, shared memory, matrix instruction. Checked: no spills, no stack, shared "
        "memory within the chip's limit, no atomics, the matrix instruction and the 16-byte accesses that the op "
        "declares, and no fused multiply-add where it promises bit-exactness. Of CUDA C++ kernels also lane "
        "instructions a weight (i/w) in the loop that decodes; their shared memory is dynamic, the emulator checks it.",
        "",
        f"| op | config | kernel | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for id_, by_chip in cells.items():
        found = [by_chip.get(name, Result("–")) for name in names]
        texts = [f"**{'; '.join(r.wrong)}**" if r.wrong else r.summary for r in found]
        lines.append(f"| {id_} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    names = [a for a in argv if not a.startswith("--")]
    if unknown := set(argv) - set(names) - {"--all", "--check"}:
        print(f"gate: expected op names, --all or --check, got {' '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    todo = tasks(op for op in registry.ops() if not names or op in names)
    if "--check" in argv:
        results = run(todo, {} if "--all" in argv else recorded(CHECKED), save=CHECKED)
        record({**recorded(CHECKED), **results}, CHECKED)
    else:
        todo += cuda_tasks() if not names or "nf4_linear" in names else []
        results = run(todo, {} if "--all" in argv else recorded(), save=RECORD)
        record({**recorded(), **results} if names else results)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(todo, results))
    bad = failures(todo, results)
    print("\n".join(bad), file=sys.stderr)
    print(
        f"{len(todo) - len(bad)} of {len(todo)} green ({len(results)} different kernels), Triton {triton.__version__}; "
        f"wrote {TABLE.relative_to(ROOT)}"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
