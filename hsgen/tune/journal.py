"""The study of one problem: every result the moment it is known, and who is at which point.

Any number of processes may share it.  A point is claimed before it is measured, by a running trial;
of two claims of one point the first counts.  What a process claimed that died is free again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hsgen.errors import ArgumentError
from hsgen.measurer import Result, result_of
from hsgen.space import Point, Space
from hsgen.tune.presence import Presence

OUTCOME, WORKER, POINT, PART = "outcome", "worker", "point", "part"  # user attributes
ORDERS = "orders"  # as a parameter, beside the knobs

Value = int | str


class Journal:
    """The study of one space, and every result that it holds.

    Attributes:
        results: by key of a point.
        points: likewise.
        parts: likewise, for the sampler of which part it was measured, if for any.
        presence: this process, as others see it.
    """

    def __init__(self, storage: BaseStorage, name: str, space: Space) -> None:
        self.name = name
        self.space = space
        self.results: dict[str, Result] = {}
        self.points: dict[str, Point] = {}
        self.parts: dict[str, str] = {}
        self._storage = storage
        self._mine: dict[str, int] = {}  # trials that claim, by key of a point
        self._theirs: dict[str, tuple[int, str]] = {}  # the first claim of another, and whose
        self._read = 0
        self._noted = set[int]()
        optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
        self._id = storage.get_study_id_from_name(name)
        self.presence = Presence(storage, self._id)
        self.refresh()

    @contextmanager
    def working(self) -> Generator[None, None, None]:
        """Let others know that this process is here; afterwards, what it is not at any more."""
        self.presence.begin()
        try:
            yield
        finally:
            for key in tuple(self._mine):
                self._release(key)
            self.presence.end()

    # --- points

    def claim(self, points: Sequence[Point], most: int, part: str = "") -> list[Point]:
        """The first few points that nobody has measured or is at: this process is at them now."""
        if len(points) > 1:  # a single one is a sampler's, which others will hardly ask for too
            self.refresh()
        wanted = list(itertools.islice(filter(self.free, points), most))
        for point in wanted:
            self._mine[point.key] = self._create(self._trial(point, part))
        if wanted or len(points) == 1:
            self.refresh()
        lost = [p for p in wanted if p.key in self.results or self._late(p.key)]
        for point in lost:
            self._release(point.key)
        return [point for point in wanted if point not in lost]

    def free(self, point: Point) -> bool:
        """Whether, when last looked, nobody had measured a point or was at it."""
        key = point.key
        return not (key in self.results or key in self._mine or key in self._theirs)

    @property
    def others(self) -> int:
        """Processes that were at some point, when last looked."""
        return len({who for _, who in self._theirs.values()})

    def release(self, point: Point) -> None:
        """Leave a claimed point to others."""
        if point.key in self._mine:
            self._release(point.key)

    def keep(self, point: Point, result: Result) -> None:
        """Keep a result, for good; whoever asks for the point gets it."""
        trial = self._mine.pop(point.key, None)
        if trial is None or not self._finish(trial, point, result):
            self._create(self._trial(point, "", result))
        self._note(point, result)

    def refresh(self) -> None:
        """Take in what other processes found, and what they are at."""
        self._theirs = {}
        trials = self._storage.get_all_trials(self._id, deepcopy=False)
        for trial in trials[self._read :]:
            if trial.number not in self._noted:
                self._take(trial)
        while self._read < len(trials) and trials[self._read].state.is_finished():
            self._noted.discard(self._read)
            self._read += 1

    def _take(self, trial: FrozenTrial) -> None:
        """Note a result, or who is at it; a trial whose process died is over."""
        found, worker = self._outcome_of(trial), trial.user_attrs.get(WORKER)
        if trial.state.is_finished():
            self._noted.add(trial.number)
        elif not self.presence.alive(worker, trial):
            self._end(trial._trial_id, found[1] if found else None)
        elif not found and not self.presence.is_me(worker):
            key = str(trial.user_attrs.get(POINT))
            self._theirs.setdefault(key, (trial._trial_id, worker["id"] if worker else ""))
        if found and found[0].key not in self.results:
            self._note(*found)
        if found and PART in trial.user_attrs:
            self.parts.setdefault(found[0].key, trial.user_attrs[PART])

    def _trial(self, point: Point, part: str, result: Result | None = None) -> FrozenTrial:
        """A claim, or a result that had none."""
        attributes: dict[str, object] = {POINT: point.key}
        attributes |= {PART: part} if part else {}
        if result:
            attributes[OUTCOME] = _outcome(point, result)
        else:
            attributes[WORKER] = self.presence.me
        state, values = _state(result) if result else (TrialState.RUNNING, None)
        known = _parameters(self.space, point)
        return create_trial(
            state=state,
            values=values,
            params={name: value for name, (value, _) in known.items()},
            distributions={name: distribution for name, (_, distribution) in known.items()},
            user_attrs=attributes,
        )

    def _create(self, trial: FrozenTrial) -> int:
        return self._storage.create_new_trial(self._id, trial)

    def _late(self, key: str) -> bool:
        """Whether another claimed a point before."""
        return key in self._theirs and self._theirs[key][0] < self._mine[key]

    def _release(self, key: str) -> None:
        self._end(self._mine.pop(key), None)

    def _end(self, trial: int, result: Result | None) -> bool:
        """-> whether it was not over yet"""
        try:
            self._storage.set_trial_state_values(trial, *_state(result))
        except RuntimeError:  # another process took its own for dead, or finished it too
            return False
        return True

    def _finish(self, trial: int, point: Point, result: Result) -> bool:
        """First what it is, then that it is over.  -> whether it was not over yet"""
        try:
            self._storage.set_trial_user_attr(trial, OUTCOME, _outcome(point, result))
        except RuntimeError:
            return False
        return self._end(trial, result)

    def _outcome_of(self, trial: FrozenTrial) -> tuple[Point, Result] | None:
        text = trial.user_attrs.get(OUTCOME)
        if text is None:
            return None
        try:
            record = json.loads(text)
            point = self.space.point(**record["point"])
            return point, result_of(record["result"])
        except (ArgumentError, LookupError, TypeError, ValueError):
            return None  # of another version; the study's name should have said so

    def _note(self, point: Point, result: Result) -> None:
        self.results[point.key] = result
        self.points[point.key] = point


def _state(result: Result | None) -> tuple[TrialState, list[float] | None]:
    if result is None or result.failure:
        return TrialState.FAIL, None
    return TrialState.COMPLETE, [result.score]


def _outcome(point: Point, result: Result) -> str:
    return json.dumps({"point": point.record(), "result": result.record()})


def _parameters(space: Space, point: Point) -> dict[str, tuple[Value, BaseDistribution]]:
    """What a point is, as people look at it: values themselves, doublings on a logarithmic axis."""
    found: dict[str, tuple[Value, BaseDistribution]] = {}
    variant = space.variant(point)
    if len(space.variants) > 1 and variant:
        names = [each.name for each in space.variants]
        found[ORDERS] = variant.name, CategoricalDistribution(names)
    for part in variant.parts if variant else ():
        for knob, code in zip(part.knobs, part.codes(point) or (), strict=False):
            low, high = knob.value(knob.least), knob.value(knob.most)
            found[knob.label] = knob.value(code), IntDistribution(low, high, log=knob.doubling)
    return found
