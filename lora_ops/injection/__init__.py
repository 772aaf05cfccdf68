"""Fused LoRA and NF4 layers in any Hugging Face model: `inject`, the ways back, and the report.

Imports torch only: peft and transformers are imported when a function needs them.
"""

from lora_ops.injection._inject import InjectionError, eject, inject
from lora_ops.injection._merge import merge
from lora_ops.injection._quantize import quantize
from lora_ops.injection.report import InjectionReport, LayerReport, injection_report

__all__ = [
    "InjectionError",
    "InjectionReport",
    "LayerReport",
    "eject",
    "inject",
    "injection_report",
    "merge",
    "quantize",
]
