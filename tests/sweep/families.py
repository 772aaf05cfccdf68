"""The families of transformers that the sweep builds, one class each."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from transformers.models.auto import modeling_auto

# In this order: a family that stands in several tables is built as the first of them.
_TABLES = {
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "causal": "CAUSAL_LM",
    "encoder": "MASKED_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "speech ctc": "CTC",
    "audio": "AUDIO_CLASSIFICATION",
    "vision": "IMAGE_CLASSIFICATION",
    "image-text": "IMAGE_TEXT_TO_TEXT",
    "classifier": "SEQUENCE_CLASSIFICATION",
}


@dataclass(frozen=True)
class Family:
    """A row of the sweep.

    Attributes:
        model_type: as in config.json.
        kind: which of transformers' tables it was taken from.
        class_name: of the model, in transformers.
    """

    model_type: str
    kind: str
    class_name: str

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.class_name)


def families() -> list[Family]:
    """Every family of the tables that this transformers has, in the tables' order, once each."""
    found: dict[str, Family] = {}
    for kind, table in _TABLES.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
        for model_type, class_name in names.items():
            name = class_name[0] if isinstance(class_name, (tuple, list)) else class_name
            found.setdefault(model_type, Family(model_type, kind, name))
    return list(found.values())
