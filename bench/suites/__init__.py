"""Every suite: a function of a plan that yields comparisons. Adding an op is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.measure import Comparison
from bench.plan import Plan
from bench.suites import adamw, codec, frozen_linear, lora_linear, nf4_linear

SUITES: dict[str, Callable[[Plan], Iterator[Comparison]]] = {
    "quantize": codec.quantize,
    "dequantize": codec.dequantize,
    "nf4_linear": nf4_linear.forward,
    "nf4_linear_dx": nf4_linear.dx,
    "frozen_linear": frozen_linear.forward_backward,
    "lora_linear": lora_linear.forward_backward,
    "lora_generation": lora_linear.generation,
    "adamw": adamw.step,
    "adamw_pages": adamw.pages,
}

# Of the device suite alone.
GPU_SUITES: dict[str, Callable[[Plan], Iterator[Comparison]]] = {"lora_compiled": lora_linear.compiled}
