"""Blocks of rows that read entries in tiers: token by token, or as means of a few of them, under one softmax.

A block's choice is the tier of every entry.  A tile has a list of entries for each tier and walks one after
the other, in one loop each: tokens block by block, means slot by slot, as one entry has few of them.  A
caller's selection says which entries each row takes; their tiers are those of the row's block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hsgen import axes, rows, together
from hsgen.kernels import tunables
from hsgen.plan import Buffer, Config, Kernel, Launch, Param, Step
from hsgen.rows import SEQ, Phase, RowsContext, Shape, count, next_power, pointer
from hsgen.together import WIDTH

CAPACITY = count("capacity", "entries of the longest sequence")
LEAST_BLOCK = 16  # tokens that a dot takes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersContext:
    """Everything `_index_tiers.jinja` reads: the entries of a tile, tier by tier."""

    name: str
    how: str = "tiers"
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    rows: int  # of a block
    size: int
    causal: bool
    tiers: int
    whole: bool  # of the first tier, entries of which every row sees all come first
    given: bool  # rows chose each for itself
    slotted: bool = False  # as those of `together.ListsContext`
    by_turns: bool = True

    @property
    def stride(self) -> int:
        return self.size

    def begun(self, position: str) -> str:
        """As `together.ListsContext` says it."""
        return f"entry_limit({position}, k_len, {self.size}, {self.causal})"

    @property
    def summary(self) -> str:
        if self.given:
            return "the entries that a tile's rows chose, tier by tier, and which rows chose each."
        return "the entries of a block of rows, tier by tier."

    @property
    def params(self) -> tuple[Param, ...]:
        listed = "[tiles, heads of a turn"
        tiers = pointer("TIERS", "i32", f"[blocks, {self.heads}, capacity] of each entry, -1: none")
        counts = pointer("COUNTS", "i32", f"{listed}, {self.tiers + 1}] whole ones, tiers")
        entries = pointer("ENTRIES", "i32", f"{listed}, capacity] tier by tier")
        if not self.given:
            blocks = tunables("BLOCK_T", "BLOCK_N")
            return (tiers, counts, entries, CAPACITY, *SEQ, axes.HEAD_FIRST, *blocks)
        return (
            *together.brought(self.heads),
            tiers,
            counts,
            entries,
            together.members_of(self.heads),
            WIDTH,
            CAPACITY,
            *SEQ,
            axes.HEAD_FIRST,
            *tunables("BLOCK_T", "BLOCK_K", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def attend(
    shape: Shape,
    *,
    name: str,
    scale: float,
    size: int,
    merges: tuple[int, ...],
    counted: bool,
    share: str,
    block: int,
    given: bool,
) -> RowsContext:
    """One softmax over what each tier has: tokens of entries of `size`, means of `merges` of them.

    Heads have turns: means and lists are those of a turn's heads.
    `given`: of entries that each row chose for itself; else all rows of the tile take all.
    """
    heads = rows.heads_of(shape, per_head=share == "Hq")
    list_heads = {"Hq": shape.query_heads, "Hkv": shape.kv_heads, "1": 1}[share]
    means = tuple(merge for merge in merges if merge > 1)
    starts = [f"tier_{i}" for i in range(len(merges) + 1)]
    counts = [
        f"{start} = {before} + tl.load(counts + {i + 1})"
        for i, (before, start) in enumerate(zip(["whole", *starts[1:]], starts[1:], strict=False))
    ]
    kv = {
        x: rows.kv_head(f"{x}_h", shape, per_head=share == "Hq", head="turn_head")
        for x in names(means)
    }
    bases = [f"{x}_base = {x.upper()} + z.to(tl.int64) * {x}_b{kv[x]}" for x in names(means)]
    tensors = [
        param
        for merge in means
        for x, dim in ((f"k{merge}", "Dqk"), (f"v{merge}", "Dv"))
        for param in rows.tensor(x.upper(), x, f"[B, N, Hkv, {dim}] by {merge}", "bth")
    ]
    words = (
        "num_words: tl.constexpr = (BLOCK_T + 31) // 32",
        f"word = tl.minimum(rows // {rows.rows_a_token(heads)}, BLOCK_T - 1) // 32",
        f"bit = rows // {rows.rows_a_token(heads)} % 32",
    )
    return RowsContext(
        name=name,
        summary="attention over the entries of each tier, as tokens or as means of some of them"
        + (", that each row selected." if given else "."),
        params=(
            *rows.QUERY,
            *rows.keys_and_values(shape),
            *tensors,
            pointer("COUNTS", "i32", f"[tiles, H, {len(merges) + 1}] whole ones, tiers"),
            pointer("ENTRIES", "i32", "[tiles, H, capacity] entries, tier by tier"),
            *((pointer("WORDS", "i32", "[tiles, H, capacity, words] members, by entry"),) * given),
            CAPACITY,
            *rows.OUTPUTS,
            *SEQ,
            axes.HEAD_FIRST,
            *rows.BLOCKS,
        ),
        acc="softmax",
        by_turns=True,
        together="part",
        rows_together=block,
        **heads,
        key_row="k_first",
        setup=(
            *bases,
            *(f"k{merge}_row = k_first // {merge}" for merge in means),
            f"list_row = {together.list_of_turn('tl.program_id(0)', list_heads, by_turns=True)}",
            "list_base = list_row * capacity",
            f"counts = COUNTS + list_row * {len(merges) + 1}",
            "whole = tl.load(counts)",
            *counts,
            *(
                (f"TILES: tl.constexpr = ({size} + BLOCK_N - 1) // BLOCK_N",)
                * by_tiles(size, merges)
            ),
            *(words if given else ()),
            *(("seen = tl.minimum(position + 1, k_len)",) if shape.causal else ()),
        ),
        phases=tuple(
            phase
            for i, merge in enumerate(merges)
            for phase in _phases(
                shape,
                size=size,
                merge=merge,
                begin="0" if i == 0 else starts[i],
                end=starts[i + 1],
                given=given,
                counted=counted,
            )
        ),
        stride=size,
        scale_log2=rows.number(scale * rows.LOG2_E),
        precision=shape.precision,
    )


def names(means: tuple[int, ...]) -> tuple[str, ...]:
    """Of keys and values of each merge."""
    return tuple(f"{x}{merge}" for merge in means for x in "kv")


def by_tiles(size: int, merges: tuple[int, ...]) -> bool:
    """Whether tokens are walked block by block, of as many as a dot takes; else slot by slot."""
    return merges[0] == 1 and size >= LEAST_BLOCK and size == next_power(size)


def _phases(
    shape: Shape,
    *,
    size: int,
    merge: int,
    begin: str,
    end: str,
    given: bool,
    counted: bool,
) -> tuple[Phase, ...]:
    """The loops of a tier."""
    if merge == 1 and by_tiles(size, (merge,)):
        return _blocks(shape, end, given=given)
    inside = "(n >= 0) & (n < k_len)" if merge == 1 else f"(n >= 0) & (n * {merge} < k_len)"
    visible, body = ("inside[None, :]",), tuple[str, ...]()
    if shape.causal:
        last = "n + 1" if merge == 1 else f"tl.minimum(n * {merge} + {merge}, k_len)"
        body = (f"through = {last}",)
        visible = (*visible, "through[None, :] <= seen[:, None]")
    if given:
        body = (
            *body,
            f"words = (list_base + n // {size // merge}) * num_words",
            "address = WORDS + words[None, :] + word[:, None]",
            "member = tl.load(address, mask=(n >= 0)[None, :], other=0) >> bit[:, None] & 1",
        )
        visible = (*visible, "member != 0")
    return (
        Phase(
            kind="slots",
            comment="token by token" if merge == 1 else f"means of {merge}",
            start=begin,
            stop=f"({end} - {begin})" if begin != "0" else end,
            inside=inside,
            visible=visible,
            body=body,
            keys="k" if merge == 1 else f"k{merge}",
            values="v" if merge == 1 else f"v{merge}",
            slots=size // merge,
            counts=merge if counted and merge > 1 else 0,
        ),
    )


def _blocks(shape: Shape, end: str, *, given: bool) -> tuple[Phase, ...]:
    """Those of tokens, block by block: of what every row sees all first."""
    seen = "seen" if shape.causal else "k_len"
    body: tuple[str, ...] = (f"limit = {seen}",)
    visible = ("n[None, :] < limit[:, None]" if shape.causal else "(n < limit)[None, :]",)
    if given:
        body = (
            "words = WORDS + (list_base + entry) * num_words + word",
            "member = tl.load(words) >> bit & 1",
            f"limit = tl.where(member != 0, {seen}, 0)",
        )
        visible = ("n[None, :] < limit[:, None]",)
    whole = Phase(
        kind="list",
        comment="token by token, where every row sees all of a block",
        start="0",
        stop="whole * TILES",
    )
    rest = Phase(
        kind="list",
        comment="token by token, what each row may see",
        start="whole * TILES",
        stop=f"{end} * TILES",
        body=body,
        inside="n < k_len",
        visible=visible,
    )
    return (rest,) if given else (whole, rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the steps need to know of a branch: names in the driver, arguments, numbers of the spec."""

    of: together.Branch
    merges: tuple[int, ...]
    counted: bool
    tiers: str  # the node that says the tier of each entry
    capacity: str  # entries of a row of it


def plan(
    shape: Shape,
    branch: Branch,
    tiles: Callable[[RowsContext], Config],
    turns: Callable[[str], together.Turns],
) -> tuple[tuple[Kernel, ...], tuple[Step, ...]]:
    """The kernels of one branch, the step over its own choice, and the one over a caller's.

    turns: of heads, whose lists have so many bytes a head of keys, and what makes the means of a turn's.
    """
    of, size = branch.of, branch.of.entries.size

    def attended(*, given: bool) -> RowsContext:
        context = attend(
            shape,
            name=f"{'given' if given else 'attend'}_{of.name}",
            scale=of.scale,
            size=size,
            merges=branch.merges,
            counted=branch.counted,
            share=of.share,
            block=of.block,
            given=given,
        )
        context = rows.with_logits(context, scale=of.scale, softcap=of.softcap, sink=of.sink)
        return rows.with_turn(context, of.turn)

    def index(*, given: bool, **tuned: int) -> Kernel:
        found = TiersContext(
            name=f"{'members' if given else 'index'}_{of.name}",
            heads=of.heads,
            rows=of.block,
            size=size,
            causal=shape.causal,
            tiers=len(branch.merges),
            whole=by_tiles(size, branch.merges) and not given,
            given=given,
        )
        return Kernel(
            name=found.name,
            skeleton="index",
            context=found,
            config=Config(constexprs=tuple(tuned.items()), num_warps=4, num_stages=1),
            operators=of.makes[:1],
            follows=f"attend_{of.name}",
        )

    own, given = attended(given=False), attended(given=True)
    config = tiles(own)
    step = max(16, 4096 // config["BLOCK_T"])
    shared = Config(constexprs=(), num_warps=config.num_warps, num_stages=min(2, config.num_stages))
    kernels = (
        index(given=False, BLOCK_N=128),
        index(given=True, BLOCK_K=step, BLOCK_N=512),
        Kernel(name=own.name, skeleton="rows", context=own, config=config, operators=of.makes),
        Kernel(
            name=given.name,
            skeleton="rows",
            context=given,
            config=shared,
            operators=of.makes,
            follows=own.name,
        ),
    )
    programs = shape.query_heads // own.heads
    return kernels, (_own(branch, turns, programs), _given(branch, turns, programs))


def _lists(branch: Branch, turns: together.Turns, prefix: str, tiles: str) -> tuple[Buffer, Buffer]:
    """The entries of each tile, and how many each tier has."""
    name, heads = branch.of.name, turns.of(branch.of.heads, turns.turn)
    counts, entries = (tiles, heads, str(len(branch.merges) + 1)), (tiles, heads, branch.capacity)
    return (
        Buffer(name=f"{prefix}counts_{name}", dtype="i32", dims=counts, role="list"),
        Buffer(name=f"{prefix}entries_{name}", dtype="i32", dims=entries, role="list"),
    )


def _own(branch: Branch, turns_of: Callable[[str], together.Turns], programs: int) -> Step:
    """Every tile walks the entries of its block."""
    of, tiles = branch.of, f"tiles_{branch.of.name}"
    turns = turns_of(f"{tiles} * {branch.capacity}")
    counts, entries = _lists(branch, turns, "", tiles)
    lists = (counts.name, entries.name)
    return Step(
        title=f"attend: {of.name}",
        needs=(*of.needs, branch.tiers),
        makes=(*turns.makes, *of.makes),
        of="own",
        sizes=(*together.tiles_of(of, tiles), *turns.sizes),
        buffers=(*turns.buffers, counts, entries, *of.buffers),
        launches=(
            *turns.launches,
            Launch(
                kernel=f"index_{of.name}",
                grid=(tiles, turns.of(of.heads, "count")),
                arguments=(of.lists, *lists, branch.capacity, *of.seq, turns.first(of.heads)),
            ),
            Launch(
                kernel=f"attend_{of.name}",
                grid=(tiles, turns.of(programs, "count")),
                arguments=(
                    *of.tensors,
                    *lists,
                    branch.capacity,
                    *of.outputs,
                    *of.seq,
                    turns.first(programs),
                ),
            ),
        ),
        tiles=str(turns.heads),
        chunk=turns.turn,
    )


def _given(branch: Branch, turns_of: Callable[[str], together.Turns], programs: int) -> Step:
    """Every tile walks what its rows chose between them."""
    of, name = branch.of, branch.of.name
    chosen = f"made_{of.selection.replace('.', '_')}"
    tiles, words, num_words = f"tiles_of_{name}", f"given_words_{name}", f"num_words_{name}"
    turns = turns_of(f"{tiles} * {branch.capacity} * ({num_words} + 1)")
    counts, entries = _lists(branch, turns, "given_", tiles)
    lists = (counts.name, entries.name, words)
    dims = (*entries.dims, num_words)
    return Step(
        title=f"attend: {name}, over a selection of the caller's",
        needs=(*of.needs, branch.tiers, of.selection),
        makes=(*turns.makes, *of.makes),
        of="given",
        sizes=(
            *together.tiles_of(of, tiles),
            (num_words, f"(tokens_{name} + 31) // 32"),
            *turns.sizes,
        ),
        buffers=(
            *turns.buffers,
            counts,
            entries,
            Buffer(name=words, dtype="i32", dims=dims, role="list"),
            *of.buffers,
        ),
        launches=(
            *turns.launches,
            Launch(
                kernel=f"members_{name}",
                grid=(tiles, turns.of(of.heads, "count")),
                arguments=(
                    *together.given_of(chosen),
                    of.lists,
                    *lists,
                    f"{chosen}.shape[3]",
                    branch.capacity,
                    *of.seq,
                    turns.first(of.heads),
                ),
            ),
            Launch(
                kernel=f"given_{name}",
                grid=(tiles, turns.of(programs, "count")),
                arguments=(
                    *of.tensors,
                    *lists,
                    branch.capacity,
                    *of.outputs,
                    *of.seq,
                    turns.first(programs),
                ),
            ),
        ),
        tiles=str(turns.heads),
        chunk=turns.turn,
    )
