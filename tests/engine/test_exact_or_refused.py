"""Models and batches that often lead to wrong per-sample gradients: results are exact, or refused with a clear error.

The truth is each sample alone in a fresh copy of the model, by ``torch.autograd.grad``; see :mod:`tests.engine.kinds`.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_gradmetrics.engine import auto, gradient_statistics
from lightning_gradmetrics.engine.planning import verification
from lightning_gradmetrics.engine.refusals import CoupledSamplesError, NotReproducibleError, SampleAxisError
from tests.engine.kinds import (
    AXES,
    COUPLED,
    COUPLING_OBJECTIVES,
    EXACT,
    Kind,
    Mixture,
    TransposedAfterNorm,
    error_of,
    numbers,
)


def outcomes(kind: Kind) -> list[float | type[Exception]]:
    """The error on each batch, or the type of the refusal; one model sees all batches."""
    model, found = kind.model(), []
    for change, batch in kind.batches():
        change(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no fast rule")
            try:
                found.append(error_of(model, batch, kind.objective, kind.sample))
            except (CoupledSamplesError, SampleAxisError) as error:
                found.append(type(error))
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore:.*torch.jit.trace.*")
@pytest.mark.parametrize("name", EXACT)
def test_values_are_exact_in_every_batch(name):
    for error in outcomes(EXACT[name]):
        assert not isinstance(error, type) and error < 1e-8


@pytest.mark.slow
def test_reversed_rows_are_not_mistaken_for_rows_in_order():
    """The middle sample keeps its position, so comparing one random sample reveals nothing in a third of the runs."""
    for _ in range(8):
        assert max(outcomes(EXACT["rows reversed inside"])) < 1e-8


@pytest.mark.parametrize("name", COUPLED)
def test_models_that_couple_samples_are_refused(name):
    """A batch in which every sample has the same gradients as alone may be computed."""
    found = outcomes(COUPLED[name])
    assert CoupledSamplesError in found
    assert all(error is CoupledSamplesError or error < 1e-8 for error in found)


@pytest.mark.parametrize("name", COUPLING_OBJECTIVES)
def test_objectives_that_couple_samples_are_refused(name):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = numbers(6, 4)
    with pytest.raises(CoupledSamplesError, match=r"the objective '.*' depend on each other"):
        gradient_statistics(model, batch, COUPLING_OBJECTIVES[name])
    gradient_statistics(model, batch[:1], "pseudo_label")
    with pytest.raises(CoupledSamplesError):
        gradient_statistics(model, batch, COUPLING_OBJECTIVES[name])


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", AXES)
def test_other_sample_axes_are_refused(name, engine):
    model, batch = AXES[name]()
    with pytest.raises(SampleAxisError, match=r"one row per sample|first axis"):
        gradient_statistics(model, batch, "pseudo_label", engine=engine)


def test_an_objective_with_labels_of_the_whole_batch_is_refused_with_advice():
    model, batch, labels = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="target"):
        gradient_statistics(model, batch, lambda z: nn.functional.cross_entropy(z, labels, reduction="none"))


@pytest.mark.parametrize("engine", ["auto", "reference", "vmap"])
@pytest.mark.parametrize("size", [1, 3])
def test_batch_norms_with_a_transposed_gradient(engine, size):
    """The truth is each sample in a batch of two: torch's gradients of one sample alone are wrong here, also in later calls."""
    torch.manual_seed(0)
    model, batch = TransposedAfterNorm().double().eval(), numbers(3, 6, 4, 4)
    model.norm.running_mean.normal_()
    gradient_statistics(model, batch[:size], "pseudo_label", per_parameter=True, engine=engine)
    found = gradient_statistics(model, batch[:size], "pseudo_label", per_parameter=True, engine=engine).norm(2)
    for number in range(size):
        logits = model(batch[[number, (number + 1) % 3]])
        loss = nn.functional.cross_entropy(logits[:1], logits[:1].argmax(1))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.stack([gradient.norm() for gradient in gradients])
        torch.testing.assert_close(found[number], expected)


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_samples_that_are_not_finite_leave_the_others():
    """Rows of experts are grouped by sample; the groups are padded with rows of the first sample."""
    torch.manual_seed(0)
    model, batch = Mixture().double(), numbers(5, 4, 6)
    expected = gradient_statistics(model, batch, "pseudo_label", per_parameter=True).norm(2)
    for number in (0, 3):
        spoilt = batch.clone()
        spoilt[number, 1, 2] = torch.nan
        found = gradient_statistics(model, spoilt, "pseudo_label", per_parameter=True).norm(2)
        others = [other for other in range(5) if other != number]
        torch.testing.assert_close(found[others], expected[others])
        assert bool(found[number].isnan().any())


def test_cached_parametrizations_of_the_caller_are_computed_again():
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), numbers(4, 4)
    nn.utils.parametrizations.weight_norm(model[0])
    expected = gradient_statistics(model, batch, "pseudo_label", per_parameter=True).norm(2)
    with nn.utils.parametrize.cached(), torch.no_grad():
        model(batch)
        found = gradient_statistics(model, batch, "pseudo_label", per_parameter=True).norm(2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_inputs_with_another_sample_axis_are_refused_with_the_models_own_error(engine):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x, state):
            return self.head(self.layer(x, state)[0][:, -1])

    with pytest.raises(SampleAxisError, match=r"not on 1 of them \(RuntimeError: Expected hidden size"):
        gradient_statistics(Recurrent(), (torch.randn(4, 5, 6), torch.zeros(1, 4, 4)), "pseudo_label", engine=engine)


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_an_unusual_batch_or_a_dispatch_mode_does_not_discard_the_plan():
    model = EXACT["pieces of large batches"].model()
    usual, odd = numbers(4, 6), numbers(9, 6)
    gradient_statistics(model, usual, "pseudo_label")
    kept = [list(known) for known in auto._STRATEGIES[model].values()]
    gradient_statistics(model, odd, "pseudo_label")
    with _Counting():
        gradient_statistics(model, usual, "pseudo_label")
    gradient_statistics(model, usual, "pseudo_label")
    after = [list(known) for known in auto._STRATEGIES[model].values()]
    assert kept == after and kept[0][0].plan is not None


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_a_new_sequence_length_is_not_planned_again(monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(9, 8), layer, _Mean(), nn.Linear(8, 3)).double().eval()
    planned = []
    monkeypatch.setattr(auto, "make_strategy", lambda *given: planned.append(1) or verification.make_strategy(*given))
    for length in (5, 7, 6, 7):
        assert error_of(model, torch.randint(9, (4, length))) < 1e-8
    assert len(planned) == 1


def test_experts_need_no_slow_fallback():
    """Only the data determines which samples the rows of each expert belong to."""
    torch.manual_seed(1)
    model = Mixture().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            assert error_of(model, numbers(6, 5, 6)) < 1e-8


@pytest.mark.slow
def test_the_first_call_holds_few_copies_of_the_parameters():
    """In a separate process, the peak of memory during the first call is below three times the parameters."""
    script = """
import resource, torch
from torch import nn
from lightning_gradmetrics.engine import gradient_statistics
small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
gradient_statistics(small, torch.randn(4, 8), "pseudo_label")
model, x = nn.Sequential(nn.Linear(64, 3000), *[nn.Linear(3000, 3000) for _ in range(3)], nn.Linear(3000, 3)), torch.randn(8, 64)
size = sum(p.numel() for p in model.parameters()) * 4
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
gradient_statistics(model, x, "pseudo_label")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 3


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda logits: logits.detach().square().sum(1), "have no gradient"),
        (lambda logits: logits.argmax(1), "have no gradient"),
        (lambda logits: logits.square().sum(1).tolist(), "a tensor of real losses .*got list"),
        (lambda logits: torch.complex(logits, logits).sum(1), "a tensor of real losses .*got torch.complex"),
    ],
)
def test_objectives_without_a_gradient_are_refused(objective, message):
    model = nn.Linear(4, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        gradient_statistics(model, torch.randn(5, 4), ["uniform", objective])


def test_lazy_modules_without_parameters_are_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).eval()
    with pytest.raises(ValueError, match=r"'0\.weight' of a lazy module has no values yet: call the model once"):
        gradient_statistics(model, torch.randn(2, 3, 5, 5), "uniform")


class _OfLengths(nn.Module):
    """Divides by lengths from a list."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, lengths):
        return self.layer(x) / torch.tensor(lengths)[:, None]


def test_a_list_with_an_entry_per_sample_is_named():
    with pytest.raises(ValueError, match="a list of 5 entries, as long as the batch"):
        gradient_statistics(_OfLengths(), {"x": torch.randn(5, 4), "lengths": [1, 2, 3, 4, 5]}, "uniform")


class _Casting(nn.Module):
    """Rounds its weights to bfloat16 in each forward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.to(torch.bfloat16).to(x.dtype)
        return self.head(self.body(x).tanh())


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_a_forward_pass_that_converts_its_weights_is_exact():
    model, x = _Casting().eval(), torch.randn(5, 4)
    found = [
        gradient_statistics(model, x, "pseudo_label", engine=engine).norm() for engine in ("auto", "auto", "reference")
    ]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


class _Decided(nn.Module):
    """Returns class numbers in place of logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).argmax(1, keepdim=True)


def test_class_numbers_and_parameters_without_values_are_refused():
    with pytest.raises(ValueError, match=r"the logits are torch\.int64; expected floating-point numbers"):
        gradient_statistics(_Decided(), torch.randn(5, 4), "uniform")
    with pytest.raises(ValueError, match="on the meta device and have no values"):
        gradient_statistics(nn.Linear(4, 3, device="meta"), torch.randn(5, 4), "uniform")


class _OtherInBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def _part(self, x: Tensor) -> Tensor:
        in_backward = torch._C._current_graph_task_id() >= 0
        return self.body(x) if in_backward else self.body(x).tanh().exp().sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self._part, self.stem(x).tanh(), use_reentrant=False))


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_checkpoint_that_repeats_other_calls_is_named_in_the_error(engine: str) -> None:
    x = torch.randn(5, 4)
    with pytest.raises(NotReproducibleError, match="checkpoint of _OtherInBackward repeats"):
        gradient_statistics(_OtherInBackward(), x, "pseudo_label", engine=engine)
