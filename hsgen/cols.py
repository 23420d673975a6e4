"""Gradients of attention: what fills `cols`, `rows` where it makes dq, and lists of rows by block.

With p = exp(s - lse) of a row's logits s, dp = do . v, and delta = sum(p * dp), which is do . o:
ds = p * (dp - delta), dq = ds k, dk = ds q, dv = p do.  Rows stay where dq is made, keys where dk and dv are,
so every number has one program that adds it up, in one order.  Of a branch that is weighed by a gate do is
gate * do; of a log-sum-exp with a gradient of its own delta is less by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from hsgen import axes, boxes, patterns, rows, transposed
from hsgen.estimates import Shown
from hsgen.graph import Attend
from hsgen.kernels import tunables
from hsgen.plan import ElementType, Param
from hsgen.rows import (
    MARKED,
    OUTPUT_GRADIENT,
    SEQ,
    SUMS,
    Box,
    Chunk,
    Entries,
    Gated,
    RowsContext,
    Shape,
    chunks,
    count,
    lse,
    next_power,
    number,
    pointer,
    tensor,
)

LENGTH = transposed.LENGTH
ListingHow = Literal["tally", "before", "chunks", "list"]
PARTS = 16  # of all rows that see an entry, each for a program of its own, at most
SPANS = 256  # parts of all rows that are counted each for itself

TALLY = pointer("TALLY", "i32", "[lists, spans, buckets] rows of a span that chose each block")
TOTALS = pointer("TOTALS", "i32", "[lists, buckets] rows that chose each block")
STARTS = pointer("STARTS", "i32", "[lists, buckets] where a block's list begins")
ENDS = pointer("ENDS", "i32", "[lists, buckets] where it ends")
FIRSTS = pointer("FIRSTS", "i32", "[lists, buckets] its first chunk")
CHUNKS = pointer("CHUNKS", "i32", "[lists, capacity, 2] block and first place of a chunk")
CHUNK_COUNTS = pointer("CHUNK_COUNTS", "i32", "[lists] chunks")
LIST = pointer("LIST", "i32", "[lists, items] rows, block by block, ascending")
BUCKETS = count("buckets", "blocks of all sequences")
ITEMS = count("items", "places of a list")
CAPACITY = count("capacity", "most chunks of a list")
WORDS = pointer("WORDS", "i32", "[blocks of rows, H, capacity, words] rows as bits, by entry")
MEMBERS = count(
    "members", "words of an entry; 0: those of a list are its entries as bits, which all rows have"
)
LEAST_KEYS = 16  # of a tile of dots
HEAVY = 256  # first keys of a sequence, which most blocks of rows choose
HEAD_FIRST = count("head_first", "the turn's first key head")
OUTPUT = tensor("O", "o", "[B, T, Hq, Dv]", "bth")
KEPT_OUTPUT = tensor("O", "o", "f32[B, T, Hq, Dv]", "bth", "f32")  # of a branch under a gate
OF_KEYS = (
    pointer("SLOT_OF", "i32", "[Hkv, keys, chunk] 1 + the slot of a key in a tile's list; 0: none"),
    count("chunk", "tiles of a turn, at most"),
    count("slots", "of a tile's list, at most"),
    count("keys", "of all sequences"),
)


def part_k(dtype: ElementType) -> Param:
    """What tiles of rows give each key of their lists."""
    comment = "[Hkv, parts, chunk, slots, Dqk] what a tile gives the keys of its list"
    return pointer("PART_K", dtype, comment)


# --- rows by block


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingContext:
    """Everything `index.py.jinja` reads to list the rows that chose each block, in their order.

    Rows are counted by spans of tiles, each span by one program, so that a row's place follows from
    what rows before it chose, and from no order in which programs run.
    """

    name: str
    how: ListingHow
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    width: int  # slots of a row of the selection
    stride: int
    causal: bool

    @property
    def summary(self) -> str:
        match self.how:
            case "tally":
                return "how many rows of each span chose each block."
            case "before":
                return "how many rows of the spans before chose each block, and how many in all."
            case "chunks":
                return "where the list of each block's rows begins, and the chunks it is cut into."
            case "list":
                return "the rows that chose each block, block by block, in their order."

    @property
    def padded_width(self) -> int:
        """`width` as a tile; a gather wants at least two."""
        return max(2, next_power(self.width))

    @property
    def params(self) -> tuple[Param, ...]:
        selection = tensor(
            "SELECTION",
            "s",
            f"[B, T, {self.heads}, {self.width}], -1 anywhere",
            "bths",
            "i32",
        )
        spans = count("spans", "of rows"), count("span_tiles", "tiles of a span")
        match self.how:
            case "tally":
                return (*selection, TALLY, LENGTH, BUCKETS, *spans, *SEQ, *tunables("BLOCK_T"))
            case "before":
                return (TALLY, TOTALS, BUCKETS, spans[0], *tunables("BLOCK_S", "BLOCK_N"))
            case "chunks":
                lists = (TOTALS, STARTS, ENDS, FIRSTS, CHUNKS, CHUNK_COUNTS)
                return (*lists, BUCKETS, CAPACITY, *tunables("BLOCK_C", "BLOCK_N"))
            case "list":
                counts = (LENGTH, BUCKETS, ITEMS, *spans)
                return (*selection, TALLY, STARTS, LIST, *counts, *SEQ, *tunables("BLOCK_T"))

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


# --- blocks of rows by block


def words_of(block: int) -> int:
    """Words that have a bit for each row of a block."""
    return (next_power(block) + 31) // 32


def _of_turn(lists: int) -> str:
    """Selection heads of a turn, so many lists of each of its programs' heads."""
    return f"(tl.num_programs(1) * {lists})" if lists > 1 else "tl.num_programs(1)"


def _takers(lists: int) -> tuple[Param, ...]:
    """Of each block of keys the blocks of rows of which any chose it."""
    which = f"{lists} * these + which list of a key head's" if lists > 1 else "these"
    return (
        pointer("COUNTS", "i32", "[lists, buckets] blocks of rows"),
        pointer("LIST", "i32", f"[lists, buckets, most] {which}, ascending"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TakersContext:
    """Everything `index.py.jinja` reads to list the blocks of rows of which any chose a block of keys."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    lists: int  # of these, those of a key head, which are listed one after the other
    rows: int  # of a block of rows
    size: int  # keys of an entry
    several: int  # entries of a block of keys
    causal: bool
    segment: int = 0  # > 0: entries are cut from sorted segments of so many tokens
    shared: bool = False  # rows of a block have one list, as bits, unless a caller brings others
    # of a pyramid: of entries that a block of rows reads in this tier, and whether it is the last one
    tier: int | None = None
    last: bool = False
    bits: bool = False  # all rows of a block chose the same, which it has as bits; heads have turns
    shown: Shown | None = None  # what a pattern beside it shows each row, which is left to that
    how: Literal["takers"] = "takers"

    @property
    def summary(self) -> str:
        if self.tiered:
            return f"the blocks of rows of which any reads each block of keys in tier {self.tier}."
        return "the blocks of rows of which any chose each block of keys."

    @property
    def words(self) -> int:
        return words_of(self.rows)

    @property
    def many(self) -> bool:
        """Whether a block of keys has more words than one after the other are text."""
        return self.several * self.words > MARKED

    @property
    def first_key(self) -> str:
        """The first token that a block of keys may have."""
        first = f"e * {self.size * self.several}"
        return f"{first} // {self.segment} * {self.segment}" if self.segment else first

    @property
    def begun(self) -> str:
        """Entries of which a block's last row may see a token."""
        if self.segment:
            return f"begun_segments(last, k_len, {self.segment}, {self.size}, {self.causal})"
        if self.shown:
            before = f"{self.shown.before('last')} - 1"
            return f"entry_limit({before}, k_len, {self.size}, {self.causal})"
        return f"entry_limit(last, k_len, {self.size}, {self.causal})"

    @property
    def sink(self) -> int:
        """First entries, which are the pattern's."""
        return self.shown.entries(self.size) if self.shown else 0

    @property
    def tiered(self) -> bool:
        return self.tier is not None

    @property
    def held(self) -> str:
        """Selection heads that lists of rows have: of a pyramid those of a turn."""
        return _of_turn(self.lists) if self.tiered else str(self.heads)

    @property
    def of_tier(self) -> str:
        """Whether an entry is of the tier; what its block leaves out is of the last one."""
        own = f"tier == {self.tier}"
        return f"(({own}) | (tier < 0))" if self.last else f"({own})"

    @property
    def params(self) -> tuple[Param, ...]:
        sizes = (LENGTH, BUCKETS, axes.MOST, axes.CAPACITY)
        tiers = pointer("TIERS", "i32", f"[blocks, {self.heads}, capacity] of each entry, -1: none")
        read = (WORDS, tiers) if self.tiered else (WORDS,)
        if self.bits:
            read, sizes = (rows.bits_of(self.heads),), (*sizes[:-1], rows.BIT_WORDS)
        turn = (axes.HEAD_FIRST,) if self.tiered or self.bits else ()
        members = (MEMBERS,) if self.shared else ()
        return (*read, *_takers(self.lists), *sizes, *members, *SEQ, *turn, *tunables("BLOCK_N"))

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


# --- delta

LEAST_SHARE = 2.0**-100  # beside a sink: less leaves nothing of an output
_OF_SINK = (
    pointer("LSE", "f32", "f32[B, Hq, T], as DLSE"),
    rows.SINK,
    pointer("SUNK", "f32", "f32[B, Hq, T] log-sum-exp with the sink, as DLSE"),
    pointer("LEFT", "f32", "f32[B, Hq, T] what the sink has, as DLSE"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaContext:
    """Everything `merge.py.jinja` reads to make delta from outputs that are there.

    Of a branch under a gate, delta is times it, and without it the gate's gradient.  A sink is one more
    logit: the log-sum-exp that dq, dk and dv have has it too.
    """

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int  # of a value
    gate: Gated | None = None
    sink: bool = False
    how: Literal["delta"] = "delta"

    @property
    def summary(self) -> str:
        if self.gate:
            return "the gradient of a branch's gates, and delta, from its output."
        if self.sink:
            return "the gradient of each output times it, and what a sink has of it."
        return "the gradient of each output times it, less that of the log-sum-exp."

    @property
    def least_share(self) -> str:
        return number(LEAST_SHARE)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            *(KEPT_OUTPUT if self.gate and self.gate.branches > 1 else OUTPUT),
            *OUTPUT_GRADIENT,
            *lse("DLSE"),
            pointer("DELTA", "f32", "f32[B, Hq, T], as DLSE"),
            *(_OF_SINK if self.sink else ()),
            *((*rows.gates_of(self.gate), *_gates_gradient(self.gate)) if self.gate else ()),
            *SEQ,
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkContext:
    """Everything `merge.py.jinja` reads to add up what rows leave for the sink of each head."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int
    how: Literal["sink"] = "sink"

    @property
    def summary(self) -> str:
        return "the gradient of each head's sink, from what rows left."

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("LEFT", "f32", f"f32[B, {self.heads}, T]"),
            pointer("DSINK", "input", f"[{self.heads}] gradient of the sink"),
            count("sequences", "B"),
            count("rows", "T"),
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def deltas(forward: RowsContext, *, name: str) -> RowsContext:
    """Where a gate weighs a branch, whose own output nobody kept: delta from its logits again.

    The gradient of the gate is delta as it is; times the gate it is what dq, dk and dv need.
    """
    gate = forward.gate
    assert gate is not None, "an output that is there gives delta at once"
    outputs = (
        *OUTPUT_GRADIENT,
        *SUMS,
        pointer("DLSE", "f32", "f32[B, Hq, T], as LSE"),
        *rows.gates_of(gate),
        *_gates_gradient(gate),
    )
    return _without_outputs(forward, outputs, acc="delta", name=name, summary=DELTAS)


def _gates_gradient(gate: Gated) -> tuple[Param, ...]:
    return tensor("DGATES", "dg", f"[B, T, Hq, {gate.branches}]", "bthc")


DELTAS = "the gradient of a branch's gates, and delta, from logits that are computed again."


def query_gradient(
    forward: RowsContext,
    *,
    name: str,
    scale: float,
    adds: bool,
    leaves: ElementType | None = None,
) -> RowsContext:
    """dq over the keys that the forward attends, in the loops of the forward.

    leaves: In what a tile of rows leaves, of each key of its list, what it gives the key's gradient.
    """
    outputs = (
        *OUTPUT_GRADIENT,
        *SUMS,
        *rows.gates_of(forward.gate),
        *tensor("DQ", "dq", "[B, T, Hq, Dqk]", "bth"),
        *((part_k(leaves), *OF_KEYS, LENGTH) if leaves else ()),
    )
    more = ", and what they give those of keys" if leaves else ""
    summary = f"the gradient of queries{more}."
    made = _without_outputs(forward, outputs, acc="dq", name=name, summary=summary)
    return replace(made, scale=number(scale), adds=adds, gives=leaves is not None)


def _without_outputs(
    forward: RowsContext,
    outputs: tuple[Param, ...],
    *,
    acc: rows.Accumulator,
    name: str,
    summary: str,
) -> RowsContext:
    """The forward's loops with other outputs."""
    names = [p.name for p in forward.params]
    gates = names.index("GATES") if "GATES" in names else names.index("O")
    after = names.index("ORDER" if forward.order_head else "SEQ")
    params = (*forward.params[:gates], *outputs, *forward.params[after:])
    return replace(forward, name=name, summary=summary, params=params, acc=acc)


# --- dk and dv


@dataclass(frozen=True, slots=True, kw_only=True)
class ColsContext(rows.InTurn):
    """Everything `cols.py.jinja` reads: BLOCK_N keys stay, the rows that saw them stream past.

    `lists`: rows are those that chose the block, from its list; else all from `start` to `stop`.
    """

    name: str
    header: str = ""
    pieces: str = ""
    summary: str
    heads: int  # query heads of a token, packed in a tile
    group: int  # query heads that share a key head
    list_heads: int = 0  # > 0: rows come from lists, so many
    size: int = 1  # of a block
    stride: int = 1
    qk_chunks: tuple[Chunk, ...]
    v_chunks: tuple[Chunk, ...]
    key_row: str
    keys: str  # how many keys there are
    setup: tuple[str, ...] = ()
    visible: tuple[str, ...] = ()
    scale: str
    scale_log2: str
    precision: str
    parts: bool = False  # a token's heads are those of several steps, BLOCK_H of each
    latent: bool = False  # values are the first channels of keys, and so are their gradients
    marked: int = 0  # > 0: lists are of tokens, so many words a row say which of a block it chose
    split: bool  # rows are those of several programs, whose sums are added later
    adds: tuple[bool, bool]  # keys', values': to gradients of other branches
    turn: rows.Turn | None = None
    cap: str = ""  # as `RowsContext` has it
    entries: str = "S"
    tiled: int = 0  # > 0: rows are those of tiles, so many slots each, that chose a tile of keys
    words: int = 0  # of these a row's bit says whether it did
    list_of: str = ""  # which list of a tile's a query head reads
    list_stride: str = ""  # of so many
    wide: bool = False  # all tensors are in float32
    together: int = (
        0  # > 0: rows are those of blocks, so many each, of which any chose a block of keys
    )
    several: int = 1  # entries of that block
    spread: int = 1  # tokens from one key to the next, of entries that rows chose
    shared: bool = False  # whose rows have one list, as bits, unless a caller brings others
    merge: int = 1  # > 1: keys are means of so many tokens
    counted: bool = False  # whose logits have the logarithm of how many each stands for
    by_turns: bool = False  # heads have turns: means, lists and parts are those of a turn's heads
    bits: bool = False  # all rows of a block chose the same, which it has as bits
    # of a pattern: where the rows of step i begin, and what is known of them; else there is nothing
    at: tuple[str, ...] = ()
    of_rows: tuple[str, ...] = ()
    sifted: bool = False  # rows of a head are in an order of their own
    turns: int = 0  # > 0: heads of a group, one after the other, for each of which `setup` says
    ways: tuple[Param, ...] = ()  # a sequence, or a head, has a way of its own
    box: Box | None = None  # keys are those of one, and `at` says of rows which they are
    bias_scale: str = ""  # what a key's bias is times in a tile of logits; empty: keys have none
    reads: tuple[Param, ...] = ()  # lists of columns and diagonals
    columns: int = 0  # > 0: keys are those of a head's list, of so many slots
    beside: int = 0  # > 0: what keys got as columns is added, from lists of so many slots
    asked: int = 0  # query heads, each of which has one
    most_tokens: int = 0  # > 0: of a step, which has a bit for each in a word
    # > 0: an order of keys that are sorted inside segments of so many says the token of a slot
    segment: int = 0

    def uses(self, name: str) -> bool:
        """Whether any statement reads the number `name`."""
        text = " ".join((*self.setup, *self.at, *self.of_rows, *self.visible))
        text += " q_offset" if "position" in text else ""
        text += " q_len q_offset" if self.together else " q_len" if self.beside else ""
        return re.search(rf"\b{name}\b", text) is not None

    @property
    def cap_bound(self) -> str:
        """By what logits are capped."""
        return rows.bound_of(self.cap)

    @property
    def per_head(self) -> bool:
        """Whether every query head has lists of its own."""
        return self.heads < self.group

    @property
    def list_head(self) -> str:
        """Which lists a program reads."""
        if self.list_heads == 1:
            return "turn * 0"
        return f"head_first * {self.group} + turn" if self.per_head else "head_first + turn"

    @property
    def word(self) -> str:
        """Where the word of a place in a list is."""
        return f"place.to(tl.int64) * {self.marked}" if self.marked > 1 else "place"

    @property
    def in_chunks(self) -> bool:
        """Whether a list's rows are those of several programs."""
        return self.list_heads > 0 and not self.marked

    @property
    def heavy(self) -> int:
        """First blocks of keys of a sequence, whose rows are those of several programs."""
        return max(1, HEAVY // (self.size * self.merge))

    @property
    def held_head(self) -> str:
        """The head of lists and parts."""
        return "turn_head" if self.by_turns else "head"

    @property
    def entry_size(self) -> int:
        """Keys of an entry, where blocks of rows chose any."""
        return self.size // self.several

    @property
    def list_of_block(self) -> str:
        """Which list a block of rows reads, of which a tile's rows have the same head."""
        return "list_head" if self.lists > 1 else self.list_of

    @property
    def lists(self) -> int:
        """How many lists a key head has."""
        return self.group if self.per_head else 1

    @property
    def key_head(self) -> str:
        if self.merge > 1:
            return self.held_head
        of_queries = self.per_head and not (self.together or self.turns)
        return f"(head // {self.group})" if of_queries else "head"

    @property
    def walks(self) -> bool:
        """Whether there are rows that stream past."""
        return not self.beside or bool(self.at)

    @property
    def kept(self) -> tuple[tuple[str, tuple[Chunk, ...]], ...]:
        """Tiles of keys, and of values where these are not in them."""
        keys = ("k", self.qk_chunks)
        return (keys,) if self.latent else (keys, ("v", self.v_chunks))

    @property
    def values(self) -> str:
        """Tiles that gradients of outputs meet."""
        return "k" if self.latent else "v"

    @property
    def rows_a_token(self) -> str:
        """From one token's rows in the tile to the next one's."""
        return "BLOCK_H" if self.parts else str(self.heads)

    @property
    def rows_comment(self) -> str:
        """What a tile has of rows."""
        if self.heads == 1:
            return "BLOCK_T tokens"
        of = "BLOCK_H of " if self.parts else ""
        return f"BLOCK_T tokens x {of}{self.heads} heads (the group's), padded to BLOCK_M"

    @property
    def row(self) -> str:
        """The rows of the keys `n` in their tensor."""
        return "k_row + k_at" if self.segment else "k_row + n"

    @property
    def begins(self) -> str:
        """The first token that the slot of a key may have."""
        return f"n // {self.segment} * {self.segment}" if self.segment else "n"

    @property
    def stores(self) -> dict[str, str]:
        """The pieces that write the gradients of keys and of values."""
        return {x: "add_rows" if a else "store_rows" for x, a in zip("kv", self.adds, strict=True)}

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"[B, {self.entries}, Hkv, "
        gradients = part_params(self) if self.split else gradient_params(self)
        lists: tuple[Param, ...] = (LENGTH,)
        turn: tuple[Param, ...] = ()
        if self.tiled:
            lists = (
                pointer("COUNTS", "i32", "[lists, tiles] tiles of rows"),
                pointer("LIST", "i32", "[lists, tiles, most] these, ascending"),
                pointer("WORDS", "i32", "[tiles of rows, lists, capacity, words] rows as bits"),
                count("tiles", "of keys, of all sequences"),
                axes.MOST,
                axes.CAPACITY,
            )
        elif self.together:
            sizes = (LENGTH, BUCKETS, axes.MOST)
            chosen = (WORDS, *sizes, axes.CAPACITY)
            if self.bits:
                chosen = (rows.bits_of(int(self.list_stride)), *sizes, rows.BIT_WORDS)
            lists = (*_takers(self.lists), *chosen, *((MEMBERS,) if self.shared else ()))
            turn = (HEAD_FIRST,) if self.by_turns else ()
        elif self.marked:
            lists = (*transposed.lists(self.marked), LENGTH, transposed.CHUNK, transposed.TOKENS)
            turn = (transposed.BUCKET_FIRST,)
        elif self.list_heads:
            lists = (CHUNKS, CHUNK_COUNTS, ENDS, LIST, LENGTH, BUCKETS, ITEMS, CAPACITY)
            turn = (HEAD_FIRST,)
        elif self.columns:
            lists = ()
        found = (
            *rows.QUERY,
            *tensor("K", "k", f"{shape}Dqk]", "bth"),
            *(() if self.latent else tensor("V", "v", f"{shape}Dv]", "bth")),
            *self.ways,
            *(rows.BIAS if self.bias_scale else ()),
            *self.reads,
            *OUTPUT_GRADIENT,
            *SUMS,
            *rows.gates_of(self.turn),
            *gradients,
            *lists,
            *(rows.ORDER if self.segment else ()),
            *SEQ,
            *turn,
            *tunables(*(("BLOCK_C",) if self.in_chunks else ()), "BLOCK_T", "BLOCK_M", "BLOCK_N"),
            *tunables(*(("BLOCK_H",) if self.parts else ())),
        )
        return rows.in_float32(found) if self.wide else found

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def part_params(of: ColsContext) -> tuple[Param, ...]:
    """The gradients of keys and values, in parts."""
    keys = pointer("PART_K", "f32", "f32[parts, keys, Dqk]")
    bias = (pointer("PART_BIAS", "f32", "f32[parts, keys]"),) if of.bias_scale else ()
    return (keys,) if of.latent else (keys, pointer("PART_V", "f32", "f32[parts, keys, Dv]"), *bias)


def gradient_params(of: ColsContext) -> tuple[Param, ...]:
    """The same as wholes."""
    shape = f"[B, {of.entries}, Hkv, "
    keys = tensor("DK", "dk", f"{shape}Dqk]", "bth")
    bias = tensor("DBIAS", "dbias", "[B, S, Hkv]", "bth") if of.bias_scale else ()
    return keys if of.latent else (*keys, *tensor("DV", "dv", f"{shape}Dv]", "bth"), *bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumContext:
    """Everything `merge.py.jinja` reads to add the parts of dk and dv that chunks of rows gave."""

    name: str
    header: str = ""
    pieces: str = ""
    of: ColsContext
    how: Literal["sum"] = "sum"

    @property
    def summary(self) -> str:
        return "dk and dv from the parts that chunks of rows gave, in their order."

    @property
    def parts(self) -> tuple[tuple[str, int, tuple[Chunk, ...]], ...]:
        """Keys, then values: a letter, head dim and chunks."""
        return tuple((letter, sum(c.width for c in cut), cut) for letter, cut in self.of.kept)

    @property
    def params(self) -> tuple[Param, ...]:
        of = self.of
        lists = (STARTS, ENDS, FIRSTS, LENGTH, BUCKETS, CAPACITY) if of.list_heads else (LENGTH,)
        return (
            *part_params(of),
            *gradient_params(of),
            *lists,
            *(() if of.list_heads else (count("chunks", "of rows"),)),
            *(rows.ORDER if of.segment else ()),
            *SEQ,
            *((HEAD_FIRST,) if of.list_heads or (of.by_turns and of.merge == 1) else ()),
            *tunables(*(("BLOCK_C",) if of.list_heads else ()), "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeContext:
    """Everything `merge.py.jinja` reads to add up what the rows that chose a key left for it.

    A program has one key.  Between turns its sum is in float32; the last one writes the gradient.
    """

    name: str
    header: str = ""
    pieces: str = ""
    of: RowsContext
    dtype: ElementType  # of what was left
    kv_heads: int
    adds: bool  # to the gradient of other branches
    how: Literal["take"] = "take"

    @property
    def summary(self) -> str:
        return "the gradient of latents from what each tile of rows left, in their order."

    @property
    def head_dim(self) -> int:
        return sum(c.width for c in self.of.qk_chunks)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.of.qk_chunks

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            part_k(self.dtype),
            *OF_KEYS,
            pointer("SUM_K", "f32", "f32[keys, Hkv, Dqk] of the turns before"),
            *tensor("DK", "dk", "[B, S, Hkv, Dqk]", "bth"),
            count("tokens", "keys of a tensor's sequence"),
            count("count", "tiles of the turn"),
            count("left", "tiles behind it"),
            *tunables("BLOCK_H", "BLOCK_T", "BLOCK_E"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the kernels of dk and dv have in common, whatever rows they see."""

    name: str
    scale: float
    softcap: float | None = None
    turn: rows.Turn | None
    adds: tuple[bool, bool]
    biased: bool = False  # keys have biases, which have gradients


def _of(shape: Shape, branch: Branch, *, heads: int) -> ColsContext:
    return ColsContext(
        name=f"dkv_{branch.name}",
        summary="the gradients of keys and values.",
        heads=heads,
        group=shape.group,
        parts=shape.latent and heads > 1,
        latent=shape.latent,
        qk_chunks=rows.latent_chunks(shape.qk, shape.v) if shape.latent else chunks(shape.qk),
        v_chunks=chunks(shape.v),
        key_row="k_first",
        keys="k_len",
        scale=number(branch.scale),
        scale_log2=number((branch.scale if branch.softcap is None else 1.0) * rows.LOG2_E),
        cap="" if branch.softcap is None else rows.cap_of(branch.scale, branch.softcap),
        precision=shape.precision,
        split=False,
        adds=branch.adds,
        turn=branch.turn,
        bias_scale=rows.bias_scale(branch.scale) if branch.biased else "",
    )


def of_blocks(
    shape: Shape, branch: Branch, *, entries: Entries, list_heads: int, left: int = 0
) -> ColsContext:
    """The keys of a block for a chunk of the rows that chose it."""
    per_head = list_heads == shape.query_heads and shape.group > 1
    return replace(
        _of(shape, branch, heads=1 if per_head else shape.group),
        list_heads=list_heads,
        size=entries.size,
        stride=entries.stride,
        split=True,
        visible=_behind(shape, left),
    )


def of_tokens(
    shape: Shape, branch: Branch, *, list_heads: int, entries: Entries | None = None
) -> ColsContext:
    """The keys of a block of tokens, or of pooled entries, for the rows that chose any of these."""
    per_head = list_heads == shape.query_heads and shape.group > 1
    if entries is not None:
        size = f"{entries.size}, {entries.stride}, {entries.short}"
        made = of_tokens(shape, branch, list_heads=list_heads)
        return replace(
            made,
            key_row=f"k_first // {entries.stride}",
            keys=f"pooled_entries(k_len, {size})",
            spread=entries.stride,
            entries="N",
        )
    return replace(
        _of(shape, branch, heads=shape.group),
        list_heads=shape.kv_heads if per_head else list_heads,
        marked=shape.group if per_head else 1,
        size=MARKED,
        stride=MARKED,
        visible=("marked_by(word, within)",),
    )


def of_together(
    shape: Shape,
    branch: Branch,
    *,
    entries: Entries,
    list_heads: int,
    block: int,
    left: int,
    segment: int = 0,
    aside: int = 0,
    alone: bool = False,
    bits: bool = False,
    shown: Shown | None = None,
    shared: bool = False,
) -> ColsContext:
    """The keys of a block for a part of the blocks of rows that chose it; short entries lie side by side.

    left: tokens of a window beside it, which has those of its rows.
    segment: keys are read through an order of theirs, sorted inside segments of so many.
    aside: tokens of blocks of which each row has its own in another branch.
    alone: short entries do not lie side by side.
    bits: all rows of a block chose the same; heads have turns.
    shown: what a pattern beside it shows each row, which is left to that.
    shared: rows of a block have one list, as bits of tokens, unless a caller brings others.
    """
    several = 1 if alone or entries.size >= LEAST_KEYS else max(1, MARKED // entries.size)
    per_head = list_heads == shape.query_heads and shape.group > 1
    own = {shape.query_heads: "row_head" if per_head else "head", shape.kv_heads: "head"}
    member = "member != 0" if several > 1 else "member[None, :] != 0"
    behind = _behind(shape, left, key="k_at" if segment else "n", aside=aside)
    return replace(
        _of(shape, branch, heads=1 if per_head else shape.group),
        together=block,
        several=several,
        size=several * entries.size,
        stride=several * entries.size,
        words=words_of(block),
        list_of=own[list_heads] if list_heads > 1 else "0",
        list_stride=list_heads,
        visible=(
            *(_chosen(several) if bits else (member,)),
            *(_beside(shown) if shown else behind),
        ),
        split=True,
        segment=segment,
        bits=bits,
        by_turns=bits,
        shared=shared,
    )


def of_tier(
    shape: Shape,
    branch: Branch,
    *,
    size: int,
    merge: int,
    counted: bool,
    list_heads: int,
    block: int,
) -> ColsContext:
    """The keys of a block as one tier has them, tokens or means of `merge`, for the blocks of rows that read
    them so; heads have turns.
    """
    means = Entries(size=size // merge, stride=size // merge)
    whole = of_together(
        shape, branch, entries=means, list_heads=list_heads, block=block, left=0, alone=True
    )
    own = "turn_head"
    if whole.per_head:
        own = f"row_head - head_first * {shape.group}"
    made = replace(
        whole,
        list_of=own if list_heads > 1 else "0",
        list_stride=_of_turn(whole.lists) if list_heads > 1 else whole.list_stride,
        by_turns=True,
    )
    if merge == 1:
        return made
    seen = f"tl.minimum(n * {merge} + {merge}, k_len)[:, None]"
    behind = f"{seen} <= tl.minimum(position + 1, k_len)[None, :]"
    return replace(
        made,
        name=f"{made.name}_{merge}",
        summary=f"the gradients of means of {merge} keys and values.",
        merge=merge,
        counted=counted,
        key_row=f"k_first // {merge}",
        keys=f"(k_len + {merge - 1}) // {merge}",
        visible=(whole.visible[0], *((behind,) if shape.causal else ())),
        entries="N",
    )


def _chosen(several: int) -> tuple[str, ...]:
    """Which of the entries that lie side by side a block of rows chose; of one alone it did."""
    return ("member[:, None]",) if several > 1 else ()


def _beside(shown: Shown) -> tuple[str, ...]:
    """Which keys a row sees that no pattern beside has: behind the first ones and before its window."""
    first = (f"(n >= {shown.sink * shown.size})[:, None]",) if shown.sink else ()
    return (f"(n[:, None] < ({shown.before('position')})[None, :])", *first)


def _behind(shape: Shape, left: int, *, key: str = "n", aside: int = 0) -> tuple[str, ...]:
    """Which keys a row sees that no window beside has, and no block of its own."""
    if aside:
        return (f"{key}[:, None] < position[None, :] // {aside} * {aside}",)
    if not shape.causal:
        return ()
    return (f"{key}[:, None] <= position[None, :]{f' - {left}' if left else ''}",)


def of_tiles(shape: Shape, branch: Branch, *, tiling: axes.Tiling, list_heads: int) -> ColsContext:
    """The keys of a tile for the tiles of rows that chose it, for one query head at a time."""
    own = {shape.query_heads: "head", shape.kv_heads: f"(head // {shape.group})"}
    return replace(
        _of(shape, branch, heads=1),
        tiled=tiling.slots,
        words=axes.words_of(tiling),
        list_of=own.get(list_heads, "0") if list_heads > 1 else "0",
        list_stride=f"(tl.num_programs(1) // {shape.query_heads // list_heads})"
        if list_heads > 1
        else "1",
        visible=("member[None, :] != 0",),
        size=tiling.slots,
        stride=tiling.slots,
    )


def of_window(shape: Shape, branch: Branch, *, window: int | None) -> ColsContext:
    """Keys for the rows that see them: those whose window they are in, or all from their own on."""
    seen = ("n[:, None] <= position[None, :]",) if shape.causal else ()
    start, stop = "n0 - q_offset" if shape.causal else "0", "q_len"
    near: tuple[str, ...] = ()
    if window is not None:
        near = (f"n[:, None] > position[None, :] - {window}",)
        stop = f"tl.minimum(n0 + BLOCK_N - 1 + {window} - q_offset, q_len)"
        if not shape.causal:
            near += (f"n[:, None] < position[None, :] + {window}",)
            start = f"n0 - {window - 1} - q_offset"
    return replace(
        _of(shape, branch, heads=shape.group),
        setup=(f"start = tl.maximum({start}, 0)", f"stop = {stop}"),
        visible=(*seen, *near),
    )


def of_pattern(shape: Shape, branch: Branch, op: Attend) -> ColsContext:
    """Keys for the rows that a pattern shows them to."""
    assert op.pattern is not None, "a static branch has a pattern"
    if op.pattern.axes:
        found = boxes.Boxes.of(op.pattern)
        by_box = boxes.takers(found)
        return replace(
            _of(shape, branch, heads=shape.group),
            setup=by_box.setup,
            at=by_box.at,
            visible=by_box.visible,
            box=found.box,
        )
    rule = patterns.rule_of(op)
    takers = patterns.takers(shape, rule)
    return replace(
        _of(shape, branch, heads=1 if takers.heads else shape.group),
        setup=takers.setup,
        at=takers.at,
        of_rows=takers.of_rows,
        visible=takers.visible,
        turns=takers.heads,
        ways=rule.ways,
    )


def of_pooled(shape: Shape, branch: Branch, *, entries: Entries) -> ColsContext:
    """Pooled entries for the rows that they are complete for, these cut into chunks."""
    complete = rows.complete("position", entries, shape.causal)
    start = f"n0 * {entries.stride} + {entries.size - 1} - q_offset" if shape.causal else "0"
    size = f"{entries.size}, {entries.stride}, {entries.short}"
    return replace(
        _of(shape, branch, heads=shape.group),
        stride=entries.stride,
        key_row=f"k_first // {entries.stride}",
        keys=f"pooled_entries(k_len, {size})",
        setup=(f"start = tl.maximum({start}, 0)", "stop = q_len"),
        visible=(f"n[:, None] < {complete}[None, :]",) if shape.causal else (),
        split=True,
        entries="N",
    )
