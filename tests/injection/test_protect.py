"""What stays out of NF4: what the user names, routers of experts; and weights that are not in memory are refused."""

from __future__ import annotations

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
protect = pytest.importorskip("lora_ops.injection.protect")

TOKENS = models._SIZES


def quantized(model: nn.Module) -> set[str]:
    """The names of the NF4 layers, as the model without PEFT has them."""
    names = {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names}


# skip_modules

ALL = {f"model.layers.{i}.{part}" for i in (0, 1)
       for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                    "mlp.up_proj", "mlp.down_proj")}  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        (["down_proj"], {n for n in ALL if n.endswith("down_proj")}),
        ("down_proj", {n for n in ALL if n.endswith("down_proj")}),
        (["mlp.down_proj", "k_proj"], {n for n in ALL if n.endswith(("down_proj", "k_proj"))}),
        (["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (["base_model.model.model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (["layers.0"], {n for n in ALL if ".0." in n}),
        (["mlp"], {n for n in ALL if ".mlp." in n}),
        ([r"layers\.\d+\.self_attn\.[qk]_proj"], {n for n in ALL if n.endswith(("q_proj", "k_proj"))}),
        ([r"^model\.layers\.1\.mlp\..*_proj$"], {n for n in ALL if ".1.mlp." in n}),
        ([r".*(gate|up)_proj"], {n for n in ALL if n.endswith(("gate_proj", "up_proj"))}),
        (["lm_head"], set()),
        (["embed_tokens", "q_proj"], {n for n in ALL if n.endswith("q_proj")}),
        ([], set()),
        (None, set()),
    ],
)
def test_skip_modules_adds_to_what_stays_dense(patterns: Any, skipped: set[str]) -> None:
    model = lora_ops.inject(models.llama(), r=2, quantize="nf4", skip_modules=patterns)
    assert quantized(model) == ALL - skipped
    assert len(lora_ops.injection_report(model)) == len(ALL)  # all of them have adapters
    assert not isinstance(model.get_output_embeddings(), NF4Linear)
    with torch.no_grad():
        assert torch.isfinite(model(models.token_ids()).logits).all()


def test_a_name_is_whole_components() -> None:
    """ "proj" is not q_proj, layer 1 is not layer 11, and a dot is a dot."""
    root = models.llama()
    for pattern in ("proj", "model.layers.11", "self.attn"):
        with pytest.raises(ValueError, match="matches no module"):
            protect.skipped(root, [pattern])


def test_skip_modules_of_a_peft_model() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = lora_ops.inject(peft.get_peft_model(models.llama(), config), quantize="nf4", skip_modules=["q_proj"])
    assert quantized(model) == {n for n in ALL if not n.endswith("q_proj")}


@pytest.mark.parametrize(
    ("skip_modules", "quantize", "error", "message"),
    [
        (["down_prj"], "nf4", ValueError, "skip_modules: 'down_prj' matches no module of LlamaForCausalLM; the nearest "
                                          "name is 'down_proj'"),
        (["k_proj", "mlp.dwn_proj"], "nf4", ValueError, "'mlp.dwn_proj' matches .* nearest name is 'mlp.down_proj'"),
        ([r"layers\.[89]"], "nf4", ValueError, "matches no module"),
        (["a["], "nf4", ValueError, r"skip_modules: 'a\[' is neither a name nor a regular expression"),
        ([""], "nf4", ValueError, "skip_modules: expected names or regular expressions, got an empty one"),
        ([3], "nf4", TypeError, "skip_modules: expected names or regular expressions, got a int"),
        (3, "nf4", TypeError, "skip_modules: expected names or regular expressions, got int"),
        (["down_proj"], None, ValueError, "skip_modules: expected together with quantize='nf4', got quantize=None"),
    ],
)  # fmt: skip
def test_bad_skip_modules_name_themselves(
    skip_modules: Any, quantize: str | None, error: type[Exception], message: str
) -> None:
    model = models.llama()
    with pytest.raises(error, match=message):
        lora_ops.inject(model, r=2, quantize=quantize, skip_modules=skip_modules)
    assert not any("lora_" in name or isinstance(m, NF4Linear) for name, m in model.named_modules())


# Routers


def _moe(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    config, cls = getattr(transformers, name + "Config"), getattr(transformers, name + "ForCausalLM")
    return lambda: cls(config(**{**TOKENS, "num_hidden_layers": 1, **kwargs}))


def _dbrx() -> nn.Module:
    ffn = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}
    attn = {"kv_n_heads": 2, "rope_theta": 10000.0}
    config = transformers.DbrxConfig(d_model=64, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=models.VOCAB,
                                     ffn_config=ffn, attn_config=attn)  # fmt: skip
    return transformers.DbrxForCausalLM(config)


def _switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=models.VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=2,
        num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


class Mixture(nn.Module):
    """A mixture of experts of somebody's own, with a gated expert for all."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(16, 5)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(5))
        self.all, self.all_gate, self.out = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        p = self.choose(x).softmax(-1)
        y = sum(p[..., i : i + 1] * mlp(x) for i, mlp in enumerate(self.mlps))
        return self.out(y + self.all_gate(x).sigmoid() * self.all(x))


class Stacked(nn.Module):
    """Experts in one parameter, and a router that is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.ModuleDict({"layer": nn.Linear(16, 6, bias=False)})
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(6, 16, 16) / 4)
        self.out = nn.Linear(16, 6)  # as wide as there are experts, and outside: a router's input goes in

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...e,ekn,...k->...n", self.router["layer"](x).softmax(-1), self.experts.weight, x)


ROUTERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "mixture": (Mixture, {"choose", "all_gate"}),
    "afmoe": (_moe("Afmoe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_dense_layers=0,
                   head_dim=16),
              {"model.layers.0.mlp.router.gate"}),
    "dbrx": (_dbrx, {"transformer.blocks.0.ffn.router.layer"}),
    "switch": (_switch, {"encoder.block.0.layer.1.mlp.router.classifier",
                         "decoder.block.0.layer.2.mlp.router.classifier"}),
    "qwen2_moe": (_moe("Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                       shared_expert_intermediate_size=32, decoder_sparse_step=1),
                  {"model.layers.0.mlp.shared_expert_gate"}),
    "llama": (models.llama, set()),
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_stay_in_float(family: str) -> None:
    make, routers = ROUTERS[family]
    base = make()
    assert set(protect.routers(base)) == routers
    keep = set(getattr(base, "_keep_in_fp32_modules", None) or ())
    linear = {n for n, m in base.named_modules() if type(m) is nn.Linear and not keep.intersection(n.split("."))}
    linear -= {"lm_head"}
    model = lora_ops.inject(base, r=2, quantize="nf4")
    read = {n for n in linear if n.endswith(".wo")}  # whose dtype the T5 family reads
    assert quantized(model) == linear - routers - read
    assert set(protect.routers(model.get_base_model())) == routers  # with adapters on them, too


def test_routers_of_stacked_experts() -> None:
    assert "router.layer" in protect.routers(Stacked())


# Weights that are not in memory


def _disk(base: nn.Module, folder: Path) -> nn.Module:
    return pytest.importorskip("accelerate").disk_offload(base, folder / "offload", execution_device="cpu")


def _cpu(base: nn.Module, folder: Path) -> nn.Module:
    return pytest.importorskip("accelerate").cpu_offload(base, execution_device="cpu")


def _device_map(base: Any, folder: Path) -> nn.Module:
    pytest.importorskip("accelerate")
    base.save_pretrained(folder)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"}, offload_folder=folder / "o"
    )


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("offload", "layer"), [(_disk, 0), (_cpu, 0), (_device_map, 1)])
def test_offloaded_weights_are_refused_by_name(
    offload: Callable[..., nn.Module], layer: int, quantize: str | None, tmp_path: Path
) -> None:
    """PEFT's own adapters would be on meta there, without values: logits of NaN, and no backward."""
    model = offload(models.llama(), tmp_path)
    message = rf"model: model.layers.{layer}.self_attn.q_proj.weight and \d+ more weights: offloaded by accelerate; "
    with pytest.raises(ValueError, match=message):
        lora_ops.inject(model, r=2, quantize=quantize)
    assert not any("lora_" in name or isinstance(m, NF4Linear) for name, m in model.named_modules())
    with torch.no_grad():
        expected = models.llama()(models.token_ids()).logits
        torch.testing.assert_close(model(models.token_ids()).logits, expected)


def test_what_is_offloaded_beside_the_adapters_may_be(tmp_path: Path) -> None:
    model = _device_map(models.llama(), tmp_path)
    ours = lora_ops.inject(model, r=2, target_modules=r"model\.layers\.0\..*_proj")
    with torch.no_grad():
        torch.testing.assert_close(ours(models.token_ids()).logits, models.llama()(models.token_ids()).logits)


def test_weights_without_values_are_refused_if_they_are_to_be_quantized() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return models.llama()

    base = build()
    message = "model.layers.0.self_attn.q_proj.weight and 13 more weights: on the meta device, without values"
    with pytest.raises(ValueError, match=message):
        lora_ops.inject(base, r=2, quantize="nf4")
    assert not any("lora_" in name for name, _ in base.named_modules())
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=message):
        lora_ops.inject(wrapped, quantize="nf4")
    # As with PEFT alone: the adapters are put on, to be loaded later.
    model = lora_ops.inject(build(), r=2)
    model.load_state_dict(lora_ops.inject(models.llama(), r=2).state_dict(), assign=True)
    assert not any(p.is_meta for p in model.parameters())
