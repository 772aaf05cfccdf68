"""What is promised bit for bit is the same on x86 and on ARM, in plain C++ and with NEON: one run, the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lora_ops.kernels.adamw import native_abi as adamw_abi
from lora_ops.kernels.lora_linear import native_abi as lora_abi
from lora_ops.paging import native_abi as pages_abi
from lora_ops.quant.blockwise8 import native_impl as blockwise8
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import native_abi as nf4_abi
from lora_ops.runtime import native
from tests.arm import build, remote

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Results = dict[str, Tensor]


# Processors without and with what ARM has more of than NEON, by qemu's names, and their instruction sets.
PROCESSORS = {"cortex-a72": ("portable", "neon"), "max": ("portable", "neon", "neon_bf16")}


@pytest.fixture(scope="module", params=PROCESSORS)
def arm(request: pytest.FixtureRequest) -> Iterator[remote.Library]:
    if reason := build.missing() or build.stale():
        pytest.skip(f"no library for ARM: {reason}")
    if not native.available():
        pytest.skip(f"nothing to compare with: {native.unavailable_reason()}")
    memory = remote.Memory()
    with remote.noting(memory):
        library = remote.connect(memory, options=["-cpu", request.param])
        library.isas = PROCESSORS[request.param]
        yield library
        library.close()


def bits(t: Tensor) -> Tensor:
    """Its bytes; the sign and payload of a NaN are the machine's."""
    return torch.where(t.isnan(), torch.nan, t).contiguous().view(torch.uint8) if t.is_floating_point() else t


def assert_same(arm: remote.Library, make: Callable[[], Results]) -> None:
    with remote.using(native.library(), "portable"):
        expected = make()
    for isa in arm.isas:
        with remote.using(arm, isa):
            got = make()
        for name, value in expected.items():
            assert torch.equal(bits(got[name]), bits(value)), f"{name}, {isa}"


def test_processor_has_its_instruction_sets(arm: remote.Library) -> None:
    assert tuple(isa for isa, number in native.ISAS.items() if arm.lora_ops_supports_isa(number)) == arm.isas
    assert arm.lora_ops_get_isa() == native.ISAS[arm.isas[-1]]


def values(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of every magnitude: blocks of 64 that span one decade or ten, denormals, zeros, the largest."""
    g = torch.Generator().manual_seed(seed)
    finfo = torch.finfo(dtype)
    exponents = torch.tensor([0.0, 0.0, 3.0, -5.0, torch.finfo(dtype).smallest_normal])
    of_block = exponents[torch.randint(len(exponents), (-(-n // 64),), generator=g)].repeat_interleave(64)[:n]
    x = torch.randn(n, generator=g) * torch.where(of_block > 0, of_block, 10.0**of_block)
    x = torch.where(torch.rand(n, generator=g) < 0.1, 0.0, x * (1 + 1e3 * (torch.rand(n, generator=g) < 0.01)))
    x[torch.rand(n, generator=g) < 0.002] = finfo.max
    return x.clamp(finfo.min, finfo.max).to(dtype)


@pytest.mark.parametrize("block_size", [32, 64, 96, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 31), (3, 43), (7, 64), (65, 96), (40, 333)])
def test_nf4(arm: remote.Library, n: int, k: int, dtype: torch.dtype, block_size: int) -> None:
    w = values(n * k, n + k, dtype)

    def make() -> Results:
        out = {}
        for name, quantize, operand in (
            ("rows", nf4_abi.quantize, w),
            ("transposed", nf4_abi.quantize_transposed, w.view(k, n)),
        ):
            packed = torch.full(((w.numel() + 1) // 2,), 0xA5, dtype=torch.uint8)
            absmax = torch.full((-(-w.numel() // block_size),), torch.nan)
            quantize(operand, block_size, packed, absmax)
            out |= {f"{name} packed": packed, f"{name} absmax": absmax}
            weight = nf4_abi.NF4Weight(packed.data_ptr(), absmax.data_ptr(), block_size=block_size)
            for begin, out_dtype in ((0, dtype), (1, torch.float32), (0, torch.float16), (0, torch.bfloat16)):
                decoded = torch.full((w.numel() - begin,), torch.nan, dtype=out_dtype)
                nf4_abi.dequantize(weight, begin, w.numel(), decoded)
                transposed = torch.full((k, n), torch.nan, dtype=out_dtype)
                nf4_abi.dequantize_transposed(weight, transposed)
                out |= {f"{name} {begin} {out_dtype}": decoded, f"{name} transposed {out_dtype}": transposed}
        return out

    assert_same(arm, make)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 63, 64, 99])
def test_nf4_refuses_what_is_not_finite(arm: remote.Library, at: int, dtype: torch.dtype, value: float) -> None:
    w = values(100, 1, dtype)
    w[at] = value

    def make() -> Results:
        with pytest.raises(ValueError, match="finite"):
            nf4_abi.quantize(w, 64, torch.empty(50, dtype=torch.uint8), torch.empty(2))
        return {}

    assert_same(arm, make)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("n", "block_size"), [(1, 256), (255, 256), (1000, 256), (777, 100), (4096, 64)])
def test_blockwise8(arm: remote.Library, n: int, block_size: int, signed: bool) -> None:
    x = values(n, n)
    x = x if signed else x.abs()

    def make() -> Results:
        codes, absmax, out = torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // block_size)), torch.zeros(n)
        blockwise8.quantize(x, block_size, dynamic_map(signed), codes, absmax)
        blockwise8.dequantize(codes, absmax, block_size, dynamic_map(signed), out)
        return {"codes": codes, "absmax": absmax, "out": out}

    assert_same(arm, make)


@pytest.mark.parametrize("threshold", [0, 1, 3277, 32768, 65535, 65536])
@pytest.mark.parametrize("k", [1, 8, 257, 1000])
def test_dropout_mask(arm: remote.Library, k: int, threshold: int) -> None:
    def make() -> Results:
        mask = torch.full((5, -(-k // 8)), 0xA5, dtype=torch.uint8)
        lora_abi.dropout_mask(slice(2**31 - 2, 2**31 + 3), k, threshold, 2**63 + 12345, 2**31 + 7, mask)
        return {"mask": mask}

    assert_same(arm, make)


@pytest.mark.parametrize("seed", [None, 2**64 - 5])
@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("extreme", [False, True])
def test_adamw(
    arm: remote.Library, extreme: bool, dtype: torch.dtype, grad_dtype: torch.dtype, state_bits: int, seed: int | None
) -> None:
    """Three steps of parameters of ragged sizes; with extreme gradients everything that becomes NaN is NaN."""
    sizes = 1, 255, 256, 1000

    def make() -> Results:
        out = {}
        constants = torch.tensor([[1 - 1e-4, 0.1, 0.999, 1 - 0.999, 1e-8, 1e-2, 1.7, 1.0]])
        for n in sizes:
            p = values(n, n, dtype)
            grad = (values(n, n + 1, grad_dtype).float() if extreme else torch.sin(torch.arange(n))).to(grad_dtype)
            if extreme and state_bits == 32:
                grad[:: max(n // 3, 1)] = torch.inf
            blocks = -(-n // 256)
            states = [torch.zeros(n, dtype=torch.float32 if state_bits == 32 else torch.uint8) for _ in range(2)]
            absmax = [torch.zeros(blocks) for _ in range(2)]
            pointers = [absmax[i].data_ptr() if state_bits == 8 else 0 for i in range(2)]
            if state_bits == 8:
                states[0].fill_(127)  # the code of zero
            for step in range(1, 4):
                fields = (p, grad, *states)
                numbers = native.DTYPE_NUMBERS[dtype], native.DTYPE_NUMBERS[grad_dtype], 0, n, step, 256
                record = (*(t.data_ptr() for t in fields), *pointers, n, *numbers)
                adamw_abi.adamw([record], constants, dynamic_map(True), dynamic_map(False), seed)
            out |= {f"{n} {i}": t for i, t in enumerate((p, *states, *absmax))}
        return out

    assert_same(arm, make)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 10_000])
def test_checksum(arm: remote.Library, n: int) -> None:
    data = torch.randint(256, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)

    def make() -> Results:
        checksum = pages_abi.checksum(data.data_ptr(), n)
        return {"checksum": torch.tensor([checksum >> 32, checksum & (2**32 - 1)])}

    assert_same(arm, make)
