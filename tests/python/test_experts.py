"""4-bit 3-D weights of experts, against float64 and against transformers' own experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fourbit
from fourbit.experts import (
    ExpertsLayout,
    QuantizedExperts,
    experts_forward,
    experts_layouts,
    experts_modules,
    experts_product,
    experts_weight,
    join_groups,
    quantize_experts,
    remove_experts,
    set_empty_experts,
    set_experts,
)

# Products in float32 against float64: a sum of at most 96 terms of the order of one, each rounded.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product64(x: Tensor, counts: list[int], weight: Tensor, transposed: bool) -> Tensor:
    """The product, expert by expert, in float64."""
    sides = weight.double() if transposed else weight.double().transpose(1, 2)
    out = torch.zeros(len(x), sides.shape[2], dtype=torch.float64)
    start = 0
    for expert, count in enumerate(counts):
        out[start : start + count] = x[start : start + count].double() @ sides[expert]
        start += count
    return out


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
def test_a_group_is_what_quantize_gives_for_it_alone(groups, double_quant, codebook):
    weight = random(3, 8, 96, dtype=torch.bfloat16)
    options: Any = {"codebook": codebook, "block_size": 32, "double_quant": double_quant}
    quantized = quantize_experts(weight, **options, groups=groups)
    for index, piece in enumerate(weight.reshape(groups, -1, 96)):
        alone = fourbit.quantize(piece, **options)
        group = quantized.group(index)
        for part in ("packed", "absmax", "nested_absmax", "nested_offset"):
            ours, theirs = getattr(group, part), getattr(alone, part)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.equal(ours, theirs), part
    restored = quantized.dequantize(torch.float32)
    parts = [quantized.group(i).dequantize(torch.float32).reshape(-1) for i in range(groups)]
    assert torch.equal(restored.reshape(-1), torch.cat(parts))
    sizes = quantized.layout.part_sizes()
    assert sizes == tuple(0 if part is None else part.numel() for part in quantized.parts)
    assert quantized.nbytes == sum(sizes)


@given(
    experts=st.integers(1, 5),
    rows=st.integers(1, 7),
    columns=st.integers(1, 5),
    parts=st.sampled_from([0, 1, 2]),
    double_quant=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_products_of_any_shape(experts, rows, columns, parts, double_quant, transposed, seed):
    # Groups: one for all (parts 0), one a matrix, or two a matrix; most cross no block of 256.
    rows, columns = 2 * rows, 96 * columns
    weight = random(experts, rows, columns, seed=seed)
    quantized = quantize_experts(
        weight, block_size=32, double_quant=double_quant, groups=experts * parts or 1
    )
    module = holder(quantized)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (experts,), generator=generator)
    n = int(counts.sum()) + 2  # two rows of no expert
    x = random(n, rows if transposed else columns, seed=seed + 1)
    out = experts_product(module, "w", x, counts, transposed=transposed)
    expected = product64(x, counts.tolist(), quantized.dequantize(torch.float32), transposed)
    # Sums of up to 480 terms of the order of one, in float32.
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-3)
    assert out[-2:].count_nonzero() == 0


def test_a_group_of_many_scales_is_cut_inside_its_blocks_of_256():
    """One group, 3 experts of 300 blocks each: the second's scales start inside a nested block."""
    weight = random(3, 100, 192)
    quantized = quantize_experts(weight, block_size=64, groups=1)
    module = holder(quantized)
    counts = torch.tensor([1, 2, 1])
    x = random(4, 192, seed=1)
    out = experts_product(module, "w", x, counts, transposed=False)
    expected = product64(x, [1, 2, 1], quantized.dequantize(torch.float32), False)
    torch.testing.assert_close(out.double(), expected, **CLOSE)


def holder(quantized: QuantizedExperts) -> nn.Module:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.empty(0)))
    set_experts(module, "w", quantized)
    return module


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients(packed, transposed):
    weight = random(3, 8, 64)
    counts = torch.tensor([2, 0, 3])
    quantized = quantize_experts(weight, groups=3)
    used = quantized.dequantize() if packed else weight.clone()
    x = random(5, 8 if transposed else 64, seed=1).requires_grad_()
    if packed:
        out = experts_product(holder(quantized), "w", x, counts, transposed=transposed)
    else:
        module = nn.Module()
        module.w = nn.Parameter(used)
        out = experts_product(module, "w", x, counts, transposed=transposed)
    out.square().sum().backward()
    x64, w64 = x.detach().double().requires_grad_(), used.detach().double().requires_grad_()
    product64_out = product64_with_grad(x64, [2, 0, 3], w64, transposed)
    product64_out.square().sum().backward()
    # Of squares of sums of 64 terms: numbers up to a thousand, in float32.
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-3)
    if not packed:
        torch.testing.assert_close(module.w.grad.double(), w64.grad, rtol=1e-4, atol=1e-3)


def product64_with_grad(x: Tensor, counts: list[int], weight: Tensor, transposed: bool) -> Tensor:
    sides = weight if transposed else weight.transpose(1, 2)
    pieces = torch.split(x, counts)
    return torch.cat([piece @ side for piece, side in zip(pieces, sides, strict=True)])


def test_gradients_of_gradients():
    from fourbit.expert_ops import expert_matmul

    counts = torch.tensor([2, 1])
    x = random(3, 4, dtype=torch.float64).requires_grad_()
    w = random(2, 5, 4, seed=1, dtype=torch.float64).requires_grad_()
    for transposed in (False, True):
        weight = w if not transposed else random(2, 4, 5, dtype=torch.float64).requires_grad_()

        def product(x: Tensor, w: Tensor, transposed: bool = transposed) -> Tensor:
            return expert_matmul(x, counts, w, transposed=transposed)

        assert torch.autograd.gradcheck(product, (x, weight))
        assert torch.autograd.gradgradcheck(product, (x, weight))


def test_operators_keep_their_contracts():
    quantized = quantize_experts(random(2, 4, 64), groups=2)
    counts = torch.tensor([1, 2])
    weight = (*quantized.parts, "nf4", 64, 4, 64, 2)
    torch.library.opcheck(
        torch.ops.fourbit.expert_linear.default, (random(3, 64), counts, *weight, False)
    )
    torch.library.opcheck(
        torch.ops.fourbit.expert_linear.default, (random(3, 4), counts, *weight, True)
    )
    torch.library.opcheck(
        torch.ops.fourbit.expert_matmul.default, (random(3, 4), counts, random(2, 5, 4), False)
    )
    torch.library.opcheck(
        torch.ops.fourbit.expert_outer.default, (random(3, 4), random(3, 5), counts)
    )


def tiny_experts(kind: str) -> Any:
    """An experts module of transformers with random weights."""
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if kind == "mixtral":
        config: Any = transformers.MixtralConfig(
            hidden_size=32, intermediate_size=48, num_local_experts=4
        )
        module: Any = MixtralExperts(config)
    else:
        config = transformers.GptOssConfig(
            hidden_size=32, intermediate_size=48, num_local_experts=4
        )
        module = GptOssExperts(config)
    config._experts_implementation = "eager"
    for index, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=index) * 0.2
    return module


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("quantized", [True, False])
def test_forward_is_that_of_transformers(kind, quantized):
    module = tiny_experts(kind)
    if quantized:
        packed = {
            name: quantize_experts(getattr(module, name).data, groups=4)
            for name in ("gate_up_proj", "down_proj")
        }
        for name, weight in packed.items():
            getattr(module, name).data = weight.dequantize()
    tokens, k = 7, 2
    x = random(tokens, 32, seed=9).requires_grad_()
    index = torch.stack(
        [torch.randperm(4, generator=torch.Generator().manual_seed(t))[:k] for t in range(tokens)]
    )
    weights = torch.softmax(random(tokens, k, seed=3), dim=-1).requires_grad_()
    theirs = module(x, index, weights)
    grads = torch.autograd.grad(theirs.square().sum(), (x, weights))
    if quantized:
        for name, weight in packed.items():
            set_experts(module, name, weight)
    ours = experts_forward(module, x, index, weights)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), (x, weights)), grads, strict=True
    ):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_experts_that_are_elsewhere_add_nothing():
    module = tiny_experts("mixtral")
    x = random(3, 32)
    index = torch.tensor([[0, 4], [4, 4], [1, 2]])
    weights = torch.ones(3, 2)
    out = experts_forward(module, x, index, weights)
    assert out[1].count_nonzero() == 0
    alone = experts_forward(module, x[:1], index[:1, :1], weights[:1, :1])
    torch.testing.assert_close(out[:1], alone, **CLOSE)


def test_no_tokens_give_no_rows():
    module = tiny_experts("mixtral")
    x = torch.zeros(0, 32, requires_grad=True)
    out = experts_forward(module, x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert out.shape == (0, 32)
    out.sum().backward()


def test_a_compiled_forward_has_no_graph_break():
    module = tiny_experts("gpt_oss")
    for name in ("gate_up_proj", "down_proj"):
        set_experts(module, name, quantize_experts(getattr(module, name).data, groups=1))
    x = random(5, 32).requires_grad_()
    index = torch.tensor([[0, 3], [1, 3], [2, 0], [3, 1], [0, 1]])
    weights = torch.full((5, 2), 0.5)

    compiled = torch.compile(experts_forward, fullgraph=True, backend="aot_eager")
    (mine,) = torch.autograd.grad(compiled(module, x, index, weights).sum(), x)
    (eager,) = torch.autograd.grad(experts_forward(module, x, index, weights).sum(), x)
    torch.testing.assert_close(mine, eager)


def test_a_module_keeps_its_weights_through_copies_casts_and_state_dicts():
    module = tiny_experts("mixtral")
    quantized = quantize_experts(module.down_proj.data, groups=4)
    set_experts(module, "down_proj", quantized)
    assert list(experts_modules(nn.Sequential(module))) == ["0"]
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        module.to(torch.bfloat16),
    ):
        weight = experts_weight(twin, "down_proj")
        assert weight.layout == quantized.layout
        assert all(torch.equal(a, b) for a, b in zip(weight.parts, quantized.parts, strict=True))
    empty = tiny_experts("mixtral")
    set_empty_experts(empty, "down_proj", quantized.layout)
    assert empty.down_proj.is_meta
    assert set(empty.state_dict()) == set(module.state_dict())
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty.down_proj, module.down_proj)
    remove_experts(module, "down_proj", torch.float32)
    assert experts_layouts(module) == {}
    assert torch.equal(module.down_proj, quantized.dequantize())
    assert set(module.state_dict()) == {"gate_up_proj", "down_proj"}


def test_groups_that_do_not_fit_together_are_refused():
    one = fourbit.quantize(random(4, 64))
    with pytest.raises(ValueError, match="do not make a weight of"):
        join_groups([one, one], (2, 8, 64))
    with pytest.raises(ValueError, match="quantized in two ways"):
        join_groups([one, fourbit.quantize(random(4, 64), codebook="fp4")], (2, 4, 64))
    with pytest.raises(ValueError, match="blocks of 64 cross the matrices"):
        quantize_experts(random(2, 3, 32))
    with pytest.raises(ValueError, match="in 4 groups"):
        quantize_experts(random(2, 1, 64), groups=4)
    with pytest.raises(ValueError, match="3-D"):
        quantize_experts(random(2, 64))
    with pytest.raises(fourbit.NonFiniteError):
        quantize_experts(torch.full((1, 1, 64), torch.nan))
    with pytest.raises(ValueError, match="no parameter v"):
        set_experts(nn.Module(), "v", quantize_experts(random(1, 1, 64)))
    assert ExpertsLayout.fits((2, 2, 32), 64)


def test_counts_beyond_the_input_are_refused():
    module = holder(quantize_experts(random(2, 1, 64)))
    with pytest.raises(ValueError, match="counts add up to 5"):
        experts_product(module, "w", random(3, 64), torch.tensor([2, 3]), transposed=False)
    with pytest.raises(ValueError, match="features in its last dimension"):
        experts_product(module, "w", random(3, 32), torch.tensor([2, 1]), transposed=False)
