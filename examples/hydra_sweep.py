"""
A Hydra sweep
=============

Run the command with two temperatures of GradNorm, and compare the AUROC of both runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the command twice, and print the AUROC of GradNorm for each temperature."""
    command = [sys.executable, "-m", "lightning_gradmetrics.cli", "--multirun"]
    settings = [
        "score=[max_softmax,gradnorm]",
        "score.gradnorm.temperature=1,10",
        "hydra.sweep.dir=sweep",
        "logger=none",
        "report=false",
        "resamples=0",
    ]
    subprocess.run([*command, *settings], check=True)
    for run in sorted(Path("sweep").glob("*/metrics.json")):
        content = json.loads(run.read_text())
        arguments = {score["name"]: score["arguments"] for score in content["scores"]}
        temperature = arguments["gradnorm"]["temperature"]
        for metric in content["metrics"]:
            if metric["score"] == "gradnorm" and metric["metric"] == "auroc":
                auroc = f"AUROC {100 * metric['value']:.1f}"
                print(f"gradnorm, T = {temperature:4g}: {metric['dataset']:12} {auroc}")


if __name__ == "__main__":
    main()
