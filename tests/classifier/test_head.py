"""Finding the head and its weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.classifier.head import HeadNotFoundError, find_head, head_of
from lightning_gradmetrics.classifier.observation import observing
from tests.callback.runs import Stepped, batches, column, test_run

SCORES = ["gradnorm", "pseudo_label", "feature_norm"]


def seen(model: nn.Module, x: Tensor):
    with observing(model, dict(model.named_modules()), lambda output: output) as found, torch.no_grad():
        logits = model(x)
    return found.layers, logits


class Lora(nn.Module):
    """A linear layer with a low-rank addition, as PEFT wraps one."""

    def __init__(self, base_layer: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.constant_(self.lora_b.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


class LoraBySubclass(nn.Linear):
    """A linear layer that adds to the product with its weight."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.more = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.more.T


class Cosine(nn.Linear):
    """A cosine classifier: not linear in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


class ByHand(nn.Module):
    """A linear layer that is not an ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def with_head(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), head).double().eval()


def merged(model: nn.Sequential) -> nn.Sequential:
    """The same model with a single linear layer as its head."""
    head, zero, unit = nn.Linear(8, 3).double(), torch.zeros(1, 8).double(), torch.eye(8).double()
    with torch.no_grad():
        head.bias.copy_(model[2](zero)[0])
        head.weight.copy_((model[2](unit) - head.bias).T)
    return nn.Sequential(model[0], model[1], head)


@pytest.mark.parametrize("make", [lambda: Lora(nn.Linear(8, 3), 0.0), lambda: Lora(nn.Linear(8, 3), 0.5)])
def test_an_untrained_wrapper_is_the_head(make) -> None:
    """Before training, LoRA adds nothing, so the layer inside returns the logits too."""
    model, x = with_head(make()), torch.randn(6, 5).double()
    assert find_head(model, *seen(model, x)) == "2"
    expected = lgm.score(merged(model), x, SCORES)
    for name, values in lgm.score(model, x, SCORES).items():
        torch.testing.assert_close(values, expected[name])


@pytest.mark.parametrize("head", [LoraBySubclass, ByHand])
def test_other_linear_layers(head) -> None:
    model, x = with_head(head()), torch.randn(6, 5).double()
    for options in ({}, {"head": "2"}):
        expected = lgm.score(merged(model), x, SCORES)
        for name, values in lgm.score(model, x, SCORES, **options).items():
            torch.testing.assert_close(values, expected[name])


def test_a_layer_that_is_not_linear_is_refused() -> None:
    model, x = with_head(Cosine(8, 3)), torch.randn(6, 5).double()
    for options in ({}, {"head": "2"}):
        with pytest.raises(HeadNotFoundError, match=r"not a linear function of its input.*target="):
            lgm.score(model, x, "gradnorm", **options)
    assert len(lgm.score(model, x, "max_softmax")["max_softmax"]) == 6


def test_a_hook_that_scales_the_output_of_a_linear_layer_is_refused() -> None:
    """The gradient of its weight has the factor too; that of the linear function, whose weight is twice as large, has not."""
    model, x = with_head(nn.Linear(8, 3)), torch.randn(6, 5).double()
    handle = model[2].register_forward_hook(lambda layer, arguments, output: 2 * output)
    message = r"is not that of the linear function.*target='(net\.)?2\.weight'"
    with pytest.raises(HeadNotFoundError, match=message):
        lgm.score(model, x, "gradnorm")
    with pytest.raises(HeadNotFoundError, match=message):  # in inference mode
        test_run(lgm.GradientMetrics("gradnorm"), Stepped(model), batches(x, torch.arange(6) % 3))
    handle.remove()
    delta = torch.randn(3, 8).double()
    model[2].register_forward_hook(lambda layer, arguments, output: output + arguments[0] @ delta.T)
    found = lgm.score(model, x, ["gradnorm", "gradnorm(target='2.weight')"])
    torch.testing.assert_close(*found.values())
    callback = lgm.GradientMetrics("gradnorm")
    test_run(callback, Stepped(model), batches(x, torch.arange(6) % 3))
    torch.testing.assert_close(column(callback, "gradnorm"), found["gradnorm"])


def test_the_error_for_two_columns_of_one_logit_names_a_way_that_works() -> None:
    model, x = with_head(nn.Linear(8, 1)), torch.randn(6, 5).double()
    with pytest.raises(HeadNotFoundError, match=r"Let logits_fn return z alone.*target='2\.weight'"):
        lgm.score(model, x, "gradnorm", logits_fn=lambda z: torch.cat([torch.zeros_like(z), z], 1))
    alone = lgm.score(model, x, ["gradnorm", "gradnorm(target='2.weight')"], logits_fn=lambda z: z)
    torch.testing.assert_close(*alone.values())


class Heads(nn.Module):
    """Two heads on one body."""

    def __init__(self, combine) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.combine(self.first(h), self.second(h))


def test_two_equal_heads_are_ambiguous() -> None:
    model, x = Heads(lambda a, b: a).double().eval(), torch.randn(6, 5).double()
    assert find_head(model, *seen(model, x)) == "first"
    model.second.load_state_dict(model.first.state_dict())
    with pytest.raises(
        HeadNotFoundError, match=r"several layers of Heads return its logits: first, second.*head='first'"
    ):
        lgm.score(model, x, "gradnorm")
    lgm.score(model, x, "gradnorm", head="first")


@pytest.mark.parametrize(
    ("combine", "proposal"),
    [
        (lambda a, b: (a + b) / 2, None),
        (lambda a, b: a * torch.tensor([1.0, 2.0, 3.0]), None),
        (lambda a, b: a.softmax(1), "first"),
        (lambda a, b: b.log_softmax(1), "second"),
        (lambda a, b: b / 4, "second"),
    ],
)
def test_a_layer_is_proposed_only_if_its_output_becomes_the_logits(combine, proposal: str | None) -> None:
    model, x = Heads(combine).double().eval(), torch.randn(6, 5).double()
    with pytest.raises(HeadNotFoundError) as error:
        find_head(model, *seen(model, x))
    assert ("head='" in str(error.value)) == (proposal is not None)
    assert proposal is None or f"head='{proposal}'" in str(error.value)


class Tokens(nn.Module):
    """Applies its head to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))[:, -1]


def test_a_head_applied_to_every_token_is_refused_with_the_remedy() -> None:
    model, ids = Tokens().double().eval(), torch.randint(0, 9, (4, 3))
    for options in ({}, {"head": "head"}):
        with pytest.raises(HeadNotFoundError, match=r"target='head.weight'"):
            lgm.score(model, ids, "gradnorm", **options)
    assert len(lgm.score(model, ids, "gradnorm(target='head.weight')")) == 1


def test_the_head_of_a_call_in_half_precision() -> None:
    model, x = with_head(nn.Linear(8, 3)).to(torch.bfloat16), torch.randn(6, 5).bfloat16()
    layers, _ = seen(model, x)
    assert head_of(model, layers[-2]).weight is model[2].weight


def test_a_temperature_of_one_is_not_the_head() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, z: Tensor) -> Tensor:
            return z * self.scale

    model = nn.Sequential(nn.Linear(5, 3), Temperature())
    assert find_head(model, *seen(model, torch.randn(6, 5))) == "0"


def test_a_wrong_name() -> None:
    with pytest.raises(HeadNotFoundError, match=r"head='fc': Sequential has no linear layer 'fc'.*are: 0, 2"):
        lgm.score(with_head(nn.Linear(8, 3)), torch.randn(6, 5).double(), "gradnorm", head="fc")
