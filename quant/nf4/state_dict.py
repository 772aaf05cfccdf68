"""The state dict of a bitsandbytes `Linear4bit`, read and written byte for byte, without bitsandbytes.

Layout of version 0.50: the packed codes, one tensor a scale, both code books, and the rest as JSON in a uint8 tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4.tensor import NESTED_BLOCK_SIZE, NF4Tensor, check_nf4, nf4_code
from lora_ops.runtime.checks import dtype_name

WEIGHT = "weight"
ABSMAX = "weight.absmax"
QUANT_MAP = "weight.quant_map"
NESTED_ABSMAX = "weight.nested_absmax"
NESTED_QUANT_MAP = "weight.nested_quant_map"
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
FP4_QUANT_STATE = "weight.quant_state.bitsandbytes__fp4"

KEYS = (WEIGHT, ABSMAX, QUANT_MAP, QUANT_STATE)  # every state dict has them
NESTED_KEYS = (NESTED_ABSMAX, NESTED_QUANT_MAP)  # a double-quantized one has these too

_WEIGHT_KEYS = (ABSMAX, QUANT_MAP, *NESTED_KEYS)
_, _WEIGHT_QUANT_STATE, _FORMAT = QUANT_STATE.split(".")
KEYS_AS_ATTRIBUTES = SimpleNamespace(
    weight=SimpleNamespace(
        **{key.partition(".")[2]: None for key in _WEIGHT_KEYS},
        **{_WEIGHT_QUANT_STATE: SimpleNamespace(**{_FORMAT: None})},
    )
)

_DTYPES = {dtype_name(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")


def to_state_dict(q: NF4Tensor) -> dict[str, Tensor]:
    """The state dict that a bitsandbytes `Linear4bit` with the weight `q` writes, in its order, without the bias.

    Args:
        q: the quantized weight.

    Returns:
        `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4` (on the CPU, as
        bitsandbytes has it), and `weight.nested_absmax`, `weight.nested_quant_map` if q is double-quantized. Codes and
        scales share memory with q; the code books are fresh copies, so that safetensors sees no shared memory.

    Raises:
        TypeError, ValueError: if q's parts do not fit each other.
    """
    check_nf4("q", q)
    tensors = {WEIGHT: q.packed, ABSMAX: q.absmax, QUANT_MAP: nf4_code(q.device)}
    fields: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": dtype_name(q.dtype),
        "shape": tuple(q.shape),
    }
    if q.nested_absmax is not None and q.nested_offset is not None:
        tensors[NESTED_ABSMAX] = q.nested_absmax
        tensors[NESTED_QUANT_MAP] = dynamic_map(True).clone().to(q.device)
        fields["nested_blocksize"] = NESTED_BLOCK_SIZE
        fields["nested_dtype"] = "float32"
        # A meta tensor has no value; the key must still be listed.
        fields["nested_offset"] = 0.0 if q.device.type == "meta" else q.nested_offset.item()
    tensors[QUANT_STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    return tensors


def from_state_dict(state: Mapping[str, Tensor]) -> NF4Tensor:
    """Read what `to_state_dict`, or a bitsandbytes `Linear4bit` (nf4, nested or not), wrote.

    Args:
        state: by the keys of `to_state_dict`; others are ignored. `weight` may be of any dtype of the same bytes
            (bitsandbytes' quant_storage), and `weight.absmax` what a layer that was repacked for inference writes.

    Returns:
        The NF4Tensor; codes and scales share memory with `state`.

    Raises:
        KeyError: if a key is missing.
        ValueError: if the weight is not nf4, a code book is not the one that lora_ops computes with, or a part does not
            fit the others. The message names the key.
    """
    if FP4_QUANT_STATE in state:
        raise ValueError(f"{FP4_QUANT_STATE}: expected an nf4 weight ({QUANT_STATE}), got fp4")
    for key in KEYS:
        if key not in state:
            raise KeyError(f"{key}: missing from the state dict of an nf4 weight")
    fields = _read_fields(state[QUANT_STATE])
    nested = "nested_offset" in fields
    if not nested and (present := [key for key in NESTED_KEYS if key in state]):
        raise ValueError(f"{present[0]}: expected no such key, since {QUANT_STATE} has no nested_offset")
    for key in NESTED_KEYS if nested else ():
        if key not in state:
            raise KeyError(f"{key}: missing from the state dict of a double-quantized nf4 weight")
    packed = state[WEIGHT]
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    _check_code_book(QUANT_MAP, state[QUANT_MAP], nf4_code())
    absmax, offset = state[ABSMAX], None
    if not nested and absmax.dtype == torch.bfloat16 and absmax.dim() == 2:
        absmax = absmax.t().float().reshape(-1)  # [K / block_size, N]: by a forward in eval() of bitsandbytes 0.50
    if nested:
        _check_code_book(NESTED_QUANT_MAP, state[NESTED_QUANT_MAP], dynamic_map(True))
        offset = torch.tensor(fields["nested_offset"], dtype=torch.float32, device=packed.device)
    q = NF4Tensor(
        packed if packed.dim() == 2 and packed.shape[1] == 1 else packed.reshape(-1, 1),
        absmax.contiguous(),
        tuple(fields["shape"]),
        _DTYPES[fields["dtype"]],
        fields["blocksize"],
        state[NESTED_ABSMAX].contiguous() if nested else None,
        offset,
    )
    check_nf4(WEIGHT, q)
    return q


def _read_fields(packed: Tensor) -> dict[str, Any]:
    """The JSON of QUANT_STATE, with every field that NF4Tensor needs checked."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.is_meta:
        raise ValueError(
            f"{QUANT_STATE}: expected the bytes of a JSON object (uint8, 1-d), "
            f"got {packed.dtype} {tuple(packed.shape)} on {packed.device}"
        )
    try:
        fields = json.loads(bytes(packed.tolist()))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{QUANT_STATE}: expected the bytes of a JSON object, got others ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{QUANT_STATE}: expected the bytes of a JSON object, got {fields!r}")
    wanted = _FIELDS + (_NESTED_FIELDS if "nested_offset" in fields else ())
    if missing := [name for name in wanted if name not in fields]:
        raise ValueError(f"{QUANT_STATE}: expected the fields {', '.join(wanted)}, lacks {', '.join(missing)}")
    _expect(fields, "quant_type", fields["quant_type"] == "nf4", "'nf4'")
    _expect(fields, "blocksize", type(fields["blocksize"]) is int, "an integer")
    _expect(fields, "dtype", fields["dtype"] in list(_DTYPES), f"one of {', '.join(_DTYPES)}")
    shape = fields["shape"]
    _expect(fields, "shape", isinstance(shape, list) and all(type(d) is int and d >= 0 for d in shape), "sizes")
    if "nested_offset" in fields:
        _expect(fields, "nested_blocksize", fields["nested_blocksize"] == NESTED_BLOCK_SIZE, str(NESTED_BLOCK_SIZE))
        _expect(fields, "nested_dtype", fields["nested_dtype"] == "float32", "'float32'")
        _expect(fields, "nested_offset", isinstance(fields["nested_offset"], float), "a float")
    return fields


def _expect(fields: dict[str, Any], name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{QUANT_STATE}: {name}: expected {expected}, got {fields[name]!r}")


def _check_code_book(key: str, got: Tensor, expected: Tensor) -> None:
    """Codes mean what the book says; a kernel has its own copy, so another book would decode to wrong values."""
    if got.is_meta:
        return
    if got.dtype != expected.dtype or got.shape != expected.shape or not torch.equal(got.cpu(), expected):
        raise ValueError(
            f"{key}: expected the {expected.numel()} values of bitsandbytes' code book, got {dtype_name(got.dtype)} "
            f"{tuple(got.shape)} with other values"
        )
