"""Files of peers as modules: read where they were checked out or installed, never copied.

Their asserts, which admit 16-bit tensors only, are compiled away, and what they import and cannot be had
here is stood in for.  Compares nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

from torch.overrides import TorchFunctionMode

from benchmarks.common import Json

# What cannot be imported here: names in a module, which do nothing, or a module.
Missing = tuple[str, ...] | ModuleType


class OnCPU(TorchFunctionMode):
    """`device="cuda"` is written into some of them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wanted = dict(kwargs or {})
        if wanted.get("device") == "cuda":
            wanted["device"] = "cpu"
        return func(
            *("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args), **wanted
        )


# --- where they are


def origin(repository: str, package: str, sources: Path) -> tuple[Path, Json]:
    """The folder that a peer's files are in, and which version of it that is."""
    if package:
        (found,) = importlib.metadata.distributions(name=package, path=[str(sources)])
        return sources, {"package": package, "version": found.version}
    checkout = sources / repository.split("/")[1]
    return checkout, {"repository": repository, "commit": commit(checkout)}


def commit(checkout: Path) -> str:
    """Which version of a peer was read: a file COMMIT says so where a checkout came without its history."""
    if (written := checkout / "COMMIT").exists():
        return written.read_text().strip()
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# --- what they say


def modules(
    checkout: Path, files: Sequence[str], missing: Mapping[str, Missing]
) -> dict[str, ModuleType]:
    """Files in order, each of which may import those before it.

    They are found by every end of their path: some import by all of it, some from beside them.
    """
    made: dict[str, ModuleType] = {}
    for file in files:
        found = {name: module for name, module in made.items() if "." in name}
        found |= stand_ins(missing)
        with OnCPU():
            module = read(checkout / file, _packages(found) | found)
        parts = file.removesuffix(".py").split("/")
        made |= {".".join(parts[i:]): module for i in range(len(parts))}
    return made


def imported(
    checkout: Path,
    name: str,
    bare: Sequence[str] = (),
    missing: Mapping[str, Missing] | None = None,
) -> ModuleType:
    """A module of a peer by Python's own import, asserts and all: for kernels that are timed.

    Args:
        checkout: the folder that its packages are in.
        name: of the module.
        bare: packages above it that are entered without their `__init__`, which would import everything.
        missing: what it imports; stood in for while it is imported, where it cannot be had.
    """
    sys.path.insert(0, str(checkout))
    for package in bare:
        module = ModuleType(package)
        module.__path__ = [str(checkout / package.replace(".", "/"))]
        module.__version__ = "0"  # type: ignore[attr-defined]  # some ask for it
        sys.modules.setdefault(package, module)
    try:
        absent = {each: instead for each, instead in (missing or {}).items() if _absent(each)}
        with _there(stand_ins(absent)):
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))


def read(path: Path, found: Mapping[str, ModuleType]) -> ModuleType:
    """A peer's file as a module, without its asserts; it imports what is `found` by name."""
    made = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(f"peer_{path.stem}", loader=None)
    )
    made.__package__ = path.parent.name  # for what they import from beside it
    with _there({**found, made.__name__: made}):  # dataclasses look for their module
        exec(compile(path.read_text(), str(path), "exec", optimize=1), made.__dict__)
    return made


def _absent(name: str) -> bool:
    """Whether a module cannot be had."""
    try:
        return importlib.util.find_spec(name) is None
    except (ModuleNotFoundError, ValueError):  # of a package above it; of what has no spec
        return True


@contextlib.contextmanager
def _there(found: Mapping[str, ModuleType]) -> Iterator[None]:
    """Modules that can be imported within."""
    replaced = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    try:
        yield
    finally:
        for name, old in replaced.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def stand_ins(missing: Mapping[str, Missing]) -> dict[str, ModuleType]:
    """Modules that do nothing, or what is given, by name, and the packages that they are in."""
    found = {
        name: instead if isinstance(instead, ModuleType) else empty(name, instead)
        for name, instead in missing.items()
    }
    return _packages(found) | found


def empty(name: str, names: Iterable[str]) -> ModuleType:
    """A module whose names do nothing."""
    module = ModuleType(name)
    for each in names:
        setattr(module, each, MagicMock())
    return module


def _packages(names: Iterable[str]) -> dict[str, ModuleType]:
    """The packages that modules are in, of which nothing else is had, unless they are imported already."""
    parts = [name.split(".") for name in names]
    above = {".".join(part[:n]) for part in parts for n in range(1, len(part))}
    return {name: ModuleType(name) for name in above if name not in sys.modules}
