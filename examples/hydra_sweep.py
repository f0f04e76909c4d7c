"""
A Hydra sweep
=============

Run the command with two temperatures of GradNorm, and print one table for both runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the command twice, and print the AUROC of GradNorm in each run."""
    command = [sys.executable, "-m", "lightning_gradmetrics.cli", "-m", "score=[max_softmax,gradnorm]"]
    settings = [
        "score.gradnorm.temperature=1,10",
        "hydra.sweep.dir=sweep",
        "logger=none",
        "report=false",
        "resamples=0",
    ]
    subprocess.run([*command, *settings], check=True)
    for run in sorted(Path("sweep").glob("*/metrics.json")):
        content = json.loads(run.read_text())
        temperature = next(s["arguments"]["temperature"] for s in content["scores"] if s["name"] == "gradnorm")
        for metric in content["metrics"]:
            if metric["score"] == "gradnorm" and metric["metric"] == "auroc":
                print(f"gradnorm, T = {temperature:4g}: {metric['dataset']:12} AUROC {100 * metric['value']:.1f}")


if __name__ == "__main__":
    main()
