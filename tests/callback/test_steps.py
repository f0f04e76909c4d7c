"""Steps that reorder samples, run in a different context or draw the batch: each row gets the right score."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.classifier.row_order import row_order
from tests.callback.runs import Stepped, assert_scores, batches, column, mlp, numbers, test_run

Y = torch.arange(8) % 3
NAMES = ["max_softmax", "energy", "gradnorm", "pseudo_label(target=all)"]
FULL = "gradnorm(target=all)"


def stepped(step: Any, net: nn.Module) -> Stepped:
    """A module with this step."""
    return type("Module", (Stepped,), {"step": step})(net)  # type: ignore[no-any-return]


# The order of the samples


def sorted_by_a_feature(module: Any, batch: Any) -> Any:
    return module(batch[0][batch[0][:, 0].argsort()])


def in_reversed_parts(module: Any, batch: Any) -> Any:
    return [module(part) for part in reversed(batch[0].chunk(2))]


def copied(module: Any, batch: Any) -> Any:
    return module(batch[0].clone())


@pytest.mark.parametrize("step", [sorted_by_a_feature, in_reversed_parts, copied])
@pytest.mark.parametrize("split", [None, lambda batch: (batch[0], batch[1])])
def test_labels_index_and_ids_follow_the_order_in_which_samples_are_passed(step: Any, split: Any) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    options = {} if split is None else {"split_batch": split}
    callback = lgm.GradientMetrics(NAMES, sample_id=lambda batch: batch[0][:, 0].tolist(), **options)
    test_run(callback, stepped(step, net), batches(x.clone(), Y.clone()))
    assert (
        callback.results["index"].to_pylist() == list(range(8)) and callback.results["label"].to_pylist() == Y.tolist()
    )
    assert callback.results["sample_id"].to_pylist() == [str(value) for value in x[:, 0].tolist()]
    assert_scores(callback, net, x, NAMES)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(20, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.words(ids), lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0])


def test_a_step_that_sorts_texts_by_length() -> None:
    ids, lengths = torch.randint(1, 20, (8, 6)), torch.tensor([3, 6, 2, 5, 4, 1, 6, 2])
    rows = [{"ids": ids[n], "lengths": lengths[n], "label": Y[n]} for n in range(8)]
    model = Recurrent().double().eval()

    def step(module: Any, batch: Any) -> Any:
        given, order = batch["lengths"].sort(descending=True)
        return module(batch["ids"][order], given)

    callback = lgm.GradientMetrics(["energy", "gradnorm"])
    test_run(callback, stepped(step, model), DataLoader(rows, 4))
    expected = torch.cat([model(ids[n : n + 1], lengths[n : n + 1]) for n in range(8)]).detach()
    torch.testing.assert_close(column(callback, "energy"), -expected.logsumexp(1))
    assert callback.results["label"].to_pylist() == Y.tolist()


@pytest.mark.parametrize("shape", [(24, 5), (24, 3, 6, 6)])
def test_samples_in_a_different_order_with_changed_values_are_refused(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).double().eval()
    x = numbers(*shape)
    net(x[:1])

    def step(module: Any, batch: Any) -> Any:
        return module((batch[0][batch[0].flatten(1)[:, 0].argsort()] - 0.5) / 0.2)

    with pytest.raises(ValueError, match=r"a different order than the batch.*Keep the order of the batch.*sample_id="):
        test_run(lgm.GradientMetrics("energy"), stepped(step, net), batches(x, torch.arange(24) % 3))


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 6, 6)])
def test_samples_that_the_step_reorders_in_place(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).double().eval()
    x, order = numbers(*shape), torch.tensor([2, 0, 3, 1])
    net(x[:1])

    def step(module: Any, batch: Any) -> Any:
        batch[0][:] = batch[0][order]
        batch[1][:] = batch[1][order]
        return module(batch[0])

    callback = lgm.GradientMetrics(["energy", "gradnorm"])
    test_run(callback, stepped(step, net), batches(x.clone(), Y.clone()))
    assert callback.results["label"].to_pylist() == Y.tolist()
    assert_scores(callback, net, x, ["energy", "gradnorm"])


def test_a_different_order_is_likely_in_one_small_batch() -> None:
    net, x, order = mlp(5, 8, 3), numbers(4, 5), torch.tensor([3, 1, 0, 2])

    def step(module: Any, batch: Any) -> Any:
        return module((batch[0][order] - 0.5) / 0.2)

    with pytest.warns(UserWarning, match=r"probably passes the samples .* in a different order.*Keep the order"):
        test_run(lgm.GradientMetrics("energy"), stepped(step, net), batches(x, Y[:4]))


CHANGES = {
    "negated": lambda x: -x,
    "inverted": lambda x: 1 - x,
    "mixed": lambda x: 0.6 * x + 0.4 * x.flip(0),
    "noisy": lambda x: x + torch.randn_like(x),
    "rounded": lambda x: (4 * x).round(),
    "constant": lambda x: 0 * x,
    "flipped": lambda x: x.flip(-1),
    "squared": lambda x: x**2,
    "normalised": lambda x: (x - x.mean(0)) / x.std(0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("size", [2, 3, 4, 64])
def test_changed_values_are_not_mistaken_for_a_different_order(change: Any, size: int) -> None:
    for shape in ((size, 5), (size, 3, 6, 6)):
        for _ in range(20):
            x = torch.randn(shape)
            found = row_order([change(x)], [torch.arange(size), x])
            assert found is not None and found.order is None and found.bits < 30 / 2


def test_features_that_repeat_each_other_are_no_proof_of_another_order() -> None:
    t = torch.randn(64)
    x = torch.stack([t, 2 * t, t.exp(), t], 1)
    found = row_order([x.abs()], [x])
    assert found is not None and found.order is None and found.bits == 0


# The context of the call


def test_the_autocast_context_of_the_call_is_entered_again() -> None:
    """A step in half precision has the gradient of its half-precision forward pass, even if its context is not the trainer's."""
    net, x = mlp(64, 128, 3).float(), numbers(8, 64).float()

    def step(module: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch[0])

    def unlike(module: Any, batch: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return module(batch[0])

    found = {}
    for name, function, precision in (("bf16", step, "32-true"), ("float", unlike, "bf16-mixed")):
        callback = lgm.GradientMetrics([FULL, "energy"])
        test_run(callback, stepped(function, net), batches(x, Y), precision=precision)
        found[name] = column(callback, FULL)
    with torch.autocast("cpu", torch.bfloat16):
        half = lgm.score(net, x, FULL)[FULL].double()
    whole = lgm.score(net, x, FULL)[FULL].double()
    torch.testing.assert_close(found["bf16"], half, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["float"], whole, rtol=1e-5, atol=1e-6)
    assert float((half - whole).abs().max()) > 1e-4


def test_weights_that_change_in_the_step_are_named() -> None:
    other = mlp(5, 8, 3)

    def step(module: Any, batch: Any) -> Any:
        return torch.func.functional_call(module.net, dict(other.named_parameters()), (batch[0],))

    module = stepped(step, mlp(5, 8, 3))
    with pytest.raises(ValueError, match=r"weight of the layer 'net.2' does not produce .*functional_call"):
        test_run(lgm.GradientMetrics("gradnorm"), module, batches(numbers(8, 5), Y))
    with pytest.raises(ValueError, match="different logits"):
        test_run(lgm.GradientMetrics(FULL), module, batches(numbers(8, 5), Y))


def test_a_direct_call_of_forward_is_named() -> None:
    def step(module: Any, batch: Any) -> Any:
        return module.net.forward(2 * batch[0])

    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = lgm.GradientMetrics(["energy", "gradnorm"])
    test_run(callback, stepped(step, net), batches(x, Y))
    assert_scores(callback, net, 2 * x, ["energy", "gradnorm"])
    with pytest.raises(ValueError, match=r"forward\(\) directly.*Call the model itself"):
        test_run(lgm.GradientMetrics(FULL), stepped(step, net), batches(x, Y))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.*is deprecated|no fast rule")
def test_scripted_and_traced_networks() -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    for made in (torch.jit.script(net), torch.jit.trace(net, x)):
        callback = lgm.GradientMetrics(["energy", FULL])
        test_run(callback, Stepped(made), batches(x, Y))
        assert_scores(callback, net, x, ["energy", FULL])
    with pytest.raises(TypeError, match="is scripted, and calls of a ScriptModule cannot be observed"):
        lgm.score(torch.jit.script(net), x, "energy")


def test_parameters_created_in_inference_mode() -> None:
    x = numbers(8, 5)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)).double().eval()
    callback = lgm.GradientMetrics(["energy", "gradnorm"])
    test_run(callback, Stepped(lazy), batches(x, Y))
    assert_scores(callback, copy.deepcopy(lazy), x, ["energy", "gradnorm"])
    with pytest.raises(ValueError, match=r"'net.0.weight' was created in torch.inference_mode.*inference_mode=False"):
        test_run(lgm.GradientMetrics(FULL), Stepped(lazy), batches(x, Y))


# Other sources of batches and labels


class DrawsItself(Stepped):
    """A step that draws its batch."""

    def test_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self(2 * batch[0])


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling|.*dataloader_iter")
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_step_that_draws_its_batch(shuffle: bool) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = lgm.GradientMetrics(NAMES)
    test_run(callback, DrawsItself(net), DataLoader(TensorDataset(x, Y), 3, shuffle=shuffle))
    assert (
        callback.results["index"].to_pylist() == list(range(8)) and callback.results["label"].to_pylist() == Y.tolist()
    )
    assert_scores(callback, net, 2 * x, NAMES)


@pytest.mark.parametrize(
    ("make", "take"),
    [
        (lambda x, y: {"image": x, "info": {"label": y}}, lambda batch: batch["image"]),
        (lambda x, y: {"data": {"image": x}, "info": {"label": y, "id": 0}}, lambda batch: batch["data"]["image"]),
        (lambda x, y: {"data": {"image": x, "label": y}, "info": {"id": 0}}, lambda batch: batch["data"]["image"]),
    ],
)
def test_labels_in_a_mapping_inside_the_batch(make: Any, take: Any) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    rows = [make(x[n], int(Y[n])) for n in range(8)]
    callback = lgm.GradientMetrics("energy")
    test_run(callback, stepped(lambda module, batch: module(take(batch)), net), DataLoader(rows, 4))
    assert callback.results["label"].to_pylist() == Y.tolist()


def test_a_network_that_is_not_registered() -> None:
    class Hidden(Stepped):
        forward = Stepped.__mro__[1].forward  # type: ignore[assignment]

        def step(self, batch: Any) -> Any:
            return self.net[0](batch[0])

    with pytest.raises(ValueError, match=r"no submodule with parameters. Register its network"):
        test_run(lgm.GradientMetrics("energy"), Hidden([mlp(5, 3)]), batches(numbers(8, 5), Y))  # type: ignore[arg-type]


# Batches for which the step does not call the model


@pytest.mark.filterwarnings("ignore:the step did not call Module")
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_batches_that_the_step_skips_are_counted_and_left_out(skipped: int, tmp_path: Path) -> None:
    net, x, numbered = mlp(5, 8, 3), numbers(12, 5), iter(range(3))
    output = str(tmp_path / "run") if skipped == 1 else None

    def step(module: Any, batch: Any) -> Any:
        return None if next(numbered) == skipped else module(batch[0])

    rows = [n for n in range(12) if n // 4 != skipped]
    callback = lgm.GradientMetrics(NAMES, output=output)
    with pytest.warns(
        UserWarning, match=r"left out of the results: 1 batch of the dataset 'dataloader_0' \(4 samples\)"
    ):
        test_run(callback, stepped(step, net), batches(x, torch.arange(12) % 3))
    assert callback.results["index"].to_pylist() == rows
    assert callback.results["label"].to_pylist() == [n % 3 for n in rows]
    assert_scores(callback, net, x[rows], NAMES)


# Steps that pass some samples of a batch to the model


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling")
@pytest.mark.parametrize("options", [{}, {"split_batch": lambda batch: (batch[0], batch[1])}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_samples_that_a_step_selects_keep_their_labels_index_and_ids(shuffle: bool, options: Any) -> None:
    net, x = mlp(5, 8, 3), numbers(12, 5)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0]).repeat(4)
    kept = (x[:, 0] > 0).nonzero().flatten().tolist()
    callback = lgm.GradientMetrics(NAMES, sample_id=lambda batch: batch[0][:, 1].tolist(), **options)
    data = DataLoader(TensorDataset(x, torch.arange(12) % 3), 4, shuffle=shuffle)
    with pytest.warns(UserWarning, match=rf"left out of the results: {12 - len(kept)} samples"):
        test_run(callback, stepped(lambda module, batch: module(batch[0][batch[0][:, 0] > 0]), net), data)
    assert callback.results["index"].to_pylist() == kept
    assert callback.results["label"].to_pylist() == [n % 3 for n in kept]
    assert callback.results["sample_id"].to_pylist() == [str(value) for value in x[kept, 1].tolist()]
    assert_scores(callback, net, x[kept], NAMES)


@pytest.mark.filterwarnings("ignore:left out of the results")
def test_images_that_a_step_selects_keep_their_label_maps() -> None:
    net, x, y = nn.Conv2d(3, 4, 3, padding=1), numbers(6, 3, 5, 5).float(), torch.randint(0, 4, (6, 5, 5))
    callback = lgm.GradientMetrics("nll")
    test_run(callback, stepped(lambda module, batch: module(batch[0][[5, 0, 2]]), net), batches(x, y, batch_size=6))
    expected = nn.functional.cross_entropy(net(x), y, reduction="none").mean((1, 2))[[0, 2, 5]]
    assert callback.results["index"].to_pylist() == [0, 2, 5]
    torch.testing.assert_close(column(callback, "nll"), expected.detach().double(), rtol=1e-5, atol=1e-6)


def test_too_few_ids_of_reordered_samples_are_refused() -> None:
    callback = lgm.GradientMetrics("energy", sample_id=lambda batch: batch[0][1:, 0].tolist())
    module = stepped(lambda module, batch: module(batch[0][[2, 3, 1, 0]]), mlp(5, 3))
    with pytest.raises(ValueError, match="returned 3 ids for a batch of 4 samples"):
        test_run(callback, module, batches(numbers(4, 5), torch.zeros(4).long()))


@pytest.mark.filterwarnings("ignore:the index of the rows")
def test_several_views_of_each_sample_have_no_labels_and_advice_that_works() -> None:
    def step(module: Any, batch: Any) -> Any:
        return module(torch.stack([batch[0], -batch[0]], 1).flatten(0, 1))

    with pytest.warns(
        UserWarning, match=r"passes 8 rows to the model for a batch of 4.*in the dataset or in its collate_fn"
    ):
        test_run(lgm.GradientMetrics("energy"), stepped(step, mlp(5, 3)), batches(numbers(8, 5), Y))


def test_a_step_that_calls_the_model_inside_vmap_is_refused() -> None:
    def step(module: Any, batch: Any) -> Any:
        return torch.func.vmap(lambda row: module(row[None])[0])(batch[0])

    with pytest.raises(ValueError, match=r"inside a function of torch\.func, such as vmap.*on the whole batch"):
        test_run(lgm.GradientMetrics(NAMES), stepped(step, mlp(5, 3)), batches(numbers(8, 5), Y))
