"""The bitsandbytes layout: equal bytes both ways, and errors that name the key."""

from __future__ import annotations

import json

import pytest
import torch

from lora_ops.formats.bitsandbytes import is_repacked
from lora_ops.functional import quantize_nf4
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4 import state_dict as layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bnb_state_dict(w: torch.Tensor, nested: bool, quant_type: str = "nf4", **kwargs: object) -> dict[str, torch.Tensor]:
    """What bitsandbytes itself writes for a layer with this weight."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, quant_type=quant_type, compress_statistics=nested, **kwargs
    )
    linear.weight.data = w.clone()
    return linear.to("cpu").state_dict()  # .to quantizes; its eval forward would repack the layer


def same_value(a: NF4Tensor, b: NF4Tensor) -> bool:
    meta = (a.shape, a.dtype, a.block_size, a.nested) == (b.shape, b.dtype, b.block_size, b.nested)
    return meta and all(torch.equal(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_writes_the_bytes_that_bitsandbytes_writes(dtype: torch.dtype, nested: bool) -> None:
    theirs = bnb_state_dict(torch.randn(80, 96, dtype=dtype), nested)
    ours = layout.to_state_dict(layout.from_state_dict(theirs))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_quantizer_writes_the_state_dict_of_bitsandbytes(dtype: torch.dtype) -> None:
    w = torch.randn(80, 96, dtype=dtype)
    theirs, ours = bnb_state_dict(w, nested=False), layout.to_state_dict(quantize_nf4(w))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_our_double_quantization_is_read_by_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    q = quantize_nf4(torch.randn(80, 128), double_quant=True)  # its CPU code decodes K % block_size != 0 wrongly
    state = layout.to_state_dict(q)
    packed = state.pop("weight")
    quant_state = functional.QuantState.from_dict({k.removeprefix("weight."): v for k, v in state.items()}, "cpu")
    theirs = {f"weight.{k}": v for k, v in quant_state.as_dict(packed=True).items()}
    ours = layout.to_state_dict(q)
    assert list(theirs) == [k for k in ours if k != "weight"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(functional.dequantize_4bit(packed, quant_state), q.dequantize())


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (64, 64), (7, 300)])
@pytest.mark.parametrize("nested", [False, True])
def test_roundtrip(shape: tuple[int, int], nested: bool) -> None:
    q = quantize_nf4(torch.randn(shape), block_size=32, double_quant=nested)
    state = layout.to_state_dict(q)
    again = layout.from_state_dict(state)
    assert same_value(again, q)
    assert all(torch.equal(a, b) for a, b in zip(layout.to_state_dict(again).values(), state.values(), strict=True))


def test_tensors_do_not_share_memory() -> None:
    """safetensors refuses shared memory."""
    states = [layout.to_state_dict(quantize_nf4(torch.randn(64, 64), double_quant=True)) for _ in range(2)]
    addresses = [t.untyped_storage().data_ptr() for state in states for t in state.values()]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_reads_other_storage_dtypes(storage: torch.dtype) -> None:
    w = torch.randn(64, 64)
    expected = layout.from_state_dict(bnb_state_dict(w, True))
    assert same_value(layout.from_state_dict(bnb_state_dict(w, True, quant_storage=storage)), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_was_repacked_for_inference_is_read(nested: bool) -> None:
    """As a forward in eval() leaves it on a CPU with AVX-512-BF16; codes are equal, scales rounded."""
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(64, 192)
    linear = bnb.nn.Linear4bit(192, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    linear.weight.data = w.clone()
    linear = linear.to("cpu")
    expected = layout.from_state_dict({k: v.clone() for k, v in linear.state_dict().items()})
    assert not is_repacked(linear)
    linear.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
    assert is_repacked(linear)
    read = layout.from_state_dict(linear.state_dict())
    assert torch.equal(read.packed, expected.packed)
    # 2^-9 of a scale; double-quantized once more, up to half a step of the 8-bit map besides.
    allowed = 2**-9 if not nested else 2**-9 + 2**-7
    largest = quantize_nf4(w).absmax.max()
    error = (read.dequantize() - expected.dequantize()).abs().max()
    assert error <= allowed * largest


def test_fp4_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nf4.*got fp4"):
        layout.from_state_dict(bnb_state_dict(torch.randn(64, 64), True, quant_type="fp4"))


@pytest.mark.parametrize("nested", [False, True])
def test_missing_keys_are_named(nested: bool) -> None:
    state = layout.to_state_dict(quantize_nf4(torch.randn(64, 64), double_quant=nested))
    for key in state:
        with pytest.raises(KeyError, match=key):
            layout.from_state_dict({k: v for k, v in state.items() if k != key})


def _with_field(name: str, value: object) -> dict[str, torch.Tensor]:
    state = layout.to_state_dict(quantize_nf4(torch.randn(64, 64), double_quant=True))
    fields = json.loads(bytes(state[layout.QUANT_STATE].tolist()))
    fields[name] = value
    if value is None:
        del fields[name]
    state[layout.QUANT_STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    return state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quant_type", "fp4"), ("quant_type", None), ("blocksize", 48), ("blocksize", "64"), ("blocksize", True),
        ("dtype", "int8"), ("dtype", [1]), ("shape", [64, 65]), ("shape", 64), ("shape", None), ("shape", [-64, -64]),
        ("nested_blocksize", 128), ("nested_dtype", "float16"), ("nested_offset", "x"), ("nested_dtype", None),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"weight|block_size"):
        layout.from_state_dict(_with_field(name, value))


def test_a_dropped_offset_contradicts_the_nested_keys() -> None:
    with pytest.raises(ValueError, match="nested_absmax"):
        layout.from_state_dict(_with_field("nested_offset", None))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (layout.QUANT_MAP, torch.linspace(-1, 1, 16)),
        (layout.QUANT_MAP, torch.zeros(8)),
        (layout.NESTED_QUANT_MAP, torch.linspace(-1, 1, 256)),
        (layout.ABSMAX, torch.zeros(63, dtype=torch.uint8)),
        (layout.ABSMAX, torch.zeros(64)),
        (layout.NESTED_ABSMAX, torch.zeros(2)),
        (layout.NESTED_ABSMAX, torch.zeros(1, dtype=torch.bfloat16)),
        (layout.WEIGHT, torch.zeros(2047, 1, dtype=torch.uint8)),
        (layout.QUANT_STATE, torch.tensor([123, 255], dtype=torch.uint8)),
        (layout.QUANT_STATE, torch.tensor([49], dtype=torch.uint8)),
        (layout.QUANT_STATE, torch.zeros(4)),
    ],
)
def test_wrong_tensors_are_refused(key: str, value: torch.Tensor) -> None:
    state = layout.to_state_dict(quantize_nf4(torch.randn(64, 64), double_quant=True))
    with pytest.raises(ValueError, match=key.rpartition(".")[2].replace("bitsandbytes__nf4", "quant_state")):
        layout.from_state_dict({**state, key: value})
