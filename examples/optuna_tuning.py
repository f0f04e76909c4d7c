"""
Tune a score with Optuna
========================

Tune a score's arguments on validation data, and report the AUROC on test data.

Install Optuna first: ``pip install optuna``.
"""

from __future__ import annotations

import optuna
import torch
from _digits import digit_loaders, trained_classifier
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm


def auroc(model: torch.nn.Module, known: DataLoader, unknown: DataLoader, score: str) -> float:
    """Return the AUROC of a score that separates unknown digits from known ones."""
    values = {}
    for name, loader in {"known": known, "unknown": unknown}.items():
        batches = [lgm.score(model, images, {"tuned": score})["tuned"] for images, _ in loader]
        values[name] = torch.cat(batches)
    is_unknown = torch.zeros(len(values["known"]) + len(values["unknown"]), dtype=torch.int)
    is_unknown[len(values["known"]) :] = 1
    all_values = torch.cat([values["known"], values["unknown"]])
    return float(lgm.meters.functional.auroc(all_values, is_unknown))


def main() -> None:
    """Tune GradNorm's temperature and target on a third of the unknown digits; test on the rest."""
    loaders = digit_loaders()
    model = trained_classifier(loaders).eval()
    unknown = loaders["unknown"].dataset
    validation_size = len(unknown) // 3
    validation = DataLoader(torch.utils.data.Subset(unknown, range(validation_size)), 64)
    test = DataLoader(torch.utils.data.Subset(unknown, range(validation_size, len(unknown))), 64)

    def objective(trial: optuna.Trial) -> float:
        temperature = trial.suggest_float("temperature", 0.1, 10.0, log=True)
        target = trial.suggest_categorical("target", ["head", "all"])
        score = f"gradnorm(temperature={temperature}, target='{target}')"
        return auroc(model, loaders["held_out"], validation, score)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=12)
    temperature, target = study.best_params["temperature"], study.best_params["target"]
    best = f"gradnorm(temperature={temperature:.3g}, target='{target}')"
    print(f"validation, tuned: {100 * study.best_value:.1f} with {best}")
    for score in ("gradnorm", best):
        print(f"test, {score}: {100 * auroc(model, loaders['test'], test, score):.1f}")


if __name__ == "__main__":
    main()
