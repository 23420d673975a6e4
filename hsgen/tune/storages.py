"""Where studies are: a journal file, a database, a server that stands before one, or memory.

A lock of a journal ends with the process that holds it, and whoever gets it next cuts off the line
that a killed one left half written.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from hsgen.errors import HsgenError

TRIES = 3  # of opening: those who make the tables of a new database at once are in each other's way
READY_SECONDS = 10.0
PORT = 13000  # of Optuna's proxy, unless it is said
CLUSTER = 'pip install "hsgen[tune-cluster]"'
DRIVERS = ("grpc", "sqlalchemy", "psycopg", "psycopg2", "sqlite3")


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
    """A journal file, a URL of a database, grpc://host:port of Optuna's proxy, or memory.

    Raises:
        HsgenError: it cannot be opened.
    """
    if place is None:
        return InMemoryStorage()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return _opened(place)
    except Exception as error:
        missing = isinstance(error, ImportError)
        raise HsgenError(
            f"cannot open the studies at {shown(place)}: {_short(error)}",
            help=f"{CLUSTER} brings what PostgreSQL and gRPC need" if missing else None,
        ) from error


def _opened(place: Path | str) -> BaseStorage:
    if isinstance(place, Path) or "://" not in place:
        return _journal(Path(place))
    if place.startswith("grpc://"):
        return _proxy(place)
    left = TRIES
    while True:
        try:
            return get_storage(RDBStorage(_url(place), engine_kwargs=_engine(place)))
        except ImportError:
            raise
        except Exception:
            left -= 1
            if not left:
                raise
            time.sleep(random.uniform(0.1, 0.5))


def _journal(file: Path) -> BaseStorage:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("ab"):  # a file, and ours to write
        pass
    return JournalStorage(JournalFileBackend(str(file), lock_obj=Lock(file)))


def _proxy(url: str) -> BaseStorage:
    made = getattr(optuna.storages, "GrpcStorageProxy", None)
    if made is None:
        raise HsgenError("Optuna has gRPC from 4.2 on")
    parts = urlsplit(url)
    with warnings.catch_warnings():  # all of it is experimental still
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = made(host=parts.hostname or "localhost", port=parts.port or PORT)
        proxy.wait_server_ready(timeout=READY_SECONDS)
    return proxy


def _url(url: str) -> str:
    """With the driver that the extra brings, where the URL names none."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)


def _engine(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}  # for the others' turns
    return {"pool_pre_ping": True}  # a server may be started anew


def shown(place: Path | str) -> str:
    """A place without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", str(place))


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return next((line for line in text.splitlines() if line.strip()), text)[:300]


@contextmanager
def reached(place: Path | str) -> Generator[None, None, None]:
    """Say of a storage that went away what becomes of results.

    Raises:
        HsgenError: it did.
    """
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in DRIVERS and not isinstance(error, StorageInternalError):
            raise
        raise HsgenError(
            f"the studies at {shown(place)} cannot be reached any more: {_short(error)}",
            help="what was kept is there; once they can be, run the same command",
        ) from error
