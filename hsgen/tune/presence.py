"""Which processes are at a study, as the others can tell on any storage.

A process of the same machine is looked up.  One of another machine says every few seconds that it is
there, and is given up once it was silent for long by the reader's own clock: clocks of two machines
are never compared, but by the hour.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial

BEAT = 15.0  # seconds between two signs of life
SILENT = 60.0  # after which a process of another machine is given up
OLD = 3600.0  # as old a sign of life is none, whatever the clocks
UNNAMED = 60.0  # after which a trial is given up that nobody said to be at
GONE = 0.0  # the last word of a process that ends


def whoami() -> dict[str, str | int]:
    """This process, as another one can tell whether it lives."""
    pid = os.getpid()
    return {"id": uuid.uuid4().hex[:12], "host": machine(), "pid": pid, "started": started(pid)}


def machine() -> str:
    """What has one list of processes: a host since it was started, or a container."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")[:8])
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    except OSError:
        pass
    return "/".join(parts)


def started(pid: int) -> int:
    """When a process began, in ticks since the machine did; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        state, *rest = text.rpartition(")")[2].split()
        return 0 if state in "ZX" else int(rest[18])  # a zombie is dead
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(slots=True, eq=False)
class Presence:
    """This process at one study, and what it knows of the others.

    Attributes:
        storage: of the study.
        study: its number in the storage.
        beat: seconds between two signs of life.
        silent: seconds.
        clock: seconds of this process.
    """

    storage: BaseStorage
    study: int
    beat: float = BEAT
    silent: float = SILENT
    clock: Callable[[], float] = time.monotonic
    me: dict[str, str | int] = field(default_factory=whoami)
    _seen: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    _ends: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        """Say that this process is here, and go on saying it; in memory there is nobody to say it to."""
        if self._thread is None and not isinstance(self.storage, InMemoryStorage):
            self._say(time.time())
            self._ends.clear()
            self._thread = threading.Thread(target=self._beats, name="hsgen-beat", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Say that it is not any more."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ends.set()
            thread.join(self.beat)
            self._say(GONE)

    def _beats(self) -> None:
        while not self._ends.wait(self.beat):
            try:
                self._say(time.time())
            except Exception:  # noqa: BLE001 - a storage out of reach is the search's to notice
                continue

    def _say(self, when: float) -> None:
        self.storage.set_study_user_attr(self.study, _name(str(self.me["id"])), when)

    def is_me(self, worker: Mapping[str, Any] | None) -> bool:
        """Whether a trial's worker is this process."""
        return worker is not None and worker.get("id") == self.me["id"]

    def alive(self, worker: Mapping[str, Any] | None, trial: FrozenTrial) -> bool:
        """Whether the process of a trial may still be at it."""
        if worker is None:
            begun = trial.datetime_start
            return begun is not None and time.time() - begun.timestamp() < UNNAMED
        if self.is_me(worker):
            return True
        if worker.get("host") == self.me["host"] and self.me["started"]:
            pid = int(worker.get("pid", 0))
            return pid > 0 and started(pid) == worker.get("started")
        return self._heard(str(worker.get("id", "")))

    def _heard(self, name: str) -> bool:
        """Whether a process of another machine gave a sign of life lately."""
        said = self.storage.get_study_user_attrs(self.study).get(_name(name), GONE)
        if not isinstance(said, float) or said == GONE or time.time() - said > OLD:
            return False
        known, since = self._seen.get(name, (GONE, 0.0))
        now = self.clock()
        if said != known:
            known, since = self._seen[name] = said, now
        return now - since < self.silent


def _name(name: str) -> str:
    return f"worker:{name}"
