"""Models whose results depend on the batch size, on their state, or on inputs that are not tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.refusals import CoupledSamplesError, SampleAxisError
from tests.engine.kinds import WIDTH, Net, error_of, numbers

pytestmark = pytest.mark.filterwarnings("ignore:no fast rule")


def _top_eighth(net, x):
    hidden = torch.tanh(net.a(x))
    chosen = hidden.norm(dim=1).topk(len(x) // 8).indices
    return net.head(hidden.index_put((chosen,), torch.tanh(net.b(hidden[chosen]))))


class _Centred(torch.autograd.Function):
    """The identity; centres the gradient over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


def _noisy_and_centred(net, x):
    hidden = net.a(x + 0.1 * torch.randn_like(x))
    return net.head(torch.tanh(hidden) - (hidden.mean(0) if len(x) > 4 else 0))


COUPLED = {
    "the top eighth is refined": _top_eighth,
    "divided by the size": lambda net, x: net.head(torch.tanh(net.a(x)) / len(x)),
    "another scale for large batches": lambda net, x: net.head(torch.tanh(net.a(x)) * (1.5 if len(x) > 3 else 1.0)),
    "another layer for large batches": lambda net, x: net.head(torch.tanh(net.b(x) if len(x) > 3 else net.a(x))),
    "another layer for the first half": lambda net, x: net.head(
        torch.cat([net.a(x[: len(x) // 2]), net.b(x[len(x) // 2 :])])
    ),
    "a backward pass that centres": lambda net, x: net.head(_Centred.apply(torch.tanh(net.a(x)))),
    "random, and centred in large batches": _noisy_and_centred,
}


@pytest.mark.filterwarnings("ignore:Net draws random numbers")
@pytest.mark.parametrize("name", COUPLED)
def test_models_that_depend_on_the_batch_are_refused(name):
    torch.manual_seed(0)
    model = Net(COUPLED[name]).double().eval()
    with pytest.raises(CoupledSamplesError, match="depend on each other"):
        for size in (4, 16, 16):
            gradient_statistics(model, numbers(size, WIDTH), "pseudo_label")


class _Cache(nn.Module):
    """Appends its input to a list, and to a buffer that it replaces, in each call."""

    def __init__(self):
        super().__init__()
        self.seen, self.calls = [], 0
        self.register_buffer("kept", None)

    def forward(self, x):
        self.seen.append(x)
        self.calls += 1
        self.kept = x[:, None] if self.kept is None else torch.cat([self.kept, x[:, None]], 1)
        return (torch.stack(self.seen, 1).mean(1) + self.kept.sum(1)) / self.calls


def test_caches_are_reset_before_every_pass():
    torch.manual_seed(0)
    model = Net(lambda net, x: net.head(net.cache(torch.tanh(net.a(x))) + net.cache(net.b(x))))
    model.cache = _Cache()
    model = model.double()
    for size in (4, 4, 5, 1):
        assert error_of(model, numbers(size, WIDTH)) < 1e-8
        assert (model.cache.seen, model.cache.kept, model.cache.calls) == ([], None, 0)


class _Capturing(nn.Module):
    """Adds a hook in its first call, and remembers that in an attribute, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        captured = []
        if not hasattr(self, "installed"):
            self.installed = True
            self.layer.register_forward_hook(lambda module, given, output: output * 2)
        captured.append(self.layer(x))
        return self.head(torch.tanh(torch.stack(captured).sum(0)))


def test_hooks_that_a_forward_pass_adds_are_removed():
    model, batch = _Capturing().double(), numbers(4, WIDTH)
    gradient_statistics(model, batch, "pseudo_label")
    assert not model.layer._forward_hooks and not hasattr(model, "installed")
    assert error_of(model, batch) < 1e-8


def test_a_class_without_the_name_of_a_module():
    names = {"nn": nn, "forward": lambda net, x: net.head(net.a(x).tanh())}
    exec("kind = type('Kind', (nn.Sequential,), {'forward': forward})", names)
    assert not hasattr(names["kind"], "__module__")
    model = names["kind"]()
    model.a, model.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
    assert error_of(model.double().eval(), numbers(4, WIDTH)) < 1e-12


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize(
    "labels", [torch.tensor([1]), torch.tensor(1), torch.tensor([0.5, 1, 2, 0]), torch.ones(4, 2, dtype=int)]
)
def test_labels_that_are_not_one_class_per_sample_are_refused(engine, labels):
    """A tensor of one label was repeated for all samples, and fractions were cut off."""
    model = nn.Linear(WIDTH, 3).double()
    with pytest.raises(ValueError, match=r"class numbers \(4,\) of the samples"):
        gradient_statistics(model, numbers(4, WIDTH), "label", targets=labels, engine=engine)
    expected = gradient_statistics(
        model, numbers(4, WIDTH) * 0, "label", targets=torch.tensor([0, 1, 2, 0]), engine=engine
    )
    for same in ([0, 1, 2, 0], torch.tensor([[0.0], [1], [2], [0]])):
        found = gradient_statistics(model, numbers(4, WIDTH) * 0, "label", targets=same, engine=engine)
        assert torch.equal(found.norm(1), expected.norm(1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": None}, "model must be a torch.nn.Module, got a NoneType"),
        ({"parameters": ["weight"]}, "parameters= must be a predicate on names"),
        ({"objective": nn.CrossEntropyLoss()}, "CrossEntropyLoss needs labels"),
        ({"objective": 3}, "an objective is a name"),
        ({"statistics": []}, "statistics must name at least one of"),
        ({"statistics": [2]}, "unknown statistic 2"),
        ({"memory": -1}, "memory= must be a whole number"),
        ({"logits": lambda output: None}, "logits= must return a tensor"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(arguments, words):
    given = {"model": nn.Linear(WIDTH, 3).double(), "inputs": numbers(4, WIDTH), "objective": "uniform", **arguments}
    with pytest.raises((TypeError, ValueError), match=words):
        gradient_statistics(**given)


@pytest.mark.parametrize("engine", ["auto", "reference", "vmap"])
def test_logits_without_a_gradient_are_refused(engine):
    """All statistics were zero."""
    model = Net(lambda net, x: net.head(x).detach()).double()
    for _ in range(2):
        with pytest.raises(ValueError, match="logits of Net have no gradient"):
            gradient_statistics(model, numbers(4, WIDTH), "uniform", engine=engine)
    unused = Net(lambda net, x: net.head(x)).double()
    found = gradient_statistics(unused, numbers(4, WIDTH), "uniform", lambda name: name.startswith("a."), engine=engine)
    assert not bool(found.norm(1).any())


def test_parameters_made_in_inference_mode_are_named():
    with torch.inference_mode():
        model = nn.Linear(WIDTH, 3).double()
    with pytest.raises(ValueError, match="'weight' was made in torch"):
        gradient_statistics(model, numbers(4, WIDTH), "pseudo_label")


def _cut(net, x, lengths):
    return net.head(torch.stack([torch.tanh(net.a(row[:n])).mean(0) for row, n in zip(x, lengths, strict=False)]))


def test_a_list_with_an_entry_for_each_sample_is_refused_with_advice():
    model = Net(_cut).double()
    with pytest.raises(SampleAxisError, match=r"a list of 4 entries.*Pass it as a tensor"):
        gradient_statistics(model, (numbers(4, 5, WIDTH), [1, 2, 3, 4]), "pseudo_label")
    assert error_of(model, (numbers(4, 5, WIDTH), torch.tensor([1, 2, 3, 4]))) < 1e-8


def _early_exit(net, x):
    hidden = torch.tanh(net.a(x))
    unsure = (hidden[:, 0] <= 0).nonzero()[:, 0]
    return net.head(hidden).index_copy(0, unsure, net.head(torch.tanh(net.b(hidden[unsure]))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_gradient_of_a_branch(dtype):
    """Rows without a clear owner are not mistaken for rounding errors, which are large in half precision."""
    torch.manual_seed(0)
    model = Net(_early_exit).to(dtype)
    for size in (4, 5, 9):
        batch = torch.randn(size, WIDTH).to(dtype)
        found = gradient_statistics(model, batch, "pseudo_label", per_parameter=True).norm(2)
        for number in range(size):
            logits = model(batch[number : number + 1]).float()
            gradients = torch.autograd.grad(
                F.cross_entropy(logits, logits.argmax(1)), [model.b.weight, model.head.weight]
            )
            expected = torch.stack([gradient.float().norm() for gradient in gradients])
            names = [name for name, _ in model.named_parameters()]
            columns = [names.index("b.weight"), names.index("head.weight")]
            torch.testing.assert_close(found[number, columns], expected, rtol=0.05, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Sequential draws random numbers")
def test_dropout_between_convolutions_draws_the_same_numbers_as_the_model():
    """Random numbers are in the order of the memory, which another layout of the images would change."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(5, 3, 8, 8)
    torch.manual_seed(1)
    loss = F.cross_entropy(logits := model(x), logits.argmax(1), reduction="none")[3]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for _ in range(2):
        torch.manual_seed(1)
        found = gradient_statistics(model, x, "pseudo_label", per_parameter=True).norm()[3]
        torch.testing.assert_close(
            found, torch.stack([gradient.norm() for gradient in gradients]), rtol=1e-4, atol=1e-6
        )
