"""What a config comes to, and a shipped spec with other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from hsgen.spec import files
from hsgen.spec.fields import Fields, shown
from hsgen.spec.model import Node, Spec

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A spec with the sizes of a model."""

    spec: Spec
    presets: tuple[str, ...]  # the shipped specs that it is made of
    layers: tuple[int, ...]  # of the model, that have this attention
    notes: tuple[str, ...] = ()  # what a reader of the spec should know


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the configs of one kind of model are read."""

    model: str  # as people call it
    find: Callable[[Fields, int | None], Found]
    defaults: Mapping[str, object]  # of its class, for what a config leaves out


def sized(preset: str, sizes: Mapping[str, object]) -> Spec:
    """A shipped spec with other values at some places, which are written levels.0.select.top_k."""
    spec = files.load(preset)
    for place, value in sizes.items():
        spec = _with(spec, place.split("."), value)
    return spec


def _with(node: T, path: Sequence[str], value: object) -> T:
    """A node, or a tuple of them, with another value at a place."""
    first, *rest = path
    if isinstance(node, tuple):
        items, i = cast("tuple[object, ...]", node), int(first)
        return cast("T", (*items[:i], _with(items[i], rest, value), *items[i + 1 :]))
    assert isinstance(node, Node)
    inner = _with(cast("object", getattr(node, first)), rest, value) if rest else value
    return node.model_copy(update={first: inner})


def pairs(values: Mapping[str, object]) -> str:
    """Fields and what they say, in one line."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())
