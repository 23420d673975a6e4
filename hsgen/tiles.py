"""Tiles of a spec's kernels in steps from where they start, for whoever varies the spec too.

Variants of a spec have other kernels, whose tiles mean the same a step away from their own start.
Compiles nothing, times nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from hsgen import passes, planner
from hsgen.configs import DType
from hsgen.errors import HsgenError
from hsgen.space import Part, Point, Space, space
from hsgen.spec import Spec
from hsgen.target import Target
from hsgen.variants import Knob, Value

STEPS = (-1, 0, 1)  # doublings, of stages numbers
GROUPS = {
    "choosing": ("score_", ("BLOCK_T", "BLOCK_N")),
    "attending": ("attend_", ("BLOCK_T", "BLOCK_N", "num_warps", "num_stages")),
}

Configs = dict[str, dict[str, int]]  # by kernel, values that replace those that it starts with


def knobs() -> tuple[Knob, ...]:
    """What may be turned, beside what a spec has."""
    return tuple(
        Knob(name=f"tiles.{group}.{name}", values=STEPS, own=0)
        for group, (_, names) in GROUPS.items()
        for name in names
    )


def steps_of(choice: Mapping[str, Value]) -> dict[str, int]:
    """The steps of a choice that are not 0, by name of a knob."""
    return {
        name: step
        for name, step in choice.items()
        if name.startswith("tiles.") and isinstance(step, int) and step
    }


def configs(spec: Spec, target: Target, dtype: DType, choice: Mapping[str, Value]) -> Configs:
    """By kernel, the values of a choice: as far as a kernel's range goes.

    Raises:
        PlanError: no kernel can do it.
        HsgenError: the values do not go together.
    """
    if not steps_of(choice):
        return {}
    found, point = point_of(spec, target, dtype, choice)
    before = found.start.keywords()
    return {name: values for name, values in point.keywords().items() if values != before[name]}


def point_of(
    spec: Spec, target: Target, dtype: DType, choice: Mapping[str, Value]
) -> tuple[Space, Point]:
    """The same as a point of the spec's space.

    Raises:
        PlanError: no kernel can do it.
        HsgenError: the values do not go together.
    """
    steps = steps_of(choice)
    found = space(passes.run(planner.plan(spec)), target, dtype)
    own, point = found.variants[0], found.start
    for part in own.parts:
        group = next((g for g, (prefix, _) in GROUPS.items() if part.name.startswith(prefix)), "")
        wanted = (
            {name: steps.get(f"tiles.{group}.{name}", 0) for name in GROUPS[group][1]}
            if group
            else {}
        )
        codes = part.codes(point)
        assert codes is not None, "a start is in its space"
        point = part.moved(point, _moved(part, codes, wanted))
        if wrong := part.problem(point):
            raise HsgenError(f"tiles that do not go together: {wrong}")
    return found, point


def _moved(part: Part, codes: tuple[int, ...], steps: Mapping[str, int]) -> list[int]:
    """Codes of the kernel that leads, each as many steps on as its range has."""
    found: list[int] = []
    for knob, code in zip(part.knobs, codes, strict=True):
        step = steps.get(knob.name, 0) if knob.kernel == part.name else 0
        found.append(max(knob.least, min(knob.most, code + step)))
    return found
