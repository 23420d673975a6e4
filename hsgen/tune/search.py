"""The search: what is measured next, and when enough is.

Starts and warm points come first, then part after part: small ones whole, large ones as a sampler
asks, the others at the best that is known.  At the end every neighbour of the best.  All results are
of whole calls.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import optuna
from optuna.trial import Trial

from hsgen.errors import TuneError
from hsgen.measurer import Failure, Measurer, Result, trusted, wobbles
from hsgen.pruning import binding
from hsgen.space import Part, Point, Space, Variant
from hsgen.tune.journal import Journal
from hsgen.tune.sampler import Sampler

ENUMERATED = 200  # points of a part at most, to be measured whole
STALE = 20  # fresh trials without a gain, after which a part is left
POLISHED = 0.25  # of trials and time, kept for the neighbours of the best
REPEATS = 40  # asks without a fresh point, after which one is drawn
DRAWS = 400
DEATHS = 3  # of processes in a row, after which the best must run again
AHEAD = 8  # points whose kernels compile while one is measured
NEAR = 1.1  # of the best: further off nobody wins finals
GAIN = 0.003  # less starts no polish anew
POLL = 0.1  # seconds between two looks at what others are at


class Judge(Protocol):
    """Says without a GPU whether a point can run.

    `early`: how many points it judges at once, while others are measured.
    """

    @property
    def early(self) -> int: ...

    def ahead(self, point: Point) -> None: ...

    def ready(self, point: Point) -> bool: ...

    def failure(self, point: Point) -> Failure | None: ...


class Lenient:
    """A judge that knows nothing."""

    early = 0

    def ahead(self, point: Point) -> None:
        """Nothing to begin with."""

    def ready(self, point: Point) -> bool:  # noqa: ARG002
        """At once."""
        return True

    def failure(self, point: Point) -> Failure | None:  # noqa: ARG002
        """None."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a search ends: trials that were measured, seconds."""

    trials: float = math.inf
    seconds: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a search is; prints as one line."""

    doing: str
    measured: int
    start: float
    best: float
    failures: Mapping[str, int]
    trials_left: float
    seconds_left: float
    beside: int = 0  # other processes

    def __str__(self) -> str:
        parts = [f"{self.doing}: {self.measured} measured"]
        if self.beside:
            parts.append(f"{self.beside} more at it")
        if math.isfinite(self.best):
            gain = f", {self.start / self.best:.2f}x the start" if math.isfinite(self.start) else ""
            parts.append(f"best {self.best:.4g} us{gain}")
        if self.failures:
            parts.append(" ".join(f"{kind} {count}" for kind, count in self.failures.items()))
        if math.isfinite(self.seconds_left):
            parts.append(f"{max(0.0, self.seconds_left):.0f} s left")
        if math.isfinite(self.trials_left):
            parts.append(f"{max(0, int(self.trials_left))} trials left")
        return "; ".join(parts)


Tell = Callable[[Status], None]


def _quietly(status: Status) -> None:
    """Tell nobody."""


@dataclass(slots=True, kw_only=True, eq=False)
class Search:
    """One search, which may continue another's journal.

    Attributes:
        space: where.
        measurer: who measures.
        journal: where results are kept.
        judge: who knows what cannot run.
        limits: when it ends.
        seed: of samplers and draws.
        floor_us: by shape, what no time can be below.
        weights: by kernel, its share of the start's time; unknown ones count little.
        tell: told after each result.
        clock: seconds.
    """

    space: Space
    measurer: Measurer
    journal: Journal
    judge: Judge = field(default_factory=Lenient)
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    floor_us: Mapping[str, float] = field(default_factory=dict[str, float])
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    tell: Tell = _quietly
    clock: Callable[[], float] = time.monotonic
    stopped: bool = field(default=False, init=False)
    doing: str = field(default="starting", init=False)
    deaths: int = field(default=0, init=False)
    _end: float = field(default=math.inf, init=False)
    _threads: ThreadPoolExecutor | None = field(default=None, init=False)
    _random: random.Random = field(init=False)

    # --- the whole

    def run(self, warm: Sequence[Point] = ()) -> None:
        """Search; results are the journal's.

        Args:
            warm: points that were good elsewhere; those that are not in the space are left out.

        Raises:
            TuneError: nothing can run, or processes die one after the other.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._end = self.clock() + self.limits.seconds
        # threads outlive what they start: a worker dies with the thread that started it
        self._threads = ThreadPoolExecutor(self.measurer.lanes, "hsgen-lane")
        try:
            with self.journal.working():
                self.journal.refresh()
                # whoever comes later draws otherwise: alike, they would ask for the same points
                self.seed += self.journal.others
                self._random = random.Random(self.seed)
                self._all(warm)
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _all(self, warm: Sequence[Point]) -> None:
        self._measure([variant.start for variant in self.space.variants], always=True)
        self.doing = "warm points"
        self._measure([point for point in warm if self.space.contains(point)], always=True)
        todo = [
            (variant, part)
            for variant in sorted(self.space.variants, key=self._reached)
            if self._may_win(variant)
            for part in sorted(variant.parts, key=self._weight, reverse=True)
        ]
        for place, (variant, part) in enumerate(todo):
            if self.over:
                break
            left = sum(self._weight(other) for _, other in todo[place:])
            share = (1 - POLISHED) * self._weight(part) / left
            self._part(variant, part, share)
        self.doing = "polishing"
        self._polish()
        if self.best is None and not self.stopped:
            raise TuneError(
                f"{self.space.name}: nothing can run",
                help="\n".join(binding(r.failure for r in self._results() if r.failure)),
            )

    @property
    def best(self) -> Point | None:
        """The point of the least time."""
        return self._best_of(None)

    @property
    def measured(self) -> int:
        """Points that were sent to a GPU, those of a journal included."""
        return sum(not static(result) for result in self._results())

    @property
    def over(self) -> bool:
        """Whether trials or time are spent, or the user has seen enough."""
        spent = self.measured >= self.limits.trials or self.clock() >= self._end
        return self.stopped or spent

    def finalists(self, count: int, shape: str) -> list[Point]:
        """The best of a shape that are near, fastest first, then each variant's start."""
        results = self.journal.results.items()
        known = sorted((r.times[shape].median_us, key) for key, r in results if not r.failure)
        near = [key for us, key in known[:count] if us <= NEAR * known[0][0]]
        best = [self.journal.points[key] for key in near]
        starts = (variant.start for variant in self.space.variants)
        able = [s for s in starts if s.key in self.journal.results and self._score(s) < math.inf]
        return list(dict.fromkeys([*best, *able]))

    def _results(self) -> Iterator[Result]:
        return iter(self.journal.results.values())

    def _score(self, point: Point) -> float:
        found = self.journal.results.get(point.key)
        return found.score if found else math.inf

    def _best_of(self, variant: Variant | None) -> Point | None:
        known = [
            (result.score, key)
            for key, result in self.journal.results.items()
            if not result.failure
            if variant is None or self.journal.points[key].orders == variant.orders
        ]
        return self.journal.points[min(known)[1]] if known else None

    def _reached(self, variant: Variant) -> float:
        best = self._best_of(variant)
        return self._score(best) if best else math.inf

    def _least(self) -> float:
        best = self.best
        return self._score(best) if best else math.inf

    def _may_win(self, variant: Variant) -> bool:
        """Other orders get a search if they start within twice the best."""
        least = min(map(self._reached, self.space.variants))
        return self._reached(variant) <= 2 * least

    def _weight(self, part: Part) -> float:
        return max(0.05, sum(self.weights.get(name, 0.0) for name in part.kernels))

    # --- measuring

    def _measure(
        self,
        points: Sequence[Point],
        *,
        always: bool = False,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Measure what nobody has, as many at once as there are lanes; wait for what others are at."""
        wanted = {point.key: point for point in points}
        while left := [p for key, p in wanted.items() if key not in self.journal.results]:
            if self.stopped or (not always and (self.over or enough())):
                return
            near = [*itertools.islice(filter(self.journal.free, left), AHEAD + self.measurer.lanes)]
            for point in near:
                self.judge.ahead(point)
            ready = near if always else [point for point in near if self.judge.ready(point)]
            if not near:  # others are at all of them: look what came of it
                ready = left
            some = self.journal.claim(ready, self.measurer.lanes)
            if not some:  # compilers or other processes are at all of them
                time.sleep(POLL)
            for point, result in zip(some, self._results_of(some), strict=True):
                self.journal.keep(point, result)
                self._said(result)

    def _results_of(self, points: Sequence[Point]) -> list[Result]:
        assert self._threads is not None, "only `run` measures"
        if len(points) == 1 and self.measurer.lanes == 1:
            return [self._result_of(points[0])]
        return list(self._threads.map(self._result_of, points))

    def _result_of(self, point: Point) -> Result:
        """One result: a judge may know it already; times must be possible, and steady."""
        failure = self.judge.failure(point)
        if failure is not None:
            return Result(failure=failure)
        best = self.best
        limit = (
            {shape: t.median_us for shape, t in self.journal.results[best.key].times.items()}
            if best
            else None
        )
        result = self.measurer.measure(point, limit)
        if wobbles(result) or _impossible(result):
            again = self.measurer.measure(point, limit)
            result = min((result, again), key=_wobble)
        return trusted(result, self.floor_us)

    def say(self, doing: str) -> None:
        """Tell what is done now."""
        self.doing = doing
        start, best = self._score(self.space.start), self.best
        kinds = Counter(r.failure.kind for r in self._results() if r.failure)
        self.tell(
            Status(
                doing=self.doing,
                measured=self.measured,
                start=start,
                best=self._score(best) if best else math.inf,
                failures=dict(kinds.most_common()),
                trials_left=self.limits.trials - self.measured,
                seconds_left=self._end - self.clock(),
                beside=self.journal.others,
            )
        )

    def _said(self, result: Result) -> None:
        """Tell of it; stop where processes die one after the other."""
        if not static(result):
            deadly = result.failure is not None and result.failure.deadly
            self.deaths = self.deaths + 1 if deadly else 0
        self.say(self.doing)
        if self.deaths >= DEATHS:
            self._probe(result)

    def _probe(self, last: Result) -> None:
        """Whether it is the points that kill processes, or the machine: what ran before must run now."""
        known = self.best or self.space.start
        again = self.measurer.measure(known)
        if again.failure is not None:
            raise TuneError(
                f"{self.deaths} processes died one after the other, and now what ran before does "
                f"not either: {again.failure}; the last point: {last.failure}",
                help="results are kept, and what killed a process is not tried again; look at the "
                "GPU (nvidia-smi), then run the same command",
            )
        self.deaths = 0

    # --- one part

    def _part(self, variant: Variant, part: Part, share: float) -> None:
        """Spend a share of what is left on one part, the others as in the variant's best."""
        base = self._best_of(variant)
        if base is None:
            return
        self.doing = f"{variant.name} {part.name}"
        quota = (
            math.ceil((self.limits.trials - self.measured) * share) if self._counted else math.inf
        )
        end = self.clock() + (self._end - self.clock()) * share if self._timed else math.inf
        few = [*itertools.islice(part.points(base), ENUMERATED + 1)]
        if len(few) <= min(ENUMERATED, quota):
            mine = part.codes(base) or ()
            few.sort(
                key=lambda p: sum(
                    abs(a - b) for a, b in zip(part.codes(p) or (), mine, strict=True)
                )
            )
            self._measure(few, enough=lambda: self.clock() >= end)
        else:
            _Sampling(self, variant, part, base).run(quota, end)

    @property
    def _counted(self) -> bool:
        return math.isfinite(self.limits.trials)

    @property
    def _timed(self) -> bool:
        return math.isfinite(self.limits.seconds)

    def _polish(self) -> None:
        """Measure the neighbours of the best until none is better."""
        while (best := self.best) is not None and not self.over:
            near = [p for p in self.space.neighbours(best) if p.key not in self.journal.results]
            if not near:
                return
            near.sort(key=functools.partial(self._moved_weight, best), reverse=True)
            target = self._score(best) * (1 - GAIN)
            self._measure(near, enough=lambda: self._least() < target)  # noqa: B023 - called now

    def _moved_weight(self, point: Point, other: Point) -> float:
        """Of the kernels that two points have otherwise."""
        theirs = dict(other.configs)
        moved = [name for name, config in point.configs if theirs.get(name) != config]
        return max((self.weights.get(name, 0.0) for name in moved), default=0.0)


class _Sampling:
    """A part that is too large to measure whole: a sampler asks, and nothing is measured twice."""

    def __init__(self, search: Search, variant: Variant, part: Part, base: Point) -> None:
        self._search, self._part, self._base = search, part, base
        self._journal = search.journal
        self._name = f"{variant.name}.{part.name}"
        self._sampler = Sampler(part, search.seed)
        self._told = set[str]()
        self._add(base.key)

    def run(self, quota: float, end: float) -> None:
        """Ask and tell until the quota, the time or the gains are at an end."""
        search, lanes = self._search, self._search.measurer.lanes
        began, stale, best = search.measured, 0, search.best
        waiting: list[tuple[Trial | None, Point]] = []
        while search.measured - began < quota and not search.over and search.clock() < end:
            while len(waiting) < lanes + min(AHEAD, search.judge.early):
                asked = self._fresh()
                if asked is None:
                    break
                search.judge.ahead(asked[1])
                waiting.append(asked)
            if not waiting or stale >= STALE:
                break
            ready = [asked for asked in waiting if search.judge.ready(asked[1])]
            if not ready:
                time.sleep(POLL)
                continue
            some = ready[:lanes]
            waiting = [asked for asked in waiting if asked not in some]
            results = search._results_of([point for _, point in some])
            for (trial, point), result in zip(some, results, strict=True):
                self._finish(trial, point, result)
                stale += not static(result)
            if search.best != best:
                best, stale = search.best, 0
        for _, point in waiting:
            self._journal.release(point)

    def _finish(self, trial: Trial | None, point: Point, result: Result) -> None:
        self._journal.keep(point, result)
        if trial is None:
            self._add(point.key)
        else:
            self._told.add(point.key)
            self._sampler.tell(trial, result)
        self._search._said(result)

    def _add(self, key: str) -> None:
        """Tell the sampler of what it did not ask for."""
        codes = self._part.codes(self._journal.points[key])
        if key not in self._told and codes is not None:
            self._sampler.add(codes, self._journal.results[key])
        self._told.add(key)

    def _fresh(self) -> tuple[Trial | None, Point] | None:
        """A point that nobody has measured or is at: the sampler's, or one drawn where it repeats
        itself.
        """
        for key in [key for key, name in self._journal.parts.items() if name == self._name]:
            self._add(key)  # of other processes, and of earlier ones
        for _ in range(REPEATS):
            trial, codes = self._sampler.ask()
            point = self._part.moved(self._base, codes)
            known = self._journal.results.get(point.key)
            if known is not None or self._part.problem(point):
                self._sampler.tell(trial, known)
            elif self._journal.claim([point], 1, self._name):
                return trial, point
            else:  # someone is at it
                self._sampler.drop(trial)
        for _ in range(DRAWS):
            codes = [self._search._random.choice(knob.codes) for knob in self._part.knobs]
            point = self._part.moved(self._base, codes)
            if not self._journal.free(point) or self._part.problem(point):
                continue
            if self._journal.claim([point], 1, self._name):
                return None, point
        return None


def static(result: Result) -> bool:
    """Whether no GPU was asked."""
    kinds = (
        "STATIC_INVALID",
        "COMPILE_ERROR",
        "COMPILE_TIMEOUT",
        "OVER_SMEM",
        "OVER_LIMIT",
        "SPILL",
    )
    return result.failure is not None and result.failure.kind in kinds


def _impossible(result: Result) -> bool:
    return any(not time.median_us > 0 for time in result.times.values())


def _wobble(result: Result) -> float:
    """Sorts two measurements of one point: the steadier one first, a failure before all."""
    if result.failure:
        return -1.0
    if _impossible(result):
        return math.inf
    return max(time.iqr_us / time.median_us for time in result.times.values())
