"""lora_linear and nf4_linear with one line changed: each change must fail the proof that is there for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_ops.kernels.lora_linear import triton_gemm as lora_gemm
from lora_ops.kernels.lora_linear import triton_impl as lora
from lora_ops.kernels.lora_linear import triton_skinny as skinny
from lora_ops.quant.nf4.linear import triton_gemm as nf4_gemm
from lora_ops.quant.nf4.linear import triton_impl as nf4
from lora_ops.runtime.crossovers import force
from tests.cases import LinearCase, assert_right, run_ours
from tests.gpu_proof import registry
from tests.gpu_proof.interpreted.test_addresses import LARGE, large_launches
from tests.gpu_proof.interpreted.test_lora_linear import NEVER, elements_moved
from tests.gpu_proof.interpreter import OutOfBounds, count_traffic, run_virtually
from tests.gpu_proof.mutant import mutant

Break = Callable[..., None]


@pytest.fixture(autouse=True)
def _nan_filled() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Break:
    """broken(kernels, (old, new)): the ops' launchers come from a mutant of the module `kernels`."""

    def install(kernels: ModuleType, *changes: tuple[str, str]) -> None:
        changed = mutant(kernels, tmp_path, *changes)
        for user in (lora, nf4):
            for name, value in list(vars(user).items()):
                if getattr(value, "__module__", None) == kernels.__name__ and hasattr(changed, name):
                    monkeypatch.setattr(user, name, getattr(changed, name))

    return install


def within(line: str, old: str, new: str) -> tuple[str, str]:
    """A change of `old` to `new` where it stands in `line`."""
    assert old in line
    return line, line.replace(old, new)


SMALL = LinearCase(m=40, n=70, k=300, r=8, dtype=torch.bfloat16, weight="dense", dropout_p=0.3, bias=True)
NF4_WIDE = LinearCase(m=20, n=70, k=192, dtype=torch.bfloat16, double_quant=True)
NF4_RAGGED = LinearCase(m=20, n=70, k=97, dtype=torch.bfloat16, double_quant=True)
NF4_ONE = LinearCase(m=1, n=70, k=576, dtype=torch.bfloat16, double_quant=True)


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
@pytest.mark.parametrize("case", [SMALL, NF4_WIDE, NF4_RAGGED, NF4_ONE], ids=lambda c: c.id)
def test_unbroken(case: LinearCase, kstep_min_m: int) -> None:
    """What the tests below fail on passes."""
    with force(kstep_min_m=kstep_min_m):
        assert_right(case.inputs(), run_ours(case.inputs()))


# lora_linear.

LOAD_OF_ROWS = "x = _load_x(x_ptr, rows, k, M, K, stride_xm, seed_ptr, threshold, DROPOUT, BLOCK_M, BLOCK_K)"
LOAD_OF_COLUMNS = LOAD_OF_ROWS.replace(" k,", " first,")
LOAD_OF_BOTH = "dy = _load_x(dy_ptr, rows, first, M, N, stride_dym, dy_ptr, 0, False, BLOCK_M, BLOCK_N)"


@pytest.mark.parametrize(
    ("kernel", "operand", "load"),
    [
        ("reduce_rows", "x", LOAD_OF_ROWS),
        ("reduce_columns", "x", LOAD_OF_COLUMNS),
        ("reduce_both", "dy", LOAD_OF_BOTH),
    ],
    ids=["x forward", "x backward", "dY"],
)
def test_lora_linear_that_reads_twice(broken: Break, kernel: str, operand: str, load: str) -> None:
    before, counts = elements_moved(0, 0.1)
    broken(skinny, (load, f"{load} * 0.5 + {load.removeprefix(f'{operand} = ')} * 0.5"))
    after, broken_counts = elements_moved(0, 0.1)
    assert (before, after) == (3, 4)
    reads = kernel, "load", f"{operand}_ptr"
    assert broken_counts[reads] == 2 * counts[reads]


COUNTER = "keep_mask(tl.load(seed_ptr), rows, first_column, threshold, 0,"
LOAD_OF_DS = "(rows < M)[:, None] & (ranks < limit)[None, :],\n            other"
STORE_OF_Y = "acc.to(dtype), (rows < M)[:, None] & (columns < N)"
GEMMS = "_expand_kernel|_lora_gemm_kernel"


@pytest.mark.parametrize(
    ("kernels", "change", "wrong"),
    [
        (skinny, within(COUNTER, "first_column", "0"), "y"),  # each tile draws the mask of the first
        (skinny, within(COUNTER, " 0,", " 1,"), "y"),
        (lora_gemm, within(COUNTER, "first_column", "0"), "dx"),
        (lora_gemm, within(COUNTER, "rows", "rows + 1"), "dx"),
        (lora_gemm, ("acc = tl.where(keep, acc, 0.0)", "acc = tl.where(keep, acc, acc)"), "dx"),
        (lora_gemm, ("scalar(scale, SCALE_POINTER) * keep_scale", "scalar(scale, SCALE_POINTER)"), "dx"),
        (skinny, within(LOAD_OF_DS, "rows < M", "rows < M - 1"), "dlora"),
        (lora_gemm, within("if ODD_RANK:\n            s = tl.where", "ODD_RANK", "False"), "y"),
    ],
    ids=[
        "x column",
        "x offset",
        "dX column",
        "dX row",
        "dX without a mask",
        "dX without 1 / (1 - p)",
        "last row lost",
        "ranks beyond R",
    ],
)
@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
def test_lora_linear_with_wrong_values(
    broken: Break, kstep_min_m: int, kernels: ModuleType, change: tuple[str, str], wrong: str
) -> None:
    i = SMALL.inputs()
    broken(kernels, change)
    with force(kstep_min_m=kstep_min_m), pytest.raises(AssertionError, match=rf" {wrong}\w*: (RMS )?error"):
        assert_right(i, run_ours(i))


@pytest.mark.parametrize(
    ("kernels", "change", "kernel"),
    [
        (skinny, within("(columns < K)[None, :]\n    x = tl.load", "<", "<="), "_reduce_"),
        (skinny, within("inside = (rows < M)[:, None]", "<", "<="), "_reduce_"),
        (skinny, within("tl.minimum(ranks, R - 1)", "R - 1", "R"), "_reduce_"),
        (skinny, within("at < n, other=0.0)", "<", "<="), "_add_partials_kernel"),
        (lora_gemm, within(STORE_OF_Y, "rows <", "rows <="), GEMMS),
        (lora_gemm, within("mask=columns < N, other", "<", "<="), GEMMS),
        (lora_gemm, within("tl.minimum(ranks, R - 1)", "R - 1", "R"), GEMMS),
    ],
    ids=["x column", "x row", "rank", "partial sums", "y row", "bias", "rank of the low-rank term"],
)
@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
def test_lora_linear_with_a_wide_mask(
    broken: Break, kstep_min_m: int, kernels: ModuleType, change: tuple[str, str], kernel: str
) -> None:
    broken(kernels, change)
    with force(kstep_min_m=kstep_min_m), pytest.raises(OutOfBounds, match=kernel):
        run_ours(SMALL.inputs())


@pytest.mark.parametrize("kstep_min_m", [NEVER, 0], ids=["beta1", "kstep"])
def test_lora_linear_with_a_narrow_mask(broken: Break, kstep_min_m: int) -> None:
    broken(lora_gemm, within(STORE_OF_Y, "columns < N", "columns < N - 1"))
    i = SMALL.inputs()
    with force(kstep_min_m=kstep_min_m), pytest.raises(AssertionError, match="40 of 2800 values are NaN"):
        assert_right(i, run_ours(i))


# Addresses of more than 2^31 elements.


def overflows(op: str) -> set[str]:
    """Kernels that leave their tensors in the op's `huge` gate cases and in test_addresses.LARGE."""
    launches = [s.launch for s in registry.shipped_by(op) if s.case.huge]
    launches += [launch for name in LARGE[op] for launch in large_launches(op, name)]
    found = set()
    for launch in launches:
        try:
            run_virtually(launch)
        except OutOfBounds:  # noqa: PERF203
            found.add(launch.kernel.__name__)
    return found


TO_INT64 = ".to(tl.int64)"


@pytest.mark.parametrize(
    ("op", "kernels", "change", "kernel"),
    [
        ("lora_linear", skinny, within("x_ptr + rows.to(tl.int64)[:, None] * stride_xm", TO_INT64, ""), "_reduce_rows"),
        ("lora_linear", lora_gemm, within("y_at = rows.to(tl.int64)", TO_INT64, ""), "_expand"),
        ("lora_linear", lora_gemm, within("x_ptr + rows.to(tl.int64)", TO_INT64, ""), "_lora_gemm"),
        ("nf4_linear", nf4_gemm, within("tl.program_id(0).to(tl.int64) * BLOCK_N", TO_INT64, ""), "_nf4_gemv"),
        ("nf4_linear", nf4_gemm, within("tl.arange(0, ROWS)).to(tl.int64)", TO_INT64, ""), "_nf4_gemm"),
        ("lora_linear", lora_gemm, within("columns.to(tl.int64)[None, :] * stride_wn", TO_INT64, ""), "_lora_gemm"),
        ("lora_linear", lora_gemm, within("ks.to(tl.int64)[:, None] * stride_wk", TO_INT64, ""), "_lora_gemm"),
        ("lora_linear", lora_gemm, within(" s_at = rows.to(tl.int64)", TO_INT64, ""), "_expand"),
        ("lora_linear", skinny, within("ds_ptr + rows.to(tl.int64)", TO_INT64, ""), "_reduce_columns"),
        ("lora_linear", skinny, within("s_rows = split.to(tl.int64)", TO_INT64, ""), "_reduce_rows"),
        ("lora_linear", skinny, within("block.to(tl.int64) * M * R", TO_INT64, ""), "_reduce_both"),
        ("nf4_linear", nf4_gemm, within("tokens.to(tl.int64)", TO_INT64, ""), "_nf4_gemv"),
        ("nf4_linear", nf4_gemm, within("x_ptr + rows.to(tl.int64)", TO_INT64, ""), "_nf4_gemm"),
        ("nf4_linear", nf4_gemm, within("y_at = rows.to(tl.int64)", TO_INT64, ""), "_nf4_gemm"),
    ],
    ids=[
        "x",
        "y",
        "K-step x",
        "W gemv",
        "W gemm",
        "K-step W",
        "K-step W of dX",
        "S expanded",
        "dS of dA",
        "S",
        "dS in parts",
        "x gemv",
        "x gemm",
        "y gemm",
    ],
)
def test_int32_addresses(broken: Break, op: str, kernels: ModuleType, change: tuple[str, str], kernel: str) -> None:
    broken(kernels, change)
    assert f"{kernel}_kernel" in overflows(op)


# nf4_linear.

LOAD_OF_W = (
    "at = first_column // 2 + tl.arange(0, COLUMNS // 2)\n        inside = (rows < N)[:, None] & (at < row_bytes)"
)
LOAD_OF_W_GEMV = "at = k // 2 + tl.arange(0, HALF)\n        inside = (rows < N)[:, None] & (at < row_bytes)"
COLUMN_RAGGED, ROW_RAGGED = "tl.arange(0, COLUMNS), K - 1)", "tl.minimum(rows, N - 1)"
LOAD_OF_X_GEMV = "(columns < K)[None, :], other=0.0).to(tl.float32)"
STORE = "acc.to(y_ptr.dtype.element_ty), inside)"


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (NF4_WIDE, ("tl.join(even * absmax, odd * absmax)", "tl.join(odd * absmax, even * absmax)")),
        (NF4_RAGGED, ("4 - element % 2 * 4", "element % 2 * 4")),
        (NF4_ONE, ("even[None, :, :] * x_even[:, None, :]", "odd[None, :, :] * x_even[:, None, :]")),
        (NF4_WIDE, ("block = rows[:, None] * row_blocks", "block = (rows[:, None] + 1) % N * row_blocks")),
        (NF4_WIDE, ("begin = split * per_split", "begin = split * per_split + BLOCK_I * (split > 0)")),
    ],
    ids=["nibble", "nibble ragged", "nibble gemv", "scale of the next row", "split begins late"],
)
def test_nf4_linear_with_wrong_values(broken: Break, case: LinearCase, change: tuple[str, str]) -> None:
    i = LinearCase(**{**vars(case), "block_size": 32}).inputs()
    broken(nf4_gemm, change)
    with pytest.raises(AssertionError, match=r" (y|dx): (RMS )?error"):
        assert_right(i, run_ours(i))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (NF4_WIDE, within(LOAD_OF_W, "rows <", "rows <=")),
        (NF4_RAGGED, within(COLUMN_RAGGED, "K - 1", "K")),
        (NF4_RAGGED, within(ROW_RAGGED, "N - 1", "N")),
        (NF4_ONE, within(LOAD_OF_W_GEMV, "at <", "at <=")),
        (NF4_ONE, within(LOAD_OF_X_GEMV, "<", "<=")),
        (NF4_WIDE, within(STORE, "inside", "(rows <= M)[:, None] & (columns < J)[None, :]")),
    ],
    ids=["row", "column ragged", "row ragged", "gemv byte", "gemv x", "y"],
)
def test_nf4_linear_with_a_wide_mask(broken: Break, case: LinearCase, change: tuple[str, str]) -> None:
    broken(nf4_gemm, change)
    with pytest.raises(OutOfBounds, match="_nf4_ge"):
        run_ours(case.inputs())


def test_nf4_linear_that_reads_twice(broken: Break) -> None:
    i = LinearCase(m=1, n=64, k=1024, dtype=torch.bfloat16).inputs()
    with count_traffic() as once:
        run_ours(i)
    load = "packed = tl.load(packed_ptr + rows[:, None] * row_bytes + at[None, :], mask=inside, other=0)"
    broken(nf4_gemm, (load, f"{load}\n        packed |= {load.removeprefix('packed = ')}"))
    with count_traffic() as twice:
        run_ours(i)
    for kernel in ("_nf4_gemv_kernel", "_nf4_gemm_kernel"):  # y and dX
        assert twice.kernels[kernel].loaded - once.kernels[kernel].loaded == i.nf4.packed.nbytes
