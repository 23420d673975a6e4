"""Spec files: by path, or by the name of one that hsgen ships; and Specs made in Python."""

from __future__ import annotations

import re
from pathlib import Path

from hsgen import paths
from hsgen.errors import Diagnostic, HsgenError, SpecError, nearest
from hsgen.spec import rules
from hsgen.spec.model import Spec
from hsgen.spec.reader import parse
from hsgen.spec.syntax import MAX_BYTES

_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


def load(path_or_name: str | Path) -> Spec:
    """Read a spec file.

    Args:
        path_or_name: a path; or the name of a shipped spec, as `nsa`, where no such file exists.

    Raises:
        HsgenError: there is no such file, or it cannot be read.
        SpecError: with every mistake in it.
    """
    path, text = read(path_or_name)
    return parse(text, str(path))


def read(path_or_name: str | Path) -> tuple[Path, bytes]:
    """Where a spec file is, and what stands in it, right or wrong.

    Raises:
        HsgenError: there is no such file, or it cannot be read.
    """
    path = _find(path_or_name)
    try:
        with path.open("rb") as file:
            # no more than that is ever held, whatever the file is
            return path, file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        msg = f"{path_or_name}: cannot read this spec: {reason}"
        raise HsgenError(msg) from error


def shipped() -> dict[str, Path]:
    """Name -> file of each spec that hsgen ships."""
    return {path.stem: path for path in sorted(paths.data_dir("specs").glob("*.yaml"))}


def verify(spec: Spec) -> Spec:
    """Judge a Spec that was made or changed in Python by the rules that a text is judged by.

    Raises:
        SpecError: with every rule it breaks.
    """
    found = [
        Diagnostic(
            code=problem.code,
            message=f"{'.'.join(map(str, problem.path))}: {problem.message}",
            span=spec.span(*problem.path),
            help=problem.help,
        )
        for problem in rules.problems(spec)
    ]
    if found:
        raise SpecError(found)
    return spec


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    name = str(path_or_name)
    if not _NAME.fullmatch(name) or path.is_file():
        return path
    known = shipped()
    if name in known:
        here = Path.cwd()
        return known[name].relative_to(here) if known[name].is_relative_to(here) else known[name]
    close = nearest(name, known)
    msg = f"{name}: there is no such file, and no shipped spec of that name"
    raise HsgenError(
        msg, help=f"{f'did you mean {close!r}? ' if close else ''}shipped: {', '.join(known)}"
    )
