"""Seeded inputs of every op, their float64 truth, and torch's own way; shared by tests and bench.

    case = LinearCase(m=64, n=96, k=128, r=16, dtype=torch.bfloat16, weight="nf4", dropout_p=0.1)
    inputs = case.inputs()
    assert_right(inputs, run_ours(inputs))                # y, dx, dlora_a, dlora_b, dbias

`truth` computes every result twice with the same formula: on the operands, and on their squares, whose root is the
magnitude that tolerance.py measures errors in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ops.functional import frozen_linear, lora_linear, nf4_linear, quantize_nf4
from lora_ops.kernels.philox import dropout_mask, keep_scale
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4_CODE, NF4Tensor
from lora_ops.runtime.backends import BACKENDS, use_backend
from tests.tolerance import Error, Truth, assert_within, compare

Results = Mapping[str, Tensor]

CPU_BACKENDS = ("reference", "native")


def backends_here() -> list[str]:
    """Those of CPU_BACKENDS that this machine has."""
    return [name for name in CPU_BACKENDS if BACKENDS[name].unavailable() is None]


@dataclass(frozen=True)
class LinearCase:
    """What an input of nf4_linear or frozen_linear (r = 0), or of lora_linear (r > 0) looks like.

    Attributes:
        m, n, k, r: tokens, out-features, in-features, rank; r = 0 means no adapter.
        dtype: of the activations, the bias and a dense weight.
        weight: "nf4", "dense", or "transposed": dense, and its transpose lies in memory, as a Conv1D's.
        block_size, double_quant: of an NF4 weight.
        adapter_dtype: of lora_a and lora_b; dtype if None.
        bias: whether there is one.
        dropout_p: of the low-rank branch.
        scale: of the low-rank branch.
        batch: leading dimensions, so that x is [*batch, m, k].
        contiguous: False gives x, dY, a dense weight, the adapter and the bias strides that no kernel likes.
        ill_scaled: rows of x and of W differ by up to 2^8, a few weights stand out by 2^4.
        zero_b: lora_b = 0, as at the start of training.
        seed: of all random numbers.
    """

    m: int
    n: int
    k: int
    r: int = 0
    dtype: torch.dtype = torch.float32
    weight: str = "nf4"
    block_size: int = 64
    double_quant: bool = False
    adapter_dtype: torch.dtype | None = None
    bias: bool = False
    dropout_p: float = 0.0
    scale: float = 2.0
    batch: tuple[int, ...] = ()
    contiguous: bool = True
    ill_scaled: bool = False
    zero_b: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        """A short name for pytest and reports: only what differs from the defaults."""
        parts = ["x".join(map(str, (*self.batch, self.m, self.n, self.k)))]
        parts += [f"r{self.r}"] * bool(self.r) + [str(self.dtype).removeprefix("torch."), self.weight]
        if self.weight == "nf4":
            parts += [f"b{self.block_size}"] * (self.block_size != 64) + ["dq"] * self.double_quant
        if self.adapter_dtype not in (None, self.dtype):
            parts.append("adapter_" + str(self.adapter_dtype).removeprefix("torch."))
        flags = {"bias": self.bias, "strided": not self.contiguous, "ill": self.ill_scaled, "b0": self.zero_b}
        parts += [name for name, on in flags.items() if on] + [f"p{self.dropout_p}"] * bool(self.dropout_p)
        return "-".join(parts)

    def inputs(self, device: torch.device | str = "cpu") -> LinearInputs:
        """The tensors; drawn on the CPU, so that they are the same on every device."""
        g = torch.Generator().manual_seed(self.seed)
        c = self

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        def spread(rows: int) -> Tensor:
            return torch.exp2(torch.randint(-4, 5, (rows, 1), generator=g).float()) if c.ill_scaled else torch.ones(1)

        x = (randn(math.prod(c.batch) * c.m, c.k) * spread(math.prod(c.batch) * c.m)).view(*c.batch, c.m, c.k)
        dy = randn(*c.batch, c.m, c.n)
        w = randn(c.n, c.k) * spread(c.n) / math.sqrt(max(c.k, 1))
        if c.ill_scaled and w.numel():
            w.view(-1)[torch.randint(0, w.numel(), (max(1, w.numel() // 1000),), generator=g)] *= 16
        lora_a = randn(c.r, c.k) / math.sqrt(max(c.k, 1)) if c.r else None
        lora_b = randn(c.n, c.r) * (0.0 if c.zero_b else 1 / math.sqrt(c.r)) if c.r else None
        bias = randn(c.n) if c.bias else None

        def place(t: Tensor, dtype: torch.dtype) -> Tensor:
            t = t.to(device, dtype)
            return t if c.contiguous else _strided(t)

        weight: Tensor | NF4Tensor
        if c.weight == "nf4":
            # Not by the kernel under test on a device, and not slowly on the CPU.
            w = w.to(device, torch.float32 if c.dtype == torch.float64 else c.dtype)
            with use_backend("auto" if w.device.type == "cpu" else "reference"):
                weight = quantize_nf4(w, block_size=c.block_size, double_quant=c.double_quant)
            weight = replace(weight, dtype=c.dtype)
        elif c.weight == "dense":
            weight = place(w, c.dtype)
        elif c.weight == "transposed":
            weight = place(w.T, c.dtype).T
        else:
            raise ValueError(f"weight: expected 'nf4', 'dense' or 'transposed', got {c.weight!r}")
        adapter = c.adapter_dtype or c.dtype
        return LinearInputs(
            case=c,
            x=place(x, c.dtype),
            dy=place(dy, c.dtype),
            weight=weight,
            bias=None if bias is None else place(bias[:, None], c.dtype)[:, 0],
            lora_a=None if lora_a is None else place(lora_a, adapter),
            lora_b=None if lora_b is None else place(lora_b, adapter),
            seed=torch.randint(0, 2**63 - 1, (), generator=g, dtype=torch.int64).to(device),
        )


@dataclass(frozen=True)
class LinearInputs:
    """Operands of one call and the gradient that flows into it."""

    case: LinearCase
    x: Tensor
    dy: Tensor
    weight: Tensor | NF4Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    seed: Tensor

    def adapter(self) -> tuple[Tensor, Tensor]:
        """lora_a and lora_b of a case that has them."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        return self.lora_a, self.lora_b

    @property
    def nf4(self) -> NF4Tensor:
        """The weight of an NF4 case."""
        assert isinstance(self.weight, NF4Tensor)
        return self.weight

    @property
    def samples(self) -> int | None:
        """Independent roundings that each result depends on, for tolerance.compare; None if as many as elements."""
        tokens = math.prod(self.x.shape[:-1])
        return max(1, tokens * self.case.r) if self.case.r else None

    @property
    def terms(self) -> int:
        """Length of the longest sum, forward or backward."""
        return max(math.prod(self.x.shape[:-1]), self.case.n, self.case.k, 1)


def _strided(t: Tensor) -> Tensor:
    """The same values, transposed in memory and with gaps."""
    gaps = t.new_full((*t.shape[:-2], t.shape[-1], 2 * t.shape[-2]), float("nan"))
    view = gaps[..., ::2].transpose(-1, -2)
    view.copy_(t)
    return view


def in_wider_rows(inputs: LinearInputs) -> LinearInputs:
    """The same with x and dY as columns of wider tensors, NaN beside them: unit stride, and gaps between rows."""
    x, dy = (F.pad(t, (8, 24), value=math.nan)[..., 8:-24] for t in (inputs.x, inputs.dy))
    return replace(inputs, x=x, dy=dy)


def exact_weight(weight: Tensor | NF4Tensor) -> Tensor:
    """W in float64: code · absmax without rounding the product. Decoded apart from the library's own decoders."""
    if isinstance(weight, Tensor):
        return weight.double()
    q = weight
    pairs = q.packed.view(-1).int()
    codes = torch.stack([pairs // 16, pairs % 16], dim=1).view(-1)[: q.numel()]
    absmax = exact_absmax(q).double().repeat_interleave(q.block_size)[: q.numel()]
    code = torch.tensor(NF4_CODE, dtype=torch.float64, device=q.device)
    return (code[codes] * absmax).view(q.shape)


def exact_absmax(q: NF4Tensor) -> Tensor:
    """absmax in float32 as the format defines it: doubly quantized, code · nested_absmax rounded, plus the offset."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax
    values = dynamic_map(signed=True).to(q.device)[q.absmax.long()]
    nested = q.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: values.numel()]
    return values * nested + q.nested_offset


def rounded_weight(weight: Tensor | NF4Tensor, dtype: torch.dtype) -> Tensor:
    """W as dense torch holds it: the product in float32 (the format's precision), rounded to `dtype`."""
    return weight if isinstance(weight, Tensor) else exact_weight(weight).float().to(dtype)


def keep_mask(inputs: LinearInputs) -> Tensor | None:
    """Kept elements of x, bool [*batch, M, K]; None without dropout."""
    if inputs.case.dropout_p == 0:
        return None
    k = inputs.x.shape[-1]
    rows = slice(0, math.prod(inputs.x.shape[:-1]))
    if rows.stop == 0:
        return torch.ones(inputs.x.shape, dtype=torch.bool, device=inputs.x.device)
    return dropout_mask(rows, k, inputs.case.dropout_p, inputs.seed).reshape(inputs.x.shape)


def _formula(
    x: Tensor,
    dy: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    drop: Tensor | None,
) -> dict[str, Tensor]:
    """Forward and gradients of y = x Wᵀ + b + scale · (drop ∘ x) Aᵀ Bᵀ, written out; x [M, K], dy [M, N]."""
    y, dx = x @ w.T, dy @ w
    results = {"y": y, "dx": dx}
    if bias is not None:
        y += bias
        results["dbias"] = dy.sum(0)
    if lora is not None:
        a, b, scale = lora
        dropped = x if drop is None else x * drop
        s, ds = dropped @ a.T, scale * (dy @ b)
        y += scale * (s @ b.T)
        dx += ds @ a if drop is None else (ds @ a) * drop
        results |= {"dlora_a": ds.T @ dropped, "dlora_b": scale * (dy.T @ s)}
    return results


def truth(inputs: LinearInputs) -> dict[str, Truth]:
    """Every output and gradient in float64 on the exact operands."""
    i, p = inputs, inputs.case.dropout_p
    mask = keep_mask(i)
    x, dy = i.x.double().reshape(-1, i.x.shape[-1]), i.dy.double().reshape(-1, i.dy.shape[-1])
    w = exact_weight(i.weight)
    bias = None if i.bias is None else i.bias.double()
    drop = None if mask is None else mask.double().view_as(x) * keep_scale(p)
    lora = None
    if i.lora_a is not None and i.lora_b is not None:
        lora = (i.lora_a.double(), i.lora_b.double(), float(i.case.scale))
    values = _formula(x, dy, w, bias, lora, drop)
    squares = _formula(
        x.square(),
        dy.square(),
        w.square(),
        None if bias is None else bias.square(),
        None if lora is None else (lora[0].square(), lora[1].square(), lora[2] ** 2),
        None if drop is None else drop.square(),
    )
    shapes = {"y": i.dy.shape, "dx": i.x.shape}
    return {
        name: Truth(v.view(shapes.get(name, v.shape)), squares[name].sqrt().view(shapes.get(name, v.shape)))
        for name, v in values.items()
    }


def _leaf(t: Tensor | None) -> Tensor | None:
    # detach() keeps the strides, which clone() may not.
    return None if t is None else t.detach().requires_grad_()


def _results(inputs: LinearInputs, y: Tensor, **leaves: Tensor | None) -> dict[str, Tensor]:
    wanted = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip((f"d{name}" for name in wanted), grads, strict=True))}


def run_torch(inputs: LinearInputs) -> dict[str, Tensor]:
    """Torch's own way, forward and all gradients: dense, every operand in the activations' dtype."""
    i, dtype = inputs, inputs.x.dtype
    x, bias, a, b = (_leaf(t) for t in (i.x, i.bias, i.lora_a, i.lora_b))
    assert x is not None
    y = F.linear(x, rounded_weight(i.weight, dtype), bias)
    if a is not None and b is not None:
        mask = keep_mask(i)
        dropped = x if mask is None else torch.where(mask, x * keep_scale(i.case.dropout_p), 0.0)
        y = y + i.case.scale * F.linear(F.linear(dropped, a.to(dtype)), b.to(dtype))
    results = _results(i, y, x=x, lora_a=a, lora_b=b, bias=bias)
    return {name: t.to(dtype) for name, t in results.items()}


def run_ours(inputs: LinearInputs) -> dict[str, Tensor]:
    """The library's op on the backend in force, forward and all gradients."""
    i = inputs
    x, bias, a, b = (_leaf(t) for t in (i.x, i.bias, i.lora_a, i.lora_b))
    assert x is not None
    if a is None or b is None:
        y = frozen_linear(x, i.weight, bias) if isinstance(i.weight, Tensor) else nf4_linear(x, i.weight, bias)
    else:
        seed = i.seed if i.case.dropout_p else None
        y = lora_linear(
            x, i.weight, a, b, scale=i.case.scale, bias=bias, dropout_p=i.case.dropout_p, seed=seed
        )  # fmt: skip
    return _results(i, y, x=x, lora_a=a, lora_b=b, bias=bias)


def errors(
    inputs: LinearInputs, got: Results, *, exact: Mapping[str, Truth] | None = None, own: Results | None = None
) -> dict[str, Error]:
    """Each result of `got` measured by the rule; `exact` and `own` are computed if they are not given."""
    exact, own = exact or truth(inputs), own or run_torch(inputs)
    return {
        name: compare(t, own[name], exact[name], terms=inputs.terms, samples=inputs.samples) for name, t in got.items()
    }


def assert_right(inputs: LinearInputs, got: Results) -> None:
    """Raise AssertionError unless `got` holds every result of the case and each keeps the rule."""
    exact, own = truth(inputs), run_torch(inputs)
    assert set(got) == set(exact), f"{inputs.case.id}: results {sorted(got)}, expected {sorted(exact)}"
    for name, t in got.items():
        assert_within(
            t, own[name], exact[name], name=f"{inputs.case.id} {name}", terms=inputs.terms, samples=inputs.samples
        )


# The codec.


def codec_weight(
    *shape: int, dtype: torch.dtype = torch.float32, ill_scaled: bool = False, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """A weight to quantize: normal as trained weights are; ill-scaled: runs of 64 differ by up to 2^8, some are 0."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(math.prod(shape), generator=g) * 0.02
    if ill_scaled:
        runs = -(-w.numel() // 64)
        scale = torch.exp2(torch.randint(-4, 5, (runs,), generator=g).float())
        scale[torch.rand(runs, generator=g) < 0.1] = 0.0
        w *= scale.repeat_interleave(64)[: w.numel()]
    return w.view(shape).to(device, dtype)


def wrong_quantization(w: Tensor, q: NF4Tensor) -> str | None:
    """Why q is not a quantization of w to the nearest codes, or None. Bit-exactness is the codec's own tests' job."""
    flat, block = w.double().view(-1), q.block_size
    padded = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    if q.nested_absmax is None:
        if not torch.equal(q.absmax.double(), absmax):
            return f"{int((q.absmax.double() != absmax).sum())} of {absmax.numel()} absmax values are not the maximum"
    else:
        nested = q.nested_absmax.double().repeat_interleave(NESTED_BLOCK_SIZE)[: absmax.numel()]
        gap = float(dynamic_map(signed=True).double().diff().max())
        # Half the widest gap of the 8-bit map, and the roundings of code · nested_absmax + offset in float32.
        limit = nested * gap / 2 * 1.001 + 4 * torch.finfo(torch.float32).eps * absmax.max()
        off = (exact_absmax(q).double() - absmax).abs() > limit
        if bool(off.any()):
            return f"{int(off.sum())} of {absmax.numel()} double-quantized absmax are off by more than half a gap"
    pairs = q.packed.view(-1).int()
    codes = torch.stack([pairs // 16, pairs % 16], dim=1).view(-1)[: flat.numel()]
    code = torch.tensor(NF4_CODE, dtype=torch.float64, device=w.device)
    unit = absmax.clamp_min(torch.finfo(torch.float64).tiny).repeat_interleave(block)[: flat.numel()]
    v = flat / unit
    nearest = code[torch.bucketize(v, (code[:-1] + code[1:]) / 2)]
    # Thresholds and the scaled value are float32 in the format: within their roundings, the next code is as good.
    excess = (v - code[codes]).abs() - (v - nearest).abs()
    far = excess > 4 * torch.finfo(torch.float32).eps
    return f"{int(far.sum())} of {flat.numel()} codes are not the nearest" if bool(far.any()) else None
