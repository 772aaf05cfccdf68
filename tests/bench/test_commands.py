"""`python -m bench` and `python3 -m bench.gpu` write their files, survive a broken section and say so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import charts, gpu, report
from bench.clocks import CpuClock
from bench.device import child, sections
from bench.device.checks import CHECKS
from bench.device.discover import backends_of, registered_ops
from bench.files import write_json
from bench.measure import Run
from bench.policies import environment_of
from bench.suites import GPU_SUITES, SUITES
from lora_ops.runtime import native
from lora_ops.runtime.dispatch import OPS

ROOT = Path(__file__).resolve().parents[2]


def _run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_quick_bench_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "bench",
        "--quick",
        "--shapes",
        "64x128",
        "--tokens",
        "1,2,5",
        "--lora-tokens",
        "5",
        "--output",
        str(tmp_path),
    ]
    done = _run(*argv)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["default", "tuned"]
    assert results["about"]["command"].startswith("python -m bench --quick")
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    for run in results["runs"]:
        assert run["ceilings"]["copy_bytes_per_s"] > 0
        ours = [row for row in run["rows"] if row["contender"] == "lora_ops"]
        assert {row["op"] for row in ours} == set(SUITES)
        assert all(row["status"] == "ok" and row["median_ms"] > 0 for row in ours)
    report = (tmp_path / "report.md").read_text()
    assert "| **lora_ops**" in report
    monkeypatch.setattr(charts, "ROOT", tmp_path)
    assert charts.main([str(tmp_path)]) == 0
    assert (tmp_path / "build" / "charts" / tmp_path.name / "nf4_linear_time.png").stat().st_size > 1000


@pytest.mark.skipif(
    "avx2" not in (native.supported_isas() if native.available() else ()),
    reason="needs the native library on a CPU with AVX2: make native",
)
def test_bench_keeps_to_an_instruction_set(tmp_path: Path) -> None:
    """In the processes that measure, and in what the report says of them."""
    options = ["--isa", "avx2", "--ops", "nf4_linear", "--shapes", "64x128", "--tokens", "1", "--policy", "default"]
    done = _run("bench", "--quick", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "- Native kernels: avx2\n" in (tmp_path / "report.md").read_text()
    assert environment_of("default", "avx2")["LORA_OPS_ISA"] == "avx2"
    rows = json.loads((tmp_path / "results.json").read_text())["runs"][0]["rows"]
    assert {row["contender"]: row["status"] for row in rows}["bitsandbytes eval"] == "unavailable"


def test_bench_in_another_dtype(tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--ops", "frozen_linear,lora_linear", "--shapes", "64x128", "--policy", "default"]
    done = _run("bench", "--quick", *options, "--tokens", "4", "--lora-tokens", "4", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["runs"][0]["rows"]
    assert {row["op"] for row in rows} == {"frozen_linear", "lora_linear"}
    assert not [row for row in rows if "bfloat16" in row["variant"]]


def test_gpu_suite_needs_a_gpu() -> None:
    done = _run("bench.gpu", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout


def test_gpu_dry_run_walks_every_section(tmp_path: Path) -> None:
    """From another folder, with torch, numpy and triton alone and without an installed lora_ops: a bare machine."""
    blocker = tmp_path / "site"
    blocker.mkdir()
    missing = ("peft", "bitsandbytes", "transformers", "accelerate", "matplotlib", "torchao", "trl",
               "datasets", "hypothesis", "pytest", "safetensors", "tqdm", "kernels", "scipy", "yaml")  # fmt: skip
    # The finder of an editable install goes as well: only the checkout may be found.
    (blocker / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    )
    output = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run", "--output", str(output)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(blocker)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((output / "results.json").read_text())["runs"]
    assert not run["failures"]
    assert {check["op"] for check in run["checks"]} >= {"lora_linear", "nf4_linear", "quantize_nf4", "dequantize_nf4"}
    assert {row["op"] for row in run["rows"]} >= {
        "lora_linear",
        "nf4_linear",
        "nf4_linear_dx",
        "quantize",
        "dequantize",
        "lora_compiled",
        "tune_kstep_min_m",
        "paged_adamw",
    }
    races = {check["case"] for check in run["checks"] if check["op"] == "adamw_ in pages"}
    assert races >= {"32-bit, reads late, a file behind", "8-bit, gradients late", "the host waits for nothing"}
    captured = {check["op"] for check in run["checks"] if check["captured"]}
    assert captured >= {"lora_linear", "nf4_linear", "dequantize_nf4"}
    assert {check["status"] for check in run["checks"]} == {"ok"}
    assert {row["status"] for row in run["rows"] if row["contender"].startswith("lora_ops")} == {"ok"}
    assert set(run["crossovers"]) == {"nf4_gemv_max_m", "nf4_gemm_max_m", "kstep_min_m"}
    assert any("end to end: not run: peft cannot be imported" in note for note in run["notes"])
    assert not any("share of the" in note for note in run["notes"])
    assert run["aims"]
    assert (output / "report.md").exists()


FAKE_CHILD = """
import json, os, sys, time
path, sections, fault = sys.argv[1:]
progress = json.load(open(path))
for name in sections.split(","):
    progress["current"] = name
    progress["run"]["notes"].append("began " + name)
    json.dump(progress, open(path + ".new", "w"))
    os.replace(path + ".new", path)
    if name == "ceilings":
        exec(fault)
    progress["done"].append(name)
progress["current"] = ""
json.dump(progress, open(path + ".new", "w"))
os.replace(path + ".new", path)
"""


class ClockOfAHang:
    """`time` for the parent: it stands still until a process has said, by a file, that it hangs; then hours pass."""

    def __init__(self, hangs: Path) -> None:
        self.hangs, self.now = hangs, 0.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 10)
        self.now += 3600.0 * self.hangs.exists()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("os._exit(7)", "status 7"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("open('hangs', 'w').close(); time.sleep(600)", "no sign of life for 5000 s"),
    ],
)
def test_a_process_that_dies_or_hangs_costs_one_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, reason: str
) -> None:
    hangs = tmp_path / "hangs"

    def fake(names: list[str], path: Path, deadline: float, dry_run: bool) -> list[str]:
        hangs.unlink(missing_ok=True)
        told = fault.replace("'hangs'", repr(str(hangs)))
        return [sys.executable, "-c", FAKE_CHILD, str(path), ",".join(names), told]

    monkeypatch.setattr(gpu, "child_command", fake)
    monkeypatch.setattr(gpu, "time", ClockOfAHang(hangs))
    argv = ["--dry-run", "--sections", "unchecked,ceilings,time quantize", "--silence", "5000"]
    assert gpu.main([*argv, "--output", str(tmp_path)]) == 1
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [failure["section"] for failure in run["failures"]] == ["ceilings"]
    assert reason in run["failures"][0]["reason"]
    assert run["notes"] == ["began unchecked", "began ceilings", "began time quantize"]


def test_a_dry_run_may_take_its_time() -> None:
    """A busy CPU is not a GPU that hangs; limits that are asked for hold."""
    dry, lent = gpu.parse(["--dry-run"]), gpu.parse([])
    assert (dry.budget, dry.silence) == (math.inf, math.inf)
    assert (lent.budget, lent.silence) == (gpu.BUDGET_S, gpu.SILENCE_S)
    asked = gpu.parse(["--dry-run", "--budget", "7", "--silence", "5"])
    assert (asked.budget, asked.silence) == (7.0, 5.0)


def test_a_report_that_cannot_be_written_costs_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: object) -> str:
        raise RuntimeError("no words")

    def here(args: Namespace, left: list[str], path: Path, deadline: float, told: Callable[[], None]) -> str:
        told()  # as after each section
        child.run_sections(left, path, deadline=deadline, dry=True)
        return ""

    monkeypatch.setattr(report, "markdown", broken)
    monkeypatch.setattr(gpu, "_run_child", here)
    assert gpu.main(["--dry-run", "--sections", "ceilings,unchecked", "--output", str(tmp_path)]) == 1
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [failure["section"] for failure in run["failures"]] == ["report"]
    assert "no words" in run["failures"][0]["reason"]
    assert run["ceilings"]


def test_a_process_that_cannot_start_ends_the_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "child_command", lambda *args: [sys.executable, "-c", "raise SystemExit(5)"])
    assert gpu.main(["--dry-run", "--sections", "ceilings,unchecked", "--output", str(tmp_path)]) == 1
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [failure["section"] for failure in run["failures"]] == ["ceilings", "unchecked"]


def test_a_section_that_raises_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(context: sections.Context):
        context.run.notes.append("- before")
        yield "one"
        raise RuntimeError("out of luck")

    monkeypatch.setitem(sections.SECTIONS, "broken", broken)
    path = tmp_path / "progress.json"
    write_json(path, asdict(sections.Progress(Run("test"))))
    assert child.run_sections(["broken", "ceilings"], path, deadline=float("inf"), dry=True) == 0
    progress = child.load_progress(path)
    assert progress.done == ["broken", "ceilings"]
    assert progress.run.notes == ["- before"]
    assert "out of luck" in progress.run.failures[0]["reason"]
    assert progress.run.ceilings
    assert progress.run.bad


def test_sections_after_the_deadline_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    write_json(path, asdict(sections.Progress(Run("test"))))
    assert child.run_sections(["ceilings"], path, deadline=0.0, dry=True) == 0
    assert child.load_progress(path).skipped == ["ceilings"]


def test_a_section_that_takes_its_share_leaves_the_others_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [1000.0]
    monkeypatch.setattr(child.time, "time", lambda: now[0])

    def working(seconds: float):
        def run(context: sections.Context):
            for piece in range(100):
                now[0] += seconds
                context.run.notes.append(f"{seconds:g}")
                yield str(piece)

        return run

    for name, seconds, share in (("slow", 10.0, 1.0), ("quick", 0.1, 3.0), ("last", 10.0, 1.0)):
        monkeypatch.setitem(sections.SECTIONS, name, working(seconds))
        monkeypatch.setitem(sections.EXPECTED_S, name, share)
    path = tmp_path / "progress.json"
    write_json(path, asdict(sections.Progress(Run("test"))))
    assert child.run_sections(["slow", "quick", "last"], path, deadline=1500.0, dry=True) == 0
    progress = child.load_progress(path)
    assert progress.skipped == ["the rest of slow", "the rest of last"]
    # 500 s: a fifth for the first; the second needs 10 s, so the last has all that is left.
    assert {name: progress.run.notes.count(name) for name in ("10", "0.1")} == {"10": 11 + 39, "0.1": 100}


def test_a_backend_with_a_wrong_check_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "backends_of", lambda op, device: {"cuda": None, "triton": None, "reference": None})
    op = OPS["nf4_linear"]
    assert sections.with_backends(sections.PLAN, op).backends == ("auto", "cuda", "triton")
    assert sections.with_backends(sections.PLAN, op, {"cuda"}).backends == ("auto",)


def test_every_suite_is_about_an_op() -> None:
    assert {sections.LEADS.get(suite, suite) for suite in (*SUITES, *GPU_SUITES)} <= set(OPS)


def test_what_serves_by_itself_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "backends_of", lambda op, device: {"cuda": None, "native": None, "reference": None})
    monkeypatch.setattr(sections, "_judge", lambda backend, device, check: ("ok", backend))
    run = Run("test")
    for _ in sections.SECTIONS["check nf4_linear"](sections.Context(sections.DRY_PLAN, CpuClock(), run, dry=True)):
        pass
    assert list(dict.fromkeys(check["backend"] for check in run.checks)) == ["native", "reference", "cuda"]


def test_expected_times_are_of_sections() -> None:
    assert set(sections.EXPECTED_S) <= set(sections.SECTIONS)


def test_discovery_finds_the_ops_and_their_backends() -> None:
    ops = {op.name: op for op in registered_ops()}
    assert set(CHECKS) <= set(ops)
    for op in ops.values():
        assert backends_of(op, "cuda")["reference"] is None, op.name
        assert "native" not in backends_of(op, "cuda")


def test_every_suite_is_one_of_pytest_benchmark() -> None:
    from bench.suites import SUITES
    from bench.test_ops import CASES

    assert set(CASES) == set(SUITES), "name a new suite in CASES of bench/test_ops.py"
