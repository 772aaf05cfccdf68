"""Correctness on the device: every op on every backend against float64, on shapes that find edges.

A check is a function of the device, run with a backend in force, that answers why a result is wrong, or None. CHECKS
maps an op's name to its checks by case; adding an op adds an entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from lora_ops.functional import (
    dequantize_blockwise8,
    dequantize_nf4,
    nf4_linear,
    quantize_blockwise8,
    quantize_nf4,
)
from lora_ops.kernels.adamw import Slice, adamw_
from lora_ops.kernels.adamw import constants as adamw_constants
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime.crossovers import force
from tests.cases import (
    LinearCase,
    assert_right,
    codec_weight,
    errors,
    rounded_weight,
    run_ours,
    wrong_quantization,
)

Check = Callable[[str], str | None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BF16 = torch.bfloat16

# (M, N, K): one token, a ragged tile, whole tiles, a shape that no tile divides, a real layer.
SHAPES = ((1, 256, 512), (17, 96, 160), (128, 512, 1024), (300, 1000, 520))
LARGE = (512, 4096, 4096)
# In its place on a CPU: still several tiles of every kernel. Torch's own 16-bit products, which the reference uses, are
# a hundred times as slow as its float32 ones where the CPU has no instruction for them: LARGE took 95 s.
LARGE_ON_CPU = (160, 640, 768)

Shape = tuple[int, int, int]


def _linear_cases(r: int, large: Shape) -> Iterator[LinearCase]:
    for m, n, k in SHAPES:
        for dtype in FLOATS:
            yield LinearCase(m, n, k, r, dtype, bias=True, seed=m)
    m, n, k = SHAPES[1]
    yield LinearCase(m, n, k, r, BF16, contiguous=False, batch=(2,))
    yield LinearCase(m, n, k, r, BF16, double_quant=True, block_size=32)
    yield LinearCase(m, n, k, r, BF16, block_size=256)
    yield LinearCase(m, n, k, r, BF16, ill_scaled=True)
    yield LinearCase(0, n, k, r, BF16)
    yield LinearCase(*large, r, BF16)


def _lora_cases(large: Shape) -> Iterator[LinearCase]:
    yield from _linear_cases(16, large)
    m, n, k = SHAPES[3]
    for weight in ("dense", "nf4"):
        for p in (0.0, 0.05, 0.5):
            for adapter in (BF16, torch.float32):
                yield LinearCase(m, n, k, 16, BF16, weight=weight, dropout_p=p, adapter_dtype=adapter, bias=True)
    for r in (1, 8, 40, 64):
        yield LinearCase(m, n, k, r, BF16, weight="dense", dropout_p=0.1)
    yield LinearCase(m, n, k, 16, BF16, weight="dense", contiguous=False, dropout_p=0.1)
    yield LinearCase(m, n, k, 16, BF16, weight="dense", zero_b=True)
    yield LinearCase(*large, 16, BF16, weight="dense", dropout_p=0.05)


def _linear(case: LinearCase, device: str) -> str | None:
    inputs = case.inputs(device)
    first, second = run_ours(inputs), run_ours(inputs)
    try:
        assert_right(inputs, first)
    except AssertionError as error:
        return str(error)
    differ = [name for name, t in first.items() if not torch.equal(t, second[name])]
    return f"a second run differs in {', '.join(differ)}" if differ else None


def _few_tokens_cases(large: Shape) -> Iterator[LinearCase]:
    for m in (1, 8, 9, 16, 17, 33, 64):  # on both sides of every tile of tokens; K leaves half a step, N part of a tile
        yield LinearCase(m, 200, 448, dtype=BF16 if m % 2 else torch.float16, double_quant=m < 16, bias=True, seed=m)
    for m in (1, 64):
        yield LinearCase(m, *large[1:], dtype=BF16, double_quant=True)
    yield LinearCase(3, 200, 97, dtype=BF16, double_quant=True)


def _forward(case: LinearCase, device: str) -> str | None:
    """y alone, for backends that have no backward."""
    inputs = case.inputs(device)
    with torch.no_grad():
        first, second = (nf4_linear(inputs.x, inputs.nf4, inputs.bias) for _ in range(2))
    if wrong := errors(inputs, {"y": first})["y"].wrong:
        return wrong
    return None if torch.equal(first, second) else "a second run differs"


def _kstep_cases(large: Shape) -> Iterator[LinearCase]:
    m, n, k = SHAPES[3]
    for p in (0.0, 0.1):
        yield LinearCase(m, n, k, 16, BF16, weight="dense", dropout_p=p, adapter_dtype=torch.float32, bias=True)
        yield LinearCase(*large, 16, BF16, weight="dense", dropout_p=p)
    for shape in SHAPES[:3]:
        yield LinearCase(*shape, 16, torch.float16, weight="dense", dropout_p=0.1)
    for r in (1, 40, 128):
        yield LinearCase(m, n, k, r, BF16, weight="dense", dropout_p=0.1)
    yield LinearCase(m, n, k, 16, BF16, weight="dense", contiguous=False, batch=(2,), dropout_p=0.1)
    yield LinearCase(0, n, k, 16, BF16, weight="dense")


def _on_kstep(case: LinearCase, device: str) -> str | None:
    with force(kstep_min_m=0):
        return _linear(case, device)


def _quantize(
    dtype: torch.dtype, block_size: int, double_quant: bool, shape: tuple[int, ...], device: str
) -> str | None:
    w = codec_weight(*shape, dtype=dtype, ill_scaled=True, seed=block_size)
    q = quantize_nf4(w.to(device), block_size=block_size, double_quant=double_quant)
    if wrong := wrong_quantization(w.to(device), q):
        return wrong
    if device == "cpu" or double_quant:  # the mean that double quantization subtracts may be summed in another order
        return None
    on_cpu = quantize_nf4_reference(w, block_size)
    same = torch.equal(q.packed.cpu(), on_cpu[0]) and torch.equal(q.absmax.cpu(), on_cpu[1])
    return None if same else "bytes differ from those of the reference on the CPU"


def quantize_nf4_reference(w: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's bytes, whatever backend is in force."""
    from lora_ops.quant.nf4.codec.reference import quantize_nf4 as reference

    return reference(w, block_size)


def _dequantize(dtype: torch.dtype, double_quant: bool, out: bool, shape: tuple[int, int], device: str) -> str | None:
    case = LinearCase(1, shape[0], shape[1], dtype=dtype, double_quant=double_quant, ill_scaled=True)
    q = case.inputs(device).nf4
    expected = rounded_weight(q, dtype)
    got = dequantize_nf4(q, out=torch.full_like(expected, float("nan"))) if out else dequantize_nf4(q, dtype=dtype)
    differ = int((got != expected).sum())
    return f"{differ} of {expected.numel()} values differ from code · absmax rounded" if differ else None


def _blockwise8(signed: bool, n: int, device: str) -> str | None:
    x = codec_weight(n, ill_scaled=True, seed=n, device=device)
    x = x if signed else x.abs()
    codes, absmax = quantize_blockwise8(x, signed=signed)
    unit = absmax.double().repeat_interleave(256)[:n].clamp_min(1e-300)
    code_map = dynamic_map(signed).to(device).double()
    v = x.double() / unit
    nearest = code_map[torch.bucketize(v, (code_map[:-1] + code_map[1:]) / 2)]
    excess = (v - code_map[codes.long()]).abs() - (v - nearest).abs()
    far = int((excess > 1e-6).sum())
    if far:
        return f"{far} of {n} codes are not the nearest"
    got = dequantize_blockwise8(codes, absmax, signed=signed)
    expected = dynamic_map(signed).to(device)[codes.long()] * absmax.repeat_interleave(256)[:n]
    return None if torch.equal(got, expected) else "dequantized values differ from map[code] · absmax"


def _adamw(bits: int, dtype: torch.dtype, grad_dtype: torch.dtype, seed: int | None, device: str) -> str | None:
    """Three slices of one launch and one more for another dtype, two steps: the bits of the reference on the CPU."""
    from lora_ops.kernels.adamw.operands import Slices
    from lora_ops.kernels.adamw.reference import adamw_ as reference

    rows = torch.tensor([adamw_constants(t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1) for t in (1, 2)])
    names = ("param", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
    n_of = (70_001, 256, 5000, 300)
    results = []
    for where, ours in ((device, True), ("cpu", False)):
        slices = []
        for i, n in enumerate(n_of):
            g = torch.Generator().manual_seed(n)
            p = torch.randn(n, generator=g).to(torch.float32 if i == 3 else dtype)
            grad = torch.randn(n, generator=g).to(torch.float32 if i == 3 else grad_dtype)
            codes = (torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8))  # zeros
            states = (torch.zeros(n), torch.zeros(n), None, None)
            coded = (*codes, torch.zeros(-(-n // 256)), torch.zeros(-(-n // 256)))
            tensors = [t if t is None else t.to(where) for t in (p, grad, *(coded if bits == 8 else states))]
            slices.append(Slice(*tensors, stream=i, first=256 * i))  # type: ignore[arg-type]
        for step in (1, 2):
            if not ours:
                absmaxes = [a for s in slices for a in (s.exp_avg_absmax, s.exp_avg_sq_absmax) if a is not None]
                index = torch.tensor([[step - 1, s.stream, step, s.first] for s in slices])
                lists = ([getattr(s, name) for s in slices] for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
                reference(slices=Slices(*lists, absmaxes, rows, index, seed))
            else:
                for s in slices:
                    s.row, s.step = step - 1, step
                adamw_(slices, [tuple(row) for row in rows.tolist()], seed=seed)
        results.append([{name: getattr(s, name) for name in names} for s in slices])
    for n, got, expected in zip(n_of, *results, strict=True):
        for name in names:
            if expected[name] is not None and not torch.equal(got[name].cpu(), expected[name]):
                return f"{int((got[name].cpu() != expected[name]).sum())} values of {name} [{n}] differ"
    return None


def _checks(large: Shape) -> dict[str, dict[str, Check]]:
    linear: dict[str, Check] = {c.id: functools.partial(_linear, c) for c in _linear_cases(0, large)}
    linear |= {f"y, {c.id}": functools.partial(_forward, c) for c in _few_tokens_cases(large)}
    dense = [LinearCase(**{**vars(c), "weight": "dense"}) for c in _linear_cases(0, large)]
    frozen: dict[str, Check] = {c.id: functools.partial(_linear, c) for c in dense}
    lora: dict[str, Check] = {c.id: functools.partial(_linear, c) for c in _lora_cases(large)}
    lora |= {f"K-step, {c.id}": functools.partial(_on_kstep, c) for c in _kstep_cases(large)}
    quantize: dict[str, Check] = {
        f"{shape} {dtype} block {block} double {dq}": functools.partial(_quantize, dtype, block, dq, shape)
        for dtype in FLOATS
        for block, dq in ((64, False), (64, True), (32, False), (4096, False))
        for shape in ((64, 96), (1000, 33), (512, 1024))
    }
    dequantize: dict[bool, dict[str, Check]] = {
        out: {
            f"{shape} {dtype} double {dq}": functools.partial(_dequantize, dtype, dq, out, shape)
            for dtype in FLOATS
            for dq in (False, True)
            for shape in ((64, 96), (33, 130), (512, 1024))
        }
        for out in (False, True)
    }
    blockwise8: dict[str, Check] = {
        f"n={n} signed={signed}": functools.partial(_blockwise8, signed, n)
        for n in (1, 256, 1000, 70_000)
        for signed in (True, False)
    }
    floats = [(p, g) for p in FLOATS for g in dict.fromkeys((p, torch.float32))]
    adamw: dict[str, Check] = {
        f"{bits}-bit {p} {g} seed {seed}": functools.partial(_adamw, bits, p, g, seed)
        for bits in (32, 8)
        for p, g in floats
        for seed in ((None, 5) if p == BF16 else (None,))
    }
    return {
        "adamw_": adamw,
        "nf4_linear": linear,
        "nf4_linear_dx": linear,
        "frozen_linear": frozen,
        "frozen_linear_dx": frozen,
        "lora_linear": lora,
        "lora_linear_backward": lora,
        "quantize_nf4": quantize,
        "dequantize_nf4": dequantize[False],
        "dequantize_nf4_out": dequantize[True],
        "quantize_blockwise8": blockwise8,
        "dequantize_blockwise8": blockwise8,
    }


CHECKS = _checks(LARGE)
CPU_CHECKS = _checks(LARGE_ON_CPU)


def checks_on(device_type: str) -> dict[str, dict[str, Check]]:
    """The checks of a GPU, or of a dry run: the same cases but for the size of the real layer."""
    return CPU_CHECKS if device_type == "cpu" else CHECKS
