"""What this machine can do at most: copy bandwidth and GEMM speed, measured in the same run as the ops."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.clocks import Clock
from bench.plan import Effort


@dataclass(frozen=True)
class Ceilings:
    """The best of several rounds: a ceiling is what was reached once.

    Attributes:
        copy_bytes_per_s: bytes read plus bytes written per second, from one large buffer to another.
        flops_per_s: of a GEMM in the activations' dtype.
        fp32_flops_per_s: of a float32 GEMM.
    """

    copy_bytes_per_s: float
    flops_per_s: float
    fp32_flops_per_s: float

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def measure_ceilings(
    clock: Clock, device: str, dtype: torch.dtype, *, copy_bytes: int = 256 << 20, gemm: int = 2048
) -> Ceilings:
    """Copy `copy_bytes` and multiply [gemm, gemm] matrices."""
    effort = Effort(min_rounds=5, max_rounds=15, seconds=2.0)
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def matrices(of: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(gemm, gemm, device=device).to(of) for _ in range(2))
        return a, b, torch.empty_like(a)

    a, b, c = matrices(dtype)
    a32, b32, c32 = matrices(torch.float32)
    times = clock.interleave(
        {
            "copy": lambda: target.copy_(source),
            "gemm": lambda: torch.mm(a, b, out=c),
            "gemm_fp32": lambda: torch.mm(a32, b32, out=c32),
        },
        effort,
    )
    best = {name: min(t) for name, t in times.items()}
    flops = 2.0 * gemm**3
    return Ceilings(2 * copy_bytes / best["copy"], flops / best["gemm"], flops / best["gemm_fp32"])
