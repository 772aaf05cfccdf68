"""lora_linear's kernels against float64 on both routes: gradients, masks, passes over activations, repeatability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ops
from lora_ops.functional import lora_linear
from lora_ops.kernels.lora_linear import triton_impl, triton_skinny
from lora_ops.kernels.lora_linear.operands import Adapter, Needs
from lora_ops.kernels.philox import dropout_mask, keep_scale
from lora_ops.runtime.crossovers import force
from lora_ops.runtime.triton_launch import pretend_capability, record_launches
from tests.cases import LinearCase, assert_right, in_wider_rows, run_ours
from tests.gpu_proof import interpreter, traffic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEVER = 2**62

# Multiples of 16 have tiles of their own.
sizes = st.one_of(st.integers(1, 100), st.sampled_from(range(16, 113, 16)))

cases = st.builds(
    LinearCase,
    m=st.integers(0, 70),
    n=sizes,
    k=sizes,
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, torch.float32]),
    weight=st.sampled_from(["dense", "nf4"]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    scale=st.sampled_from([0.0, 0.5, 2.0, 16.0]),
    batch=st.sampled_from([(), (), (2,)]),
    contiguous=st.booleans(),
    ill_scaled=st.booleans(),
    zero_b=st.booleans(),
    seed=st.integers(0, 2**31),
)


@pytest.fixture(autouse=True)
def _nan_filled() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
@settings(max_examples=20)
@given(case=cases)
def test_drawn(kstep_min_m: int, case: LinearCase) -> None:
    inputs = case.inputs()
    with force(kstep_min_m=kstep_min_m):
        assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [(150, 129, 399, 16), (150, 144, 400, 16), (1, 150, 600, 8), (70, 300, 70, 64), (70, 304, 80, 24)],
)
def test_several_blocks(dtype: torch.dtype, kstep_min_m: int, m: int, n: int, k: int, r: int) -> None:
    """Sizes that split the sums of every kernel."""
    inputs = LinearCase(
        m=m, n=n, k=k, r=r, dtype=dtype, weight="dense", adapter_dtype=torch.float32, dropout_p=0.1, bias=True
    ).inputs()
    with force(kstep_min_m=kstep_min_m):
        assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize(("m", "n", "k", "r"), [(150, 129, 399, 16), (70, 144, 448, 8), (1, 150, 600, 200)])
def test_on_fma_units(m: int, n: int, k: int, r: int, weight: str) -> None:
    """float16 as on a T4: the tiles of float32, and no kernel that needs matrix instructions, not even if forced."""
    inputs = LinearCase(m=m, n=n, k=k, r=r, dtype=torch.float16, weight=weight, dropout_p=0.1, bias=True).inputs()
    with pretend_capability((7, 5)), force(kstep_min_m=0), record_launches() as recorder:
        assert_right(inputs, run_ours(inputs))
    assert not {"_lora_gemm_kernel", "_reduce_both_kernel"} & {call.kernel.__name__ for call in recorder.launches}
    rows = next(call for call in recorder.launches if call.kernel.__name__ == "_reduce_rows_kernel")
    assert rows.meta["BLOCK_K"] == 16


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
@pytest.mark.parametrize("r", [8, 64])
def test_rows_with_gaps(r: int, kstep_min_m: int) -> None:
    """Columns of a wider x and dY are read where they lie, without a copy."""
    case = LinearCase(m=40, n=70, k=50, r=r, dtype=torch.bfloat16, weight="dense", dropout_p=0.1)
    inputs = in_wider_rows(case.inputs())
    with force(kstep_min_m=kstep_min_m):
        assert_right(inputs, run_ours(inputs))


def test_more_rows_than_a_group_of_blocks() -> None:
    """The K-step route numbers its programs by groups of 8 blocks of rows: whole groups, and one that is cut off."""
    case = LinearCase(m=2 * 8 * 128 + 70, n=150, k=20, r=4, dtype=torch.bfloat16, weight="dense", bias=True)
    inputs = case.inputs()
    with force(kstep_min_m=0):
        assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
@pytest.mark.parametrize(("n", "k"), [(70, 50), (80, 48)], ids=["odd", "even"])
@pytest.mark.parametrize("r", [64, 65, 128, 255, 256])
def test_large_ranks(r: int, n: int, k: int, kstep_min_m: int) -> None:
    inputs = LinearCase(m=33, n=n, k=k, r=r, dtype=torch.bfloat16, weight="dense", dropout_p=0.1, bias=True).inputs()
    with force(kstep_min_m=kstep_min_m):
        assert_right(inputs, run_ours(inputs))


def test_large_m_decodes_to_a_temporary() -> None:
    inputs = LinearCase(m=40, n=70, k=128, r=8, dtype=torch.bfloat16, dropout_p=0.1, bias=True).inputs()
    with force(nf4_gemv_max_m=0, nf4_gemm_max_m=0):
        assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_documented_mask(dtype: torch.dtype, kstep_min_m: int) -> None:
    """With W = 0, A = I and B = I the layer is dropout itself, forward and backward."""
    x = torch.randn(70, 40).to(dtype).requires_grad_()
    eye = torch.eye(40)
    with force(kstep_min_m=kstep_min_m):
        y = lora_linear(
            x, torch.zeros(40, 40, dtype=dtype), eye.to(dtype), eye.to(dtype), scale=1.0, dropout_p=0.3, seed=11
        )  # fmt: skip
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask = dropout_mask(slice(0, 70), 40, 0.3, torch.tensor(11))
    assert torch.equal(y != 0, mask)
    assert torch.equal(dx, torch.where(mask, keep_scale(0.3), 0.0).to(dtype))


def test_fp32_adapter_gradients_are_not_rounded() -> None:
    i = LinearCase(m=64, n=48, k=96, r=8, dtype=torch.bfloat16, weight="dense", adapter_dtype=torch.float32).inputs()
    results = run_ours(i)
    for name in ("dlora_a", "dlora_b"):
        assert results[name].dtype == torch.float32
        assert not torch.equal(results[name], results[name].bfloat16().float())


def test_scale_is_read_by_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale on the GPU is passed as it is, since fetching it would wait; the results are those of the number."""
    i = LinearCase(m=50, n=70, k=40, r=8, dtype=torch.float16, weight="dense", dropout_p=0.1).inputs()
    by_value = run_ours(i)
    monkeypatch.setattr(triton_impl, "scale_argument", lambda scale, device: scale)
    for kstep_min_m in (NEVER, 0):
        with force(kstep_min_m=kstep_min_m):
            assert_right(i, run_ours(i))
    by_pointer = run_ours(i)
    assert all(torch.equal(by_value[name], by_pointer[name]) for name in by_value)


def test_scale_of_another_gpu() -> None:
    """Adapters spread over several GPUs may share one scale, which a kernel could not read there."""
    there, here = torch.device("cuda:0"), torch.device("cuda:1")
    with FakeTensorMode():
        for device in (there, here):
            scale = triton_skinny.scale_argument(torch.empty((), device=there), device)
            assert isinstance(scale, torch.Tensor)
            assert scale.device == device
    assert triton_skinny.scale_argument(torch.tensor(2.0), here) == 2.0


def test_saved_sum_of_any_strides() -> None:
    """S comes back as autograd kept it, and hooks that offload saved tensors may give it other strides."""
    i = LinearCase(m=50, n=70, k=40, r=8, dtype=torch.bfloat16, weight="dense").inputs()
    frozen = {"weight": i.weight, "adapter": Adapter(*i.adapter(), torch.tensor(2.0))}
    _, s = triton_impl.lora_linear(x=i.x, bias=None, **frozen)
    wide = torch.full((50, 16), torch.nan)
    wide[:, :8] = s
    needs = Needs(False, False, True, False)
    for kept in (wide[:, :8], s.T.contiguous().T):
        got = triton_impl.lora_linear_backward(dy=i.dy, x=None, s=kept, needs=needs, **frozen)
        expected = triton_impl.lora_linear_backward(dy=i.dy, x=None, s=s, needs=needs, **frozen)
        assert got.lora_b is not None
        assert torch.equal(got.lora_b, expected.lora_b)


def test_bitwise_repeatable() -> None:
    i = LinearCase(m=130, n=200, k=150, r=16, dtype=torch.bfloat16, weight="dense", dropout_p=0.1).inputs()
    first, second = run_ours(i), run_ours(i)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needs", [Needs(*(bool(i >> b & 1) for b in range(4))) for i in range(16)])
def test_only_what_is_needed_is_computed(needs: Needs) -> None:
    i = LinearCase(m=20, n=40, k=24, r=4, dtype=torch.float16, weight="dense", dropout_p=0.2, bias=True).inputs()
    frozen = {"weight": i.weight, "adapter": Adapter(*i.adapter(), torch.tensor(2.0), 0.2, i.seed)}
    _, s = triton_impl.lora_linear(x=i.x, bias=i.bias, **frozen)
    every = triton_impl.lora_linear_backward(dy=i.dy, x=i.x, s=s, needs=Needs(True, True, True, True), **frozen)
    with record_launches() as recorder:
        some = triton_impl.lora_linear_backward(dy=i.dy, x=i.x, s=s, needs=needs, **frozen)
    for need, got, expected in zip(needs, some, every, strict=True):
        assert (got is not None) == need
        if got is not None:
            torch.testing.assert_close(got, expected)
    reads = {launch.kernel.__name__ for launch in recorder.launches} - {"_add_partials_kernel"}
    if not any(needs[:3]):
        assert not reads
    assert ("_expand_kernel" in reads) == needs[0]


def test_declines() -> None:
    for case, reason in (
        (LinearCase(m=2, n=4, k=8, r=2, dtype=torch.float64, weight="dense"), "triton kernels have no float64"),
        (LinearCase(m=2, n=4, k=8, r=257, weight="dense"), "ranks up to 256, not 257"),
    ):
        with pytest.raises(lora_ops.BackendError, match=reason):
            run_ours(case.inputs())


# Passes over activations.


class _ReadsOfAddmm(TorchDispatchMode):
    """Counts in-place addmm: each reads its output once before it adds."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


@contextmanager
def count_elements() -> Iterator[Counter[tuple[str, str, str]]]:
    """Elements moved, by (kernel, load or store, name of the kernel's argument)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    original = interpreter._access

    def access(kind: str, ptrs: Any, mask: np.ndarray) -> None:
        original(kind, ptrs, mask)
        frame = interpreter._frames[-1]
        addresses = np.asarray(ptrs.data)[np.broadcast_to(mask, np.shape(ptrs.data)).astype(bool)]
        if addresses.size:
            i = np.searchsorted(frame.begins, addresses[:1], side="right")[0] - 1
            counts[frame.kernel.strip("_").removesuffix("_kernel"), kind, frame.names[i]] += addresses.size

    interpreter._access = access
    try:
        yield counts
    finally:
        interpreter._access = original


def elements_moved(kstep_min_m: int, dropout_p: float) -> tuple[float, Counter[tuple[str, str, str]]]:
    """Passes over an activation beside the frozen layer's own two products, and the elements that make them up."""
    m, n = 192, 256  # K = N, so that every activation has the same size
    i = LinearCase(m=m, n=n, k=n, r=16, dtype=torch.bfloat16, weight="dense", adapter_dtype=torch.float32).inputs()
    adapter = Adapter(*i.adapter(), torch.tensor(2.0), dropout_p, i.seed if dropout_p else None)
    frozen = {"weight": i.weight, "adapter": adapter}
    # The functions behind the ops: a dispatch mode does not see into an op.
    with force(kstep_min_m=kstep_min_m), count_elements() as counts, _ReadsOfAddmm() as addmm:
        _, s = triton_impl.lora_linear(x=i.x, bias=None, **frozen)
        triton_impl.lora_linear_backward(dy=i.dy, x=i.x, s=s, needs=Needs(True, True, True, False), **frozen)
    own = {("lora_gemm", kind, name) for kind, name in (("load", "x_ptr"), ("store", "y_ptr"))}
    moved = {key: count for key, count in counts.items() if key[2] in ("x_ptr", "dy_ptr", "y_ptr") and key not in own}
    return sum(moved.values()) / (m * n) + addmm.count, Counter(moved)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("kstep_min_m", "allowed"), [(0, 3), (NEVER, 7)], ids=["kstep", "beta1"])
def test_passes_over_activations(kstep_min_m: int, allowed: int, dropout_p: float) -> None:
    """The op moves each activation as often as triton_impl.py says."""
    passes, moved = elements_moved(kstep_min_m, dropout_p)
    assert passes == allowed, moved
    assert moved["reduce_rows", "load", "x_ptr"] == 192 * 256  # x, forward
    assert moved["reduce_both", "load", "dy_ptr"] == 192 * 256  # dY
    assert moved["reduce_columns", "load", "x_ptr"] == 192 * 256  # x, backward


def test_skinny_products_move_little_more_than_the_least() -> None:
    """Where no sum is split; `python -m tests.gpu_proof.traffic` counts a whole training shape."""
    for m, k, product, kernel in (
        (8192, 128, "S = drop(x) Aᵀ", "_reduce_rows_kernel"),
        (64, 16384, "dA = dSᵀ drop(x)", "_reduce_columns_kernel"),
    ):
        kernels, least = next((ks, least) for name, ks, least in traffic.skinny(m, k, 16, 0.0) if name == product)
        assert kernels[kernel].distinct <= 1.05 * least, kernels


def test_workspace_is_small() -> None:
    """Partial sums of one training shape stay below a sixth of the activation that they are sums of."""
    m, n, r = 8192, 4096, 16
    dy, b, s = (torch.empty(*shape, device="meta") for shape in ((m, n), (n, r), (m, r)))
    with record_launches(run=False) as recorder:
        triton_skinny.reduce_both(dy.bfloat16(), b, s, 1.0, torch.float32, sum_dtype=torch.bfloat16)
    both = recorder.launches[0]
    ds, db, sums = both.args[3:6]
    assert ds.nbytes + db.nbytes + sums.nbytes <= dy.numel() * 2 / 6
    # Written and read again, against the least of any split of one read into as many programs.
    assert 2 * (ds.nbytes + db.nbytes) <= 1.26 * traffic.least_partial_sums(m, n, r)
