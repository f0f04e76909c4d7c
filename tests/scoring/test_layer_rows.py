"""Scores that read layers inside a model find the axis of the samples, or refuse models whose rows are in another order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm


class Encoder(nn.Module):
    """A transformer encoder with the samples on the first or the second axis."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.head, self.batch_first = nn.Linear(8, 16), nn.Linear(16, 5), batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.encoder(x).mean(1) if self.batch_first else self.encoder(x.transpose(0, 1)).mean(0))


def test_samples_on_the_second_axis_of_inner_layers_are_found() -> None:
    torch.manual_seed(0)
    models = [Encoder(batch_first=True).eval(), Encoder(batch_first=False).eval()]
    models[1].load_state_dict(models[0].state_dict())
    x, results = torch.randn(60, 10, 8), []
    for model in models:
        fitted = lgm.fit(model, [x], ["trust", "channel_distance", "nac_ue(layers='encoder.*.linear1')"])
        results.append([lgm.score(model, x[:size], [*fitted, "gaia"]) for size in (20, 5, 2, 1)])
    for found, expected in zip(*results, strict=True):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)


class Positions(nn.Module):
    """Adds a bias that a linear layer computes from a table of 12 positions, as in Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias, self.head = nn.Linear(6, 7), nn.Linear(2, 7), nn.Linear(7, 4)
        self.register_buffer("table", torch.randn(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) + self.bias(self.table).mean(0)).relu())


def test_tables_that_are_as_long_as_a_batch_are_left_out() -> None:
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(50, 6)
    (fitted,) = lgm.fit(model, [x], "trust")
    expected = lgm.score(model, x, fitted)["trust"]
    for size in (12, 6, 5, 1):
        torch.testing.assert_close(lgm.score(model, x[:size], fitted)["trust"], expected[:size], rtol=1e-4, atol=1e-5)


class Windows(nn.Module):
    """Applies a layer to windows before samples, to the positions of an expert, or to a nested tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(6, 7), nn.Linear(7, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nested":
            rows = self.body(torch.nested.as_nested_tensor(list(x), layout=torch.jagged)).relu()
            return self.head(rows.to_padded_tensor(0.0).mean(1))
        if self.kind == "windows":
            rows = self.body(x.transpose(0, 1).reshape(-1, 6)).relu()
            return self.head(rows.view(x.shape[1], len(x), 7).mean(0))
        chosen = x[..., 0] > 0
        rows = x.new_zeros(*x.shape[:2], 7).masked_scatter(chosen[..., None], self.body(x[chosen]).relu())
        return self.head(rows.mean(1))


ANOTHER_ORDER = "are not those of the samples in order"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("windows", ANOTHER_ORDER), ("experts", ANOTHER_ORDER), ("nested", "enable_nested_tensor=False")],
)
@pytest.mark.parametrize("score", ["channel_distance", "gaia"])
def test_rows_in_another_order_are_refused(kind: str, reason: str, score: str) -> None:
    torch.manual_seed(0)
    model, x = Windows(kind).eval(), torch.randn(24, 5, 6)
    with pytest.raises(ValueError, match=reason):
        lgm.fit(model, [x], score) if score != "gaia" else lgm.score(model, x, score)


def test_outputs_that_are_changed_in_place_keep_their_gradients() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 7),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(35, 4),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(9, 5, 6)
    expected = copy.deepcopy(model)
    expected[1].inplace = expected[3].inplace = False
    for score in ("gaia", "gaia(form=average)"):
        for found, value in zip(*(lgm.score(net, x, score).values() for net in (model, expected)), strict=True):
            torch.testing.assert_close(found, value)
