"""The experiments with least squares and null spaces by name: sizes, how long they are, how they are run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hsbackend.comparisons.experiments import gp_hyperparameters, invariance, score_model, weight_sparsity
from hsbackend.comparisons.experiments.runs import Study
from hsbackend.comparisons.progress import Progress


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        help: what it is, in a line.
        quick: setting that takes less than two minutes on two cores.
        full: setting for a GPU.
        repeats: which field of the settings says how often it is repeated.
        run: of the setting and ``device``, ``seed``, ``progress``.
        progress_steps: how many steps the progress takes for a setting.
    """

    help: str
    quick: Any
    full: Any
    repeats: str
    run: Callable[..., Study]
    progress_steps: Callable[[Any], int]


EXPERIMENTS = {
    "weight_sparsity": Experiment(
        "a pattern of weights that vanishes, against pruning and l1",
        weight_sparsity.QUICK,
        weight_sparsity.FULL,
        "seeds",
        weight_sparsity.run_weight_sparsity,
        lambda setting: setting.seeds * (1 + len(weight_sparsity.methods(setting))),
    ),
    "score_model": Experiment(
        "score models with a symmetric Jacobian",
        score_model.QUICK,
        score_model.FULL,
        "seeds",
        score_model.run_score_model,
        lambda setting: len(setting.data_sets) * setting.seeds * len(score_model.methods(setting)),
    ),
    "gp_hyperparameters": Experiment(
        "Gaussian processes by predictive loss, against marginal likelihood",
        gp_hyperparameters.QUICK,
        gp_hyperparameters.FULL,
        "splits",
        gp_hyperparameters.run_gp_hyperparameters,
        lambda setting: len(setting.data_sets) * setting.splits * len(gp_hyperparameters.METHODS),
    ),
    "invariance": Experiment(
        "invariance and robustness as constraints, against augmentation and penalties",
        invariance.QUICK,
        invariance.FULL,
        "seeds",
        invariance.run_invariance,
        lambda setting: setting.seeds * sum(len(invariance.methods(task, setting)) for task in invariance.TASKS),
    ),
}


def setting_of(name: str, *, quick: bool, steps: int | None, repeats: int | None) -> Any:
    """Return the setting of an experiment.

    Args:
        name: of the experiment.
        quick: take the small one.
        steps: training steps; a warm-up is shortened to half of them. None for those of the setting.
        repeats: seeds or splits; None for those of the setting.

    Raises:
        ValueError: for numbers below one.
    """
    experiment = EXPERIMENTS[name]
    setting = experiment.quick if quick else experiment.full
    for option, value in (("--steps", steps), ("--repeats", repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} was given, expected 1 or more")
    if steps is not None:
        setting = replace(setting, steps=steps)
        if hasattr(setting, "warm_up"):
            setting = replace(setting, warm_up=min(setting.warm_up, steps // 2))
    return setting if repeats is None else replace(setting, **{experiment.repeats: repeats})


def run_experiment(name: str, setting: Any, *, device: torch.device, seed: int) -> Study:
    """Run an experiment by name.

    Raises:
        ImportError: if scikit-learn or matplotlib is missing.
    """
    for package in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{name} needs {package}; install it with: pip install "hsbackend[compare]"')
    experiment = EXPERIMENTS[name]
    progress = Progress(experiment.progress_steps(setting))
    study = experiment.run(setting, device=device, seed=seed, progress=progress)
    progress.close()
    return study
