"""Points measured in processes that may die, one a GPU: `tuning` is what runs in them.

A process that is late, dies, or lost its GPU is replaced; the point is to blame, and says so.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from threading import Lock

from hsgen import paths
from hsgen.errors import HsgenError
from hsgen.measurer import Failure, Result, result_of
from hsgen.space import Point
from hsgen.workers import JsonObject, Worker, WorkerError

COMMAND = ("-m", "hsgen.tuning")
INTERPRETED = "interpreter"  # as a GPU
ANY = "any"  # as a GPU: all that are visible, and nothing is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds for the first answer of a process, which loads libraries, and for any other."""

    first: float = 300.0
    later: float = 120.0


@dataclass(slots=True, eq=False)
class _Lane:
    """One process and its GPU."""

    gpu: str
    worker: Worker
    turns: (
        int | None
    )  # a descriptor that is locked while the GPU is ours; None where no other may want it
    fresh: bool = True


class Lanes:
    """A measurer of as many points at once as there are GPUs; leaving the block kills its processes.

    Args:
        problem: bound spec as text, dtype, target as JSON or empty, names of shapes.
        gpus: numbers as CUDA counts them, or `interpreter`.
        command: what a process runs; tests have their own.
        patience: before a process is said to hang.
        cache: a folder for Triton's cache; None is the user's.
    """

    def __init__(
        self,
        problem: JsonObject,
        gpus: Sequence[str],
        *,
        command: Sequence[str] = COMMAND,
        patience: Patience | None = None,
        cache: Path | None = None,
    ) -> None:
        self.turn_to(problem)
        self.lanes = len(gpus)
        self.deaths = 0
        self._patience = patience or Patience()
        self._all = [
            _Lane(
                gpu=gpu,
                worker=Worker(command, lambda _, gpu=gpu: _environment(gpu, cache)),
                turns=None if gpu in (INTERPRETED, ANY) else _lock_of(gpu),
            )
            for gpu in gpus
        ]
        self._idle = LifoQueue[_Lane]()
        for lane in reversed(self._all):
            self._idle.put(lane)
        self._counting = Lock()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def turn_to(self, problem: JsonObject) -> None:
        """Go on with another problem, in the same processes."""
        self.problem = problem
        self.shapes: tuple[str, ...] = tuple(problem["shapes"])

    def close(self) -> None:
        """Kill every process and give the GPUs back."""
        for lane in self._all:
            lane.worker.stop()
            lane.worker.close()
            if lane.turns is not None:
                os.close(lane.turns)
                lane.turns = None

    def interrupt(self) -> None:
        """Kill what runs; threads that wait for it learn that at once."""
        for lane in self._all:
            lane.worker.stop()

    def describe(self) -> JsonObject:
        """The first GPU, and the versions of everything.

        Raises:
            HsgenError: there is none, or nothing starts.
        """
        answer = self._ask({"do": "describe"})
        if isinstance(answer, Failure) or "error" in answer:
            said = answer.message if isinstance(answer, Failure) else answer["error"]
            raise HsgenError(
                f"cannot measure: {said}",
                help="tune where torch sees a GPU; --dry-run needs none",
            )
        return answer

    def measure(self, point: Point, limit: Mapping[str, float] | None = None) -> Result:
        """Verify a point, then time every shape."""
        return self._result({"do": "measure", "limit": dict(limit or {}), **point.record()})

    def prove(self, point: Point, shape: str) -> Result:
        """Hold rows of a shape, at its full length, against the reference."""
        return self._result({"do": "prove", "shape": shape, **point.record()})

    def shares(self, point: Point) -> dict[str, float]:
        """By kernel, its share of a call's time; nothing where that cannot be said."""
        answer = self._ask({"do": "shares", **point.record()})
        if isinstance(answer, Failure):
            return {}
        times: dict[str, float] = answer.get("ms", {})
        total = sum(times.values())
        return {name: ms / total for name, ms in times.items()} if total else {}

    def compare(
        self, points: Sequence[Point], shape: str, rounds: int
    ) -> list[list[float] | Failure]:
        """Microseconds by point and round; where the whole fails, the points that do it are found."""
        answer = self._compare(points, shape, rounds)
        if not isinstance(answer, Failure):
            return list(answer)
        if len(points) == 1:
            return [answer]
        found: list[list[float] | Failure] = [answer] * len(points)
        alone = [self._compare([point], shape, 1) for point in points]
        good = [n for n, each in enumerate(alone) if not isinstance(each, Failure)]
        for n, each in enumerate(alone):
            if isinstance(each, Failure):
                found[n] = each
        again = self._compare([points[n] for n in good], shape, rounds) if good else []
        for n, samples in zip(good, [] if isinstance(again, Failure) else again, strict=False):
            found[n] = samples
        return found

    def _compare(
        self, points: Sequence[Point], shape: str, rounds: int
    ) -> list[list[float]] | Failure:
        records = [point.record() for point in points]
        request = {"do": "compare", "points": records, "shape": shape, "rounds": rounds, "seed": 0}
        answer = self._ask(request)
        if isinstance(answer, Failure):
            return answer
        if "samples" in answer:
            return answer["samples"]
        failure = result_of(answer).failure
        assert failure is not None, "an answer without samples is a failure"
        return failure

    def _result(self, request: JsonObject) -> Result:
        answer = self._ask(request)
        return Result(failure=answer) if isinstance(answer, Failure) else result_of(answer)

    def _ask(self, request: JsonObject) -> JsonObject | Failure:
        """The answer of a process, or how it ended; a dead one is replaced when next asked."""
        lane = self._idle.get()
        patience = self._patience.first if lane.fresh else self._patience.later
        try:
            with _turn(lane):
                answer = lane.worker.ask({**request, "problem": self.problem}, patience)
            lane.fresh = False
            failure = answer.get("failure")
            deadly = failure is not None and Failure(**failure).deadly
            if deadly:  # the GPU's context is lost
                lane.worker.close()
                lane.fresh = True
            self._count(died=deadly)
        except WorkerError as error:
            lane.fresh = True
            self._count(died=True)
            kind = "HANG" if error.kind == "timeout" else "WORKER_DIED"
            return Failure(kind=kind, message=str(error))
        else:
            return answer
        finally:
            self._idle.put(lane)

    def _count(self, *, died: bool) -> None:
        """Deaths one after the other, of all lanes."""
        with self._counting:
            self.deaths = self.deaths + 1 if died else 0


def _environment(gpu: str, cache: Path | None) -> dict[str, str]:
    """One GPU, and this process's modules."""
    add = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    if cache is not None:
        add["TRITON_CACHE_DIR"] = str(cache)
    if gpu == INTERPRETED:
        return paths.child_environment(remove=(), add=add | {"TRITON_INTERPRET": "1"})
    if gpu == ANY:
        return paths.child_environment(remove=("TRITON_INTERPRET",), add=add)
    add["CUDA_VISIBLE_DEVICES"] = _visible(gpu)
    return paths.child_environment(remove=("TRITON_INTERPRET",), add=add)


def _visible(gpu: str) -> str:
    """What CUDA_VISIBLE_DEVICES calls the GPU of a number, of those that this process may use."""
    visible = paths.visible_gpus()
    return visible[int(gpu)] if visible and gpu.isdecimal() else gpu


def _lock_of(gpu: str) -> int:
    """What a user's processes that tune on a GPU take turns by, whatever their caches; a lock ends with its
    process.
    """
    name = f"hsgen-{os.getuid()}-{socket.gethostname()}-gpu{_visible(gpu)}.lock"
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(Path(tempfile.gettempdir()) / name, flags, 0o600)


@contextmanager
def _turn(lane: _Lane) -> Generator[None, None, None]:
    """One request at a time has the GPU: while another process measures, this one only compiles."""
    if lane.turns is None:
        yield
        return
    fcntl.flock(lane.turns, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lane.turns, fcntl.LOCK_UN)
