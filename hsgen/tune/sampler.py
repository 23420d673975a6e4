"""What to measure next of a part too large to be measured whole: Optuna's TPE on doublings.

Its study is in memory, and told of what any process measured for the part: what is shared is the
journal's, where a point is one trial.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState, create_trial

from hsgen.measurer import Result
from hsgen.space import Part

STARTUP = 10  # trials that are random


class Sampler:
    """Asks for codes of a part's knobs, and is told what came of them."""

    def __init__(self, part: Part, seed: int) -> None:
        self._part = part
        self._wanted: dict[str, BaseDistribution] = {
            knob.label: IntDistribution(knob.least, knob.most) for knob in part.knobs
        }
        with warnings.catch_warnings():  # Optuna 4 calls both arguments experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = TPESampler(
                multivariate=True, constant_liar=True, n_startup_trials=STARTUP, seed=seed
            )
        self._study = optuna.create_study(direction="minimize", sampler=sampler)

    def ask(self) -> tuple[Trial, tuple[int, ...]]:
        """The codes that a new trial is about."""
        trial = self._study.ask(self._wanted)
        return trial, tuple(trial.params[knob.label] for knob in self._part.knobs)

    def tell(self, trial: Trial, result: Result | None) -> None:
        """A failure, or what breaks a rule and has no result, is worse than all that has a time."""
        if result is None or result.failure:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, result.score)

    def drop(self, trial: Trial) -> None:
        """Nothing came of a trial."""
        self._study.tell(trial, state=TrialState.FAIL)

    def add(self, codes: Sequence[int], result: Result) -> None:
        """Tell of what it did not ask for."""
        failed = result.failure is not None
        params = {knob.label: code for knob, code in zip(self._part.knobs, codes, strict=True)}
        self._study.add_trial(
            create_trial(
                state=TrialState.PRUNED if failed else TrialState.COMPLETE,
                value=None if failed else result.score,
                params=params,
                distributions=self._wanted,
            )
        )
