"""Layers of random shapes against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradmetrics.engine.rules import RULES, convolution
from lightning_gradmetrics.engine.rules.attention import multi_head_attention
from tests.engine.layers import SIZES, check_layer, normal


@settings(max_examples=15, deadline=None)
@given(st.lists(SIZES, max_size=3), SIZES, SIZES, st.booleans(), SIZES)
def test_linear(shape, inputs, outputs, bias, n):
    check_layer(nn.Linear(inputs, outputs, bias), normal(n, *shape, inputs))


class OverInputs(nn.Module):
    """A layer that runs on several inputs of each sample, such as the frames of a video."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _check_over_inputs(data, layer, channels, sizes):
    """Check a convolution on one or several inputs per sample."""
    count, inputs = data.draw(SIZES), data.draw(st.integers(1, 3))
    if inputs == 1:
        check_layer(layer, normal(count, channels, *sizes))
        return
    x = normal(count, inputs, channels, *sizes)
    if len(sizes) == 2 and data.draw(st.booleans()):
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (count, inputs))
    check_layer(OverInputs(layer), x)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convolution(data):
    dims, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    channels, features = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel = data.draw(st.integers(1, 3))
    dilation = data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from([0, 1, "same"]))
    stride = 1 if padding == "same" else data.draw(st.integers(1, 2))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(channels, features, kernel, stride, padding, dilation, groups, data.draw(st.booleans()), mode)
    sizes = data.draw(st.lists(st.integers(5, 6), min_size=dims, max_size=dims))
    _check_over_inputs(data, layer, channels, sizes)


ONE_POSITION = [
    (nn.Conv2d(4, 6, 1), True),
    (nn.Conv2d(4, 6, 1, 2, (0, 0), bias=False), True),
    (nn.Conv1d(4, 6, 1, padding="same"), True),
    (nn.Conv3d(4, 6, 1, padding="valid"), True),
    (nn.Conv2d(4, 6, 1, padding=(0, 1)), False),
    (nn.Conv2d(4, 6, 1, groups=2), False),
    (nn.Conv2d(4, 6, 3, padding=1), False),
]


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(("layer", "is_product"), ONE_POSITION)
def test_convolutions_of_images_with_one_position(layer, is_product, is_last, monkeypatch):
    """The products have the values and the strides of the convolutions."""
    sizes = [1] * (layer.weight.ndim - 2)
    x = normal(3, *sizes, 4).movedim(-1, 1) if is_last else normal(3, 4, *sizes)
    check_layer(layer, x)
    expected = layer(x)
    values = {"input": x, "weight": layer.weight, "bias": layer.bias, "stride": layer.stride, "padding": layer.padding}
    values |= {"dilation": layer.dilation, "groups": layer.groups}
    if is_product:
        monkeypatch.setattr(convolution, "_FUNCTIONS", ())
    found = RULES[(torch.conv1d, torch.conv2d, torch.conv3d)[len(sizes) - 1]].run(values)
    torch.testing.assert_close(found, expected)
    assert len(sizes) != 2 or found.stride() == expected.stride()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_transposed_convolution(data):
    dims, groups, stride = (data.draw(st.integers(1, k)) for k in (3, 2, 3))
    channels, features = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel, padding, dilation = (data.draw(st.integers(*k)) for k in ((2, 3), (0, 1), (1, 2)))
    extra = data.draw(st.integers(0, max(stride, dilation) - 1))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = kind(channels, features, kernel, stride, padding, extra, groups, data.draw(st.booleans()), dilation)
    sizes = data.draw(st.lists(st.integers(3, 4), min_size=dims, max_size=dims))
    _check_over_inputs(data, layer, channels, sizes)


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(1, 6), st.sampled_from([None, 0, 1]), SIZES)
def test_embedding(rows, length, padding, n):
    check_layer(nn.Embedding(rows + 1, 3, padding), torch.randint(0, rows + 1, (n, length)))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["sum", "mean", "max"]),
    st.integers(2, 6),
    st.integers(1, 6),
    st.sampled_from([None, 0, -1]),
    SIZES,
    st.booleans(),
    st.booleans(),
)
def test_embedding_bag(mode, rows, length, padding, n, sparse, weighted):
    sparse, weighted = sparse and mode != "max", weighted and mode == "sum"
    bag = nn.EmbeddingBag(rows, 3, mode=mode, padding_idx=padding, sparse=sparse)
    indices = torch.randint(0, rows, (n, length))
    if weighted:
        check_layer(Weighted(bag), indices, normal(n, length))
    else:
        check_layer(bag, indices)


class Weighted(nn.Module):
    """A bag whose entries have weights that depend on a parameter."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.bag, self.scale = bag, nn.Parameter(torch.rand(()))

    def forward(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.bag(indices, per_sample_weights=weights * self.scale)


def test_embedding_bag_with_a_bound_on_the_norm():
    """Rows are rescaled in the pass only; the user's weights stay unchanged."""
    bag = nn.EmbeddingBag(5, 3, max_norm=0.5)
    before = bag.weight.detach().clone().double()
    check_layer(bag, torch.randint(0, 5, (4, 3)))
    assert torch.equal(bag.weight, before)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(SIZES, st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, st.booleans())
def test_bilinear(n, shape, left, right, outputs, bias):
    check_layer(nn.Bilinear(left, right, outputs, bias), normal(n, *shape, left), normal(n, *shape, right))


EQUATIONS = {
    "ntd,de->nte": (2, 3),
    "ed, ntd -> nte": (3, 2),
    "ntd,hde->nhte": (2, 2, 3),
    "ntd,htd->nh": (3, 4, 2),
    "ntd,ts->nsd": (4, 5),
    "ntd,dt->n": (2, 4),
    "ntd,tde->nte": (4, 2, 3),
    "...d,de->...e": (2, 3),
    "ntd,dz": (2, 3),
    "ntd,sd->nt": (3, 2),
}
"""Sums of products of samples ``(N, 4, 2)`` with a parameter of a shape."""


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("listed", [False, True])
def test_einsum(equation, listed):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(*EQUATIONS[equation]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            factors = (x, self.weight) if "ed, n" not in equation else (self.weight, x)
            product = torch.einsum(equation, list(factors)) if listed else torch.einsum(equation, *factors)
            return product.reshape(len(x), -1)

    check_layer(Product(), normal(3, 4, 2))


def test_einsum_of_two_tensors_of_samples():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ntd,nte->nde", x, self.layer(x))

    check_layer(Product(), normal(3, 4, 2))


@settings(max_examples=10, deadline=None)
@given(SIZES, SIZES, st.sampled_from([None, 0.3]), st.booleans())
def test_attention_with_a_learned_bias(n, steps, scale, grouped):
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.bias = nn.Linear(4, 8), nn.Parameter(normal(4, steps, steps))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.query(x).view(-1, steps, 4, 2).transpose(1, 2)
            others = heads[:, ::2] if grouped else heads
            return torch.nn.functional.scaled_dot_product_attention(
                heads, others, others, self.bias, scale=scale, enable_gqa=grouped
            )

    check_layer(Biased(), normal(n, steps, 4))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_attention(n, queries, keys, batch_first, cross):
    layer = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3 if cross else None, vdim=3 if cross else None)
    other = normal(n, keys, 3 if cross else 4)
    check_layer(layer, normal(n, queries, 4), other, other, take=0)
    same = normal(n, queries, 4)
    check_layer(nn.MultiheadAttention(4, 2, batch_first=True), same, same, same, take=0)


class _SelfAttention(nn.Module):
    def __init__(self, bias: bool, **settings: object) -> None:
        super().__init__()
        self.layer, self.settings = nn.MultiheadAttention(6, 2, batch_first=True, bias=bias), settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, **self.settings)[0]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_without_weights(n, bias):
    check_layer(_SelfAttention(bias, need_weights=False), normal(n, 4, 6))


@pytest.mark.parametrize(
    ("settings", "is_plain"),
    [
        ({"need_weights": False}, True),
        ({}, False),
        ({"need_weights": False, "attn_mask": torch.eye(4).bool()}, False),
        ({"need_weights": False, "key_padding_mask": torch.tensor([[False, True, False, False]] * 3)}, False),
        ({"need_weights": False, "attn_mask": torch.ones(4, 4).triu(1).bool(), "is_causal": True}, False),
    ],
)
def test_self_attention_has_the_samples_first_if_nothing_else_is_asked_for(settings, is_plain, monkeypatch):
    original, calls = nn.functional.multi_head_attention_forward, []

    def recorded(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "multi_head_attention_forward", recorded)
        expected = _SelfAttention(True, **settings).double().eval()(normal(3, 4, 6).requires_grad_())
    ((args, kwargs),) = calls
    found = multi_head_attention(*args, **kwargs)[0].transpose(0, 1)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() == is_plain


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), SIZES, SIZES, st.integers(1, 2), st.booleans(), st.booleans())
def test_recurrent(kind, n, steps, layers, bias, both):
    layer = kind(3, 2, layers, bias=bias, batch_first=True, bidirectional=both)
    check_layer(layer, normal(n, steps, 3), take=0)
