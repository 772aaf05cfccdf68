"""The CUDA C++ kernels, run thread by thread on the CPU (tests/gpu_proof/emulator.h), against float64.

Every address, shared memory, alignment and meeting of lanes is checked, and each launch runs with its threads in
ascending and in descending order, which must give the same bits.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int64
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_ops
from lora_ops.functional import nf4_linear, quantize_nf4
from lora_ops.quant.nf4 import NF4_CODE, NF4Tensor
from lora_ops.quant.nf4.linear import cuda_impl
from lora_ops.runtime import backends, cuda, dispatch
from tests.cases import LinearCase, errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc/cuda/nf4_linear.cu"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
LEAST_SHARED = 99 * 1024  # sm_89 and sm_120
DTYPES = (torch.bfloat16, torch.float16)
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas",
         *(f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda", "tests/gpu_proof")))  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler: install one, or set CXX")


class EmulatorError(RuntimeError):
    """What the emulator found."""


class Emulated:
    """A build of the kernels for the host; `header` is a precompiled one with the same `optimize`."""

    def __init__(self, source: Path, folder: Path, optimize: str, header: Path | None = None) -> None:
        library = folder / f"{source.stem}.so"
        include = [] if header is None else ["-include", str(header)]
        build = [*COMPILER, *FLAGS, optimize, "-shared", *include, "-x", "c++", str(source), "-o", str(library)]
        subprocess.run(build, check=True)
        self.lib = cuda.open_library(library)
        self.lib.emulator_error.restype = c_char_p
        self.lib.emulator_count.restype = c_int64
        self.lib.emulator_reset.argtypes = ctypes.c_int, c_int64
        self.lib.emulator_allow.argtypes = ctypes.c_uint64, c_int64, ctypes.c_int

    def nf4_linear(self, x: Tensor, q: NF4Tensor, bias: Tensor | None, *, reverse: bool = False) -> Tensor:
        """y of NaN-filled memory; EmulatorError with what was found."""
        y = torch.full((x.shape[0], q.shape[0]), torch.nan, dtype=x.dtype)
        self.lib.emulator_reset(reverse, -1)
        maps = [cuda_impl._dynamic_map(q.device)] if q.nested else []
        for t in (*q.tensors(), *maps, *([] if bias is None else [bias])):
            self.lib.emulator_allow(t.data_ptr(), t.numel() * t.element_size(), 0)
        for row in x:
            self.lib.emulator_allow(row.data_ptr(), row.numel() * row.element_size(), 0)
        self.lib.emulator_allow(y.data_ptr(), y.numel() * y.element_size(), 1)
        before = cuda.library
        cuda.library = lambda: self.lib
        try:
            cuda.nf4_linear(cuda_impl.weight_of(q), x, bias, y)
        except cuda.CudaError as error:
            raise EmulatorError(self.lib.emulator_error().decode()) from error
        finally:
            cuda.library = before
        return y

    def count(self, what: str) -> int:
        return self.lib.emulator_count(("loaded", "stored", "shared", "blocks").index(what))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(SOURCE, tmp_path_factory.mktemp("cuda"), "-O1")


def aligned_copy(t: Tensor) -> Tensor:
    """A copy that begins on 64 bytes, as CUDA memory does."""
    memory = torch.empty(t.numel() + 64 // t.element_size(), dtype=t.dtype)
    first = -memory.data_ptr() % 64 // t.element_size()
    return memory[first : first + t.numel()].view(t.shape).copy_(t)


def operands(case: LinearCase) -> tuple[Tensor, NF4Tensor, Tensor | None]:
    i = case.inputs()
    return aligned_copy(i.x.contiguous()), replace(i.nf4, packed=aligned_copy(i.nf4.packed)), i.bias


def assert_y_right(emulated: Emulated, case: LinearCase) -> None:
    x, q, bias = operands(case)
    y, reverse = (emulated.nf4_linear(x, q, bias, reverse=reverse) for reverse in (False, True))
    error = errors(case.inputs(), {"y": y})["y"]
    assert error.wrong is None, f"{case.id}: wrong: {error.wrong}"
    assert torch.equal(y, reverse), f"{case.id}: wrong: it depends on the order of the threads"


cases = st.builds(
    LinearCase,
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192, 256, 320])),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from([32, 64, 128, 256]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    ill_scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=25)
@given(case=cases)
def test_drawn(emulated: Emulated, case: LinearCase) -> None:
    assert_y_right(emulated, case)


SHAPES = [
    (1, 70, 4096),
    (3, 530, 64),
    (8, 33, 448),
    (9, 31, 192),
    (16, 64, 128),
    (17, 40, 320),
    (32, 5, 64),
    (33, 20, 192),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (64, 33, 128), (70, 10, 64)])
def test_every_tile(emulated: Emulated, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """Each number of token tiles, with rows, tokens and the last step cut off; splits of the sum."""
    assert_y_right(emulated, LinearCase(m=m, n=n, k=k, dtype=dtype, double_quant=True, bias=True))
    assert emulated.count("shared") == 64 * 1024 <= LEAST_SHARED


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 128, 256, 512])
def test_blocks_of_several_steps(emulated: Emulated, block_size: int, double_quant: bool) -> None:
    """The kernel for aligned rows: a block is half a step, a step, two or four; a row holds two blocks or more."""
    case = LinearCase(
        m=3, n=40, k=max(320, 2 * block_size) // block_size * block_size, block_size=block_size,
        dtype=torch.bfloat16, double_quant=double_quant, ill_scaled=True,
    )  # fmt: skip
    assert_y_right(emulated, case)
    assert emulated.count("shared") == 64 * 1024


def assert_sums_in_order(emulated: Emulated) -> None:
    """Four warps have the sums 2^30, -2^30, 1 and 0, of which only the ascending order of the warps makes 1."""
    k = 4 * 128
    x = torch.zeros(8, k, dtype=torch.bfloat16)
    x[:, 0], x[:, 128], x[:, 256] = 2.0**30, -(2.0**30), 1.0
    ones = torch.full((32 * k // 2, 1), 0xFF, dtype=torch.uint8)  # of code 15
    q = NF4Tensor(aligned_copy(ones), torch.ones(32 * k // 64), (32, k), torch.bfloat16)
    y = emulated.nf4_linear(aligned_copy(x), q, None)
    assert torch.equal(y, torch.ones_like(y)), "wrong order"


def test_sums_are_added_in_order(emulated: Emulated) -> None:
    assert_sums_in_order(emulated)


def assert_codes_exact_where_rounding_is(emulated: Emulated, dtype: torch.dtype) -> None:
    """With x = rows of the identity, y is W: every code in both nibbles, at every place of a step, within 0.41 u."""
    k = 256
    codes = torch.arange(32 * k) * 7 % 16
    pairs = codes.view(-1, 2)
    packed = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None]
    absmax = torch.exp2(torch.arange(32 * k // 64) % 5 - 2.0) * torch.linspace(1, 2, 32 * k // 64)
    q = NF4Tensor(aligned_copy(packed), absmax, (32, k), torch.float16)
    w = (torch.tensor(NF4_CODE, dtype=torch.float64)[codes] * absmax.double().repeat_interleave(64)).view(32, k)
    of_code, roundoff = {torch.bfloat16: (0.41, 2**-8), torch.float16: (0.35, 2**-11)}[dtype]
    eye = aligned_copy(torch.eye(k, dtype=dtype))
    y = torch.cat([emulated.nf4_linear(eye[i : i + 64], q, None) for i in range(0, k, 64)]).T.double()
    of_y = torch.exp2(torch.floor(torch.log2(y.abs()))) * roundoff  # half its last place
    assert ((y - w).abs() <= of_code * roundoff * w.abs() * (1 + 2**-7) + of_y).all(), "wrong: codes are rounded badly"
    assert torch.equal(y == 0, w == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_exact_where_rounding_is(emulated: Emulated, dtype: torch.dtype) -> None:
    assert_codes_exact_where_rounding_is(emulated, dtype)


@pytest.mark.parametrize("misaligned", ["packed", "x", "row"])
def test_off_16_bytes_takes_the_other_kernel(emulated: Emulated, misaligned: str) -> None:
    case = LinearCase(m=3, n=20, k=128, dtype=torch.bfloat16)
    x, q, _ = operands(case)
    expected = emulated.nf4_linear(x, q, None)
    assert emulated.count("shared") == 64 * 1024
    if misaligned == "packed":
        q = replace(q, packed=aligned_copy(torch.cat([q.packed[:1], q.packed]))[1:])
    elif misaligned == "x":
        x = aligned_copy(torch.cat([x.view(-1)[:1], x.view(-1)]))[1:].view(3, 128)
    else:
        x = aligned_copy(torch.nn.functional.pad(x, (0, 1)))[:, :128]
    torch.testing.assert_close(emulated.nf4_linear(x, q, None), expected, rtol=0.02, atol=0.02)
    assert emulated.count("shared") == 64


def test_rows_of_x_may_be_strided(emulated: Emulated) -> None:
    x, q, _ = operands(LinearCase(m=5, n=20, k=128, dtype=torch.bfloat16))
    padded = aligned_copy(torch.nn.functional.pad(x, (0, 8), value=torch.nan))[:, :128]
    assert torch.equal(emulated.nf4_linear(padded, q, None), emulated.nf4_linear(x, q, None))
    assert emulated.count("shared") == 64 * 1024


def test_outputs_are_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they may be changed in place."""
    monkeypatch.setattr(cuda, "nf4_linear", lambda weight, x, bias, y: y.zero_())
    x, q, _ = operands(LinearCase(m=6, n=20, k=128, dtype=torch.bfloat16))
    for shape in ((6, 128), (2, 3, 128), (1, 2, 3, 128)):
        y = cuda_impl.nf4_linear(x=x.view(shape), q=q, bias=None)
        assert y.shape == (*shape[:-1], 20)
        assert not y._is_view()


def test_packed_bytes_are_read_once(emulated: Emulated) -> None:
    n, k = 64, 1024
    x, q, _ = operands(LinearCase(m=1, n=n, k=k, dtype=torch.bfloat16))
    emulated.nf4_linear(x, q, None)
    steps, tiles = k // 128, n // 32
    # Each quad of lanes reads its absmax four bytes a lane; x is read by all 8 rows of lanes, from L1; and each warp's
    # last fetch, beyond its share, repeats the last bytes of its rows.
    codes, absmax, repeated = n * k // 2, n * k // 64 * 4, tiles * 16 * 32 * (4 * 16 + 2 * 4)
    assert emulated.count("loaded") <= codes + absmax + repeated + tiles * steps * 32 * 64
    assert emulated.count("stored") == 2 * n


def run_virtually(emulated: Emulated, m: int, n: int, k: int, rows: int, stride_x: int = 0) -> None:
    """The first, a middle and the last block, of `rows` rows each, on pretended memory: every address is checked."""
    stride_x = stride_x or k
    n_blocks = -(-n * k // 64)
    places = {name: (i + 1) << 48 for i, name in enumerate(("packed", "absmax", "map", "nested", "offset", "x", "y"))}
    sizes = {"packed": n * k // 2, "absmax": n_blocks, "map": 1024, "nested": -(-n_blocks // 256) * 4, "offset": 4}
    sizes |= {"x": ((m - 1) * stride_x + k) * 2, "y": m * n * 2}
    weight = cuda.NF4Weight(places["packed"], None, *(places[p] for p in ("absmax", "map", "nested", "offset")), 64)
    call = emulated.lib.lora_ops_cuda_nf4_linear
    for block in (0, n // rows // 2, n // rows - 1):
        emulated.lib.emulator_reset(0, block)
        for name, place in places.items():
            emulated.lib.emulator_allow(place, sizes[name], name == "y")
        if call(byref(weight), n, k, places["x"], m, stride_x, None, places["y"], 2, None):
            raise EmulatorError(emulated.lib.emulator_error().decode())
        assert emulated.count("blocks") == n // rows
        assert emulated.count("stored") == rows * m * 2


HUGE = {
    "packed codes": (1, 1 << 22, 4096, 512),
    "y": (64, 1 << 26, 256, 256),
    "any shape": (3, 1 << 22, 4095, 8),
    "scales": (1, 1 << 26, 4096, 512),
    "rows of x": (64, 256, 256, 128, 1 << 26),
    "scales, any shape": (1, 1 << 26, 4095, 8),
    "rows of x, any shape": (8, 256, 255, 8, 1 << 29),
    "y, any shape": (3, 1 << 30, 63, 8),
}


@pytest.mark.parametrize("shape", HUGE.values(), ids=HUGE)
def test_addresses_beyond_32_bits(emulated: Emulated, shape: tuple[int, ...]) -> None:
    run_virtually(emulated, *shape)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 64), (5, 0, 64), (3, 5, 0)])
def test_empty(emulated: Emulated, m: int, n: int, k: int) -> None:
    x = torch.empty(m, k, dtype=torch.bfloat16)
    q = NF4Tensor(torch.empty(n * k // 2, 1, dtype=torch.uint8), torch.empty(n * k // 64), (n, k), torch.bfloat16)
    bias = torch.randn(n).bfloat16()
    assert torch.equal(emulated.nf4_linear(x, q, bias), bias.expand(m, n))


def test_refuses_what_it_cannot_serve(emulated: Emulated) -> None:
    weight = cuda.NF4Weight(block_size=64)
    call = emulated.lib.lora_ops_cuda_nf4_linear
    assert call(byref(weight), -1, 64, None, 1, 64, None, None, 2, None) == 1
    assert call(byref(weight), 1, 64, None, 1, 64, None, None, 0, None) == 1  # float32
    assert call(None, 1, 64, None, 1, 64, None, None, 2, None) == 1
    for n, k, m in ((1, -1, 1), (1, 64, -1), (2**30 + 1, 64, 1), (1, 2**30 + 1, 1), (1, 64, 8 * 65535 + 1)):
        assert call(byref(weight), n, k, None, m, k, None, None, 2, None) == 1
    for block_size in (16, 48):
        weight.block_size = block_size
        assert call(byref(weight), 1, 64, None, 1, 64, None, None, 2, None) == 1


# Kernels broken on purpose.

STEP_SUM = "sum[i][tile][e] += product[e] * scale[i][e / 2]"
PAIR = "shuffle(mine, byte >> 4) | shuffle(mine, byte & 15) << 16"
EXCHANGE = "codes[1] = upper ? other1 : mine.y"
HALF_STEP = "if (at >= p.k) break;"
ROW = "(row < p.n ? row : p.n - 1) * (p.k / 2)"
STORE = "if (first_row + row >= p.n || first_token + token >= p.m) continue;"
FILL = "    fill_table<T>(32 * kWarps<TILES>);\n    sync_block();"
SUMS = "}\n    sync_block();\n    for (int e = member"
ENTRY = "byte * kEntry + at % 2 * 64"
Y = "(first_token + token) * p.n + first_row + row, round_to<T>(total)"


Break = Callable[[str, str], Emulated]


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator and what it includes, compiled once for all that is broken: half of a build."""
    path = tmp_path_factory.mktemp("header") / "precompiled.h"
    path.write_text(f'#include "{ROOT / "tests/gpu_proof/emulator.h"}"\n')
    subprocess.run([*COMPILER, *FLAGS, "-O0", "-x", "c++-header", str(path), "-o", f"{path}.gch"], check=True)
    return path


@pytest.fixture
def broken(header: Path, tmp_path: Path) -> Break:
    """`broken(old, new)`: the kernels with `old` in their source replaced by `new`."""

    def build(old: str, new: str) -> Emulated:
        text = SOURCE.read_text()
        assert old in text, "change the mutant with the kernel"
        changed = tmp_path / "broken.cu"
        changed.write_text(text.replace(old, new))
        return Emulated(changed, tmp_path, "-O0", header)

    return build


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ((PAIR, "shuffle(mine, byte & 15) | shuffle(mine, byte >> 4) << 16"), "wrong"),
        ((EXCHANGE, "codes[1] = upper ? mine.y : other1"), "wrong"),
        ((STEP_SUM, STEP_SUM.replace("e / 2", "0")), "wrong"),
        (("k += split * kStep) {", "k += kStep) {"), "wrong"),
        ((HALF_STEP, ""), "out of bounds"),
        ((ROW, "row * (p.k / 2)"), "out of bounds"),
        ((STORE, "if (first_token + token >= p.m) continue;"), "out of bounds|written twice"),
        ((FILL, FILL.replace("sync_block();", "")), "before it is written"),
        ((SUMS, SUMS.replace("sync_block();", "")), "before it is written|wrong"),
        ((HALF_STEP, "if (at >= p.k || g == 7) break;"), "different operations|never comes"),
        ((ENTRY, f"{ENTRY} + 2"), "not aligned"),
    ],
    ids=["nibbles", "exchange", "scale of row g", "steps twice", "last half step", "rows beyond W", "store mask",
         "no barrier for the table", "no barrier for the sums", "lanes diverge", "alignment"],
)  # fmt: skip
def test_broken(broken: Break, change: tuple[str, str], found: str) -> None:
    with pytest.raises((AssertionError, EmulatorError), match=found):
        assert_y_right(broken(*change), LinearCase(m=3, n=33, k=448, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        ("for (int i = 0; i < split; ++i) {", "for (int i = split - 1; i >= 0; --i) {"),
        ("(team << split_shift) + i;", "(team << split_shift) + (i + member) % split;"),
    ],
    ids=["descending", "begins with its own"],
)
def test_broken_order(broken: Break, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="wrong order"):
        assert_sums_in_order(broken(*change))


def test_broken_grid(broken: Break) -> None:
    """Rows of the last block of 16 tiles left out."""
    kernels = broken("blocks_of(tiles, warps >> shift)", "std::max<int64_t>(1, tiles / (warps >> shift))")
    with pytest.raises(AssertionError, match="wrong"):
        assert_y_right(kernels, LinearCase(m=3, n=530, k=64, dtype=torch.bfloat16))


@pytest.mark.parametrize(("scale", "dtype"), [("1.18878173828125f", DTYPES[0]), ("1.63848876953125f", DTYPES[1])])
def test_broken_rounding_of_codes(broken: Break, scale: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="rounded badly"):
        assert_codes_exact_where_rounding_is(broken(scale, "1.0f"), dtype)


@pytest.mark.parametrize(
    "change",
    [("p.k - kBlock) >> p.block_shift", "p.k - kBlock) >> 6"), ("(p.k >> p.block_shift)", "(p.k >> 6)")],
    ids=["block of a column", "first block of a row"],
)
def test_broken_blocks_of_several_steps(broken: Break, change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, EmulatorError), match=r"wrong|out of bounds"):
        test_blocks_of_several_steps(broken(*change), 128, double_quant=False)


def as_int(text: str) -> tuple[str, str]:
    """A change that computes `text` in 32 bits."""
    return text, f"static_cast<int>({text})"


@pytest.mark.parametrize(
    ("change", "huge"),
    [
        (as_int(ROW), "packed codes"),
        (as_int("(row < p.n ? row : p.n - 1) * (p.k >> p.block_shift)"), "scales"),
        (as_int("(token < p.m ? token : p.m - 1) * p.stride_x"), "rows of x"),
        ((Y, Y.replace("(first_token + token) * p.n", "static_cast<int>((first_token + token) * p.n)")), "y"),
        (("const int64_t e = row * p.k + k;", "const int e = row * p.k + k;"), "any shape"),
        (as_int("e >> p.block_shift"), "scales, any shape"),
        (as_int("(first_token + token) * p.stride_x + k"), "rows of x, any shape"),
        (as_int("(first_token + token) * p.n + row"), "y, any shape"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_int32_addresses(broken: Break, change: tuple[str, str], huge: str) -> None:
    with pytest.raises(EmulatorError, match="out of bounds"):
        run_virtually(broken(*change), *HUGE[huge])


# The backend.


@pytest.fixture
def on_cuda(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend "cuda" with the emulated library, and CPU tensors taken for those of a GPU."""
    monkeypatch.setattr(cuda, "library", lambda: emulated.lib)
    monkeypatch.setitem(
        backends.BACKENDS, "cuda", replace(backends.BACKENDS["cuda"], device_types=(), unavailable=lambda: None)
    )
    monkeypatch.setattr(dispatch.OPS["nf4_linear"], "_candidates", {})
    declines = cuda_impl.declines

    def for_cpu(op: str, lead: Tensor, **operands: object) -> str | None:
        reason = declines(op, lead, **operands)
        return None if reason and "run on NVIDIA GPUs" in reason else reason

    monkeypatch.setattr(cuda_impl, "declines", for_cpu)
    emulated.lib.emulator_reset(0, -1)
    emulated.lib.emulator_allow(0, 2**63 - 1, 1)
    yield
    emulated.lib.emulator_reset(0, -1)


def test_never_chosen_but_by_name(on_cuda: None) -> None:
    q = quantize_nf4(torch.randn(8, 64), double_quant=True)
    x = torch.randn(2, 3, 64).bfloat16()
    with lora_ops.trace() as t:
        expected = nf4_linear(x, q)
        with lora_ops.use_backend("cuda"):
            y = nf4_linear(x, q)
    assert [c.backend for c in t.calls][1] == "cuda"
    assert t.calls[0].backend != "cuda"
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)


def test_declines_with_a_reason() -> None:
    q = quantize_nf4(torch.randn(8, 64))
    x = torch.randn(3, 64).bfloat16()
    if cuda.unavailable_reason() is None:
        reason = "run on NVIDIA GPUs, not on cpu"
    else:
        reason = "the CUDA C.. kernels were not built: with nvcc"
    with lora_ops.use_backend("cuda"), pytest.raises(lora_ops.BackendError, match=reason):
        nf4_linear(x, q)
