"""The tests on the oldest and the newest releases that pyproject.toml admits, and the compile gate of every Triton.

    python -m tests.matrix                  # all of it; writes docs/matrix.md (hours on two cores)
    python -m tests.matrix oldest           # the tests with the lower bound of every range
    python -m tests.matrix newest           # the tests with what pip takes within the ranges
    python -m tests.matrix triton           # the compile gate of the last patch release of each supported Triton
    python -m tests.matrix triton==3.8.0    # of one
    python -m tests.matrix oldest -- -n 2   # after --: arguments of pytest

Environments are made in build/matrix/, Tritons in build/triton-VERSION/; they take several GB and may be deleted. A
part replaces its own lines of docs/matrix.md and leaves the others. lora_ops itself is the checkout, with the C++
kernels that are built in it. Needs Python 3.11.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

from bench.environment import cpu_name, git_commit

ROOT = Path(__file__).resolve().parent.parent
BUILD, TABLE = ROOT / "build", ROOT / "docs" / "matrix.md"
ENDS = ("oldest", "newest")
# What depends on torch, transformers and their relatives; kernels for GPUs are the compile gate's.
SUITES = (
    "kernels",
    "quant",
    "test_nn.py",
    "test_dispatch.py",
    "injection",
    "formats",
    "paging",
    "optim",
    "trainer",
    "distributed",
)
SHOWN = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "numpy")
EXTRAS = ("triton", "train", "test")
NOT_NEEDED = ("ruff", "mypy")
PIP = ("-m", "pip", "--disable-pip-version-check")
RESULTS = "| part | what | passed | failed | skipped | minutes | date | commit | CPU |"
RELEASES = f"| part | python | {' | '.join(SHOWN)} |"


@dataclass(frozen=True)
class Outcome:
    """What one suite, or one gate, gave."""

    what: str
    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    seconds: float = 0

    def row(self, part: str) -> str:
        failed = f"{len(self.failed)}: {', '.join(dict.fromkeys(self.failed[:3]))}" if self.failed else "0"
        today = datetime.datetime.now(datetime.timezone.utc).date()
        cells = (part, self.what, self.passed, failed.replace("|", "/"), self.skipped, f"{self.seconds / 60:.1f}")
        return f"| {' | '.join(map(str, (*cells, today, git_commit(), cpu_name())))} |"


def ranges() -> dict[str, str]:
    """Version ranges by package, as pyproject.toml gives them; "" where it gives none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    named = (re.match(r"([\w-]+)(\[?)(.*)", line) for line in lines)
    return {m[1]: m[3] for m in named if m and not m[2] and m[1] not in NOT_NEEDED}


def requirements(end: str) -> list[str]:
    """What pip is asked for: the lower bound of every range, or the ranges."""
    return [name + (spec.replace(">=", "==") if end == "oldest" else spec) for name, spec in ranges().items()]


def environment(end: str) -> Path:
    """The Python of build/matrix/END, in which the requirements are installed."""
    folder, wanted = BUILD / "matrix" / end, requirements(end)
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text().split() != wanted:
        print(f"installing into {folder.relative_to(ROOT)}: {' '.join(wanted)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "python", *PIP, "install", "--quiet", *wanted], check=True)
        done.write_text("\n".join(wanted) + "\n")
    return folder / "bin" / "python"


def releases(python: Path) -> list[str]:
    """Versions of Python and of what the table shows, as that environment has them."""
    code = (
        "import json, platform; from importlib.metadata import version;"
        f"print(json.dumps([platform.python_version(), *map(version, {SHOWN})]))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def tritons() -> list[str]:
    """The last patch release of each minor release of Triton that pyproject.toml admits, oldest first."""
    floor = _number(ranges()["triton"].removeprefix(">="))
    command = [sys.executable, *PIP, "index", "versions", "triton"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^Available versions: (.*)$", said, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"matrix: `pip index versions triton` names no versions: {said!r}")
    last: dict[tuple[int, ...], str] = {}
    for text in sorted(re.findall(r"(\d+\.\d+\.\d+)(?:,|$)", found[1]), key=_number):
        if _number(text) >= floor:
            last[_number(text)[:2]] = text
    return list(last.values())


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def read_report(report: Path, what: str, seconds: float) -> Outcome:
    """Outcomes of a JUnit report."""
    passed = skipped = 0
    failed = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return Outcome(what, passed, skipped, tuple(failed), seconds)


def run_suites(end: str, python: Path, arguments: Sequence[str]) -> Iterator[Outcome]:
    """Every suite, in a process of its own."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for suite in SUITES:
        report = BUILD / "matrix" / f"{end}-{suite}.xml"
        report.unlink(missing_ok=True)
        start = time.monotonic()
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *arguments, f"tests/{suite}"]
        ended = subprocess.run(command, cwd=ROOT, env=environ).returncode
        seconds, name = time.monotonic() - start, suite.removesuffix(".py")
        if report.exists():
            yield read_report(report, name, seconds)
        else:
            yield Outcome(name, failed=(f"pytest ended with {ended} and without a report",), seconds=seconds)


def run_gate(version: str) -> Outcome:
    """Every kernel compiled by one Triton, for every chip."""
    folder = BUILD / f"triton-{version}"
    if not folder.exists():
        install = [sys.executable, *PIP, "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
        subprocess.run(install, check=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.gpu_proof.gate", "--check"]
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    # Progress goes to stderr, as do the failures: those are in the table that the gate writes, too.
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    seconds = time.monotonic() - start
    counts = re.search(r"^(\d+) of (\d+) green", done.stdout, re.MULTILINE)
    if counts is None:
        return Outcome("compile gate", failed=(f"the gate ended with {done.returncode}",), seconds=seconds)
    green, every = map(int, counts.groups())
    return Outcome("compile gate", green, failed=("in build/compile_gate.md",) * (every - green), seconds=seconds)


def write(part: str, outcomes: Sequence[Outcome], has: Sequence[str]) -> None:
    """Replace the lines of a part in the table."""
    kept = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [line for line in kept if line.startswith("| ") and not line.startswith(("| part |", f"| {part} |"))]
    results = [row for row in rows if row.count(" | ") == RESULTS.count(" | ")]
    versions = [row for row in rows if row.count(" | ") == RELEASES.count(" | ")]
    results += [outcome.row(part) for outcome in outcomes]
    versions += [f"| {part} | {' | '.join(has)} |"] if has else []
    lines = [
        "# Oldest and newest",
        "",
        "Written by `make matrix`: the tests on the lower bound of every range in pyproject.toml and on what pip takes "
        "within the ranges, and the compile gate with the last patch release of each Triton.",
        "",
        *_table(RELEASES, versions),
        "",
        *_table(RESULTS, results),
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


def _table(head: str, rows: list[str]) -> list[str]:
    return [head, "|---" * head.count(" | ") + "|---|", *sorted(rows, key=lambda row: row.split(" | ")[0])]


def run(part: str, arguments: Sequence[str]) -> list[str]:
    """Run a part and write its lines; what failed."""
    has: list[str] = []
    if part in ENDS:
        try:
            python = environment(part)
        except subprocess.CalledProcessError:  # pip has said why
            outcomes = [Outcome("installation", failed=("pip cannot install the versions together",))]
        else:
            has, outcomes = releases(python), list(run_suites(part, python, arguments))
    else:
        outcomes = [run_gate(part.removeprefix("triton=="))]
    write(part, outcomes, has)
    return [f"{part}, {outcome.what}: {text}" for outcome in outcomes for text in outcome.failed]


def main(argv: Sequence[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    asked, arguments = list(argv[:split]) or [*ENDS, "triton"], argv[split + 1 :]
    if wrong := [part for part in asked if not re.fullmatch(r"oldest|newest|triton|triton==\d+\.\d+\.\d+", part)]:
        print(f"matrix: expected oldest, newest, triton or triton==VERSION, got {' '.join(wrong)}", file=sys.stderr)
        return 2
    if "triton" in asked:
        asked[asked.index("triton") : asked.index("triton") + 1] = [f"triton=={version}" for version in tritons()]
    bad = [text for part in asked for text in run(part, arguments)]
    print("\n".join(bad), file=sys.stderr)
    print(f"{', '.join(asked)}: {f'{len(bad)} failures' if bad else 'all passed'}; docs/matrix.md is written")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
