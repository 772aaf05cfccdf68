"""A linear layer whose weight is in NF4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ops import functional
from lora_ops.nn.dense import weight_of
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, check_block_size, check_nf4
from lora_ops.quant.nf4 import state_dict as layout
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.sharding import is_sharded, local, sharded_as, view_as_dtype

# The scales stand in int32 Parameters that are viewed as float32 where they are used: module.to(dtype) casts floating
# tensors only, and so does an FSDP2 mixed-precision policy. A buffer would not be sharded; so the offset is one, since
# its value goes into the state dict of every rank.
_ABSMAX, _NESTED_ABSMAX, _NESTED_OFFSET = "weight_absmax", "weight_nested_absmax", "weight_nested_offset"


class NF4Linear(nn.Linear):
    """Linear layer whose frozen weight is stored in NF4: y = x Wᵀ + b with W = dequantize(weight).

    Its state dict is that of a bitsandbytes `Linear4bit` (quant_type "nf4"), byte for byte, and it loads one. The
    constructor makes an empty layer to load such a state dict into; `from_linear` quantizes a layer. `.to(dtype)` casts
    the bias only. The product runs in x's dtype, or in `compute_dtype` where that attribute is set, as it is on a layer
    that was bitsandbytes' with one; y has x's dtype either way.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer adds one.
        block_size: elements that share one absmax; a loaded state dict decides anew.
        double_quant: whether absmax is itself quantized to 8 bits; a loaded state dict decides anew.
        device: of the tensors; on "meta", loading takes over the tensors of the state dict.
        dtype: of the bias, and the default of `dequantize`.

    Raises:
        ValueError: if block_size is not one of NF4's.
    """

    weight_absmax: nn.Parameter
    source_cls: type[nn.Module] = nn.Linear  # of the layer that was quantized; transformers' 4-bit layers keep it too
    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the dense weight
        check_block_size(block_size)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.in_features, self.out_features = in_features, out_features
        n = in_features * out_features
        n_blocks = -(-n // block_size)
        absmax_dtype = torch.uint8 if double_quant else torch.float32
        self._set(
            NF4Tensor(
                torch.zeros((n + 1) // 2, 1, dtype=torch.uint8, device=device),
                torch.zeros(n_blocks, dtype=absmax_dtype, device=device),
                (out_features, in_features),
                dtype,
                block_size,
                torch.zeros(-(-n_blocks // NESTED_BLOCK_SIZE), device=device) if double_quant else None,
                torch.zeros((), device=device) if double_quant else None,
            )
        )
        self._empty = True
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self.requires_grad_(False)

    @classmethod
    def from_linear(cls, linear: Any, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantize the weight of a linear layer.

        Args:
            linear: nn.Linear, or transformers' Conv1D, whose weight is taken transposed.
            block_size: elements that share one absmax.
            double_quant: quantize absmax as well.

        Returns:
            A layer that shares the bias of `linear` (the same Parameter), in its train or eval mode.

        Raises:
            TypeError: if `linear` is neither of the two.
            ValueError: if its weight is not float32, bfloat16 or float16, or not finite.
        """
        if isinstance(linear, NF4Linear):
            raise TypeError("linear: expected an nn.Linear or transformers' Conv1D, got an NF4Linear")
        q = functional.quantize_nf4(weight_of(linear), block_size=block_size, double_quant=double_quant)
        layer = cls.from_quantized(q, linear.bias)
        layer.source_cls = type(linear)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(cls, q: NF4Tensor, bias: nn.Parameter | None = None) -> NF4Linear:
        """Wrap a quantized weight.

        Args:
            q: of shape (N, K); its tensors are shared.
            bias: [N], becomes the layer's bias as it is.

        Returns:
            The layer.

        Raises:
            TypeError, ValueError: if q is not a matrix in NF4.
        """
        check_nf4("q", q, dim=2)
        n, k = q.shape
        layer = cls(k, n, bias=False, block_size=q.block_size, double_quant=q.nested, device="meta", dtype=q.dtype)
        layer.quantized = q
        layer.register_parameter("bias", bias)
        return layer

    @property
    def quantized(self) -> NF4Tensor:
        """The weight, of shape (N, K); its tensors are the layer's. Assigning one takes over its tensors."""
        absmax = self.weight_absmax.detach()
        nested_absmax, offset = self._parameters[_NESTED_ABSMAX], self._buffers[_NESTED_OFFSET]
        return NF4Tensor(
            self.weight.detach(),
            absmax if absmax.dtype == torch.uint8 else view_as_dtype(absmax, torch.float32),
            (self.out_features, self.in_features),
            self.quantized_dtype,
            self.block_size,
            None if nested_absmax is None else view_as_dtype(nested_absmax.detach(), torch.float32),
            None if offset is None else offset.view(torch.float32),
        )

    @quantized.setter
    def quantized(self, q: NF4Tensor) -> None:
        check_nf4("q", q, dim=2)
        if tuple(q.shape) != (self.out_features, self.in_features):
            raise ValueError(f"q: expected shape (N={self.out_features}, K={self.in_features}), got {tuple(q.shape)}")
        if self.sharded and (q.block_size, q.nested) != (own := (self.block_size, self.double_quant)):
            raise ValueError(
                f"q: expected block_size={own[0]}, double_quant={own[1]}, as when the layer was sharded, got "
                f"block_size={q.block_size}, double_quant={q.nested}"
            )
        self._set(q)
        self._empty = False

    def _set(self, q: NF4Tensor) -> None:
        self.block_size, self.quantized_dtype = q.block_size, q.dtype
        offset = None if q.nested_offset is None else q.nested_offset.detach().view(torch.int32)
        held = self._buffers.get(_NESTED_OFFSET)
        if held is None or offset is None or held.is_meta or held.device != offset.device:
            self.register_buffer(_NESTED_OFFSET, offset, persistent=False)
        else:
            held.data = offset
        for name, t in {"weight": q.packed, _ABSMAX: q.absmax, _NESTED_ABSMAX: q.nested_absmax}.items():
            if t is None:
                self.register_parameter(name, None)
                continue
            bits = t.detach() if t.dtype == torch.uint8 else view_as_dtype(t.detach(), torch.int32)
            current = self._parameters.get(name)
            if is_sharded(current):
                bits = sharded_as(bits, current)
            if current is None or current.is_meta or current.device != bits.device:
                self.register_parameter(name, nn.Parameter(bits, requires_grad=False))
            elif is_sharded(current):
                local(current).copy_(local(bits))  # FSDP2 gathers from this memory
            else:
                current.data = bits  # whoever holds the Parameter sees the new weight

    @property
    def double_quant(self) -> bool:
        """Whether absmax is itself quantized to 8 bits."""
        return self._parameters[_NESTED_ABSMAX] is not None

    @property
    def sharded(self) -> bool:
        """Whether this rank has a part of the weight only, as under FSDP2 outside of a forward or backward."""
        return is_sharded(self._parameters["weight"])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor: W[e] = NF4_CODE[code e] · absmax[e // block_size].

        Args:
            dtype: of the result; that of the tensor that was quantized if None.

        Returns:
            [N, K].

        Raises:
            RuntimeError: if the layer is empty, or sharded.
        """
        self._check_not_empty()
        if self.sharded:
            raise RuntimeError(
                f"NF4Linear({self.in_features}, {self.out_features}): this rank has a part of the weight only; call "
                "unshard() of the FSDPModule that it belongs to before"
            )
        return functional.dequantize_nf4(self.quantized, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        self._check_not_empty()
        x = in_compute_dtype(self, input)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)  # the weight follows x's dtype, so its bias does too
        y = functional.nf4_linear(x, self.quantized, bias)
        return y if self.compute_dtype is None else y.to(input.dtype)

    def _check_not_empty(self) -> None:
        if self._empty:
            raise RuntimeError(
                f"NF4Linear({self.in_features}, {self.out_features}): the layer is empty; load a state dict into it, "
                "or make it with NF4Linear.from_linear"
            )

    def reset_parameters(self) -> None:
        """Nothing: a quantized weight is loaded, never drawn. Model initializers call this on every nn.Linear."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, "
            f"dtype={dtype_name(self.quantized_dtype)}"
            + ("" if self.compute_dtype is None else f", compute_dtype={dtype_name(self.compute_dtype)}")
        )

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As for any module; of a sharded layer also what its state dict has beside the weight.

        torch.distributed asks each module for its buffers and Parameters, and sends a state dict that one rank has to
        the others by these names.
        """
        yield from super().named_buffers(*args, **kwargs)
        if self.sharded:
            prefix = kwargs.get("prefix", args[0] if args else "")
            for key, t in layout.to_state_dict(self.quantized).items():
                if key != layout.WEIGHT:
                    yield f"{prefix}.{key}" if prefix else key, t.to(self.weight.device)

    def state_dict_keys(self) -> dict[str, list[str]]:
        """By name of each Parameter that holds scales: the keys of the state dict that say the same."""
        keys = {_ABSMAX: [layout.ABSMAX, layout.QUANT_MAP, layout.QUANT_STATE]}
        return keys | {_NESTED_ABSMAX: list(layout.NESTED_KEYS)} if self.double_quant else keys

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed, which follows a key such as weight.absmax attribute by attribute: where it leads."""
        return {"weight": "_keys"}

    _keys = layout.KEYS_AS_ATTRIBUTES

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        state = layout.to_state_dict(self.quantized)
        destination[prefix + layout.WEIGHT] = self.weight if keep_vars else state[layout.WEIGHT]
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for key, value in state.items():
            destination.setdefault(prefix + key, value)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All of it is read and checked before anything is written; the weight is written as a whole or not at all."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        # torch.distributed adds a model's own Parameters to a full state dict that it is given.
        known = {*layout.KEYS, *layout.NESTED_KEYS, layout.FP4_QUANT_STATE, _ABSMAX, _NESTED_ABSMAX, "bias"}
        if strict:
            unexpected_keys += [prefix + k for k in own if k not in known]
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        errors: list[str] = []
        missing: list[str] = []
        q = self._read_weight(own, prefix, missing, errors)
        bias = own.get("bias")
        if self.bias is None:
            if strict and bias is not None:
                unexpected_keys.append(prefix + "bias")
        elif bias is None:
            missing.append(prefix + "bias")
        elif tuple(bias.shape) != (self.out_features,):
            errors.append(f"{prefix}bias: expected shape ({self.out_features},), got {tuple(bias.shape)}")
        error_msgs += errors
        missing_keys += missing
        half_a_weight = q is None and any(key in own for key in (*layout.KEYS, *layout.NESTED_KEYS))
        if errors or half_a_weight:
            return
        if q is not None:
            self.quantized = q if assign or self.sharded or self.weight.is_meta else _copy_to(q, self.weight.device)
        if self.bias is not None and bias is not None:
            if is_sharded(self.bias):
                bias = sharded_as(bias, self.bias)
            if assign or self.bias.is_meta:
                self.bias = nn.Parameter(bias.detach(), requires_grad=self.bias.requires_grad)
            else:
                with torch.no_grad():
                    self.bias.copy_(bias)

    def _read_weight(
        self, own: Mapping[str, Tensor], prefix: str, missing: list[str], errors: list[str]
    ) -> NF4Tensor | None:
        absent = [prefix + key for key in layout.KEYS if key not in own]
        if absent and layout.FP4_QUANT_STATE not in own:
            missing += absent
            return None
        try:
            q = layout.from_state_dict(own)
        except KeyError as error:  # a nested key, which only a double-quantized weight has
            missing.append(prefix + str(error.args[0]).partition(":")[0])
            return None
        except ValueError as error:
            errors.append(prefix + str(error))
            return None
        if q.shape != (self.out_features, self.in_features):
            errors.append(
                f"{prefix}{layout.QUANT_STATE}: shape: expected (N={self.out_features}, K={self.in_features}), "
                f"got {tuple(q.shape)}"
            )
            return None
        return q


def in_compute_dtype(base: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype in which `base` multiplies it: its own, unless base is an NF4Linear with a compute_dtype."""
    dtype = getattr(base, "compute_dtype", None)
    return x if dtype is None or not x.dtype.is_floating_point else x.to(dtype)


def _copy_to(q: NF4Tensor, device: torch.device) -> NF4Tensor:
    """The same value in tensors of its own, so that the layer does not change with the state dict."""
    parts = (q.absmax, q.nested_absmax, q.nested_offset)
    absmax, nested_absmax, offset = (None if t is None else t.detach().to(device, copy=True) for t in parts)
    packed = q.packed.detach().to(device, copy=True)
    return NF4Tensor(packed, absmax, q.shape, q.dtype, q.block_size, nested_absmax, offset)  # type: ignore[arg-type]


def add_to_nf4(q: NF4Tensor, delta: Tensor) -> NF4Tensor:
    """quantize(dequantize(q) + delta), summed in float32, with q's block size and nesting."""
    dense = functional.dequantize_nf4(q, dtype=torch.float32) + delta
    return replace(functional.quantize_nf4(dense, block_size=q.block_size, double_quant=q.nested), dtype=q.dtype)
