"""Folders of files that many processes share: content-addressed, hash-checked, published by rename.

    <root>/<kind>/<name>-<digest12>/{manifest.json, files}     an entry; never changed once there
    <root>/<kind>/by-key/<sha256 of the key>.json              the entry that a key last led to
    <root>/quarantine/                                         damaged entries, a few, for study
    <root>/<kind>/.../<name>.json                              a value; replaced whole, the last wins

No lock guards correctness: every writer makes its own whole folder and renames it; the first rename
wins and the rest adopt it.  What cannot be written is warned about once and kept elsewhere: in a
private temporary folder, or in memory.  What others could have written is never read.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from hsgen import paths
from hsgen.errors import BuildError

Scalar = str | int | float | bool | None
Key = Mapping[str, "Scalar | list[Scalar] | Key"]

MANIFEST = "manifest.json"
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
FILE = re.compile(r"_{0,2}[a-z][a-z0-9_]{0,63}\.(py|json|txt|yaml|bin)")
VALUE = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_FILE = 16 * 1024**2
MAX_QUARANTINE = 16
STALE_SECONDS = 3600.0
PRIVATE_SECONDS = 86400.0
ATTEMPTS = 8
# Another process was first, removed the folder under us, or a network file system hesitates.
AGAIN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR, errno.EBUSY, errno.ESTALE}

_lock = threading.Lock()
_warned: set[str] = set()
_private: dict[int, Path | None] = {}  # by process: a forked child makes its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Verified files under a name; `directory` is None when no disk would take them."""

    name: str
    digest: str
    files: Mapping[str, bytes] = field(repr=False)
    key: Key = field(repr=False)
    directory: Path | None

    @property
    def label(self) -> str:
        """The folder's name: readable first, then enough of the digest."""
        return _label(self.name, self.digest)


class DamagedError(Exception):
    """An entry whose bytes are not those of its manifest."""


class UntrustedError(OSError):
    """A folder that someone else owns or may write."""


def publish(kind: str, name: str, files: Mapping[str, bytes], key: Key) -> Entry:
    """Store files, or adopt the same ones that are already there.

    Never fails for a reason of the disk: the entry then lives in a private temporary folder, or
    has no directory.

    Raises:
        BuildError: an unsafe name, here or among the files.
    """
    _check_names(name, files)
    digest = _digest(name, _hashes(files), key)
    entry = Entry(name=name, digest=digest, files=dict(files), key=key, directory=None)
    for root in _roots(make=True):
        try:
            directory = _publish_at(root, kind, entry)
        except OSError as error:
            _warn(f"cannot use the cache {root}: {error}; continuing without it")
            continue
        with contextlib.suppress(OSError):  # without the pointer the next process builds again
            _remember(root / kind, entry)
        return replace(entry, directory=directory)
    return entry


def find(kind: str, key: Key) -> Entry | None:
    """The entry last published under this key, verified; None is a miss, whatever the reason."""
    for root in _roots(make=False):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            with _trusted(root / kind / "by-key") as folder:
                pointer = json.loads(_read(folder, f"{_key_hash(key)}.json"))
            label = _label(pointer["name"], pointer["digest"])
            entry = _open_or_quarantine(root, root / kind / label)
            if entry is not None and entry.digest == pointer["digest"]:
                return entry if _canonical(entry.key) == _canonical(key) else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A value that was kept, or why its file cannot be read."""

    path: Path
    value: object = field(repr=False)
    problem: str = ""


def keep(kind: str, name: str, value: Mapping[str, object]) -> Path | None:
    """Write a value as one file of the folders `kind`, a/b/c; what was there before is gone.

    Returns:
        The file; None if no disk would take it.

    Raises:
        BuildError: an unsafe name.
    """
    if not all(VALUE.fullmatch(part) for part in (name, *kind.split("/"))):
        raise BuildError(f"expected names of letters, digits, - and _, got {kind}/{name}")
    hashed = {"sha256": hashlib.sha256(_canonical(value)).hexdigest(), "value": value}
    data = json.dumps(hashed, allow_nan=False).encode() + b"\n"
    for root in _roots(make=True):
        try:
            folder = root
            for part in ("", *kind.split("/")):
                folder = folder / part
                _ensure_directory(folder)
            _sweep(folder)
            _replace(folder, f"{name}.json", data)
        except OSError as error:
            _warn(f"cannot use the cache {root}: {error}; continuing without it")
            continue
        return folder / f"{name}.json"
    return None


def kept(kind: str, prefix: str = "") -> Iterator[Kept]:
    """The values under `kind` whose names start so, by name; each hash checked.  Never fails."""
    for root in _roots(make=False):
        with contextlib.suppress(OSError), _trusted(root.joinpath(*kind.split("/"))) as folder:
            for name in sorted(_names(folder)):
                if not (name.startswith(prefix) and name.endswith(".json")):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed since
                    yield _kept(root.joinpath(*kind.split("/"), name), folder)


def kinds(kind: str) -> list[str]:
    """The folders below `kind`."""
    found = set[str]()
    for root in _roots(make=False):
        with contextlib.suppress(OSError), _trusted(root.joinpath(*kind.split("/"))) as folder:
            found |= {name for name in _names(folder) if VALUE.fullmatch(name)}
    return sorted(found)


def _names(folder: int) -> list[str]:
    return os.listdir(folder)


def _kept(path: Path, folder: int) -> Kept:
    try:
        hashed = json.loads(_read(folder, path.name))
        value = hashed["value"]
        whole = hashlib.sha256(_canonical(value)).hexdigest() == hashed["sha256"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return Kept(path=path, value=None, problem=f"unreadable: {type(error).__name__}: {error}")
    return Kept(path=path, value=value, problem="" if whole else "sha256: the value was edited")


def read(directory: Path) -> Entry:
    """Read one entry whole, once, and check every hash.

    Raises:
        DamagedError: torn, edited, truncated, or not an entry at all.
        OSError: no such folder; UntrustedError: others own it or may write it.
    """
    with _trusted(directory) as folder:
        name, digest, key, hashes = _read_manifest(directory, folder)
        files = {file: _read_checked(directory, folder, file, hashes[file]) for file in hashes}
    return Entry(name=name, digest=digest, files=files, key=key, directory=directory)


def _read_manifest(directory: Path, folder: int) -> tuple[str, str, Key, dict[str, str]]:
    try:
        manifest = json.loads(_read(folder, MANIFEST))
        name, digest, key = manifest["name"], manifest["digest"], manifest["key"]
        hashes = cast("dict[str, str]", manifest["files"])
        _check_names(name, hashes)
        whole = _digest(name, hashes, key) == digest and directory.name == _label(name, digest)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, BuildError) as error:
        raise DamagedError(f"{directory}: no readable {MANIFEST}") from error
    if not whole:
        raise DamagedError(f"{directory}: {MANIFEST} was edited")
    return name, digest, key, hashes


def private_directory() -> Path | None:
    """A temporary folder (0700) of this process, made on first use; None if no disk takes one."""
    with _lock:
        if os.getpid() not in _private:
            _private[os.getpid()] = _make_private_directory()
        return _private[os.getpid()]


def _make_private_directory() -> Path | None:
    try:
        directory = Path(tempfile.mkdtemp(prefix=f"hsgen-{os.getpid()}-")).resolve()
    except OSError:
        return None
    _sweep_private(directory.parent)
    atexit.register(_remove_own, os.getpid(), directory)
    return directory


def _sweep_private(folder: Path) -> None:
    """Delete the temporary folders of processes that were killed a day ago or more."""
    with contextlib.suppress(OSError):
        for directory in folder.glob("hsgen-[0-9]*-*"):
            status, pid = directory.lstat(), directory.name.split("-")[1]
            old = time.time() - status.st_mtime > PRIVATE_SECONDS
            if old and status.st_uid == os.geteuid() and pid.isdigit() and not _alive(int(pid)):
                _remove(directory)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove_own(pid: int, directory: Path) -> None:
    if os.getpid() == pid:  # a forked child must not delete its parent's folder
        _remove(directory)


def _roots(*, make: bool) -> Iterator[Path]:
    """Where entries may be: the cache, then this process's temporary folder if there is one."""
    yield _follow_own_link(paths.cache_dir())
    private = private_directory() if make else _private.get(os.getpid())
    if private is not None:
        yield private


def _follow_own_link(root: Path) -> Path:
    """People link their caches to larger disks; a link that someone else made stays unfollowed."""
    with contextlib.suppress(OSError):
        if root.is_symlink() and root.lstat().st_uid == os.geteuid():
            return root.resolve()
    return root


def _publish_at(root: Path, kind: str, entry: Entry) -> Path:
    final = root / kind / entry.label
    for attempt in range(ATTEMPTS):
        found = _open_or_quarantine(root, final)
        if found is not None and found.digest == entry.digest:
            return final
        try:
            _ensure_directory(root)
            _ensure_directory(root / kind)
            _write_entry(root / kind, final, entry)
        except OSError as error:
            if error.errno not in AGAIN or attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.002 * attempt)
    raise OSError(f"{final} keeps changing")


def _open_or_quarantine(root: Path, directory: Path) -> Entry | None:
    """Read an entry; set a damaged one aside, with one warning.  None if there is none (now)."""
    try:
        seen = os.lstat(directory)
        _check_trusted(root)
        _check_trusted(directory.parent)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISDIR(seen.st_mode):
            raise DamagedError(f"{directory}: not a folder")
        return read(directory)
    except FileNotFoundError:
        return None  # another process set it aside between our two looks
    except DamagedError as error:
        if _quarantine(root, directory, seen):
            _warn(f"damaged cache entry set aside and rebuilt: {error}")
        return None


def _quarantine(root: Path, directory: Path, seen: os.stat_result) -> bool:
    """Move a damaged entry away, unless another process already did; False if so."""
    yard = root / "quarantine"
    _ensure_directory(yard)
    try:
        now = os.lstat(directory)
        if (now.st_ino, now.st_dev) != (seen.st_ino, seen.st_dev):
            return False
        directory.rename(yard / f"{directory.name}-{uuid.uuid4().hex[:8]}")
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):
        kept = sorted(yard.iterdir(), key=lambda path: path.lstat().st_mtime)
        for path in kept[:-MAX_QUARANTINE]:
            _remove(path)
    return True


def _write_entry(folder: Path, final: Path, entry: Entry) -> None:
    """Write a whole folder beside its place, make it durable, and rename it into place."""
    manifest = {
        "name": entry.name,
        "digest": entry.digest,
        "key": entry.key,
        "files": _hashes(entry.files),
    }
    _sweep(folder)
    draft = folder / _temporary_name()
    draft.mkdir(mode=0o700)
    try:
        for file, data in entry.files.items():
            _write(draft / file, data)
        _write(draft / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
        _sync(draft)
        draft.rename(final)
        _sync(folder)
    finally:
        _remove(draft)


def _remember(folder: Path, entry: Entry) -> None:
    """Point the key at the entry, atomically; an equal pointer is left alone."""
    text = json.dumps({"name": entry.name, "digest": entry.digest}).encode()
    index = folder / "by-key"
    _ensure_directory(index)
    pointer = index / f"{_key_hash(entry.key)}.json"
    with contextlib.suppress(OSError), _trusted(index) as opened:
        if _read(opened, pointer.name) == text:
            return
    _replace(index, pointer.name, text)


def _replace(folder: Path, file: str, data: bytes) -> None:
    """Put a whole file into its place, atomically."""
    draft = folder / _temporary_name()
    try:
        _write(draft, data)
        draft.replace(folder / file)
    finally:
        _remove(draft)


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems cannot sync a folder; the files themselves are synced.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: int, file: str) -> bytes:
    """Read a regular file of a folder, following no link and waiting for nothing."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block
    descriptor = os.open(file, flags, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise OSError(f"{file}: not a regular file of at most {MAX_FILE} bytes")
        return stream.read()


def _read_checked(directory: Path, folder: int, file: str, expected: str) -> bytes:
    try:
        data = _read(folder, file)
    except OSError as error:
        raise DamagedError(f"{directory / file}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise DamagedError(f"{directory / file}: expected sha256 {expected[:12]}, got other bytes")
    return data


@contextlib.contextmanager
def _trusted(directory: Path) -> Generator[int, None, None]:
    """Open a folder that is ours alone to write, and no link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory, flags)
    try:
        _check_owner(directory, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def _check_trusted(directory: Path) -> None:
    with _trusted(directory):
        pass


def _check_owner(directory: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise UntrustedError(f"{directory} belongs to uid {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise UntrustedError(f"{directory} is writable by others ({mode:o}); chmod go-w it")


def _ensure_directory(directory: Path) -> None:
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    _check_trusted(directory)


def _sweep(folder: Path) -> None:
    """Delete the drafts of processes that were killed; a living one is far younger."""
    with contextlib.suppress(OSError):
        for draft in folder.glob(".tmp-*"):
            if time.time() - draft.lstat().st_mtime > STALE_SECONDS:
                _remove(draft)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary_name() -> str:
    host = re.sub(r"[^a-zA-Z0-9]", "", socket.gethostname())[:32]
    return f".tmp-{host}-{os.getpid()}-{uuid.uuid4().hex}"


def _check_names(name: str, files: Mapping[str, bytes] | Mapping[str, str]) -> None:
    if not NAME.fullmatch(name):
        raise BuildError(f"name must be an identifier of at most 64 characters, got {name!r}")
    for file in files:
        if not FILE.fullmatch(file) or file == MANIFEST:
            raise BuildError(f"file name must be an identifier and a known suffix, got {file!r}")


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {file: hashlib.sha256(files[file]).hexdigest() for file in sorted(files)}


def _digest(name: str, hashes: Mapping[str, str], key: Key) -> str:
    content = {"name": name, "files": dict(hashes), "key": key}
    return hashlib.sha256(_canonical(content)).hexdigest()


def _key_hash(key: Key) -> str:
    return hashlib.sha256(_canonical(key)).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _label(name: str, digest: str) -> str:
    if not NAME.fullmatch(name) or not DIGEST.fullmatch(digest):
        raise ValueError("not an entry's name and digest")
    return f"{name}-{digest[:12]}"


def _warn(message: str) -> None:
    """Warn once a process about each kind of trouble, not once a kernel."""
    kind = message.split(":", maxsplit=1)[0]
    with _lock:
        if kind in _warned:
            return
        _warned.add(kind)
    warnings.warn(message, RuntimeWarning, stacklevel=4)
