"""What fills the `rank`, `index` and `segments` skeletons: the numbers of a spec, as values.

Every field that a template reads is computed here.  Knows no GPU; tile sizes are tunables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from hsgen import axes
from hsgen.plan import Param
from hsgen.rows import (
    LOGITS,
    ORDER,
    SEQ,
    Chunk,
    Entries,
    chunks,
    count,
    jit,
    lse,
    next_power,
    pages_of,
    pointer,
    seen_by,
    tensor,
)

PoolHow = Literal["mean", "max", "minmax", "sum_rsqrt", "linear", "gated", "max_min_mean", "first"]
POOLS: tuple[PoolHow, ...] = get_args(PoolHow)
UNFINISHED = ("minmax", "linear")  # of these no kernel norms or rotates what is pooled

RoundTo = Literal["bf16", "fp8", "fp8_unscaled"]
ROUNDED: tuple[RoundTo, ...] = get_args(RoundTo)
WHOLE = {"int8": 127, "int4": 7}  # the greatest whole number of each

LONG_TEXT = 1 << 17  # tokens
GROUP = 8  # entries
SORTED_PAIRS = 128  # of heads and what they chose, that a warp sorts
CHUNK = 1024  # scores that a warp of a step's row has in registers
MOST_HELD = 8192  # scores of a row in registers
BY_MEMORY = 2048  # entries of a long row from which the greatest of groups go by way of memory
MARKED_FROM = 1024  # slots of a row, which have room for three bits a score in registers

TUNABLES = {
    "BLOCK_T": "tokens a tile",
    "BLOCK_R": "rows a program",
    "BLOCK_P": "parts of a row, at most",
    "BLOCK_H": "heads of a row",
    "BLOCK_N": "entries a step",
    "BLOCK_K": "slots a step",
    "BLOCK_W": "weights that are summed at a time",
    "DEAR": "times a key of the union costs one of a row's list",
    "BLOCK_E": "entries a tile",
    "BLOCK_J": "tokens of an entry a step",
    "BLOCK_V": "vectors a program",
    "BLOCK_D": "channels a step, a divisor of the head dim",
    "BLOCK_C": "rows a chunk of a block's list",
    "BLOCK_S": "spans a program",
    "BLOCK_M": "rows a tile",
}


def _strides(of: str, prefix: str, *dims: str) -> tuple[Param, ...]:
    return tuple(
        Param(name=f"{prefix}_{dim[0]}", kind="stride", comment=f"{of}: {dim} stride")
        for dim in dims
    )


def tunables(*names: str) -> tuple[Param, ...]:
    return tuple(Param(name=n, kind="constexpr", comment=TUNABLES[n]) for n in names)


def ties_of_masses(*, drop: bool) -> str:
    """How many entries are taken of those at the edge of masses; what weighs nothing crosses nothing."""
    if drop:
        return "tl.where(each > 0, (wanted - 1 - above) // tl.maximum(each, 1), 0x7FFFFFFF)"
    return "(wanted - above + each - 1) // each"


# biases of entries: a sequence has those from z * length + k_first // stride on
MEANS = (
    pointer("MEANS", "f32", "f32[Hkv, entries] mean bias of each entry"),
    count("length", "entries of a sequence; packed: 1"),
    count("entries", "of all sequences"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Biases of entries, of which those of another level have the greatest that they overlap.

    Entry e has those from e * ratio + first_tap up to e * ratio + end_tap, of the ones that are complete.
    """

    entries: Entries  # the ones that have a mean
    ratio: int
    first_tap: int
    end_tap: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Everything `rank.py.jinja` reads.

    Entry e covers tokens [e * stride, e * stride + size); `short`: the last one of a sequence may have
    fewer, if not causal.  `children` > 0: scores are of the children of a parent list, slot by slot,
    and `parent_group` selection heads share a parent head.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    k: int
    width: int  # slots of a row of the selection: k, and the forced ones where they are not counted
    size: int
    stride: int
    short: bool = False
    causal: bool
    first: int
    last: int
    counted: bool
    tail: bool = False  # the row's own entry while it is incomplete, on top
    children: int = 0
    parent_width: int = 0
    parent_heads: int = 1
    parent_group: int = 1
    carried: Literal["", "sum", "max"] = ""  # how a slot takes in what the slot before hands on
    alike: bool = False  # as `RowsContext.alike` of what scored
    fours: bool = False  # scores are there up to a multiple of four
    rows: int = 0  # > 0: what ranks are blocks of so many rows
    part: int = 0  # > 0: in place of k, the part of the candidates that is kept, in units of 2^-30
    of_all: bool = False  # of all entries of the keys instead
    mass: int = 0  # > 0: in place of k, the part of all masses that is reached, in units of 2^-30
    least: int = 0  # of a mass: entries that are kept whatever they weigh
    drop: bool = False  # of a mass: the entry that crosses it is left out
    rest: bool = False  # of a mass: forced entries are neither ranked nor part of the total
    softmax: bool = False  # scores are logits, whose masses are made here
    unlike: int = (
        0  # > 0: entries are forced by what their tokens are, heads that share those of a key head
    )
    # of a pyramid, up to each tier: the part of all masses, and of the candidates, in units of 2^-30
    tiers: tuple[tuple[int, int], ...] = ()
    single: bool = (
        False  # one row a sequence chooses for all of it, its last one; says how many it keeps
    )
    # in place of k, the part of the candidates that a single row keeps of its own, and at least `least`
    budget: bool = False
    told: Literal["", "all", "head"] = (
        ""  # of a single row: as many as all heads keep, or each is told
    )
    sharing: int = 1  # selection heads that have the scores of one
    summed: int = 0  # > 0: scores are made here, of what an attend left of so many heads each
    planes: int = 0  # of that: 2 where an entry also counts in the slot after its own
    parts: int = 1  # of heads, whose scores of an entry become one here
    parts_how: Literal["sum", "max"] = "max"
    segment: int = 0  # > 0: entries are cut from sorted segments of so many tokens
    sinks: int = 0  # first tokens whose entries, which a list has, are forced
    kv_heads: int = 0  # that have such a list
    means: Means | None = None  # scores are biases, which all rows have alike
    joined: int = 0  # > 0: entries that a row has in a list of so many are forced
    joined_group: int = 1  # heads that have one such list
    ways: tuple[int, ...] = ()  # numbers of a route that a head must have to choose any
    lengths: bool = False  # of a single row: each head is told how many entries there are
    wide: bool = False  # many rows of many key heads choose
    few: bool = False  # entries of most rows fit in registers, of which a row has some hundred
    power: int = 0  # > 0: entries are anchors behind a row, at distances that grow by such a power
    nearest: int = 1  # of these the least number that has the power
    how: Literal["best"] = "best"

    @property
    def summary(self) -> str:
        if self.told == "head":
            return "the best entries of the last rows, as many as each head is told, 0 or more."
        if self.told:
            return "the best entries of each head, as many as all heads together keep."
        if self.single and not self.mass:
            return f"the {self.k} best entries of the last rows."
        if self.single:
            return "the best entries of the last rows, until their masses reach a part of all."
        if self.budget:
            return (
                "the best entries of each block of rows, the part of them that the last rows keep."
            )
        if self.tiers:
            return "the tier of every entry of each block of rows: the best ones have the first."
        if self.mass:
            return "the best entries of each block of rows, until their masses reach a part of all."
        if self.part:
            return f"the best entries of each {'block of rows' if self.rows else 'row'}, a part of them."
        return f"the {self.k} best {'children' if self.children else 'entries'} of each row."

    @property
    def padded_width(self) -> int:
        """`width` as a tile."""
        return next_power(self.width)

    @property
    def longest(self) -> int:
        """Entries that a long text has."""
        return math.isqrt(LONG_TEXT) if self.power else LONG_TEXT // self.stride

    @property
    def group(self) -> int:
        """Neighbours whose greatest stands for them first; 0: rows are short, or much of them is kept."""
        plain = self.width and self.counted and not self.children and not self.rows
        plain = plain and not self.means
        few = self.padded_width <= 64 and self.longest >= self.grouped_from
        return GROUP if plain and few else 0

    @property
    def chunked(self) -> bool:
        """Whether the greatest scores of groups lie behind the scores of a row: of a step, or a long one."""
        return bool(self.group) and (self.alike or self.longest >= BY_MEMORY)

    @property
    def maxima(self) -> str:
        """The arguments that say where they lie and how many entries there are, as far as it asks."""
        return "maxima, n, " if self.chunked else "n, " if self.reread else ""

    @property
    def chunk(self) -> int:
        """Entries of which they are found at a time; fewer in a call, whose rows are many."""
        return CHUNK if self.alike else CHUNK // 2

    @property
    def whole(self) -> int:
        """What the length of a row of scratch is a multiple of: with maxima, a ninth are these."""
        return 4 + 4 * GROUP if self.chunked else 4

    @property
    def grouped_from(self) -> int:
        """Entries of a row from which on groups pay: so many more than those of the groups kept.

        Where scores are made here, by several warps, a pass over more of them is not much longer.
        """
        return max(4096 if self.summed else 1024, 4 * GROUP * self.padded_width)

    @property
    def step(self) -> str:
        """Entries a step where a row does not fit."""
        return "STEP" if self.group or self.sampled or self.narrowed else "BLOCK_N"

    @property
    def sampled(self) -> bool:
        """Whether a sample of a row that does not fit tells about where its best keys begin."""
        listed = self.counted or self.width > 0
        plain = listed and not self.part and not self.children and not self.rows
        plain = plain and not self.means
        beyond = self.longest >= MOST_HELD if self.alike else self.longest > MOST_HELD
        return plain and not self.group and beyond

    @property
    def paired(self) -> bool:
        """Whether a key is copied with its entry, and many warps have half of a row's room a pass."""
        return self.wide and self.sampled

    @property
    def narrowed(self) -> bool:
        """Whether the keys of a step's row say where to seek: passes, of several warps, take longer.

        So they do where rows are short, since a processor has room for more of them then.
        """
        return (self.alike or self.few) and not self.children

    @property
    def reread(self) -> bool:
        """Whether the keys of a row are read again to be placed."""
        return self.narrowed and not self.group

    @property
    def kept(self) -> int:
        """Entries that a row which does not fit keeps of those it has; 0: it is not sampled."""
        return self.width if self.sampled else 0

    @property
    def whole_fours(self) -> bool:
        """Whether rows of the scratch begin at multiples of 16 bytes, with room after the last entry."""
        return bool(self.group or self.carried or self.sampled or self.narrowed)

    @property
    def by_fours(self) -> bool:
        """Whether entries are read four at once, past a row's last one if need be."""
        return bool(self.fours or self.sampled or self.group or self.carried)

    @property
    def slots(self) -> int:
        """Length of a row of scratch when children are ranked."""
        return self.parent_width * self.children

    @property
    def marked(self) -> bool:
        """Whether a row of children is long enough that bits, one a slot, tell where they go."""
        return self.slots >= MARKED_FROM

    @property
    def padded_parents(self) -> int:
        """`parent_width` as a tile."""
        return next_power(self.parent_width)

    @property
    def wanted(self) -> str:
        """How many candidates a row keeps; of a part, all forced ones."""
        if self.told:
            return "kept_there + candidates * 0" if self.counted else "kept_there + forced"
        if self.budget:
            part = "budget_of(candidates, kept_there, all_there)"
            part = f"tl.maximum({part}, {self.least})" if self.least else part
            return f"tl.maximum({part}, forced)" if self.counted else f"{part} + forced"
        if self.part:
            entries = f"tl.sum((k_len + {self.stride - 1}) // {self.stride}, 1)"
            part = f"part_of({entries if self.of_all else 'candidates'}, {self.part})"
            return f"tl.maximum({part}, forced)" if self.counted else f"{part} + forced"
        if not self.counted:
            return f"{self.k} + forced"
        tails = f" + count_tails(p, k_len, {self.size}, {self.stride})" if self.tail else ""
        return f"{self.k}{tails}"

    @property
    def at_most(self) -> str:
        """No fewer than that, where it is not known yet how many of them are forced."""
        return self.wanted if self.counted else str(self.width)

    @property
    def on_way(self) -> str:
        """Whether a head has one of `ways`."""
        each = [f"(way == {number})" for number in self.ways]
        return " | ".join(each) if len(each) > 1 else each[0][1:-1]

    @property
    def varies(self) -> bool:
        """Whether how many slots a row has is a number of the call."""
        return bool(self.part or self.edged or self.budget or self.told)

    @property
    def edged(self) -> bool:
        """Whether the best entries end where masses, or parts of all, are reached."""
        return bool(self.mass or self.tiers)

    @property
    def by_mass(self) -> bool:
        """Whether some such end is one of masses."""
        return bool(self.mass) or any(units for units, _ in self.tiers)

    @property
    def by_count(self) -> bool:
        """Whether some is one of numbers of entries."""
        return bool(self.least) or any(least for _, least in self.tiers)

    @property
    def keep(self) -> str:
        """The function that finds and writes them."""
        return "keep_tiers" if self.tiers else "keep_mass"

    @property
    def lists(self) -> str:
        """The leading arguments of `keep_keys`: what `row_entries` reads."""
        return "parents, live, " if self.children else ""

    @property
    def row_width(self) -> str:
        """Slots of a row: known, or as many as the longest sequence has use for."""
        return "width" if self.varies else str(self.width)

    @property
    def places(self) -> str:
        """The argument of `keep_best` that says how many slots there are, where it is not known."""
        return "width, " if self.varies else ""

    @property
    def forced(self) -> str:
        """Which entries a row is forced to take."""
        return f"row_forced({self.row}, e, p, k_len)" if self.unlike else self.forced_by_place

    @property
    def forced_by_place(self) -> str:
        """Those of them that are forced wherever they lie."""
        rest = f"{self.stride}, {self.first}, {self.last}, {self.causal}"
        if self.segment:
            sized = f"{self.rows}, {self.segment}, {rest}"
            if self.sinks:
                return f"is_forced_or_listed(e, p, k_len, led, {self.sinks}, {sized})"
            return f"is_forced_of_segments(e, p, k_len, {sized})"
        if self.rows:
            return f"is_forced_of_block(e, p, k_len, {self.rows}, {rest})"
        return f"is_forced(e, p, k_len, {rest})"

    @property
    def forces(self) -> bool:
        """Whether a row is forced to take any."""
        listed = self.unlike or self.sinks or self.joined
        return bool(self.first or self.last or self.tail or listed)

    @property
    def ties(self) -> str:
        """How many entries are taken of those at the edge."""
        return ties_of_masses(drop=self.drop)

    @property
    def apart(self) -> bool:
        """Whether forced entries are taken beside the best ones, not before them."""
        return self.forces and (self.rest or not self.counted)

    @property
    def limit(self) -> str:
        """Where the entries end that have a score."""
        if self.power:
            return f"anchors_limit(p, k_len, {self.power}, {self.nearest})"
        if self.segment:
            sized = f"{self.segment}, {self.stride}, {self.causal}, {self.short}"
            return f"settled_limit(p * {self.rows}, k_len, {sized})"
        rest = f"{self.size}, {self.stride}, {self.causal}, {self.short}"
        if self.rows:
            return f"begun_limit(p, k_len, {self.rows}, {rest})"
        return f"complete_limit(p, k_len, {rest})"

    @property
    def candidates(self) -> str:
        """Where the entries end that a row may take, forced ones too."""
        if self.power:
            return self.limit
        if self.segment:
            last = f"p * {self.rows} + {self.rows - 1}"
            return f"begun_segments({last}, k_len, {self.segment}, {self.stride}, {self.causal})"
        if self.rows:
            own = f"{self.rows}, {self.stride}, {self.stride}, {self.causal}, True"
            return f"begun_limit(p, k_len, {own})"
        return f"entry_limit(p, k_len, {self.stride}, {self.causal})"

    @property
    def row(self) -> str:
        """The leading arguments of `row_keys`."""
        row = "scores, capacity" if self.carried else "scores"
        row += ", sources" * bool(self.means) + ", joined" * bool(self.joined)
        if self.softmax:
            row += ", most, whole" + ", unlike, unlike_row" * bool(self.unlike)
        row += ", led" * bool(self.sinks)
        if self.budget:
            row += ", kept_there, all_there"
        if self.told:
            row += ", kept_there"
        return f"{row}, parents, live, complete" if self.children else row

    @property
    def listed(self) -> str:
        """Whether an entry is one that a row has in such a list; one past the last has none."""
        return f"is_listed(e, joined, tl.where(k_len > 0, {self.joined}, 0), {self.joined})"

    @property
    def scored(self) -> str:
        """Those of `row_scores`."""
        return "scores, sources" if self.means else self.row

    @property
    def with_part(self) -> str:
        """A score with that of one more part of the heads."""
        return "tl.maximum(score, other)" if self.parts_how == "max" else "score + other"

    @property
    def row_length(self) -> str:
        """From one row of the scratch to the next."""
        rows = self.parts * (2 if self.carried else 1)
        return f"({rows} * capacity)" if rows > 1 else "capacity"

    @property
    def _told(self) -> tuple[Param, ...]:
        if self.told == "head":
            return (pointer("TOLD", "i32", f"i32[Z, {self.heads}] to keep, 0: none at all"),)
        return (pointer("TOLD", "i32", "i32[Z, 2] kept of all heads"),)

    @property
    def _of_row(self) -> str:
        """What a row of the scratch has several of."""
        return "2, " if self.carried else ""

    @property
    def _of_entry(self) -> str:
        """What an entry has several of."""
        return f", {self.parts}" if self.parts > 1 else ""

    @property
    def params(self) -> tuple[Param, ...]:
        parent = pointer("PARENT", "i32", f"[rows, {self.parent_heads}, {self.parent_width}]")
        if self.means:
            return self._by_means
        return (
            *(self._left if self.summed else ()),
            pointer(
                "SCORES",
                "f32",
                f"f32[chunk rows, {self.heads // self.sharing}, {self._of_row}capacity{self._of_entry}]",
            ),
            pointer(
                "SELECTION",
                "i32",
                f"[rows, {self.heads}, {self.row_width}]{' tier of each entry' if self.tiers else ''}",
            ),
            *((parent,) if self.children else ()),
            *(self._unlike if self.unlike else ()),
            *(
                (
                    pointer(
                        "SINKS",
                        "i32",
                        f"[Z, {self.kv_heads}, {self.sinks}] entries of first tokens",
                    ),
                )
                if self.sinks
                else ()
            ),
            *(
                (
                    pointer(
                        "COUNTS", "i32", f"i32[Z, {self.heads}, 2] kept by the last rows, of all"
                    ),
                )
                if self.single or self.budget
                else ()
            ),
            *((pointer("WAYS", "i32", f"[{self.heads}] way of each head"),) if self.ways else ()),
            *((pointer("LENGTHS", "i32", f"[Z, {self.heads}] entries"),) if self.lengths else ()),
            *(self._told if self.told else ()),
            *(
                (pointer("KEPT", "i32", f"[chunk rows, {self.heads}, 2, BLOCK_N]"),)
                if self.sampled
                else ()
            ),
            *(() if self.lengths else SEQ),
            count("tile_first", "the tile of rows at which the scratch begins"),
            count("capacity", "row length of the scratch"),
            *((count("width", "slots of a row"),) if self.varies else ()),
            *tunables("BLOCK_T", "BLOCK_R", "BLOCK_N"),
            *(tunables("BLOCK_W", "BLOCK_P") if self.summed else ()),
        )

    @property
    def _by_means(self) -> tuple[Param, ...]:
        lists = f"[rows, {self.heads // self.joined_group}, {self.joined}] forced"
        return (
            *MEANS[:1],
            pointer("SELECTION", "i32", f"[rows, {self.heads}, {self.width}]"),
            *((pointer("JOINED", "i32", lists),) if self.joined else ()),
            *SEQ,
            *MEANS[1:],
            *tunables("BLOCK_T", "BLOCK_R", "BLOCK_N"),
        )

    @property
    def sources(self) -> str:
        """Where the entries end that have a mean."""
        assert self.means is not None
        of = self.means.entries
        return f"complete_limit(p, k_len, {of.size}, {of.stride}, {self.causal}, {of.short})"

    @property
    def _unlike(self) -> tuple[Param, ...]:
        """Which entries, and which blocks of rows, have tokens that are unlike."""
        return (
            pointer("UNLIKE", "i32", f"i32[{self.heads // self.unlike}, entries]"),
            count("length", "entries of a sequence; packed: 1 if the last may be short, else 0"),
            count("entries", "of all sequences"),
            pointer("UNLIKE_ROWS", "i32", f"i32[blocks, {self.heads}]"),
        )

    @property
    def _left(self) -> tuple[Param, ...]:
        """What an attend left: the parts of log-sum-exps, and logarithms of weights."""
        return (
            pointer("PART_LSE", "f32", "f32[Hq, items]"),
            count("items", "rows * splits"),
            count("splits", "parts of a row"),
            *LOGITS,
        )

    @property
    def padded_summed(self) -> int:
        """`summed` as a tile."""
        return next_power(self.summed)

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntriesOfBlocks:
    """Entries that blocks of rows choose among, as in a RankContext."""

    rows: int  # of a block
    size: int
    stride: int
    short: bool
    causal: bool
    first: int
    last: int

    @property
    def forced(self) -> str:
        """Which entries a block is forced to take."""
        rest = f"{self.rows}, {self.stride}, {self.first}, {self.last}, {self.causal}"
        return f"is_forced_of_block(e, p, k_len, {rest})"

    @property
    def limit(self) -> str:
        """Where the entries end that have a score."""
        rest = f"{self.rows}, {self.size}, {self.stride}, {self.causal}, {self.short}"
        return f"begun_limit(p, k_len, {rest})"

    @property
    def candidates(self) -> str:
        """Where the entries end that a block may take, forced ones too."""
        own = f"{self.rows}, {self.stride}, {self.stride}, {self.causal}, True"
        return f"begun_limit(p, k_len, {own})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdContext(EntriesOfBlocks):
    """Everything `rank.py.jinja` reads where blocks of rows keep entries whose masses are above a threshold.

    Entries are as in a RankContext; a mass is a part of those of all entries that a block may choose.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    threshold: float
    how: Literal["threshold"] = "threshold"

    @property
    def summary(self) -> str:
        return f"entries that a block of rows gives a mass above {self.threshold:g}."

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("SCORES", "f32", f"f32[chunk rows, {self.heads}, capacity]"),
            pointer("SELECTION", "i32", f"[rows, {self.heads}, width]"),
            *SEQ,
            count("tile_first", "the tile of rows at which the scratch begins"),
            count("capacity", "row length of the scratch"),
            count("width", "slots of a row"),
            *tunables("BLOCK_T", "BLOCK_R", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApartContext:
    """Everything `rank.py.jinja` reads where blocks of rows keep a part of the entries before a token, and as
    large a part of those from it on.

    Entries are as in a RankContext; none is forced.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    rows: int  # of a block
    size: int
    stride: int
    causal: bool
    part: int  # of 2^30 units
    how: Literal["apart"] = "apart"

    @property
    def summary(self) -> str:
        return "the best entries before a token, and the best of those from it on: a part of each."

    @property
    def limit(self) -> str:
        """Where the entries end that a block may take."""
        rest = f"{self.rows}, {self.size}, {self.stride}, {self.causal}, True"
        return f"begun_limit(p, k_len, {rest})"

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("SCORES", "f32", f"f32[chunk rows, {self.heads}, capacity]"),
            pointer("SELECTION", "i32", f"[rows, {self.heads}, width]"),
            pointer("SPLIT", "i32", "[Z] the token from which on entries are chosen apart"),
            *SEQ,
            count("tile_first", "the tile of rows at which the scratch begins"),
            count("capacity", "row length of the scratch"),
            count("width", "slots of a row"),
            *tunables("BLOCK_T", "BLOCK_R", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexContext:
    """Everything `index.py.jinja` reads.

    `union`: of pairs of an entry and a row, sorted in registers.  `sets`: of bits that pairs set, where they
    are too many to sort.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    width: int  # slots of a row of the selection
    size: int
    stride: int
    causal: bool
    how: Literal["union", "sets"] = "union"
    left: int = 0  # tokens of a window beside it, which has those of its rows

    @property
    def summary(self) -> str:
        return "the union of the entries that a tile's rows chose, and which rows chose each."

    @property
    def padded_width(self) -> int:
        """`width` as a tile; a gather wants at least two."""
        return max(2, next_power(self.width))

    @property
    def params(self) -> tuple[Param, ...]:
        sets = self.how == "sets"
        slots = "capacity" if sets else f"BLOCK_T * {self.width}"
        lists, words = f"[tiles, {self.heads}, {slots}", "ceil(BLOCK_T / 32)] member rows as bits"
        marks = f"[programs, {self.heads}, length, {words} of each entry"
        return (
            pointer("SELECTION", "i32", f"[B, T, {self.heads}, {self.width}], -1 anywhere"),
            *_strides("SELECTION", "s", "batch", "token", "head", "slot"),
            pointer("COUNTS", "i32", f"[tiles, {self.heads}, 2] of full entries, of partial ones"),
            pointer("ENTRIES", "i32", f"{lists}] full ones ascending, then partial ones"),
            pointer("WORDS", "i32", f"{lists}, {words}"),
            *((pointer("MARKS", "i32", marks),) if sets else ()),
            *((count("capacity", "entries of a tile's list"),) if sets else ()),
            *((count("length", "entries of the longest sequence"),) if sets else ()),
            *((count("tiles", "of the turn"),) if sets else ()),
            *SEQ,
            *((count("tile_first", "the turn's first tile"),) if sets else ()),
            *tunables("BLOCK_T", *(("BLOCK_K", "BLOCK_N") if sets else ())),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniteContext:
    """Everything `index.py.jinja` reads where the heads of a group share what one row of each chose."""

    name: str
    header: str = ""
    pieces: str = ""
    kv_heads: int
    group: int  # query heads of a key head
    width: int  # slots of a head's list
    size: int  # tokens of a block
    causal: bool
    how: Literal["unite"] = "unite"

    @property
    def summary(self) -> str:
        return (
            "the blocks that the heads of a group chose between them, and which heads chose each."
        )

    @property
    def padded_width(self) -> int:
        return next_power(self.width)

    @property
    def marked(self) -> bool:
        """Whether heads set bytes, which are as many as a word has."""
        return self.pairs > SORTED_PAIRS and self.group <= 4

    @property
    def step(self) -> int:
        """Entries that are read at a time."""
        return 2048

    @property
    def padded_group(self) -> int:
        return next_power(self.group)

    @property
    def pairs(self) -> int:
        """Of heads and entries; a gather wants at least two."""
        return self.padded_group * self.padded_width

    @property
    def params(self) -> tuple[Param, ...]:
        heads = self.kv_heads * self.group
        return (
            pointer("SELECTION", "i32", f"[B, T, {heads}, {self.width}], -1 anywhere"),
            *_strides("SELECTION", "s", "batch", "token", "head", "slot"),
            pointer(
                "LISTS",
                "i32",
                f"[rows, {self.kv_heads}, {1 + self.group * self.width}] count, blocks and members",
            ),
            *(self._marks if self.marked else ()),
            *SEQ[:1],
        )

    @property
    def _marks(self) -> tuple[Param, ...]:
        marks = pointer("MARKS", "i32", f"[rows, {self.kv_heads}, length] scratch: a byte a head")
        return marks, count("length", "of entries, a multiple of 4")

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarksContext:
    """Everything `index.py.jinja` reads where rows chose tokens.

    `marks`: by blocks of as many of them as a word has bits.  `picked`: each for itself, a bit a row.
    `alone`: of a selection as it lies, in any order; no other kernel takes tiles whose union is dear.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    width: int  # slots of a row of the selection
    causal: bool
    how: Literal["marks", "picked"] = "marks"
    alone: bool = False
    entries: Entries | None = None  # that are chosen in place of tokens

    @property
    def summary(self) -> str:
        if self.how == "picked":
            return f"the {self.what} that a tile's rows chose any of, and which rows chose each."
        return (
            "the blocks of 64 tokens that a tile's rows chose any of, and which rows chose which."
        )

    @property
    def params(self) -> tuple[Param, ...]:
        if self.alone:
            shape = f"[B, T, {self.heads}, {self.width}] {self.what}, -1 anywhere"
            selection = tensor("SELECTION", "s", shape, "bths", "i32")
        else:
            shape = f"[rows, {self.heads}, {self.width}] tokens, ascending"
            selection = (pointer("SELECTION", "i32", shape),)
        dear = () if self.alone else ("DEAR",)
        return (
            *selection,
            *self._lists,
            *SEQ,
            count("tile_first", "the turn's first tile"),
            *tunables("BLOCK_T", "BLOCK_K", "BLOCK_N", *dear),
        )

    @property
    def slot(self) -> str:
        """From the first slot of a row's list to another."""
        return "slot.to(tl.int64) * s_s" if self.alone else "slot"

    @property
    def seen(self) -> str:
        """How many tokens each row sees, or entries that are complete."""
        each = "" if self.causal or self.entries else " + rows * 0"
        return seen_by("q_offset + t0 + rows", self.entries, causal=self.causal) + each

    @property
    def what(self) -> str:
        return "entries" if self.entries else "tokens"

    @property
    def words(self) -> str:
        """What its words are called."""
        return "members" if self.how == "picked" else "marks"

    @property
    def _lists(self) -> tuple[Param, ...]:
        tiles = f"[tiles, {self.heads}"
        gather = "" if self.alone else "; -1: gather instead"
        if self.how == "picked":
            return (
                pointer("COUNTS", "i32", f"{tiles}] {self.what}" + gather),
                pointer("ENTRIES", "i32", f"{tiles}, capacity] {self.what}, ascending"),
                pointer("MEMBERS", "i32", f"{tiles}, capacity] rows as bits"),
                count("capacity", f"{self.what} of the longest sequence"),
            )
        return (
            pointer("COUNTS", "i32", f"{tiles}] blocks; -1: gather instead"),
            pointer("ENTRIES", "i32", f"{tiles}, capacity] blocks, ascending"),
            pointer("MARKS", "i64", f"[tiles * BLOCK_T, {self.heads}, capacity] tokens as bits"),
            count("capacity", "blocks of the longest sequence"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """RoPE of what is pooled: of so many channels, by the entry's position or by tables of the caller."""

    start: int
    dims: int
    halves: bool
    position: str  # of entries `e`
    frequency: str  # binary logarithm of what a pair's angle is multiplied by; empty: tables

    def reaches(self, chunk: Chunk) -> bool:
        end = chunk.offset + chunk.width
        return chunk.offset < self.start + self.dims and self.start < end

    @property
    def half(self) -> int:
        return self.dims // 2

    @property
    def pairs(self) -> tuple[Chunk, ...]:
        """Pairs of channels that are turned at a time."""
        return chunks(self.half)

    def rest(self, dim: int) -> tuple[tuple[int, int], ...]:
        """Offsets and widths of the channels of a head that stay what they are."""
        end = self.start + self.dims
        behind = ((end + c.offset, c.width) for c in chunks(dim - end))
        return (*((c.offset, c.width) for c in chunks(self.start)), *behind)

    @property
    def tables(self) -> tuple[Param, ...]:
        """Those of the caller, and where their rows lie."""
        if self.frequency:
            return ()
        shape = f"[B, S, {self.dims // 2}]"
        tables = (
            (pointer(name, "input", shape), *_strides(name, name[0].lower(), "batch", "token"))
            for name in ("COS", "SIN")
        )
        return tuple(param for table in tables for param in table)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentsContext:
    """Everything `segments.py.jinja` reads."""

    name: str
    header: str = ""
    pieces: str = ""
    how: PoolHow
    heads: int
    head_dim: int
    size: int
    stride: int
    short: bool = False
    position: bool = False
    precision: str = "tf32x3"  # of dots of float32
    softmax: Literal["channel", "token"] | None = None  # of gates
    normed: bool = False
    turn: Turn | None = None
    rows: int = 0  # > 0: queries of blocks of so many rows
    append: bool = False  # only entries that new tokens complete, into what a cache keeps
    across: bool = (
        False  # those of several sequences are a tile, and a program has some columns of it
    )
    page: int = 0  # > 0: tokens lie in pages of so many
    columns_of: str = "tl.program_id(2)"  # which columns a program of a pool across sequences has
    by_turns: bool = False  # heads have turns, and entries are those of a turn's heads
    ordered: bool = False  # entries are cut from an order of keys, which says each slot's token
    before: int = 0  # tokens of an entry that lie before its place; the first entries lack some
    series: int = 0  # > 0: of so many keys and gates of a token, a slot takes its own: one a stride
    rounds: Literal["bf16", "fp8_unscaled"] | None = None  # what entries are kept in fewer bits as
    as_bytes: bool = False  # e4m3 numbers are kept as such

    @property
    def reach(self) -> int:
        """Tokens from an entry's place to its end."""
        return self.size - self.before

    @property
    def slot(self) -> str:
        """What is added to a place for the token of slot `j`."""
        return f"j[None, :] - {self.before}" if self.before else "j[None, :]"

    @property
    def k_first(self) -> str:
        """Where a sequence's tokens begin, as what is added; pages say it otherwise."""
        return "" if self.page or self.across else "k_first + "

    @property
    def slice(self) -> int:
        """Columns of a program, of a pool across sequences."""
        return min(64, self.head_dim & -self.head_dim)

    @property
    def linear_chunks(self) -> tuple[Chunk, ...]:
        """Columns that a program of a linear pool has."""
        return chunks(self.slice) if self.across else self.chunks

    @property
    def finishes(self) -> bool:
        """Whether a channel of an entry needs more than its own tokens."""
        alone = self.how not in ("gated", "max_min_mean", "first")
        return not alone or self.normed or bool(self.turn or self.rounds)

    @property
    def gate_width(self) -> int:
        """Gates of a token and head."""
        return 1 if self.softmax == "token" else self.head_dim

    @property
    def summary(self) -> str:
        if self.rows:
            turned = ", rotated" if self.turn else ""
            return f"one query a block of rows: {self.how} of its rows' queries{turned}."
        if self.how == "minmax":
            return "two vectors an entry: the least and the greatest of its tokens."
        if self.append:
            return "the entries that new tokens complete."
        steps = ["normed"] * self.normed + ["rotated"] * bool(self.turn)
        steps += [f"rounded to {'e4m3' if self.rounds != 'bf16' else 'bf16'}"] * bool(self.rounds)
        return f"one vector an entry: {' and '.join([f'{self.how} of its tokens', *steps])}."

    @property
    def divisor(self) -> str:
        """What a sum over the tokens is divided by, of each entry."""
        tokens = "tl.maximum(tokens, 1).to(tl.float32)"
        return f"tl.sqrt_rn({tokens})" if self.how == "sum_rsqrt" else tokens

    @property
    def width(self) -> int:
        """Numbers of one entry and head."""
        return 2 * self.head_dim if self.how == "minmax" else self.head_dim

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self._halved if self.paired else chunks(self.head_dim)

    @property
    def paired(self) -> bool:
        """Whether all mates of a chunk are another one, so that none is made again; dots want 16 columns."""
        if self.turn is None or not self.turn.halves:
            return False
        maps = self.how == "max_min_mean" and all(c.width >= 16 for c in self._halved)
        return maps or bool(self.rows)

    @property
    def _halved(self) -> tuple[Chunk, ...]:
        """First halves of pairs and second halves in turn, then channels that do not turn."""
        assert self.turn is not None
        first = [(self.turn.start + c.offset, c.width) for c in self.turn.pairs]
        both = [(at + half, width) for at, width in first for half in (0, self.turn.half)]
        cut = (*both, *self.turn.rest(self.head_dim))
        return tuple(
            Chunk(index=i, offset=at, width=width, source=at) for i, (at, width) in enumerate(cut)
        )

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"{self.heads}, {self.head_dim}]"
        made = f"{self.heads}, 2, {self.head_dim}]" if self.how == "minmax" else shape
        learned = f"[{self.heads}, {self.size}, {self.head_dim}"
        weight = pointer("WEIGHT", "input", f"{learned}, {self.head_dim}]")
        position = pointer("POSITION", "input", f"{learned}]")
        if self.how == "gated":
            position = pointer(
                "POSITION", "input", f"[{self.heads}, {self.size}, {self.gate_width}]"
            )
        if self.how == "max_min_mean":
            weight = pointer(
                "WEIGHT", "input", f"[{self.heads}, 3, {self.head_dim}, {self.head_dim}]"
            )
        if self.rows:
            return (
                pointer("X", "input", f"[B, T, {shape}"),
                *_strides("X", "x", "batch", "token", "head"),
                *self._finishing,
                pointer("POOLED", "f32", f"f32[blocks, {shape}"),
                *SEQ,
                *tunables("BLOCK_E", "BLOCK_J"),
            )
        return (
            *self.keys,
            *(self.gates if self.how == "gated" else ()),
            *((weight,) if self.how in ("linear", "max_min_mean") else ()),
            *((position,) if self.position else ()),
            *self._finishing,
            *(ORDER if self.ordered else ()),
            *self._place(made),
            *pages_of(self.page),
            *SEQ,
            *((axes.HEAD_FIRST,) if self.by_turns else ()),
            *tunables("BLOCK_E", *self._tunables),
        )

    def _place(self, made: str) -> tuple[Param, ...]:
        """Where entries go, and how many a sequence has room for."""
        if self.append:
            tiles = count("tiles", "of entries, of a sequence")
            if self.across:
                tiles = count("most", "entries of a sequence that new tokens may complete")
            return (pointer("POOLED", "input", f"[Z, N, {made}"), count("length", "N"), tiles)
        return (
            pointer(
                "POOLED",
                "e4m3" if self.as_bytes else "input",
                f"[Z, N, {made}, packed [1, N, {made}",
            ),
            count("length", "N; packed: 1 if the last entry of a sequence may be short, else 0"),
        )

    @property
    def _tunables(self) -> tuple[str, ...]:
        steps = {"linear": ("BLOCK_D",), "max_min_mean": ("BLOCK_D", "BLOCK_J"), "first": ()}
        return steps.get(self.how, ("BLOCK_J",))

    @property
    def keys(self) -> tuple[Param, ...]:
        """Tokens, and their strides."""
        many, several = (f"{self.series}, ", ("series",)) if self.series else ("", ())
        x = pointer("X", "input", f"[B, S, {self.heads}, {many}{self.head_dim}]")
        return (x, *_strides("X", "x", "batch", "token", "head", *several))

    @property
    def gates(self) -> tuple[Param, ...]:
        """What weighs them, and its strides."""
        many, several = (f"{self.series}, ", ("series",)) if self.series else ("", ())
        shape = f"[B, S, {self.heads}, {many}{self.gate_width}]"
        strides = _strides("GATES", "g", "batch", "token", "head", *several)
        return (pointer("GATES", "input", shape), *strides)

    @property
    def _finishing(self) -> tuple[Param, ...]:
        """What a norm and a rotation read."""
        norm = (pointer("NORM", "input", f"[{self.head_dim}]"),) if self.normed else ()
        return (*norm, *(self.turn.tables if self.turn else ()))

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """A pool in a launch of several: what calls it, and how many programs have columns of it."""

    pool: SegmentsContext
    arguments: tuple[str, ...]  # names of the kernel's parameters, in the order of its own
    programs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsContext:
    """Everything `segments.py.jinja` reads to make the entries of several pools of one step in one launch."""

    name: str
    header: str = ""
    pieces: str = ""
    how: str = "pools"
    pools: tuple[Pooled, ...]
    params: tuple[Param, ...]

    @property
    def summary(self) -> str:
        return "the entries that new tokens complete, of pools whose programs lie side by side."

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighContext:
    """Everything `merge.py.jinja` reads to make one output of branches', each times its gate."""

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int  # of a value
    branches: int
    how: Literal["weigh"] = "weigh"
    each: Literal["head", "channel"] = "head"  # what has a gate of its own
    kept: bool = True  # branches are in float32
    slots: int = 0  # > 0: rows are slots of tiles, so many each
    coarse: tuple[int, ...] = ()  # branches of which a tile has one output, and one log-sum-exp
    heads: int = 0  # of these

    @property
    def summary(self) -> str:
        return "the outputs of branches, each times its gate, in one sum."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        channels = ", Dv" if self.each == "channel" else ""
        return (
            *(self._branch(i) for i in range(self.branches)),
            *tensor("GATES", "g", f"[B, T, Hq, {self.branches}{channels}]", "bthc"),
            *tensor("O", "o", "[B, T, Hq, Dv]", "bth"),
            *(param for i in self.coarse for param in self._log_sum_exp(i)),
            *((axes.ORDER,) if self.slots else ()),
            *SEQ,
            *tunables("BLOCK_R"),
        )

    def _branch(self, i: int) -> Param:
        if i in self.coarse:
            return pointer(f"O{i}", "f32", f"f32[tiles, {self.heads}, {self.head_dim}]")
        shape = "[B, T, Hq, Dv], as O"
        return pointer(f"O{i}", "f32" if self.kept else "input", f"{'f32' * self.kept}{shape}")

    def _log_sum_exp(self, i: int) -> tuple[Param, ...]:
        """Of a tile, and of each of its rows."""
        made = (replace(p, name=p.name.replace("lse", f"lse{i}")) for p in lse(f"LSE{i}"))
        return (
            pointer(f"TILE_LSE{i}", "f32", "f32[Hq, tiles]"),
            count("tiles", "from one head to the next"),
            *made,
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGateContext:
    """Everything `merge.py.jinja` reads to multiply an output by the sigmoid of its gate."""

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int  # of a value
    each: Literal["channel", "head"]
    how: Literal["gate"] = "gate"

    @property
    def summary(self) -> str:
        return f"the output times the sigmoid of its gate, by {self.each}."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        gates = "[B, T, Hq, Dv]" if self.each == "channel" else "[B, T, Hq]"
        return (
            *tensor("X", "x", "[B, T, Hq, Dv] before its gate", "bth"),
            *tensor("GATE", "g", gates, "bth"),
            *tensor("O", "o", "[B, T, Hq, Dv]", "bth"),
            *SEQ,
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class UngateContext:
    """Everything `merge.py.jinja` reads to go back through the gate of an output.

    What was gated is not needed: times the sigmoid it is the output, which is there.
    """

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int  # of a value
    each: Literal["channel", "head"]
    how: Literal["ungate"] = "ungate"

    @property
    def summary(self) -> str:
        return f"the gradient of an output's gate, by {self.each}, and of what was gated."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        gates = "[B, T, Hq, Dv]" if self.each == "channel" else "[B, T, Hq]"
        return (
            *tensor("O", "o", "[B, T, Hq, Dv]", "bth"),
            *tensor("DO", "do", "gradient of O", "bth"),
            *tensor("GATE", "g", gates, "bth"),
            *tensor("DX", "dx", "gradient of what was gated", "bth"),
            *tensor("DGATE", "dg", "gradient of GATE", "bth"),
            *SEQ,
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnContext:
    """Everything `segments.py.jinja` reads where queries are turned, each by its own position."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int
    head_dim: int
    turn: Turn
    page: int = 0  # > 0: tokens, and what tables have of them, lie in pages of so many
    how: Literal["turn"] = "turn"

    @property
    def summary(self) -> str:
        return "queries rotated by their positions, rounded once."

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"[B, T, {self.heads}, {self.head_dim}]"
        return (
            *tensor("X", "x", shape, "bth"),
            *self.turn.tables,
            pointer("TURNED", "input", shape),
            *(() if self.turn.frequency else pages_of(self.page)),
            *SEQ,
            *tunables("BLOCK_T"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundContext:
    """Everything `segments.py.jinja` reads where vectors are kept in fewer bits, each by itself."""

    name: str
    header: str = ""
    pieces: str = ""
    dtype: RoundTo | Literal["int8", "int4"]
    heads: int
    head_dim: int
    as_bytes: bool = False  # e4m3 numbers are kept as such, and the power of two beside them
    how: Literal["round"] = "round"

    @property
    def summary(self) -> str:
        if self.levels:
            return f"vectors as whole numbers up to {self.levels}, and the scale of each."
        scaled = " times a power of two a vector" if self.dtype == "fp8" else ""
        kept = "bf16" if self.dtype == "bf16" else f"e4m3{scaled}"
        how = "a byte a number" if self.as_bytes else "kept in the dtype that they came in"
        return f"vectors rounded to {kept}, {how}."

    @property
    def levels(self) -> int:
        """The greatest whole number that is kept; 0 where other numbers are."""
        return WHOLE.get(self.dtype, 0)

    @property
    def scaled(self) -> bool:
        """Whether each vector's power of two, or its scale, is kept apart."""
        return bool(self.levels) or (self.as_bytes and self.dtype == "fp8")

    @property
    def padded_dim(self) -> int:
        """`head_dim` as a tile."""
        return next_power(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"[B, rows, {self.heads}, {self.head_dim}]"
        return (
            pointer("X", "input", shape),
            *_strides("X", "x", "batch", "token", "head"),
            pointer("ROUNDED", "e4m3" if self.as_bytes else "input", shape),
            *(
                (pointer("SCALE", "f32", shape.replace(f", {self.head_dim}]", "]")),)
                if self.scaled
                else ()
            ),
            count("rows", "of one sequence, or all that are packed"),
            count("vectors", f"B * rows * {self.heads}"),
            *tunables("BLOCK_V"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
