"""A linear layer with a low-rank update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_ops import functional
from lora_ops.nn.dense import weight_of
from lora_ops.nn.nf4_linear import NF4Linear, add_to_nf4, in_compute_dtype
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime.checks import check_probability

QUANTIZE = (None, "nf4")


def check_quantize(quantize: str | None) -> None:
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize: expected one of {', '.join(map(repr, QUANTIZE))}, got {quantize!r}")


class LoRALinear(nn.Module):
    """Linear layer with a low-rank update over a frozen weight: y = x Wᵀ + b + scale · drop(x) Aᵀ Bᵀ.

    scale = lora_alpha / r, or lora_alpha / √r with `use_rslora`. A is drawn as nn.Linear draws its weight and B is
    zero, so that a new layer computes what its base does. Both are float32 unless `dtype` says otherwise, also over
    16-bit activations. The base is frozen. The state dict holds `base_layer.*`, `lora_A.weight` [R, K] and
    `lora_B.weight` [N, R].

    Args:
        in_features: K.
        out_features: N.
        r: rank R, at least 1.
        lora_alpha: numerator of scale.
        lora_dropout: probability to drop an element of the low-rank branch's input, in training only.
        bias: whether the base has one.
        use_rslora: divide by √r.
        base_layer: nn.Linear or NF4Linear to take as base; a random nn.Linear if None.
        device: of new tensors; that of the base by default.
        dtype: of lora_A and lora_B.

    Raises:
        TypeError, ValueError: if r, lora_dropout or base_layer does not fit.

    Source: LoRA (Hu et al. 2021), equation 3; rsLoRA (Kalajdzievski 2023).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        *,
        base_layer: nn.Linear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected an integer of at least 1, got {r!r}")
        check_probability("lora_dropout", lora_dropout)
        if base_layer is None:
            base_layer = nn.Linear(in_features, out_features, bias, device=device)
        if (base_layer.in_features, base_layer.out_features) != (in_features, out_features):
            raise ValueError(
                f"base_layer: expected (K={in_features}, N={out_features}), "
                f"got ({base_layer.in_features}, {base_layer.out_features})"
            )
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.in_features, self.out_features = in_features, out_features
        self.scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.base_layer = base_layer.requires_grad_(False)
        device = base_layer.weight.device if device is None else device
        self.lora_A = nn.Linear(in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, out_features, bias=False, device=device, dtype=dtype)
        self._unmerged: Tensor | NF4Tensor | None = None
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        quantize: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """Put a low-rank update on a layer, which becomes the base and is frozen.

        Args:
            linear: nn.Linear or NF4Linear; or transformers' Conv1D, whose weight is taken as a transposed view.
            r: rank.
            lora_alpha: numerator of scale.
            lora_dropout: dropout probability of the low-rank branch.
            use_rslora: divide lora_alpha by √r.
            quantize: None, or "nf4" to store the base's weight in double-quantized NF4.
            dtype: of lora_A and lora_B.

        Returns:
            The layer, in the train or eval mode of `linear`.

        Raises:
            TypeError, ValueError: if an argument is not one of those.
        """
        check_quantize(quantize)
        weight = weight_of(linear)
        if quantize == "nf4" and not isinstance(linear, NF4Linear):
            base: nn.Linear = NF4Linear.from_linear(linear)
        elif isinstance(linear, nn.Linear):
            base = linear
        else:
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            base.weight = nn.Parameter(weight.detach(), requires_grad=False)
            base.register_parameter("bias", linear.bias)
        layer = cls(
            base.in_features, base.out_features, r, lora_alpha, lora_dropout, use_rslora=use_rslora, base_layer=base,
            dtype=dtype,
        )  # fmt: skip
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """Draw lora_A from Kaiming's uniform distribution (a = √5) and zero lora_B, as PEFT does."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged:
            return base(x)
        if isinstance(base, NF4Linear):
            base._check_not_empty()
        dtype, x = x.dtype, in_compute_dtype(base, x)
        bias: Tensor | None = base.bias
        if bias is not None and isinstance(base, NF4Linear) and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        y = functional.lora_linear(
            x,
            base.quantized if isinstance(base, NF4Linear) else base.weight,
            self.lora_A.weight,
            self.lora_B.weight,
            scale=self.scale,
            bias=bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )
        return y if getattr(base, "compute_dtype", None) is None else y.to(dtype)

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight: W ← W + scale · B A, in float32 and rounded (or quantized) once.

        The weight as it was is kept, so that `unmerge` restores its bytes.

        Raises:
            RuntimeError: if the layer is merged already.
            ValueError: if the sum is not finite and the weight is in NF4.
        """
        if self.merged:
            raise RuntimeError("merge: the layer is merged already")
        base = self.base_layer
        delta = self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())  # [N, R] @ [R, K] -> [N, K]
        if isinstance(base, NF4Linear):
            original: Tensor | NF4Tensor = base.quantized
            base.quantized = add_to_nf4(base.quantized, delta)
        else:
            original = base.weight.data
            wide = torch.promote_types(original.dtype, torch.float32)
            base.weight.data = (original.to(wide) + delta).to(original.dtype)
        self._unmerged = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base's weight, to the bytes that it had before `merge`.

        Raises:
            RuntimeError: if the layer is not merged.
        """
        original, base = self._unmerged, self.base_layer
        if original is None:
            raise RuntimeError("unmerge: the layer is not merged")
        if isinstance(base, NF4Linear) and isinstance(original, NF4Tensor):
            base.quantized = original.to(base.weight.device)
        elif isinstance(original, Tensor):
            base.weight.data = original.to(base.weight.device, base.weight.dtype)
        self._unmerged = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:  # whoever loaded it would apply the update twice
            raise RuntimeError(f"state_dict: {prefix or 'the layer'} is merged; call unmerge() first")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, scale={self.scale:g}, "
            f"merged={self.merged}"
        )
