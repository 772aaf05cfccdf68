"""AdamW's update: every backend and instruction set gives the reference's bits; codes are exactly nearest."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_ops
from lora_ops.kernels.adamw import Slice, adamw_, constants
from lora_ops.kernels.adamw.reference import update
from lora_ops.quant.blockwise8.reference import dequantize_blockwise8, dynamic_map, quantize_blockwise8
from lora_ops.runtime import native

ROWS = [
    constants(1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    constants(70, lr=0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3, maximize=True),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(n: int, bits: int, dtype: torch.dtype, grad_dtype: torch.dtype, seed: int, **place: int) -> Slice:
    """A slice in the middle of a training."""
    g = torch.Generator().manual_seed(seed)
    p, grad, m = (torch.randn(n, generator=g) for _ in range(3))
    v = torch.randn(n, generator=g).square() * 10 ** (torch.rand(n, generator=g) * 6 - 6)
    grad[torch.rand(n, generator=g) < 0.1] = 0.0
    if bits == 32:
        return Slice(p.to(dtype), grad.to(grad_dtype), m, v, None, None, **place)
    (m, m_absmax), (v, v_absmax) = quantize_blockwise8(m, 256, True), quantize_blockwise8(v, 256, False)
    return Slice(p.to(dtype), grad.to(grad_dtype), m, v, m_absmax, v_absmax, **place)


def copy(s: Slice) -> Slice:
    fields = {name: getattr(s, name) for name in s.__slots__}
    return Slice(**{k: t.clone() if isinstance(t, Tensor) else t for k, t in fields.items()})


def assert_same(a: Slice, b: Slice) -> None:
    for name in a.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Tensor):
            as_bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]
            assert torch.equal(x.view(as_bits), y.view(as_bits)), name


def run(slices: list[Slice], backend: str, seed: int | None = None) -> list[Slice]:
    done = [copy(s) for s in slices]
    with lora_ops.use_backend(backend):
        adamw_(done, ROWS, seed=seed)
    return done


slices = st.builds(
    make,
    n=st.sampled_from([0, 1, 15, 255, 256, 257, 1000, 4099]),
    bits=st.sampled_from([32, 8]),
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    row=st.integers(0, 1),
    stream=st.integers(0, 2**31),
    step=st.integers(1, 10**6),
    first=st.sampled_from([0, 256, 2**36]),
)


@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else [])
@settings(max_examples=30)
@given(many=st.lists(slices, min_size=1, max_size=4), seed=st.sampled_from([None, 0, 2**63 - 1]))
def test_native_equals_reference(isa: str, many: list[Slice], seed: int | None) -> None:
    with native.force_isa(isa):
        ours = run(many, "native", seed)
    for a, b in zip(ours, run(many, "reference", seed), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else [])
@pytest.mark.parametrize("size", [0.0, 1e-21, 1e-19, 1e-38, 1e18])
def test_states_at_the_ends_of_the_range(isa: str, size: float) -> None:
    """Blocks whose second moment is zero, subnormal or near overflow: the reciprocal of its absmax is not finite."""
    s = make(600, 8, torch.float32, torch.float32, 3)
    s.grad *= size
    s.exp_avg[:] = 127  # zero
    s.exp_avg_sq[:] = 0
    with native.force_isa(isa):
        ours = run([s], "native")[0]
    assert_same(ours, run([s], "reference")[0])
    assert ours.param.isfinite().all()


def test_threads_do_not_change_bits(backend: str) -> None:
    many = [make(n, 8, torch.bfloat16, torch.float32, n, first=256) for n in (100_003, 17, 70_000)]
    before = torch.get_num_threads()
    one = run(many, backend, 5)
    torch.set_num_threads(3)
    three = run(many, backend, 5)
    torch.set_num_threads(before)
    for a, b in zip(one, three, strict=True):
        assert_same(a, b)


@given(s=slices)
def test_pieces_equal_the_whole(s: Slice) -> None:
    """Cut at blocks, as pages are: the same bits."""
    n = s.param.numel()
    cut = n // 2 // 256 * 256
    whole = run([s], "auto", 9)[0]
    parts = copy(s)
    pieces = []
    for first, end in ((0, cut), (cut, n)):
        absmax = slice(first // 256, -(-end // 256))
        pieces.append(Slice(
            *(t[first:end] for t in (parts.param, parts.grad, parts.exp_avg, parts.exp_avg_sq)),
            *(None if t is None else t[absmax] for t in (parts.exp_avg_absmax, parts.exp_avg_sq_absmax)),
            row=s.row, stream=s.stream, step=s.step, first=s.first + first,
        ))  # fmt: skip
    adamw_(pieces, ROWS, seed=9)
    assert_same(parts, whole)


def test_codes_are_exactly_nearest_and_keep_their_sign(backend: str) -> None:
    """Against rational arithmetic, for states that the update leaves in fp32."""
    s = make(512, 8, torch.float32, torch.float32, 3)
    s.grad[:40] = 0.0
    s.exp_avg[:20] = 127  # the code of zero
    done = run([s], backend)[0]
    for codes, absmax, new, new_absmax, signed in (
        (s.exp_avg, s.exp_avg_absmax, done.exp_avg, done.exp_avg_absmax, True),
        (s.exp_avg_sq, s.exp_avg_sq_absmax, done.exp_avg_sq, done.exp_avg_sq_absmax, False),
    ):
        assert absmax is not None
        assert new_absmax is not None
        m = dequantize_blockwise8(s.exp_avg, s.exp_avg_absmax, 256, True)
        v = dequantize_blockwise8(s.exp_avg_sq, s.exp_avg_sq_absmax, 256, False)
        update(s.param.clone(), s.grad, m, v, torch.tensor(ROWS[0]))
        x = m if signed else v
        scale = x.view(-1, 256).abs().amax(1)
        assert torch.equal(new_absmax, scale)
        scaled = (x.view(-1, 256) * (1 / scale)[:, None]).clamp(-1, 1).view(-1)
        table = [Fraction(c) for c in dynamic_map(signed).tolist()]
        nearest = [min(range(256), key=lambda c, y=y: (abs(Fraction(y) - table[c]), c)) for y in scaled.tolist()]
        assert new.tolist() == nearest
        values = dynamic_map(signed)[new.int()]
        assert bool((values[x == 0] == 0).all())
        assert bool((values * x >= 0).all())
        assert codes.shape == new.shape


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("bits", [32, 8])
def test_nonfinite_gradients_are_loud(bad: float, bits: int, backend: str) -> None:
    """The element, and with 8 bits its block from the next step on, is NaN; other blocks are untouched by it."""
    s = make(1000, bits, torch.float32, torch.float32, 0)
    s.grad[300] = bad
    once = run([s], backend)[0]
    s.grad[300] = 0.0
    once.grad[300] = 0.0
    twice, clean = run([once], backend)[0], run(run([s], backend), backend)[0]
    assert twice.param[300].isnan()
    poisoned = slice(300, 301) if bits == 32 else slice(256, 512)
    assert bool(twice.param[poisoned].isnan().all())
    for part in (slice(0, 256), slice(512, 1000)):
        assert torch.equal(twice.param[part], clean.param[part])


def test_zero_gradients_leave_zero_states(backend: str) -> None:
    s = Slice(
        torch.ones(512), torch.zeros(512), torch.zeros(512, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8),
        torch.zeros(2), torch.zeros(2),
    )  # fmt: skip
    done = run([s], backend)[0]
    assert torch.equal(done.param, torch.full((512,), ROWS[0][0]))
    assert bool((dynamic_map(True)[done.exp_avg.int()] == 0).all())
    assert bool((dynamic_map(False)[done.exp_avg_sq.int()] == 0).all())


def test_errors() -> None:
    s = make(300, 8, torch.float32, torch.float32, 0)
    adamw_([], ROWS)
    for name, value, message in (
        ("grad", torch.ones(299), "slice 0: grad: expected 300 elements, got 299"),
        ("exp_avg_absmax", torch.ones(1), "slice 0: exp_avg_absmax: expected 2 elements, got 1"),
        ("exp_avg_sq", torch.ones(300), "slice 0: exp_avg_sq: expected dtype uint8, got float32"),
        ("exp_avg_absmax", None, "slice 0: exp_avg_absmax: expected a tensor with 8-bit codes"),
        ("row", 2, "slice 0: row: expected one of 2, got 2"),
        ("first", 8, "slice 0: first: expected a multiple of 256, got 8"),
        ("param", torch.ones(300, dtype=torch.float64), "slice 0: param: expected dtype float32, float16, bfloat16"),
        ("param", torch.ones(600)[::2], "slice 0: param: expected a contiguous tensor"),
    ):
        wrong = copy(s)
        setattr(wrong, name, value)
        with pytest.raises(ValueError, match=message):
            adamw_([wrong], ROWS)


def test_opcheck(backend: str) -> None:
    s = make(300, 8, torch.float32, torch.float32, 0)
    args = (
        [s.param], [s.grad], [s.exp_avg], [s.exp_avg_sq], [s.exp_avg_absmax, s.exp_avg_sq_absmax],
        torch.tensor(ROWS), torch.tensor([[0, 0, 1, 0]]), None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.lora_ops.adamw_.default, args)
