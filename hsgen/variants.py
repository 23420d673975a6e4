"""What may be turned at a spec without retraining anything: sizes, budgets, pools, forced entries, windows.

Learned parameters keep their shapes: a level whose pool has any keeps its entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hsgen.spec import Attend, Blocks, Level, Select, Spec, verify

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of what the spec has
FORCED = (0, 1, 2, 4)
FREE_POOLS = ("mean", "max", "sum_rsqrt")  # without parameters, and scored alike
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SMALLEST, LARGEST = 8, 1024  # tokens of a block

Value = int | float | str
Choice = Mapping[str, Value]  # by name of a knob


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """Something of a spec that has a few values in order, one of them its own."""

    name: str
    values: tuple[Value, ...]
    own: Value

    def __str__(self) -> str:
        shown = (f"[{value}]" if value == self.own else str(value) for value in self.values)
        return f"{self.name}: {' '.join(shown)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """A spec and what may be turned at it."""

    spec: Spec
    knobs: tuple[Knob, ...]

    @property
    def own(self) -> dict[str, Value]:
        """The choice that is the spec itself."""
        return {knob.name: knob.own for knob in self.knobs}

    def __len__(self) -> int:
        return math.prod(len(knob.values) for knob in self.knobs)

    def choices(self) -> Iterator[dict[str, Value]]:
        """All of them, the spec itself first."""
        yield self.own
        for values in itertools.product(*(knob.values for knob in self.knobs)):
            choice = {knob.name: value for knob, value in zip(self.knobs, values, strict=True)}
            if choice != self.own:
                yield choice

    def make(self, choice: Choice) -> Spec:
        """The spec with a choice made.

        Raises:
            SpecError: its parts do not fit together so.
        """
        if choice == self.own:
            return self.spec
        levels = tuple(_level(level, choice) for level in self.spec.levels)
        attend = tuple(_branch(branch, choice) for branch in self.spec.attend)
        return verify(self.spec.model_copy(update={"levels": levels, "attend": attend}))

    def changed(self, choice: Choice) -> str:
        """What a choice turns: "block.size 64 -> 32, block.tokens 1024 -> 512"."""
        own = self.own
        parts = [f"{n} {own[n]} -> {value}" for n, value in choice.items() if value != own[n]]
        return ", ".join(parts) or "as it is"

    def __str__(self) -> str:
        lines = [f"{self.spec.name}: {len(self):,} variants", *(f"  {k}" for k in self.knobs)]
        return "\n".join(lines) + "\n"


def variants(spec: Spec, more: Iterable[Knob] = ()) -> Variants:
    """Everything that may be turned at a spec, and what else its caller turns."""
    found = [knob for level in spec.levels for knob in _of_level(level)]
    found += [knob for branch in spec.attend for knob in _of_branch(branch)]
    own = tuple(knob for knob in found if len(knob.values) > 1)
    return Variants(spec=spec, knobs=(*own, *more) if own else ())


# --- what there is to turn


def _of_level(level: Level) -> Iterator[Knob]:
    name, partition, select = level.name, level.partition, level.select
    if isinstance(partition, Blocks) and not partition.before and _free(level):
        sizes = _scaled(partition.size, SMALLEST, LARGEST)
        whole = [n for n in sizes if n * partition.stride % partition.size == 0]
        yield _knob(f"{name}.size", whole, partition.size)
    pool = level.pool.keys if level.pool else None
    if pool in FREE_POOLS and not (level.pool and level.pool.values):
        yield _knob(f"{name}.pool", FREE_POOLS, pool)
    if select is None:
        return
    size = max(1, partition.size)
    if select.budget:
        yield _knob(f"{name}.tokens", _scaled(select.budget * size, size), select.budget * size)
    if select.fraction is not None:
        values = [x for x in (f * select.fraction for f in FACTORS) if x <= 1]
        yield _knob(f"{name}.fraction", values, select.fraction)
    if select.top_p is not None:
        yield _knob(f"{name}.mass", MASSES, select.top_p.mass)
    force = select.force
    if force.first or force.last:
        yield _knob(f"{name}.first", FORCED, force.first)
        last = FORCED if force.last <= FORCED[-1] else _scaled(force.last, 1)
        yield _knob(f"{name}.last", last, force.last)


def _free(level: Level) -> bool:
    """Whether no parameter or input of a level counts on the size of its entries."""
    pool = level.pool
    if pool is None:
        return True
    plain = {*FREE_POOLS, "minmax", "first", "sample", None}
    return pool.keys in plain and pool.values in plain and not (pool.position or pool.then)


def _of_branch(branch: Attend) -> Iterator[Knob]:
    if isinstance(branch.window, int):
        yield _knob(f"{branch.name}.window", _scaled(branch.window, 1), branch.window)


def _scaled(own: int, least: int, most: int = 1 << 30) -> list[int]:
    return [round(own * f) for f in FACTORS if least <= own * f <= most and own * f % 1 == 0]


def _knob(name: str, values: list[int] | list[float] | tuple[Value, ...], own: Value) -> Knob:
    """Numbers in order; words in the order that they come in."""
    every = dict.fromkeys([*values, own])
    numbers = [value for value in every if not isinstance(value, str)]
    ordered = tuple(sorted(numbers)) if len(numbers) == len(every) else tuple(every)
    return Knob(name=name, values=ordered, own=own)


# --- turning it


def _level(level: Level, choice: Choice) -> Level:
    changes: dict[str, object] = {}
    partition, size = level.partition, choice.get(f"{level.name}.size")
    if isinstance(partition, Blocks) and isinstance(size, int):
        stride = partition.stride * size // partition.size
        changes["partition"] = partition.model_copy(update={"size": size, "stride": stride})
    if f"{level.name}.pool" in choice and level.pool:
        changes["pool"] = level.pool.model_copy(update={"keys": choice[f"{level.name}.pool"]})
    if level.select:
        long = size if isinstance(size, int) else max(1, partition.size)
        changes["select"] = _select(level.select, level.name, long, choice)
    return level.model_copy(update=changes)


def _select(select: Select, name: str, size: int, choice: Choice) -> Select:
    """Budgets are of tokens, so that a choice of a size changes no budget."""
    changes: dict[str, object] = {}
    tokens = choice.get(f"{name}.tokens")
    if isinstance(tokens, int):
        changes["top_k" if select.top_k else "beam"] = max(1, round(tokens / size))
    if f"{name}.fraction" in choice:
        changes["fraction"] = choice[f"{name}.fraction"]
    if f"{name}.mass" in choice and select.top_p:
        changes["top_p"] = select.top_p.model_copy(update={"mass": choice[f"{name}.mass"]})
    forced = {k: choice[f"{name}.{k}"] for k in ("first", "last") if f"{name}.{k}" in choice}
    if forced:
        changes["force"] = select.force.model_copy(update=forced)
    return select.model_copy(update=changes)


def _branch(branch: Attend, choice: Choice) -> Attend:
    window = choice.get(f"{branch.name}.window")
    return branch.model_copy(update={"window": window}) if window else branch
