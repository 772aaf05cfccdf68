"""Kernels compiled for chips that are not here. Not to be run with TRITON_INTERPRET=1."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITCallable

from lora_ops.runtime.triton_launch import Launch, interpreting, known_options


@dataclass(frozen=True)
class Chip:
    """A target and the bytes of shared memory (LDS on AMD) that one program may have."""

    name: str
    target: GPUTarget
    shared: int

    @property
    def capability(self) -> tuple[int, int] | None:
        """Of an NVIDIA GPU."""
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else None


# CUDA C++ Programming Guide, table of technical specifications; MI300 ISA guide for gfx942.
CHIPS: tuple[Chip, ...] = (
    Chip("sm_75", GPUTarget("cuda", 75, 32), 64 * 1024),
    Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    Chip("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    Chip("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
)
# Those that have matrix instructions of bfloat16, which the CUDA C++ kernels are made of, and which Triton uses.
MATRIX_CHIPS = CHIPS[1:]


class _Driver(DriverBase):
    """A driver of no device: tells Triton's own launcher code which chip to compile for."""

    def __init__(self, index: int) -> None:
        self.index = index

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.index].target

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 1000 + self.index  # Triton caches kernels by device: keep clear of real ones

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch, chip: Chip) -> Any:
    """The kernel as the JIT would build it for this launch on this chip."""
    if interpreting():
        raise RuntimeError("tests.gpu_proof.machine_code: TRITON_INTERPRET=1 is set; compile in a process of its own")
    config = triton.runtime.driver
    before, config._active = config._active, _Driver(CHIPS.index(chip))
    try:
        meta = known_options(launch.meta, amd=chip.target.backend == "hip")
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **meta)
    finally:
        config._active = before


def fingerprint(launch: Launch, chip: Chip) -> str:
    """Names everything that the machine code depends on, without compiling: source, signature, options, Triton."""
    _forget_lines()
    seen: list[str] = []

    def hook(*, compile: dict[str, Any], **_: Any) -> bool:
        seen.append(compile["specialization_data"])
        return True  # do not compile

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        compiled(launch, chip)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    if not seen:
        raise RuntimeError(f"{launch.kernel.__name__}: compiled already, take fingerprints before")
    data = json.loads(seen[0])
    data["options"].pop("extern_libs", None)  # paths of this machine, and `key` repeats them
    what = [
        data[part] for part in ("signature", "constant_keys", "constant_vals", "attrs_keys", "attrs_vals", "options")
    ]
    parts = (triton.__version__, chip.name, launch.kernel.cache_key, json.dumps(what, sort_keys=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _forget_lines() -> None:
    """Triton's key of a source holds where in its file it begins, which changes nothing in machine code."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lora_ops":
            for function in vars(module).values():
                if isinstance(function, JITCallable) and function.starting_line_number:
                    function.starting_line_number, function.hash = 0, None


def code_of(path: Path) -> str:
    """A Python file without its imports, comments and docstrings: what it does."""
    text = path.read_text()
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or docstring:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
