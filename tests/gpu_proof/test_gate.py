"""The compile gate is green, its record holds what ships and no more, and it catches kernels broken on purpose."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import lora_ops.kernels
import lora_ops.quant
from lora_ops.quant.nf4.codec import triton_impl
from lora_ops.runtime.triton_launch import interpreting, launch
from tests.gpu_proof import cuda_code, gate, machine_code, registry, rules
from tests.gpu_proof.expect import FMA, MMA, Expect, GateCase, meta
from tests.gpu_proof.gates import lora_linear, nf4_codec
from tests.gpu_proof.mutant import mutant

pytestmark = pytest.mark.skipif(interpreting(), reason="it compiles: run without TRITON_INTERPRET")
CHIPS = {chip.name: chip for chip in machine_code.CHIPS}


def test_green() -> None:
    """Every shipped launch on every chip; what the committed record holds is not compiled again."""
    known = gate.recorded()
    todo = gate.tasks(registry.ops())
    if not gate.is_of_this_triton():
        todo = gate.sample(todo)
    bad = gate.failures(todo, gate.run(todo, known))
    assert not bad, "\n".join(bad)


def test_record_is_not_trusted_blindly() -> None:
    """A few recorded results, compiled again; here, since a process that compiles them would import longer."""
    known = gate.recorded()
    shipped = gate.tasks(["nf4_codec"])
    todo = [t for t in shipped if t.key in known][::16]
    assert {t.key: gate._job(t) for t in todo} == {t.key: known[t.key] for t in todo}
    assert gate.tasks(["nf4_codec"]) == shipped  # what is compiled keeps its fingerprint


def test_every_kernel_has_cases() -> None:
    """What an op's Triton files define as `_…_kernel`, some case launches; and no two cases of an op share a name."""
    kernels, launched = set(), set()
    for package in (lora_ops.kernels, lora_ops.quant):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.split(".")[-1].startswith("triton_"):
                functions = vars(importlib.import_module(info.name)).values()
                found = {f.__name__ for f in functions if isinstance(f, triton.JITFunction)}
                kernels |= {name for name in found if name.endswith("_kernel")}
    for op in registry.ops():
        names = [case.name for case in importlib.import_module(f"tests.gpu_proof.gates.{op}").cases()]
        assert len(names) == len(set(names))
        launched |= {shipped.kernel for shipped in registry.shipped_by(op)}
    assert kernels == launched


def test_the_record_outlives_what_is_no_rule(tmp_path: Path) -> None:
    source = Path(rules.__file__).read_text()
    text = {"before": source, "comment": f"# A comment.\nimport math\n{source}", "rule": f"{source}\nLIMIT = 1\n"}
    for name, value in text.items():
        (tmp_path / name).write_text(value)
    code = {name: machine_code.code_of(tmp_path / name) for name in text}
    assert code["before"] == code["comment"] != code["rule"]
    assert "import" not in code["before"]
    assert "def problems" in code["before"]


def test_lines_above_a_kernel_change_no_fingerprint() -> None:
    """Where it begins in its file is forgotten: an import more does not void the record."""
    launch = next(registry.shipped_by("lora_linear")).launch
    before = machine_code.fingerprint(launch, CHIPS["sm_90"])
    launch.kernel.starting_line_number, launch.kernel.hash = 12345, None
    assert machine_code.fingerprint(launch, CHIPS["sm_90"]) == before


def test_cuda_kernels_green() -> None:
    """The kernels of nvcc; where it is missing and they have changed since the record, this fails and says so."""
    todo = gate.cuda_tasks()
    bad = gate.failures(todo, gate.run(todo, gate.recorded()))
    assert not bad, "\n".join(bad)


def test_record_of_cuda_kernels_is_not_trusted_blindly() -> None:
    known = gate.recorded()
    todo = [t for t in gate.cuda_tasks() if t.chip == "sm_90"]
    if not cuda_code.nvcc():
        pytest.skip(f"{len(gate.cuda_tasks())} results of nvcc rest on the record: {cuda_code.BUILD_HINT}")
    again = {t.key: gate.Result(*cuda_code.check(cuda_code.KERNELS[t.index], CHIPS[t.chip])) for t in todo}
    assert not gate.failures(todo, again)
    assert set(cuda_code.compiled(CHIPS["sm_90"])) == set(cuda_code.KERNELS)
    version = f"nvcc {cuda_code.nvcc_version()}"
    same = [t.key for t in todo if t.key in known and known[t.key].summary.endswith(version)]
    assert {key: again[key] for key in same} == {key: known[key] for key in same}


def test_record_holds_what_ships() -> None:
    """And nothing of kernels that no longer do."""
    if not gate.is_of_this_triton():
        pytest.skip("bench/compile_gate.json is of another Triton: run with that")
    shipped = {t.key for t in gate.tasks(registry.ops()) + gate.cuda_tasks()}
    assert shipped == set(gate.recorded()), "run: python -m tests.gpu_proof.gate"


def test_table() -> None:
    """A line for each launch, a cell for each chip, and what is wrong in bold."""
    todo = gate.tasks(["blockwise8"])
    results = {t.key: gate.Result(f"cell of {t.chip}") for t in todo}
    results[todo[0].key] = gate.Result("", ("spills",))
    text = gate.table(todo, results)
    listed = re.findall(r"^\| (.*?_kernel) \|", text, re.MULTILINE)
    assert listed == list(dict.fromkeys(t.id for t in todo))
    assert text.count("**spills**") == 1
    assert all(text.count(f"cell of {chip}") >= len(listed) - 1 for chip in CHIPS)


# Kernels broken on purpose.


def wrong(case: GateCase, chip: str) -> str:
    (shipped,) = registry.launches_of("broken", case)
    return "; ".join(gate.check(shipped, CHIPS[chip]).wrong)


@pytest.fixture
def broken_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., GateCase]:
    """broken_case(name, (old, new)): the codec's case of that name with a mutant of the codec."""

    def find(name: str, *changes: tuple[str, str]) -> GateCase:
        monkeypatch.setattr(nf4_codec, "triton_impl", mutant(triton_impl, tmp_path, *changes))
        return next(case for case in nf4_codec.cases() if case.name == name)

    return find


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_codec_with_fused_multiply_add(broken_case: Callable[..., GateCase], chip: str) -> None:
    case = broken_case("dequantize b64 nested bfloat16", ("enable_fp_fusion=False", "enable_fp_fusion=True"))
    assert re.search("fma|contract|fused", wrong(case, chip))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_codec_config_that_spills(broken_case: Callable[..., GateCase], chip: str) -> None:
    changes = (
        ("QUANTIZE_TILE = 2048", "QUANTIZE_TILE = 4096"),
        ("QUANTIZE_ELEMENTS_A_THREAD = 16", "QUANTIZE_ELEMENTS_A_THREAD = 128"),
    )
    assert "stack or spills" in wrong(broken_case("quantize b64 bfloat16", *changes), chip)


def test_codec_with_single_element_accesses(broken_case: Callable[..., GateCase]) -> None:
    change = ("store_ragged(out_ptr + start, e, tl.reshape(value, [TILE // ROW, ROW]), left)",
              "tl.store(out_ptr + start + e, tl.reshape(value, [TILE // ROW, ROW]), mask=e < left)")  # fmt: skip
    assert wrong(broken_case("dequantize b64 bfloat16", change), "sm_90") == "no 16-byte store"


@triton.jit
def _atomic_kernel(x_ptr, y_ptr):
    tl.atomic_add(y_ptr + tl.arange(0, 128), tl.load(x_ptr + tl.arange(0, 128)))


@pytest.mark.parametrize("chip", ["sm_80", "sm_100", "gfx942"])
def test_atomics(chip: str) -> None:
    case = GateCase("atomic", lambda: launch(_atomic_kernel, (1,), meta(128), meta(128)))
    assert "atomics" in wrong(case, chip)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i[:, None] * SIZE + i[None, :])
    tl.store(y_ptr + i[:, None] * SIZE + i[None, :], tl.dot(x, x, input_precision="ieee"))


def dot(dtype: torch.dtype, size: int, mma: Mapping[str, str] = MMA) -> GateCase:
    x, y = meta(size, size, dtype=dtype), meta(size, size)
    return GateCase("dot", lambda: launch(_dot_kernel, (1,), x, y, SIZE=size), Expect(mma=mma))


@pytest.mark.parametrize("chip", MMA)
def test_matrix_instruction(chip: str) -> None:
    assert wrong(dot(torch.bfloat16, 64), chip) == ""
    if chip != "gfx942":  # which has matrix instructions for fp32
        assert f"no {MMA[chip]}" in wrong(dot(torch.float32, 32), chip)


@pytest.mark.parametrize("chip", FMA)
def test_no_matrix_instruction(chip: str) -> None:
    """T4s have HMMA of float16, and Triton does not use it. A Triton that does fails here: take the chip out of FMA."""
    assert "no HMMA (matrix instructions: none)" in wrong(dot(torch.float16, 32, {chip: "HMMA"}), chip)


@pytest.mark.parametrize("chip", FMA)
def test_tiles_of_matrix_instructions_spill_on_fma_units(chip: str) -> None:
    """What a launcher takes that does not know of the chip: operands of a whole step in registers."""
    case = next(c for c in lora_linear.cases() if c.name == "r16 float16 p=0.1")
    bad = {s.kernel: gate.check(s, CHIPS[chip]).wrong for s in registry.launches_of("lora_linear", case)}
    assert "bytes of stack or spills" in "".join(bad["_expand_kernel"])


def test_cases_of_a_chip_without_matrix_instructions() -> None:
    """No products in bfloat16, of every kernel that such a chip runs, and none of the K-step route."""
    shipped = {chip: [s for op in registry.ops() for s in registry.shipped_by(op, CHIPS[chip])] for chip in CHIPS}
    kernels = {chip: {s.kernel for s in found} for chip, found in shipped.items()}
    assert kernels["sm_80"] - kernels["sm_75"] == {"_lora_gemm_kernel", "_reduce_both_kernel"}
    products = [s for s in shipped["sm_75"] if s.kernel.split("_")[1] in ("reduce", "expand") or "_gem" in s.kernel]
    assert len(products) > 100
    of_bfloat16 = [s.id for s in products for t in s.launch.args[:1] if t.dtype == torch.bfloat16]
    assert not of_bfloat16


@triton.jit
def _wide_dot_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + i[:, None] * COLUMNS + k[None, :])
    tl.store(y_ptr + i[:, None] * ROWS + i[None, :], tl.dot(x, x.T))


def test_shared_memory_limit() -> None:
    x, y = meta(64, 1024, dtype=torch.bfloat16), meta(64, 64)  # x takes 128 KiB; of few sums, quick to compile
    case = GateCase("dot", lambda: launch(_wide_dot_kernel, (1,), x, y, ROWS=64, COLUMNS=1024, num_warps=8))
    assert "of shared memory, sm_89 has" in wrong(case, "sm_89")
    assert "shared" not in wrong(case, "sm_90")


@pytest.mark.skipif(not cuda_code.nvcc(), reason=f"no nvcc: {cuda_code.BUILD_HINT}")
def test_cuda_kernels_broken(tmp_path: Path) -> None:
    """More warps than registers allow, and no 16-byte loads of codes."""
    changes = (
        ("TILES <= 2 ? 16 : 8", "TILES <= 1 ? 8 : 16"),
        ("static_assert(kWarps<TILES> * kSums", "static_assert(8 * kSums"),
        ("= stream16(rows.packed[i] + at)", "= uint4{load(rows.packed[i] + at), 0, 0, 0}"),
    )
    text = cuda_code.SOURCE.read_text()
    for old, new in changes:
        assert old in text, "change the mutant with the kernel"
        text = text.replace(old, new)
    source = tmp_path / "broken.cu"
    source.write_text(text)
    found = {k: "; ".join(cuda_code.check(k, CHIPS["sm_90"], source)[1]) for k in cuda_code.KERNELS}
    assert all("streaming 16-byte loads" in wrong for k, wrong in found.items() if k.tiles)
    assert all("of stack or spills" in wrong for k, wrong in found.items() if k.tiles == 8)
