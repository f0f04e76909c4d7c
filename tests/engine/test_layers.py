"""Layers of random shapes against the reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradmetrics.classifier.frozen_norm import EarlyProduct
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.kernels import describe_kernels
from lightning_gradmetrics.engine.passes import path_record
from lightning_gradmetrics.engine.rules.attention import multi_head_attention
from lightning_gradmetrics.engine.uses import DerivedUse
from tests.engine.cases import worst_difference

SIZES = st.integers(1, 4)


class Summed(nn.Module):
    """A layer, and logits that weigh each entry of its output differently."""

    def __init__(self, layer: nn.Module, take: int | None = None) -> None:
        super().__init__()
        self.layer, self.take = layer, take

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        out = self.layer(*inputs)
        out = (out if self.take is None else out[self.take]).flatten(1)
        weights = torch.arange(1.0, 1 + out.shape[1], dtype=out.dtype).sin()
        return torch.stack([(out * weights).sum(1), (out.square() * weights).sum(1), out.tanh().sum(1)], 1)


def _check(layer: nn.Module, *inputs: torch.Tensor, take: int | None = None) -> None:
    model = Summed(layer.double(), take).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel.*")
        objectives = ["pseudo_label", "uniform"]
        found = gradient_statistics(model, inputs, objectives, per_parameter=True)
        expected = gradient_statistics(model, inputs, objectives, per_parameter=True, engine="reference")
    for one, other in zip(found, expected, strict=True):
        assert worst_difference(one, other) < 1e-9


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(st.lists(SIZES, max_size=3), SIZES, SIZES, st.booleans(), SIZES)
def test_linear(shape, inputs, outputs, bias, n):
    _check(nn.Linear(inputs, outputs, bias), _normal(n, *shape, inputs))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
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
    _check(layer, _normal(data.draw(SIZES), channels, *sizes))


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
    _check(layer, _normal(data.draw(SIZES), channels, *sizes))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["batch", "layer", "group", "instance", "rms"]), SIZES, SIZES, SIZES)
def test_norm(kind, n, groups, positions):
    channels = 2 * groups
    layer = {
        "batch": lambda: nn.BatchNorm1d(channels),
        "layer": lambda: nn.LayerNorm((channels, positions + 1)),
        "group": lambda: nn.GroupNorm(groups, channels),
        "instance": lambda: nn.InstanceNorm1d(channels, affine=True),
        "rms": lambda: nn.RMSNorm(positions + 1),
    }[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    _check(layer, _normal(n, channels, positions + 1))


def test_instance_norms_with_running_statistics_far_from_zero_are_as_exact_as_torch():
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    norm.running_mean.fill_(1e3)
    norm.running_var.fill_(1e-6)
    model, x = Summed(norm).eval(), 1e3 + 1e-3 * torch.randn(3, 4, 20, dtype=torch.float64).float()
    found = gradient_statistics(model, x, "uniform", per_parameter=True)
    expected = gradient_statistics(model, x, "uniform", per_parameter=True, engine="reference")
    assert worst_difference(found, expected) < 1e-3


class _NormOfFrames(nn.Module):
    """A group norm of the frames of a video, all of them on the first axis; far from zero, with channels last or transposed."""

    def __init__(self, layout: torch.memory_format | None) -> None:
        super().__init__()
        self.norm, self.layout = nn.GroupNorm(2, 4), layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = x.flatten(0, 1).add(50)
        frames = frames.mT if self.layout is None else frames.contiguous(memory_format=self.layout)
        out: torch.Tensor = self.norm(frames).unflatten(0, x.shape[:2]).sum(1)
        return out


CRASHES = torch.__version__ < "2.14"
FRAMES_LAST = pytest.param(
    torch.channels_last,
    marks=pytest.mark.skipif(CRASHES, reason="torch 2.14: older ones crash where no layer before the norm is trained"),
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, FRAMES_LAST, None])
def test_group_norm_of_frames(layout):
    layer = _NormOfFrames(layout)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    _check(layer, _normal(3, 2, 4, 3, 5))


class _ChannelsLast(nn.Module):
    """Changes the layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("chosen", ["0.weight 2.weight", "2.weight 2.bias"])
def test_chosen_weights_of_group_norms_with_channels_last(engine, chosen):
    """Torch before 2.14 ends the process where the gradient of a group norm's input is not computed."""
    layers = [nn.Conv2d(3, 4, 3), nn.Identity(), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    inputs, options = _normal(4, 3, 6, 6), {"parameters": chosen.split().__contains__, "engine": engine}
    expected = gradient_statistics(nn.Sequential(*layers).double(), inputs, "uniform", **options)
    layers[1] = _ChannelsLast()
    model = nn.Sequential(*layers)
    if CRASHES and engine == "auto" and chosen.startswith("2"):  # the convolution is frozen
        with pytest.raises(RuntimeError, match="install a newer torch"):
            gradient_statistics(model, inputs, "uniform", **options)
        return
    for size in (4, 1, 1):
        found = gradient_statistics(model, inputs[:size], "uniform", **options)
        torch.testing.assert_close(found.max, expected.max[:size], rtol=1e-9, atol=1e-12)


class _Normed(nn.Sequential):
    """Convolutions with group norms, activations in place, and an output that is used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self
        y = first(x)
        z = second(y)
        return third(torch.cat([y, z.mul(2).add_(y)], 1).transpose(2, 3))


def test_group_norms_between_layers():
    def block(channels: int) -> nn.Sequential:
        norm = nn.GroupNorm(2, 4)
        nn.init.normal_(norm.weight)
        return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), norm, nn.ReLU(inplace=True))

    layer, inputs = _Normed(block(3), block(4), block(8)), _normal(4, 3, 5, 6)
    for batch in (inputs, inputs + 1, inputs - 1):
        _check(layer, batch)


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(1, 6), st.sampled_from([None, 0, 1]), SIZES)
def test_embedding(rows, length, padding, n):
    _check(nn.Embedding(rows + 1, 3, padding), torch.randint(0, rows + 1, (n, length)))


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
        _check(Weighted(bag), indices, _normal(n, length))
    else:
        _check(bag, indices)


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
    _check(bag, torch.randint(0, 5, (4, 3)))
    assert torch.equal(bag.weight, before)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(SIZES, st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, st.booleans())
def test_bilinear(n, shape, left, right, outputs, bias):
    _check(nn.Bilinear(left, right, outputs, bias), _normal(n, *shape, left), _normal(n, *shape, right))


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
            self.weight = nn.Parameter(_normal(*EQUATIONS[equation]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            factors = (x, self.weight) if "ed, n" not in equation else (self.weight, x)
            product = torch.einsum(equation, list(factors)) if listed else torch.einsum(equation, *factors)
            return product.reshape(len(x), -1)

    _check(Product(), _normal(3, 4, 2))


def test_einsum_of_two_tensors_of_samples():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ntd,nte->nde", x, self.layer(x))

    _check(Product(), _normal(3, 4, 2))


def test_reordered_parameters_are_not_pulled_back(monkeypatch):
    """The entries of a transposed or reshaped parameter have the parameter's statistics."""

    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.kernel = nn.Parameter(_normal(6, 4)), nn.Parameter(_normal(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.view(2, 3, 4).permute(2, 1, 0).reshape(4, 6)
            return torch.nn.functional.conv1d(y.mT, self.kernel.t().unsqueeze(2).contiguous().view(4, 6, 1))

    layer = Reordered()
    _check(layer, _normal(3, 5, 4))
    monkeypatch.delattr(DerivedUse, "gradient")
    gradient_statistics(Summed(layer), (_normal(3, 5, 4),), "pseudo_label")


@pytest.mark.parametrize("padding", [None, 1, -1])
def test_shared_rows_of_a_table_are_not_pulled_back(padding, monkeypatch):
    """Position embeddings have no gradient of the whole table for each sample."""

    class Positions(nn.Module):
        def __init__(self, scale: int | None = None) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(5, 3, padding_idx=padding), scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.table(torch.tensor([[0, 4, 1, 4]])) + self.table(torch.tensor(2))
            if self.scale is None:
                return y
            return y + nn.functional.embedding(torch.tensor([3]), self.table.weight * self.scale)

    _check(Positions(scale=2), _normal(3, 4, 3))
    layer = Positions()
    _check(layer, _normal(3, 4, 3))
    monkeypatch.delattr(DerivedUse, "gradient")
    gradient_statistics(Summed(layer), (_normal(3, 4, 3),), "pseudo_label")


SELECTED = {
    "a slice": lambda table: table[:5].unsqueeze(0),
    "repeated entries": lambda table: table[torch.tensor([[0, 1, 1], [3, 0, 0]])].permute(1, 0, 2).contiguous()[0],
    "a row without a gradient": lambda table: torch.nn.functional.embedding(
        torch.tensor([2, 1, 2, 0]), table, padding_idx=2
    )[1:],
    "an expanded entry": lambda table: table.index_select(0, torch.tensor([4])).expand(3, 4),
}


@pytest.mark.parametrize("select", SELECTED.values(), ids=SELECTED)
def test_selected_entries_are_not_pulled_back(select, monkeypatch):
    """A table of positions has gradients at the selected entries only, and zeros elsewhere."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(_normal(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + select(self.table)).tanh()

    inputs = _normal(3, *select(Positions().table).shape[-2:])
    _check(Positions(), inputs)
    monkeypatch.delattr(DerivedUse, "gradient")
    gradient_statistics(Summed(Positions()), (inputs,), "pseudo_label")


def test_gradients_scaled_by_frequency_are_pulled_back():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(_normal(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.nn.functional.embedding(torch.tensor([1, 1, 2]), self.table, scale_grad_by_freq=True)

    _check(Positions(), _normal(3, 3, 4))


@settings(max_examples=10, deadline=None)
@given(SIZES, SIZES, st.sampled_from([None, 0.3]), st.booleans())
def test_attention_with_a_learned_bias(n, steps, scale, grouped):
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.bias = nn.Linear(4, 8), nn.Parameter(_normal(4, steps, steps))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.query(x).view(-1, steps, 4, 2).transpose(1, 2)
            others = heads[:, ::2] if grouped else heads
            return torch.nn.functional.scaled_dot_product_attention(
                heads, others, others, self.bias, scale=scale, enable_gqa=grouped
            )

    _check(Biased(), _normal(n, steps, 4))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_attention(n, queries, keys, batch_first, cross):
    layer = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3 if cross else None, vdim=3 if cross else None)
    other = _normal(n, keys, 3 if cross else 4)
    _check(layer, _normal(n, queries, 4), other, other, take=0)
    same = _normal(n, queries, 4)
    _check(nn.MultiheadAttention(4, 2, batch_first=True), same, same, same, take=0)


class _SelfAttention(nn.Module):
    def __init__(self, bias: bool, **settings: object) -> None:
        super().__init__()
        self.layer, self.settings = nn.MultiheadAttention(6, 2, batch_first=True, bias=bias), settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, **self.settings)[0]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_without_weights(n, bias):
    _check(_SelfAttention(bias, need_weights=False), _normal(n, 4, 6))


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
        expected = _SelfAttention(True, **settings).double().eval()(_normal(3, 4, 6).requires_grad_())
    ((args, kwargs),) = calls
    found = multi_head_attention(*args, **kwargs)[0].transpose(0, 1)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() == is_plain


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), SIZES, SIZES, st.integers(1, 2), st.booleans(), st.booleans())
def test_recurrent(kind, n, steps, layers, bias, both):
    layer = kind(3, 2, layers, bias=bias, batch_first=True, bidirectional=both)
    _check(layer, _normal(n, steps, 3), take=0)


class _Norms(nn.Module):
    """Batch norms in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.first, self.second, self.third):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.data.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(self.first(x).relu_())
        return self.third(h.transpose(2, 3).tanh() + h).square().mean((2, 3))


def test_batch_norms_compute_their_gradients_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_record, "MOST_BYTES", 0)
    taken = []
    original = EarlyProduct.taken
    monkeypatch.setattr(EarlyProduct, "taken", lambda *given: taken.append(original(*given)) or taken[-1])
    model, x, objectives = _Norms().double().eval(), _normal(6, 4, 5, 5), ["pseudo_label", "uniform"]
    expected = gradient_statistics(model, x, objectives, per_parameter=True, engine="reference")
    for _ in range(3):
        for one, other in zip(gradient_statistics(model, x, objectives, per_parameter=True), expected, strict=True):
            assert worst_difference(one, other) < 1e-9
    assert any(product is not None for product in taken) == describe_kernels(torch.float64).startswith("compiled")
