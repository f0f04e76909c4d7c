"""Models at the limits of the engine: results are exact, or refused with an error that names the layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine import gradient_statistics

STATISTICS = ("max", "min", "l1", "l2")


def alone(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The statistics ``(N, P, 4)`` of each sample alone, by plain autograd."""
    rows = []
    for n in range(len(next(iter(batch.values())))):
        output = model(**{name: tensor[n : n + 1] for name, tensor in batch.items()})
        logits = getattr(output, "logits", output)
        gradients = torch.autograd.grad(
            F.cross_entropy(logits, logits.argmax(1)), [*model.parameters()], allow_unused=True
        )
        row = []
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            entries = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            row.append(torch.stack([entries.max(), entries.min(), entries.abs().sum(), entries.norm()]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def error(model: nn.Module, batch: dict[str, Tensor], engine: str = "auto") -> float:
    """The largest difference to the true statistics, relative to the largest statistic of the sample."""
    expected = alone(model, batch)
    found = gradient_statistics(model, batch, "pseudo_label", per_parameter=True, statistics=STATISTICS, engine=engine)
    values = torch.stack([found.statistic(name) for name in STATISTICS], -1)
    return float(((values - expected).abs() / expected.abs().amax((1, 2), keepdim=True)).max())


class Packed(nn.Module):
    """Packs its sequences, reads every step back, and sums the real ones."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 4, 2, batch_first=True, **options), nn.LazyLinear(3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        steps, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(steps.sum(1))


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (2, 5, 1, 4)])
def test_packed_sequences_inside_a_model(kind, lengths):
    batch = {"x": torch.randn(4, 5, 3, dtype=torch.float64), "lengths": torch.tensor(lengths)}
    model = Packed(kind, bidirectional=kind is nn.GRU).double()
    model(**batch)
    assert error(model.eval(), batch) < 1e-12


def test_packed_sequences_as_inputs_are_refused():
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(3, 4), nn.Linear(4, 3)

        def forward(self, packed):
            return self.head(self.layer(packed)[1][-1])

    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    for inputs in (packed, (packed,), {"packed": packed}):
        with pytest.raises(TypeError, match="a PackedSequence has no sample axis; pass the padded tensor"):
            gradient_statistics(Takes(), inputs, "pseudo_label")
    with pytest.raises(TypeError, match="PackedSequence"):
        lgm.score(Takes(), packed, "entropy")


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_inputs_without_a_dense_sample_axis_are_refused(kind):
    if kind == "sparse":
        inputs = torch.eye(3).to_sparse()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    with pytest.raises(TypeError, match=r"allowed: dense tensors with the samples along the first axis"):
        gradient_statistics(nn.Linear(3, 2), inputs, "pseudo_label")


class Bags(nn.Module):
    """A bag of words and a head."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)

    def forward(self, words: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.head(self.bag(words, offsets))


def test_bags_use_the_fast_method():
    batch = {"words": torch.randint(9, (6, 5))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(Bags().double(), batch) < 1e-12


@pytest.mark.parametrize("flat", [torch.randint(9, (7,)), torch.randint(9, (2,))])
def test_flat_bags_with_offsets_are_refused(flat):
    with pytest.raises(TypeError, match="EmbeddingBag 'bag' are flat indices with offsets"):
        gradient_statistics(Bags(), (flat, torch.tensor([0, 1])), "pseudo_label")


class Inside(Bags):
    """Bags with offsets that the model computes from padded words."""

    def forward(self, words: Tensor) -> Tensor:
        real = words != 0
        lengths = real.sum(1)
        return super().forward(words[real], lengths.cumsum(0) - lengths)


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_ragged_bags_inside_a_model(options):
    words = torch.tensor([[1, 2, 3], [4, 4, 0], [5, 0, 0], [1, 1, 8]])
    assert error(Inside(**options).double(), {"words": words}) < 1e-12


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_sparse_gradients(engine):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = torch.randint(9, (5, 3))
    dense = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    dense.load_state_dict(model.state_dict())
    found, expected = (gradient_statistics(m, batch, "uniform", engine=engine).norm(2) for m in (model, dense))
    torch.testing.assert_close(found, expected)


class Rotated(nn.Module):
    """A complex parameter and a real head."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.head = nn.Parameter(torch.randn(4, dtype=torch.complex64)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.view_as_real(x * self.phase).flatten(1))


def test_complex_parameters_are_refused_unless_excluded():
    model, x = Rotated(), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"parameter 'phase' is torch\.complex64"):
        gradient_statistics(model, x, "pseudo_label")
    found = gradient_statistics(model, x, "pseudo_label", lambda name: name != "phase")
    assert found.names == ("head.weight", "head.bias")
    assert bool((lgm.score(model, x, "gradnorm")["gradnorm"] < 0).all())


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_complex_parameters_have_norms(engine: str, recwarn: pytest.WarningsRecorder):
    model, x = Rotated(), torch.randn(5, 4, dtype=torch.float64)
    model.phase.data = model.phase.data.to(torch.complex128)
    model.head.double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no fast rule")
        found = gradient_statistics(
            model, x, "pseudo_label", statistics=("l1", "l2"), per_parameter=True, engine=engine
        )
    for number in range(5):
        logits = model(x[number : number + 1])
        loss = F.cross_entropy(logits, logits.argmax(1))
        (gradient,) = torch.autograd.grad(loss, [model.phase])
        assert torch.isclose(found.norm(1)[number, 0], gradient.abs().sum(), rtol=1e-12)
        assert torch.isclose(found.norm(2)[number, 0], gradient.norm().abs(), rtol=1e-12)
    assert found.norm(1).dtype == torch.float64
    assert not [warning for warning in recwarn if "discards" in str(warning.message)]


def test_integer_parameters_are_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"parameter 'codes' is torch\.int8, and its gradient does not exist"):
        gradient_statistics(model, torch.randn(5, 4), "pseudo_label")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantised_layers_after_chosen_parameters_are_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
    mixed = torch.ao.quantization.quantize_dynamic(model, {"2": torch.ao.quantization.default_dynamic_qconfig})
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"the quantised layer '2\.0' \(Linear\) has no gradient"):
        gradient_statistics(mixed, x, "pseudo_label")
    with pytest.raises(ValueError, match=r"quantised layer '2\.0'"):
        lgm.score(mixed, x, "gradnorm(target=all)")
    # A dynamically quantised layer takes its scale from the whole batch.
    with pytest.raises(ValueError, match=r"depend on each other: 'linear_dynamic' in Linear couples them"):
        gradient_statistics(mixed, x, "pseudo_label", lambda name: name.startswith("4."))
    assert all(p.requires_grad for p in mixed.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_grouped_products_of_experts(family):
    """Mixtures of experts whose tokens are sorted by expert, in float32: grouped products do not support float64 on CPUs."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip("Qwen3 needs transformers 4.51")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 40, "pad_token_id": 0, "num_labels": 3, "head_dim": 8}
    experts = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **experts)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    assert error(model, {"input_ids": torch.randint(1, 40, (4, 6))}) < 1e-4
