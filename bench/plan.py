"""What a run measures: device, shapes, tokens, effort."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Effort:
    """How long a comparison is timed: rounds of every contender in turn, until `seconds` are spent."""

    min_rounds: int = 7
    max_rounds: int = 200
    seconds: float = 4.0
    warmup: int = 2


@dataclass(frozen=True)
class Plan:
    """Shapes and device of a run.

    Attributes:
        device: "cpu" or "cuda".
        shapes: (N, K) of the weights of the codec, nf4_linear and frozen_linear.
        tokens: values of M for nf4_linear and frozen_linear.
        lora_shapes, lora_tokens, ranks: the same for lora_linear.
        generation_tokens: of its forward without autograd.
        adapter_dtypes: of lora_a and lora_b; float32 is what PEFT makes of them by default.
        dropouts: probabilities of lora_linear.
        gpu_contenders: whether those take part that are of interest on a GPU alone: each route of lora_linear,
            Unsloth's way.
        compiler: the backend of torch.compile, whose suite runs on a GPU alone.
        dtype: of the activations.
        backends: of lora_ops, each a contender of its own; "auto" is the library's own choice.
        effort: how long each comparison is timed.
    """

    device: str = "cpu"
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)
    tokens: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
    lora_shapes: tuple[tuple[int, int], ...] = ((2048, 2048),)
    lora_tokens: tuple[int, ...] = (2048,)
    ranks: tuple[int, ...] = (16,)
    generation_tokens: tuple[int, ...] = (1,)
    adapter_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    dropouts: tuple[float, ...] = (0.0, 0.05)
    gpu_contenders: bool = False
    compiler: str = "inductor"
    dtype: torch.dtype = torch.bfloat16
    backends: tuple[str, ...] = ("auto",)
    effort: Effort = Effort()
