"""The modules: NF4Linear and its state dict, LoRALinear and its merge."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_ops import functional
from lora_ops.nn import LoRALinear, NF4Linear
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4 import state_dict as layout

K, N = 96, 40
FP4_STATE = "weight.quant_state.bitsandbytes__fp4"


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in module.state_dict().items()}


def nf4_linear(double_quant: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), double_quant=double_quant)


def bnb_linear(nested: bool, dtype: torch.dtype, bias: bool = True, quant_type: str = "nf4") -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(K, N, bias=bias, quant_type=quant_type, compress_statistics=nested)
    linear.weight.data = torch.randn(N, K, dtype=dtype)
    return linear.to("cpu")


# NF4Linear: forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_linear_of_the_dequantized_weight(dtype: torch.dtype, bias: bool, backend: str) -> None:
    layer = nf4_linear(bias=bias, dtype=dtype)
    x = torch.randn(2, 3, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    expected = F.linear(x.double(), layer.dequantize().double(), layer.bias.double() if bias else None)
    assert (y.dtype, y.shape) == (dtype, (2, 3, N))
    torch.testing.assert_close(y.double(), expected, atol=0.02 if dtype != torch.float32 else 1e-5, rtol=0.01)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape


def test_from_linear_shares_the_bias_and_its_requires_grad() -> None:
    linear = nn.Linear(K, N).eval()
    layer = NF4Linear.from_linear(linear)
    assert layer.bias is linear.bias
    assert layer.bias.requires_grad
    assert not layer.training
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (N * K // 2, 1)


def test_from_linear_takes_a_conv1d_transposed() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    conv1d = utils.Conv1D(N, K)
    linear = nn.Linear(K, N)
    linear.weight.data, linear.bias = conv1d.weight.data.T.contiguous(), conv1d.bias
    assert state_bytes(NF4Linear.from_linear(conv1d)) == state_bytes(NF4Linear.from_linear(linear))


def test_bias_follows_x() -> None:
    layer = nf4_linear(dtype=torch.bfloat16)
    assert layer(torch.randn(2, K)).dtype == torch.float32


def test_autocast() -> None:
    layer = nf4_linear()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, K)).dtype == torch.bfloat16


def test_compiles_without_graph_breaks() -> None:
    layer, x = nf4_linear(), torch.randn(2, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


# NF4Linear: conversions


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_are_never_cast(double_quant: bool, dtype: torch.dtype) -> None:
    layer = nf4_linear(double_quant)
    before = layer.quantized
    for cast in (lambda m: m.to(dtype), lambda m: nn.Sequential(m).to(device="cpu", dtype=dtype)):
        cast(layer)
        assert layer.bias.dtype == dtype
        after = layer.quantized
        assert [t.dtype for t in after.tensors()] == [t.dtype for t in before.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(after.tensors(), before.tensors(), strict=True))
    layer.half(), layer.bfloat16(), layer.float()
    assert torch.equal(layer.dequantize(torch.float32), functional.dequantize_nf4(before, dtype=torch.float32))


def test_moves_with_the_module() -> None:
    layer = nf4_linear().to("meta")
    assert all(t.is_meta for t in (*layer.quantized.tensors(), layer.bias))


def test_deepcopy_and_pickle() -> None:
    layer = nf4_linear()
    twin = copy.deepcopy(layer)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    pickled = torch.load(stored, weights_only=False)
    for other in (twin, pickled):
        assert state_bytes(other) == state_bytes(layer)
        assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_train_eval_and_forwards_leave_the_state_dict_alone() -> None:
    layer = nf4_linear()
    before = state_bytes(layer)
    for train in (True, False, True, False):
        layer.train(train)
        layer(torch.randn(2, K, requires_grad=True)).sum().backward()
        with torch.no_grad():
            layer(torch.randn(1, K))
            layer(torch.randn(1, K).bfloat16())
    assert state_bytes(layer) == before


def test_extra_repr() -> None:
    assert "in_features=96, out_features=40, bias=True, block_size=64, double_quant=True" in repr(nf4_linear())


# NF4Linear: state dict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loads_and_writes_bitsandbytes_bytes(dtype: torch.dtype, nested: bool, bias: bool, device: str) -> None:
    theirs = bnb_linear(nested, dtype, bias)
    # The empty layer's own block size and nesting give way to what is loaded.
    ours = NF4Linear(K, N, bias=bias, block_size=128, double_quant=not nested, device=device)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert state_bytes(ours) == state_bytes(theirs)
    assert ours.dequantize().dtype == dtype


def test_bitsandbytes_loads_our_state_dict() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    ours = nf4_linear(dtype=torch.bfloat16)
    state = ours.state_dict()
    stats = {k: v for k, v in state.items() if k.startswith("weight.")}
    theirs = bnb.nn.Linear4bit(K, N, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=theirs)
    theirs.bias = ours.bias
    assert state_bytes(theirs) == state_bytes(ours)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_roundtrip_through_safetensors(double_quant: bool, assign: bool) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nf4_linear(double_quant), nn.ReLU(), NF4Linear.from_linear(nn.Linear(N, 7)))
    state = safetensors.load(safetensors.save(model.state_dict()))
    empty = nn.Sequential(NF4Linear(K, N), nn.ReLU(), NF4Linear(N, 7))
    empty.load_state_dict(state, assign=assign)
    assert state_bytes(empty) == state_bytes(model)
    assert torch.equal(empty(torch.ones(1, K)), model(torch.ones(1, K)))
    if not assign:
        state["0.weight"].zero_()
        assert state_bytes(empty) == state_bytes(model)


def test_meta_state_dict_lists_every_key() -> None:
    """transformers asks an empty model for the keys that it expects."""
    assert list(NF4Linear(K, N, device="meta").state_dict()) == list(nf4_linear().state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_empty_layer_says_so(device: str) -> None:
    layer = NF4Linear(K, N, device=device)
    for use in (lambda: layer(torch.randn(1, K)), layer.dequantize):
        with pytest.raises(RuntimeError, match=r"NF4Linear\(96, 40\): the layer is empty"):
            use()


def test_constructor_checks_block_size() -> None:
    with pytest.raises(ValueError, match="block_size"):
        NF4Linear(K, N, block_size=48)


@pytest.mark.parametrize("key", ["weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
                                 "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"])  # fmt: skip
def test_missing_key_is_reported_and_half_a_weight_is_not_written(key: str) -> None:
    model, other = nn.Sequential(nf4_linear()), nn.Sequential(nf4_linear())
    before = state_bytes(model)
    state = other.state_dict()
    del state[f"0.{key}"]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "0.{key}"'):
        model.load_state_dict(state)
    if key != "bias":  # half a weight is not written; one without a bias is, as nn.Linear would
        assert state_bytes(model) == before
    assert model.load_state_dict(state, strict=False).missing_keys == [f"0.{key}"]
    assert (state_bytes(model) == before) == (key != "bias")


def test_a_bias_alone_loads() -> None:
    layer = nf4_linear()
    weight = layer.weight.clone()
    layer.load_state_dict({"bias": torch.ones(N)}, strict=False)
    assert torch.equal(layer.bias, torch.ones(N))
    assert torch.equal(layer.weight, weight)


def test_unexpected_keys_are_reported() -> None:
    model = nn.Sequential(nf4_linear(bias=False))
    state = {**model.state_dict(), "0.bias": torch.zeros(N), "0.weight.SCB": torch.zeros(1), "0.x": torch.zeros(1)}
    assert sorted(model.load_state_dict(state, strict=False).unexpected_keys) == ["0.bias", "0.weight.SCB", "0.x"]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


def _broken(case: str) -> dict[str, torch.Tensor]:
    state = nf4_linear().state_dict()
    if case == "bias":
        return {**state, "bias": torch.zeros(N + 1)}
    if case == "shape":
        return NF4Linear.from_linear(nn.Linear(N, K)).state_dict() | {"bias": torch.zeros(N)}
    if case == "quant_map":
        return {**state, "weight.quant_map": torch.zeros(16)}
    if case == "fp4":
        return bnb_linear(True, torch.float32, quant_type="fp4").state_dict()
    return {**state, "weight.absmax": state["weight.absmax"][1:]}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bias", r"0\.bias: expected shape \(40,\), got \(41,\)"),
        ("shape", r"0\.weight.*shape: expected \(N=40, K=96\), got \(96, 40\)"),
        ("quant_map", r"0\.weight\.quant_map: expected the 16 values"),
        ("absmax", r"0\.weight\.absmax: expected torch\.uint8 of shape \(60,\)"),
        ("fp4", r"0\.weight.*fp4: expected an nf4 weight"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_failing_load_writes_nothing(case: str, message: str, strict: bool) -> None:
    model = nn.Sequential(nf4_linear())
    before = state_bytes(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"0.{k}": v for k, v in _broken(case).items()}, strict=strict)
    assert state_bytes(model) == before


def test_nested_offset_roundtrips_to_the_bit() -> None:
    layer = nf4_linear()
    q = layer.quantized
    for bits in (0x3DCCCCCD, 0x00000001, 0x33D6BF95, 0x7F7FFFFF):
        offset = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        layer.quantized = NF4Tensor(q.packed, q.absmax, q.shape, q.dtype, q.block_size, q.nested_absmax, offset)
        state = layer.state_dict()
        other = NF4Linear(K, N)
        other.load_state_dict(state)
        assert other.quantized.nested_offset.view(torch.int32).item() == bits
        assert json.loads(bytes(state[layout.QUANT_STATE].tolist()))["nested_offset"] == offset.item()


@pytest.mark.parametrize("bad", [nn.Conv2d(1, 1, 1), torch.zeros(2, 2), nf4_linear()])
def test_from_linear_takes_linears_only(bad: object) -> None:
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear or transformers' Conv1D"):
        NF4Linear.from_linear(bad)


def test_assigning_a_weight_checks_its_shape() -> None:
    layer = nf4_linear()
    with pytest.raises(ValueError, match=r"q: expected shape \(N=40, K=96\), got \(40, 95\)"):
        layer.quantized = functional.quantize_nf4(torch.randn(N, K - 1))


# LoRALinear


def lora(quantize: str | None = None, dtype: torch.dtype = torch.float32, **kwargs: object) -> LoRALinear:
    layer = LoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), r=4, lora_alpha=8, quantize=quantize, **kwargs)
    nn.init.normal_(layer.lora_B.weight)
    return layer


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_forward(quantize: str | None, dtype: torch.dtype, backend: str) -> None:
    layer = lora(quantize, dtype).eval()
    base = layer.base_layer
    x = torch.randn(3, K, dtype=dtype)
    w = base.dequantize() if quantize else base.weight
    update = 2 * (layer.lora_B.weight.double() @ layer.lora_A.weight.double())
    expected = F.linear(x.double(), w.double() + update, base.bias.double())
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(y.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_new_layer_computes_its_base(quantize: str | None) -> None:
    layer = LoRALinear.from_linear(nn.Linear(K, N), quantize=quantize)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_only_the_adapter_trains() -> None:
    layer = lora("nf4")
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A.weight", "lora_B.weight"}
    layer(torch.randn(3, K)).sum().backward()
    assert layer.lora_A.weight.grad is not None
    assert layer.lora_B.weight.grad is not None
    assert layer.base_layer.bias.grad is None


def test_dropout_in_training_only() -> None:
    layer = lora(lora_dropout=0.5)
    x = torch.randn(3, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_constructor_and_rslora() -> None:
    layer = LoRALinear(K, N, r=4, lora_alpha=8, bias=False, use_rslora=True)
    assert layer.scale == 4.0
    assert set(layer.state_dict()) == {"base_layer.weight", "lora_A.weight", "lora_B.weight"}
    assert layer.lora_A.weight.shape == (4, K)
    assert layer.lora_B.weight.shape == (N, 4)
    assert not layer.lora_B.weight.any()
    assert "r=4, lora_alpha=8" in repr(layer)
    assert LoRALinear(K, N, r=4, lora_alpha=8).scale == 2.0


def test_initialization_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    theirs = peft.tuners.lora.Linear(nn.Linear(K, N), "default", peft.LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8)
    torch.manual_seed(1)
    ours = LoRALinear(K, N, r=4, lora_alpha=8)
    assert theirs.lora_A["default"].weight.std().item() == pytest.approx(ours.lora_A.weight.std().item(), rel=0.2)
    assert theirs.lora_A["default"].weight.abs().max() <= K**-0.5 >= ours.lora_A.weight.abs().max()
    assert theirs.scaling["default"] == ours.scale


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_exact_unmerge(quantize: str | None, dtype: torch.dtype) -> None:
    layer = lora(quantize, dtype).eval()
    x = torch.randn(3, K, dtype=dtype)
    y, before = layer(x), state_bytes(layer)
    layer.merge()
    assert layer.merged
    if quantize:
        assert layer.base_layer.quantized_dtype == dtype
    scale = y.abs().max().item()
    tolerance = {None: 1e-5 if dtype == torch.float32 else 0.02, "nf4": 0.2}[quantize]
    torch.testing.assert_close(layer(x), y, atol=tolerance * scale, rtol=0)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.state_dict()
    layer.unmerge()
    assert not layer.merged
    assert state_bytes(layer) == before
    assert torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


def test_a_merge_that_fails_leaves_the_layer() -> None:
    layer = lora("nf4")
    layer.lora_B.weight.data[0, 0] = torch.nan
    before = state_bytes(layer)
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    assert not layer.merged
    assert state_bytes(layer) == before


def test_from_conv1d() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    conv1d = utils.Conv1D(N, K)
    layer = LoRALinear.from_linear(conv1d, r=4)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), conv1d(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"quantize": "int3"}, "quantize: expected one of None, 'nf4', got 'int3'"), ({"r": 0}, "r: expected"),
     ({"lora_dropout": 1.5}, "lora_dropout: expected a probability")],
)  # fmt: skip
def test_bad_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(nn.Linear(K, N), **kwargs)


def test_lora_over_an_empty_nf4_layer_says_so() -> None:
    with pytest.raises(RuntimeError, match="the layer is empty"):
        LoRALinear.from_linear(NF4Linear(K, N))(torch.randn(1, K))
