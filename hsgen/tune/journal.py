"""Studies on disk: every result the moment it is known, and what remains of processes that died.

One journal a problem and environment, which any number of processes may share.  A lock ends with the
process that holds it, and whoever gets it next cuts off the line that a killed one left half written.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from hsgen.errors import ArgumentError, HsgenError
from hsgen.measurer import Result, result_of
from hsgen.space import Knob, Part, Point, Space

POINTS = "points"  # the study of what no sampler asked for
OUTCOME, WORKER = "outcome", "worker"  # user attributes
SILENT_SECONDS = 3600.0  # after which a trial of another host is given up
UNNAMED_SECONDS = 60.0  # and one that nobody said to be at


class Lock(JournalFileOpenLock):
    """The exclusive use of a journal: Optuna's own locks outlive a killed process by 30 seconds."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._journal = file
        self._path = file.with_suffix(file.suffix + ".lock")
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for it."""
        held = self._path.open("ab")
        fcntl.flock(held, fcntl.LOCK_EX)
        self._held = held
        mend(self._journal)
        return True

    def release(self) -> None:
        """Give it back."""
        held, self._held = self._held, None
        if held is not None:
            held.close()


def mend(file: Path) -> None:
    """Cut off a last line that was never finished: the next one would be glued to it."""
    with file.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end == 0:
            return
        stream.seek(end - 1)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def storage_at(place: Path | str | None) -> BaseStorage:
    """A journal file, a URL as Optuna has them, or memory.

    Raises:
        HsgenError: it cannot be opened.
    """
    if place is None:
        return InMemoryStorage()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if isinstance(place, str):
            return get_storage(place)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.touch(mode=0o600)
        mend(place)
        return JournalStorage(JournalFileBackend(str(place), lock_obj=Lock(place)))
    except Exception as error:
        raise HsgenError(f"cannot open the studies at {place}: {error}") from error


class Journal:
    """The studies of one space, and every result that any of them holds.

    Attributes:
        results: by key of a point.
        points: likewise.
    """

    def __init__(self, storage: BaseStorage, name: str, space: Space) -> None:
        self.name = name
        self.space = space
        self.results: dict[str, Result] = {}
        self.points: dict[str, Point] = {}
        self._storage = storage
        self._studies: dict[str, Study] = {}
        self._read: dict[str, int] = {}
        for study in optuna.get_all_study_names(storage):
            if study.startswith(f"{name}/"):
                self._open(study.removeprefix(f"{name}/"), None)
        self._open(POINTS, None)

    def study(self, part: str, sampler: BaseSampler) -> Study:
        """The study of one part."""
        return self._open(part, sampler)

    def keep(self, point: Point, result: Result) -> None:
        """Keep the result of a point that no sampler asked for."""
        attributes = {OUTCOME: _outcome(point, result)}
        failed = result.failure is not None
        self._studies[POINTS].add_trial(
            create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                value=None if failed else result.score,
                user_attrs=attributes,
            )
        )
        self._note(point, result)

    def begin(self, trial: Trial) -> None:
        """Say who is at a trial."""
        trial.set_user_attr(WORKER, whoami())

    def finish(self, study: Study, trial: Trial, point: Point, result: Result) -> None:
        """Keep the result of a trial: first what it is, then that it is over."""
        trial.set_user_attr(OUTCOME, _outcome(point, result))
        self.tell(study, trial, result)
        self._note(point, result)

    def tell(self, study: Study, trial: Trial | int, result: Result | None) -> None:
        """Tell a sampler; a failure, or what breaks a rule, is worse than all that has a time."""
        if result is None or result.failure:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, result.score)

    def refresh(self) -> None:
        """Take in what other processes found."""
        for part in self._studies:
            self._take(part)

    def _open(self, part: str, sampler: BaseSampler | None) -> Study:
        if part not in self._studies or sampler is not None:
            study = optuna.create_study(
                storage=self._storage,
                study_name=f"{self.name}/{part}",
                direction="minimize",
                sampler=sampler,
                load_if_exists=True,
            )
            fresh = part not in self._studies
            self._studies[part] = study
            if fresh:
                self._recover(study)
                self._take(part)
        return self._studies[part]

    def _recover(self, study: Study) -> None:
        """Finish the trials of processes that died: those with a result have one."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if alive(trial.user_attrs.get(WORKER), trial):
                continue
            found = self._read_outcome(trial)
            if found is not None:
                self.tell(study, trial.number, found[1])
            else:
                study.tell(trial.number, state=TrialState.FAIL)

    def _take(self, part: str) -> None:
        trials = self._studies[part].get_trials(deepcopy=False)
        start = self._read.get(part, 0)
        for trial in trials[start:]:
            found = self._read_outcome(trial)
            if found is not None:
                self._note(*found)
        done = next((t.number for t in trials[start:] if not t.state.is_finished()), len(trials))
        self._read[part] = done

    def _read_outcome(self, trial: FrozenTrial) -> tuple[Point, Result] | None:
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


def _outcome(point: Point, result: Result) -> str:
    return json.dumps({"point": point.record(), "result": result.record()})


def distributions(part: Part) -> dict[str, BaseDistribution]:
    """A part's knobs as integers, in which a step is a doubling."""
    return {knob.label: IntDistribution(knob.least, knob.most) for knob in part.knobs}


def codes_of(trial: Trial, knobs: Sequence[Knob]) -> tuple[int, ...]:
    """What a sampler asked for."""
    return tuple(trial.params[knob.label] for knob in knobs)


def seed_study(study: Study, part: Part, point: Point, result: Result) -> None:
    """Tell a study of a point that was measured elsewhere, once."""
    codes = part.codes(point)
    if codes is None or result.failure or any(t.params for t in study.get_trials(deepcopy=False)):
        return
    params = {knob.label: code for knob, code in zip(part.knobs, codes, strict=True)}
    study.add_trial(
        create_trial(
            state=TrialState.COMPLETE,
            value=result.score,
            params=params,
            distributions=distributions(part),
        )
    )


# --- processes


def whoami() -> dict[str, str | int | float]:
    """This process, as another one can tell whether it lives."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def alive(worker: Mapping[str, Any] | None, trial: FrozenTrial) -> bool:
    """Whether the process of a trial may still be at it."""
    if worker is not None and worker.get("host") == socket.gethostname():
        pid = int(worker.get("pid", 0))
        return pid > 0 and _started(pid) == worker.get("started")
    begun = trial.datetime_start
    patience = UNNAMED_SECONDS if worker is None else SILENT_SECONDS
    return begun is not None and time.time() - begun.timestamp() < patience


def _started(pid: int) -> int:
    """When a process began, in ticks since the machine did; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
