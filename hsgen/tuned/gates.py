"""Measured crossovers: records of below which lengths the forms of a spec are the faster ones.

    tuned/<gpu>/_gates.jsonl                          a line a record, sorted; no spec has that name
    <cache>/gates/v1/<gpu>/<spec>-<key>.json          atomic, hash-checked

`crossovers` looks one up: of this GPU and Triton, of this GPU, of this architecture, or none.  What is
no record is warned about, with file, line and field, and is as if it were not there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from hsgen import store
from hsgen.gates import Form, Gate
from hsgen.tuned import files
from hsgen.tuned.files import Flaw
from hsgen.tuned.records import (
    SCHEMA,
    Closed,
    Count,
    Environment,
    Figure,
    Name,
    Problem,
    Provenance,
    RecordError,
    Time,
    read_as,
)

FILE = f"{files.OTHERS}gates{files.SUFFIX}"
MOST_LENGTHS = 64
GateRung = Literal["exact", "other Triton", "other GPU", "none"]
GATE_RUNGS: tuple[GateRung, ...] = ("exact", "other Triton", "other GPU", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Length(Closed):
    """One length: the time of whole calls, queries as many as keys, by form."""

    tokens: Count
    times: Mapping[Form, Time]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing(Closed):
    """Below how many keys a form is the faster one, and between what noise puts that."""

    below: Count
    least: Count
    most: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates(Closed):
    """One record.  A form without a crossing was nowhere surely faster, or was not there.

    Attributes:
        lengths: what was timed, shortest first.
        dense: against the faster of the others.
        flat: against the spec as it is.
        check: what was verified before anything was timed.
    """

    problem: Problem
    environment: Environment
    lengths: Annotated[tuple[Length, ...], Field(min_length=1, max_length=MOST_LENGTHS)]
    dense: Crossing | None
    flat: Crossing | None
    provenance: Provenance
    check: Mapping[Name, Figure] = field(default_factory=dict[str, Figure])
    schema: Literal[1] = SCHEMA

    @property
    def gate(self) -> Gate:
        """What calls are gated by."""
        return Gate(
            dense_below=self.dense.below if self.dense else 0,
            flat_below=self.flat.below if self.flat else 0,
        )

    @property
    def key(self) -> str:
        """24 hex digits of problem and environment."""
        parts = [self.problem.said(), asdict(self.environment)]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def place(self) -> tuple[object, ...]:
        """Sorts the records of a file."""
        problem, own = self.problem, self.environment
        tensors = (problem.spec, problem.heads, problem.head_dim, problem.dtype, problem.digest)
        return *tensors, own.triton_numbers, own.policy, own.l2, *own.card

    def __str__(self) -> str:
        return f"{self.problem}; {self.environment}\n  {self.gate}, {self.provenance.date}"


ORDER = (
    *("schema", "problem", "environment", "dense", "flat"),
    *("lengths", "check", "provenance"),
)


def dump_gates(record: Gates) -> str:
    """A record as one line of JSON, the same each time.

    Raises:
        RecordError: a value that no line may have.
    """
    values = asdict(record)
    values["problem"] = record.problem.said()
    try:
        text = json.dumps({name: values[name] for name in ORDER}, allow_nan=False)
    except ValueError as error:
        raise RecordError("", str(error)) from error
    read_gates(text)
    return text


def read_gates(line: str | bytes) -> Gates:
    """The record of a line.

    Raises:
        RecordError: what is wrong with it, and in which field.
    """
    record = read_as(line, _adapter())
    for name, crossing in (("dense", record.dense), ("flat", record.flat)):
        if crossing and not crossing.least <= crossing.below <= crossing.most:
            within = f"{crossing.least} to {crossing.most}"
            raise RecordError(f"{name}.below", f"expected {within}, got {crossing.below}")
    if record.dense and record.flat and record.flat.below <= record.dense.below:
        expected = f"expected more than dense.below, {record.dense.below}"
        raise RecordError("flat.below", f"{expected}, got {record.flat.below}")
    tokens = [each.tokens for each in record.lengths]
    if tokens != sorted(set(tokens)):
        raise RecordError("lengths", f"expected tokens in ascending order, got {tokens}")
    return record


@functools.cache
def _adapter() -> TypeAdapter[Gates]:
    return TypeAdapter(Gates)


# --- where they are


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptGates:
    """A record, and where it is."""

    record: Gates
    file: Path
    line: int
    committed: bool

    @property
    def where(self) -> str:
        """As people write it."""
        return files.place(self.file, self.line, committed=self.committed)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatesContent:
    """What some files hold."""

    kept: tuple[KeptGates, ...] = ()
    flaws: tuple[Flaw, ...] = ()

    def __add__(self, other: GatesContent) -> GatesContent:
        return GatesContent(kept=self.kept + other.kept, flaws=self.flaws + other.flaws)


def gate_entries(gpu: str, spec: str) -> tuple[KeptGates, ...]:
    """Every record of a spec on a GPU: the cache's first, then the committed ones."""

    def reading() -> tuple[KeptGates, ...]:
        content = _cached(gpu, f"{spec}-") + _read_file(files.committed() / gpu / FILE)
        files.tell(content.flaws)
        return tuple(each for each in content.kept if each.record.problem.spec == spec)

    return files.remembered(("gates", gpu, spec), reading)


def read_gates_folder(folder: Path) -> GatesContent:
    """All records of a folder in the committed layout, or of one file if it is of them."""
    if folder.is_file():
        return _read_file(folder) if folder.name == FILE else GatesContent()
    content = GatesContent()
    for path in sorted(folder.glob(f"*/{FILE}")):
        content += _read_file(path)
    return content


def cached_gates() -> GatesContent:
    """All records of the cache."""
    content = GatesContent()
    for gpu in store.kinds(files.GATES):
        content += _cached(gpu, "")
    return content


def _read_file(path: Path) -> GatesContent:
    if not path.exists():
        return GatesContent()
    kept, flaws = files.read_lines(path, lambda line: _placed(read_gates(line), path.parent.name))
    made = (KeptGates(record=r, file=path, line=n, committed=True) for n, r in kept)
    return GatesContent(kept=tuple(made), flaws=tuple(flaws))


def _cached(gpu: str, prefix: str) -> GatesContent:
    content = GatesContent()
    for value in store.kept(f"{files.GATES}/{gpu}", prefix):
        path = value.path
        try:
            if value.problem:
                raise RecordError("", value.problem)
            record = _placed(read_gates(json.dumps(value.value)), gpu)
            if path.stem != f"{record.problem.spec}-{record.key}":
                expected = f"{record.problem.spec}-{record.key}"
                raise RecordError("", f"expected the file to be called {expected}")
        except RecordError as error:
            flaw = Flaw(file=path, line=1, field=error.field, message=error.message)
            content += GatesContent(flaws=(flaw,))
        else:
            kept = KeptGates(record=record, file=path, line=1, committed=False)
            content += GatesContent(kept=(kept,))
    return content


def _placed(record: Gates, gpu: str) -> Gates:
    """A record, if it is of the GPU that its place says."""
    if record.environment.gpu != gpu:
        raise RecordError(
            "environment.gpu",
            f"expected {gpu!r}, as its file's place says, got {record.environment.gpu!r}",
        )
    return record


def publish_gates(record: Gates) -> Path | None:
    """Keep a record in the cache, where calls find it that start to look from now on.

    Returns:
        Its file; None if no disk would take it.
    """
    value = json.loads(dump_gates(record))
    name = f"{record.problem.spec}-{record.key}"
    path = store.keep(f"{files.GATES}/{record.environment.gpu}", name, value)
    files.forget()
    return path


def write_gates(folder: Path, records: Iterable[Gates]) -> tuple[Path, ...]:
    """Write the files of these records whole, in the committed layout; returns those that changed.

    Raises:
        HsgenError: the folder cannot be written.
    """
    by_file = dict[Path, list[Gates]]()
    for record in records:
        by_file.setdefault(folder / record.environment.gpu / FILE, []).append(record)
    changed: list[Path] = []
    for path, held in sorted(by_file.items()):
        lines = [dump_gates(record) for record in sorted(held, key=lambda each: each.place)]
        if files.write_lines(path, lines):
            changed.append(path)
    return tuple(changed)


def merge_gates(records: Iterable[Gates]) -> tuple[Gates, ...]:
    """One record a key, the newest: crossovers are of the kernels of their day."""
    newest = dict[str, Gates]()
    for record in sorted(records, key=lambda each: (each.provenance.date, dump_gates(each))):
        newest[record.key] = record
    return tuple(sorted(newest.values(), key=lambda each: each.place))


# --- which one a call gets


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGates:
    """What calls of a problem are gated by, and where that came from."""

    gate: Gate
    rung: GateRung
    kept: KeptGates | None
    problem: Problem
    environment: Environment

    @property
    def origin(self) -> str:
        """In words, for `explain`."""
        if self.kept is None:
            return "no crossover was measured"
        own = self.kept.record.environment
        words = {
            "other Triton": f"measured with Triton {own.triton}",
            "other GPU": f"measured on {own.gpu}",
        }
        return f"{words.get(self.rung, 'measured')}; {self.kept.where}"

    @property
    def note(self) -> str:
        """One line where less is known than could be measured; empty where all is."""
        if self.rung == "exact":
            return ""
        asked = f"{self.problem} on {self.environment.gpu}, Triton {self.environment.triton}"
        gated = f"{self.gate}" if self.kept else "no call is gated"
        return f"{asked}: {self.origin}, so {gated}; hsgen gate {self.problem.spec}"

    def tell(self) -> None:
        """Log the note, once for a problem and an environment."""
        key = (self.problem, self.environment)
        if self.note and key not in _told:
            _told.add(key)
            level = logging.INFO if self.kept else logging.WARNING
            logging.getLogger("hsgen").log(level, "%s", self.note)

    def record(self) -> dict[str, object]:
        """The same for machines."""
        gate = asdict(self.gate)
        return {"rung": self.rung, **gate, "where": self.kept.where if self.kept else None}

    def __str__(self) -> str:
        return f'gate="measured": {self.gate}  ({self.origin})'


_told = set[tuple[Problem, Environment]]()


def crossovers(problem: Problem, environment: Environment) -> FoundGates:
    """The measured gate of a problem; on the last rung one that never gates."""
    key = ("crossovers", problem, environment)
    return files.remembered(key, lambda: _crossovers(problem, environment))


def _crossovers(problem: Problem, environment: Environment) -> FoundGates:
    found = list[tuple[GateRung, KeptGates]]()
    for gpu in files.gpus():
        for kept in gate_entries(gpu, problem.spec):
            rung = _rung(kept.record, problem, environment)
            if rung is not None:
                found.append((rung, kept))
    found.sort(key=lambda x: (x[1].record.provenance.date, not x[1].committed), reverse=True)
    found.sort(key=lambda x: _closeness(*x, environment))
    best = found[0] if found else None
    return FoundGates(
        gate=best[1].record.gate if best else Gate(),
        rung=best[0] if best else "none",
        kept=best[1] if best else None,
        problem=problem,
        environment=environment,
    )


def _rung(record: Gates, problem: Problem, environment: Environment) -> GateRung | None:
    own = record.environment
    if record.problem != problem or own.sm != environment.sm:
        return None
    if own.card != environment.card:
        return "other GPU"
    return "exact" if own.triton == environment.triton else "other Triton"


def _closeness(rung: GateRung, kept: KeptGates, environment: Environment) -> tuple[object, ...]:
    own = kept.record.environment
    newest = tuple(-number for number in own.triton_numbers)
    processors = abs(own.processors - environment.processors)
    timed = (own.policy != environment.policy) + (own.l2 != environment.l2)
    return (
        GATE_RUNGS.index(rung),
        processors,
        own.gpu,
        own.triton != environment.triton,
        newest,
        timed,
    )


# --- in words


@dataclass(frozen=True, slots=True, kw_only=True)
class GatesListing:
    """Records, a line each."""

    kept: tuple[KeptGates, ...]

    def record(self) -> list[dict[str, object]]:
        """The same for machines."""
        return [{"where": each.where, **asdict(each.record)} for each in self.kept]

    def __str__(self) -> str:
        lines = [
            f"{each.record.environment.gpu}, Triton {each.record.environment.triton}: "
            f"{each.record.problem}: {each.record.gate}  ({each.where})"
            for each in self.kept
        ]
        return "".join(f"{line}\n" for line in ("gates", *lines)) if lines else ""


def gates_listing(kept: Sequence[KeptGates], *, spec: str | None, gpu: str | None) -> GatesListing:
    """The records of one spec, or on one GPU, or all."""
    chosen = [
        each
        for each in kept
        if spec in (None, each.record.problem.spec) and gpu in (None, each.record.environment.gpu)
    ]
    chosen.sort(key=lambda each: (each.record.environment.gpu, each.record.place))
    return GatesListing(kept=tuple(chosen))
