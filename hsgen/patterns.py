"""Branches that attend by position alone: which steps of keys a tile walks, and which mask each needs.

What rows see is a sink of first units, a window of units, and perhaps every so many units, or those at
powers of two, before it.  None of it is listed: a step says where its keys are.  First come steps of which
every row sees all, then those at the edges, whose mask is the whole rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hsgen import boxes
from hsgen.graph import Attend, Graph, Node, Pattern, Route, Switch
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    OUTPUTS,
    QUERY,
    SEQ,
    Phase,
    RowsContext,
    Shape,
    blocks,
    heads_of,
    keys_and_values,
    next_power,
    number,
    pointer,
)

LEAST_STEP = 16  # keys: what a dot takes
OF_POWERS = 3  # units: the row's own, and those at a distance of 1 and of 2
ALL_KEYS = 1 << 30
WAYS = pointer("WAYS", "i32", "[Z] way of each sequence")
WAYS_OF_HEADS = pointer("WAYS", "i32", "[Hq] way of each head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A pattern as loops need it: of each head, or of each way of a sequence, a window and a sink.

    size: tokens of a unit.  spans: (window, growth, sink) in units, growth in 2^-30; of heads, over and
    over, or with `by_way` of the ways that a sequence may take, and with `by_head` a head, any other number
    of which sees nothing.
    """

    size: int
    spans: tuple[tuple[int, int, int], ...]
    stride: int | None = None
    shift: int = 0
    powers: bool = False
    by_way: bool = False
    by_head: bool = False

    @classmethod
    def of(cls, pattern: Pattern, size: int) -> Rule:
        """Of a pattern that kernels reach: see `lacking`."""
        spans = pattern.spans
        if pattern.power_of_two:
            spans = tuple((max(window, OF_POWERS), grows, sink) for window, grows, sink in spans)
        return cls(
            size=size,
            spans=spans,
            stride=pattern.stride,
            shift=pattern.shift % (pattern.stride or 1),
            powers=pattern.power_of_two,
            by_way=pattern.by_way or pattern.by_head,
            by_head=pattern.by_head,
        )

    @property
    def apart(self) -> bool:
        """Whether heads see different units."""
        spans = not self.by_way and len(set(self.spans)) > 1
        return self.by_head or spans or bool(self.stride and self.shift)

    def per_head(self, shape: Shape) -> bool:
        """Whether those of a group do, so that a program has one of them."""
        return self.apart and shape.group > 1

    @property
    def ways(self) -> tuple[Param, ...]:
        """What says of each sequence, or head, which way it takes."""
        return (WAYS_OF_HEADS if self.by_head else WAYS,) if self.by_way else ()

    @property
    def sinks(self) -> bool:
        return any(sink for *_, sink in self.spans)

    @property
    def steps_in_units(self) -> bool:
        """Whether steps of keys begin with a unit, and must not leave it."""
        return bool(self.stride or self.powers)

    @property
    def ragged(self) -> bool:
        """Whether units are shorter than a step, or no whole number of them."""
        return self.size < LEAST_STEP or self.size != next_power(self.size)

    @property
    def most_tokens(self) -> int:
        """Of a tile: where distances are counted in units its rows lie in two at most; 0: as many as fit."""
        return 1 << self.size.bit_length() - 1 if self.powers else 0

    @property
    def none(self) -> bool:
        """Whether a window may have no unit."""
        return self.by_way or any(not window for window, *_ in self.spans)

    def span(self, head: str) -> tuple[str, ...]:
        """Statements: `reach`, how many units a window has, and `sunk`, the keys of a sink."""
        count = 1 if len(set(self.spans)) == 1 else len(self.spans)
        windows, growths, sinks = zip(*self.spans[:count], strict=True)
        lines: list[str] = []
        if self.by_way:
            lines.append(f"kind = tl.load(WAYS + {head if self.by_head else 'z'})")
        elif count > 1:
            lines.append(f"kind = {head} % {count}")
        lines += self._chosen("reach", windows)
        if any(growths):
            lines += [
                *self._chosen("growth", growths),
                f"more = tl.maximum(block_at(k_len + {self.size - 1}, {self.size}) - reach, 0)",
                "reach = reach + (more.to(tl.int64) * growth >> 30).to(tl.int32)",
            ]
        if self.sinks:
            lines += self._chosen("sunk", tuple(n * self.size for n in sinks))
            lines.append("sunk = tl.minimum(sunk, k_len)")
        return tuple(lines)

    def _chosen(self, name: str, values: tuple[int, ...]) -> tuple[str, ...]:
        """The value of a kind of head or of a way: of another way none."""
        rest = 0 if self.by_way else values[-1]
        others = [(i, value) for i, value in enumerate(values) if value != rest]
        lines = [f"{name} = {rest}"]
        lines += [f"{name} = tl.where(kind == {i}, {value}, {name})" for i, value in others]
        return tuple(lines)

    def keys(self, most: str) -> str:
        """How many keys a row may see of so many, as an expression."""
        if self.by_way or any(growth for _, growth, _ in self.spans):
            return most
        found = str((max(window + sink for window, _, sink in self.spans) + 1) * self.size)
        if self.powers:
            found = f"{found} + {self.size} * ({most}).bit_length()"
        if self.stride:
            found = f"{found} + {most} // {self.stride}"
        return f"min({most}, {found})"

    # --- which keys

    def unit(self, token: str) -> str:
        """The unit of a token, which may lie before all keys."""
        return token if self.size == 1 else f"block_at({token}, {self.size})"

    def token(self, unit: str) -> str:
        """The first token of a unit."""
        return unit if self.size == 1 else f"({unit}) * {self.size}"

    def low(self, position: str) -> str:
        """The first key of a window."""
        return self.token(f"{self.unit(position)} - reach + 1")

    def high(self, position: str) -> str:
        """The key behind a window that goes both ways."""
        return self.token(f"{self.unit(position)} + reach")

    def shows(self, key: str, row: str, low: str, high: str | None) -> tuple[str, ...]:
        """What is seen of keys `n`, as one condition.  key, row: indices that spread vectors."""
        near = f"n{key} >= {low}{row}"
        if high:
            near = f"({near}) & (n{key} < {high}{row})"
        far = ["(n < sunk)"] if self.sinks else []
        if self.stride:
            far.append(f"(n // {self.size} % {self.stride} == turn_of_units)")
        found = [f"({near})" if far or self.powers else near]
        if far:
            found.append(f"{far[0]}{key}" if len(far) == 1 else f"({' | '.join(far)}){key}")
        if self.powers:
            found.append("at_power")
        return (" | ".join(found),)

    def distance(self, key: str, row: str) -> tuple[str, ...]:
        """Statements that `shows` needs: whether a key's unit is at such a distance from a row's."""
        unit = f"(n // {self.size}){key}" if self.size > 1 else f"n{key}"
        return (f"at_power = is_power(own_unit{row} - {unit})",) if self.powers else ()

    def turn_of_units(self, head: str) -> tuple[str, ...]:
        """Statements: which of `stride` units a head sees."""
        if not self.stride:
            return ()
        if not self.shift:
            return (f"turn_of_units = {-1 % self.stride}",)
        of_head = head if self.shift == 1 else f"{self.shift} * {head}"
        return (f"turn_of_units = {self.stride - 1} - {of_head} % {self.stride}",)


def rule_of(op: Attend) -> Rule:
    """The rule of a branch."""
    assert op.pattern is not None, "a static branch has a pattern"
    return Rule.of(op.pattern, op.size)


def routed(graph: Graph) -> tuple[Graph, Mapping[str, str]]:
    """The same graph, for schedules, where sequences take ways: their branches are one whose window and sink
    are those of each sequence's way; as it is where they are no windows of tokens and sinks.

    And by which node each that is gone is done.
    """
    found = next((node for node in graph.nodes() if isinstance(node.op, Switch)), None)
    if found is None or (op := _of_ways(graph, found)) is None:
        return graph, {}
    branch = graph.operands(found)[0]
    (route,) = (node for node in graph.nodes() if isinstance(node.op, Route))
    one = replace(found, op=op, inputs=(*branch.inputs[:3], *route.inputs))
    gone = dict.fromkeys((route.name, *found.inputs), found.name)
    kept = [node for node in graph.nodes() if node.name not in gone]
    return graph.with_nodes(one if node.name == found.name else node for node in kept), gone


def _of_ways(graph: Graph, switch: Node) -> Attend | None:
    """The one branch that stands for those of a switch between the ways of sequences."""
    branches = [(node, node.op) for node in graph.operands(switch) if isinstance(node.op, Attend)]
    (route,) = (node.op for node in graph.nodes() if isinstance(node.op, Route))
    alike = {(node.inputs[:3], _but_for_reach(op)) for node, op in branches}
    spans = {op.when: span_of(op) for _, op in branches}
    if (
        route.by != "sample"
        or route.divergence is not None
        or len(alike) > 1
        or None in spans.values()
        or any(len(node.inputs) != 4 for node, _ in branches)  # a sink, a bias, other keys
    ):
        return None
    taken = (route.ways[place] for place in route.places)
    nothing = (0, 0, 0)
    return replace(
        branches[0][1],
        branch="_or_".join(op.branch for _, op in branches),
        over="static",
        window=None,
        when=None,
        size=1,
        stride=1,
        pattern=Pattern(
            spans=tuple(spans.get(way) or nothing for way in taken),
            dilation=1,
            stride=None,
            shift=0,
            power_of_two=False,
            by_way=True,
        ),
    )


def _but_for_reach(op: Attend) -> Attend:
    """What branches have in common that only see more or less."""
    return replace(
        op, branch="", over="all", window=None, pattern=None, size=1, stride=1, when=None
    )


def span_of(op: Attend) -> tuple[int, int, int] | None:
    """A branch as a window and a sink of tokens; None where it is none, or more."""
    match op:
        case Attend(over="all"):
            return ALL_KEYS, 0, 0
        case Attend(over="window", window=int(window)):
            return window, 0, 0
        case Attend(over="static", size=1, pattern=Pattern(spans=(span,)) as pattern):
            plain = Pattern(spans=(span,), dilation=1, stride=None, shift=0, power_of_two=False)
            return span if pattern == plain else None
        case _:
            return None


def lacking(pattern: Pattern, *, causal: bool) -> str | None:
    """What of a pattern no kernel does yet."""
    if pattern.axes:
        return boxes.lacking(pattern, causal=causal)
    lacks = (
        (pattern.dilation > 1, "attends a window with gaps"),
        (
            bool(pattern.stride) and pattern.power_of_two,
            "attends every so many units beside those at powers of two",
        ),
        (
            not causal and bool(pattern.stride or pattern.power_of_two),
            "attends units at distances both ways",
        ),
    )
    return next((words for missing, words in lacks if missing), None)


# --- the forward's loops


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """Steps of one kind: their number, and of step `@` where its keys begin, and where they end.

    unit: which `unit` that is the keys of, of a kind that has one.
    """

    count: str
    first: str
    until: str = "stop"
    unit: str = ""


def attend(shape: Shape, op: Attend, *, name: str) -> RowsContext:
    """One softmax over what the pattern of a branch shows."""
    scale = op.scale if op.scale is not None else 1.0
    assert op.pattern is not None, "a static branch has a pattern"
    if op.pattern.axes:
        return boxes.attend(shape, name=name, scale=scale, boxes=boxes.Boxes.of(op.pattern))
    return _attend(shape, name=name, scale=scale, rule=rule_of(op))


def _attend(shape: Shape, *, name: str, scale: float, rule: Rule) -> RowsContext:
    heads = heads_of(shape, per_head=rule.per_head(shape))
    setup, whole, edges = _walk(rule, causal=shape.causal)
    high = None if shape.causal else "high"
    shown = rule.shows("[None, :]", "[:, None]", "low", high)
    bounded = rule.steps_in_units and rule.ragged
    apart = bounded or len({kind.until for kind in edges}) > 1
    limit = f"limit = {'tl.minimum(seen, until)' if apart else 'seen'}"
    ends = f"(n < {'until' if apart else 'stop'})[None, :]"
    phases = (
        Phase(
            kind="steps",
            comment="steps of which every row sees all",
            start="0",
            stop="full",
            at=_statements(whole, apart=bounded),
            inside="(n < until)" if bounded else "",
            visible=("inside[None, :]",) if bounded else (),
        ),
        Phase(
            kind="steps",
            comment="steps at edges, of which each row sees what the pattern shows it",
            start="full",
            stop="full + rest",
            at=_statements(edges, apart=apart, first="full"),
            body=(*rule.distance("[None, :]", "[:, None]"), *((limit,) if shape.causal else ())),
            inside="(n < until)" if bounded else "n < stop",
            visible=(
                *shown,
                "n[None, :] < limit[:, None]" if shape.causal else ends,
            ),
        ),
    )
    return RowsContext(
        name=name,
        summary="attention over what a pattern shows.",
        params=(*QUERY, *keys_and_values(shape), *rule.ways, *OUTPUTS, *SEQ, *blocks(heads)),
        acc="softmax",
        **heads,
        key_row="k_first",
        setup=setup,
        phases=phases,
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
        units=rule.size if rule.steps_in_units else 0,
        most_tokens=rule.most_tokens,
    )


def _statements(kinds: tuple[_Steps, ...], *, apart: bool, first: str = "") -> tuple[str, ...]:
    """Statements that say of step i where its keys `n0` begin, and with `apart` where they end.

    Kinds follow each other.

    first: the number of the first step, if it is not 0.
    """
    lines = [f"step = i - {first}" if first else "step = i"]
    for place in reversed(range(len(kinds))):
        kind, before = kinds[place], [each.count for each in kinds[:place]]
        lone = f"step - {' - '.join(before)}" if before else "step"
        at = f"({lone})" if before else "step"
        end = " + ".join((*before, kind.count))
        last = place == len(kinds) - 1
        if kind.unit:
            lines.append(f"unit = {kind.unit.replace('@', at)}")
            lines.append(f"key = {kind.first.replace('@', at)}")
        for name, text in (("n0", "key" if kind.unit else kind.first), ("until", kind.until)):
            value = text.replace("past(@", f"past({lone}").replace("left + @", f"left + {lone}")
            value = value.replace("@", at)
            if name == "until" and (not apart or (not last and text == kinds[-1].until)):
                continue
            lines.append(
                f"{name} = {value}" if last else f"{name} = tl.where(step < {end}, {value}, {name})"
            )
    return tuple(lines)


def _walk(
    rule: Rule, *, causal: bool
) -> tuple[tuple[str, ...], tuple[_Steps, ...], tuple[_Steps, ...]]:
    """Statements before the loops, steps that every row sees, and those at edges.

    Keys from `start` on are one row of steps: those in which windows begin, those in all windows, and those
    in which windows end.  Before them lie sinks, and units that are seen at a distance.
    """
    size = rule.size
    widest = "tl.maximum(reach, 1)" if rule.none else "reach"
    whole_units = "k_len" if size == 1 else f"k_len // {size} * {size}"
    setup = [*rule.span("head"), *rule.turn_of_units("head"), f"low = {rule.low('position')}"]
    opens = rule.token(f"{rule.unit('first')} - {widest} + 1")
    if causal:
        setup.append("seen = tl.minimum(position + 1, k_len)")
        stop, everyone = "tl.minimum(last + 1, k_len)", "tl.minimum(first + 1, k_len)"
    else:
        setup.append(f"high = tl.minimum({rule.high('position')}, k_len)")
        behind = f"{rule.unit('last')} + {widest}"
        stop = f"tl.minimum({rule.token(behind)}, k_len)"
        stop = f"tl.maximum({stop}, sunk)" if rule.sinks else stop
        everyone = f"tl.minimum({rule.high('first')}, k_len)"
    setup += [
        f"opens = {opens}",
        f"start = tl.minimum(tl.maximum(opens, 0), {whole_units})",
        f"stop = {stop}",
        f"edge = tl.minimum({rule.low('last')}, stop)",
        "left = tl.maximum(edge - start + BLOCK_N - 1, 0) // BLOCK_N",
        f"middle = tl.maximum({everyone} - start - left * BLOCK_N, 0) // BLOCK_N",
        "around = tl.maximum(stop - start + BLOCK_N - 1, 0) // BLOCK_N - middle",
    ]
    whole: list[_Steps] = []
    edges: list[_Steps] = []
    if rule.sinks:
        setup += [
            "sunk_before = tl.minimum(sunk, start)",
            "sinks = sunk_before // BLOCK_N",
            "cut = tl.where(sunk_before % BLOCK_N > 0, 1, 0)",
        ]
        whole.append(_Steps(count="sinks", first="@ * BLOCK_N", until="sunk_before"))
        edges.append(_Steps(count="cut", first="sinks * BLOCK_N", until="sunk_before"))
    if rule.steps_in_units:
        setup += [
            f"TILES: tl.constexpr = ({size} + BLOCK_N - 1) // BLOCK_N",
            f"unit_of_start = start // {size}",
            f"unit_of_rest = {f'sunk_before // {size}' if rule.sinks else 'start * 0'}",
        ]
    if rule.stride:
        ahead = f"(turn_of_units - unit_of_rest % {rule.stride} + {rule.stride}) % {rule.stride}"
        setup += [
            f"next_unit = unit_of_rest + {ahead}",
            f"between = tl.maximum(unit_of_start - next_unit + {rule.stride - 1}, 0)",
            f"strides = between // {rule.stride} * TILES",
        ]
        whole.append(_of_unit("strides", f"next_unit + @ // TILES * {rule.stride}", rule))
    if rule.powers:
        setup += [
            f"own_unit = block_at(position, {size})",
            f"unit_first = block_at(first, {size})",
            f"unit_last = block_at(last, {size})",
            "nearest = powers_below(unit_first - unit_of_start + 1)",
            "farthest = powers_below(unit_first - unit_of_rest + 1)",
            "nearest_last = powers_below(unit_last - unit_of_start + 1)",
            "farthest_last = powers_below(unit_last - unit_of_rest + 1)",
            "of_first = tl.maximum(farthest - nearest, 0) * TILES",
            "of_last = tl.maximum(farthest_last - nearest_last, 0) * TILES",
            "of_all = tl.where(unit_first == unit_last, of_first, 0)",
            "of_first = of_first - of_all",
            "of_last = tl.where(unit_first == unit_last, 0, of_last)",
        ]
        unit = "unit_first - power_of(nearest + @ // TILES)"
        whole.append(_of_unit("of_all", unit, rule))
        edges.append(_of_unit("of_first", unit, rule))
        unit = "unit_last - power_of(nearest_last + @ // TILES)"
        edges.append(_of_unit("of_last", unit, rule))
    whole.append(_Steps(count="middle", first="start + (left + @) * BLOCK_N"))
    edges.append(_Steps(count="around", first="start + past(@, left, middle) * BLOCK_N"))
    for name, kinds in (("full", whole), ("rest", edges)):
        setup.append(f"{name} = {' + '.join(kind.count for kind in kinds)}")
    return tuple(setup), tuple(whole), tuple(edges)


def _of_unit(count: str, unit: str, rule: Rule) -> _Steps:
    """The steps of a unit; one that is no whole number of them ends within the last."""
    until = f"(unit + 1) * {rule.size}" if rule.ragged else "stop"
    return _Steps(
        count=count, unit=unit, first=f"unit * {rule.size} + @ % TILES * BLOCK_N", until=until
    )


# --- the rows that see some keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Takers:
    """What walks the rows of keys from `n0` on: statements before the loop, in it, and of its rows.

    heads: 0, or how many heads of a group are walked one after the other.
    """

    setup: tuple[str, ...]
    at: tuple[str, ...]
    of_rows: tuple[str, ...]
    visible: tuple[str, ...]
    heads: int


def takers(shape: Shape, rule: Rule) -> Takers:
    """Rows behind keys in `near` steps; and of units at powers of two, those of each of these."""
    size, causal = rule.size, shape.causal
    apart = rule.per_head(shape)
    head = "asked" if apart else "head"
    setup = [f"asked = head * {shape.group} + turn"] if apart else []
    setup += [*rule.span(head), *rule.turn_of_units(head)]
    if rule.powers or rule.stride or not causal:
        setup.append(f"unit_first = {'n0' if size == 1 else f'n0 // {size}'}")
    setup += [
        f"unit_last = {'n0 + BLOCK_N - 1' if size == 1 else f'(n0 + BLOCK_N - 1) // {size}'}",
    ]
    start = "n0" if causal else rule.token("unit_first - reach + 1")
    reached = "unit_last + reach"
    if rule.powers:
        setup += [
            "nearest = powers_below(reach + unit_last - unit_first)",
            f"of_rows = block_at(q_offset + q_len + {size - 1}, {size}) - unit_first",
        ]
        reached = "unit_first + power_of(nearest)"
    setup += [
        f"start = tl.maximum({start} - q_offset, 0)",
        f"stop = tl.minimum({rule.token(reached)} - q_offset, q_len)",
    ]
    everyone = ["(n0 < sunk)"] if rule.sinks else []
    if rule.stride:
        setup.append(
            f"ahead = (turn_of_units - unit_first % {rule.stride} + {rule.stride}) % {rule.stride}"
        )
        everyone.append("(unit_first + ahead <= unit_last)")
    if everyone:
        setup.append(f"everyone = {' | '.join(everyone)}")
        setup.append("stop = tl.where(everyone, q_len, stop)")
        setup += [] if causal else ["start = tl.where(everyone, 0, start)"]
    setup.append("near = (tl.maximum(stop - start, 0) + BLOCK_T - 1) // BLOCK_T")
    at = ["t0 = start + i * BLOCK_T", "until = stop"]
    if rule.powers:
        setup += [
            "far = tl.maximum(powers_below(of_rows) - nearest, 0)",
            *(("far = tl.where(everyone, 0, far)",) if everyone else ()),
            f"each = ((unit_last - unit_first + 1) * {size} + BLOCK_T - 1) // BLOCK_T",
        ]
        at += [
            "apart = power_of(nearest + (i - near) // each)",
            f"place = (unit_first + apart) * {size} - q_offset + (i - near) % each * BLOCK_T",
            f"end = tl.minimum((unit_last + apart + 1) * {size} - q_offset, q_len)",
            "t0 = tl.where(i < near, t0, place)",
            "until = tl.where(i < near, until, end)",
        ]
    setup.append("steps = near + far * each" if rule.powers else "steps = near")
    of_rows = [f"low = {rule.low('position')}"]
    of_rows += [] if causal else [f"high = {rule.high('position')}"]
    if rule.powers:
        of_rows += [f"own_unit = {rule.unit('position')}", *rule.distance("[:, None]", "[None, :]")]
    seen = ("n[:, None] <= position[None, :]",) if causal else ()
    shown = rule.shows("[:, None]", "[None, :]", "low", None if causal else "high")
    return Takers(
        setup=tuple(setup),
        at=tuple(at),
        of_rows=tuple(of_rows),
        visible=(*shown, *seen),
        heads=shape.group if apart else 0,
    )
