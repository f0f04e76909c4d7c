"""
Tune a score with Optuna
========================

Tune a score's arguments on validation data, and report the result on test data (``pip install optuna``).
"""

from __future__ import annotations

import optuna
import torch
from _digits import digit_loaders, trained_classifier
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm


def auroc(model: torch.nn.Module, known: DataLoader, unknown: DataLoader, score: str) -> float:
    """Return how well a score tells unknown digits from known ones."""
    values = {}
    for name, loader in {"known": known, "unknown": unknown}.items():
        values[name] = torch.cat([lgm.score(model, images, {"tuned": score})["tuned"] for images, _ in loader])
    target = torch.cat([torch.zeros(len(values["known"])), torch.ones(len(values["unknown"]))]).int()
    return float(lgm.meters.functional.auroc(torch.cat([values["known"], values["unknown"]]), target))


def main() -> None:
    """Tune GradNorm's temperature and target on a third of the unknown digits, and test on the others."""
    loaders = digit_loaders()
    model = trained_classifier(loaders).eval()
    unknown = loaders["unknown"].dataset
    part = len(unknown) // 3
    validation = DataLoader(torch.utils.data.Subset(unknown, range(part)), 64)
    test = DataLoader(torch.utils.data.Subset(unknown, range(part, len(unknown))), 64)

    def objective(trial: optuna.Trial) -> float:
        temperature = trial.suggest_float("temperature", 0.1, 10.0, log=True)
        target = trial.suggest_categorical("target", ["head", "all"])
        return auroc(model, loaders["held_out"], validation, f"gradnorm(temperature={temperature}, target='{target}')")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=12)
    best = f"gradnorm(temperature={study.best_params['temperature']:.3g}, target='{study.best_params['target']}')"
    print(f"validation, tuned: {100 * study.best_value:.1f} with {best}")
    for score in ("gradnorm", best):
        print(f"test, {score}: {100 * auroc(model, loaders['test'], test, score):.1f}")


if __name__ == "__main__":
    main()
