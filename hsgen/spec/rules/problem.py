"""One rule broken, and the shape of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hsgen.spec.model import Path, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One rule broken.  `path` is the culprit, `also` what else the judgement rests on."""

    code: str
    path: Path
    message: str
    help: str
    also: tuple[Path, ...] = ()
    at_key: bool = False  # it is the key that is wrong, whatever its value


Rule = Callable[[Spec], Iterator[Problem]]


def either(one: object) -> str:
    """Of two keys that exclude each other, which there are: all, or none."""
    return "neither" if one is None else "both"
