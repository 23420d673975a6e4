"""Who wins: finalists timed in turn, compared round by round with what is used now.

A gain that noise could be is none; of two that are as fast, the one with fewer registers wins, so
that tuning again gives the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hsgen.measurer import Failure
from hsgen.space import Point
from hsgen.tuned import Time

LEAST_GAIN = 0.01
NOISES = 2.0  # a gain must be this many times its own uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A finalist: its microseconds by round, or how it failed."""

    point: Point
    samples: tuple[float, ...]
    registers: int = 0
    failure: Failure | None = None

    @property
    def time(self) -> Time:
        """The median of the rounds."""
        quarters = statistics.quantiles(self.samples * 2, n=4)  # of one sample too
        return Time(
            median_us=statistics.median(self.samples),
            iqr_us=quarters[2] - quarters[0],
            runs=len(self.samples),
        )

    @property
    def runs(self) -> bool:
        """Whether it has times, all of them possible."""
        good = all(math.isfinite(each) and each > 0 for each in self.samples)
        return self.failure is None and good and bool(self.samples)

    @property
    def order(self) -> tuple[object, ...]:
        """Of two as fast, the lower one wins: fewer registers, then smaller values."""
        values = tuple(
            value for _, config in self.point.configs for value in config.keywords().values()
        )
        return self.registers, sum(values), values, self.point.orders


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a shape gets.

    Attributes:
        winner: the incumbent, where nothing is surely faster.
        incumbent: what was used before.
        ratio: the winner's time as a multiple of the incumbent's, of the same rounds.
        noise: the ratio's uncertainty.
        best: the least ratio of all, and
        best_noise: its uncertainty.
        ties: the others, fastest first, with their ratios to the winner.
    """

    winner: Entrant
    incumbent: Entrant
    ratio: float
    noise: float
    best: float
    best_noise: float
    ties: tuple[tuple[Entrant, float], ...]

    @property
    def adopted(self) -> bool:
        return self.winner is not self.incumbent

    def __str__(self) -> str:
        if self.adopted:
            gain = f"{1 / self.ratio:.3f} times as fast as before (noise {self.noise:.1%})"
            return f"{self.winner.time}, {gain}"
        best = f"the best ratio is {self.best:.3f} (noise {self.best_noise:.1%})"
        return f"{self.incumbent.time}, nothing is surely faster: {best}"


def decide(entrants: Sequence[Entrant], incumbent: Point) -> Verdict | None:
    """The winner; None if the incumbent does not run, and nothing else does."""
    able = [each for each in entrants if each.runs]
    if not able:
        return None
    before = next((each for each in able if each.point == incumbent), None)
    if before is None:  # what is used now does not even run: the best of the others
        before = min(able, key=lambda each: each.time.median_us)
    ratios = {id(each): _ratio(each, before) for each in able}
    best = min(able, key=lambda each: ratios[id(each)][0])
    best_ratio, best_noise = ratios[id(best)]
    near = [
        each
        for each in able
        if ratios[id(each)][0] <= best_ratio + _margin(max(best_noise, ratios[id(each)][1]))
    ]
    surely = [each for each in near if ratios[id(each)][0] < 1 - _margin(ratios[id(each)][1])]
    winner = before if before in near or not surely else min(surely, key=lambda each: each.order)
    ratio, noise = ratios[id(winner)]
    others = sorted(
        ((each, ratios[id(each)][0] / ratio) for each in able if each is not winner),
        key=lambda pair: pair[1],
    )
    return Verdict(
        winner=winner,
        incumbent=before,
        ratio=ratio,
        noise=noise,
        best=best_ratio,
        best_noise=best_noise,
        ties=tuple(others),
    )


def contenders(entrants: Sequence[Entrant], incumbent: Point) -> list[Entrant]:
    """Who may still win after a few rounds, and the incumbent: the others are surely slower."""
    able = [each for each in entrants if each.runs]
    before = next((each for each in able if each.point == incumbent), None)
    if before is None:
        return able
    ratios = {id(each): _ratio(each, before) for each in able}
    best = min(ratio + NOISES * noise for ratio, noise in ratios.values())
    return [
        each
        for each in able
        if each is before or ratios[id(each)][0] - NOISES * ratios[id(each)][1] <= best + LEAST_GAIN
    ]


def confirmed(verdict: Verdict, again: Sequence[Entrant]) -> Verdict:
    """The verdict after the winner and the incumbent were timed once more.

    The best of many was lucky too, so that its gain is smaller than it seemed, or none.
    """
    second = decide(again, verdict.incumbent.point)
    return verdict if second is None else replace(second, ties=verdict.ties)


def _margin(noise: float) -> float:
    return max(LEAST_GAIN, NOISES * noise)


def _ratio(each: Entrant, before: Entrant) -> tuple[float, float]:
    """The median ratio of the same rounds, and about its standard error."""
    pairs = [a / b for a, b in zip(each.samples, before.samples, strict=False)]  # some left early
    if len(pairs) < 2:
        return pairs[0], 0.0
    quarters = statistics.quantiles(pairs, n=4)
    return statistics.median(pairs), (quarters[2] - quarters[0]) / math.sqrt(len(pairs))
