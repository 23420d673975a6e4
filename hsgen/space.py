"""What tuning may vary: tiles, warps and stages of each kernel, and the order of branches.

A plan's kernels fall into parts: kernels that share a tile are one.  Compiles nothing, times nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from hsgen import backward, configs, schedule
from hsgen.configs import DType, Sizes, Work
from hsgen.errors import ArgumentError, PlanError, nearest
from hsgen.graph import Attend, Graph
from hsgen.knobs import VERSION, Knob, Values, broken, derive, follows_step, knobs_of, shares
from hsgen.plan import Cached, Config, Plan
from hsgen.schedule import Order
from hsgen.target import Target

Orders = tuple[tuple[str, Order], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A choice of everything: orders that are not the plan's own, and every kernel's parameters."""

    orders: Orders
    configs: tuple[tuple[str, Config], ...]

    @property
    def key(self) -> str:
        """16 hex digits, the same in every process."""
        return hashlib.sha256(json.dumps(self.record()).encode()).hexdigest()[:16]

    def config(self, kernel: str) -> Config:
        return dict(self.configs)[kernel]

    def keywords(self) -> dict[str, Values]:
        """By kernel, as keyword arguments of a launch."""
        return {name: config.keywords() for name, config in self.configs}

    def record(self) -> dict[str, object]:
        """The same for JSON; `Space.point` reads it."""
        return {"orders": dict(self.orders), "configs": self.keywords()}

    def changes(self, start: Point) -> str:
        """What differs from another point, as `hsgen tune --try` reads it; empty if nothing does."""
        theirs = start.keywords()
        words = [f"order.{branch}={order}" for branch, order in self.orders]
        for kernel, values in self.keywords().items():
            known = theirs.get(kernel, {})
            words += [
                f"{kernel}.{name}={value}"
                for name, value in values.items()
                if known.get(name) != value
            ]
        return ",".join(words)

    def __str__(self) -> str:
        lines = [f"{branch}: {order} stay" for branch, order in self.orders]
        return "\n".join([*lines, *(f"{name}: {config}" for name, config in self.configs)])


def point_of(plan: Plan, orders: Orders = ()) -> Point:
    """The point at which a plan stands."""
    return Point(orders=orders, configs=tuple((k.name, k.config) for k in plan.kernels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Kernels whose values depend on one another, and their knobs."""

    kernels: tuple[str, ...]
    knobs: tuple[Knob, ...]
    plan: Plan = field(repr=False)
    target: Target = field(repr=False)

    @property
    def name(self) -> str:
        """The kernel that others follow, or the only one."""
        return self.kernels[0]

    @property
    def size(self) -> int:
        """Combinations, before any rule."""
        return math.prod(len(knob.codes) for knob in self.knobs)

    def codes(self, point: Point) -> tuple[int, ...] | None:
        """Where a point stands; None where a value is none of a knob's."""
        found = [knob.code(point.keywords()[knob.kernel][knob.name]) for knob in self.knobs]
        known = tuple(code for code in found if code is not None)
        return known if len(known) == len(found) else None

    def within(self, values: Mapping[str, Sequence[int]], start: Point) -> Part:
        """The same part where the knobs with these labels take no more than these values, and all others
        stay where they start.

        Raises:
            ArgumentError: no such knob, or a value that it does not have.
        """
        known = {knob.label: knob for knob in self.knobs}
        if unknown := sorted(values.keys() - known.keys()):
            raise ArgumentError(f"{self.name} has no knob {unknown[0]}: {', '.join(known)}")
        kept: list[Knob] = []
        for knob in self.knobs:
            own = start.config(knob.kernel).keywords()[knob.name]
            wanted = values.get(knob.label, (own,))
            codes = [code for value in wanted if (code := knob.code(value)) is not None]
            if len(codes) < len(wanted) or own not in wanted:
                raise ArgumentError(f"{knob.label}: expected some of {knob}, {own} among them")
            if min(codes) < max(codes):
                kept.append(replace(knob, least=min(codes), most=max(codes)))
        return replace(self, knobs=tuple(kept))

    def moved(self, point: Point, codes: Sequence[int]) -> Point:
        """The point with this part's values, what follows from them included; no rule is asked."""
        values = {name: dict(point.keywords()[name]) for name in self.kernels}
        for knob, code in zip(self.knobs, codes, strict=True):
            values[knob.kernel][knob.name] = knob.value(code)
        for name in self.kernels:
            derive(self.plan.kernel(name), values[name], self.plan)
        return replace(
            point,
            configs=tuple(
                (name, _config(config, values[name]) if name in values else config)
                for name, config in point.configs
            ),
        )

    def problem(self, point: Point) -> str:
        """The rule that this part's values break; empty if none."""
        values = point.keywords()
        for name in self.kernels:
            kernel = self.plan.kernel(name)
            shared = values[kernel.follows] if kernel.follows else {}
            for wrong in broken(kernel, shared | values[name], self.target, self.plan):
                return f"{name}: {wrong}"
        return ""

    def points(self, base: Point) -> Iterator[Point]:
        """Every point that differs from the base in this part alone and keeps the rules, lazily."""
        for codes in itertools.product(*(knob.codes for knob in self.knobs)):
            point = self.moved(base, codes)
            if not self.problem(point):
                yield point

    def neighbours(self, point: Point) -> Iterator[Point]:
        """The points one step of one knob away that keep the rules."""
        codes = self.codes(point)
        if codes is None:
            return
        for place, knob in enumerate(self.knobs):
            for step in (-1, 1):
                moved = (*codes[:place], codes[place] + step, *codes[place + 1 :])
                if moved[place] in knob.codes:
                    other = self.moved(point, moved)
                    if not self.problem(other):
                        yield other

    def __str__(self) -> str:
        lines = [f"part {self.name}: {self.size:,} combinations before rules"]
        for kernel in self.kernels:
            knobs = "; ".join(str(knob) for knob in self.knobs if knob.kernel == kernel)
            follows = self.plan.kernel(kernel).follows
            tail = f"  (follows {follows})" if follows in self.kernels else ""
            lines.append(f"  {kernel}: {knobs or 'nothing'}{tail}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One choice of orders: the plan it gives, where that starts, and its parts."""

    orders: Orders
    plan: Plan = field(repr=False)
    start: Point = field(repr=False)
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """`own`, or the orders that are forced."""
        return "_".join(f"{branch}_{order}" for branch, order in self.orders) or "own"

    @property
    def size(self) -> int:
        return math.prod(part.size for part in self.parts)

    def problem(self, point: Point) -> str:
        """Why a point is none of this variant's; empty if it is one."""
        wanted = self.start.keywords()
        given = point.keywords()
        if list(given) != list(wanted):
            return f"expected the kernels {', '.join(wanted)}, got {', '.join(given)}"
        for name, values in wanted.items():
            if given[name].keys() != values.keys():
                return f"{name}: expected {', '.join(values)}, got {', '.join(given[name])}"
            for each, value in values.items():
                if given[name][each] != value and follows_step(
                    self.plan.kernel(name), each, self.plan
                ):
                    return (
                        f"{name}: expected {each}={value} in such a step, got {given[name][each]}"
                    )
        for part in self.parts:
            codes = part.codes(point)
            if codes is None:
                bad = next(
                    k for k in part.knobs if k.code(point.keywords()[k.kernel][k.name]) is None
                )
                return f"{bad.label}: expected one of {bad}, got {given[bad.kernel][bad.name]}"
            if part.moved(point, codes) != point:
                return f"{part.name}: BLOCK_M is not what the other values make it"
            if wrong := part.problem(point):
                return wrong
        return ""

    def neighbours(self, point: Point) -> Iterator[Point]:
        """One step of one knob of any part."""
        for part in self.parts:
            yield from part.neighbours(point)

    def __str__(self) -> str:
        how = ", ".join(f"{branch}: {order} stay" for branch, order in self.orders)
        return "\n".join([f"orders {how or 'as planned'}", *(str(part) for part in self.parts)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All that may be tuned of a spec's calls, of their gradients, or of steps of some sizes; the plan's own
    orders come first.
    """

    name: str
    target: Target = field(repr=False)
    dtype: DType
    variants: tuple[Variant, ...]
    work: Work = "forward"
    sizes: Sizes | None = None  # of steps

    @property
    def start(self) -> Point:
        """What runs untuned."""
        return self.variants[0].start

    @property
    def digest(self) -> str:
        """16 hex digits of ranges, rules and what they depend on: the same space, the same study."""
        knobs = [
            [
                list(map(list, v.orders)),
                [[k.label, k.least, k.most] for p in v.parts for k in p.knobs],
            ]
            for v in self.variants
        ]
        work: list[object] = [] if self.work == "forward" else [self.work]
        work += [asdict(self.sizes)] if self.sizes else []
        text = json.dumps([VERSION, self.name, self.target.name, self.dtype, knobs, *work])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def variant(self, point: Point) -> Variant | None:
        """The one with a point's orders."""
        return next((v for v in self.variants if v.orders == point.orders), None)

    def problem(self, point: Point) -> str:
        """Why a point is not in the space; empty if it is."""
        variant = self.variant(point)
        if variant is None:
            return f"no variant of {self.name} has the orders {dict(point.orders)}"
        return variant.problem(point)

    def contains(self, point: Point) -> bool:
        return not self.problem(point)

    def neighbours(self, point: Point) -> Iterator[Point]:
        """The points one step of one knob away, of the same orders."""
        if variant := self.variant(point):
            yield from variant.neighbours(point)

    def only(self, kernels: Iterable[str]) -> Space:
        """The same space where just the parts of these kernels move.

        Raises:
            ArgumentError: no variant has a part with one of them.
        """
        wanted = set(kernels)
        known = {name for v in self.variants for part in v.parts for name in part.kernels}
        if unknown := sorted(wanted - known):
            near = nearest(unknown[0], known)
            hint = f"did you mean {near!r}? " if near else ""
            raise ArgumentError(
                f"{self.name} has no kernel {unknown[0]!r} to tune",
                help=f"{hint}kernels: {', '.join(sorted(known))}",
            )
        variants = (
            replace(v, parts=tuple(p for p in v.parts if wanted & set(p.kernels)))
            for v in self.variants
        )
        return replace(self, variants=tuple(v for v in variants if v.parts))

    def point(self, orders: Mapping[str, str], configs: Mapping[str, Mapping[str, int]]) -> Point:
        """The point of a record: of its orders, with every kernel's full parameters.

        Raises:
            ArgumentError: not in the space.
        """
        variant = next((v for v in self.variants if dict(v.orders) == orders), None)
        if variant is None:
            raise ArgumentError(f"no variant of {self.name} has the orders {dict(orders)}")
        point = variant.start
        known = point.keywords()
        if configs.keys() != known.keys():
            raise ArgumentError(f"expected the kernels {', '.join(known)}")
        for kernel, values in configs.items():
            if values.keys() != known[kernel].keys():
                raise ArgumentError(f"{kernel}: expected {', '.join(known[kernel])}")
            for name, value in values.items():
                point = _set(point, kernel, name, str(value))
        if wrong := variant.problem(point):
            raise ArgumentError(wrong)
        return point

    def parse(self, text: str) -> Point:
        """The point that `Point.changes` wrote, of the start.

        Raises:
            ArgumentError: no such value, or a rule is broken.
        """
        words: dict[str, str] = {}
        for word in filter(None, text.split(",")):
            label, _, value = word.rpartition("=")
            words[label] = value
        orders = tuple(
            (name.removeprefix("order."), order)
            for name, order in words.items()
            if name.startswith("order.")
        )
        variant = next((v for v in self.variants if v.orders == orders), None)
        if variant is None:
            raise ArgumentError(f"no variant of {self.name} has the orders {dict(orders)}")
        point = variant.start
        for label, text_value in words.items():
            kernel, _, name = label.partition(".")
            if kernel != "order":
                point = _set(point, kernel, name, text_value)
        if wrong := variant.problem(point):
            raise ArgumentError(wrong)
        return point

    def __str__(self) -> str:
        total = sum(variant.size for variant in self.variants)
        of = self.name if self.work == "forward" else f"{self.name}'s {self.work}"
        if self.sizes:
            of = f"steps of {self.name}, {self.sizes},"
        head = (
            f"space of {of} on {self.target.name} ({self.target.label}), {self.dtype}: "
            f"{total:.3g} combinations before rules"
        )
        return "\n".join([head, *(str(variant) for variant in self.variants)]) + "\n"


def space(
    graph: Graph,
    target: Target,
    dtype: DType = "bf16",
    work: Work = "forward",
    sizes: Sizes | None = None,
) -> Space:
    """What may be tuned of a spec's calls, of the gradients of calls that autograd records, or of its steps
    behind a cache, whose `sizes` say where their kernels start.

    Raises:
        PlanError: no kernel can do it, or the spec has no cache.
    """
    if work == "decode":
        assert sizes is not None, "a step has sizes"
        cached = Cached(rows="few", page=sizes.page)
        made = configs.for_steps(schedule.schedule(graph, target, dtype, cached=cached), sizes)
        return Space(
            name=made.name,
            target=target,
            dtype=dtype,
            variants=(_variant(made, (), target),),
            work=work,
            sizes=sizes,
        )
    if work == "gradients":
        made = backward.plan(graph, target, dtype, apart=backward.keeps_branches(graph))
        variants = (_variant(made, (), target),)
        return Space(name=made.name, target=target, dtype=dtype, variants=variants, work=work)
    own = schedule.schedule(graph, target, dtype)
    variants = [_variant(own, (), target)]
    branches = [n.op.branch for n in graph.nodes() if isinstance(n.op, Attend)]
    orders: tuple[Order, ...] = ("rows", "keys")
    for branch, order in itertools.product(branches, orders):
        try:
            plan = schedule.schedule(graph, target, dtype, {branch: order})
        except PlanError:
            continue
        if [k.name for k in plan.kernels] != [k.name for k in own.kernels]:
            variants.append(_variant(plan, ((branch, order),), target))
    return Space(name=own.name, target=target, dtype=dtype, variants=tuple(variants))


def _variant(plan: Plan, orders: Orders, target: Target) -> Variant:
    """Parts in the order of their leaders, a kernel that leads before those that follow; what a backward
    chooses again is as the forward has it.
    """
    members: dict[str, list[str]] = {}
    own = [kernel for kernel in plan.kernels if kernel.name not in plan.again]
    for kernel in own:
        leader = kernel.follows if kernel.follows and shares(kernel) else kernel.name
        members.setdefault(leader, [])
    for kernel in own:
        leader = kernel.follows if kernel.follows and shares(kernel) else kernel.name
        at = 0 if leader == kernel.name else len(members[leader])
        members[leader].insert(at, kernel.name)
    parts: list[Part] = []
    for kernels in members.values():
        knobs = tuple(knob for name in kernels for knob in knobs_of(plan.kernel(name), plan))
        if knobs:
            parts.append(Part(kernels=tuple(kernels), knobs=knobs, plan=plan, target=target))
    return Variant(orders=orders, plan=plan, start=point_of(plan, orders), parts=tuple(parts))


def _config(start: Config, values: Mapping[str, int]) -> Config:
    """A config with the same names."""
    names = [name for name, _ in start.constexprs]
    return Config(
        constexprs=tuple((name, values[name]) for name in names),
        num_warps=values["num_warps"],
        num_stages=values["num_stages"],
    )


def _set(point: Point, kernel: str, name: str, text: str) -> Point:
    """A point with one value changed."""
    values = point.keywords()
    if kernel not in values or name not in values[kernel]:
        known = [f"{each}.{one}" for each in values for one in values[each]]
        near = nearest(f"{kernel}.{name}", known)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        raise ArgumentError(f"no value is called {kernel}.{name}", help=hint)
    if not text.isdecimal():
        raise ArgumentError(f"{kernel}.{name}: expected a number, got {text!r}")
    changed = values[kernel] | {name: int(text)}
    return replace(
        point,
        configs=tuple(
            (each, _config(config, changed) if each == kernel else config)
            for each, config in point.configs
        ),
    )
