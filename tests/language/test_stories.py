"""Published values of a trained model on text; skipped without the data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import lightning_gradmetrics as lgm
from lightning_gradmetrics.cli.stories import (
    Stories,
    read_sequences,
    sequence_rows,
    sequence_table,
    token_rows,
    token_table,
)
from lightning_gradmetrics.scoring.registry import make

ROOT = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "language"
KINDS = ("generated", "darwin", "shakespeare")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "sequences.npz").is_file(), reason="needs the trained language model and its text"),
    pytest.mark.filterwarnings("ignore:.*no fast rule for these parameters"),
]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT / "stories260k").eval()


def first_rows() -> list[list[int]]:
    with np.load(ROOT / "sequences.npz") as arrays:
        return [arrays[kind][0].tolist() for kind in KINDS]


TOKEN_SCORES = {
    "max_softmax": "max_softmax",
    "entropy": "entropy",
    "margin": "margin",
    "energy": "energy",
    "nll": "nll",
    "gradnorm": "gradnorm",
    "pseudo l1": "pseudo_label",
    "pseudo l2": "pseudo_label(statistic=l2)",
    "pseudo linf": "pseudo_label(statistic=linf)",
    "label l1": "grand(p=1,target=head)",
    "label l2": "grand(target=head)",
    "exgrad l1": "exgrad",
    "exgrad l2": "exgrad(p=2)",
    "fisher": "fisher_trace",
    "feature_norm": "feature_norm",
}
TOKENS = {
    (
        "generated",
        0,
        1,
    ): "0.216311 0.803492 -0.628179 -17.2673 1.86105 -172.548 38.4704 4.53261 2.10057 150.19 19.5361 64.2288 "
    "7.90314 103.804 -88.9237",
    (
        "generated",
        0,
        17,
    ): "0.0395885 0.262811 -0.951441 -19.0076 0.0403935 -192.294 7.77493 0.778593 0.391371 7.77493 0.778593 15.196 "
    "1.75159 26.0357 -98.1968",
    (
        "darwin",
        0,
        5,
    ): "0.867078 3.13614 -0.000713525 -16.4285 3.90832 -188.511 179.799 17.6701 9.56348 203.199 20.0101 193.868 "
    "19.0879 365.246 -103.681",
    (
        "generated",
        0,
        64,
    ): "0.415754 1.55728 -0.449095 -14.0657 3.36827 -163.927 71.0111 6.66271 2.16898 164.917 16.813 107.033 "
    "10.6458 135.797 -85.4005",
    (
        "darwin",
        0,
        100,
    ): "0.847286 3.12443 -0.0029186 -11.9033 5.01705 -138.021 130.098 14.5306 8.18063 152.529 17.0789 142.597 "
    "15.9706 256.022 -76.7732",
    (
        "shakespeare",
        2,
        40,
    ): "0.85887 3.31829 -0.0134908 -13.2281 13.2459 -125.41 121.626 14.601 8.03101 141.611 17.0442 133.033 "
    "16.0179 257.319 -70.8057",
    (
        "shakespeare",
        2,
        128,
    ): "0.000247647 0.00287799 -0.999669 -19.3624 0.000247678 -177.416 0.0440334 0.00376968 0.00111412 "
    "0.0440334 0.00376968 0.088054 0.00868723 0.0976997 -88.9035",
}


def test_single_tokens() -> None:
    from transformers import AutoModelForCausalLM

    wide = AutoModelForCausalLM.from_pretrained(ROOT / "stories260k", attn_implementation="sdpa").double().eval()
    for (kind, row, token), text in TOKENS.items():
        with np.load(ROOT / "sequences.npz") as arrays:
            ids = arrays[kind][row].tolist()
        scored = lgm.score_generation(wide, [ids[:1]], [ids[1:]], TOKEN_SCORES)
        for name, expected in zip(TOKEN_SCORES, text.split(), strict=True):
            assert float(scored.tokens[name][0][token - 1]) == pytest.approx(float(expected), rel=1e-5), (kind, name)


SEQUENCES = {
    "nll/mean": (1.47625, 3.77652, 5.28397),
    "grand(target=head)/gradient": (1.1761, 1.45533, 1.94247),
    "grand(p=1,target=head)/gradient": (47.1102, 66.0198, 82.8984),
    "grand(target=tied)": (1.22386, 1.6596, 2.2348),
    "grand(p=1,target=tied)": (51.8018, 80.8346, 99.9205),
    "grand": (5.04289, 12.3703, 14.1524),
    "grand(p=1)": (1486.31, 3236.25, 3707.94),
    "pseudo_label(target=tied,statistic=l2)": (1.12045, 1.01519, 1.3114),
    "pseudo_label(target=all,statistic=l2)": (5.11684, 5.89971, 6.33993),
    "pseudo_label(target=all)": (1403.42, 1678.62, 1799.58),
}
SEMANTIC = {
    "semgrad": (0.000498687, 0.0183741, 0.00747548),
    "hybridgrad(target=tied)": (0.00120674, 0.0164359, 0.00742449),
    "hybridgrad": (0.00110683, 0.0162835, 0.00729131),
}


def test_sequences(model) -> None:
    rows = first_rows()
    scores = ["nll", "grand(target=head)", "grand(p=1,target=head)", *list(SEQUENCES)[3:]]
    prompts, answers = [row[:1] for row in rows], [row[1:] for row in rows]
    scored = lgm.score_generation(model, prompts, answers, scores, aggregates=("mean", "gradient"))
    for name, expected in SEQUENCES.items():
        found = scored.table.column(make(name).name if "/" not in name else name).to_pylist()
        assert found == pytest.approx(expected, rel=1e-4), name
    prompts, answers = [row[:33] for row in rows], [row[33:] for row in rows]
    scored = lgm.score_generation(model, prompts, answers, list(SEMANTIC))
    for name, expected in SEMANTIC.items():
        assert scored.values[name].tolist() == pytest.approx(expected, rel=1e-4), name


TOKEN_AUROC = {
    "max_softmax": (88.064, 78.051, 75.902),
    "entropy": (87.073, 78.239, 76.679),
    "margin": (87.352, 76.691, 74.104),
    "energy": (72.894, 72.388, 72.375),
    "gradnorm": (71.728, 70.087, 69.766),
    "pseudo_label": (87.889, 77.436, 75.234),
    "pseudo_label(statistic=l2)": (87.620, 77.568, 74.837),
    "exgrad": (87.365, 77.045, 75.195),
    "fisher_trace": (85.961, 77.288, 74.578),
    "feature_norm": (59.862, 65.277, 64.904),
    "feature_norm(p=2)": (36.637, 44.486, 47.179),
}
SEQUENCE_AUROC = {
    "mean nll": (100.0, 100.0),
    "mean entropy": (98.94, 99.25),
    "mean max_softmax": (98.85, 99.01),
    "mean pseudo_label": (98.19, 98.36),
    "mean exgrad": (98.44, 98.81),
    "grand(target=head)/gradient": (99.64, 99.85),
    "grand": (99.92, 99.98),
    "pseudo_label(statistic=l2,target=all)": (98.75, 98.55),
    "semgrad": (97.21, 96.32),
    "hybridgrad(target=tied)": (97.78, 97.35),
}


def test_even_rows(model) -> None:
    stories = Stories(model, read_sequences(ROOT, "even"))
    rows = token_rows(token_table(stories, list(TOKEN_AUROC)))
    found = {(row["score"], row["kind"]): 100 * float(row["auroc"]) for row in rows}
    for name, values in TOKEN_AUROC.items():
        assert [found[name, kind] for kind in KINDS] == pytest.approx(values, abs=2e-3), name
    scores = ["nll", "entropy", "max_softmax", "pseudo_label", "exgrad", "grand(target=head)", "grand"]
    scores.append("pseudo_label(statistic=l2,target=all)")
    rows = sequence_rows(sequence_table(stories, scores, ["semgrad", "hybridgrad(target=tied)"]))
    found = {(row["score"], row["kind"]): 100 * float(row["auroc"]) for row in rows}
    for name, values in SEQUENCE_AUROC.items():
        assert [found[name, kind] for kind in KINDS[1:]] == pytest.approx(values, abs=2e-2), name


LONG_AUROC = {
    "semgrad": (86.16, 88.39),
    "hybridgrad(target=tied)": (88.26, 90.92),
    "max pseudo_label": (16.8, 24.16),
    "uniform(statistic=l2,target=all)": (0.8, 0.54),
}
"""With 128 predicted tokens: the maximum over tokens and the gradient of the uniform objective point the other way."""


def test_whole_rows(model) -> None:
    stories = Stories(model, read_sequences(ROOT, "even"), prefix=128, prompt=33)
    scores = ["pseudo_label", "uniform(statistic=l2,target=all)"]
    rows = sequence_rows(sequence_table(stories, scores, ["semgrad", "hybridgrad(target=tied)"]))
    found = {(row["score"], row["kind"]): 100 * float(row["auroc"]) for row in rows}
    for name, values in LONG_AUROC.items():
        assert [found[name, kind] for kind in KINDS[1:]] == pytest.approx(values, abs=2e-2), name
