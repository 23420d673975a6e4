"""A study as Optuna draws it: times in the order they came, parallel coordinates, what matters.

Needs matplotlib, which `hsgen[plots]` brings; only who asks for pictures imports this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import Study
from optuna.trial import TrialState
from optuna.visualization import matplotlib as drawn

from hsgen.errors import HsgenError
from hsgen.tune.storages import storage_at

MOST = 8  # axes of the parallel coordinates: what matters most
FEWEST = 3  # points with a time, of which anything can be said
TIME = "microseconds"


def pictures(place: Path | str, name: str, folder: Path) -> list[Path]:
    """Draw a study into a folder, as SVG files that are named for what they show.

    Args:
        place: of the storage.
        name: of the study.
        folder: made where it is missing.

    Raises:
        HsgenError: there is no such study, or too little in it.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage_at(place))
    except KeyError as error:
        raise HsgenError(f"{place}: there is no study {name}") from error
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < FEWEST:
        raise HsgenError(f"{name}: {len(done)} points have a time, pictures need {FEWEST}")
    with warnings.catch_warnings():  # all of it is experimental, in every Optuna so far
        warnings.simplefilter("ignore")
        matters = _matters(study)
        made: dict[str, Callable[[], Axes]] = {
            "history": lambda: drawn.plot_optimization_history(study, target_name=TIME),
            "parallel": lambda: _parallel(study, list(matters)[:MOST]),
        }
        if matters:
            made["importances"] = lambda: drawn.plot_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), params=list(matters)
            )
        folder.mkdir(parents=True, exist_ok=True)
        return [_write(draw, folder / f"{name}-{what}.svg") for what, draw in made.items()]


def _matters(study: Study) -> dict[str, float]:
    """By parameter, how much of a good time it decides; none where nothing varied."""
    try:
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except ValueError:  # no parameter is in every trial
        return {}


def _parallel(study: Study, names: list[str]) -> Axes:
    axes = drawn.plot_parallel_coordinate(study, params=names or None, target_name=TIME)
    if names:  # which Optuna cuts off where they begin to differ
        axes.set_xticklabels([TIME, *sorted(names)], rotation=20, ha="right")
    return axes


def _write(draw: Callable[[], Axes], file: Path) -> Path:
    plt.switch_backend("agg")  # a screen may be missing
    with plt.rc_context({"svg.hashsalt": "hsgen"}):  # the same study makes the same file
        figure = draw().figure
        assert isinstance(figure, Figure), "only a whole figure has axes"
        figure.set_size_inches(10, 6)
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return file
