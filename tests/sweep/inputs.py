"""What a model is called with, by the names of its forward's arguments: seeded random tensors of a tiny batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.sweep.tiny import IMAGE, LENGTH, VOCAB

BATCH = 2
FRAMES = 64  # of a spectrogram
SAMPLES = 4000  # of a wave


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of one forward: the model's main input, and a decoder's tokens where it has a decoder."""
    generator = torch.Generator().manual_seed(1)
    config, name = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    if name not in accepted and "input_ids" in accepted:
        name = "input_ids"

    def tokens() -> Tensor:
        return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sides = getattr(config, "image_size", IMAGE)
    height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
    makers = {
        "input_ids": tokens,
        "pixel_values": lambda: noise(BATCH, getattr(config, "num_channels", 3), height, width),
        "input_values": lambda: noise(BATCH, SAMPLES),
        "input_features": lambda: noise(BATCH, *_spectrogram(config)),
    }
    if name not in makers:
        raise NotImplementedError(f"main input {name}")
    batch: dict[str, Any] = {name: makers[name]()}
    if "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = tokens()
    return batch | ({"use_cache": False} if "use_cache" in accepted else {})


def _spectrogram(config: object) -> tuple[int, int]:
    """[mel bins, frames], or frames first where a model's configuration names its features so."""
    encoder = getattr(config, "encoder_config", config)
    for name in ("num_mel_bins", "num_mel_features"):
        if hasattr(encoder, name):
            return getattr(encoder, name), FRAMES
    for name in ("input_feat_per_channel", "feature_projection_input_dim", "num_mels"):
        if hasattr(encoder, name):
            return FRAMES, getattr(encoder, name)
    raise NotImplementedError("features of a size that the configuration does not name")
