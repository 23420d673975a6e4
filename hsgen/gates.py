"""Forms that a spec has where sequences are short, and below which lengths its calls take them.

    dense    one softmax over every visible token: what the spec approximates
    flat     the attended levels, chosen from all their entries: levels that only narrow are left out
    own      the spec as it is

A form is a Spec of its own, so the reference says what it means.  Knows neither tensors nor times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hsgen import analysis, passes, planner
from hsgen.errors import ArgumentError, HsgenError, SpecError
from hsgen.spec import Attend, LearnedTree, Spec, verify

Form = Literal["dense", "flat", "own"]
FORMS: tuple[Form, ...] = ("dense", "flat", "own")


class GateError(HsgenError):
    """A spec has no such form; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Below so many keys a call is dense, else below so many flat, else as the spec says; 0: never.

    Raises:
        ArgumentError: no numbers of keys; flat calls where dense ones already are.
    """

    dense_below: int = 0
    flat_below: int = 0

    def __post_init__(self) -> None:
        for name, keys in (("dense_below", self.dense_below), ("flat_below", self.flat_below)):
            if isinstance(keys, bool) or not isinstance(keys, int) or keys < 0:
                raise ArgumentError(f"{name}: expected a number of keys, 0 or more, got {keys!r}")
        if 0 < self.flat_below <= self.dense_below:
            raise ArgumentError(
                f"flat_below: expected more than dense_below, {self.dense_below}, "
                f"got {self.flat_below}",
                help="calls that short are dense already: leave flat_below out",
            )

    def form(self, keys: int) -> Form:
        """What a call on so many keys is."""
        if keys < self.dense_below:
            return "dense"
        return "flat" if keys < self.flat_below else "own"

    def __str__(self) -> str:
        said = [f"{form} below {below:,} keys" for form, below in self._below if below]
        return ", ".join(said) or "never gated"

    @property
    def _below(self) -> tuple[tuple[Form, int], ...]:
        return ("dense", self.dense_below), ("flat", self.flat_below)


def forms(spec: Spec, gate: Gate | Literal["measured"]) -> dict[Form, Spec]:
    """The forms that calls of a gate may take beside the spec itself.

    Raises:
        GateError: the spec lacks one that the gate names; of "measured", all of them.
    """
    made: dict[Form, Spec] = {}
    if gate != "measured":
        if gate.dense_below:
            made["dense"] = dense_form(spec)
        if gate.flat_below:
            made["flat"] = flat_form(spec)
        return made
    lacking: GateError | None = None
    derivations: dict[Form, Callable[[Spec], Spec]] = {"flat": flat_form, "dense": dense_form}
    for form, derive in derivations.items():
        try:
            made[form] = derive(spec)
        except GateError as error:
            lacking = error
    if lacking and not made:
        raise lacking
    return made


def dense_form(spec: Spec) -> Spec:
    """Attention to every visible token, with the scale, cap and storage of the spec's branches.

    Raises:
        GateError: the spec approximates no such thing.
    """
    if why := _not_dense_because(spec):
        raise GateError(
            f"{spec.name}: cannot be gated dense: {why}",
            span=spec.span("attend"),
            help="leave out dense_below: no length makes dense attention what this spec means",
        )
    first = spec.attend[0]
    everything = Attend(
        name=first.name,
        window="all",
        kv=first.kv,
        storage=first.storage,
        scale=first.scale,
        softcap=first.softcap,
    )
    return _derived(spec, "dense", levels=(), attend=(everything,), combine=None, route=None)


def _not_dense_because(spec: Spec) -> str | None:
    """Why dense attention is not what the spec approximates; None where it is."""
    if all(branch.window == "all" for branch in spec.attend):
        return "it attends every token already"
    if why := analysis.not_dense_because(passes.run(planner.plan(spec))):
        return why
    for branch in spec.attend:
        if branch.rows:
            return f"rows that are not chosen see nothing in branch {branch.name}"
        if branch.query:
            return f"rows of branch {branch.name} attend by a query that they share"
    if spec.combine and spec.combine.streams:
        return "branches are outputs of their own"
    if len({(x.scale, x.softcap, x.storage, x.kv) for x in spec.attend}) > 1:
        return "branches scale, cap or store differently"
    return None


def flat_form(spec: Spec) -> Spec:
    """The same levels attended, each chosen from all its entries; those that only narrow are gone.

    Raises:
        GateError: nothing narrows anything; an entry is no entry without its parent.
    """
    wanted = {branch.over for branch in spec.attend}
    for level in reversed(spec.levels):
        wanted |= level.named - {level.within} if level.name in wanted else set()
    kept = [level for level in spec.levels if level.name in wanted]
    if not any(level.within for level in kept):
        levels = ", ".join(level.name for level in spec.levels) or "none"
        raise GateError(
            f"{spec.name}: cannot be gated flat: expected a level within another, got {levels}",
            span=spec.span("levels"),
            help="leave out flat_below: all entries are scored already",
        )
    for level in kept:
        if level.within and isinstance(level.partition, LearnedTree):
            raise GateError(
                f"{spec.name}: cannot be gated flat: nodes of level {level.name} are children of "
                f"{level.within}'s",
                span=spec.span("levels"),
                help="leave out flat_below",
            )
    return _derived(
        spec,
        "flat",
        levels=tuple(level.model_copy(update={"within": None}) for level in kept),
        reuse=tuple(each for each in spec.reuse if each.level in wanted),
    )


def _derived(spec: Spec, form: Form, **changes: object) -> Spec:
    """A Spec with another name; what only other levels needed goes with them."""
    changed = spec.model_copy(update={"name": f"{spec.name}_{form}", "loss": None, **changes})
    scored = any(level.score.by_index for level in changed.levels)
    left: dict[str, object] = {} if scored else {"index": None}
    left |= {} if changed.levels else {"axes": None, "reuse": ()}
    try:
        return verify(changed.model_copy(update=left))
    except SpecError as error:
        raise GateError(f"{spec.name}: cannot be gated {form}: {error.message}") from error
