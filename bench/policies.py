"""Allocator policies: with glibc's defaults every fresh large tensor is page-faulted in, which hides the kernel.

glibc reads these variables when a process starts, so each policy is a process of its own.
"""

from __future__ import annotations

import os

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
}


# What keeps torch and oneDNN, and so their users, to an instruction set of ours.
ISAS: dict[str, dict[str, str]] = {
    "avx2": {"LORA_OPS_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"LORA_OPS_ISA": "avx512", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}


def environment_of(policy: str, isa: str | None = None) -> dict[str, str]:
    """The child's environment: this one's without any policy's variables, with those of `policy` and of `isa`."""
    ours = {name for variables in POLICIES.values() for name in variables}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    # bitsandbytes downloads a kernel when it is imported on some CPUs; a benchmark must not depend on the network.
    return {"HF_HUB_OFFLINE": "1", **inherited, **POLICIES[policy], **(ISAS[isa] if isa else {})}
