"""Uses the installed package, without a compiler and outside of the checkout: `python -I smoke.py native`.

Every op on the backend given, against the reference; AdamW's 8-bit states paged under a budget, bit for bit.
Its own inputs and nothing of the tests: what is tried is what a user has.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lora_ops
from lora_ops.functional import dequantize_nf4, lora_linear, nf4_linear, quantize_nf4
from lora_ops.optim import AdamW

M, N, K, R = 48, 192, 160, 8


def gradients(make: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output and the gradient of every leaf."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    y = make(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def ops(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """What each op gives, forward and backward."""
    torch.manual_seed(0)
    x, w, bias = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype) / 8, torch.randn(N, dtype=dtype)
    a, b = torch.randn(R, K) / 8, torch.randn(N, R) / 8
    seed = torch.tensor(7)
    q = quantize_nf4(w, double_quant=True)

    def lora(weight: object) -> Callable[..., Tensor]:
        return lambda x, a, b: lora_linear(x, weight, a, b, scale=2.0, dropout_p=0.1, seed=seed)

    return {
        "quantize_nf4": [q.packed, q.absmax],
        "dequantize_nf4": [dequantize_nf4(q)],
        "nf4_linear": gradients(lambda x, bias: nf4_linear(x, q, bias), x, bias),
        "lora_linear": gradients(lora(w), x, a, b),
        "lora_linear over NF4": gradients(lora(q), x, a, b),
    }


def adamw(**options: object) -> Tensor:
    """Parameters after three steps."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1 << 18))
    optimizer = AdamW([p], lr=1e-2, state_bits=8, **options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    return p.detach()


def main(backend: str) -> None:
    assert Path(lora_ops.__file__).is_relative_to(sys.prefix), lora_ops.__file__
    assert not [c for c in ("c++", "g++", "clang++", "cc", "gcc", "clang") if shutil.which(c)], os.environ["PATH"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with lora_ops.trace() as trace:
            ours = ops(dtype)
        assert trace.backends() == {backend}, trace.backends()
        with lora_ops.use_backend("reference"):
            expected = ops(dtype)
        for name, results in ours.items():
            for got, truth in zip(results, expected[name], strict=True):
                exact = name in ("quantize_nf4", "dequantize_nf4")
                error = (got.double() - truth.double()).norm() / truth.double().norm()
                # Two orders of summation; the tests hold both to float64.
                assert error <= (0 if exact else 8 * torch.finfo(dtype).eps), (name, dtype, error)
    with lora_ops.use_backend("reference"):
        plain = adamw()
    assert torch.equal(adamw(), plain), "AdamW differs from the reference"
    assert torch.equal(adamw(page_budget="128KiB"), plain), "paged AdamW differs"
    if backend == "native":
        maps = Path("/proc/self/maps").read_text().split()
        openmp = {word for word in maps if "libgomp" in word or "libomp" in word}
        assert len(openmp) == 1, f"expected torch's OpenMP alone: {openmp}"
        assert openmp.pop().startswith(sys.prefix), "OpenMP is not torch's"
    print(f"lora_ops {lora_ops.__version__}: every op is right on {backend}, from {Path(lora_ops.__file__).parent}")


if __name__ == "__main__":
    main(sys.argv[1])
