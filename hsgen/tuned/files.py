"""Where records are: the committed folder, one file a GPU and spec, and the cache, one file a record.

    tuned/<gpu>/<spec>.jsonl                          a line a record, sorted by `Tuned.place`
    <cache>/tuned/v1/<gpu>/<spec>-<key>.json          atomic, hash-checked

Files are read when something asks for their GPU and spec, once a process.  What is no record is
warned about, with file, line and field, and is as if it were not there.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import yaml

from hsgen import build, paths, store
from hsgen.errors import HsgenError, printable
from hsgen.target import TARGETS, Target
from hsgen.tuned.records import Environment, RecordError, Tuned, dump, read

KIND = "tuned/v1"
GATES = "gates/v1"
SUFFIX = ".jsonl"
OTHERS = "_"  # begins the names of files of other records, and of no spec
INTERPRETER = "interpreter"  # as a GPU: its records say nothing of any other
MAX_FILE = 64 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A record, and where it is."""

    record: Tuned
    file: Path
    line: int
    committed: bool

    @property
    def where(self) -> str:
        """As people write it."""
        return place(self.file, self.line, committed=self.committed)


def place(file: Path, line: int, *, committed: bool) -> str:
    """Where a record is, as people write it."""
    if committed:
        return f"{file.parent.parent.name}/{file.parent.name}/{file.name}:{line}"
    return f"cache {file.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaw:
    """A line that is no record of its file."""

    file: Path
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {printable(self.message)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What some files hold."""

    kept: tuple[Kept, ...] = ()
    flaws: tuple[Flaw, ...] = field(default=())

    def __add__(self, other: Content) -> Content:
        return Content(kept=self.kept + other.kept, flaws=self.flaws + other.flaws)


# --- GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """An entry of gpus.yaml."""

    id: str
    names: tuple[str, ...]
    sm: str
    processors: int
    shared_memory: int

    @property
    def card(self) -> tuple[str, str, int, int]:
        return self.id, self.sm, self.processors, self.shared_memory


def known_gpus() -> Mapping[str, Gpu]:
    """The GPUs of gpus.yaml by canonical name; none, and a warning, where it cannot be read."""
    return remembered(("known gpus",), _known_gpus)


def _known_gpus() -> Mapping[str, Gpu]:
    path = committed() / "gpus.yaml"
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {
            id: Gpu(
                id=id,
                names=tuple(entry["names"]),
                sm=entry["sm"],
                processors=entry["processors"],
                shared_memory=entry["shared_memory"],
            )
            for id, entry in listed.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        _warn(f"{path}: cannot be read, so GPUs go by their drivers' names: {error}")
        return {}


def gpu_id(name: str) -> str:
    """The canonical name of what people or a driver call a GPU."""
    wanted = _normal(name)
    for gpu in known_gpus().values():
        if wanted in (_normal(gpu.id), *map(_normal, gpu.names)):
            return gpu.id
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")
    return slug[:64].strip("-") or "unknown"


@functools.lru_cache(maxsize=64)
def environment(target: Target, *, interpreted: bool = False) -> Environment:
    """What calls on a GPU are looked up by; those in Triton's interpreter have an entry of their own."""
    found = re.findall(r"\d+", build.triton_version(target.backend).split()[1])
    return Environment(
        gpu=INTERPRETER if interpreted else gpu_id(target.name),
        sm=INTERPRETER if interpreted else target.label,
        processors=target.sms,
        shared_memory=target.smem_per_block,
        triton=f"{found[0]}.{found[1]}",
    )


def target_of(card: Environment | Gpu) -> Target:
    """The GPU of a record, as far as kernels' texts and limits depend on it.

    Raises:
        HsgenError: an architecture that hsgen knows nothing of.
    """
    name = card.gpu if isinstance(card, Environment) else card.id
    bases = [target for target in TARGETS if target.label == card.sm]
    if not bases:
        known = ", ".join(sorted({target.label for target in TARGETS}))
        raise HsgenError(f"environment.sm: expected one of {known}, got {card.sm}")
    same = [target for target in bases if gpu_id(target.name) == name]
    base = (same or bases)[0]
    return replace(base, sms=card.processors, smem_per_block=card.shared_memory)


def _normal(text: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", text.lower())
    return re.sub(r"^(nvidia|amd)?(geforce|instinct)?(?=.)", "", letters)


# --- reading


@functools.cache
def committed() -> Path:
    """The folder that hsgen ships."""
    return paths.data_dir("tuned")


_lock = threading.Lock()
_memory: dict[tuple[object, ...], object] = {}


def entries(gpu: str, spec: str) -> tuple[Kept, ...]:
    """Every record of a spec on a GPU: the cache's first, then the committed ones."""

    def reading() -> tuple[Kept, ...]:
        path = committed() / gpu / f"{spec}{SUFFIX}"
        content = _cached(gpu, f"{spec}-")
        content += read_file(path) if path.exists() else Content()
        tell(content.flaws)
        return tuple(each for each in content.kept if each.record.problem.spec == spec)

    return remembered(("entries", gpu, spec), reading)


def gpus() -> tuple[str, ...]:
    """Every GPU that has records."""

    def reading() -> tuple[str, ...]:
        folders = (path.name for path in committed().glob("*/") if not path.name.startswith("."))
        return tuple(sorted({*folders, *store.kinds(KIND), *store.kinds(GATES)}))

    return remembered(("gpus",), reading)


def remembered(key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What `make` found for these folders, from memory after the first time."""
    whole = _whole(key)
    found = _memory.get(whole, _memory)
    if found is _memory:
        made = make()
        with _lock:
            found = _memory.setdefault(whole, made)
    return cast("T", found)


def recall(key: tuple[object, ...]) -> object:
    """What `remember` was told since files were read; else None."""
    return _memory.get(_whole(key))


def remember(key: tuple[object, ...], value: object) -> None:
    """Until files are read again."""
    with _lock:
        _memory[_whole(key)] = value


def _whole(key: tuple[object, ...]) -> tuple[object, ...]:
    return committed(), paths.cache_dir(), *key


def forget() -> None:
    """Read files again."""
    with _lock:
        _memory.clear()


def read_folder(folder: Path) -> Content:
    """All records of a folder in the committed layout, or of one of its files; none of gates."""
    if folder.is_file():
        return Content() if folder.name.startswith(OTHERS) else read_file(folder)
    content = Content()
    for path in sorted(folder.glob(f"*/[!{OTHERS}]*{SUFFIX}")):
        content += read_file(path)
    return content


def read_file(path: Path) -> Content:
    """The records of one file, each with its line; its name and its folder's say of what."""

    def reading(line: bytes) -> Tuned:
        record = read(line)
        _check_place(record, path.parent.name, path.stem)
        return record

    kept, flaws = read_lines(path, reading)
    made = (Kept(record=record, file=path, line=n, committed=True) for n, record in kept)
    return Content(kept=tuple(made), flaws=tuple(flaws))


def read_lines(path: Path, reading: Callable[[bytes], T]) -> tuple[list[tuple[int, T]], list[Flaw]]:
    """What a file's lines say, each with its number; and those that say nothing."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise OSError(f"expected at most {MAX_FILE} bytes")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return [], [Flaw(file=path, line=1, field="", message=f"cannot be read: {error}")]
    kept, flaws = list[tuple[int, T]](), list[Flaw]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kept.append((number, reading(line)))
        except RecordError as error:
            flaws.append(Flaw(file=path, line=number, field=error.field, message=error.message))
    return kept, flaws


def cached() -> Content:
    """All records of the cache."""
    content = Content()
    for gpu in store.kinds(KIND):
        content += _cached(gpu, "")
    return content


def _cached(gpu: str, prefix: str) -> Content:
    content = Content()
    for value in store.kept(f"{KIND}/{gpu}", prefix):
        content += _checked(value, gpu)
    return content


def _checked(value: store.Kept, gpu: str) -> Content:
    """One file of the cache."""
    path = value.path
    try:
        if value.problem:
            raise RecordError("", value.problem)
        record = read(json.dumps(value.value))
        _check_place(record, gpu, path.stem.rpartition("-")[0])
        if path.stem.rpartition("-")[2] != record.key:
            raise RecordError("", f"expected the key {record.key} in the file's name")
    except RecordError as error:
        flaw = Flaw(file=path, line=1, field=error.field, message=error.message)
        return Content(flaws=(flaw,))
    return Content(kept=(Kept(record=record, file=path, line=1, committed=False),))


def _check_place(record: Tuned, gpu: str, spec: str) -> None:
    """That a record is of the GPU and the spec that its place says."""
    for where, expected, got in (
        ("environment.gpu", gpu, record.environment.gpu),
        ("problem.spec", spec, record.problem.spec),
    ):
        if expected != got:
            raise RecordError(
                where, f"expected {expected!r}, as its file's place says, got {got!r}"
            )


def tell(flaws: Iterable[Flaw]) -> None:
    """One warning a file."""
    by_file = dict[Path, list[Flaw]]()
    for flaw in flaws:
        by_file.setdefault(flaw.file, []).append(flaw)
    for found in by_file.values():
        more = f" (and {len(found) - 1} more lines)" if len(found) > 1 else ""
        _warn(f"{found[0]}{more}; ignored")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


# --- writing


def publish(record: Tuned) -> Path | None:
    """Keep a record in the cache, where every process finds it that starts to look from now on.

    Returns:
        Its file; None if no disk would take it.

    Raises:
        RecordError: a record that could not be read again.
    """
    value = json.loads(dump(record))
    environment, spec = record.environment, record.problem.spec
    path = store.keep(f"{KIND}/{environment.gpu}", f"{spec}-{record.key}", value)
    forget()
    return path


def write(folder: Path, records: Iterable[Tuned]) -> tuple[Path, ...]:
    """Write the files of these records whole, in the committed layout; returns those that changed.

    Raises:
        HsgenError: the folder cannot be written.
    """
    files = dict[Path, list[Tuned]]()
    for record in records:
        path = folder / record.environment.gpu / f"{record.problem.spec}{SUFFIX}"
        files.setdefault(path, []).append(record)
    return tuple(path for path, held in sorted(files.items()) if _written(path, held))


def _written(path: Path, records: Iterable[Tuned]) -> bool:
    return write_lines(path, map(dump, sorted(records, key=lambda each: each.place)))


def write_lines(path: Path, lines: Iterable[str]) -> bool:
    """Write a file whole; whether that changed it.

    Raises:
        HsgenError: it cannot be written.
    """
    text = "".join(f"{line}\n" for line in lines)
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError as error:
        raise HsgenError(
            f"{path}: cannot write these records: {error.strerror or error}"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    forget()
    return True
