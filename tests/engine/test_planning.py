"""What the first batch, a new batch size and a new length cost, and what the checks in them find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradmetrics.classifier import tensor_records
from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.checks import sample_check
from lightning_gradmetrics.engine.refusals import CoupledSamplesError
from lightning_gradmetrics.engine.rules import RULES
from lightning_gradmetrics.engine.tracing.calls import opened
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace
from tests.engine.kinds import WIDTH, Net, error_of, numbers


class _Texts(nn.Module):
    """Attention over tokens with positions that are gathered, and the last real token picked by an index."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(20, 8), nn.Embedding(12, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.register_buffer("numbers", torch.arange(12)[None])

    def forward(self, ids):
        counts = torch.arange(ids.shape[1]).expand(ids.shape)
        places = self.numbers.expand(len(ids), -1).gather(1, counts)
        hidden = self.layer(self.tokens(ids) + self.positions(places))
        return self.head(hidden[torch.arange(len(ids)), (ids > 0).sum(1) - 1])


def _passes(model, batch):
    seen = []
    handle = model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    try:
        gradient_statistics(model, batch, "pseudo_label")
    finally:
        handle.remove()
    return seen


def test_proven_models_run_once_for_every_size_and_once_more_for_two_new_lengths():
    torch.manual_seed(0)
    model = _Texts().double().eval()
    first = _passes(model, torch.randint(1, 20, (5, 6)))
    # Two and three samples are traced. Then come the batch, and its samples, which are compared with autograd.
    assert first == [2, 3, 5, 1, 1, 1, 1, 1]
    (known,) = auto._STRATEGIES[model].values()
    assert (known[0].alone, known[0].random, known[0].reads_samples) == (0, False, False)
    checks = {(5, 6): [], (4, 6): [], (1, 6): [], (5, 9): [1], (7, 9): [], (7, 3): [1], (2, 3): []}
    checks.update({(4, 8): [], (6, 4): [], (3, 8): []})  # the sizes are on a line through those of three lengths
    for shape, checked in checks.items():
        batch = torch.randint(1, 20, shape)
        assert _passes(model, batch) == [shape[0], *checked]
        assert _passes(model, batch) == [shape[0]]
        assert error_of(model, (batch,)) < 1e-8


class _OneHot(nn.Module):
    """Reads its inputs only to check that every class is below their number."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, classes):
        return self.head(F.one_hot(classes, 4).double().flatten(1))


class _OneHotByKeyword(_OneHot):
    """The same with arguments by name."""

    def forward(self, classes):
        return self.head(F.one_hot(input=classes, num_classes=4).double().flatten(1))


class _OneHotOfTheBatch(_OneHot):
    """The largest class of the batch determines the number of columns."""

    def forward(self, classes):
        columns = F.one_hot(classes)
        return self.head(F.pad(columns, (0, 4 - columns.shape[2])).double().flatten(1)) * columns.shape[2]


class _ZeroShot(nn.Module):
    """Compares features with those of texts, which all samples share."""

    def __init__(self):
        super().__init__()
        self.features, self.tokens = nn.Linear(6, 8), nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.register_buffer("texts", torch.randint(0, 20, (3, 4)))

    def forward(self, x):
        classes = self.encoder(self.tokens(self.texts)).mean(1)
        return F.normalize(self.features(x), dim=1) @ F.normalize(classes, dim=1).T


PROVEN = {
    "one_hot": (_OneHot, lambda size: torch.randint(0, 4, (size, 3))),
    "one_hot by keyword": (_OneHotByKeyword, lambda size: torch.randint(0, 4, (size, 3))),
    "attention over constants": (_ZeroShot, lambda size: torch.randn(size, 6).double()),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)),
        lambda size: torch.randn(size, 6).double(),
    ),
}


@pytest.mark.parametrize("name", PROVEN)
def test_known_batches_of_proven_models_run_once(name):
    torch.manual_seed(0)
    made, batch = PROVEN[name]
    model = made().double().eval()
    for size in (5, 8):
        _passes(model, batch(size))
        assert _passes(model, batch(size)) == [size]
        assert error_of(model, (batch(size),)) < 1e-8


class _ShiftBeforeNorm(nn.Module):
    """The norm removes a shift that all channels share, so the gradients of the shifts are sums that cancel."""

    def __init__(self):
        super().__init__()
        self.features, self.norm, self.head = nn.Linear(6, 64), nn.LayerNorm(64), nn.Linear(64, 3)
        self.shifts = nn.Parameter(torch.randn(1, 40, 1))

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.features(x)) + self.shifts).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shifts_before_a_norm_keep_their_fast_rule(dtype):
    torch.manual_seed(0)
    model = _ShiftBeforeNorm().to(dtype).eval()
    gradient_statistics(model, torch.randn(16, 40, 6).to(dtype), "pseudo_label")
    (known,) = auto._STRATEGIES[model].values()
    assert known[0].fast == tuple(dict(model.named_parameters()))


def test_a_number_of_classes_that_the_batch_determines_is_refused():
    torch.manual_seed(0)
    model = _OneHotOfTheBatch().double().eval()
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, torch.tensor([[0, 1, 2], [3, 0, 0], [1, 1, 0], [2, 0, 1]]), "pseudo_label")


def test_samples_that_are_mixed_at_one_size_only_are_refused():
    """The shapes of a view follow the batch, so that only a check of each new size shows it."""

    def forward(net, x):
        hidden = torch.tanh(net.a(x))
        groups = 4 if len(x) % 4 == 0 else 1
        grouped = hidden.view(len(x) // groups, groups, -1)
        return net.head((grouped - 0.5 * grouped.mean(1, keepdim=True)).view(len(x), -1))

    torch.manual_seed(0)
    model = Net(forward).double()
    gradient_statistics(model, numbers(3, WIDTH), "pseudo_label")
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, numbers(16, WIDTH), "pseudo_label")


def test_a_branch_on_the_size_of_the_batch_is_not_covered_by_the_proof():
    torch.manual_seed(0)
    model = Net(lambda net, x: net.head(torch.tanh(net.a(x)) * (2.0 if len(x) > 3 else 1.0))).double()
    gradient_statistics(model, numbers(3, WIDTH), "pseudo_label")
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, numbers(6, WIDTH), "pseudo_label")


def test_a_number_of_all_samples_that_python_reads_is_checked_in_every_batch():
    """The longest text determines how many tokens of the others are averaged."""
    torch.manual_seed(0)
    model = Net(lambda net, x, lengths: net.head(torch.tanh(net.a(x[:, : int(lengths.max())])).mean(1))).double()
    gradient_statistics(model, (numbers(3, 6, WIDTH), torch.tensor([4, 4, 4])), "pseudo_label")
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, (numbers(3, 6, WIDTH), torch.tensor([1, 4, 2])), "pseudo_label")


class _Gated(nn.Module):
    """A layer whose gradient is tiny, or zero for the samples with a negative first number."""

    def __init__(self, scale, is_gated):
        super().__init__()
        self.scale, self.is_gated = scale, is_gated
        self.small, self.large = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x):
        added = self.small(x)[:, :3]
        if self.is_gated:
            added = added * (x[:, :1] > 0)
        return self.large(x) + self.scale * added


@pytest.mark.parametrize(("scale", "on"), [(1e-6, None), (1.0, [0, 2, 4, 6]), (1.0, [5])])
def test_a_wrong_rule_is_found_on_the_batch_where_its_gradients_are_small_or_zero(monkeypatch, scale, on):
    rule = RULES[F.linear]

    def wrong(call, gradient):
        return rule.uses(call, 2 * gradient if len(call.values["weight"]) == 5 else gradient)

    monkeypatch.setitem(RULES, F.linear, replace(rule, uses=wrong))
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = _Gated(scale, on is not None), torch.randn(8, 6)
        x[:, 0] = -1
        x[on or [], 0] = 1
        with pytest.warns(UserWarning, match="disagrees with autograd"):
            found = gradient_statistics(model, x, "pseudo_label", per_parameter=True)
        expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference")
        torch.testing.assert_close(found.norm(2), expected.norm(2), rtol=1e-4, atol=1e-12)


def test_a_sample_for_which_a_plan_was_wrong_is_compared_again(monkeypatch):
    """A rule that reverses the samples is right for the middle one, which the probe and the batch compare."""
    rule = RULES[F.linear]
    monkeypatch.setitem(RULES, F.linear, replace(rule, uses=lambda call, gradient: rule.uses(call, gradient.flip(0))))
    monkeypatch.setattr(sample_check, "random_sample", lambda size, avoided: size // 2)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="disagree with autograd"):
        assert error_of(nn.Linear(6, 3).double(), (numbers(9, 6),)) < 1e-8


def test_tracing_does_not_import_the_compiler():
    """Torch wraps other dispatch modes in a function that imports torch._dynamo, which takes a second."""
    assert not hasattr(DependenceTrace.__torch_dispatch__, "__wrapped__")
    assert not hasattr(tensor_records._Watch.__torch_dispatch__, "__wrapped__")


def test_backward_passes_do_not_import_sympy(monkeypatch):
    """Torch imports it to compare the shapes of a tensor and of a given gradient, which takes 0.6 s."""
    checked = torch.autograd._make_grads

    def without_gradients(outputs, gradients, **options):
        assert all(gradient is None for gradient in gradients)
        return checked(outputs, gradients, **options)

    monkeypatch.setattr(torch.autograd, "_make_grads", without_gradients)
    opened.cache_clear()  # it contains copies of torch's functions
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 6)
    for size in (5, 5, 5, 1, 1):
        gradient_statistics(model, x[:size], "pseudo_label")
    opened.cache_clear()


@pytest.mark.parametrize("row", range(6))
def test_a_rule_that_is_wrong_for_one_row_of_a_small_batch_is_not_used(row, monkeypatch):
    right = RULES[F.linear]

    def wrong(call, g):
        factors = torch.ones(len(g), 1)
        factors[row if len(g) == 6 else slice(0)] = 1.5
        return right.uses(call, g * factors)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(6, 4)
    expected = gradient_statistics(model, x, "pseudo_label", engine="reference").norm()
    monkeypatch.setitem(RULES, F.linear, replace(right, uses=wrong))
    with pytest.warns(UserWarning, match="no fast rule"):
        found = gradient_statistics(model, x, "pseudo_label").norm()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_statistics(model, x, "pseudo_label").norm(), expected)


class _DetachedAlone(nn.Module):
    """Without the other samples, some samples take a path with the same logits and without some gradients."""

    def __init__(self, sorts):
        super().__init__()
        self.first, self.second, self.head, self.sorts = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), sorts

    def forward(self, x):
        order = x[:, 0].argsort() if self.sorts else torch.arange(len(x))
        hidden = torch.tanh(self.first(x[order]))
        further = self.second(hidden)
        if len(x) == 1 and x[0, 1] > 1:
            further = further.detach()
        return self.head(torch.tanh(further) + hidden)[order.argsort()]


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("sorts", [True, False])
def test_a_path_that_only_samples_alone_take_by_their_values_is_found(sorts):
    refused = 0
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = _DetachedAlone(sorts).eval(), torch.randn(12, 4)
        try:
            found = gradient_statistics(model, x, "pseudo_label").norm()
        except CoupledSamplesError:
            refused += 1
            continue
        expected = gradient_statistics(model, x, "pseudo_label", engine="reference").norm()
        torch.testing.assert_close(found, expected)
    assert refused < 6
