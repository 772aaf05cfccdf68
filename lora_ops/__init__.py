"""lora_ops: fused LoRA and NF4 kernels for fine-tuning language models."""

from lora_ops import functional, nn, optim
from lora_ops.injection import eject, inject, injection_report, merge, quantize
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime.backends import BackendError, use_backend
from lora_ops.runtime.trace import Trace, trace
from lora_ops.version import __version__

__all__ = [
    "BackendError",
    "NF4Tensor",
    "Trace",
    "__version__",
    "eject",
    "functional",
    "inject",
    "injection_report",
    "merge",
    "nn",
    "optim",
    "quantize",
    "trace",
    "use_backend",
]
