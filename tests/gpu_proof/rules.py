"""What a kernel's machine code shows, and the rules that it is held to. Triton brings ptxas and nvdisasm.

The gate's record is valid for the code of this file (its comments, docstrings and imports apart): see gate.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from tests.gpu_proof.expect import Expect
from tests.gpu_proof.machine_code import Chip

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
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        sass = tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump answered {usage!r}")
    registers, stack, local = map(int, found.groups())
    ops = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass))
    return Code(registers, stack + local, ops=ops, source=kernel.asm["ptx"], **memory)


def tool(name: str, *args: str) -> str:
    """Output of one of the tools that Triton brings."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


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
