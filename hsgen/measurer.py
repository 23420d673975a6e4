"""What measuring a point of a space says: times by shape, or one failure with its class.

A `Measurer` measures; `Replay` says again what a table holds, so that a search can be judged
without a GPU.  Starts no process and searches nothing.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

from hsgen.configs import Sizes
from hsgen.errors import ArgumentError, HsgenError
from hsgen.space import Part, Point
from hsgen.tuned import Bucket, Time

Kind = Literal[
    "STATIC_INVALID",
    "COMPILE_ERROR",
    "COMPILE_TIMEOUT",
    "OVER_SMEM",
    "OVER_LIMIT",
    "SPILL",
    "LAUNCH_ERROR",
    "ILLEGAL_ACCESS",
    "HANG",
    "WRONG_SHAPE",
    "WRONG_DTYPE",
    "WRONG_NUMERIC",
    "NAN",
    "OUT_OF_MEMORY",
    "WORKER_DIED",
    "TIMING_UNTRUSTED",
    "TOO_SLOW",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEADLY = ("ILLEGAL_ACCESS", "HANG", "WORKER_DIED")  # the process is no use afterwards
MOST_MESSAGE = 2000
WOBBLE = 0.2  # of the median: a wider middle half is timed once more

Check = Mapping[str, str | float | int | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a point has no time.  `limit` is what binds, where a limit does."""

    kind: Kind
    message: str
    kernel: str = ""
    limit: str = ""

    @property
    def deadly(self) -> bool:
        return self.kind in DEADLY

    def __str__(self) -> str:
        where = f" {self.kernel}:" if self.kernel else ""
        return f"{self.kind}:{where} {' '.join(self.message.split())}"[:MOST_MESSAGE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Times of whole calls by shape, or why there are none; `check` is what was verified."""

    times: Mapping[str, Time] = field(default_factory=dict[str, Time])
    failure: Failure | None = None
    check: Check = field(default_factory=dict[str, "str | float | int | bool"])
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """Microseconds, the geometric mean of the shapes; infinite for a failure."""
        if self.failure or not self.times:
            return math.inf
        return math.exp(statistics.fmean(math.log(t.median_us) for t in self.times.values()))

    def record(self) -> dict[str, object]:
        """The same for JSON; `result_of` reads it."""
        return {
            "times": {shape: asdict(time) for shape, time in self.times.items()},
            "failure": asdict(self.failure) if self.failure else None,
            "check": dict(self.check),
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        if self.failure:
            return f"{self.failure.kind}: {self.failure.message}"
        return "; ".join(f"{shape}: {time}" for shape, time in self.times.items())


def result_of(record: Mapping[str, object]) -> Result:
    """The result that `Result.record` wrote.

    Raises:
        ArgumentError: it did not.
    """
    try:
        times, failure, check = record["times"], record["failure"], record["check"]
        assert isinstance(times, dict)
        assert isinstance(check, dict)
        return Result(
            times={shape: Time(**time) for shape, time in times.items()},
            failure=Failure(**failure) if isinstance(failure, dict) else None,
            check=check,
            seconds=float(str(record["seconds"])),
        )
    except (LookupError, TypeError, ValueError, AssertionError) as error:
        raise ArgumentError(f"not a result: {error}") from error


def trusted(result: Result, floor_us: Mapping[str, float]) -> Result:
    """The result itself, or that its times cannot be.

    Args:
        result: of one point.
        floor_us: by shape, what no kernel can be faster than.
    """
    for shape, time in result.times.items():
        least = floor_us.get(shape, 0.0)
        if not math.isfinite(time.median_us) or time.median_us <= 0:
            wrong = f"{shape}: a time of {time.median_us} us"
        elif time.median_us < least:
            wrong = f"{shape}: {time.median_us:.4g} us, the card needs at least {least:.4g}"
        else:
            continue
        return Result(
            failure=Failure(kind="TIMING_UNTRUSTED", message=wrong),
            check=result.check,
            seconds=result.seconds,
        )
    return result


def wobbles(result: Result) -> bool:
    """Whether some time deserves another look."""
    return any(time.iqr_us > WOBBLE * time.median_us for time in result.times.values())


# --- shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One call to time: sequences, each with queries on keys."""

    queries: int
    keys: int
    sequences: int = 1

    @property
    def name(self) -> str:
        """As people write it: 8K, or 1/32K for one query on 32K keys, or 4*8K for four sequences."""
        many = f"{self.sequences}*" if self.sequences > 1 else ""
        keys = f"/{_short(self.keys)}" if self.keys != self.queries else ""
        return f"{many}{_short(self.queries)}{keys}"

    @property
    def bucket(self) -> Bucket:
        """Of the calls that such a call stands for."""
        return Bucket.of(self.queries * self.sequences, self.keys, self.sequences, packed=False)

    @property
    def step_bucket(self) -> Bucket:
        """Of the steps that it stands for: its queries are new, and sequences have room for its keys."""
        sizes = Sizes(tokens=self.queries, keys=self.keys, sequences=self.sequences)
        return Bucket.of_steps(sizes)


def shape_of(text: str) -> Shape:
    """Read a `Shape.name`.

    Raises:
        ArgumentError: none, or more queries than keys.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\d+)(K?)(?:/(\d+)(K?))?", text.strip())
    if not found:
        raise ArgumentError(
            f"expected a shape, got {text!r}", help="8K, or 1/32K (queries/keys), or 4*8K"
        )
    queries = int(found[2]) << (10 if found[3] else 0)
    keys = int(found[4]) << (10 if found[5] else 0) if found[4] else queries
    shape = Shape(queries=queries, keys=keys, sequences=int(found[1] or 1))
    if not 1 <= queries <= keys or shape.sequences < 1:
        raise ArgumentError(f"{text}: expected 1 to {keys} queries, got {queries}")
    return shape


def _short(number: int) -> str:
    return f"{number >> 10}K" if number % 1024 == 0 else str(number)


# --- who measures


class Measurer(Protocol):
    """Measures points.  `measure` may be called by as many threads at once as there are lanes."""

    lanes: int
    shapes: tuple[str, ...]

    def measure(self, point: Point, limit: Mapping[str, float] | None = None) -> Result:
        """Verify, then time.

        Args:
            point: of the space.
            limit: microseconds by shape: what is far above them need not be timed to the end.
        """
        ...

    def compare(
        self, points: Sequence[Point], shape: str, rounds: int
    ) -> list[list[float] | Failure]:
        """Microseconds by point and round, all points in turn in each round."""
        ...


# --- a measured table

TABLE = ("about", "synthetic", "made", "spec", "orders", "part", "shape", "names")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Every point of one part, measured, the other parts at their start.

    Attributes:
        about: what it is; a synthetic one says so.
        synthetic: made by a formula, not by a card.
        made: card, versions, date and command.
        orders: of branches that are not the plan's own.
        names: of values, as `Knob.label`.
        entries: by values in that order, microseconds, or the class of the failure.
    """

    about: str
    synthetic: bool
    made: Mapping[str, str | int | None]
    spec: str
    orders: Mapping[str, str]
    part: str
    shape: str
    names: tuple[str, ...]
    entries: Mapping[tuple[int, ...], float | str]

    @property
    def best(self) -> float:
        """The least time, in microseconds."""
        times = [entry for entry in self.entries.values() if isinstance(entry, float)]
        if not times:
            raise HsgenError(f"{self.about}: no entry has a time")
        return min(times)

    def values(self, point: Point) -> tuple[int, ...]:
        """Which entry is a point's."""
        known = point.keywords()
        pairs = (name.split(".") for name in self.names)
        return tuple(known[kernel][name] for kernel, name in pairs)

    def record(self) -> dict[str, object]:
        """The same for JSON, an entry a row."""
        entries = [[*values, entry] for values, entry in sorted(self.entries.items())]
        return {**{name: getattr(self, name) for name in TABLE}, "entries": entries}


def read_table(file: Path) -> Table:
    """The table that a script wrote.

    Raises:
        HsgenError: no such table.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        entries = {
            tuple(row[:-1]): row[-1] if isinstance(row[-1], str) else float(row[-1])
            for row in data.pop("entries")
        }
        data["names"] = tuple(data["names"])
        known = {name: data[name] for name in TABLE}  # what else a script says is not the table's
        return Table(**known, entries=entries)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HsgenError(f"{file}: not a table of measured points: {error}") from error


def names_of(part: Part) -> tuple[str, ...]:
    """The names of a table's values."""
    return tuple(knob.label for knob in part.knobs)


class Replay:
    """Measures by looking into a table, with noise of one's own choice.

    Args:
        table: what is said.
        noise: of a search's times, one-sided, as delays are.
        quiet: of a comparison's.
        seed: of the noise.
    """

    lanes = 1

    def __init__(self, table: Table, *, noise: float = 0.0, quiet: float = 0.0, seed: int = 0):
        self.table = table
        self.shapes = (table.shape,)
        self.asked = 0
        self._noise, self._quiet = noise, quiet
        self._random = random.Random(seed)

    def measure(self, point: Point, limit: Mapping[str, float] | None = None) -> Result:  # noqa: ARG002
        """What the table holds, later than it is."""
        self.asked += 1
        match self.table.entries.get(self.table.values(point), "STATIC_INVALID"):
            case str() as word:
                kind = cast("Kind", word) if word in KINDS else "LAUNCH_ERROR"
                return Result(failure=Failure(kind=kind, message="so the table says"))
            case time:
                median = time * (1 + abs(self._random.gauss(0, self._noise)))
                took = Time(median_us=median, iqr_us=self._noise * time, runs=20)
                return Result(times={self.table.shape: took})

    def compare(
        self,
        points: Sequence[Point],
        shape: str,  # noqa: ARG002 - a table has one
        rounds: int,
    ) -> list[list[float] | Failure]:
        """The same, with the noise of a comparison."""
        found: list[list[float] | Failure] = []
        for point in points:
            entry = self.table.entries.get(self.table.values(point))
            if not isinstance(entry, float):
                found.append(Failure(kind="LAUNCH_ERROR", message="so the table says"))
                continue
            wobble = (1 + abs(self._random.gauss(0, self._quiet)) for _ in range(rounds))
            found.append([entry * each for each in wobble])
        return found
