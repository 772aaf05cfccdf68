"""Kernels compiled for chips that are not here, and what their machine code shows.

Triton compiles for any target and brings ptxas and nvdisasm. Not to be run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITCallable

from lora_ops.runtime.triton_launch import Expect, Launch, interpreting, known_options


@dataclass(frozen=True)
class Chip:
    """A target and the bytes of shared memory (LDS on AMD) that one program may have."""

    name: str
    target: GPUTarget
    shared: int


# CUDA C++ Programming Guide, table of technical specifications; MI300 ISA guide for gfx942.
CHIPS: tuple[Chip, ...] = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    Chip("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    Chip("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
)
TENSOR_MEMORY_COLUMNS = 512  # sm_100


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel on one chip shows."""

    registers: int
    stack: int  # bytes, spills included
    shared: int
    tensor_memory: int
    ops: Counter[str]
    source: str  # PTX, or LLVM IR on AMD: where contraction is decided

    def count(self, pattern: str) -> int:
        return sum(n for op, n in self.ops.items() if re.match(pattern, op))


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


def read(kernel: Any) -> Code:
    """Registers, stack, shared memory and instructions of a compiled kernel."""
    memory = {"shared": kernel.metadata.shared, "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0}
    if "amdgcn" in kernel.asm:
        asm = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", asm)
            if found is None:
                raise ValueError(f"no .{name} in the metadata of {kernel.metadata.name}")
            return int(found[1])

        # Spilled scalar registers go to vector lanes first and do not show as stack.
        spills = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
        ops = Counter(re.findall(r"^\t([a-z]\w+)", asm, re.MULTILINE))
        stack = max(field("private_segment_fixed_size"), spills)
        return Code(field("vgpr_count"), stack, ops=ops, source=kernel.asm["llir"], **memory)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump answered {usage!r}")
    registers, stack, local = map(int, found.groups())
    ops = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass))
    return Code(registers, stack + local, ops=ops, source=kernel.asm["ptx"], **memory)


@functools.cache
def _tools() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(_tools() / name), *args], capture_output=True, text=True, check=True).stdout


# opcode patterns: (NVIDIA's SASS, AMD's assembly)
_WIDE = {
    "load": (r"(LDG|LDGSTS|LD)\..*\.(128|256)(\.|$)|UTMALDG", r"(global|buffer|flat)_load_(dwordx4|b128)"),
    "store": (r"(STG|ST)\..*\.(128|256)(\.|$)|UTMASTG", r"(global|buffer|flat)_store_(dwordx4|b128)"),
}
_ATOMIC = (r"(RED|REDG|ATOM|ATOMG)(\.|$)", r"(global|buffer|flat)_atomic")
_LOCAL = (r"(STL|LDL)(\.|$)", r"scratch_(load|store)")


def problems(code: Code, chip: Chip, expect: Expect) -> list[str]:
    """What is wrong with the code, in words."""
    amd = chip.target.backend == "hip"
    wrong = []
    if code.stack or code.count(_LOCAL[amd]):
        wrong.append(f"{code.stack} bytes of stack or spills, {code.count(_LOCAL[amd])} local accesses")
    if code.shared > chip.shared:
        wrong.append(f"{code.shared} bytes of shared memory, {chip.name} has {chip.shared}")
    if code.tensor_memory > TENSOR_MEMORY_COLUMNS:
        wrong.append(f"{code.tensor_memory} columns of tensor memory, {chip.name} has {TENSOR_MEMORY_COLUMNS}")
    if n := code.count(_ATOMIC[amd]):
        wrong.append(f"{n} atomics")
    mma = expect.mma.get(chip.name)
    if mma and not code.count(mma):
        other = [op for op in code.ops if "MMA" in op or "mfma" in op]
        wrong.append(f"no {mma} (matrix instructions: {', '.join(other) or 'none'})")
    wrong += [f"no 16-byte {side}" for side in expect.wide.split() if not code.count(_WIDE[side][amd])]
    if expect.exact:
        wrong += _inexact_amd(code) if amd else _inexact_nvidia(code)
    return wrong


def _inexact_nvidia(code: Code) -> list[str]:
    # ptxas may contract mul and add that carry no rounding mode; `.rn` forbids it. Only a division expands to FFMA.
    ptx = code.source
    wrong = [f"`{m}` in PTX" for m in sorted(set(re.findall(r"\b(?:fma|mad)\.[\w.]*f\d+\b", ptx)))]
    wrong += [
        f"`{m}` may be contracted" for m in sorted(set(re.findall(r"\b(?:add|sub|mul)\.(?:ftz\.)?b?f\d+\b", ptx)))
    ]
    wrong += [f"`{m}` flushes denormals" for m in sorted(set(re.findall(r"\b[a-z][\w.]*\.ftz\.[\w.]+", ptx)))]
    # HFMA2 does not count: ptxas uses it to load constants.
    if "div." not in ptx and (n := code.count("FFMA")):
        wrong.append(f"{n} fused multiply-adds in SASS")
    return wrong


def _inexact_amd(code: Code) -> list[str]:
    wrong = [f"`{m}` in LLVM IR" for m in sorted(set(re.findall(r"llvm\.(?:fma|fmuladd)\.\w+", code.source)))]
    if "llvm.amdgcn.rsq" in code.source:  # Triton 3.6 writes a correctly rounded square root out, in fused steps
        wrong = []
    if re.search(r"\bf(?:mul|add|sub) (?:\w+ )*(?:contract|fast|reassoc)\b", code.source):
        wrong.append("contraction is allowed in LLVM IR")
    if not code.count("v_div_scale") and (n := code.count(r"v_(pk_)?(fma|fmac|mac|mad)_f")):
        wrong.append(f"{n} fused multiply-adds")
    return wrong
