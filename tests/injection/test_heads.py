"""What is drawn anew is found by looking: trained whole, saved with the adapter, and never quantized."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_ops
from lora_ops.nn import NF4Linear
from tests import models

peft = pytest.importorskip("peft")
heads = pytest.importorskip("lora_ops.injection.heads")

TEXT = {"vocab_size": models.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
WAV2VEC2 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
            "mask_time_prob": 0.0, "tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1),
            "xvector_output_dim": 8}  # fmt: skip


def _ids(**extra: Any) -> dict[str, Any]:
    return {"input_ids": models.token_ids(2, 5), **extra}


def _text(name: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**{**TEXT, **kwargs}))


def _t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=models.VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
                                   dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
                                   decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForSequenceClassification(config)


def _bart() -> nn.Module:
    config = transformers.BartConfig(vocab_size=models.VOCAB, d_model=32, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
                                     decoder_ffn_dim=48, max_position_embeddings=64, eos_token_id=2,
                                     dropout=0.0)  # fmt: skip
    return transformers.BartForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=models.VOCAB, dim=32, hidden_dim=48, n_layers=1, n_heads=2,
                                           max_position_embeddings=64, dropout=0.0,
                                           seq_classif_dropout=0.0)  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


def _clip() -> nn.Module:
    return transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=VISION, num_labels=3))


def _wav2vec2(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(transformers.Wav2Vec2Config(**WAV2VEC2))


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(vocab_size=models.VOCAB, num_mel_bins=8, d_model=32, encoder_layers=1,
                                        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                        encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=8,
                                        classifier_proj_size=16, pad_token_id=0)  # fmt: skip
    return transformers.WhisperForAudioClassification(config)


def _double_heads() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=models.VOCAB, n_positions=64, n_embd=32, n_layer=1, n_head=2,
                                     summary_first_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
                                     attn_pdrop=0.0)  # fmt: skip
    return transformers.GPT2DoubleHeadsModel(config)


class ValueHead(nn.Module):
    """A causal model and a value head, as reinforcement learning wraps them."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_model = models.llama()
        self.v_head = nn.Sequential(nn.Dropout(0.0), nn.Linear(64, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.pretrained_model(input_ids=input_ids, output_hidden_states=True)
        return self.v_head(output.hidden_states[-1])


class TwoTowers(nn.Module):
    """Somebody's own module: two backbones, and two layers on top of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (transformers.BertModel(transformers.BertConfig(**TEXT)) for _ in range(2))
        self.mix, self.head = nn.Linear(64, 16), nn.Linear(16, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        pooled = [tower(input_ids).pooler_output for tower in (self.left, self.right)]
        return self.head(torch.tanh(self.mix(torch.cat(pooled, -1))))


_image = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
_wave = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
_mel = {"input_features": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))}

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "llama, one label": (lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**models._SIZES, num_labels=1)), _ids(), ["score"]),
    "qwen2, tokens": (lambda: transformers.Qwen2ForTokenClassification(
        transformers.Qwen2Config(**models._SIZES, classifier_dropout=0.0)), _ids(), ["score"]),
    "llama, questions": (lambda: transformers.LlamaForQuestionAnswering(
        transformers.LlamaConfig(**models._SIZES)), _ids(), ["qa_outputs"]),
    "bert": (_text("BertForSequenceClassification", "BertConfig"), _ids(), ["classifier"]),
    "bert, questions": (_text("BertForQuestionAnswering", "BertConfig"),
                        _ids(token_type_ids=torch.ones(2, 5, dtype=torch.long)), ["qa_outputs"]),
    "roberta": (_text("RobertaForSequenceClassification", "RobertaConfig"), _ids(), ["classifier"]),
    "distilbert": (_distilbert, _ids(), ["pre_classifier", "classifier"]),
    "deberta": (_text("DebertaV2ForSequenceClassification", "DebertaV2Config"), _ids(), ["pooler", "classifier"]),
    "fnet": (_text("FNetForSequenceClassification", "FNetConfig"), _ids(), ["classifier"]),
    "t5": (_t5, _ids(input_ids=torch.tensor([[5, 6, 1], [7, 8, 1]])), ["classification_head"]),
    "bart": (_bart, _ids(input_ids=torch.tensor([[5, 6, 2], [7, 8, 2]])), ["classification_head"]),
    "vit": (_vit, _image, ["classifier"]),
    "clip": (_clip, _image, ["classifier"]),
    "wav2vec2": (_wav2vec2("Wav2Vec2ForSequenceClassification"), _wave, ["projector", "classifier"]),
    "wav2vec2, letters": (_wav2vec2("Wav2Vec2ForCTC"), _wave, ["lm_head"]),
    "whisper": (_whisper, _mel, ["projector", "classifier"]),
    "gpt2, two heads": (_double_heads, _ids(mc_token_ids=torch.tensor([4, 4])), ["multiple_choice_head"]),
    "value head": (ValueHead, _ids(), ["v_head"]),
    "two towers": (TwoTowers, _ids(), ["mix", "head"]),
}  # fmt: skip


def build(case: str) -> tuple[nn.Module, dict[str, Any], list[str]]:
    make, inputs, names = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), inputs, names


def scores(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """What the model gives out in floating point: logits, of all its heads."""
    output = model(**inputs)
    if isinstance(output, Tensor):
        return [output]
    return [v for k, v in output.items() if "logits" in k]


def redraw(model: nn.Module, names: list[str]) -> nn.Module:
    """The heads as a second loading of the backbone draws them."""
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("case", CASES)
def test_a_head_is_trained_whole_saved_and_stays_dense(case: str, quantize: str | None, tmp_path: Path) -> None:
    base, inputs, names = build(case)
    fresh = redraw(copy.deepcopy(base), names)
    model = lora_ops.inject(base, r=2, quantize=quantize).eval()
    whole = {n for n, m in model.get_base_model().named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    assert whole == set(names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in trained)
    quantized = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert bool(quantized) == bool(quantize)
    assert not any(name.removeprefix("base_model.model.").startswith(tuple(names)) for name in quantized)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in trained}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # lora_B is zero at first, so that lora_A learns in the second step
        sum((s.float() ** 2 + s.float()).mean() for s in scores(model, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    heads_trained = [name for name in trained if ".modules_to_save." in name]
    assert len(heads_trained) == sum(len(list(fresh.get_submodule(name).parameters())) for name in names)
    assert any(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in heads_trained)

    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    if quantize:  # stock PEFT on the same rounded weights
        for name in quantized:
            nf4, dense = model.get_submodule(name), theirs.get_submodule(name)
            dense.weight.data = nf4.dequantize() if isinstance(dense, nn.Linear) else nf4.dequantize().T.contiguous()
    with torch.no_grad():
        for ours, expected in zip(scores(model, inputs), scores(theirs, inputs), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_language_model_has_no_new_head() -> None:
    for model in (*(make() for make in models.DECODERS.values()), models.t5()):
        assert heads.new_heads(model) == []
        config = lora_ops.inject(model, r=2).peft_config["default"]
        assert config.modules_to_save is None
    masked = _text("BertForMaskedLM", "BertConfig")()
    assert heads.new_heads(masked) == []


def test_projectors_of_a_checkpoint_are_no_heads() -> None:
    """CLIP's projections, and the one between an encoder and a decoder of other width, are trained with the towers."""
    clip = transformers.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=8)
    assert heads.new_heads(transformers.CLIPModel(clip)) == []
    decoder = transformers.BertConfig(**{**TEXT, "hidden_size": 16}, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    model = transformers.VisionEncoderDecoderModel(config)
    assert any(name == "enc_to_dec_proj" for name, _ in model.named_modules())
    assert heads.new_heads(model) == []


def test_what_a_checkpoint_lacks_is_drawn_anew_wherever_it_is(tmp_path: Path) -> None:
    _text("BertForMaskedLM", "BertConfig")().save_pretrained(tmp_path)  # without the pooler
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert heads.new_heads(model) == ["bert.pooler", "classifier"]
    model = lora_ops.inject(model, r=2, quantize="nf4")
    assert model.peft_config["default"].modules_to_save[:2] == ["bert.pooler", "classifier"]
    assert not any("pooler" in name for name, m in model.named_modules() if isinstance(m, NF4Linear))


def test_a_projector_that_a_checkpoint_lacks_is_drawn_anew(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path / "encoder")
    decoder = transformers.BertConfig(**{**TEXT, "hidden_size": 16})
    transformers.BertLMHeadModel(decoder).save_pretrained(tmp_path / "decoder")
    model = transformers.VisionEncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "encoder", tmp_path / "decoder"
    )
    assert "enc_to_dec_proj" in heads.new_heads(model)
    # Cross-attention, which the decoder's checkpoint has not, is new too.
    assert "decoder.bert.encoder.layer.0.crossattention" in heads.new_heads(model)
    assert not any("self" in name and "attention.self" not in name for name in heads.new_heads(model))


def test_a_whole_checkpoint_gives_its_heads_too_and_they_are_trained_on(tmp_path: Path) -> None:
    base, _, names = build("roberta")
    base.save_pretrained(tmp_path)
    assert heads.new_heads(transformers.RobertaForSequenceClassification.from_pretrained(tmp_path)) == names
    models.llama().save_pretrained(tmp_path / "llama")
    assert heads.new_heads(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")) == []


def test_parameters_without_a_module_are_told(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.Wav2Vec2Config(**WAV2VEC2, use_weighted_layer_sum=True)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        lora_ops.inject(transformers.Wav2Vec2ForSequenceClassification(config), r=2)
    (told,) = [r.getMessage() for r in caplog.records if "drawn anew" in r.getMessage()]
    assert told.startswith("drawn anew, but not trained, since PEFT trains whole modules only: layer_weights;")


# What the user names


def test_modules_to_save_of_the_user_are_kept_and_the_heads_added() -> None:
    given = ["model.norm"]
    base, _, _ = build("llama, one label")
    model = lora_ops.inject(base, r=2, modules_to_save=given)
    assert given == ["model.norm"]  # the caller's list is not written to
    whole = {n for n, m in model.get_base_model().named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    assert whole == {"model.norm", "score"}


@pytest.mark.parametrize("given", [["classifier"], ["classifier", "score"], ["out_proj", "dense"]])
def test_a_head_that_the_user_names_is_wrapped_once(given: list[str]) -> None:
    base, inputs, _ = build("roberta")
    model = lora_ops.inject(base, r=2, modules_to_save=given, quantize="nf4")
    wrappers = [m for m in model.modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    assert all(
        not isinstance(part, peft.utils.ModulesToSaveWrapper) for w in wrappers for part in list(w.modules())[1:]
    )
    scores(model, inputs)[0].sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    assert len([name for name in trained if "modules_to_save" in name]) == 4
    config = model.peft_config["default"]
    assert len(config.modules_to_save) == len(set(config.modules_to_save))


def test_a_module_whose_name_merely_ends_alike_is_left() -> None:
    """PEFT looks for names that end in "head", as `lm_head` does, and "feature_extractor" is in Wav2Vec2 twice."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm, self.head = models.llama(), nn.Linear(64, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.lm.model(input_ids).last_hidden_state)

    def whole(model: nn.Module) -> set[str]:
        root = model.get_base_model()
        return {n for n, m in root.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}

    assert whole(lora_ops.inject(Net(), r=2)) == {"head"}
    model = lora_ops.inject(_wav2vec2("Wav2Vec2ForXVector")(), r=2, target_modules=["q_proj"])
    assert "feature_extractor" in whole(model)
    assert not any(name.startswith("wav2vec2.") for name in whole(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any("conv_layers" in name for name in trained)


def test_heads_of_a_peft_model_stay_dense_and_are_told_if_frozen(caplog: pytest.LogCaptureFixture) -> None:
    base, inputs, _ = build("roberta")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"]))
    with caplog.at_level(logging.WARNING, "lora_ops"):
        lora_ops.inject(model, quantize="nf4")
    (told,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("drawn anew")]
    assert told == (
        "drawn anew, but neither trained nor saved by the adapter: classifier; give the LoraConfig "
        "modules_to_save=['classifier']"
    )
    assert not any("classifier" in name for name, m in model.named_modules() if isinstance(m, NF4Linear))
    scores(model, inputs)
