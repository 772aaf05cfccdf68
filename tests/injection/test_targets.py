"""Which layers get adapters under "all-linear", and which of PEFT's task types suits a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_ops
from tests import models
from tests.injection.test_heads import TEXT, VISION, WAV2VEC2

peft = pytest.importorskip("peft")
targets = pytest.importorskip("lora_ops.injection.targets")


def adapted(model: nn.Module) -> set[str]:
    layers = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return {name.removeprefix("base_model.model.") for name in layers}


class Nested(nn.Module):
    """Modules that are no linear layers under the names of some that are."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tail = nn.ModuleDict({"proj": other, "deep": nn.ModuleDict({"out": nn.LayerNorm(8)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.tail["deep"]["out"](self.out(self.proj(x)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))), {"0", "1.1"}),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"0", "1"}),
        (nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])[0]), {"0", "1"}),
        (Nested(nn.Embedding(8, 8)), {"proj", "out"}),
        (Nested(nn.Conv1d(8, 8, 1)), {"proj", "out"}),
        (Nested(nn.Dropout(0.1)), {"proj", "out"}),
        (Nested(nn.MultiheadAttention(8, 2)), {"proj", "out"}),  # which reads the weight of its out_proj
        (Nested(nn.Bilinear(8, 8, 8)), {"proj", "out"}),
    ],
)
def test_all_linear_of_a_plain_module_is_its_linear_layers(
    model: nn.Module, expected: set[str], tmp_path: Path
) -> None:
    twin = copy.deepcopy(model)
    ours = lora_ops.inject(model, r=2)
    assert adapted(ours) == expected
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert adapted(theirs) == expected
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_model_of_transformers_is_anchored_too() -> None:
    model = models.llama()
    model.q_proj = nn.Linear(4, 4)  # whose name others end in
    model.model.extra = nn.ModuleDict({"q_proj": nn.Conv2d(2, 2, 1)})
    names = adapted(lora_ops.inject(model, r=2))
    assert "q_proj" in names
    assert "model.extra.q_proj" not in names
    assert len(names) == 2 * 7 + 1


def test_nothing_to_adapt_is_said() -> None:
    message = "target_modules: 'all-linear' finds no linear layer in Sequential that is not trained whole"
    with pytest.raises(ValueError, match=message):
        lora_ops.inject(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    with pytest.raises(ValueError, match=message):
        lora_ops.inject(nn.Sequential(nn.Linear(4, 4)), modules_to_save=["0"])


# Task types


def _config(name: str, **kwargs: Any) -> Any:
    return getattr(transformers, name)(**kwargs)


_SPEECH = {"vocab_size": models.VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
           "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
_labels = {"labels": models.token_ids(2, 5)}
_mel = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}
_image = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = _config("WhisperConfig", **_SPEECH, num_mel_bins=8, begin_suppress_tokens=None, suppress_tokens=None)
    return transformers.WhisperForConditionalGeneration(config), _mel


def _speech2text() -> tuple[nn.Module, dict[str, Any]]:
    config = _config("Speech2TextConfig", **_SPEECH, input_feat_per_channel=8, input_channels=1, conv_channels=16)
    features = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
    return transformers.Speech2TextForConditionalGeneration(config), {"input_features": features}


def _decoder(**kwargs: Any) -> Any:
    return _config("BertConfig", **{**TEXT, **kwargs}, is_decoder=True, add_cross_attention=True)


def _with_start(model: Any) -> nn.Module:
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return model


def _image_to_text() -> tuple[nn.Module, dict[str, Any]]:
    cls = transformers.VisionEncoderDecoderModel
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), _decoder()
    )
    return _with_start(cls(config)), _image


def _speech_to_text() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.Wav2Vec2Config(**WAV2VEC2), _decoder()
    )
    wave = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    return _with_start(transformers.SpeechEncoderDecoderModel(config)), {"input_values": wave}


def _blip() -> tuple[nn.Module, dict[str, Any]]:
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "encoder_hidden_size": 32}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    return transformers.BlipForConditionalGeneration(config), {**_image, "input_ids": models.token_ids(2, 5)}


GENERATORS = {
    "whisper": _whisper,
    "speech2text": _speech2text,
    "image to text": _image_to_text,
    "speech to text": _speech_to_text,
    "blip": _blip,
}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("family", GENERATORS)
def test_models_whose_input_is_not_tokens_run(family: str, quantize: str | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, inputs = GENERATORS[family]()
    base.eval()
    with torch.no_grad():
        expected = base(**inputs, **_labels).loss
    model = lora_ops.inject(base, r=2, quantize=quantize)
    assert model.peft_config["default"].task_type is None
    loss = model(**inputs, **_labels).loss
    if quantize is None:  # lora_B is zero
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "lora_B" in n)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2


def _bert(kind: str) -> nn.Module:
    return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**TEXT))


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (models.llama, "CAUSAL_LM"),
        (models.t5, "SEQ_2_SEQ_LM"),
        (lambda: _bert("SequenceClassification"), "SEQ_CLS"),
        (lambda: _bert("TokenClassification"), "TOKEN_CLS"),
        (lambda: _bert("QuestionAnswering"), None),  # PEFT's class drops token_type_ids
        (lambda: _bert("MaskedLM"), None),
        # Takes no attention_mask, which PEFT's class passes.
        (lambda: transformers.FNetForSequenceClassification(_config("FNetConfig", **TEXT)), None),
        (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), None),
        (lambda: nn.Linear(2, 2), None),
    ],
)
def test_task_types(make: Any, task: str | None) -> None:
    assert targets.task_type(make(), []) == task


def test_a_classifier_is_loaded_by_its_task_type(tmp_path: Path) -> None:
    base = _bert("SequenceClassification")
    base.save_pretrained(tmp_path / "base")
    model = lora_ops.inject(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base"), r=2).eval()
    for parameter in model.base_model.model.classifier.modules_to_save.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, expected = model(models.token_ids()).logits, theirs(models.token_ids()).logits
    torch.testing.assert_close(ours, expected)


def test_token_types_reach_a_model_for_questions() -> None:
    model = lora_ops.inject(_bert("QuestionAnswering"), r=2).eval()
    ids = models.token_ids()
    with torch.no_grad():
        zero, one = (model(ids, token_type_ids=torch.full_like(ids, i)).start_logits for i in (0, 1))
    assert not torch.equal(zero, one)


class Router(nn.Linear):
    """Returns scores and logits, as the routers of Llama 4 and Phi-3.5-MoE do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Grouped(nn.Linear):
    """Each group of features has a weight of its own: y has another shape than a linear layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gk,gnk->...gn", x.unflatten(-1, (2, -1)), self.weight.view(2, self.out_features, -1))


class Scaled(nn.Linear):
    """Not a linear layer's numbers, and yet a tensor of its features: PEFT can add to them."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Odd(nn.Module):
    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.first, self.odd = nn.Linear(8, 8), kind(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(self.first(x))
        return y[1] if isinstance(y, tuple) else y.sum(1, keepdim=True) if y.dim() > x.dim() else y


@pytest.mark.parametrize(("kind", "adapted"), [(Router, False), (Grouped, False), (Scaled, True)])
def test_all_linear_leaves_out_what_returns_no_features(
    kind: type[nn.Linear], adapted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora_ops.inject(Odd(kind), r=2)
    assert hasattr(model.base_model.model.odd, "lora_A") is adapted
    assert ("return no tensor of their features" in caplog.text) is not adapted
    model(torch.randn(3, 8)).sum().backward()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_routers_that_return_tuples(quantize: str | None) -> None:
    config = transformers.PhimoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    base = transformers.PhimoeForCausalLM(config)
    model = lora_ops.inject(base, r=2, quantize=quantize)
    assert not [name for name, m in model.named_modules() if name.endswith("router") and hasattr(m, "lora_A")]
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
