"""`Linear4bit` and its operators against the dequantized layer in float64."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fourbit
from fourbit import Linear4bit, cpu_ops, ops, reference

# Relative to the largest output: one rounding of the result, and of each partial sum of the
# vendor's product, in the dtype of the computation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(64, 64), (129, 37), (1, 1), (4304, 48), (33, 96)]
OPTIONS = [
    {"double_quant": True},
    {"double_quant": False, "block_size": 32},
    {"codebook": "int4", "block_size": 4096},
    {"codebook": {0: -1.0, 1: 0.0, 2: 1.0}},
]


def make_layer(in_features, out_features, *, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(in_features * 31 + out_features)
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return dense, Linear4bit.from_linear(dense, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_backward_equal_the_dequantized_layer(dtype, options):
    for in_features, out_features in SHAPES:
        for bias in (True, False):
            dense, layer = make_layer(in_features, out_features, bias=bias, dtype=dtype, **options)
            weight = layer.dequantize()
            assert weight.shape == dense.weight.shape
            assert weight.dtype == dtype
            for rows in ((5,), (2, 3), (1, 1, 4), ()):
                x = torch.randn(*rows, in_features, dtype=dtype, requires_grad=True)
                y = layer(x)
                expected = reference.linear(x, weight, dense.bias)
                assert y.dtype == dtype
                scale = expected.abs().max().clamp(min=1e-3)
                assert (y.double() - expected).abs().max() <= TOLERANCE[dtype] * scale
                gradient = torch.randn_like(y)
                y.backward(gradient)
                expected = gradient.double() @ weight.double()
                scale = expected.abs().max().clamp(min=1e-3)
                assert (x.grad.double() - expected).abs().max() <= TOLERANCE[dtype] * scale
                if bias:
                    expected = gradient.double().reshape(-1, out_features).sum(0)
                    scale = expected.abs().max().clamp(min=1)
                    assert (dense.bias.grad.double() - expected).abs().max() <= (
                        TOLERANCE[dtype] * scale
                    )
                    dense.bias.grad = None


def test_float32_stays_float32():
    dense, layer = make_layer(256, 64, dtype=torch.bfloat16)
    x = torch.randn(7, 256)
    exact = reference.linear(x, layer.dequantize(torch.float32), dense.bias)
    assert layer(x).dtype == torch.float32
    assert (layer(x) - exact).abs().max() < 1e-5


def test_no_rows_and_views():
    _, layer = make_layer(48, 16)
    assert layer(torch.empty(0, 48)).shape == (0, 16)
    x = torch.randn(48, 10)
    assert torch.allclose(layer(x.T), layer(x.T.contiguous()))


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradcheck():
    """In float32, since the operators have no float64: hence the coarse step and tolerance."""
    _, layer = make_layer(6, 5, block_size=32)
    x = torch.randn(3, 6, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-2, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("error")
def test_gradients_of_gradients_equal_the_dequantized_layer():
    dense, layer = make_layer(96, 40)
    dense.weight.data = layer.dequantize()
    found = []
    for module in (dense, layer):
        torch.manual_seed(1)
        x = torch.randn(3, 96, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), x)
        found.append((gradient, second))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:fourbit..linear")
def test_weights_that_share_decoding_memory_do_not_meet():
    """Large ones are decoded into the same memory, in turns, whatever their dtypes and sizes."""
    torch.manual_seed(0)
    layers = [
        Linear4bit.from_linear(nn.Linear(n, m, bias=False)) for n, m in ((640, 512), (512, 700))
    ]
    weights = [layer.dequantize() for layer in layers]
    first = cpu_ops._weight_memory((512, 640), torch.empty(0))
    assert cpu_ops._weight_memory((512, 640), torch.empty(0)).data_ptr() == first.data_ptr()
    with torch.inference_mode():
        for layer in layers:
            layer(torch.randn(1, layer.in_features))
    for dtype in TOLERANCE:
        x = torch.randn(3, 640, dtype=dtype, requires_grad=True)
        hidden = layers[0](x)
        y = layers[1](hidden)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        expected = reference.linear(hidden.detach(), weights[1].to(dtype))
        assert (y - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
        expected = gradient.double() @ weights[1].double() @ weights[0].double()
        assert (x.grad - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    # A graph recorded inside the operator, which its own wrapper never does, has its own copy.
    q = layers[0].quantized()
    parts = (q.packed, q.absmax, q.nested_absmax, q.nested_offset)
    x = torch.randn(3, 640, requires_grad=True)
    y = torch.ops.fourbit.linear.default(x, None, *parts, "nf4", 64, 512, 640)
    layers[1](torch.randn(1, 512))
    y.sum().backward()
    assert torch.allclose(x.grad, weights[0].sum(0).expand(3, -1), atol=1e-4)


def test_nothing_decoded_is_kept_for_backward():
    _, layer = make_layer(512, 512, bias=False)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(4, 512, requires_grad=True))
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert {tensor.data_ptr() for tensor in saved} <= own


@pytest.mark.parametrize("double_quant", [True, False])
def test_operators_pass_opcheck(double_quant):
    q = fourbit.quantize(torch.randn(24, 40), double_quant=double_quant)
    parts = (q.packed, q.absmax, q.nested_absmax, q.nested_offset)
    torch.library.opcheck(torch.ops.fourbit.quantize.default, (torch.randn(3, 70), "nf4", 64))
    torch.library.opcheck(torch.ops.fourbit.quantize_absmax.default, (torch.rand(300),))
    torch.library.opcheck(
        torch.ops.fourbit.dequantize.default, (*parts, "nf4", 64, [24, 40], torch.bfloat16)
    )
    torch.library.opcheck(
        torch.ops.fourbit.linear.default,
        (torch.randn(5, 40), torch.randn(24), *parts, "nf4", 64, 24, 40),
    )
    torch.library.opcheck(
        torch.ops.fourbit.linear_transposed.default,
        (torch.randn(5, 24), *parts, "nf4", 64, 24, 40),
    )
    if double_quant:
        torch.library.opcheck(
            torch.ops.fourbit.dequantize_absmax.default,
            (q.absmax, q.nested_absmax, q.nested_offset),
        )


def test_compiles_without_a_graph_break():
    _, layer = make_layer(64, 32)
    model = nn.Sequential(nn.Linear(16, 64), layer, nn.ReLU(), nn.Linear(32, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    model(x).sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    compiled(x).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)


def test_parameters_kept_as_plain_attributes_are_found():
    """As in replicas of ``nn.DataParallel``, in FSDP1's flat shards, and under parametrizations."""
    _, layer = make_layer(33, 96)
    x = torch.randn(5, 33)
    expected = layer(x)
    for name, part in list(layer.named_parameters()):
        delattr(layer, name)
        setattr(layer, name, part.detach())
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert not list(layer.parameters())
    assert torch.equal(layer.quantized().packed, layer.weight)

    _, layer = make_layer(33, 96)
    expected = layer(x)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus())
    original = layer.parametrizations.bias.original
    plus = nn.functional.softplus(original) - original
    torch.testing.assert_close(layer(x), expected + plus)


def test_parameters_swapped_for_a_call_are_used():
    _, layer = make_layer(33, 96)
    _, other = make_layer(33, 96, bias=True)
    other.bias.data += 1
    x = torch.randn(5, 33)
    swapped = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(swapped, other(x), rtol=0, atol=0)


def test_autocast_computes_in_its_dtype():
    _, layer = make_layer(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, 64, requires_grad=True)
        y = layer(x)
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_it_is_an_ordinary_module():
    dense, layer = make_layer(96, 40)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (96, 40)
    weights = [p for name, p in layer.named_parameters() if name.startswith("weight")]
    assert all(p.dtype == torch.uint8 and not p.requires_grad for p in weights)
    assert not list(layer.buffers())
    x = torch.randn(2, 96)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = Linear4bit(96, 40)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    meta = Linear4bit(96, 40, device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, meta):
        assert torch.equal(twin(x), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.dequantize(), layer.dequantize())
    assert half.bias.dtype == torch.bfloat16
    assert half.half().weight.dtype == torch.uint8
    assert layer.bias is dense.bias


def test_plain_constants_survive_misaligned_storage():
    """A shard gathered into one flat buffer may start at any byte."""
    _, layer = make_layer(64, 8, double_quant=False)
    flat = torch.zeros(layer.weight_absmax.numel() + 1, dtype=torch.uint8)
    flat[1:] = layer.weight_absmax
    expected = layer.dequantize()
    layer.weight_absmax = nn.Parameter(flat[1:], requires_grad=False)
    assert torch.equal(layer.dequantize(), expected)


def test_bad_input_is_named():
    dense, layer = make_layer(64, 8)
    with pytest.raises(ValueError, match="63 features in its last dimension, and the layer has 64"):
        layer(torch.randn(2, 63))
    with pytest.raises(ValueError, match="single number, and the layer has 64 features"):
        layer(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="input is on cpu and the layer on meta"):
        Linear4bit(64, 8, device="meta")(torch.randn(2, 64))
    with pytest.raises(TypeError, match="not a list"):
        Linear4bit(64, 8, codebook=["nf4"])
    with pytest.raises(ValueError, match="indices must be whole numbers"):
        Linear4bit(64, 8, codebook={0.5: -1.0, 1: 1.0})
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="not quantized"):
        layer.load_state_dict(dense.state_dict())
    with pytest.raises(ValueError, match="2-D"):
        Linear4bit.from_quantized(fourbit.quantize(torch.randn(2, 3, 4)))
    with pytest.raises(ValueError, match="does not fit"):
        layer.set_quantized(fourbit.quantize(torch.randn(4, 4)))
    dense.weight.data[3, 5] = float("nan")
    with pytest.raises(fourbit.NonFiniteError, match=f"element {3 * 64 + 5} "):
        Linear4bit.from_linear(dense)


def test_operators_do_not_write_their_inputs():
    q = fourbit.quantize(torch.randn(24, 40))
    parts = [part.clone() for part in (q.packed, q.absmax, q.nested_absmax, q.nested_offset)]
    ops.linear(torch.randn(2, 40), None, *parts, "nf4", 64, 24, 40)
    originals = (q.packed, q.absmax, q.nested_absmax, q.nested_offset)
    assert all(torch.equal(a, b) for a, b in zip(parts, originals, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_casting_every_vector_changes_nothing(dtype, double_quant):
    # Many scripts for 4-bit training cast all parameters of one dimension, meaning norms.
    layer = Linear4bit.from_linear(nn.Linear(96, 80), double_quant=double_quant)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 96)
    expected = layer(x)
    for use in (lambda: layer(x), layer.quantized):
        for name, part in layer.named_parameters():
            if part.ndim == 1 and name != "bias":
                part.data = part.data.to(dtype)
        assert layer.weight_absmax.dtype == dtype
        use()
        assert all(torch.equal(part, before[name]) for name, part in layer.state_dict().items())
        assert {p.dtype for n, p in layer.named_parameters() if n != "bias"} == {torch.uint8}
    assert torch.equal(layer(x), expected)
