"""The CUDA C++ kernels compiled by nvcc for every NVIDIA chip, and what their machine code shows.

    python -m tests.gpu_proof.cuda_code     # instructions a weight of every kernel that decodes in its loop, on sm_90

nvcc compiles for any chip without a GPU. Where it is missing the gate takes the committed record's word by fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu_proof import machine_code, registry, rules
from tests.gpu_proof.expect import HMMA, Expect
from tests.gpu_proof.machine_code import MATRIX_CHIPS as CHIPS
from tests.gpu_proof.machine_code import Chip
from tests.gpu_proof.rules import Code

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc/cuda/nf4_linear.cu"
# Of csrc/include/lora_ops.h the kernels take numbers of statuses and dtypes only.
READ = (*sorted((ROOT / "csrc/cuda").iterdir()), ROOT / "csrc/include/lora_ops_cuda.h", ROOT / "csrc/cpu/nf4/table.h")
NVIDIA = tuple(chip for chip in CHIPS if chip.target.backend == "cuda")
BUILD_HINT = "install nvcc of CUDA 12.8 or newer, or set CUDA_HOME"
CODE_LOADS = 4  # of 16 bytes a lane and step
STEP_WEIGHTS = 128  # a lane's share of it: 32 rows of 128 elements over 32 lanes


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template; `tiles` of 8 tokens, 0 in the kernel for any shape."""

    dtype: str
    tiles: int
    nested: bool

    @property
    def id(self) -> str:
        shape = f"M<={8 * self.tiles}" if self.tiles else "any shape"
        name = "nf4_linear_kernel" if self.tiles else "nf4_linear_ragged_kernel"
        return f"nf4_linear | CUDA {shape} {self.dtype}{' nested' * self.nested} | {name}"

    @property
    def expect(self) -> Expect:
        return Expect(mma=HMMA, wide="load") if self.tiles else Expect()

    @property
    def most_instructions(self) -> float:
        """A weight, in the loop. An H200's memory leaves room for about 3 at one token and 4 to 9 at 16 to 64."""
        return {0: float("inf"), 1: 3.0, 2: 4.0, 4: 5.0, 8: 7.0}[self.tiles]


KERNELS = tuple(Kernel(d, t, n) for t in (1, 2, 4, 8, 0) for d in ("bfloat16", "float16") for n in (False, True))
_MANGLED = re.compile(r"nf4_linear_(ragged_)?kernelINS_\d+(BF16|F16)E(?:Li(\d+)E)?Lb([01])E")


def nvcc() -> str | None:
    """Where setup.py looks: CUDA_HOME, CUDA_PATH, PATH, where CUDA installs itself."""
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


@functools.cache
def nvcc_version() -> str:
    """As nvcc tells it, or "" where there is none."""
    if (path := nvcc()) is None:
        return ""
    found = re.search(r"V(\d[\d.]*)", subprocess.run([path, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else "unknown"


@functools.cache
def _sources() -> str:
    judged = [machine_code.code_of(Path(path)).encode() for path in (__file__, rules.__file__)]
    return hashlib.sha256(b"\0".join([path.read_bytes() for path in READ] + judged)).hexdigest()


def fingerprint(kernel: Kernel, chip: Chip) -> str:
    """Names what the machine code depends on, but for nvcc's version, which is unknown where there is none."""
    return hashlib.sha256(f"{_sources()} {kernel.id} {chip}".encode()).hexdigest()


@dataclass(frozen=True)
class Body:
    """A kernel's code and the instructions of the smallest loop that holds a matrix instruction."""

    code: Code
    loop: int


def inner_loop(sass: str, marker: str = "MMA") -> int:
    """Instructions of the smallest loop with `marker` in it, 0 if there is none."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    sizes = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", lines[-1])
            if back and back[1] in labels and any(marker in text for text in lines[labels[back[1]] :]):
                sizes.append(len(lines) - labels[back[1]])
    return min(sizes, default=0)


@functools.cache
def compiled(chip: Chip, source: Path = SOURCE) -> dict[Kernel, Body]:
    """Every kernel of a source on one chip. Raises RuntimeError if nvcc is missing or fails."""
    if (path := nvcc()) is None:
        raise RuntimeError(f"nvcc is missing: {BUILD_HINT}")
    flags = [
        "-std=c++17",
        "-O3",
        *(f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda")),
        f"-arch={chip.name}",
        "-cubin",
    ]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        done = subprocess.run([path, *flags, "-o", cubin.name, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {' '.join(done.stderr.split())[-300:]}")
        usage = rules.tool("cuobjdump", "-res-usage", cubin.name)
        sass = rules.tool("nvdisasm", "-c", cubin.name)
    usages = dict(re.findall(r"Function (\S+?):\s+(REG:.*)", usage))
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]:
        name = re.match(r"[^,\s]+", section)
        match = _MANGLED.search(name[0]) if name else None
        if name is None or match is None:
            raise RuntimeError(f"{source.name}: a kernel that KERNELS does not list: {section[:80]!r}")
        dtype = {"BF16": "bfloat16", "F16": "float16"}[match[2]]
        kernel = Kernel(dtype, 0 if match[1] else int(match[3]), match[4] == "1")
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usages[name[0]])
        if numbers is None:
            raise RuntimeError(f"cuobjdump answered {usages[name[0]]!r}")
        registers, stack, shared, local = map(int, numbers.groups())
        ops = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section))
        found[kernel] = Body(Code(registers, stack + local, shared, 0, ops, ""), inner_loop(section))
    return found


def check(kernel: Kernel, chip: Chip, source: Path = SOURCE) -> tuple[str, tuple[str, ...]]:
    """A summary of the kernel on the chip, and what is wrong with it."""
    try:
        bodies = compiled(chip, source)
    except RuntimeError as error:
        return "", (str(error),)
    if kernel not in bodies:
        return "", (f"not in {source.name}",)
    body = bodies[kernel]
    wrong = rules.problems(body.code, chip, kernel.expect)
    per_weight = body.loop / STEP_WEIGHTS
    if kernel.tiles and (n := body.code.count(r"LDG\.E\.NA\.128")) != 2 * CODE_LOADS:
        wrong.append(f"{n} streaming 16-byte loads, not {CODE_LOADS} of packed codes before the loop and in it")
    if kernel.tiles and not 0 < per_weight <= kernel.most_instructions:
        wrong.append(f"{per_weight:.2f} instructions a weight, at most {kernel.most_instructions}")
    parts = [f"{body.code.registers} r", *(["64 K", "HMMA", f"{per_weight:.2f} i/w"] if kernel.tiles else [])]
    return ", ".join([*parts, f"nvcc {nvcc_version()}"]), tuple(wrong)


def triton_loops(chip: Chip) -> Iterator[tuple[str, float]]:
    """Launches of nf4_linear that decode in their loop, forward, with the instructions a weight of that loop."""
    for shipped in registry.shipped_by("nf4_linear"):
        meta = shipped.launch.meta
        if not re.fullmatch(r"y M=(1|4|16|32|64) bfloat16( nested)?", shipped.case.name) or "BLOCK_SIZE" not in meta:
            continue
        kernel = machine_code.compiled(shipped.launch, chip)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            sass = rules.tool("nvdisasm", "-c", cubin.name)
        gemv = "gemv" in shipped.kernel
        tile = meta["BLOCK_N"] * meta["BLOCK_K"] if gemv else meta["BLOCK_J"] * meta["BLOCK_I"]
        a_lane = tile / meta["num_warps"] / 32
        yield f"Triton {shipped.case.name.removeprefix('y ')}", inner_loop(sass, "FFMA" if gemv else "MMA") / a_lane


def main(argv: Sequence[str]) -> int:
    chip = next(chip for chip in NVIDIA if chip.name == (argv[0] if argv else "sm_90"))
    for name, per_weight in triton_loops(chip):
        print(f"{name:<40} {per_weight:6.2f}")
    for kernel, body in compiled(chip).items():
        if kernel.tiles and kernel.dtype == "bfloat16":
            print(f"{kernel.id.split(' | ')[1]:<40} {body.loop / STEP_WEIGHTS:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
