"""Inputs without a sample axis, wrapped heads and half precision: logit and head scores need only the forward pass that ran."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_gradmetrics as lgm
from tests.callback.runs import Stepped, assert_scores, batches, column, mlp, numbers, test_run

Y = torch.arange(8) % 3
LOGIT_AND_HEAD = ["max_softmax", "energy", "gradnorm", "pseudo_label"]
FULL = "pseudo_label(target=all)"


def assert_closed_forms(callback: lgm.GradientMetrics, features: Tensor, logits: Tensor) -> None:
    """Assert that the results equal scores of logits and features computed without the package."""
    p = logits.softmax(1)
    torch.testing.assert_close(column(callback, "max_softmax"), 1 - p.amax(1))
    torch.testing.assert_close(column(callback, "energy"), -logits.logsumexp(1))
    uniform = (p - 1 / p.shape[1]).abs().sum(1)
    torch.testing.assert_close(column(callback, "gradnorm"), -features.abs().sum(1) * uniform)


class Graph:
    """A batch of graphs as PyTorch Geometric makes one: nodes in one tensor, and the graph of each node."""

    def __init__(self, x: Tensor, edge_index: Tensor, batch: Tensor, y: Tensor) -> None:
        self.x, self.edge_index, self.batch, self.y = x, edge_index, batch, y

    def to(self, *_: Any, **__: Any) -> Graph:
        return self


class Graphs(IterableDataset[Graph]):
    """Two batches of four graphs with ten nodes."""

    def __init__(self) -> None:
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 2, 4, 1]))
        edges = torch.tensor([[0, 1, 3, 5], [1, 0, 4, 6]])
        self.batches = [Graph(numbers(10, 5), edges, owner, Y[start : start + 4].clone()) for start in (0, 4)]

    def __iter__(self) -> Any:
        return iter(self.batches)


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def features(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.body(x).tanh()
        h = h.index_add(0, edge_index[1], h[edge_index[0]])
        return h.new_zeros(4, 6).index_add(0, batch, h)

    def forward(self, graph: Graph | Tensor, *others: Tensor) -> Tensor:
        parts = (graph.x, graph.edge_index, graph.batch) if isinstance(graph, Graph) else (graph, *others)
        return self.head(self.features(*parts))


class PassesGraph(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch)


class TakesGraphApart(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch.x, batch.edge_index, batch.batch)


@pytest.mark.filterwarnings("ignore:the index of the rows:UserWarning")
@pytest.mark.parametrize("kind", [PassesGraph, TakesGraphApart])
def test_graphs(kind: type[Stepped]) -> None:
    net, data = GraphNet().double().eval(), Graphs()
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    test_run(callback, kind(net), DataLoader(data, batch_size=None))
    features = torch.cat([net.features(g.x, g.edge_index, g.batch) for g in data.batches]).detach()
    assert_closed_forms(callback, features, net.head(features).detach())
    assert callback.results["label"].to_pylist() == Y.tolist()
    with pytest.raises(ValueError, match=r"no sample axis.*Logit and head scores work with any inputs"):
        test_run(lgm.GradientMetrics(FULL), kind(net), DataLoader(data, batch_size=None))


class Bags(nn.Module):
    """Averages the words of each text; all texts are in one row, with offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(20, 6), nn.Linear(6, 3)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.words(text, offsets))


class PassesBags(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch["text"], batch["offsets"])


def flat(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """One row of words, and where each text begins."""
    starts = torch.tensor([0, *[len(text) for text, _ in rows][:-1]]).cumsum(0)
    return {
        "text": torch.cat([text for text, _ in rows]),
        "offsets": starts,
        "labels": torch.tensor([y for _, y in rows]),
    }


def test_flat_text_with_offsets() -> None:
    net, texts = Bags().double().eval(), [torch.randint(0, 20, (length,)) for length in (3, 1, 4, 2, 5, 2, 3, 1)]
    data = DataLoader(list(zip(texts, Y.tolist(), strict=True)), 4, collate_fn=flat)  # type: ignore[arg-type]
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    test_run(callback, PassesBags(net), data)
    features = torch.stack([net.words.weight[text].mean(0) for text in texts]).detach()
    assert_closed_forms(callback, features, net.head(features).detach())
    assert callback.results["label"].to_pylist() == Y.tolist() and callback.results["index"].to_pylist() == list(
        range(8)
    )
    with pytest.raises((ValueError, TypeError), match=r"sample axis|first axis"):
        test_run(lgm.GradientMetrics(FULL), PassesBags(net), data)


class PassesLastTwo(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch[1], batch[2])


@pytest.mark.parametrize("is_index", [False, True])
def test_flat_text_in_a_tuple(is_index: bool) -> None:
    """In ``(labels, text, offsets)`` the first entry is the labels, unless it counts the samples or is no class."""
    net, texts = Bags().double().eval(), [torch.randint(0, 20, (length,)) for length in (3, 1, 4, 2, 5, 2, 3, 1)]
    first = list(range(8)) if is_index else [2, 0, 1, 1, 0, 2, 2, 0]

    def collated(rows: list[Any]) -> tuple[Tensor, ...]:
        entries = flat(rows)
        return entries["labels"], entries["text"], entries["offsets"]

    data = DataLoader(list(zip(texts, first, strict=True)), 4, collate_fn=collated)  # type: ignore[arg-type]
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        test_run(callback, PassesLastTwo(net), data)
    features = torch.stack([net.words.weight[text].mean(0) for text in texts]).detach()
    assert_closed_forms(callback, features, net.head(features).detach())
    about = [str(one.message) for one in heard if "no labels are used" in str(one.message)]
    assert callback.results["label"].to_pylist() == ([None] * 8 if is_index else first)
    assert len(about) == is_index and all("split_batch=" in text for text in about)


class Pools(nn.Module):
    """Takes a list of images of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 8, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.net(torch.stack([image.mean((1, 2)) for image in images]))


@pytest.mark.parametrize("sides", [(4, 4), (5, 7)], ids=["as long as the batch", "other sizes"])
def test_lists_of_images(sides: tuple[int, int]) -> None:
    """An image with NaN is not finite, even if the number of channels equals that of samples."""
    images = [numbers(4, *sides) for _ in range(8)]
    images[6][1, 0, 0] = float("nan")
    rows = list(zip(images, Y.tolist(), strict=True))
    data = DataLoader(rows, 4, collate_fn=lambda b: ([x for x, _ in b], torch.tensor([y for _, y in b])))  # type: ignore[arg-type]
    callback, net = lgm.GradientMetrics(LOGIT_AND_HEAD), Pools().eval()
    test_run(callback, Stepped(net), data)
    means = torch.stack([image.mean((1, 2)) for image in images])
    features = net.net[:2](means).detach()
    assert callback.results["finite"].to_pylist() == [n != 6 for n in range(8)]
    assert callback.results["label"].to_pylist() == Y.tolist()
    expected = -net.net[2](features).detach().logsumexp(1)
    torch.testing.assert_close(column(callback, "energy"), expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"sample axis|first axis"):
        test_run(lgm.GradientMetrics(FULL), Stepped(net), data)


class Lora(nn.Module):
    """A linear layer with a low-rank addition, which is zero at the start."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def wrapped(kind: str) -> nn.Sequential:
    net = mlp(5, 8, 3)
    if kind == "lora":
        net[2] = Lora(net[2]).double()  # type: ignore[arg-type]
    elif kind == "weight norm":
        net[2] = nn.utils.parametrizations.weight_norm(net[2])
    else:
        net[2] = nn.Sequential(nn.Dropout(0.5), net[2])
    return net.eval()


@pytest.mark.parametrize("kind", ["lora", "weight norm", "dropout"])
def test_wrapped_heads_in_a_run(kind: str) -> None:
    """The head's weight is read in every run: an adapter that was trained between two runs has a different one."""
    net, x = wrapped(kind), numbers(8, 5)
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    for _ in range(2):
        test_run(callback, Stepped(net), batches(x, Y))
        features = net[:2](x).detach()
        assert_closed_forms(callback, features, net(x).detach())
        with torch.no_grad():
            for parameter in net[2].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_a_head_that_is_replaced_during_a_run() -> None:
    class Replaces(Stepped):
        def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if batch_idx == 1:
                self.net[2] = second

    net, second, x = mlp(5, 8, 3), nn.Linear(8, 3).double(), numbers(8, 5)
    first = net[2]
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    test_run(callback, Replaces(net), batches(x, Y))
    features = net[:2](x).detach()
    logits = torch.cat([first(features[:4]), second(features[4:])]).detach()
    assert_closed_forms(callback, features, logits)


@dataclass
class Photo:
    image: Tensor
    label: Tensor


@dataclass
class Photographed:
    image: Tensor
    category: Tensor


class TakesImage(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch.image)


@pytest.mark.parametrize("kind", [Photo, Photographed])
def test_a_dataclass_as_the_batch(kind: Any) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    rows = list(zip(x, Y, strict=True))
    data = DataLoader(
        rows, 4, collate_fn=lambda b: kind(torch.stack([a for a, _ in b]), torch.stack([c for _, c in b]))
    )  # type: ignore[arg-type]
    callback = lgm.GradientMetrics([*LOGIT_AND_HEAD, FULL])
    if kind is Photo:
        test_run(callback, TakesImage(net), data)
        assert callback.results["label"].to_pylist() == Y.tolist()
    else:
        with pytest.warns(UserWarning, match=r"no labels are used.*'category'.*split_batch="):
            test_run(callback, TakesImage(net), data)
    assert_scores(callback, net, x, [*LOGIT_AND_HEAD, FULL])


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_trainers_and_fabric_in_half_precision(precision: Any) -> None:
    """Fabric refuses other backward passes than its own; its flag is restored afterwards."""
    wrappers = pytest.importorskip("lightning.fabric.wrappers")
    from lightning.fabric import Fabric

    names = ["energy", "gradnorm", FULL]
    net, x = mlp(16, 32, 3).float(), numbers(8, 16).float()
    expected = lgm.score(net, x, names)
    callback = lgm.GradientMetrics(names)
    test_run(callback, Stepped(net), batches(x, Y), precision=precision)
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup_module(mlp(16, 32, 3).float()).eval()
    model.module.load_state_dict(net.state_dict())
    found = lgm.score(model, x, names)
    for name, values in expected.items():
        torch.testing.assert_close(column(callback, name).float(), values.float(), rtol=0.05, atol=0.05)
        torch.testing.assert_close(found[name].float(), values.float(), rtol=0.05, atol=0.05)
    assert wrappers._in_fabric_backward is False


class Weighted(nn.Module):
    """Time first; the second input weights the products of hidden units, as long as the batch in the test."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().mean(0) @ (table.T @ table))


class PassesTimeFirst(Stepped):
    table: Tensor

    def step(self, batch: Any) -> Any:
        return self.net(batch[0].transpose(0, 1), self.table)


def test_sample_axis_of_a_time_first_input_and_a_shared_input() -> None:
    """Time, samples and table have the same length, so nothing but ``sample_axis`` tells them apart."""
    torch.manual_seed(0)
    module, x = PassesTimeFirst(Weighted().double().eval()), numbers(8, 4, 5)
    module.table = numbers(4, 6)
    score = {"norm": "pseudo_label(target='all', statistic='l2')"}
    with pytest.raises(ValueError, match=r"sample_axis=\{'table': None\} to score, .* or GradientMetrics|first axis"):
        test_run(lgm.GradientMetrics(score, submodule="net"), module, batches(x, Y))
    callback = lgm.GradientMetrics(score, submodule="net", sample_axis={"x": 1, "table": None})
    test_run(callback, module, batches(x, Y))
    for number, value in enumerate(column(callback, "norm")):
        logits = module.net(x[number : number + 1].transpose(0, 1), module.table)
        gradients = torch.autograd.grad(-logits.log_softmax(1).amax(), list(module.parameters()))
        torch.testing.assert_close(value, torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert callback.results["label"].to_pylist() == Y.tolist() and "forward" not in vars(module.net)


@pytest.mark.parametrize("wrong", [None, True, -1, "x", {"x": "first"}])
def test_a_wrong_sample_axis_is_refused_when_the_callback_is_made(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"sample_axis=.*expected an axis from 0 on, or a mapping"):
        lgm.GradientMetrics("entropy", sample_axis=wrong)
