"""Compare the engine with autograd on libraries of classifiers: ``python -m benchmarks zoo --family timm``.

Each model has random weights in float64 and a batch of four samples. For some parameters, the first and last included,
the statistics of every sample's gradient are compared with autograd on that sample alone. Results are appended to a
file, and its models are skipped, so a run can be stopped and resumed. ``--table`` writes the page from that file.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from benchmarks.zoo_models import FAMILIES, UnsuitableError, logits_of
from lightning_gradmetrics.gradients.objectives import Objective

STATISTICS = ("max", "min", "std", "l1", "l2")
BOUND = 1e-9
PARAMETERS = 12
ENTRIES = 20_000_000
"""Number of entries of the largest parameter that is compared."""


class OutOfTime(BaseException):
    """The model took too long. Not an Exception, so no handler of errors catches it."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`OutOfTime` if the block takes more than ``seconds``."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def chosen_parameters(model: nn.Module) -> list[str]:
    """Return the names of up to :data:`PARAMETERS` parameters, evenly spread over the model."""
    names = [name for name, p in model.named_parameters() if 0 < p.numel() <= ENTRIES and p.is_floating_point()]
    count = min(PARAMETERS, len(names))
    indices = torch.linspace(0, len(names) - 1, count).round().long().tolist()
    return [names[index] for index in dict.fromkeys(indices)]


def temperature_of(model: nn.Module, inputs: Any) -> float:
    """Return a temperature of at least 1 that limits the range of the logits to 10; gradients vanish beyond.

    Gradients are enabled: models such as TinyViT store tensors made from parameters in their first forward pass, and
    autograd has no gradient of these parameters if that pass ran without gradients. The engine has it in both cases.
    """
    logits = logits_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs)).detach()
    return max(1.0, float(logits.amax(1).sub(logits.amin(1)).max()) / 10)


def autograd_statistics(model: nn.Module, inputs: Any, names: Sequence[str], temperature: float) -> dict[str, Tensor]:
    """Return each statistic ``(N, P)`` of each sample's gradient, from a batch of that sample alone.

    Models with batch norms get the sample twice, and the first loss is differentiated. For a single sample, torch
    returns a wrong gradient if the gradient that enters a batch norm is transposed, as in LeViT.
    """
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    size = len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)
    rows: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    has_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    for n in range(size):
        sample = [n, n] if has_norms else [n]
        if isinstance(inputs, Mapping):
            output = model(**{key: value[sample] for key, value in inputs.items()})
        else:
            output = model(inputs[sample])
        logits = logits_of(output)
        loss = pseudo_label_loss(logits / temperature)[0]
        from_autograd = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, from_autograd, strict=True)]
        for name in STATISTICS:
            rows[name].append(torch.stack([statistic(gradient, name) for gradient in gradients]))
    return {name: torch.stack(values) for name, values in rows.items()}


def pseudo_label_loss(logits: Tensor) -> Tensor:
    """Return the cross-entropy of the predicted class, ``(N, C) -> (N,)``, precise even if the softmax rounds to 1."""
    predicted = logits.detach().argmax(1, keepdim=True)
    others = logits.scatter(1, predicted, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, predicted)[:, 0], threshold=40)


def statistic(gradient: Tensor, name: str) -> Tensor:
    """Return one statistic of the entries of a gradient."""
    if name == "std":
        spread = gradient.std() if gradient.numel() > 1 else gradient.new_zeros(())
        return spread if bool(gradient.any()) else spread + 1e-16  # as documented: at least 1e-16
    if name in ("max", "min"):
        return getattr(gradient, name)()
    return gradient.abs().sum() if name == "l1" else gradient.norm()


def worst_error(measured: lgm.GradientStatistics, expected: Mapping[str, Tensor]) -> float:
    """Return the largest error, relative to the norm of the gradient plus 1e-6 of the sample's largest norm."""
    norms = {"l1": expected["l1"]}
    worst = 0.0
    for name in STATISTICS:
        scale = norms.get(name, expected["l2"])
        scale = scale + 1e-6 * scale.amax(1, keepdim=True) + 1e-300
        worst = max(worst, float(((measured.statistic(name) - expected[name]).abs() / scale).max()))
    return worst


def examined(make: Any, seconds: int) -> dict[str, Any]:
    """Return the result for one model: its error, a refusal, or the reason why it was not run."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        with limited(seconds), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, inputs = make()
            names = chosen_parameters(model)
            temperature = temperature_of(model, inputs)
            expected = autograd_statistics(model, inputs, names, temperature)
            result = compared(model, inputs, names, expected, temperature)
    except UnsuitableError as error:
        return {"verdict": "not run", "reason": _line(error)}
    except OutOfTime as error:
        return {"verdict": "not run", "reason": _line(error)}
    slow = [str(warning.message) for warning in caught if "no fast rule" in str(warning.message)]
    if slow and result["verdict"] == "exact":
        result |= {"verdict": "exact, slow fallback", "reason": _line(slow[0])}
    entries = sum(p.numel() for p in model.parameters())
    return result | {"parameters": entries, "seconds": round(time.perf_counter() - start, 1)}


def compared(
    model: nn.Module, inputs: Any, names: Sequence[str], expected: Mapping[str, Tensor], temperature: float
) -> dict[str, Any]:
    """Run the engine on a model twice, and return the verdict and the largest error."""
    errors, objective = [], Objective.of("pseudo_label", temperature=temperature)
    try:
        for _ in range(2):
            measured = lgm.gradient_statistics(model, inputs, objective, set(names).__contains__, True)
            errors.append(worst_error(measured, expected))
    except (ValueError, TypeError) as error:
        return {"verdict": "refused", "reason": _line(error)}
    except Exception as error:
        return {"verdict": "crash", "reason": _line(error)}
    return {"verdict": "exact" if max(errors) < BOUND else "WRONG", "error": max(errors)}


def _line(error: object) -> str:
    kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return (kind + " ".join(str(error).split()))[:300]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(families: Sequence[str], path: Path, seconds: int, only: str | None) -> None:
    """Run the models whose results are not in the file, and append each result."""
    done = {(row["family"], row["name"]) for row in read(path)}
    for family in families:
        for name, make in FAMILIES[family]():
            if (family, name) in done or (only and only not in name):
                continue
            row = {"family": family, "name": name, **examined(make, seconds)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(family, name, row["verdict"], row.get("error", ""), row.get("reason", "")[:100], flush=True)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the documentation page."""
    lines = ["# Zoo", "", *_wrapped(_summary(rows))]
    lines += [
        "",
        *_wrapped(
            "The engine runs published architectures with random weights in float64 on four samples, in a first and in a "
            "second call. The statistics of the gradients of up to 12 parameters per model are compared with autograd on "
            f"one sample at a time (`python -m benchmarks zoo`, torch {torch.__version__.partition('+')[0]}, CPU). "
            f'"Exact" means that the largest relative error is below {BOUND:g}. "Slow fallback" means that no fast rule could '
            "be used for some parameters. Logits with a range above 10 are divided by a temperature, because their "
            "gradients vanish."
        ),
    ]
    lines += [
        "",
        "| library | models | exact | exact, slow fallback | refused | wrong | crash | worst error | not run |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for family in FAMILIES:
        chosen = [row for row in rows if row["family"] == family]
        counts = Counter(row["verdict"] for row in chosen)
        worst = max((row["error"] for row in chosen if "error" in row), default=0.0)
        cells = [counts[verdict] for verdict in ("exact", "exact, slow fallback", "refused", "WRONG", "crash")]
        ran = len(chosen) - counts["not run"]
        lines.append(f"| {family} | {ran} | {' | '.join(map(str, cells))} | {worst:.0e} | {counts['not run']} |")
    lines += [
        "",
        "Not run: the model has no configuration with a few million parameters, or its own forward pass fails.",
        "",
    ]
    lines += _reasons(rows)
    lines += ["## Exact", ""]
    for family in FAMILIES:
        names = [f"`{row['name']}`" for row in rows if row["family"] == family and row["verdict"] == "exact"]
        lines += [*_wrapped(f"{family}: {', '.join(names)}."), ""]
    return "\n".join(lines).rstrip() + "\n"


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the other verdicts, with the models of each reason."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] not in ("exact", "not run"):
            key = row["verdict"], _short(row.get("reason", ""))
            models.setdefault(key, []).append(f"{row['family']} `{row['name']}`")
    lines = ["| verdict | reason | models |", "|---|---|---|"]
    for (verdict, reason), names in sorted(models.items()):
        lines.append(f"| {verdict} | {reason} | {', '.join(names)} |")
    return [*lines, ""] if models else []


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the result in one bold sentence."""
    ran = [row for row in rows if row["verdict"] != "not run"]
    bad = [row for row in ran if row["verdict"] in ("WRONG", "crash")]
    outcome = f"{len(bad)} wrong values or crashes" if bad else "No wrong value and no crash"
    return f"**{outcome} on the {len(ran)} architectures that were run.** Measured on {date.today():%d %B %Y}."


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _short(reason: str) -> str:
    """Return the cause that a warning names in parentheses, or else the whole reason, as a sentence."""
    cause, closing, _ = reason.partition("(")[2].partition(")")
    if "no fast rule" not in reason:
        cause = reason[:160]
    elif not closing:
        return "Some of its parameters have no fast rule."
    sentence = re.sub(r"(__\w+__)", r"`\1`", cause.removeprefix("PlanError: "))
    return f"{sentence[:1].upper()}{sentence[1:]}."


def main(arguments: list[str] | None = None) -> None:
    """Run models, or write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks zoo", description=__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--only", help="run only models whose name contains this text")
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--seconds", type=int, default=300, help="time limit per model")
    parser.add_argument("--table", type=Path, help="write the page to this file; run no model")
    options = parser.parse_args(arguments)
    if options.table:
        options.table.write_text(page(read(options.out)))
    else:
        families = list(FAMILIES) if options.family == "all" else [options.family]
        run(families, options.out, options.seconds, options.only)
