"""Rows that choose together: one query a block of rows, one list a block, and no union in a tile.

A block's list is what its rows attend: a tile takes rows of one block, so all of them share it, as in
block-sparse attention (Sparse VideoGen, SpargeAttn, cuDNN).  Only what lies near the rows has a mask.  Lists
are kept block by block, and spread over rows where a caller asks for them; lists that a caller brings are of
single rows, and the same kernel walks what a tile's rows chose between them, with their member bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from hsgen import axes, rows
from hsgen.axes import Tiling
from hsgen.estimates import Shown
from hsgen.kernels import tunables
from hsgen.plan import Buffer, Config, Kernel, Launch, Param, Step
from hsgen.rows import SEQ, Entries, Phase, RowsContext, Shape, count, next_power, pointer

TILE_FIRST = count("tile_first", "the turn's first tile")
WIDTH = count("width", "slots of a list")
CAPACITY = count("capacity", "slots of a tile's list")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListsContext:
    """Everything `index.py.jinja` reads: a tile's part of its block's list, the union of lists of rows that a
    caller brings, or every row's copy of its block's list.
    """

    name: str
    how: Literal["lists", "members", "spread"]
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    rows: int  # of a block; 0: a sequence has one list
    size: int
    stride: int
    causal: bool
    slotted: bool = False  # rows and keys are slots of tiles of axes
    left: int = 0  # tokens of a window beside it, which has those of its rows
    tiers: bool = False  # a block says the tier of every entry, and has no list
    bits: bool = False  # a block says of every entry, in a bit, whether it is chosen
    segment: int = 0  # > 0: entries are cut from sorted segments of so many tokens
    apart: bool = False  # of entries that all rows chose, too, each says which did
    own: bool = False  # a row that did not choose its own entry chose none
    shown: Shown | None = None  # what a pattern beside it shows each row, which lists leave out

    @property
    def sink(self) -> int:
        """First entries, which are the pattern's."""
        return self.shown.entries(self.stride) if self.shown else 0

    @property
    def padded_sink(self) -> int:
        """The same as a power of two of two at least."""
        return max(2, next_power(self.sink))

    @property
    def whole(self) -> str:
        """Entries of which the first row sees every token, and so do those behind it."""
        rest = f"{self.stride}, {self.causal}, False)"
        if self.shown:
            return f"complete_limit({self.shown.before('first')} - 1, k_len, {self.size}, {rest}"
        if self.apart:
            return "tl.minimum(first, 0)"
        if self.segment:
            return f"settled_limit(first, k_len, {self.segment}, {rest}"
        return f"complete_limit(first, k_len, {self.size}, {rest}"

    def begun(self, position: str) -> str:
        """Entries of which a row may see a token."""
        rest = f"{self.stride}, {self.causal})"
        if self.shown:
            return f"entry_limit({self.shown.before(f'({position})')} - 1, k_len, {rest}"
        if self.segment:
            return f"begun_segments({position}, k_len, {self.segment}, {rest}"
        return f"entry_limit({position}, k_len, {rest}"

    @property
    def by_turns(self) -> bool:
        """Whether lists are those of a turn's heads, not of a turn's tiles."""
        return self.slotted

    @property
    def summary(self) -> str:
        match self.how:
            case "lists":
                return "of a block's list, what all rows of a tile see whole, and what some see."
            case "members":
                return (
                    "the union of the entries that a tile's rows chose, and which rows chose each."
                )
            case "spread":
                return (
                    f"every row's copy of the list of its {'block' if self.rows else 'sequence'}."
                )

    @property
    def params(self) -> tuple[Param, ...]:
        lists: tuple[Param, ...] = (
            pointer("LISTS", "i32", f"[blocks, {self.heads}, width] ascending, then -1"),
        )
        if self.bits:
            lists = (rows.bits_of(self.heads), rows.BIT_WORDS)
        counts = pointer(
            "COUNTS", "i32", f"[tiles, {self.heads}, 2] of full entries, of partial ones"
        )
        order, tokens = ((axes.ORDER,), (axes.TOKENS,)) if self.slotted else ((), ())
        turn = axes.HEAD_FIRST if self.slotted else TILE_FIRST
        match self.how:
            case "lists":
                entries = pointer("ENTRIES", "i32", f"[tiles, {self.heads}, width] full ones first")
                tiles = tunables("BLOCK_T", "BLOCK_N")
                return (*lists, counts, entries, WIDTH, *tokens, *SEQ, turn, *tiles)
            case "members":
                listed = f"[tiles, {self.heads}, capacity"
                return (
                    *brought(self.heads),
                    counts,
                    pointer("ENTRIES", "i32", f"{listed}] full ones, then partial ones"),
                    members_of(self.heads),
                    WIDTH,
                    CAPACITY,
                    *order,
                    *tokens,
                    *SEQ,
                    turn,
                    *tunables("BLOCK_T", "BLOCK_K", "BLOCK_N"),
                )
            case "spread":
                made = pointer("SELECTION", "i32", f"[rows, {self.heads}, width]")
                tiles = tunables("BLOCK_T", "BLOCK_N")
                if self.tiers:
                    entries = count("entries", "of the longest sequence")
                    tiers = pointer("LISTS", "i32", f"[blocks, {self.heads}, entries] tiers")
                    return (tiers, made, entries, WIDTH, *SEQ, *tiles)
                if not self.slotted:
                    return (*lists, made, WIDTH, *SEQ, *tiles)
                stride = Param(name="s_b", kind="stride", comment="SELECTION: batch stride")
                return (*lists, made, stride, WIDTH, *order, *SEQ, *tiles)

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def brought(heads: int) -> tuple[Param, ...]:
    """A selection of the caller's, and its strides."""
    dims = ("batch", "token", "head", "slot")
    return (
        pointer("SELECTION", "i32", f"[B, T, {heads}, width], -1 anywhere"),
        *(
            Param(name=f"s_{dim[0]}", kind="stride", comment=f"SELECTION: {dim} stride")
            for dim in dims
        ),
    )


def given_of(selection: str) -> tuple[str, ...]:
    """The same, as a driver has them."""
    strides = tuple(f"{selection}.stride({i})" for i in (1, 2, 3))
    return (selection, f"0 if batch.packed else {selection}.stride(0)", *strides)


def members_of(heads: int) -> Param:
    """Which rows of a tile chose an entry."""
    shape = f"[tiles, {heads}, capacity, ceil(BLOCK_T / 32)]"
    return pointer("WORDS", "i32", f"{shape} rows as bits, by entry")


def attend(
    shape: Shape,
    *,
    name: str,
    scale: float,
    entries: Entries,
    share: str,
    block: int,
    slotted: bool = False,
    by_turns: bool = False,
    left: int = 0,
    ordered: bool = False,
    shown: Shown | None = None,
) -> RowsContext:
    """One softmax over the blocks that the rows of a tile chose together, full ones first.

    slotted: keys are slots of tiles of axes.  by_turns: and rows are tokens, whose heads have turns.
    ordered: blocks are of slots, whose tokens an order says.
    shown: what a pattern beside it shows each row, which is left to that.
    """
    usual = rows.attend_blocks(
        shape, name=name, scale=scale, entries=entries, width=1, share=share, left=left
    )
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    list_row = f"tl.program_id(0).to(tl.int64) * {list_heads}" + (
        " + head" if list_heads > 1 else ""
    )
    seen, found = "seen" if shape.causal else "k_len", tuple[str, ...]()
    if slotted:
        list_row = list_of_turn("tl.program_id(0)", list_heads, by_turns=by_turns)
        seen = f"entry * {entries.stride} + tokens"
        found = (f"tokens = tl.load(TOKENS + k_first // {entries.stride} + entry)",)
    full, partial = usual.phases
    if entries.size == 1:
        return tokens_of(usual, shape, share=share, block=block)
    context = replace(
        usual,
        summary="attention over the blocks that rows chose together: a tile's rows share a list.",
        params=(
            *rows.QUERY,
            *rows.keys_and_values(shape),
            pointer("COUNTS", "i32", "[tiles, H, 2] full, partial"),
            pointer("ENTRIES", "i32", "[tiles, H, capacity] blocks"),
            pointer("WORDS", "i32", "[tiles, H, capacity, words] members, by block"),
            CAPACITY,
            count("members", "words of a block; 0: every row is a member"),
            *rows.OUTPUTS,
            *(rows.ORDER if ordered else ()),
            *((axes.TOKENS,) if slotted else ()),
            *SEQ,
            *(() if slotted else (TILE_FIRST,)),
            *rows.BLOCKS,
        ),
        tile="" if slotted else "tl.program_id(0) + tile_first",
        together="part",
        rows_together=block,
        order_head=rows.kv_head("order_h", shape, per_head=share == "Hq") if ordered else "",
        setup=(
            f"list_row = {list_row}",
            "list_base = list_row * capacity",
            *usual.setup[2:],
        ),
        phases=(
            full,
            replace(
                partial,
                comment="partial blocks: what each row may see, of members where rows differ",
                members=False,  # words go by block, and where a list is the block's there are none
                body=(
                    "words = WORDS + (list_base + entry) * num_words + word",
                    "member = tl.load(words, mask=word < members, other=-1) >> bit & 1",
                    *found,
                    f"limit = tl.where(member != 0, {seen}, 0)",
                ),
                visible=_through_order(partial.visible) if ordered else partial.visible,
            ),
        ),
    )
    if shown:
        context = _without(context, shown)
    return axes.in_turns(context, shape, per_head=share == "Hq") if by_turns else context


def _without(context: RowsContext, shown: Shown) -> RowsContext:
    """The same loops, of rows that see what is before their window in a pattern."""
    seen = f"seen = tl.minimum({shown.before('position')}, k_len)"
    setup = tuple(seen if line.startswith("seen = ") else line for line in context.setup)
    return replace(context, setup=setup)


def tokens_of(usual: RowsContext, shape: Shape, *, share: str, block: int) -> RowsContext:
    """The same where entries are tokens, of which a step takes as many as it has keys."""
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    own = " + head" if list_heads > 1 else ""
    heads = rows.rows_a_token(rows.heads_of(shape, per_head=share == "Hq"))
    seen = "n[None, :] < limit[:, None]"
    return replace(
        usual,
        summary="attention over the tokens that rows chose together: a tile's rows share a list.",
        params=(
            *rows.QUERY,
            *rows.keys_and_values(shape),
            pointer("COUNTS", "i32", "[tiles, H, 2] full, partial"),
            pointer("ENTRIES", "i32", "[tiles, H, capacity] tokens"),
            pointer("WORDS", "i32", "[tiles, H, capacity, words] members, by token"),
            CAPACITY,
            count("members", "words of a token; 0: every row is a member"),
            *rows.OUTPUTS,
            *SEQ,
            TILE_FIRST,
            *rows.BLOCKS,
        ),
        tile="tl.program_id(0) + tile_first",
        together="part",
        rows_together=block,
        stride=1,
        setup=(
            f"list_row = tl.program_id(0).to(tl.int64) * {list_heads}{own}",
            "list_base = list_row * capacity",
            "num_words: tl.constexpr = (BLOCK_T + 31) // 32",
            "full = tl.load(COUNTS + list_row * 2)",
            "partial = tl.load(COUNTS + list_row * 2 + 1)",
            f"word = tl.minimum(rows // {heads}, BLOCK_T - 1) // 32",
            f"bit = rows // {heads} % 32",
            f"limit = {'tl.minimum(position + 1, k_len)' if shape.causal else 'position * 0 + k_len'}",
        ),
        phases=(
            Phase(
                kind="slots",
                comment="tokens that every row sees",
                start="0",
                stop="full",
                slots=1,
                inside="(n >= 0) & (n < k_len)",
                visible=("inside[None, :]",),
            ),
            Phase(
                kind="slots",
                comment="tokens that some see, of members where rows differ",
                start="full",
                stop="partial",
                slots=1,
                inside="(n >= 0) & (n < k_len)",
                body=(
                    "words = WORDS + (list_base + tl.maximum(n, 0))[None, :] * num_words",
                    "words += word[:, None]",
                    "member = tl.load(words, mask=(n >= 0)[None, :] & (word < members)[:, None], other=-1)",
                    "member = member >> bit[:, None] & 1",
                ),
                visible=("(member != 0) & inside[None, :]", seen),
            ),
        ),
    )


def _through_order(visible: tuple[str, ...]) -> tuple[str, ...]:
    """What a row sees of the tokens that slots have."""
    return tuple(x.replace("n[None, :] < limit", "k_at[None, :] < limit") for x in visible)


def list_of_turn(tile: str, list_heads: int, *, by_turns: bool) -> str:
    """Which list a tile has of those of a turn's heads; one of a single head is all heads'."""
    row = f"({tile}).to(tl.int64)" if " " in tile else f"{tile}.to(tl.int64)"
    head = "turn_head" if by_turns else "head"
    return f"{row} * tl.num_programs(1) + {head}" if list_heads > 1 else row


def of_whole(
    context: RowsContext, *, block: int, heads: int, in_turn: bool = False, of_tiles: bool = False
) -> RowsContext:
    """The same over lists of whole blocks of rows: a program has a part of a block's rows, and its bits.

    in_turn: lists are those of a turn's heads.  of_tiles: they are those of a turn's tiles.
    """
    own = " + head" if heads > 1 else ""
    numbered = "(tile // parts - tile_first // parts)" if of_tiles else "(tile // parts)"
    row = f"{numbered}.to(tl.int64) * {heads}{own}"
    if in_turn:
        row = list_of_turn("tile // parts", heads, by_turns=context.by_turns)
    changed = {
        "list_row": f"list_row = {row}",
        "num_words: tl.constexpr": f"num_words: tl.constexpr = {(next_power(block) + 31) // 32}",
        "word": f"word = tl.minimum(token - block_start, {block - 1}) // 32",
        "bit": "bit = (token - block_start) % 32",
    }
    setup = tuple(changed.get(line.split(" = ")[0], line) for line in context.setup)
    return replace(context, setup=setup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How many slots a list has that keeps a part of the entries: as many as the longest sequence needs."""

    units: int  # of 2^-30
    stride: int
    forced: int  # at most
    counted: bool
    tiling: Tiling | None = None  # entries are its tiles, of which a slab begun has all
    most: int | None = None  # slots that any row has use for
    sides: int = 1  # of which each has a part, rounded up

    @staticmethod
    def units_of(fraction: float) -> int:
        """A part of a whole in units of 2^-30, rounded against the way in which its product is."""
        return math.floor(fraction * (1 << 30))

    def entries(self, keys: int) -> int:
        """How many there are to keep."""
        return max(1, (self._slots(keys) + self.stride - 1) // self.stride)

    def _slots(self, keys: int) -> int:
        return self.tiling.held(keys) if self.tiling else keys

    def sizes(self, level: str) -> tuple[tuple[str, str], ...]:
        """As expressions of the keys of the longest sequence."""
        entries, part = f"entries_{level}", f"part_{level}"
        most = f"max({part}, {self.forced})" if self.counted else f"{part} + {self.forced}"
        if self.most is not None:
            most = f"{most}, {self.most}"
        return (
            (entries, f"(batch.keys + {self.stride - 1}) // {self.stride}"),
            (part, f"({entries} * {self.units} + {self.sides * (1 << 30) - 1}) // {1 << 30}"),
            (f"width_{level}", f"max(1, min({entries}, {most}))"),
        )

    def slots(self, keys: int) -> int:
        """The number itself."""
        entries = (self._slots(keys) + self.stride - 1) // self.stride
        part = (entries * self.units + self.sides * (1 << 30) - 1) // (1 << 30)
        most = max(part, self.forced) if self.counted else part + self.forced
        return max(1, min(entries, most, entries if self.most is None else self.most))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Heads of a branch over tiles of axes in turns: what copies keys and values of a turn's into slots."""

    heads: int  # of keys
    sizes: tuple[tuple[str, str], ...]  # `turn`, and what it follows from
    turn: str
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    makes: tuple[str, ...]  # means that are left on the way

    def of(self, heads: int, count: str) -> str:
        """How many of so many heads as many heads of keys have; what is of one head, is of all."""
        each = heads // self.heads
        return "1" if heads == 1 else count if each == 1 else f"{count} * {each}"

    def first(self, heads: int) -> str:
        """The first of them."""
        return "0" if heads == 1 else self.of(heads, "tile_first")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the steps need to know of a branch: names in the driver, arguments, numbers of the spec."""

    name: str
    needs: tuple[str, ...]  # but the selection
    makes: tuple[str, ...]
    selection: str  # the node
    lists: str  # what stands for it, block by block; empty where every call brings those of rows
    buffers: tuple[Buffer, ...]
    tensors: tuple[str, ...]  # q, k, v and their strides
    outputs: tuple[str, ...]  # the sink and the gates if there are any, o and lse and their strides
    block: int  # rows of one
    width: str  # slots of a list
    heads: int  # selection heads
    share: str
    entries: Entries
    scale: float
    softcap: float | None
    sink: bool
    turn: rows.Turn | None
    turns: Turns | None = None  # rows and keys are slots of tiles of axes
    order: tuple[str, ...] = ()  # of keys that are sorted, and its strides
    segment: int = 0  # of tokens that are sorted
    shown: Shown | None = None  # what a pattern beside it shows each row
    bits: str = ""  # words of a block's choice, where that is one of bits
    walk: str = ""  # the kernel that walks lists, where it is no attention

    @property
    def walks(self) -> str:
        return self.walk or f"attend_{self.name}"

    @property
    def seq(self) -> tuple[str, ...]:
        """What says where sequences lie, and their slots."""
        if self.order:
            return (*self.order, *_SEQ)
        return (*((axes.MADE_ORDER, axes.MADE_TOKENS) if self.turns else ()), *_SEQ)


def plan(
    shape: Shape,
    branch: Branch,
    tiles: Callable[[RowsContext], Config],
    *,
    own: bool = False,
    makes: Callable[[RowsContext], RowsContext] | None = None,
) -> tuple[tuple[Kernel, ...], tuple[Step, ...]]:
    """The kernels of one branch, the step over its own lists, and the one over a caller's.

    own: a row that did not choose its own entry sees nothing.
    makes: what loops of the same keys make in place of outputs.
    """
    context = attend(
        shape,
        name=f"attend_{branch.name}",
        scale=branch.scale,
        entries=branch.entries,
        share=branch.share,
        block=branch.block,
        slotted=branch.turns is not None,
        by_turns=branch.turns is not None,
        ordered=bool(branch.order),
        shown=branch.shown,
    )
    context = rows.with_logits(
        context, scale=branch.scale, softcap=branch.softcap, sink=branch.sink
    )
    context = rows.with_turn(context, branch.turn)
    context = makes(context) if makes else context
    config = tiles(context)

    def index(how: Literal["lists", "members"], name: str, **tuned: int) -> Kernel:
        found = ListsContext(
            name=f"{name}_{branch.name}",
            how=how,
            heads=branch.heads,
            rows=branch.block,
            size=branch.entries.size,
            stride=branch.entries.stride,
            causal=shape.causal,
            slotted=branch.turns is not None,
            segment=branch.segment,
            own=own,
            shown=branch.shown,
            bits=bool(branch.bits) and how == "lists",
        )
        values = Config(constexprs=tuple(tuned.items()), num_warps=4, num_stages=1)
        return Kernel(
            name=found.name,
            skeleton="index",
            context=found,
            config=values,
            operators=branch.makes[:1],
            follows=context.name,
        )

    step = max(16, 4096 // config["BLOCK_T"])
    kernels = (
        index("lists", "index", BLOCK_N=128),
        index("members", "members", BLOCK_K=step, BLOCK_N=512),
        Kernel(
            name=context.name,
            skeleton="rows",
            context=context,
            config=config,
            operators=branch.makes,
        ),
    )
    programs = shape.query_heads // context.heads
    if not branch.lists:
        return kernels[1:], (replace(_given(branch, programs), of=None),)
    return kernels, (_own(branch, programs), _given(branch, programs))


def blocks_of(rows_of_block: int) -> str:
    """How many blocks a call has at most, as an expression."""
    return f"batch.rows // {rows_of_block} + 2 * batch.sequences"


def tiles_of(branch: Branch, tiles: str) -> tuple[tuple[str, str], ...]:
    """How many tiles a call has at most, and how many rows one has."""
    tokens, parts = f"tokens_{branch.name}", f"parts_{branch.name}"
    return (
        (tokens, f'config["{branch.walks}"]["BLOCK_T"]'),
        (parts, f"({branch.block} + {tokens} - 1) // {tokens}"),
        (tiles, f"(batch.rows // {branch.block} + 3 * batch.sequences) * {parts}"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """How many heads have a turn, and which is the first: all of them where no turns are."""

    held: str  # lists that there is room for
    lists: str
    programs: str
    list_first: tuple[str, ...] = ()
    first: str = ""


def _heads(branch: Branch, programs: int) -> _Heads:
    turns = branch.turns
    if turns is None:
        heads = str(branch.heads)
        return _Heads(held=heads, lists=heads, programs=str(programs))
    return _Heads(
        held=turns.of(branch.heads, turns.turn),
        lists=turns.of(branch.heads, "count"),
        programs=turns.of(programs, "count"),
        list_first=(turns.first(branch.heads),),
        first=turns.first(programs),
    )


def _own(branch: Branch, programs: int) -> Step:
    """Every tile walks the list of its block: in turns of tiles, or where there are, of heads."""
    name, of, turns = branch.name, _heads(branch, programs), branch.turns
    tiles, counts, entries = f"tiles_{name}", f"counts_{name}", f"entries_{name}"
    tokens, chunk = (axes.MADE_TOKENS,) if turns else (), f"chunk_{name}"
    words = (branch.bits,) if branch.bits else ()
    held, walked = (tiles, tiles) if turns else (chunk, "count")
    room = f"max(1, SCRATCH_BYTES // ({4 * branch.heads} * {branch.width}))"
    return Step(
        title=f"attend: {name}",
        needs=(*branch.needs, f"{branch.selection}.blocks"),
        makes=(*branch.makes, *(turns.makes if turns else ())),
        of="own",
        sizes=(
            *tiles_of(branch, tiles),
            *(turns.sizes if turns else ((chunk, f"min({tiles}, {room})"),)),
        ),
        buffers=(
            *(turns.buffers if turns else ()),
            Buffer(name=counts, dtype="i32", dims=(held, of.held, "2"), role="list"),
            Buffer(name=entries, dtype="i32", dims=(held, of.held, branch.width), role="list"),
            *branch.buffers,
        ),
        launches=(
            *(turns.launches if turns else ()),
            Launch(
                kernel=f"index_{name}",
                grid=(walked, of.lists),
                arguments=(
                    *(branch.lists, *words, counts, entries, branch.width, *tokens, *_SEQ),
                    *(of.list_first or ("tile_first",)),
                ),
            ),
            Launch(
                kernel=branch.walks,
                grid=(walked, of.programs),
                arguments=(
                    *branch.tensors,
                    counts,
                    entries,
                    entries,
                    branch.width,
                    "0",
                    *branch.outputs,
                    *branch.seq,
                    of.first or "tile_first",
                ),
            ),
        ),
        tiles=str(turns.heads) if turns else tiles,
        chunk=turns.turn if turns else chunk,
    )


def _given(branch: Branch, programs: int) -> Step:
    """Every tile walks what its rows chose between them: in turns of tiles, or where there are, of heads."""
    name, stride = branch.name, branch.entries.stride
    of, turns = _heads(branch, programs), branch.turns
    chosen = f"made_{branch.selection.replace('.', '_')}"
    tiles, counts, entries = f"tiles_of_{name}", f"given_counts_{name}", f"given_entries_{name}"
    words, capacity, chunk = f"given_words_{name}", f"capacity_{name}", f"chunk_{name}"
    num_words = f"num_words_{name}"
    held, walked = (tiles, tiles) if turns else (chunk, "count")
    return Step(
        title=f"attend: {name}, over a selection of the caller's",
        needs=(*branch.needs, branch.selection),
        makes=(*branch.makes, *(turns.makes if turns else ())),
        of="given",
        sizes=(
            *tiles_of(branch, tiles),
            (num_words, f"(tokens_{name} + 31) // 32"),
            (capacity, f"max(1, (batch.keys + {stride} - 1) // {stride})"),
            *(turns.sizes if turns else _tiles_of_turn(branch, tiles)),
        ),
        buffers=(
            *(turns.buffers if turns else ()),
            Buffer(name=counts, dtype="i32", dims=(held, of.held, "2"), role="list"),
            Buffer(name=entries, dtype="i32", dims=(held, of.held, capacity), role="list"),
            Buffer(name=words, dtype="i32", dims=(held, of.held, capacity, num_words), role="list"),
            *branch.buffers,
        ),
        launches=(
            *(turns.launches if turns else ()),
            Launch(
                kernel=f"members_{name}",
                grid=(walked, of.lists),
                arguments=(
                    *given_of(chosen),
                    counts,
                    entries,
                    words,
                    f"{chosen}.shape[3]",
                    capacity,
                    *(_SEQ if branch.order else branch.seq),
                    *(of.list_first or ("tile_first",)),
                ),
            ),
            Launch(
                kernel=branch.walks,
                grid=(walked, of.programs),
                arguments=(
                    *branch.tensors,
                    counts,
                    entries,
                    words,
                    capacity,
                    num_words,
                    *branch.outputs,
                    *branch.seq,
                    of.first or "tile_first",
                ),
            ),
        ),
        tiles=str(turns.heads) if turns else tiles,
        chunk=turns.turn if turns else chunk,
    )


def _tiles_of_turn(branch: Branch, tiles: str) -> tuple[tuple[str, str], ...]:
    """How many tiles have a turn: as many as a scratch holds the lists of."""
    name = branch.name
    words = f"(num_words_{name} + 1)"
    return (
        (f"bytes_{name}", f"{4 * branch.heads} * capacity_{name} * {words}"),
        (f"chunk_{name}", f"min({tiles}, max(1, SCRATCH_BYTES // bytes_{name}))"),
    )


def spread(
    level: str,
    selection: str,
    *,
    chosen: str,
    width: str,
    heads: int,
    block: int,
    slotted: bool,
    entries: str | None = None,
    bits: str | None = None,
) -> tuple[Kernel, Step]:
    """The kernel and the step that give each row the list of its block.

    chosen: the node of the lists, or of the tiers of so many `entries`, or of so many words of `bits`.
    """
    context = ListsContext(
        name=f"spread_{level}",
        how="spread",
        heads=heads,
        rows=block,
        size=1,
        stride=1,
        causal=True,
        slotted=slotted,
        tiers=entries is not None,
        bits=bits is not None,
    )
    values = (("BLOCK_T", 16), ("BLOCK_N", 64))
    kernel = Kernel(
        name=context.name,
        skeleton="index",
        context=context,
        config=Config(constexprs=values, num_warps=4, num_stages=1),
        operators=(selection,),
    )
    made = f"made_{selection.replace('.', '_')}"
    stride = (f"0 if batch.packed else {made}.stride(0)",) if slotted else ()
    slots = (axes.MADE_ORDER,) if slotted else ()
    many, lists = (entries,) if entries else (), f"made_{chosen.replace('.', '_')}"
    words = (bits,) if bits else ()
    step = Step(
        title=f"lists of rows: {level}",
        needs=(chosen,),
        makes=(selection,),
        of="rows",
        buffers=(
            Buffer(
                name=made,
                dtype="i32",
                dims=("in_q.shape[0]", "in_q.shape[1]", str(heads), width),
                role="selection",
            ),
        ),
        launches=(
            Launch(
                kernel=context.name,
                grid=("batch.rows // {BLOCK_T} + batch.sequences", str(heads)),
                arguments=(lists, *words, made, *stride, *many, width, *slots, *_SEQ),
            ),
        ),
    )
    return kernel, step


_SEQ = ("batch.table", "batch.sequences")
