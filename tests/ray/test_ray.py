"""Scores on Ray Data and on Spark, on one machine, and the Arrow columns that they pass."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.ray.arrow import to_array

SCORES = ["entropy", "gradnorm", "pseudo_label(target=all)"]
IDS = [f"sample {number}" for number in range(40)]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)


def expected() -> dict[str, torch.Tensor]:
    return lgm.score(make_model(), torch.from_numpy(vectors()), SCORES)


def assert_expected(table: pa.Table) -> None:
    ordered = table.sort_by("id") if table["id"].type == pa.int64() else table
    for name, values in expected().items():
        torch.testing.assert_close(torch.tensor(ordered[name].to_pylist()), values.double().float(), check_dtype=False)


@pytest.mark.parametrize("form", ["fixed", "list", "numpy", "function"])
def test_a_batch_has_the_scores_of_its_samples_and_keeps_its_other_columns(form: str) -> None:
    x = vectors()
    columns = {"fixed": pa.array(list(x), pa.list_(pa.float32(), 12)), "list": pa.array(list(x))}
    batch = {"id": np.array(IDS), "x": x} if form == "numpy" else pa.table({"id": IDS, "x": columns.get(form, list(x))})
    inputs = (lambda columns: torch.from_numpy(np.array(columns["x"]))) if form == "function" else "x"
    result = lgm.ray.Scorer(make_model, SCORES, inputs=inputs, drop=["x"])(batch)
    table = pa.table(result) if isinstance(result, dict) else result
    assert table.column_names == ["id", "prediction", *SCORES, "finite"] and table["id"].to_pylist() == IDS
    assert_expected(table)


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="expected a callable without arguments that returns the model"):
        lgm.ray.Scorer(make_model(), SCORES)
    scorer = lgm.ray.Scorer(make_model, SCORES, inputs="image")
    with pytest.raises(KeyError, match="no column 'image'; columns: id"):
        scorer(pa.table({"id": [1]}))
    with pytest.raises(ValueError, match="already has a column 'entropy'"):
        scorer(pa.table({"image": list(vectors()[:1]), "entropy": [0.0]}))
    with pytest.raises(ValueError, match="have 1 to 2 values; expected equal lengths"):
        to_array(pa.array([[1], [1, 2]]))
    with pytest.raises(ValueError, match="1 of 2 values of an input column are null"):
        to_array(pa.array([[1], None]))


def test_columns_become_arrays() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    assert np.array_equal(to_array(pa.chunked_array([tensors])), values)
    assert np.array_equal(to_array(pa.array(values.tolist())), values)
    assert to_array(pa.chunked_array([[1], [2, 3]])).tolist() == [1, 2, 3]


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray", reason="needs the extra [ray]")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_data_over_parquet_and_images(ray, tmp_path: Path) -> None:
    x = vectors()
    pq.write_table(pa.table({"id": list(range(40)), "x": list(x)}), tmp_path / "in.parquet", row_group_size=10)
    actors = {"batch_format": "pyarrow", "concurrency": 1, "batch_size": 16}
    options = {"fn_constructor_args": [make_model, SCORES], "fn_constructor_kwargs": {"inputs": "x"}}
    scored = ray.data.read_parquet(str(tmp_path / "in.parquet")).map_batches(lgm.ray.Scorer, **options, **actors)
    scored.write_parquet(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out")
    assert sorted(table["id"].to_pylist()) == list(range(40))
    assert_expected(table)

    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (5, 2, 2, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")

    def inputs(batch):
        return torch.from_numpy(np.array(batch["image"])).permute(0, 3, 1, 2).float() / 255

    options["fn_constructor_kwargs"] = {"inputs": inputs, "drop": ["image"]}
    images = ray.data.read_images(str(folder), include_paths=True)
    rows = images.map_batches(lgm.ray.Scorer, **options, concurrency=1, batch_size=2).take_all()
    order = [int(Path(row["path"]).stem) for row in rows]
    wanted = lgm.score(make_model(), inputs({"image": pixels[order]}), SCORES)
    assert sorted(order) == list(range(5))
    torch.testing.assert_close(torch.tensor([row["gradnorm"] for row in rows]).float(), wanted["gradnorm"].float())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_example_runs(ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda **options: None)  # Ray runs already
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ray_data.py"), run_name="__main__")
    assert capsys.readouterr().out.count("gradnorm") == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(find_spec("pyspark") is None or which("java") is None, reason="needs pyspark and Java")
def test_spark_scores_with_the_same_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructType

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    pq.write_table(pa.table({"id": list(range(40)), "x": list(vectors())}), tmp_path / "in.parquet")
    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        predict = lgm.ray.Scorer.for_spark(make_model, ["entropy", "gradnorm"])
        types = StructType().add("prediction", "long").add("entropy", "double").add("gradnorm", "double")
        udf = predict_batch_udf(predict, return_type=types, batch_size=16, input_tensor_shapes=[[12]])
        scored = spark.read.parquet(str(tmp_path / "in.parquet")).withColumn("scored", udf("x"))
        rows = scored.select("id", "scored.*").toPandas().sort_values("id")
    finally:
        spark.stop()
    wanted = lgm.score(make_model(), torch.from_numpy(vectors()), ["entropy", "gradnorm"])
    for name, values in wanted.items():
        torch.testing.assert_close(torch.tensor(rows[name].to_numpy()).float(), values.float())
