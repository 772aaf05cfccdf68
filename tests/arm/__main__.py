"""Build the native library for 64-bit ARM and test it here, under qemu: `make arm`.

What is promised bit for bit is compared with this machine's library; then the library's own tests and those of its ops
run as they are, on every instruction set that ARM has, and so does the fuzzer. Speed under an emulator says nothing.
"""

from __future__ import annotations

import subprocess
import sys

from tests.arm.build import FUZZ, ROOT, RUN, build, missing

SAME_BITS = ["tests/arm"]
ON_ARM = [
    *(f"tests/csrc/test_native_{name}.py" for name in ("nf4", "nf4_gemm", "lora", "blockwise8")),
    *(f"tests/quant/test_{name}.py" for name in ("nf4_codec", "nf4_linear", "blockwise8")),
    *(f"tests/kernels/test_{name}.py" for name in ("lora_linear", "frozen_linear", "adamw")),
    "tests/paging/test_checksum.py",
]


def main(arguments: list[str]) -> int:
    """Everything, until something fails; arguments go to pytest."""
    if reason := missing():
        print(f"make arm: {reason}", file=sys.stderr)
        return 1
    build()
    pytest = [sys.executable, "-m", "pytest", "-q"]
    steps = [
        [*pytest, *SAME_BITS],
        [*RUN, str(FUZZ), "20"],
        [*pytest, "-p", "tests.arm.remote", *ON_ARM, *arguments],
    ]
    return next((status for step in steps if (status := subprocess.run(step, cwd=ROOT).returncode)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
