"""Linear layer with a low-rank update on the CPU, in C++: csrc/cpu/lora and gemm.

A dense W is multiplied by torch where torch has a fast product of the dtype (`takes_dense`). With
bfloat16 on AVX-512-BF16 the low-rank term is R more terms of the same sums. Elsewhere it is added row by row, in
float32, to a product that was rounded before. The backward reads dY once for dS, dB and db, and x once for dA, besides
the product with W. The formulas are those of reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_ops.kernels.lora_linear import native_abi
from lora_ops.kernels.lora_linear.operands import Adapter, Grads, Needs
from lora_ops.kernels.philox import threshold
from lora_ops.quant.frozen import FrozenTensor, declines_format
from lora_ops.quant.native_abi import as_rows, weight_view
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime import native
from lora_ops.runtime.dispatch import as_output


def _view(adapter: Adapter, lora_a: Tensor, lora_b: Tensor) -> native_abi.AdapterView:
    """The C view of an adapter whose matrices are made contiguous, in lora_a and lora_b, which must outlive it."""
    if adapter.seed is None:
        return native_abi.adapter_view(lora_a, lora_b, float(adapter.scale))
    return native_abi.adapter_view(
        lora_a, lora_b, float(adapter.scale), threshold(adapter.dropout_p), int(adapter.seed)
    )


def lora_linear(
    *, x: Tensor, weight: Tensor | NF4Tensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [..., N] in x's dtype and S [..., R] in float32."""
    x2, lora_a, lora_b = as_rows(x), adapter.lora_a.contiguous(), adapter.lora_b.contiguous()
    bias = None if bias is None else bias.contiguous()
    w, (n, r) = weight_view(weight), lora_b.shape
    # [M, K] @ [K, N] -> [M, N]
    y = linear(x2, weight, bias) if w is None and isinstance(weight, Tensor) else x2.new_empty(x2.shape[0], n)
    s = x2.new_empty(*x.shape[:-1], r, dtype=torch.float32)
    native_abi.forward(_view(adapter, lora_a, lora_b), x2, s, y, w, bias)
    return y if x.dim() == 2 else as_output(y, (*x.shape[:-1], n)), s


def lora_linear_backward(
    *,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor | NF4Tensor,
    adapter: Adapter,
    needs: Needs,
) -> Grads:
    """dX, dA, dB and db, None where `needs` says so."""
    dy2, lora_a, lora_b = as_rows(dy), adapter.lora_a.contiguous(), adapter.lora_b.contiguous()
    n, k = weight.shape
    w = weight_view(weight) if needs.x else None
    dx = None
    if needs.x:
        # [M, N] @ [N, K] -> [M, K]
        dx = dy2 @ weight if w is None and isinstance(weight, Tensor) else dy2.new_empty(dy2.shape[0], k)
    grads = Grads(
        dx,
        torch.empty_like(lora_a) if needs.lora_a else None,
        torch.empty_like(lora_b) if needs.lora_b else None,
        dy.new_empty(n) if needs.bias else None,
    )
    native_abi.backward(
        _view(adapter, lora_a, lora_b),
        dy2,
        as_rows(x) if needs.lora_a and x is not None else None,
        s.contiguous() if needs.lora_b and s is not None else None,
        w,
        dx=grads.x,
        dlora_a=grads.lora_a,
        dlora_b=grads.lora_b,
        dbias=grads.bias,
    )
    if dx is not None and dy.dim() != 2:
        as_output(dx, (*dy.shape[:-1], k))
    return grads


def declines(op: str, lead: Tensor, *, weight: Tensor | FrozenTensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if 0 in weight.shape:
        return f"native LoRA kernels have no weights of shape {tuple(weight.shape)}"
    return declines_format(weight, "nf4", backend="native") or native.declines(lead.device, lead.dtype)


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}
