"""What fills the `sorting` skeleton: an order of keys that follows from these, sorted inside segments.

Every key has a weight: the mass that the last rows give it, or its dot product with the mean of its segment.
A whole segment's keys then lie by weight, greatest first, of equals the earlier; what a sequence has behind
its last whole segment stays in place.  Nothing is copied: kernels look a slot's token up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.graph import Attend, Graph, Node, Permute, Pool, Score, Select, SelectSet
from hsgen.graph import block_of as rows_of_block
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    ORDER,
    SEQ,
    Chunk,
    chunks,
    count,
    jit,
    next_power,
    number,
    pointer,
    tensor,
)

How = Literal["totals", "masses", "means", "sort", "around"]
MOST_SORTED = 4096  # tokens of a segment, which a program sorts in registers
MOST_SINKS = 16  # first tokens whose entries are looked up
PART = 4096  # keys of a part of a softmax: of no call's size, so that sums do not depend on it


def made(node: Node) -> str:
    """The buffer of an order."""
    return f"made_{node.name.replace('.', '_')}"


def arguments(order: str) -> tuple[str, ...]:
    """The same with its strides, as kernels are given it."""
    return order, f"0 if batch.packed else {order}.stride(0)", f"{order}.stride(1)"


def sorted_by(graph: Graph, name: str) -> Permute | None:
    """What sorts keys inside segments, where a node does."""
    op = graph[name].op
    return op if isinstance(op, Permute) and op.by in ("mass", "mean") else None


def order_of(graph: Graph, node: Node) -> Node | None:
    """The order that an operator's entries are cut from, where keys are sorted inside segments."""
    found = (x for x in graph.operands(node) if isinstance(x.op, Permute))
    return next((x for x in found if sorted_by(graph, x.name)), None)


def lacking(graph: Graph, node: Node) -> str | None:
    """What of an order no kernel does yet; None where all of it is done."""
    op = sorted_by(graph, node.name)
    if op is None or op.segment is None:
        return "puts keys in another order"
    if op.segment > MOST_SORTED:
        return f"sorts segments of more than {MOST_SORTED} tokens"
    users = graph.users(node.name)
    for user in users:
        match user.op:
            case Pool(how="mean", position=False):
                if any(not isinstance(x.op, Score) for x in graph.users(user.name)):
                    return "norms, rotates or attends entries of another order of keys"
            case Select() | SelectSet():
                if rows_of_block(user.type.dims[1]) is None:
                    return "puts keys in another order for rows that choose alone"
                if (user.op.sink or 0) > MOST_SINKS:
                    return f"forces the entries of more than {MOST_SINKS} first tokens"
            case Attend(over="blocks", latent=None):
                pass
            case _:
                return "puts keys in another order"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SortingContext:
    """Everything `sorting.py.jinja` reads.

    `totals`: what the softmax of each of the last rows sums up to, of some keys; `masses`: what keys get of
    these rows; `means`: dot products of keys with the mean of their segment; `sort`: the order; `around`:
    masses smoothed over their neighbours.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    heads: int  # of keys, or of queries that give masses each for itself
    group: int  # of query heads that give them together
    head_dim: int
    segment: int  # 0: all keys have a weight
    last: int = 0  # rows that give masses
    shared: int = 1  # heads of one key head
    causal: bool = False
    mean: bool = False  # of these rows, else their sum
    width: int = 0  # tokens that a mass is smoothed over
    together: bool = False  # the mean of all heads
    scale: float | None = None  # of logits; None: the root of the head dim
    stride: int = 1  # of an entry
    sinks: int = 0  # first tokens, whose entries are told
    precision: str = "tf32x3"

    @property
    def summary(self) -> str:
        match self.how:
            case "totals":
                return (
                    f"what softmaxes of the last {self.last} rows sum up to, of a part of the keys."
                )
            case "masses":
                return f"the mass that each key gets of the last {self.last} rows."
            case "means":
                return "the dot product of each key with the mean of its segment."
            case "sort":
                return f"keys of each segment of {self.segment}, by weight."
            case "around":
                of = "mean mass of all heads" if self.together else "mass"
                return f"each key's {of}, summed over {self.width} of them around it."

    @property
    def judges(self) -> int:
        """Rows of a key head that give masses, of all its query heads."""
        return self.last * self.group

    @property
    def whole(self) -> str:
        """How many keys have a weight, as an expression."""
        return f"k_len // {self.segment} * {self.segment}" if self.segment else "k_len"

    @property
    def key_head(self) -> str:
        return "head" if self.shared == 1 else f"(head // {self.shared})"

    @property
    def part(self) -> int:
        """Keys of a part of a softmax."""
        return PART

    @property
    def padded(self) -> int:
        """`segment` as a tile."""
        return next_power(self.segment)

    @property
    def scale_log2(self) -> str:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return number(scale * LOG2_E)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        q = tensor("Q", "q", "[B, T, Hq, Dqk]", "bth")
        k = tensor("K", "k", "[B, S, Hkv, Dqk]", "bth")
        heads = "Hkv" if self.shared == 1 else "Hq"
        totals = pointer("TOTALS", "f32", f"f32[Z, {heads}, parts, 2, {self.judges}]")
        parts = count("parts", f"of {PART} keys")
        weights = pointer("WEIGHTS", "f32", f"f32[Z, {heads}, keys]")
        keys = count("keys", "of the longest sequence")
        match self.how:
            case "totals":
                return (*q, *k, totals, parts, *SEQ, *tunables("BLOCK_T", "BLOCK_N"))
            case "masses":
                tiles = tunables("BLOCK_T", "BLOCK_N")
                return (*q, *k, totals, parts, weights, keys, *SEQ, *tiles)
            case "means":
                return (*k, weights, keys, *SEQ, *tunables("BLOCK_N"))
            case "sort":
                sinks = pointer("SINKS", "i32", f"[Z, Hkv, {self.sinks}] entries of first tokens")
                return (weights, keys, *ORDER, *((sinks,) if self.sinks else ()), *SEQ)
            case "around":
                made = "1" if self.together else str(self.heads)
                scores = pointer("SCORES", "f32", f"f32[Z, {made}, keys]")
                return (weights, scores, keys, *SEQ, *tunables("BLOCK_N"))

    @property
    def jit(self) -> str:
        return jit(self.params)
