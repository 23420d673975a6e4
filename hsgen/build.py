"""Emitted source text on disk, then imported: one package a spec, shared by every process.

`store` keeps the files whole; this module says which text may be imported at all, and imports
exactly the bytes that were checked: no byte code is read or written, and what a debugger or Triton
asks of the source later is answered from memory.
"""

from __future__ import annotations

import ast
import graphlib
import hashlib
import importlib.machinery
import importlib.util
import json
import linecache
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.abc import InspectLoader
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, ModuleType
from typing import cast

from hsgen import allowlist, store
from hsgen.errors import BuildError
from hsgen.target import Backend

KIND = "modules"
INIT = "__init__.py"
TEXTS = "texts.json"  # beside the sources: what `Module.texts` says
PACKAGE = "_hsgen_"
TRITON_NAMES = ("triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm")
# by backend: the release, and how an error says what for.  Before 3.5.1 linking an AMD binary
# takes a linker of ROCm's, which few machines without such a card have.
OLDEST_TRITON: Mapping[Backend, tuple[tuple[int, ...], str]] = {
    "cuda": ((3, 4), ""),
    "hip": ((3, 5, 1), " to compile for AMD cards"),
}

_lock = threading.RLock()
_loaded: dict[str, ModuleType] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A compiled spec's files.  `directory` is None when no disk would take them.

    `texts` digests every Python file by its stem, see `text_digest`.
    """

    name: str
    digest: str
    sources: Mapping[str, str] = field(repr=False)
    directory: Path | None
    texts: Mapping[str, str] = field(repr=False, default_factory=dict[str, str])

    @property
    def package(self) -> str:
        """The private name under which it is imported."""
        return f"{PACKAGE}{self.name}_{self.digest[:12]}"

    def path(self, file: str) -> str:
        """Where a traceback and a debugger find a file."""
        if self.directory is None:
            return f"<hsgen {self.name}-{self.digest[:12]}/{file}>"
        return str(self.directory / file)


def build(name: str, sources: Mapping[str, str], key: store.Key) -> Module:
    """Check files and publish them: <cache>/modules/<name>-<digest12>/.

    Args:
        name: the spec's name, for people; an identifier.
        sources: text by file name, `attend.py` and so on; other suffixes are kept, not imported.
        key: all that decides the text: versions, digests, target.  `find` then needs no emission.

    Raises:
        BuildError: a name that is no identifier, or text that does more than kernels do.
    """
    trees = allowlist.check(sources)
    known = find(key)
    if known is not None and known.texts and (known.name, known.sources) == (name, sources):
        return known
    texts = {Path(file).stem: text_digest(tree) for file, tree in trees.items()}
    files = {file: text.encode() for file, text in sources.items()}
    files[TEXTS] = json.dumps(texts, sort_keys=True).encode()
    return _module(store.publish(KIND, name, files, key))


def find(key: store.Key) -> Module | None:
    """The module last built under this key, each file's hash checked; None if it must be built."""
    entry = store.find(KIND, key)
    return None if entry is None else _module(entry)


def load(module: Module | Path) -> ModuleType:
    """Import a module's package; the same object each time, from any thread.

    Its files are attributes: `load(module).driver`.

    Raises:
        BuildError: damaged or foreign files, forbidden text, or an error while importing.
    """
    if isinstance(module, Path):
        module = _open(module)
    with _lock:
        if module.digest not in _loaded:
            _loaded[module.digest] = _import(module)
        return _loaded[module.digest]


def _open(directory: Path) -> Module:
    try:
        return _module(store.read(directory))
    except (store.DamagedError, OSError) as error:
        raise BuildError(f"cannot load {directory}: {error}") from error


def _module(entry: store.Entry) -> Module:
    sources = {file: data.decode() for file, data in entry.files.items()}
    texts = json.loads(sources.pop(TEXTS, "{}"))
    return Module(
        name=entry.name,
        digest=entry.digest,
        sources=sources,
        directory=entry.directory,
        texts=texts,
    )


def text_digest(tree: ast.AST) -> str:
    """24 hex digits of what a file does: comments, docstrings and line numbers are not in it.

    The same from every version of Python, whose `ast.dump` is not.
    """
    return hashlib.sha256(_shape(tree).encode()).hexdigest()[:24]


def _shape(value: object) -> str:
    """A tree as text: nodes with the fields that say something."""
    match value:
        case ast.AST():
            parts = (f"{name}={_shape(each)}" for name, each in ast.iter_fields(value) if each)
            if isinstance(value, ast.Constant):
                return f"{value.value!r}"
            return f"{type(value).__name__}({' '.join(parts)})"
        case list():
            items = cast("list[object]", value)
            return f"[{' '.join(_shape(each) for each in items if not _is_docstring(each))}]"
        case _:
            return f"{value!r}"


def _is_docstring(value: object) -> bool:
    """A string that is a statement: nothing reads it but people."""
    return (
        isinstance(value, ast.Expr)
        and isinstance(value.value, ast.Constant)
        and isinstance(value.value.value, str)
    )


def _import(module: Module) -> ModuleType:
    """Import the package: every file, each after those that it imports."""
    trees = allowlist.check(module.sources)
    order = graphlib.TopologicalSorter({file: allowlist.siblings(trees[file]) for file in trees})
    try:
        package = _new_module(module, INIT)
        for file in order.static_order():
            code = compile(trees[file], module.path(file), "exec", dont_inherit=True)
            _execute(module, file, code)
    except Exception as error:
        _forget(module)
        raise BuildError(f"cannot import {_where(module, error)}") from error
    return package


def _execute(module: Module, file: str, code: CodeType) -> None:
    text, path = module.sources[file], module.path(file)
    # No modification time: linecache then never reads the file again, whatever becomes of it.
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    package = sys.modules[module.package]
    if file == INIT:
        exec(code, package.__dict__)
        return
    made = _new_module(module, file)
    exec(code, made.__dict__)
    setattr(package, Path(file).stem, made)


def _new_module(module: Module, file: str) -> ModuleType:
    """An empty module, registered; a package cannot find files beyond those loaded into it."""
    is_package = file == INIT
    name = module.package if is_package else f"{module.package}.{Path(file).stem}"
    path = module.path(file)
    spec = importlib.machinery.ModuleSpec(
        name, _Source(module, file), origin=path, is_package=is_package
    )
    spec.has_location = True
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    return made


class _Source(InspectLoader):
    """Answers whoever asks a module's loader for its source: inspect, traceback, a debugger."""

    def __init__(self, module: Module, file: str) -> None:
        self._text = module.sources.get(file, "")

    def get_source(self, fullname: str) -> str:  # noqa: ARG002 - the protocol's
        return self._text

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"{module.__name__} belongs to hsgen.build.load")


def _forget(module: Module) -> None:
    prefix = f"{module.package}."
    for name in [name for name in sys.modules if f"{name}.".startswith(prefix)]:
        del sys.modules[name]


def _where(module: Module, error: Exception) -> str:
    """file:line: what, at the deepest emitted line that the error passed through."""
    line = ""
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path in {module.path(file) for file in module.sources}:
            line = f"{path}:{trace.tb_lineno}: "
        trace = trace.tb_next
    return f"{line or module.path('') + ': '}{type(error).__name__}: {error}"


def triton_version(backend: Backend = "cuda") -> str:
    """The installed Triton, as "triton 3.6.0".

    Raises:
        BuildError: there is none, or one that cannot compile what hsgen emits for such cards.
    """
    needed, purpose = OLDEST_TRITON[backend]
    for name in TRITON_NAMES:
        with suppress(PackageNotFoundError):
            found = version(name)
            if tuple(map(int, re.findall(r"\d+", found)[: len(needed)])) < needed:
                oldest = ".".join(map(str, needed))
                raise BuildError(
                    f"expected Triton {oldest} or newer{purpose}, got {name} {found}",
                    help="pip install --upgrade torch, which brings the Triton that it works with",
                )
            return f"{name} {found}"
    raise BuildError("Triton is not installed", help="pip install triton")
