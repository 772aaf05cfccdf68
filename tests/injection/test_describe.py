"""What a model with NF4 layers says of itself: counts of the dense model, and a config under which it is loaded."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM, PreTrainedModel

import lora_ops
from lora_ops.formats.quantization_config import bitsandbytes_config
from lora_ops.nn import NF4Linear
from tests import models
from tests.injection.test_inject import assert_same_logits

peft = pytest.importorskip("peft")

# K of the down projection is 96, which is no multiple of a block.
ARCHITECTURES = {**models.DECODERS, "t5": models.t5}


def bert() -> PreTrainedModel:
    """An encoder with a head."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=models.VOCAB, **sizes)).eval()


def opt() -> PreTrainedModel:
    """Projections around the decoder, tied embeddings."""
    config = OPTConfig(
        vocab_size=models.VOCAB, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def outputs(model: Any) -> torch.Tensor:
    ids = models.token_ids()
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def exact(model: Any) -> Any:
    """A model on bitsandbytes in eval(), whose layers multiply with the weights that it loaded, on every CPU.

    With AVX-512-BF16 bitsandbytes 0.50 rounds scales to bfloat16 in eval(), and with AVX-512 it decodes wrongly where K
    is no multiple of a block: such layers are decoded here.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % module.weight.quant_state.blocksize:
                module.forward = partial(F.linear, weight=decoded(module.weight), bias=module.bias)
    return model.eval()


def decoded(weight: Any) -> torch.Tensor:
    """code[nibble] · absmax of what bitsandbytes holds."""
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    codes = torch.stack((weight.data.flatten() >> 4, weight.data.flatten() & 15), dim=1).flatten().long()
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).view(state.shape)


def counts(model: Any) -> list[object]:
    return [
        model.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        for only_trainable in (False, True)
        for exclude_embeddings in (False, True)
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_counts_are_those_of_the_dense_model(arch: str) -> None:
    build = ARCHITECTURES[arch]
    dense, nf4 = (lora_ops.inject(build(), r=4, quantize=quantize) for quantize in (None, "nf4"))
    assert nf4.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    assert counts(nf4) == counts(dense)
    assert counts(copy.deepcopy(nf4)) == counts(dense)
    held = sum(t.numel() * t.element_size() for t in [*nf4.parameters(), *nf4.buffers()])
    assert nf4.get_memory_footprint() == held < dense.get_memory_footprint()
    part = "encoder" if arch == "t5" else "transformer" if arch == "gpt2" else "model"
    assert counts(getattr(nf4.get_base_model(), part)) == counts(getattr(dense.get_base_model(), part))
    assert counts(nf4.merge_and_unload()) == counts(dense.merge_and_unload())


def test_counts_after_stock_peft_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for base in (models.qwen2(), lora_ops.quantize(models.qwen2())):
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
        mixed = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
        printed.append(mixed.get_nb_trainable_parameters())
    assert printed[:2] == printed[2:]


@pytest.mark.parametrize("quantize", [lora_ops.quantize, lambda m: lora_ops.inject(m, quantize="nf4").unload()])
def test_quantize_is_what_inject_does(quantize: Any) -> None:
    model = quantize(models.llama())
    injected = lora_ops.inject(models.llama(), quantize="nf4").unload()
    states = model.state_dict(), injected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert model.config.quantization_config == injected.config.quantization_config


def test_quantize_refuses_what_it_cannot_take() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        lora_ops.quantize("llama")
    with pytest.raises(ValueError, match="quantize: expected 'nf4', got None"):
        lora_ops.quantize(models.llama(), quantize=None)
    with pytest.raises(ValueError, match=r'model: expected no adapters, got some in .*inject\(model, quantize="nf4"\)'):
        lora_ops.quantize(lora_ops.inject(models.llama()))
    block = lora_ops.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))  # any module
    assert isinstance(block[0], NF4Linear)


# Saved and loaded by transformers with bitsandbytes


@pytest.mark.parametrize("build", [*ARCHITECTURES.values(), bert, opt], ids=lambda build: build.__name__)
def test_a_merged_model_is_loaded_by_stock_transformers(build: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = lora_ops.inject(build(), r=4, quantize="nf4", init_lora_weights=False)
    model = model.merge_and_unload().eval()
    model.save_pretrained(tmp_path)
    loaded = exact(type(model).from_pretrained(tmp_path))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    linear4bit = {name for name, m in loaded.named_modules() if type(m).__name__ == "Linear4bit"}
    assert linear4bit == {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert_same_logits(outputs(loaded), outputs(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_files_and_the_dtype_that_bitsandbytes_computes_in(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = lora_ops.quantize(models.llama(dtype=dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.compute_dtype == dtype
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("block_size", [32, 128])
def test_other_block_sizes(block_size: int, tmp_path: Path) -> None:
    """The config has no word for them: each layer's own state does."""
    pytest.importorskip("bitsandbytes")
    model = models.llama()
    layer = model.model.layers[0].mlp
    layer.up_proj = NF4Linear.from_linear(layer.up_proj, block_size=block_size, double_quant=False)
    lora_ops.quantize(model).save_pretrained(tmp_path)
    loaded = exact(type(model).from_pretrained(tmp_path))
    assert loaded.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == block_size
    assert_same_logits(outputs(loaded), outputs(model))


def test_without_bitsandbytes_transformers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_ops.quantize(models.llama())
    model.save_pretrained(tmp_path)
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="requires bitsandbytes: `pip install"):
        type(model).from_pretrained(tmp_path)


def test_names_that_would_skip_others_are_anchored() -> None:
    """transformers takes an entry for the end of a name as well."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    nf4, dense = ["layers.0.fc", "head.0.dense", "layers.1.a"], ["fc", "lm_head", "head.0", "layers.1"]
    config = bitsandbytes_config(nf4, dense, double_quant=True, compute_dtype=torch.float32)
    skip = config["llm_int8_skip_modules"]
    assert "lm_head" in skip  # a plain name, which other readers than transformers know
    assert all(should_convert_module(name, skip) for name in nf4)
    assert not any(should_convert_module(name, skip) for name in dense)


def test_layers_that_transformers_cannot_load_back_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Linear):
        pass

    model = models.llama()
    layer = model.model.layers[0].mlp
    layer.up_proj = NF4Linear.from_linear(Own(64, 96, bias=False))
    with caplog.at_level("WARNING", "lora_ops"):
        lora_ops.quantize(model)
    assert "cannot load 1 NF4 layers back" in caplog.text
    assert "model.layers.0.mlp.up_proj" in caplog.text
