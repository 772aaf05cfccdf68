"""Compare two checkouts: `python -m bench.checkouts OTHER [bits | times]`; both by default.

bits: outputs and gradients of a fixed set of calls, by hash, for the reference, every instruction set of this CPU and
Triton's interpreter. times: rounds in which this checkout, the other one and this one again, three processes, are timed
in turn; the medians of this over other, and of this over itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from lora_ops.runtime import native

HERE = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")


def environment(checkout: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def settings() -> dict[str, dict[str, str]]:
    """Environments in which bits are compared, by name."""
    found = {"reference": {"LORA_OPS_BACKEND": "reference"}}
    found |= {f"native {isa}": {"LORA_OPS_ISA": isa} for isa in native.supported_isas()}
    found["triton, interpreted"] = {"LORA_OPS_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    return found


def hashes(checkout: Path, setting: dict[str, str]) -> dict[str, str]:
    command = [sys.executable, str(WORKER), "bits"]
    done = subprocess.run(command, env=environment(checkout, **setting), cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"checkouts: {checkout} with {setting} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_bits(other: Path) -> int:
    """The number of cases that differ."""
    differing = 0
    for name, setting in settings().items():
        ours, theirs = hashes(HERE, setting), hashes(other, setting)
        unlike = [case for case in ours.keys() | theirs.keys() if ours.get(case) != theirs.get(case)]
        print(f"{name}: {len(ours)} cases, {len(unlike)} differ", *sorted(unlike)[:9], sep="\n    ", flush=True)
        differing += len(unlike)
    return differing


class Asked:
    """A process that times calls of a checkout."""

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, str(WORKER), "times"]
        self.process = subprocess.Popen(
            command, env=environment(checkout), cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.names: list[str] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"checkouts: the worker ended with {self.process.wait()}")
        return line

    def seconds(self, name: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._line())


def compare_times(other: Path, rounds: int) -> None:
    ours, theirs, again = Asked(HERE), Asked(other), Asked(HERE)
    print(f"{'case':<46}{'ms':>9}{'this/other':>12}{'this/itself':>13}")
    everyone: list[float] = []
    for name in (n for n in ours.names if n in theirs.names):
        taken = [(ours.seconds(name), theirs.seconds(name), again.seconds(name)) for _ in range(rounds)]
        ratio = statistics.median((a + c) / 2 / b for a, b, c in taken)
        itself = statistics.median(c / a for a, _, c in taken)
        everyone.append(ratio)
        milliseconds = statistics.median(a for a, _, _ in taken) * 1e3
        print(f"{name:<46}{milliseconds:>9.3f}{ratio:>12.3f}{itself:>13.3f}", flush=True)
    print(f"geometric mean {statistics.geometric_mean(everyone):.3f}, largest {max(everyone):.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkouts", description=__doc__, allow_abbrev=False)
    parser.add_argument("other", type=Path, help="the other checkout, its C++ kernels built in place")
    parser.add_argument("what", nargs="*", choices=["bits", "times"], default=["bits", "times"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    differing = compare_bits(options.other.resolve()) if "bits" in options.what else 0
    if "times" in options.what:
        compare_times(options.other.resolve(), options.rounds)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
