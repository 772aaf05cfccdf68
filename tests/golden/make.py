"""Writes nf4.safetensors: inputs and what bitsandbytes 0.50 makes of them. Run once: python -m tests.golden.make."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

PATH = Path(__file__).with_name("nf4.safetensors")
CASES = [(torch.float32, 32, 515), (torch.bfloat16, 64, 1000), (torch.float16, 128, 130), (torch.float32, 64, 64)]


def main() -> None:
    """Quantize each case with bitsandbytes and save inputs and outputs."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    tensors = {}
    for i, (dtype, block_size, n) in enumerate(CASES):
        w = torch.randn(n) * torch.logspace(-3, 3, n)
        w[:block_size] = 0
        w = w.to(dtype)
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
        parts = {"w": w, "packed": packed, "absmax": state.absmax, "block_size": torch.tensor(block_size)}
        tensors |= {f"{i}.{name}": t for name, t in parts.items()}
    save_file(tensors, PATH)


if __name__ == "__main__":
    main()
