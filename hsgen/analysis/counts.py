"""How many rows, entries and pairs of them the operators of a graph have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hsgen.analysis.calls import FRESH
from hsgen.analysis.polynomials import Cost, Polynomial, piece_from
from hsgen.graph import (
    Assign,
    DType,
    Graph,
    LogSumExp,
    Node,
    Normalise,
    Recall,
    Reduce,
    ReduceRows,
    Runs,
    Score,
    Select,
    SelectSet,
    TensorType,
    anchors,
    assigned,
    befores,
    block_of,
)

WORD = 32  # entries that one word of a bitmap row holds


BYTES: Mapping[DType, int] = {"input": 2, "f32": 4, "i32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many of each thing a graph has, as functions of T."""

    graph: Graph
    partitions: Mapping[str, tuple[int, int]]  # level -> size, stride
    asked: Mapping[str, int]  # node -> of how many rows it is wanted, where it is not all
    turn: int = FRESH  # of the call, where calls differ

    def of(self, node: Node) -> Cost:
        """Numbers in the result of a node, of the rows of which it is wanted; at most."""
        if node.name not in self.asked:
            return self.elements(node.type)
        one = ["1" if dim == "T" else dim for dim in node.type.dims]
        return self.elements(replace(node.type, dims=tuple(one))) * self.asked[node.name]

    def reach(self, level: str) -> tuple[int, int]:
        """Tokens from an entry's place to its end, by which it is complete, and the stride.

        Runs may be as short as one token, those that are found as the span that they are found by.
        """
        size, stride = self.partitions[level]
        owner = assigned(self.graph).get(level)
        if owner is not None and isinstance(owner.op, Runs):
            return owner.op.span or 1, owner.op.span or 1
        return size - befores(self.graph).get(level, 0), stride

    def entries(self, level: str) -> Cost:
        """Entries of a level, all whole."""
        size, stride = self.reach(level)
        if level in anchors(self.graph):
            return self.complete(level)  # every row has its own
        if stride == 0:
            return piece_from(0, Polynomial(t0=self.graph.sizes[f"N_{level}"]))
        return piece_from(size, Polynomial(t1=1 / stride, t0=1 - size / stride))

    def complete(self, level: str, rows: str = "T") -> Cost:
        """Pairs of a row, or of rows that choose together, and an entry that counts for it.

        About, where entries lie behind each row.
        """
        causal, (size, stride) = self.graph.meta.causal, self.reach(level)
        if behind := anchors(self.graph).get(level):
            power = 1 / behind.power  # sum over rows of the root, less a half, less those left out
            some = Polynomial(t1=0.5 - behind.first, others=((1 + power, 1 / (1 + power)),))
            return piece_from(behind.first**behind.power, some)
        if rows.isdecimal():
            return self.entries(level) * int(rows)
        block = block_of(rows)
        if stride == 0:
            return piece_from(0, Polynomial(t1=self.graph.sizes[f"N_{level}"] / (block or 1)))
        if block is None:
            return complete_pairs(size, stride, causal=causal)
        part = 0.5 if causal else 1.0
        own = 0.5 / min(block, stride) if causal else 0.0
        return piece_from(0, Polynomial(t2=part / (block * stride), t1=own))

    def tokens(self, rows: str) -> Cost:
        """Pairs of a row, or of rows that choose together, and a token that counts for it."""
        causal, block = self.graph.meta.causal, block_of(rows) or 1
        if rows.isdecimal():
            return piece_from(0, Polynomial(t1=float(rows)))
        pairs = Polynomial(t2=0.5 / block, t1=0.5) if causal else Polynomial(t2=1.0 / block)
        return piece_from(0, pairs)

    def children(self, level: str, rows: str = "T") -> Cost:
        """Pairs of a row, or of rows that choose together, and a complete entry inside the beam."""
        beam = self.graph[_score_of(self.graph, level).inputs[-1]]
        assert isinstance(beam.op, Select)
        owner = assigned(self.graph).get(level)
        each = 1 / (block_of(rows) or 1)
        if owner is not None and isinstance(owner.op, Assign):
            return piece_from(0, Polynomial(t1=beam.op.width * owner.op.branching)) * each
        if beam.op.size == 0:
            return self.selected(beam) * each
        whole = 1 / self.partitions[level][0]
        begun = (1 - whole) / 2 if beam.op.last > 0 else 0.0  # the own entry's, on average
        return (self.selected(beam) * whole + piece_from(0, Polynomial(t1=-begun))) * each

    def selected(self, selection: Node) -> Cost:
        """Pairs of a row and a raw token of the entries it selects; at most, where they overlap.

        Of a selection whose counts the data decide, what it may be at most: all that is visible.
        """
        op = selection.op
        if isinstance(op, Recall) and op.takes[self.turn] == "all":
            return complete_pairs(1, 1, causal=self.graph.meta.causal)
        if isinstance(op, Recall) and op.width == 0:
            return complete_pairs(1, 1, causal=self.graph.meta.causal) * (op.part or 1.0)
        if isinstance(op, Recall) and op.width is not None:
            slots, causal = op.width * op.size, self.graph.meta.causal
            return selected_pairs(slots, own=op.size, causal=causal)
        if isinstance(op, Recall):
            return self.selected(chosen_of(self.graph, op))
        if isinstance(op, SelectSet):
            if op.of == "all":
                return _pairs_of_part(op.value, causal=self.graph.meta.causal)
            if op.scope == "entry":
                return self._taken(op)
            if op.rule in ("top_k", "tokens"):  # of heads together: a head's share
                slots = int(op.value) * (op.size if op.rule == "top_k" else 1)
                return selected_pairs(slots, own=1, causal=self.graph.meta.causal)
            part = op.value if op.rule == "fraction" else 1.0
            return complete_pairs(1, 1, causal=self.graph.meta.causal) * part
        assert isinstance(op, Select)
        if op.size == 0:
            return self._assigned(op)
        block = block_of(selection.type.dims[1]) or 1
        own = max(op.size, block) if op.last > 0 else op.size + 2 if op.tail else block
        return selected_pairs(op.width * op.size, own=own, causal=self.graph.meta.causal)

    def merged(self, selection: Node) -> Cost:
        """Pairs of a row and a mean that it attends, in tiers; at most, where masses decide."""
        op, pairs = selection.op, complete_pairs(1, 1, causal=self.graph.meta.causal)
        assert isinstance(op, SelectSet)
        assert op.tiers is not None
        if op.tiers.by == "mass":
            return pairs
        parts = [0, *(part for _, part, _ in op.tiers.steps)]
        means = [(part - parts[i]) / merge for i, (merge, part, _) in enumerate(op.tiers.steps)]
        return pairs * (sum(means) / (1 << 30))

    def _assigned(self, op: Select) -> Cost:
        """Tokens of selected nodes with room for so many; of others all that is visible."""
        owner, causal = assigned(self.graph).get(op.level), self.graph.meta.causal
        if owner is None or not isinstance(owner.op, Assign) or owner.op.capacity is None:
            return complete_pairs(1, 1, causal=causal)
        part = min(1.0, op.width * owner.op.capacity / owner.op.nodes)
        return _pairs_of_part(part, causal=causal)

    def _taken(self, op: SelectSet) -> Cost:
        """Each entry takes so many rows; a node that takes its tokens has no more of those."""
        owner, rows = assigned(self.graph).get(op.level), int(op.value)
        if owner is None or not isinstance(owner.op, Assign) or owner.op.takes is None:
            return complete_pairs(1, 1, causal=self.graph.meta.causal)
        pairs = owner.op.nodes * rows * owner.op.takes
        return piece_from(max(rows, owner.op.takes), Polynomial(t0=pairs))

    def kept(self, level: str, selection: Node) -> Cost:
        """Pairs of a row and a complete entry of a level that it selects; at most."""
        op, complete = selection.op, self.complete(level)
        if isinstance(op, SelectSet):
            return complete * (op.value if op.rule == "fraction" else 1.0)
        assert isinstance(op, Select)
        if not self.graph.meta.causal:
            return _at_most_a_row(complete, op.width, full=0)
        size, stride = self.reach(level)
        return _at_most_a_row(complete, op.width, full=op.width * stride + size - stride)

    def elements(self, type_: TensorType) -> Cost:
        """Numbers in a value; of scores those that exist: visible, and inside a beam."""
        if len(type_.dims) < 2:  # a loss, the number of a call, a parameter of heads or channels
            known = tuple(dim for dim in type_.dims if dim not in ("B", "Z"))
            return piece_from(0, Polynomial(t0=1.0)) * self.product(known)
        dims, last = type_.dims, type_.dims[-1]
        if last.startswith("C_"):
            return self.children(last.removeprefix("C_"), dims[1]) * self.product(dims[2:-1])
        if last.startswith("W_"):
            _, stride = self.reach(last.removeprefix("W_"))
            block = block_of(dims[1]) or 1
            if stride == 0:
                words = -(-self.graph.sizes[f"N_{last.removeprefix('W_')}"] // WORD)
                fixed = dims[1].isdecimal()
                each = (
                    Polynomial(t0=words * int(dims[1])) if fixed else Polynomial(t1=words / block)
                )
            elif dims[1].isdecimal():
                each = Polynomial(t1=int(dims[1]) / (WORD * stride))
            else:
                each = Polynomial(t2=1 / (WORD * stride * block))
            return piece_from(0, each) * self.product(dims[2:-1])
        if last.startswith("N_"):
            return self.complete(last.removeprefix("N_"), dims[1]) * self.product(dims[2:-1])
        if len(dims) > 1 and dims[1].startswith("N_"):
            return self.entries(dims[1].removeprefix("N_")) * self.product(dims[2:])
        rows = [1 / (block_of(dim) or 1) for dim in dims if dim in ("T", "S") or block_of(dim)]
        unit = Polynomial(t1=rows[0]) if rows else Polynomial(t0=1.0)
        rest = tuple(dim for dim in dims if dim not in ("B", "T", "S", "Z") and not block_of(dim))
        return piece_from(0, unit) * self.product(rest)

    def product(self, dims: tuple[str, ...]) -> int:
        sizes = self.graph.sizes
        factors = [factor for dim in dims for factor in dim.split("*")]
        return math.prod(int(dim) if dim.isdecimal() else sizes[dim] for dim in factors)

    def moved(self, type_: TensorType) -> Cost:
        return self.elements(type_) * BYTES[type_.dtype]


def asked(graph: Graph) -> Mapping[str, int]:
    """Of how many rows steps of a score are wanted, where the last rows of a prompt are all of them."""
    found: dict[str, int] = {}
    for node in reversed(graph.nodes()):
        op, wanted = node.op, {_wanted_by(user, found) for user in graph.users(node.name)}
        of_score = isinstance(op, Score | Normalise | Reduce) or (
            isinstance(op, LogSumExp) and isinstance(graph[node.inputs[0]].op, Score)
        )
        if of_score and len(wanted) == 1 and (rows := wanted.pop()) is not None:
            found[node.name] = rows
    return found


def _wanted_by(user: Node, found: Mapping[str, int]) -> int | None:
    return user.op.last if isinstance(user.op, ReduceRows) else found.get(user.name)


def chosen_of(graph: Graph, recall: Recall) -> Node:
    """The choice that a recall takes, its own or another call's: kept ones are like it."""
    return next(
        node
        for node in graph.nodes()
        if isinstance(node.op, Select | SelectSet) and node.op.level == recall.level
    )


def _score_of(graph: Graph, level: str) -> Node:
    return next(x for x in graph.nodes() if isinstance(x.op, Score) and x.op.level == level)


def complete_pairs(size: int, stride: int, *, causal: bool) -> Cost:
    """Row p has (p + 1 - size) // stride + 1 complete entries; exact where stride divides T."""
    if not causal:
        return piece_from(size, Polynomial(t2=1 / stride, t1=1 - size / stride))
    late, rest = size - 1, (1 - size) % stride
    # with m = T - late rows, m = rest mod stride as if stride divides T, the sum over rows is
    # (m^2 - rest^2) / (2 stride) + (m + rest) / 2
    return piece_from(
        late + rest,
        Polynomial(
            t2=1 / (2 * stride),
            t1=1 / 2 - late / stride,
            t0=(late * late - rest * rest) / (2 * stride) + (rest - late) / 2,
        ),
    )


def selected_pairs(slots: int, *, own: int, causal: bool) -> Cost:
    """Tokens of a full selection; a row with fewer before it takes all.

    slots: tokens the selection has room for.  own: size of the own block where it is forced: only
    (own + 1) / 2 of its tokens are at or before the row, on average.
    """
    if not causal:
        return Cost(pieces=((0, Polynomial(t2=1.0)), (slots, Polynomial(t1=slots))))
    a_row = slots - (own - 1) / 2
    early = slots * (slots + 1) / 2
    return Cost(
        pieces=(
            (0, Polynomial(t2=0.5, t1=0.5)),
            (slots, Polynomial(t1=a_row, t0=early - slots * a_row)),
        )
    )


def _at_most_a_row(pairs: Cost, most: int, *, full: int) -> Cost:
    """The pairs of early rows, and `most` of each row from row `full` on."""
    early = pairs.evaluate(full)
    late = Polynomial(t1=most, t0=early - most * full)
    return Cost(pieces=(*(p for p in pairs.pieces if p[0] < full), (full, late)))


def selection_of(graph: Graph, attend: Node) -> Node | None:
    """The selection that an attend reads, if it reads one."""
    chosen = (node for node in graph.operands(attend) if isinstance(node.op, Select | SelectSet))
    return next(chosen, None)


def _pairs_of_part(part: float, *, causal: bool) -> Cost:
    """Tokens of as many entries as are a part of all; a row with fewer before it takes all."""
    if not causal:
        return piece_from(0, Polynomial(t2=part))
    return piece_from(0, Polynomial(t2=part - part * part / 2, t1=part / 2))


def window_pairs(window: int, *, causal: bool) -> Cost:
    if causal:
        return selected_pairs(window, own=1, causal=True)
    both = Polynomial(t1=2 * window - 1, t0=-window * (window - 1))
    return Cost(pieces=((0, Polynomial(t2=1.0)), (window, both)))
