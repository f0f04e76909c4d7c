"""Synthetic run directories: small, in the form that the command writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

BASELINES = ("max_softmax", "entropy", "margin", "energy", "max_logit")
GRADIENTS = tuple(
    ["gradnorm", "gradtrust", "exgrad"]
    + [f"pseudo_label_{kind}" for kind in ("l1", "l2", "linf", "max", "min", "std")]
    + [f"{name}_all" for name in ("gradnorm", "exgrad")]
    + [f"pseudo_label_{kind}_all" for kind in ("l1", "l2", "linf", "max", "min", "std", "mean")]
    + ["fisher_trace_head", "purview_initial_half_of_the_parameters"]
)
SETS = (("digits", "id", 500, True), ("digits_8_9", "near", 340, True), ("photo_patches", "far", 600, False))


def make_run(
    directory: Path,
    *,
    baselines: Sequence[str] = BASELINES,
    gradients: Sequence[str] = GRADIENTS[:10],
    sets: Sequence[tuple[str, str, int, bool]] = SETS,
    not_finite: int = 0,
    intervals: bool = False,
    comparisons: bool = False,
    classes: int = 8,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write ``results.parquet`` and ``metrics.json`` of a synthetic run, and return its directory.

    ``sets`` is name, role, rows, labelled; ``not_finite`` rows of each set are not finite; ``changes`` replaces
    keys of the JSON file, and a value of None removes one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    names = [*baselines, *gradients]
    tables = {
        name: _rows(random, name, role, rows, labelled, names, not_finite, classes)
        for name, role, rows, labelled in sets
    }
    pq.write_table(pa.concat_tables(tables.values()), directory / "results.parquet")
    metrics = _metrics(tables, sets, names, intervals)
    content: dict[str, Any] = {
        "version": 1,
        "created": "2026-03-01T12:00:00+00:00",
        "command": "gradmetrics model=digits scores=[gradnorm,entropy]",
        "environment": {"python": "3.11.2", "torch": "2.11.0", "lightning": "2.6.0", "device": "cpu, 2 threads"},
        "model": {"name": "DigitsNet", "checkpoint": "models/digits.ckpt", "parameters": 12345, "classes": classes},
        "datasets": [_dataset(tables[name], name, role, labelled) for name, role, _, labelled in sets],
        "scores": [_score(name, "baseline") for name in baselines] + [_score(name, "gradient") for name in gradients],
        "metrics": metrics,
        "notes": ["Temperature 1 was used throughout."],
        "timing": {"predict_seconds": 1.234, "score_seconds": {"head": 0.5, "all": 7.25}},
    }
    if comparisons:
        content |= _comparisons(metrics, baselines[0], gradients)
    content |= changes or {}
    content = {key: value for key, value in content.items() if value is not None}
    (directory / "metrics.json").write_text(json.dumps(content))
    return directory


def _rows(
    random: np.random.Generator,
    dataset: str,
    role: str,
    rows: int,
    labelled: bool,
    names: list[str],
    not_finite: int,
    classes: int,
) -> pa.Table:
    prediction = random.integers(0, classes, rows)
    wrong = random.random(rows) < (0.1 if role == "id" else 1.0)
    label = np.where(
        wrong, (prediction + random.integers(1, classes, rows)) % classes if classes > 1 else 1, prediction
    )
    doubt = random.normal(size=rows) + np.asarray({"id": 2.0 * wrong, "near": 1.5}.get(role, 2.5))
    finite = np.arange(rows) >= not_finite
    columns = {name: np.where(finite, _values(random, name, doubt, place), np.nan) for place, name in enumerate(names)}
    return pa.table(
        {
            "dataset": pa.array([dataset] * rows),
            "index": np.arange(rows),
            "prediction": prediction,
            "label": pa.array(label if labelled else [None] * rows, pa.int64()),
            **columns,
            "finite": finite,
        }
    )


def _values(random: np.random.Generator, name: str, doubt: np.ndarray, place: int) -> np.ndarray:
    """Different shapes: confidences below zero, many decades, plain, heavy-tailed."""
    noisy = doubt + (0.2 + 0.13 * place) * random.normal(size=len(doubt))
    if name == "max_softmax":
        return -1 / (1 + np.exp(np.clip(noisy * 2 - 4, -30, 30)))
    if name.startswith(("gradnorm", "max_logit", "energy")):
        return -20 * np.exp(-noisy / 3)
    if "_l" in name or name == "entropy":
        return 10.0 ** (1.5 * noisy - 5)
    return noisy + 0.01 * random.standard_cauchy(len(noisy))


def _score(name: str, family: str) -> dict[str, Any]:
    target = "logits" if family == "baseline" else "all" if name.endswith("_all") else "head"
    return {
        "name": name,
        "family": family,
        "target": target,
        "summary": f"what {name} measures in one line",
        "paper": "Huang et al. 2021, arXiv:2110.00218",
    }


def _dataset(table: pa.Table, name: str, role: str, labelled: bool) -> dict[str, Any]:
    right = np.asarray(table["prediction"]) == np.asarray(table["label"].fill_null(-1))
    return {
        "name": name,
        "role": role,
        "rows": len(table),
        "not_finite": int((~np.asarray(table["finite"])).sum()),
        "labelled": len(table) if labelled else 0,
        "accuracy": float(right.mean()) if labelled and role == "id" and len(right) else None,
        "description": f"synthetic rows of {name}",
    }


def _metrics(tables: dict[str, pa.Table], sets: Any, names: list[str], intervals: bool) -> list[dict[str, Any]]:
    entries = []
    inside = [tables[name] for name, role, *_ in sets if role == "id"]
    for score in names:
        for name, role, _, labelled in sets:
            if role == "id" and labelled:
                table = tables[name].filter(tables[name]["finite"])
                wrong = np.asarray(table["prediction"]) != np.asarray(table["label"])
                entries += _pair(
                    score,
                    "misclassification",
                    name,
                    "id",
                    ("auroc", "aurc"),
                    np.asarray(table[score]),
                    wrong,
                    intervals,
                )
            elif role != "id" and inside:
                both = pa.concat_tables([*inside, tables[name]])
                both = both.filter(both["finite"])
                out = np.asarray(both["dataset"]) == name
                entries += _pair(score, "ood", name, role, ("auroc", "fpr95"), np.asarray(both[score]), out, intervals)
    near = [entry for entry in entries if entry["task"] == "ood"]
    return entries + [{**entry, "dataset": None, "group": "near"} for entry in near if entry["dataset"] == "digits_8_9"]


def _pair(
    score: str,
    task: str,
    dataset: str,
    group: str,
    metrics: tuple[str, str],
    values: np.ndarray,
    positive: np.ndarray,
    intervals: bool,
) -> list[dict[str, Any]]:
    if not 0 < positive.sum() < len(positive):
        return []
    area = float(roc_auc_score(positive, values))
    return [
        {
            "score": score,
            "task": task,
            "dataset": dataset,
            "group": group,
            "metric": metric,
            "value": value,
            "low": value - 0.021 if intervals else None,
            "high": min(1.0, value + 0.019) if intervals else None,
            "count_positive": int(positive.sum()),
            "count_negative": int((~positive).sum()),
            "a_key_from_the_future": [1, 2],
        }
        for metric, value in zip(
            metrics, (area, (1 - area) * (0.3 if task == "misclassification" else 1.2)), strict=True
        )
    ]


def _comparisons(metrics: list[dict[str, Any]], baseline: str, gradients: Sequence[str]) -> dict[str, Any]:
    reference = {
        (e["task"], e["dataset"]): e["value"] for e in metrics if e["score"] == baseline and e["metric"] == "auroc"
    }
    entries = []
    for entry in metrics:
        if entry["score"] in gradients and entry["metric"] == "auroc" and entry["dataset"]:
            gap = entry["value"] - reference[entry["task"], entry["dataset"]]
            verdict = "better" if gap > 0.02 else "worse" if gap < -0.02 else "cannot tell"
            keys = ("score", "task", "dataset", "metric")
            entries.append(
                {key: entry[key] for key in keys}
                | {"baseline": baseline, "difference": gap, "low": gap - 0.02, "high": gap + 0.02, "verdict": verdict}
                | {"value": entry["value"], "baseline_value": entry["value"] - gap}
            )
    return {"comparisons": entries}
