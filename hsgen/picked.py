"""Tokens of the entries that rows chose, each of a tile's gathered once, with a bit for each row.

For a branch under one softmax with a window: what a row's window has is no other branch's, so that the row's
bit is not set there.  Bits say all that a row may see, and lists are those of tokens: entries may have any
size, and the kernel that walks them has no mask of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsgen import rows
from hsgen.kernels import tunables
from hsgen.plan import Buffer, Config, Launch, Param, Step
from hsgen.rows import SEQ, count, next_power, pointer, tensor

ENTRIES = 256  # that are looked at at a time
SLOTS = 4096  # of a tile's rows, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class PickedContext:
    """Everything `index.py.jinja` reads where rows chose entries whose tokens are gathered.

    `rows` > 0: lists are those of blocks of so many rows.
    """

    name: str
    how: str = "tokens"
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    width: int  # slots of a list
    size: int
    window: (
        int  # tokens up to a row's own that another branch has, and if not causal as many behind it
    )
    causal: bool
    rows: int = 0

    @property
    def summary(self) -> str:
        return "the tokens of entries that a tile's rows chose any of, and which rows attend each."

    @property
    def params(self) -> tuple[Param, ...]:
        tiles = f"[tiles, {self.heads}"
        if self.rows:
            lists = (pointer("LISTS", "i32", f"[blocks, {self.heads}, {self.width}]"),)
        else:
            shape = f"[B, T, {self.heads}, {self.width}] entries, -1 anywhere"
            lists = tensor("SELECTION", "s", shape, "bths", "i32")
        return (
            *lists,
            pointer("COUNTS", "i32", f"{tiles}] tokens"),
            pointer("ENTRIES", "i32", f"{tiles}, capacity] tokens, ascending"),
            pointer("MEMBERS", "i32", f"{tiles}, capacity] rows as bits"),
            pointer(
                "MARKS", "i32", f"{tiles}, length] scratch: rows that chose each entry as bits"
            ),
            count("capacity", "tokens of a tile's list"),
            count("length", "entries of the longest sequence"),
            *SEQ,
            count("tile_first", "the turn's first tile"),
            *tunables("BLOCK_T", "BLOCK_K", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the steps need to know of a branch: names in the driver, arguments, numbers of the spec."""

    name: str
    needs: tuple[str, ...]  # but the selection
    makes: tuple[str, ...]
    selection: str  # the node
    buffers: tuple[Buffer, ...]
    tensors: tuple[str, ...]  # q, k, v and their strides
    outputs: tuple[str, ...]  # the sink if there is one, o and lse and their strides
    block: int  # rows of one that choose together; 0: each for itself
    heads: int  # selection heads
    width: int  # slots of a list
    size: int
    window: int
    causal: bool
    held: int  # bytes of a row of queries and outputs
    least: str  # bytes that lists of some tiles may have, however short a call is
    programs: str  # heads of the launch that attends
    seq: tuple[str, ...]  # where sequences lie, and where their pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A kernel that makes lists, and the tiles that it starts from."""

    context: PickedContext
    config: Config


def listings(branch: Branch, tokens: int) -> tuple[Listing, ...]:
    """What makes the lists of tiles of `tokens` rows: of blocks' lists, and of rows'."""
    step = max(16, SLOTS // tokens)
    values = (("BLOCK_K", min(step, next_power(branch.width))), ("BLOCK_N", ENTRIES))
    return tuple(
        Listing(
            context=PickedContext(
                name=f"{name}_{branch.name}",
                heads=branch.heads,
                width=branch.width,
                size=branch.size,
                window=branch.window,
                causal=branch.causal,
                rows=block,
            ),
            config=Config(constexprs=values, num_warps=4, num_stages=1),
        )
        for name, block in (("index", branch.block), *((("members", 0),) if branch.block else ()))
    )


def steps(branch: Branch) -> tuple[Step, ...]:
    """The step over what rows chose, or where they chose together that and the one over a caller's."""
    if not branch.block:
        return (_step(branch, "index"),)
    return _step(branch, "index", own=True), _step(branch, "members", own=False)


def _step(branch: Branch, index: str, *, own: bool | None = None) -> Step:
    """Lists of some tiles at a time, and attention over them."""
    name, heads, of = branch.name, str(branch.heads), "of_" if own is False else ""
    tokens, tiles, chunk = f"tokens_{name}", f"tiles_{of}{name}", f"chunk_{of}{name}"
    length, capacity, most = f"length_{name}", f"capacity_{of}{name}", f"most_{name}"
    bytes_ = f"bytes_{of}{name}"
    counts, entries, members, marks = (
        f"{x}_{of}{name}" for x in ("counts", "entries", "bits", "marks")
    )
    # rows of a tile have the lists of as many blocks as they meet
    lists_ = f"(({tokens} + {branch.block - 2}) // {branch.block} + 1)" if own else tokens
    listed = f"{lists_} * {branch.width}"
    made = f"made_{branch.selection.replace('.', '_')}"
    lists = (f"{made}_blocks",)
    if not own:
        strides = tuple(f"{made}.stride({i})" for i in (1, 2, 3))
        lists = (made, f"0 if batch.packed else {made}.stride(0)", *strides)
    title = f"attend: {name}" + (", over a selection of the caller's" if own is False else "")
    return Step(
        title=title,
        needs=(*branch.needs, f"{branch.selection}.blocks" if own else branch.selection),
        makes=branch.makes,
        of={None: None, True: "own", False: "given"}[own],
        sizes=(
            (tokens, f'config["attend_{name}"]["BLOCK_T"]'),
            (tiles, f"batch.rows // {tokens} + batch.sequences"),
            (length, f"max(1, (batch.keys + {branch.size - 1}) // {branch.size})"),
            (capacity, f"min({length}, {listed}) * {branch.size}"),
            (bytes_, f"{4 * branch.heads} * ({length} + 2 * {capacity})"),
            (most, f"max({branch.least}, batch.rows * {branch.held // 8})"),
            (chunk, f"min({tiles}, max(1, {most} // {bytes_}))"),
        ),
        buffers=(
            Buffer(name=counts, dtype="i32", dims=(chunk, heads), role="list"),
            Buffer(name=entries, dtype="i32", dims=(chunk, heads, capacity), role="list"),
            Buffer(name=members, dtype="i32", dims=(chunk, heads, capacity), role="list"),
            Buffer(name=marks, dtype="i32", dims=(chunk, heads, length), role="list"),
            *branch.buffers,
        ),
        launches=(
            Launch(
                kernel=f"{index}_{name}",
                grid=("count", heads),
                arguments=(
                    *lists,
                    counts,
                    entries,
                    members,
                    marks,
                    capacity,
                    length,
                    *_SEQ,
                    "tile_first",
                ),
            ),
            Launch(
                kernel=f"attend_{name}",
                grid=("count", branch.programs),
                arguments=(
                    *branch.tensors,
                    counts,
                    entries,
                    members,
                    capacity,
                    *branch.outputs,
                    *branch.seq,
                    "tile_first",
                ),
            ),
        ),
        tiles=tiles,
        chunk=chunk,
    )


_SEQ = ("batch.table", "batch.sequences")
