"""``sample_axis=``: models whose samples are not on the first axis of their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.refusals import CoupledSamplesError, SampleAxisError
from lightning_gradmetrics.scoring.cross_fitting import cross_fit
from tests.engine.kinds import WIDTH, Net, numbers


class _TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(6, 4), nn.Linear(4, 3)

    def forward(self, x, state=None, scale=None):
        last = self.layer(x, state)[0][-1]
        return self.head(last if scale is None else last * scale[:, None])


def _alone(model, x, number, state=None, scale=None):
    one = slice(number, number + 1)
    logits = model(x[:, one], None if state is None else state[:, one], None if scale is None else scale[one])
    gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), list(model.parameters()))
    return torch.stack([gradient.norm() for gradient in gradients])


@pytest.mark.parametrize("times", [3, 4, 5])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_time_first_inputs_have_the_gradients_of_each_sample_alone(engine, times):
    torch.manual_seed(0)
    model = _TimeFirst().double()
    for size in (4, 5, 1):
        x = torch.randn(times, size, 6).double()
        kept = x.clone()
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine=engine, sample_axis=1)
        expected = torch.stack([_alone(model, x, number) for number in range(size)])
        torch.testing.assert_close(found.norm(2), expected)
        assert torch.equal(x, kept) and "forward" not in vars(model)


def test_a_mapping_names_the_axes_of_single_arguments():
    torch.manual_seed(0)
    model = _TimeFirst().double()
    x, state, scale = torch.randn(4, 4, 6).double(), torch.randn(1, 4, 4).double(), torch.rand(4).double()
    expected = torch.stack([_alone(model, x, number, state, scale) for number in range(4)])
    for inputs, axes in (
        ((x, state, scale), {0: 1, 1: 1}),
        ({"x": x, "state": state, "scale": scale}, {"x": 1, "state": 1}),
    ):
        found = gradient_statistics(model, inputs, "pseudo_label", per_parameter=True, sample_axis=axes)
        torch.testing.assert_close(found.norm(2), expected)


def test_score_takes_a_sample_axis():
    torch.manual_seed(0)
    model, x = _TimeFirst().double(), torch.randn(5, 5, 6).double()
    scores = ["gradnorm", "max_softmax", "pseudo_label(target='all', statistic='l2')"]
    found = lgm.score(model, x, scores, sample_axis=1)
    expected = torch.stack([_alone(model, x, number).norm() for number in range(5)])
    torch.testing.assert_close(list(found.values())[2], expected)
    torch.testing.assert_close(found["max_softmax"], 1 - model(x).softmax(1).amax(1))
    assert "forward" not in vars(model)


def test_wrong_sample_axes_are_refused_with_an_explanation():
    model, x = _TimeFirst(), torch.randn(5, 4, 6)
    with pytest.raises(SampleAxisError, match="sample_axis=1"):
        gradient_statistics(model, x, "pseudo_label")
    with pytest.raises(ValueError, match="no axis 3: allowed are 0 to 2; pass a mapping"):
        gradient_statistics(model, x, "pseudo_label", sample_axis=3)
    with pytest.raises(ValueError, match=r"names \['y'\]; the arguments in the inputs are \['x'\]"):
        lgm.score(model, {"x": x}, ["max_softmax"], sample_axis={"y": 1})
    with pytest.raises(ValueError, match="different numbers of samples"):
        gradient_statistics(model, (x, torch.zeros(1, 3, 4)), "pseudo_label", sample_axis=1)
    assert "forward" not in vars(model)


class _Tokens(nn.Module):
    """Logits of each token, from inputs with the tokens first."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.layer(input_ids.T).tanh())


def test_padding_is_that_of_the_samples():
    torch.manual_seed(0)
    ids, mask = torch.randint(9, (5, 3)), torch.ones(5, 3, dtype=torch.long)
    mask[3:, 2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = lgm.score(_Tokens().eval(), inputs, "entropy", sample_axis=1)["entropy"]
    assert torch.equal(found.isnan(), mask.T == 0)


def test_other_axes_and_hooks_are_refused():
    model, x = _TimeFirst(), torch.randn(5, 4, 6)
    for wrong in (True, 1.0, None, {0: 1.0}, {1.0: 1}):
        with pytest.raises(TypeError, match="expected an axis from 0 on, or a mapping"):
            lgm.score(model, x, "entropy", sample_axis=wrong)
    with pytest.raises(ValueError, match="sample_axis=-2: expected an axis from 0 on"):
        lgm.score(model, x, "entropy", sample_axis=-2)
    model.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="forward pre-hooks"):
        lgm.score(model, x, "entropy", sample_axis=1)


class _LastStep(nn.Module):
    """Time first; a head on the last step."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


def test_fits_and_features_take_a_sample_axis():
    torch.manual_seed(0)
    model, x, labels = _LastStep().eval(), torch.randn(7, 12, 4), torch.arange(12) % 3
    fitted = lgm.fit(model, [(x, labels)], ["knn", "gradorth"], sample_axis=1)
    flipped = nn.Sequential(_Flipped(), model).eval()
    expected = lgm.fit(flipped, [(x.transpose(0, 1), labels)], ["knn", "gradorth"])
    found, wanted = lgm.score(model, x, fitted, sample_axis=1), lgm.score(flipped, x.transpose(0, 1), expected)
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values)
    features, _ = lgm.gradient_features(model, x, sample_axis=1)
    torch.testing.assert_close(features, lgm.gradient_features(flipped, x.transpose(0, 1))[0])


class _Flipped(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class _WithTable(nn.Linear):
    """A linear layer with an embedding that it does not use."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.table = nn.Embedding(10, 4)


@pytest.mark.parametrize(
    ("layers", "inputs", "words"),
    [
        (
            [nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)],
            torch.tensor([[1, 2, 30]]),
            r"ids from 1 to 30.*0 to 9",
        ),
        ([nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)], torch.tensor([[1, -2, 3]]), r"ids from -2 to 3"),
        ([nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)], torch.ones(1, 3), r"takes ids.*inputs\.long\(\)"),
        ([nn.Linear(4, 3)], torch.ones(2, 4, dtype=torch.int64), r"torch\.int64.*inputs\.float\(\)"),
        ([nn.Linear(4, 3)], torch.ones(2, 4).double(), r"torch\.float64.*inputs\.float\(\)"),
        ([_WithTable()], torch.ones(2, 4).double(), r"torch\.float64.*inputs\.float\(\)"),
        ([_WithTable()], torch.ones(2, 4, dtype=torch.int64), r"torch\.int64.*inputs\.float\(\)"),
    ],
)
def test_inputs_of_the_wrong_type_or_range_are_refused_in_words(layers, inputs, words):
    model = nn.Sequential(*layers).eval()
    with pytest.raises(ValueError, match=words):
        lgm.score(model, inputs, ["gradnorm", "entropy"])
    with pytest.raises(ValueError, match=words):
        lgm.gradient_statistics(model, inputs, "pseudo_label")


class _Averaging(nn.Module):
    """Averages over time, which is on the first or on the second axis."""

    def __init__(self, time: int) -> None:
        super().__init__()
        self.hidden, self.head, self.time = nn.Linear(4, 8), nn.Linear(8, 3), time

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)).mean(self.time))


def test_cross_fit_takes_another_sample_axis_with_labels() -> None:
    torch.manual_seed(0)
    usual, turned = _Averaging(1).eval(), _Averaging(0).eval()
    turned.load_state_dict(usual.state_dict())
    batches = [(torch.randn(20, 5, 4), torch.randint(3, (20,))) for _ in range(2)]
    moved = [(inputs.transpose(0, 1).contiguous(), labels) for inputs, labels in batches]
    tables = []
    for model, data, axis in ((usual, batches, 0), (turned, moved, 1)):
        tables.append(cross_fit(model, {"v": data}, ["gradnorm"], {"v": "id"}, folds=2, sample_axis=axis))
    assert tables[1]["label"].to_pylist() == tables[0]["label"].to_pylist()
    assert tables[1]["gradnorm"].to_pylist() == pytest.approx(tables[0]["gradnorm"].to_pylist(), rel=1e-5)


def _trimmed(net, x, mask):
    """Reads the mask only for the longest text of the batch, so that padding changes the shorter ones."""
    length = max(1, int(mask.sum(1).max()))
    return net.head(torch.tanh(net.a(x[:, :length])).mean(1))


def _gram(net, x, other):
    return net.head(torch.tanh(net.a(x)) @ torch.tanh(net.b(other)).T @ torch.tanh(net.b(other)))


def _positions(net, x, table):
    return net.head(torch.tanh(net.a(x) + table).mean(1))


def _with_shared(model, x, other):
    """Returns the gradient norms of each sample, all with the same second input."""
    rows = []
    for number in range(len(x)):
        logits = model(x[number : number + 1], other)
        loss = F.cross_entropy(logits, logits.argmax(1))
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        rows.append(torch.stack([gradient.norm() for gradient in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize(("forward", "length"), [(_trimmed, (4,)), (_gram, ())])
def test_an_input_as_long_as_the_batch_that_may_be_shared_is_refused(forward, length, engine):
    """The samples alone have the logits of the batch only if the second input is shared, which the model does not require."""
    torch.manual_seed(0)
    model, x = Net(forward).double().eval(), numbers(5, *length, WIDTH)
    other = torch.arange(4) < torch.tensor([[1], [2], [3], [3], [4]]) if length else numbers(5, WIDTH)

    def found(axis):
        return gradient_statistics(
            model, (x, other), "pseudo_label", per_parameter=True, engine=engine, sample_axis=axis
        )

    with pytest.raises(SampleAxisError, match=r"the input 1: it is as long as the batch of 5.*sample_axis={1: None}"):
        found(0)
    for stated in ({1: None}, {0: 0, 1: None}):
        torch.testing.assert_close(found(stated).norm(2), _with_shared(model, x, other))
    if engine == "auto":
        with pytest.raises(CoupledSamplesError):
            found({1: 0})
    with pytest.raises(SampleAxisError, match="it is ambiguous"):  # every time
        found(0)


def _sizes_of_passes(model, inputs):
    """Returns the gradient norms, and the number of samples of each forward pass of a call."""
    sizes = []
    handle = model.a.register_forward_hook(lambda module, args, result: sizes.append(len(result)))
    try:
        return gradient_statistics(model, inputs, "pseudo_label", per_parameter=True).norm(2), sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("sorts", [False, True])
def test_the_passes_of_a_plan_show_that_a_mask_has_one_row_per_sample(sorts):
    """A plan with a proof needs no others; without one the whole batch runs once more."""

    def forward(net, x, mask):
        hidden = torch.tanh(net.a(x))
        if sorts:
            hidden = hidden[x[:, 0, 0].argsort()][x[:, 0, 0].argsort().argsort()]
        return net.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    torch.manual_seed(0)
    model, x = Net(forward).double().eval(), numbers(6, 4, WIDTH)
    mask = (torch.arange(4) < torch.tensor([[1], [2], [3], [3], [4], [4]])).double()
    found, sizes = _sizes_of_passes(model, (x, mask))
    if not sorts:
        assert sizes[:3] == [2, 3, 6] and set(sizes[3:]) == {1}
    expected = [_with_shared(model, x[n : n + 1], mask[n : n + 1]) for n in range(6)]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("size", [4, 6])
def test_a_table_that_only_the_whole_batch_shows_to_be_shared_is_refused(size):
    """Two and three samples have the same logits with as many of its rows, because its largest row is the first one of these."""

    def forward(net, x, table):
        return net.head(torch.tanh(net.a(x)) * table.amax(0))

    torch.manual_seed(0)
    table = torch.linspace(3, 1, size)[:, None].expand(size, WIDTH).double().clone()
    table[size - 1] = 5
    with pytest.raises(SampleAxisError, match="it is ambiguous"):
        gradient_statistics(Net(forward).double().eval(), (numbers(size, WIDTH), table), "pseudo_label")


def test_score_names_the_ambiguous_input_and_takes_its_axis():
    torch.manual_seed(0)
    model, inputs = _Named().double().eval(), {"x": numbers(4, 6), "others": {"table": numbers(4, 6)}}
    with pytest.raises(
        SampleAxisError, match=r"sample_axis={'table': None} to score, gradient_statistics or GradientM"
    ):
        lgm.score(model, inputs, "pseudo_label(target='all', statistic='l2')")
    for axis in ({"table": None}, {"others": None, "x": 0}):
        values = lgm.score(model, inputs, {"norm": "pseudo_label(target='all', statistic='l2')"}, sample_axis=axis)
        expected = _with_shared(model, inputs["x"], inputs["others"]).norm(dim=1)
        torch.testing.assert_close(values["norm"], expected)


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, others):
        return self.head(torch.tanh(self.a(x)) @ (others["table"].T @ others["table"]))


def test_an_input_that_had_another_length_or_does_not_fit_the_samples_is_shared():
    torch.manual_seed(0)
    for forward, table, sizes in ((_positions, numbers(4, WIDTH), (4, 3, 4)), (_gram, numbers(4, WIDTH), (3, 4, 4))):
        model = Net(forward).double().eval()
        for size in sizes:
            x = numbers(size, 4, WIDTH) if forward is _positions else numbers(size, WIDTH)
            found = gradient_statistics(model, (x, table), "pseudo_label", per_parameter=True).norm(2)
            torch.testing.assert_close(found, _with_shared(model, x, table))


class _Listed(nn.Module):
    """Takes a list with the image of each sample, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.head(torch.stack(images).flatten(1))


@pytest.mark.parametrize("engine", ["auto", "vmap", "reference"])
def test_lists_of_samples_are_named_in_the_error(engine: str) -> None:
    images = [torch.randn(2, 2) for _ in range(5)]
    for inputs in ([images], {"images": images}):
        with pytest.raises(SampleAxisError, match=r"a list of 5 tensors.* Stack them"):
            gradient_statistics(_Listed(), inputs, "pseudo_label", engine=engine)
    with pytest.raises(TypeError, match=r"a list of 5 inputs: .* stack them"):
        gradient_statistics(_Listed(), images, "pseudo_label", engine=engine)
