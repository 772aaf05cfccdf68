"""An NF4 model without adapters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_ops.injection._inject import require
from lora_ops.nn import check_quantize


def quantize(model: nn.Module, *, quantize: str = "nf4", skip_modules: str | Iterable[str] | None = None) -> nn.Module:
    """Store the weights of a model's linear layers in double-quantized NF4, in place: W ← dequantize(quantize(W)).

    The layers are those that `inject(model, quantize="nf4")` takes, which are quantized one after the other. All
    Parameters are frozen. The model runs as it is, takes adapters by `inject` or by PEFT's `get_peft_model`
    (docs/peft_methods.md lists the methods that can stand on it), counts its parameters as the dense model does, and is
    saved by `save_pretrained` such that transformers loads it with bitsandbytes.

    Args:
        model: a transformers model or any nn.Module, without adapters.
        quantize: "nf4".
        skip_modules: modules that stay dense, as in `inject`.

    Returns:
        The same model.

    Raises:
        ImportError: if peft or transformers is missing.
        TypeError: if model is not an nn.Module.
        ValueError: if quantize is not "nf4", the model has adapters, skip_modules names none of its modules, or a
            weight is not finite, offloaded or on the meta device.

    Source: QLoRA (Dettmers et al. 2023), section 3.
    """
    require("peft", "transformers")
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lora_ops.injection import convert, describe, protect
    from lora_ops.injection.state_dict import know_nf4_parameters

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_quantize(quantize)
    if quantize is None:
        raise ValueError("quantize: expected 'nf4', got None")
    if name := next((name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None):
        raise ValueError(
            f'model: expected no adapters, got some in {name}; inject(model, quantize="nf4") takes a PeftModel'
        )
    kept = protect.kept_dense(model, protect.check_skip_modules(skip_modules, quantize))
    protect.check_quantizable(model, kept)
    convert.convert_bases(model.requires_grad_(False), quantize, kept)
    describe.describe(model)
    know_nf4_parameters(model)
    return model
