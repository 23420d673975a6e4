"""What fills the `rows` skeleton: for each operator it serves, the text of its loops and addresses.

Decides which keys a tile walks and which mask each needs.  Knows no GPU; tile sizes are tunables.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from hsgen.plan import ElementType, Param

Accumulator = Literal["softmax", "lse", "score", "dq", "delta"]
PhaseKind = Literal[
    "range",
    "steps",
    "boxes",
    "list",
    "picked",
    "gather",
    "children",
    "mapped",
    "slots",
    "columns",
    "crossed",
    "behind",
]
LOG2_E = 1.4426950408889634
FEW_TOKENS = 16
LINE = 100  # characters of an emitted line
MARKED = 64  # tokens of a block whose choice is one word
PICKING = 32  # rows of a tile, at most, that pick tokens: a bit each in a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Columns [offset, offset + width) of a head; width is a power of two, so nothing is padded.

    `clip`: of a query's columns at `source`, those that meet the least (minimum) or the greatest
    (maximum) keys of an entry.
    """

    index: int
    offset: int
    width: int
    source: int
    clip: Literal["", "minimum", "maximum"] = ""

    @property
    def carry(self) -> str:
        """The accumulator argument of this chunk's dot: the first chunk starts from nothing."""
        return "s, " if self.index else ""


def chunks(dim: int) -> tuple[Chunk, ...]:
    """192 = 128 + 64, 96 = 64 + 32, 80 = 64 + 16."""
    widths = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    return tuple(
        Chunk(index=i, offset=offset, width=width, source=offset)
        for i, (offset, width) in enumerate(zip(offsets, widths, strict=True))
    )


def latent_chunks(dim: int, values: int) -> tuple[Chunk, ...]:
    """Keys that begin with their values: 576 of which 512 are a value = 512 + 64."""
    first = chunks(values)
    rest = (
        replace(c, index=len(first) + c.index, offset=values + c.offset, source=values + c.source)
        for c in chunks(dim - values)
    )
    return (*first, *rest)


def bound_chunks(dim: int) -> tuple[Chunk, ...]:
    """The least keys of an entry, then the greatest: one row of twice the columns."""
    low = tuple(replace(c, clip="minimum") for c in chunks(dim))
    high = (
        replace(c, index=len(low) + c.index, offset=dim + c.offset, clip="maximum") for c in low
    )
    return (*low, *high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One loop over keys.  `inside`: which to load; `visible`: which each row sees; empty: all."""

    kind: PhaseKind
    comment: str
    start: str
    stop: str
    inside: str = ""
    visible: tuple[str, ...] = ()
    at: tuple[str, ...] = ()  # statements that say where the keys of step i begin, `n0`
    body: tuple[str, ...] = ()  # statements at the head of each turn
    members: bool = False  # WORDS says of each step of a list which rows chose it
    slot: str = "n"  # where a score goes
    written: str = ""
    keys: str = "k"  # names of the keys and of the values that it walks begin so
    values: str = "v"
    slots: int = 0  # of an entry of a list, side by side
    counts: int = 0  # > 0: keys are means of so many tokens, whose logarithm is added to logits

    def tensor(self, x: str) -> str:
        """How names of its tensor of keys, or of values, begin."""
        return self.keys if x == "k" else self.values


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """One of several branches whose outputs, each times its gate, make one sum.

    The first that runs stores its own; each later one adds its own to what is there.
    """

    column: int  # its place among the gates
    branches: int
    first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """One of several branches under one softmax, of which no two see the same key.

    The first that runs stores its own; each later one goes on from the output and the log-sum-exp
    that are there.
    """

    first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One of several branches whose outputs are weighed at the end and kept for the gradient of each.

    They are in float32: delta is made of them, and what 16 bits round off would be in every gradient.
    One that is alone is as wide as an output that no gate weighs, of which delta is made too.
    """

    first: bool = True  # nothing is there before it
    wide: bool = True


Turn = Gated | Joined | Kept


class InTurn:
    """What templates read of a branch's turn."""

    __slots__ = ()
    turn: Turn | None

    @property
    def gate(self) -> Gated | None:
        return self.turn if isinstance(self.turn, Gated) else None

    @property
    def joins(self) -> bool:
        """Whether its softmax goes on from what branches before have left."""
        return isinstance(self.turn, Joined) and not self.turn.first

    @property
    def store(self) -> str:
        """The piece that writes outputs: those of a later branch are added to what is there."""
        return "add_outputs" if self.gate and not self.gate.first else "store_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Tokens that lie next to each other along three axes, the last one fastest.

    `size`: of it along each axis; `lengths`: of all axes but the first.
    """

    size: tuple[int, int, int]
    lengths: tuple[int, int]

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    @property
    def slab(self) -> int:
        """Tokens of boxes side by side along all axes but the first."""
        return self.size[0] * math.prod(self.lengths)

    @property
    def line(self) -> int:
        """Boxes along the last axis."""
        return -(-self.lengths[1] // self.size[2])

    @property
    def across(self) -> int:
        """Boxes of a slab."""
        return -(-self.lengths[0] // self.size[1]) * self.line

    def within(self, slot: str) -> str:
        """Whether a slot is a token's that lies at y and w, as an expression."""
        return f"(y < {self.lengths[0]}) & (w < {self.lengths[1]}) & ({slot} < {self.tokens})"

    def place(self, x: str, y: str, w: str) -> str:
        """The token at a place, as an expression."""
        return f"({x} * {self.lengths[0]} + {y}) * {self.lengths[1]} + {w}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsContext(InTurn):
    """Everything `rows.py.jinja` reads."""

    name: str
    summary: str
    params: tuple[Param, ...]
    header: str = ""
    pieces: str = ""
    acc: Accumulator
    rows_comment: str
    heads: int  # query heads of a token, packed in a tile
    pitch: int  # rows between tokens: heads, or the next power of two where heads are reduced
    qk_chunks: tuple[Chunk, ...]
    phases: tuple[Phase, ...]
    key_head: str
    key_row: str
    setup: tuple[str, ...]
    precision: str
    parts: bool = False  # a token's heads are those of several programs, BLOCK_H of each
    latent: bool = False  # values are the first channels of keys: a tile of keys is loaded once
    v_chunks: tuple[Chunk, ...] = ()
    value_head: str = ""
    scale_log2: str = ""
    cap: str = ""  # scale and bound of logits, where they are capped before the softmax
    sink: bool = False
    tile: str = ""  # empty: `program`
    width_of_list: int = 0  # > 0: rows are items of a block's list, `width_of_list` slots a row
    stride: int = 1
    width: int = 0
    united: int = 0  # > 0: an entry of a list says in so many bits which heads chose it
    children: int = 0
    parent_heads: int = 1  # of a row's parents
    many_keys: bool = False  # an entry is scored every few tokens
    keys_first: bool = False  # scores are [keys, rows]: heads that are reduced lie in one thread
    ratio: int = 1
    first_tap: int = 0
    end_tap: int = 1
    identity: str = "0.0"
    value: str = ""
    mute_padding: bool = False  # heads that only pad the tile must not win a maximum
    reduced: str = ""
    fold: str = ""
    folded: Literal["", "sum", "max"] = ""  # how neighbouring entries become one of a coarser level
    planes: int = 1  # of the scratch: 2 where an entry also counts in the slot after its own
    together: Literal["", "blocks", "part"] = ""  # rows are blocks of rows, or some of one block
    rows_together: int = 0  # of a block
    turn: Turn | None = None  # of a branch that is one of several
    split: bool = False  # a program walks a share of the keys, and leaves a part of each softmax
    by_parts: bool = False  # queries in float32 meet keys of 16 bits in parts of as many
    by_shares: bool = False  # so do programs of a tile of many rows, which are scored
    page: int = 0  # > 0: keys lie in pages of so many tokens
    scale: str = ""  # of logits, in a gradient
    adds: bool = False  # to the gradient of other branches
    gives: bool = False  # of a gradient: a tile also leaves what it gives those of its list's keys
    leaves: bool = False  # logarithms of weights, for the choice that is made of them
    eight: bool = False  # queries and keys are e4m3 numbers, a byte each
    powers: bool = False  # each of which vectors is times a power of two of its own
    slotted: bool = (
        False  # rows are slots of tiles, and an order says which row of a tensor each is
    )
    by_turns: bool = False  # heads have turns: keys, values and lists are those of a turn's heads
    across: int = 0  # > 0: scores are of so many key heads together, which a program has one by one
    across_how: Literal["", "sum", "mean", "max"] = ""
    of_head: tuple[str, ...] = ()  # what rows load for each of them
    units: int = 0  # > 0: steps begin with units of so many keys, and none leaves its unit
    most_tokens: int = 0  # > 0: of a tile
    box: Box | None = None  # a tile's rows are those of one
    order_head: str = ""  # where an order of keys has a program's key head; empty: there is none
    bias_scale: str = ""  # what a key's bias is times in a tile of logits; empty: keys have none
    list_of_keys: str = (
        ""  # where a list of the keys of a head is, which is an order of some of them
    )
    sifted: bool = False  # rows of a head are in an order of their own
    own_from: str = ""  # where the keys of a row begin whose sum is also told alone; empty: nowhere

    @property
    def ordered(self) -> bool:
        """Whether keys are read through an order of theirs, which says the token of a slot."""
        return bool(self.order_head or self.list_of_keys)

    @property
    def order(self) -> str:
        """Where the tokens of slots are."""
        return self.list_of_keys or f"ORDER + z.to(tl.int64) * order_b{self.order_head} + k_first"

    @property
    def row_order(self) -> str:
        """Where an order of rows is; empty: they are in place."""
        if self.sifted:
            return "own_rows"
        return "ORDER + q_first" if self.slotted else ""

    @property
    def bias_head(self) -> str:
        """Where biases of the key head begin."""
        return self.key_head.replace("k_h", "bias_h")

    @property
    def derives(self) -> bool:
        """Whether it makes a gradient, from outputs' and the log-sum-exp."""
        return self.acc in ("dq", "delta")

    @property
    def cap_bound(self) -> str:
        """By what logits are capped."""
        return bound_of(self.cap)

    @property
    def reads_values(self) -> bool:
        return self.acc == "softmax" or self.derives

    @property
    def widened(self) -> str:
        """Keys beside the queries of blocks, which are kept in float32."""
        return ".to(tl.float32)" if self.together == "blocks" else ""

    @property
    def absent(self) -> str:
        """Whether the tile has no row."""
        if self.box:
            return "(least >= q_len) | (most < 0)"
        if self.together == "part":
            return "(tl.maximum(t0, 0) >= q_len) | (t0 + BLOCK_T <= 0)"
        return "t0 >= q_len"

    @property
    def first_token(self) -> str:
        """The tile's first row."""
        return "tl.maximum(t0, 0)" if self.together == "part" else "t0"

    @property
    def values(self) -> str:
        """Tiles of values: of a latent the first tiles of keys, which have the same chunks."""
        return "k" if self.latent else "v"

    @property
    def loaded(self) -> tuple[tuple[str, tuple[Chunk, ...]], ...]:
        """Tiles of a step: of keys, and of values where these are not in them."""
        keys = ("k", self.qk_chunks)
        return (keys,) if self.latent else (keys, ("v", self.v_chunks))

    @property
    def one_token(self) -> bool:
        """Whether a program takes one of a tile's tokens: a list that is gathered is one row's, and so are
        keys at distances from it.
        """
        return any(phase.kind in ("gather", "behind") for phase in self.phases)

    @property
    def behind(self) -> bool:
        """Whether keys lie at distances from a row, which its body says: `k_at`."""
        return any(phase.kind == "behind" for phase in self.phases)

    @property
    def alike(self) -> bool:
        """Whether tiles are numbered by sequences, all of which have as many rows in a call: those of a step.

        A program of a list that is gathered has a row of such a tile.
        """
        if self.by_shares:
            return False
        return self.split and (self.one_token or not (self.children or self.parts))

    @property
    def tokens(self) -> str:
        """How many tokens a program takes."""
        return "1" if self.one_token else "BLOCK_T"

    @property
    def out_token(self) -> str:
        """Where a row's output goes: its token, or the slot that is a part of it."""
        return "item" if self.width_of_list or self.split else "q_token"

    @property
    def slots(self) -> str:
        """How many slots of a list there are: a token each."""
        return "used" if self.united else str(self.width * self.stride)

    @property
    def listed(self) -> str:
        """Which entry of a list a slot is of: each has `stride` tokens."""
        return "slot" if self.stride == 1 else f"slot // {self.stride}"

    @property
    def gathered(self) -> str:
        """The token of a slot, -1 where there is none."""
        if self.stride == 1 and not self.united:
            return "ahead"
        entry = f"(ahead >> {self.united})" if self.united else "ahead"
        return f"tl.where(ahead < 0, -1, {entry} * {self.stride} + slot % {self.stride})"

    @property
    def first_slot(self) -> str:
        """Where a walk over slots begins, as what is added to the place in a tile."""
        return "share_first + " if self.split else ""

    def rows_of(self, keys: str) -> str:
        """Rows of the keys `n` in their tensor, whose names begin so."""
        if self.ordered or self.behind:
            return f"{keys}_row + k_at"
        return f"{keys}_at" if self.page else f"{keys}_row + n"

    @property
    def out_head(self) -> str:
        return "turn" if self.width_of_list else "row_head"

    @property
    def out(self) -> str:
        """The address of an output row, as `store_outputs` takes it."""
        return f"{self.out_token}, o_t, {self.out_head}, o_h"

    @property
    def of_rows(self) -> str:
        """The index that spreads a vector of rows over a tile of scores."""
        return "[None, :]" if self.keys_first else "[:, None]"

    @property
    def of_keys(self) -> str:
        """The index that spreads a vector of keys over a tile of scores."""
        return "[:, None]" if self.keys_first else "[None, :]"

    @property
    def row_length(self) -> str:
        """From one row of the scratch to the next."""
        return "capacity" if self.planes == 1 else f"{self.planes} * capacity"

    @property
    def program(self) -> str:
        """The number of a program among those of its heads: the parts of one token lie side by side."""
        return "program" if self.parts else "tl.program_id(0)"

    @property
    def scored(self) -> str:
        """What becomes of a tile of scores; a key's power of two is that of all its heads."""
        return f"{self.reduced} * k_power[:, None]" if self.powers else self.reduced

    @property
    def first_of_all(self) -> str:
        """What the score of all heads begins with."""
        return 'float("-inf")' if self.across_how == "max" else "0.0"

    @property
    def of_all(self) -> str:
        """What it becomes with the heads of one more key."""
        if self.across_how == "max":
            return f"tl.maximum(total, {self.scored})"
        return f"total + {self.scored}"

    @property
    def of_a_program(self) -> str:
        """The score of all heads, or what becomes of a tile of scores."""
        if not self.across:
            return self.scored
        return f"total * {number(1 / self.across)}" if self.across_how == "mean" else "total"

    @property
    def spread(self) -> bool:
        """Whether a token's heads lie in the tile as it suits their reduction."""
        return "_heads(" in self.reduced

    def token_in_tile(self, rows: str = "rows") -> str:
        """Of (token, head) pairs, the token's place in the tile."""
        if self.spread:
            return f"token_of({rows}, BLOCK_M // {self.pitch}, {self.pitch})"
        return f"{rows} // {self.rows_a_token}"

    def head_in_token(self, rows: str = "rows") -> str:
        """Of (token, head) pairs, the head's place among those of a program."""
        if self.spread:
            return f"head_of({rows}, BLOCK_M // {self.pitch}, {self.pitch})"
        return f"{rows} % {self.pitch}"

    @property
    def rows_a_token(self) -> str:
        """From one token's rows in the tile to the next one's."""
        return "BLOCK_H" if self.parts else str(self.pitch)

    @property
    def alive(self) -> str:
        """Rows that stand for a (token, head) pair of the tile."""
        packed = "rows < " + ("" if self.one_token else "BLOCK_T * ") + self.rows_a_token
        if self.spread:
            packed = "token < t0 + BLOCK_T"
        if self.together == "part":
            packed = f"token >= 0) & ({packed}"
        if self.box:
            packed = f"token >= 0) & there & ({packed}"
        if self.parts:
            return f"{packed}) & (place < {self.heads}"
        return (
            packed
            if self.pitch == self.heads
            else f"{packed}) & ({self.head_in_token()} < {self.heads}"
        )

    def uses(self, name: str) -> bool:
        """Whether any loop or address reads the position `name`."""
        text = " ".join(
            (*self.setup, *(" ".join((p.stop, p.start, p.inside, *p.visible)) for p in self.phases))
        )
        return re.search(rf"\b{name}\b", text) is not None

    @property
    def jit(self) -> str:
        return jit(self.params)


# --- parameters


def jit(params: tuple[Param, ...], module: str = "triton") -> str:
    """The decorator: counts vary freely, and specialising on them would only recompile."""
    names = [f'"{p.name}"' for p in params if p.kind == "count"]
    counts = f"do_not_specialize=[{', '.join(names)}]"
    line = f"@{module}.jit({counts})"
    if len(line) <= LINE:
        return line
    if len(counts) > LINE - 4:
        each = "".join(f"        {name},\n" for name in names)
        counts = f"do_not_specialize=[\n{each}    ]"
    return f"@{module}.jit(\n    {counts}\n)"


class Warped:
    """What contexts of kernels in Gluon have in common, whose warps are each given all arguments."""

    __slots__ = ()
    params: tuple[Param, ...]

    @property
    def decorator(self) -> str:
        return jit(self.params, "gluon")

    @property
    def tunables(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.params if p.kind == "constexpr")

    @property
    def declared_tunables(self) -> tuple[str, ...]:
        return tuple(f"{name}: gl.constexpr" for name in self.tunables)

    @property
    def plain(self) -> tuple[str, ...]:
        """Arguments that groups read: all but descriptors."""
        return tuple(p.name for p in self.params if p.kind not in ("tiles", "constexpr"))


def pointer(name: str, dtype: ElementType, comment: str) -> Param:
    return Param(name=name, kind="pointer", dtype=dtype, comment=comment)


def tensor(
    name: str, prefix: str, comment: str, strides: str, dtype: ElementType = "input"
) -> tuple[Param, ...]:
    """A pointer and strides of its dimensions, one letter each."""
    pointer = Param(name=name, kind="pointer", comment=comment, dtype=dtype)
    words = {"b": "batch", "t": "token", "h": "head", "c": "channel", "s": "slot"}
    return (
        pointer,
        *(
            Param(name=f"{prefix}_{s}", kind="stride", comment=f"{name}: {words[s]} stride")
            for s in strides
        ),
    )


def lse(name: str = "LSE", comment: str = "f32[B, Hq, T]") -> tuple[Param, ...]:
    """A log-sum-exp and its strides.  The first two follow a call's length, odd or even: a kernel that
    looked at them would be compiled for each.
    """
    strides = tensor(name, "lse", comment, "bht", "f32")
    return tuple(replace(p, kind="count") if p.name in ("lse_b", "lse_h") else p for p in strides)


def constexprs(*names: str) -> tuple[Param, ...]:
    comments = {
        "BLOCK_T": "tokens a tile",
        "BLOCK_M": "rows a tile",
        "BLOCK_N": "keys a step",
        "BLOCK_H": "heads of a token a tile",
    }
    return tuple(Param(name=n, kind="constexpr", comment=comments[n]) for n in names)


def in_float32(params: tuple[Param, ...]) -> tuple[Param, ...]:
    """The same where all that is in the dtype of the caller's tensors is in float32 instead."""
    return tuple(
        replace(p, dtype="f32", comment=f"f32{p.comment}") if p.dtype == "input" else p
        for p in params
    )


def count(name: str, comment: str) -> Param:
    return Param(name=name, kind="count", comment=comment)


SEQ = (
    pointer("SEQ", "i32", "[Z, 6] sequences"),
    count("num_sequences", "Z"),
)
BLOCKS = constexprs("BLOCK_T", "BLOCK_M", "BLOCK_N")
BIAS = tensor("BIAS", "bias", "[B, S, Hkv] of keys", "bth")
QUERY = tensor("Q", "q", "[B, T, Hq, Dqk]", "bth")
# of vectors of e4m3 numbers
POWERS = (
    *tensor("Q_POWER", "qp", "f32[B, T, Hi] that queries are times", "bt", "f32"),
    *tensor("K_POWER", "kp", "f32[B, S] that keys are times", "b", "f32"),
)
SINK = pointer("SINK", "input", "[Hq]")
# an order of keys, as kernels look it up
ORDER = (
    pointer("ORDER", "i32", "[B, Hkv, S] the token of each slot"),
    count("order_b", "ORDER: batch stride"),
    count("order_h", "ORDER: head stride"),
)
OUTPUTS = (
    *tensor("O", "o", "[B, T, Hq, Dv]", "bth"),
    *lse(),
)
OUTPUT_GRADIENT = tensor("DO", "do", "[B, T, Hq, Dv]", "bth")
SUMS = (  # what gradients read of rows
    *lse(),
    pointer("DELTA", "f32", "f32[B, Hq, T], as LSE"),
)


def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def least_rows(pitch: int) -> int:
    """Rows of a tile of one token: a dot has sixteen."""
    return max(16, next_power(pitch))


BIT_WORDS = count("words", "of a row of bits")


def bits_of(heads: int) -> Param:
    """What each block of rows chose."""
    return pointer("BITS", "i32", f"[blocks, {heads}, words] a bit by entry")


def number(x: float) -> str:
    """A literal that reads back as the same float."""
    return repr(float(x))


def complete(position: str, entries: Entries, causal: bool) -> str:
    """How many entries are complete at `position`, as an expression."""
    return f"complete_limit({position}, k_len, {entries.size}, {entries.stride}, {causal}, {entries.short})"


def seen_by(position: str, entries: Entries | None, *, causal: bool) -> str:
    """How many tokens a row at such a position sees, or entries that are complete, as an expression."""
    if entries is not None:
        return complete(position if causal else "0", entries, causal)
    return f"tl.minimum({position} + 1, k_len)" if causal else "k_len"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Entry e covers tokens [e * stride, e * stride + size); `short`: the last one may be cut off."""

    size: int
    stride: int
    short: bool = False


PAGES = (
    pointer("PAGES", "i32", "[Z, pages] where each page of a sequence is"),
    count("pages", "most pages of a sequence"),
    count("page_rows", "rows of keys from one page to the next"),
    count("pool", "pages of all sequences"),
)


def pages_of(page: int) -> tuple[Param, ...]:
    """What says where pages are."""
    return PAGES if page else ()


def page_arguments(page: int) -> tuple[str, ...]:
    """The same, of a batch."""
    names = ("pages", "pages.stride(0)", "page_rows", "pool")
    return tuple(f"batch.{name}" for name in names) if page else ()


def with_pages(context: RowsContext, page: int) -> RowsContext:
    """The same loops over keys that lie in pages; entries that are pooled do not."""
    if not page:
        return context
    at = [p.name for p in context.params].index("SEQ")
    params = (*context.params[:at], *PAGES, *context.params[at:])
    return replace(context, params=params, page=page)


# --- shares of the keys


def with_split(context: RowsContext) -> RowsContext:
    """The same loops, shared by the programs of a third axis.

    Scores need no more: each goes to its own place.  Of a softmax every program leaves a part, its output
    normalised and its log-sum-exp, from which the whole is merged.
    """
    unit = "1" if context.phases[0].kind in ("list", "children", "steps") else "BLOCK_N"
    begin, end = context.phases[0].start, context.phases[-1].stop
    keys = "walked" if begin == "0" else f"walked - {begin}"
    steps = keys if unit == "1" else f"({keys} + BLOCK_N - 1) // BLOCK_N"
    scale = "" if unit == "1" else " * BLOCK_N"
    setup = [
        *WORKER,
        f"walked = {end}",
        f"steps = {steps}",
        f"share = (steps + workers - 1) // workers{scale}",
        "share_first = " + ("" if begin == "0" else f"{begin} + ") + "worker * share",
        "share_end = tl.minimum(share_first + share, walked)",
    ]
    params = context.params
    if context.acc != "score":
        setup.append("item = (tl.load(SEQ + z * 6) + token) * workers + worker")
        params = tuple(PARTS.get(p.name, p) for p in params)
    phases = tuple(
        replace(
            phase,
            start="share_first"
            if phase.start == begin
            else f"tl.maximum({phase.start}, share_first)",
            stop="share_end" if phase.stop == end else f"tl.minimum({phase.stop}, share_end)",
        )
        for phase in context.phases
    )
    return replace(
        context,
        params=params,
        setup=(*context.setup, *setup),
        phases=phases,
        split=True,
    )


def with_shares(context: RowsContext) -> RowsContext:
    """The same scores of a tile of many rows: few tiles fill a scratch, so programs share a tile's keys."""
    return replace(with_split(context), by_shares=True)


WORKER = ("worker = tl.program_id(2)", "workers = tl.num_programs(2)")  # of those that share a row
PARTS = {
    "O": pointer("O", "f32", "f32[Hq, items, Dv] parts of each row's output"),
    "LSE": pointer("LSE", "f32", "f32[Hq, items] and their log-sum-exps"),
}


def with_fours(context: RowsContext) -> RowsContext:
    """The same scores of a step; behind the last one of a row, up to a multiple of four, is something too.

    What it is does not matter: who reads four at once takes no key from it.
    """
    (phase,) = context.phases
    return replace(context, phases=(replace(phase, written="n < (stop + 3) // 4 * 4"),))


# --- attend


LOGITS = (
    pointer("LOGITS", "f32", "f32[rows, Hkv, group, length] in base 2, see `log_of`"),
    count("length", "of a row, a multiple of 4"),
)


def with_logits_left(context: RowsContext, scoring: Scoring, *, causal: bool) -> RowsContext:
    """The same attend, which leaves for a choice what each entry of the target has of every head's weights.

    As logarithms, of which the choice takes the log-sum-exp: weights of entries that count in one of the
    target are added here, so that a step writes and reads a number for some entries, not for each.
    """
    at = [p.name for p in context.params].index("SEQ")
    row = "logit_row = (tl.load(SEQ + z * 6) + token).to(tl.int64) * tl.num_programs(1) + head"
    heads = context.heads
    base = f"logits = LOGITS + (logit_row * {heads} + row_head - head * {heads}) * length"
    target = scoring.target if scoring.folded else scoring.entries
    return replace(
        context,
        params=(*context.params[:at], *LOGITS, *context.params[at:]),
        leaves=True,
        folded=scoring.folded,
        ratio=scoring.ratio,
        planes=scoring.planes,
        setup=(
            *context.setup,
            row,
            base,
            f"target_stop = {complete('last', target, causal)}",
            *(_taps(scoring) if scoring.folded else ()),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of a spec that every rows kernel needs."""

    query_heads: int
    kv_heads: int
    qk: int
    v: int
    causal: bool
    precision: str
    latent: bool = False  # of the branch: values are the first channels of keys

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


class Heads(TypedDict):
    """The fields of `RowsContext` that say which heads a program has, and of what its keys are."""

    rows_comment: str
    heads: int
    pitch: int
    parts: bool
    latent: bool
    qk_chunks: tuple[Chunk, ...]
    v_chunks: tuple[Chunk, ...]
    key_head: str
    value_head: str


def heads_of(shape: Shape, *, per_head: bool, values: bool = True) -> Heads:
    """One query head, or all that share a key head; of a wide latent as many as a tile holds."""
    heads = 1 if per_head else shape.group
    parts = shape.latent and heads > 1
    what = "one query head" if per_head else "the group's heads"
    return {
        "rows_comment": _packing(heads, what)
        if not parts
        else f"BLOCK_T tokens x BLOCK_H of {heads} heads that share a key, padded to BLOCK_M",
        "heads": heads,
        "pitch": next_power(heads) if parts else heads,
        "parts": parts,
        "latent": shape.latent,
        "qk_chunks": latent_chunks(shape.qk, shape.v) if shape.latent else chunks(shape.qk),
        "v_chunks": chunks(shape.v) if values else (),
        "key_head": kv_head("k_h", shape, per_head=per_head),
        "value_head": kv_head("v_h", shape, per_head=per_head),
    }


def keys_and_values(shape: Shape, entries: str = "S") -> tuple[Param, ...]:
    """The tensors of keys and of values; of a latent one."""
    keys = tensor("K", "k", f"[B, {entries}, Hkv, Dqk]", "bth")
    return keys if shape.latent else (*keys, *tensor("V", "v", f"[B, {entries}, Hkv, Dv]", "bth"))


def with_logits(
    context: RowsContext, *, scale: float, softcap: float | None, sink: bool
) -> RowsContext:
    """The same attend with capped logits, or with one more logit a head in the denominator."""
    if softcap is not None:
        context = replace(context, cap=cap_of(scale, softcap), scale_log2=number(LOG2_E))
    if not sink:
        return context
    at = [p.name for p in context.params].index("O")
    params = (*context.params[:at], SINK, *context.params[at:])
    return replace(context, sink=True, params=params)


def cap_of(scale: float, softcap: float) -> str:
    """Scale and bound of logits, as templates have them."""
    return f"{number(scale)}, {number(softcap)}"


def bound_of(cap: str) -> str:
    """Of such text the bound."""
    return cap.rpartition(", ")[2]


def with_bias(context: RowsContext, *, scale: float) -> RowsContext:
    """The same attend with a bias of each key, which logits have beside their scale."""
    at = [p.name for p in context.params].index("v_h") + 1
    params = (*context.params[:at], *BIAS, *context.params[at:])
    return replace(context, params=params, bias_scale=bias_scale(scale, capped=bool(context.cap)))


def bias_scale(scale: float, *, capped: bool = False) -> str:
    """What a bias is times beside a dot that is yet to be scaled."""
    return number(1.0 if capped else 1.0 / scale)


def with_turn(context: RowsContext, turn: Turn | None) -> RowsContext:
    """The same attend as one of several branches."""
    at = [p.name for p in context.params].index("O")
    first, *more = context.params[at:]
    params = (*context.params[:at], *gates_of(turn), output_of(first, turn), *more)
    return replace(context, turn=turn, params=params)


def output_of(param: Param, turn: Turn | None) -> Param:
    """What a branch writes."""
    if not isinstance(turn, Kept) or not turn.wide:
        return param
    return replace(param, dtype="f32", comment=f"f32{param.comment}")


def gates_of(turn: Turn | None) -> tuple[Param, ...]:
    """The tensor of gates."""
    if not isinstance(turn, Gated):
        return ()
    return tensor("GATES", "g", f"[B, T, Hq, {turn.branches}]", "bthc")


def blocks(heads: Heads) -> tuple[Param, ...]:
    """The tile sizes of an attend."""
    return (*BLOCKS, *constexprs(*(("BLOCK_H",) if heads["parts"] else ())))


def program_of(heads: Heads) -> str:
    """As `RowsContext.program`."""
    return "program" if heads["parts"] else "tl.program_id(0)"


def rows_a_token(heads: Heads) -> str:
    """As `RowsContext.rows_a_token`."""
    return "BLOCK_H" if heads["parts"] else str(heads["pitch"])


def _seen_rows(shape: Shape, left: int = 0) -> tuple[str, ...]:
    """Where what each row sees ends: one comparison for the sequence's end and the row's position."""
    after = f"- {left - 1}" if left > 1 else f"+ {1 - left}"
    return (f"seen = tl.minimum(position {after}, k_len)",) if shape.causal else ()


def _seen(shape: Shape, *more: str) -> tuple[str, ...]:
    """Which raw tokens n each row sees."""
    return ("n[None, :] < seen[:, None]" if shape.causal else "(n < k_len)[None, :]", *more)


def attend_blocks(
    shape: Shape,
    *,
    name: str,
    scale: float,
    entries: Entries,
    width: int,
    share: str,
    sets: bool = False,
    left: int = 0,
) -> RowsContext:
    """One softmax over the tokens of selected blocks: the union lists of a tile, full ones first.

    `sets`: of some tiles at a time, with room for `capacity` blocks each.
    `left`: without the tokens of a window beside it, so many.
    """
    size, stride = entries.size, entries.stride
    heads = heads_of(shape, per_head=share == "Hq")
    program = program_of(heads) if sets else "tile"
    ragged = size < 16 or size != next_power(size)
    within = f"n < entry * {stride} + {size}"
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    list_row = f"{program}.to(tl.int64) * {list_heads}" + (" + head" if list_heads > 1 else "")
    member = (
        "words = WORDS + (list_base + i // TILES) * num_words",
        "member = tl.load(words + word) >> bit & 1",
    )
    seen = "seen" if shape.causal else "k_len"
    tail = f"({within}) & (n < k_len)" if ragged else "n < k_len"
    own = (f"({within})[None, :]",) if ragged else ()
    slots = "capacity" if sets else "BLOCK_T * K"
    return RowsContext(
        name=name,
        summary="attention over the blocks each query selected, a tile's blocks walked once.",
        params=(
            *QUERY,
            *keys_and_values(shape),
            pointer("COUNTS", "i32", "[tiles, H, 2] full, partial"),
            pointer("ENTRIES", "i32", f"[tiles, H, {slots}] blocks"),
            pointer("WORDS", "i32", f"[tiles, H, {slots}, words] members"),
            *((count("capacity", "blocks of a tile's list"),) if sets else ()),
            *OUTPUTS,
            *SEQ,
            *((count("tile_first", "the turn's first tile"),) if sets else ()),
            *blocks(heads),
        ),
        acc="softmax",
        tile=f"{program} + tile_first" if sets else "",
        **heads,
        key_row="k_first",
        setup=(
            f"list_row = {list_row}",
            "list_base = list_row * capacity"
            if sets
            else f"list_base = list_row * (BLOCK_T * {width})",
            "num_words: tl.constexpr = (BLOCK_T + 31) // 32",
            f"TILES: tl.constexpr = ({size} + BLOCK_N - 1) // BLOCK_N",
            "full = tl.load(COUNTS + list_row * 2)",
            "partial = tl.load(COUNTS + list_row * 2 + 1)",
            f"word = tl.minimum(rows // {rows_a_token(heads)}, BLOCK_T - 1) // 32",
            f"bit = rows // {rows_a_token(heads)} % 32",
            *_seen_rows(shape, left),
        ),
        phases=(
            Phase(
                kind="list",
                comment="full blocks: every row sees every token",
                start="0",
                stop="full * TILES",
                inside=tail if ragged else "",
                visible=own,
            ),
            Phase(
                kind="list",
                comment="partial blocks: members only, and what each row may see",
                start="full * TILES",
                stop="(full + partial) * TILES",
                members=True,
                body=(*member, f"limit = tl.where(member > 0, {seen}, 0)"),
                inside=tail,
                visible=("n[None, :] < limit[:, None]", *own),
            ),
        ),
        stride=stride,
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def attend_marked(shape: Shape, *, name: str, scale: float, share: str) -> RowsContext:
    """One softmax over the tokens that rows marked in the blocks of 64 that a tile's rows touch."""
    heads = heads_of(shape, per_head=share == "Hq")
    of_token, program = rows_a_token(heads), program_of(heads)
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    own = " + head" if list_heads > 1 else ""
    return RowsContext(
        name=name,
        summary="attention over the tokens each query selected, a tile's blocks of 64 walked once.",
        params=(
            *QUERY,
            *keys_and_values(shape),
            pointer("COUNTS", "i32", "[tiles, H] blocks; -1: none"),
            pointer("ENTRIES", "i32", "[tiles, H, capacity] blocks"),
            pointer("MARKS", "i64", "[tiles * BLOCK_T, H, capacity] tokens as bits"),
            count("capacity", "blocks of the longest sequence"),
            *OUTPUTS,
            *SEQ,
            count("tile_first", "the turn's first tile"),
            *blocks(heads),
        ),
        acc="softmax",
        tile=f"{program} + tile_first",
        **heads,
        key_row="k_first",
        setup=(
            f"list_row = {program}.to(tl.int64) * {list_heads}{own}",
            "blocks = tl.load(COUNTS + list_row)",
            "if blocks < 0:",
            "    return",
            "list_base = list_row * capacity",
            f"mark_row = {program} * BLOCK_T + tl.minimum(rows // {of_token}, BLOCK_T - 1)",
            f"marks = MARKS + (mark_row.to(tl.int64) * {list_heads}{own}) * capacity",
            f"TILES: tl.constexpr = ({MARKED} + BLOCK_N - 1) // BLOCK_N",
        ),
        phases=(
            Phase(
                kind="list",
                comment="blocks of which any row chose a token",
                start="0",
                stop="blocks * TILES",
                body=(
                    "word = tl.load(marks + entry)",
                    "column = i % TILES * BLOCK_N + tl.arange(0, BLOCK_N)",
                ),
                inside="n < k_len",
                visible=("marked(word, column)",),
            ),
        ),
        stride=MARKED,
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def attend_picked(
    shape: Shape,
    *,
    name: str,
    scale: float,
    share: str,
    alone: bool = False,
    whole: bool = False,
    entries: Entries | None = None,
) -> RowsContext:
    """One softmax over the tokens that a tile's rows chose, each gathered once.

    `alone`: in all tiles, by loops; else in a stream, which leaves out tiles whose union is dear, unless
    `whole` says that nobody else takes these.  `entries`: of pooled ones in place of tokens.
    """
    what = "entries" if entries else "tokens"
    every = alone or whole
    heads = heads_of(shape, per_head=share == "Hq")
    of_token, program = rows_a_token(heads), program_of(heads)
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    own = " + head" if list_heads > 1 else ""
    return RowsContext(
        name=name,
        summary=f"attention over the {what} each query selected, those of a tile gathered once.",
        params=(
            *QUERY,
            *keys_and_values(shape, "N" if entries else "S"),
            pointer("COUNTS", "i32", f"[tiles, H] {what}" + ("" if every else "; -1: none")),
            pointer("ENTRIES", "i32", f"[tiles, H, capacity] {what}"),
            pointer("MEMBERS", "i32", "[tiles, H, capacity] rows as bits"),
            count("capacity", f"{what} of the longest sequence"),
            *OUTPUTS,
            *SEQ,
            count("tile_first", "the turn's first tile"),
            *blocks(heads),
        ),
        acc="softmax",
        tile=f"{program} + tile_first",
        **heads,
        key_row=f"k_first // {entries.stride}" if entries else "k_first",
        setup=(
            f"list_row = {program}.to(tl.int64) * {list_heads}{own}",
            "picked = tl.load(COUNTS + list_row)",
            *(() if every else ("if picked < 0:", "    return")),
            "list_base = list_row * capacity",
            f"own_bit = 1 << tl.minimum(rows // {of_token}, BLOCK_T - 1)",
        ),
        phases=(
            Phase(
                kind="picked",
                comment=f"{what} that any row chose",
                start="0",
                stop="(picked + BLOCK_N - 1) // BLOCK_N",
                inside="(n >= 0) & (n < k_len)" if alone else "",
                visible=("(members[None, :] & own_bit[:, None]) != 0",),
            ),
        ),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def attend_tokens(
    shape: Shape,
    *,
    name: str,
    scale: float,
    width: int,
    share: str,
    alone: bool = False,
    size: int = 1,
    window: int = 0,
    entries: Entries | None = None,
) -> RowsContext:
    """One softmax over a query's own list of tokens, gathered, in tiles whose union costs more.

    `alone`: in all tiles, without counts.  `size`: of a list's entries, blocks of so many tokens.
    `window`: the last so many tokens are those of another branch.  `entries`: the list is of pooled
    ones in place of tokens, of which a row has those that are complete.
    """
    heads = heads_of(shape, per_head=share == "Hq")
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    own = " + head" if list_heads > 1 else ""
    program = program_of(heads)
    counts = () if alone else (pointer("COUNTS", "i32", "[tiles, H] blocks; -1: gather"),)
    turns = () if alone else (count("tile_first", "the turn's first tile"),)
    left = (
        f"region = ({program} // BLOCK_T).to(tl.int64) * {list_heads}{own}",
        "if tl.load(COUNTS + region) >= 0:",
        "    return",
    )
    seen = "last + 1" if shape.causal else "k_len"
    before = f"last - {window}" if window else "last"
    causal = f" & (n <= {before})" if shape.causal else ""
    what = "tokens" if size == 1 else "blocks"
    used = seen if size == 1 else f"({seen} + {size - 1}) // {size} * {size}"
    inside = f"(n >= 0) & (n < k_len){causal}"
    comment = "the list is ascending, so no more slots are in use than tokens are seen"
    if entries is not None:
        what, used, inside = "entries", "complete", "(n >= 0) & (n < complete)"
        comment = comment.replace("tokens are seen", "entries are complete")
    return RowsContext(
        name=name,
        summary=f"attention over the {what} each query selected, gathered.",
        params=(
            *QUERY,
            *keys_and_values(shape, "N" if entries else "S"),
            pointer("SELECTION", "i32", f"[rows, H, K] {what}"),
            *counts,
            *OUTPUTS,
            *SEQ,
            *turns,
            *blocks(heads),
        ),
        acc="softmax",
        **heads,
        key_row=f"k_first // {entries.stride}" if entries else "k_first",
        tile=f"{program} // BLOCK_T" + ("" if alone else " + tile_first"),
        setup=(
            *(() if alone else left),
            "list_row = (tl.load(SEQ + z * 6) + t0).to(tl.int64)"
            + (f" * {list_heads}{own}" if list_heads > 1 else ""),
            f"list_base = list_row * {width}",
            *((f"complete = {complete('last', entries, shape.causal)}",) if entries else ()),
        ),
        phases=(
            Phase(
                kind="gather",
                comment=comment,
                start="0",
                stop=f"tl.minimum({width * size}, {used})",
                inside=inside,
                visible=("inside[None, :]",),
            ),
        ),
        width=width,
        stride=size,
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def attend_united(
    shape: Shape, *, name: str, scale: float, width: int, size: int, window: int = 0
) -> RowsContext:
    """The same where every query head has a list of blocks: those of a key head's are walked as one.

    What the heads of a group chose between them is read once, whatever each of them chose.
    """
    group = shape.group
    context = attend_tokens(
        shape,
        name=name,
        scale=scale,
        width=width * group,
        share="Hkv",
        alone=True,
        size=size,
        window=window,
    )
    (phase,) = context.phases
    lists = pointer(
        "SELECTION", "i32", f"[rows, Hkv, 1 + {width * group}] count, blocks and members"
    )
    own = " + head" if shape.kv_heads > 1 else ""
    of_heads = f" * {shape.kv_heads}{own}" if shape.kv_heads > 1 else ""
    return replace(
        context,
        summary="attention over the blocks that the heads of a group selected, each walked once.",
        params=tuple(lists if p.name == "SELECTION" else p for p in context.params),
        setup=(
            f"list_row = (tl.load(SEQ + z * 6) + t0).to(tl.int64){of_heads}",
            f"list_base = list_row * {1 + width * group} + 1",
            f"used = tl.load(SELECTION + list_base - 1) * {size}",
        ),
        phases=(
            replace(
                phase,
                comment="what any head chose, for those that did",
                stop="used",
                visible=("inside[None, :]", "((members[None, :] >> rows[:, None]) & 1) != 0"),
            ),
        ),
        united=group,
    )


def attend_window(shape: Shape, *, name: str, scale: float, window: int) -> RowsContext:
    """One softmax over the last `window` tokens, the query's own among them."""
    heads = heads_of(shape, per_head=False)
    if shape.causal:
        stop, near = (
            "tl.minimum(last + 1, k_len)",
            (f"n[None, :] > position[:, None] - {window}",),
        )
    else:
        stop = f"tl.minimum(last + {window}, k_len)"
        near = (
            f"n[None, :] > position[:, None] - {window}",
            f"n[None, :] < position[:, None] + {window}",
        )
    return RowsContext(
        name=name,
        summary=f"attention over a window of {window} tokens.",
        params=(
            *QUERY,
            *keys_and_values(shape),
            *OUTPUTS,
            *SEQ,
            *blocks(heads),
        ),
        acc="softmax",
        **heads,
        key_row="k_first",
        setup=(
            *_seen_rows(shape),
            f"start = tl.maximum(first - {window - 1}, 0)",
            f"stop = {stop}",
        ),
        phases=(
            Phase(
                kind="range",
                comment="the tile's window",
                start="start",
                stop="stop",
                inside="n < stop",
                visible=_seen(shape, *near),
            ),
        ),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def attend_all(shape: Shape, *, name: str, scale: float) -> RowsContext:
    """One softmax over every token that is seen: dense attention."""
    heads = heads_of(shape, per_head=False)
    everyone = "tl.minimum(tl.maximum(first + 1, 0), k_len)" if shape.causal else "k_len"
    stop = "tl.minimum(last + 1, k_len)" if shape.causal else "k_len"
    return RowsContext(
        name=name,
        summary="attention over all tokens.",
        params=(
            *QUERY,
            *keys_and_values(shape),
            *OUTPUTS,
            *SEQ,
            *blocks(heads),
        ),
        acc="softmax",
        **heads,
        key_row="k_first",
        setup=(
            *_seen_rows(shape),
            f"full = {everyone} // BLOCK_N * BLOCK_N",
            f"stop = {stop}",
        ),
        phases=(
            Phase(kind="range", comment="tokens that every row sees", start="0", stop="full"),
            Phase(
                kind="range",
                comment="tokens up to the tile's last row, or to the end of the sequence",
                start="full",
                stop="stop",
                inside="n < stop",
                visible=_seen(shape),
            ),
        ),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def log_sum_exp_of_all(shape: Shape, *, name: str, scale: float) -> RowsContext:
    """The log-sum-exp alone of dense attention."""
    context = attend_all(shape, name=name, scale=scale)
    return replace(
        context,
        summary="log-sum-exp over all tokens.",
        params=(
            *QUERY,
            *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
            *lse(),
            *SEQ,
            *(p for p in context.params if p.kind == "constexpr"),
        ),
        acc="lse",
        v_chunks=(),
    )


def attend_pooled(
    shape: Shape, *, name: str, scale: float, entries: Entries, values: bool
) -> RowsContext:
    """One softmax over all complete pooled entries; without `values`, its log-sum-exp alone."""
    heads = heads_of(shape, per_head=False, values=values)
    output = OUTPUTS if values else lse()
    keys = keys_and_values(shape, "N") if values else tensor("K", "k", "[B, N, Hkv, Dqk]", "bth")
    return RowsContext(
        name=name,
        summary="attention over pooled entries." if values else "log-sum-exp over pooled entries.",
        params=(
            *QUERY,
            *keys,
            *output,
            *SEQ,
            *blocks(heads),
        ),
        acc="softmax" if values else "lse",
        **heads,
        key_row=f"k_first // {entries.stride}",
        setup=(
            *_complete_rows(shape, entries),
            f"full = {complete('first', entries, shape.causal)} // BLOCK_N * BLOCK_N",
            f"stop = {complete('last', entries, shape.causal)}",
        ),
        phases=(
            Phase(kind="range", comment="entries that every row sees", start="0", stop="full"),
            Phase(
                kind="range",
                comment="entries that become complete within the tile, or end the sequence",
                start="full",
                stop="stop",
                inside="n < stop",
                visible=_complete_keys(shape),
            ),
        ),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


def _complete_rows(shape: Shape, entries: Entries) -> tuple[str, ...]:
    """What each row sees differs only under causality."""
    return (f"complete = {complete('position', entries, shape.causal)}",) if shape.causal else ()


def _complete_keys(shape: Shape, *, keys_first: bool = False) -> tuple[str, ...]:
    if keys_first:
        return ("n[:, None] < complete[None, :]",) if shape.causal else ("inside[:, None]",)
    return ("n[None, :] < complete[:, None]",) if shape.causal else ("inside[None, :]",)


def _packing(heads: int, what: str) -> str:
    return (
        f"BLOCK_T tokens x {heads} heads ({what}), padded to BLOCK_M"
        if heads > 1
        else "BLOCK_T tokens"
    )


def kv_head(stride: str, shape: Shape, *, per_head: bool, head: str = "head") -> str:
    """The address term of the key/value head of a program."""
    own = per_head and shape.group > 1
    return (
        f" + ({head} // {shape.group}).to(tl.int64) * {stride}"
        if own
        else f" + {head}.to(tl.int64) * {stride}"
    )


# --- score


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """One level's score as a chain of steps: form, normalise, reduce over heads, map."""

    form: Literal["dot", "bound", "index_dot", "relu_weighted", "relu_sum"]
    scale: float
    entries: Entries  # the entries scored
    pooled: bool  # keys are pooled entries, else raw tokens
    normalise: bool
    share: Literal["head", "group", "all"]
    reduce: Literal["sum", "mean", "max"] | None
    asking: str = "Hq"  # the dimension of the heads of queries
    borrowed: bool = False  # by the log-sum-exp of another level, which may have no entry yet
    map_how: Literal["overlap_sum", "sum", "max"] | None = None
    target: Entries = Entries(size=0, stride=0)
    taps: tuple[tuple[int, int], ...] = ()
    parent_size: int = 0  # > 0: only children of a parent selection
    parent_width: int = 0
    parent_head: str = ""  # the parent's selection head, of this program's `head`
    parent_heads: int = 1
    rows: int = 0  # > 0: queries are those of blocks of so many rows
    packed: bool = False  # a tile has a group's heads, each with scores of its own
    eight: bool = False  # queries and keys are e4m3 numbers, a byte each
    powers: bool = False  # each of which vectors is times a power of two of its own

    @property
    def by_index(self) -> bool:
        """Whether queries and keys are those of the index: its keys have no heads."""
        return self.form == "index_dot" or self.sums

    @property
    def sums(self) -> bool:
        """Whether heads of the index are summed, with weights or without."""
        return self.form in ("relu_weighted", "relu_sum")

    @property
    def ratio(self) -> int:
        """Source entries from one target entry to the next."""
        return self.target.stride // self.entries.stride if self.map_how else 1

    @property
    def folded(self) -> Literal["", "sum", "max"]:
        """How a tile of source entries is mapped at once: where each counts in its own slot or the next.

        Otherwise tap by tap: a score is computed as often as it counts.
        """
        near = all(-self.ratio <= offset < self.ratio for offset, _ in self.taps)
        if not near or self.ratio not in (2, 4, 8, 16):
            return ""
        return "max" if self.map_how == "max" else "sum"

    @property
    def planes(self) -> int:
        """2 where an entry counts in the slot after its own: `rank` adds what slots hand on."""
        return 2 if self.folded and self.taps[0][0] < 0 else 1

    @property
    def keys_first(self) -> bool:
        """Whether neighbouring rows or keys are combined: then rows lie along a thread's registers."""
        return self.reduce is not None or self.sums or self.map_how is not None


def score(
    shape: Shape, scoring: Scoring, *, name: str, heads: int, dim: int, across: int = 0
) -> RowsContext:
    """Scores of a level's entries into a scratch [rows of the chunk, heads, capacity].

    `heads`: rows that one token brings to a tile; `dim`: length of the scored vectors; `across`: of so many
    key heads, one by one, where all heads have one score and each key head has keys of its own.
    """
    weighted = scoring.form == "relu_weighted"
    pitch = next_power(heads) if scoring.reduce or scoring.sums else heads
    phases, setup = _score_phases(shape, scoring)
    value = _value(scoring)
    identity = _identity(scoring)
    of_row = _row_values(scoring, weighted)
    key = "K", "k", _key_comment(scoring), "bt" if scoring.by_index else "bth"
    asked = "[B, T, Hi, Di]" if scoring.by_index else f"[B, T, {scoring.asking}, Dqk]"
    if scoring.rows:
        asked = f"f32[1, blocks, {scoring.asking}, Dqk]"
    vectors: ElementType = "e4m3" if scoring.eight else "input"
    return RowsContext(
        name=name,
        summary=_score_summary(scoring),
        params=(
            *tensor("Q", "q", asked, "bth", "f32" if scoring.rows else vectors),
            *tensor(*key, vectors),
            *(POWERS if scoring.powers else ()),
            *(tensor("WEIGHT", "w", "[B, T, Hi]", "bt") if weighted else ()),
            *(lse() if scoring.normalise else ()),
            *(_parent_params() if scoring.parent_size else ()),
            Param(
                name="SCORES",
                kind="pointer",
                comment=f"f32[rows, H, {'2, ' if scoring.planes > 1 else ''}capacity]",
                dtype="f32",
            ),
            count("capacity", "row length of the scratch"),
            *SEQ,
            count("tile_first", "the chunk's first tile"),
            *BLOCKS,
        ),
        acc="score",
        rows_comment=_packing(heads, _heads_of_scores(scoring, pitch)),
        tile="tl.program_id(0) + tile_first",
        heads=heads,
        pitch=pitch,
        qk_chunks=bound_chunks(dim) if scoring.form == "bound" else chunks(dim),
        key_head=""
        if scoring.by_index or across
        else kv_head("k_h", shape, per_head=scoring.share == "head" and not scoring.packed),
        key_row=f"k_first // {scoring.entries.stride}" if scoring.pooled else "k_first",
        setup=(
            *(() if across else of_row),
            *setup,
            *_score_rows(pitch, heads if scoring.packed else 1),
        ),
        phases=phases,
        precision=shape.precision,
        width=scoring.parent_width,
        children=scoring.parent_size // scoring.entries.size if scoring.parent_size else 0,
        parent_heads=scoring.parent_heads,
        many_keys=scoring.entries.stride <= FEW_TOKENS,
        keys_first=scoring.keys_first,
        ratio=scoring.ratio,
        first_tap=scoring.taps[0][0] if scoring.taps else 0,
        end_tap=scoring.taps[-1][0] + 1 if scoring.taps else 1,
        identity=identity,
        value=value,
        mute_padding=scoring.reduce == "max" and pitch != heads,
        reduced=_reduced(scoring, heads, pitch),
        fold=_fold(scoring, _reduced(scoring, heads, pitch)),
        folded=scoring.folded,
        planes=scoring.planes,
        together="blocks" if scoring.rows else "",
        rows_together=scoring.rows,
        eight=scoring.eight,
        powers=scoring.powers,
        across=across,
        across_how=(scoring.reduce or "") if across else "",
        of_head=of_row if across else (),
    )


def begun(block: str, scoring: Scoring, causal: bool) -> str:
    """How many entries a block of rows may choose, as an expression."""
    of = scoring.entries
    return (
        f"begun_limit({block}, k_len, {scoring.rows}, {of.size}, {of.stride}, {causal}, {of.short})"
    )


def _key_comment(scoring: Scoring) -> str:
    if scoring.by_index:
        return "[B, N, Di]" if scoring.pooled else "[B, S, Di]"
    if scoring.form == "bound":
        return "[B, N, Hkv, 2, Dqk]"
    return "[B, N, Hkv, Dqk]" if scoring.pooled else "[B, S, Hkv, Dqk]"


def _parent_params() -> tuple[Param, ...]:
    return (pointer("PARENT", "i32", "[rows, H, K] surviving parents"),)


def _row_values(scoring: Scoring, weighted: bool) -> tuple[str, ...]:
    """What each row loads once: its index weight, times its power of two; its log-sum-exp."""
    lines: list[str] = []
    if weighted:
        lines += [
            "w_base = WEIGHT + z.to(tl.int64) * w_b + q_token.to(tl.int64) * w_t",
            "weight = tl.load(w_base + row_head, mask=alive, other=0.0).to(tl.float32)",
        ]
    if scoring.powers:
        lines += [
            "p_base = Q_POWER + z.to(tl.int64) * qp_b + q_token.to(tl.int64) * qp_t",
            "q_power = tl.load(p_base + row_head, mask=alive, other=0.0)",
            "weight *= q_power" if weighted else "weight = q_power",
        ]
    if scoring.normalise:
        lines += [
            "lse_base = LSE + z.to(tl.int64) * lse_b + row_head.to(tl.int64) * lse_h",
            'lse = tl.load(lse_base + q_token * lse_t, mask=alive, other=float("inf"))',
            f"lse = lse * {LOG2_E}",
        ]
    if scoring.borrowed:
        lines.append('lse = tl.where(lse == float("-inf"), float("inf"), lse)')
    return tuple(lines)


def _heads_of_scores(scoring: Scoring, pitch: int) -> str:
    """What a token's rows in a tile are."""
    if scoring.packed:
        return "the group's heads"
    return "reduced together" if pitch > 1 else "one query head"


def _score_rows(pitch: int, heads: int) -> tuple[str, ...]:
    """Rows of the scratch: tokens of the tile, heads already reduced; or each of `heads` with a row."""
    if heads > 1:
        return (
            "score_alive = alive",
            f"score_token = (tl.program_id(0) * BLOCK_T + rows // {heads}).to(tl.int64)",
            f"score_row = score_token * tl.num_programs(1) * {heads} + row_head",
        )
    columns = f"tl.arange(0, BLOCK_M // {pitch})"
    return (
        f"tokens = token_at({columns}, BLOCK_M // {pitch}, {pitch})"
        if pitch > 1
        else "tokens = rows",
        "score_alive = (tokens < BLOCK_T) & (t0 + tokens < q_len)",
        "score_row = (tl.program_id(0) * BLOCK_T + tokens).to(tl.int64) * tl.num_programs(1) + head",
    )


def _score_phases(shape: Shape, scoring: Scoring) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    """Which entries are scored, and the statements before the loops."""
    stop = f"stop = {complete('last', scoring.entries, shape.causal)}"
    if scoring.rows:
        stop = f"stop = {begun('last', scoring, shape.causal)}"
    if scoring.folded:
        return _folded_phases(shape, scoring, stop)
    if scoring.map_how:
        return _mapped_phase(shape, scoring, stop)
    if not scoring.parent_size:
        phase = Phase(
            kind="range",
            comment="every entry that has begun by the tile's last row"
            if scoring.rows
            else "every entry that is complete for the tile's last row",
            start="0",
            stop="stop",
            inside="n < stop",
            written="inside",
        )
        return (phase,), (stop,)
    children = scoring.parent_size // scoring.entries.size
    ragged = children < 16 or children != next_power(children)
    phase = Phase(
        kind="children",
        comment="the children of each surviving parent, slot by slot",
        start="0",
        stop=f"tl.minimum({scoring.parent_width}, parents) * TILES",
        inside=(f"(child < {children}) & " if ragged else "") + "(n >= 0) & (n < stop)",
        slot="slot",
        written="inside",
    )
    parents = f"entry_limit(last, k_len, {scoring.parent_size}, {shape.causal})"
    row = (
        f"(tl.load(SEQ + z * 6) + t0).to(tl.int64) * {scoring.parent_heads} + {scoring.parent_head}"
    )
    return (phase,), (
        stop,
        f"parents = {parents}",
        f"list_base = ({row}) * {scoring.parent_width}",
        f"TILES: tl.constexpr = ({children} + BLOCK_N - 1) // BLOCK_N",
    )


def _folded_phases(
    shape: Shape, scoring: Scoring, stop: str
) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    """All sources of the target entries that are complete for the tile's last row, in their order."""
    ratio = scoring.ratio
    phases = (
        Phase(
            kind="range",
            comment="sources that are complete for every row",
            start="0",
            stop="full",
            written="slot < target_stop",
            slot="slot",
        ),
        Phase(
            kind="range",
            comment="sources that become complete within the tile, or are none",
            start="full",
            stop=f"target_stop * {ratio}",
            inside="n < stop",
            visible=_complete_keys(shape, keys_first=True),
            written="slot < target_stop",
            slot="slot",
        ),
    )
    everyone = complete("first", scoring.entries, shape.causal)
    return phases, (
        stop,
        f"target_stop = {complete('last', scoring.target, shape.causal)}",
        f"everyone = {everyone}",
        f"full = tl.minimum(everyone, target_stop * {ratio}) // BLOCK_N * BLOCK_N",
        *_complete_rows(shape, scoring.entries),
        *_taps(scoring),
    )


def _taps(scoring: Scoring) -> tuple[str, ...]:
    """How often the source entries of a slot count in it, and in the next one."""
    ratio, weight = scoring.ratio, _tap_weight(scoring)
    own, handed = weight.format(offset="tap"), weight.format(offset=f"tap - {ratio}")
    return (
        f"tap = tl.arange(0, {ratio})",
        f"own_weight = {own}",
        *((f"next_weight = {handed}",) if scoring.planes > 1 else ()),
    )


def _mapped_phase(
    shape: Shape, scoring: Scoring, stop: str
) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    target = complete("last", scoring.target, shape.causal)
    phase = Phase(
        kind="mapped",
        comment="every target entry that is complete for the tile's last row, from its sources",
        start="0",
        stop="target_stop",
        inside="(n >= 0) & (n < stop)",
        visible=(
            "inside[:, None]",
            *(_complete_keys(shape, keys_first=True) if shape.causal else ()),
        ),
        slot="slot",
        written="slot < target_stop",
    )
    return (phase,), (stop, f"target_stop = {target}", *_complete_rows(shape, scoring.entries))


def _value(scoring: Scoring) -> str:
    """The score of one head before heads are reduced."""
    row = "[None, :]" if scoring.keys_first else "[:, None]"
    if scoring.sums:
        weighs = scoring.form == "relu_weighted" or scoring.powers
        weight = f" * weight{row}" if weighs else ""
        scaled = "" if scoring.scale == 1.0 else f" * {number(scoring.scale)}"
        return f"tl.maximum(s, 0.0){weight}{scaled}"
    if scoring.normalise:
        return f"tl.exp2(s * {number(scoring.scale * LOG2_E)} - lse{row})"
    return "s" if scoring.scale == 1.0 else f"s * {number(scoring.scale)}"


def _identity(scoring: Scoring) -> str:
    """What an absent source counts."""
    return 'float("-inf")' if scoring.map_how == "max" else "0.0"


def _reduced(scoring: Scoring, heads: int, pitch: int) -> str:
    if pitch == 1 or scoring.packed:
        return "value"
    how = "max" if scoring.reduce == "max" else "sum"
    mean = f" * {number(1 / heads)}" if scoring.reduce == "mean" else ""
    return f"{how}_heads(value, BLOCK_M // {pitch}, {pitch}){mean}"


def _fold(scoring: Scoring, reduced: str) -> str:
    if scoring.map_how == "max":
        return f"tl.maximum(total, {reduced})"
    if all(weight == 1 for _, weight in scoring.taps):
        return f"total + {reduced}"
    return f"total + {reduced} * {_tap_weight(scoring).format(offset='offset')}"


def _tap_weight(scoring: Scoring) -> str:
    """How often the source entry at {offset} counts."""
    if all(weight == 1 for _, weight in scoring.taps):
        return f"tap_weight({{offset}}, {scoring.taps[0][0]}, {scoring.taps[-1][0] + 1})"
    pieces = (
        scoring.entries.size // scoring.entries.stride,
        scoring.target.size // scoring.entries.stride,
    )
    return f"overlap_weight({{offset}}, {pieces[0]}, {pieces[1]})"


def _score_summary(scoring: Scoring) -> str:
    what = "tokens" if scoring.entries.size == 1 else "entries"
    if scoring.parent_size:
        return f"scores of the {what} below surviving parents."
    return f"scores of {what} mapped to another level." if scoring.map_how else f"scores of {what}."
