"""What fills the `cols_streams` skeleton: `cols` whose rows two warps stream into shared memory, on Hopper.

64 keys and their values stay in the registers of two groups of four warps.  Of each tile of 64 rows one
group makes scores, weights and dv, the other what the scores are to change by and dk: as many products each,
whatever the head dims, and one accumulator each, so that every number is still added up in one order.  The
weights go from the first to the second through shared memory.  The tensor memory accelerator brings a
token's heads at a time, so that a list of tokens costs no more than a range; where blocks of rows chose, it
brings 64 rows of a block at once, and a row that did not choose has a log-sum-exp of infinity.

Decides what a cols kernel needs to be written so.  Places, rows and masks stay those of `cols`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hsgen.cols import ColsContext
from hsgen.plan import Config, Kernel, Launch, Param
from hsgen.rows import Chunk, Warped, count
from hsgen.target import Target

ROWS = 64  # of a tile, and keys of a program: what dots of a group take
COLUMNS = 64  # of a tile: what one swizzled row of shared memory holds
ATOM = (
    8  # rows of shared memory that are swizzled together: a token has as many heads, or a multiple
)
MOST = 128  # registers of a thread for the accumulator of a group and the operand that it keeps
STAGES = 4
CHUNK = 1024  # tokens of a block's list that one program takes


@dataclass(frozen=True, slots=True, kw_only=True)
class ColsStreamsContext(Warped):
    """Everything `cols_streams.py.jinja` reads; `cols` is what `cols.py.jinja` would."""

    cols: ColsContext
    params: tuple[Param, ...]
    header: str = ""
    pieces: str = ""
    registers = 224  # of a thread of a group
    stream_registers = 56  # of a thread of a stream's warp

    @property
    def name(self) -> str:
        return self.cols.name

    @property
    def summary(self) -> str:
        return self.cols.summary

    @property
    def key_tiles(self) -> tuple[Chunk, ...]:
        return _tiles(self.cols.qk_chunks)

    @property
    def value_tiles(self) -> tuple[Chunk, ...]:
        return _tiles(self.cols.v_chunks)

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return _tokens(self.cols)

    @property
    def first_head(self) -> str:
        """Of a tile of rows of a block."""
        if self.cols.lists > 1:
            return "tile_head"
        return f"head * {self.cols.heads}" if self.cols.heads > 1 else "head"

    @property
    def by(self) -> str:
        """From one tile to the next, as loops count them."""
        return "1" if self.cols.together else "BLOCK_T"

    @staticmethod
    def bytes(tiles: tuple[Chunk, ...]) -> int:
        """Of a tile of rows, in 16 bits."""
        return 2 * ROWS * COLUMNS * len(tiles)

    @staticmethod
    def buffer(x: str, tile: Chunk) -> str:
        """Of rows that meet keys: their queries; values: the gradients of their outputs."""
        return f"{'q' if x == 'k' else 'do'}{tile.index}"

    def inside(self, n: str) -> str:
        """Which of the keys called `n` there are."""
        if not (self.cols.list_heads or self.cols.together):
            return f"{n} < keys"
        return f"({n} < keys) & ({n} - entry * {self.cols.stride} < {self.cols.size})"

    @property
    def seen_by_all(self) -> str:
        """Whether all rows of a tile, whose positions are `first` to `last`, see all keys."""
        return " and ".join(map(_seen_by_all, _of_places(self.cols)))

    @property
    def limit(self) -> str:
        """The first entry that a row does not see, where it takes a call to say; else empty."""
        found = [match[1] for text in _of_places(self.cols) for match in LIMIT.finditer(text)]
        return found[0] if found else ""

    @property
    def visible(self) -> tuple[str, ...]:
        return tuple(LIMIT.sub("limit[None, :]", text) for text in _of_places(self.cols))

    @property
    def stores(self) -> dict[str, str]:
        """The pieces that write the gradients of keys and of values."""
        return {
            x: "add_keys" if a and not self.cols.split else "store_keys"
            for x, a in zip("kv", self.cols.adds, strict=True)
        }

    @property
    def numbers(self) -> tuple[str, ...]:
        """Of rows, a number each."""
        return ("lse_rows", "delta_rows", *(("gate_rows",) if self.cols.gate else ()))

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of what groups and stream share in shared memory."""
        return (
            *(self.buffer("k", tile) for tile in self.key_tiles),
            *(self.buffer("v", tile) for tile in self.value_tiles),
            *self.numbers,
            *("p_shared", "full", "free", "p_full", "p_free"),
        )


def _tokens(context: ColsContext) -> int:
    """Of a tile of rows."""
    return ROWS // context.heads


def _of_places(context: ColsContext) -> tuple[str, ...]:
    """Conditions on a key's place and a row's; whether a row of a block chose is known of rows alone."""
    return tuple(text for text in context.visible if text != MEMBER)


def _tiles(cut: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    columns = range(0, sum(c.width for c in cut), COLUMNS)
    return tuple(
        Chunk(index=i, offset=at, width=COLUMNS, source=at) for i, at in enumerate(columns)
    )


MEMBER = "member[None, :] != 0"
LIMIT = re.compile(r"(complete_limit\(.*\))\[None, :\]")
CONDITION = re.compile(r"n\[:, None\] (<=|<|>) (.+)")


def _seen_by_all(condition: str) -> str:
    """Of a condition on one key and one row, that it holds for all; positions only move its bound up."""
    found = CONDITION.fullmatch(condition)
    assert found is not None, condition
    key, row = ("n0", "last") if found[1] == ">" else ("n0 + BLOCK_N - 1", "first")
    bound = re.sub(r"\bposition\b", row, found[2].replace("[None, :]", ""))
    return f"{key} {found[1]} {bound}"


def config(context: ColsContext, target: Target, dtype: str) -> Config | None:
    """64 keys and tiles of 64 rows, as many as there is room for; None: it cannot be written so."""
    qk, v = (sum(c.width for c in cut) for cut in (context.qk_chunks, context.v_chunks))
    possible = (
        target.streams
        and dtype != "fp32"
        and not (context.latent or context.at)
        and not (context.bias_scale or context.cap)
        and (_blocks_of_rows(context) if context.together else _heads_of_tokens(context))
        and qk % COLUMNS == v % COLUMNS == 0
        and max(qk // 2 + v // 4, v // 2 + qk // 4) <= MOST
        and not (context.list_heads and (context.size < ROWS or context.marked))
    )
    if not possible:
        return None
    fixed = shared_bytes(context, 0)
    stages = (target.smem_per_block - fixed) // (shared_bytes(context, 1) - fixed)
    values = (("BLOCK_T", ROWS // context.heads), ("BLOCK_M", ROWS), ("BLOCK_N", ROWS))
    values += (("STAGES", min(STAGES, stages)),)
    if context.list_heads:
        values = (("BLOCK_C", CHUNK), *values)
    return Config(constexprs=values, num_warps=4, num_stages=1) if stages >= 2 else None


def _heads_of_tokens(context: ColsContext) -> bool:
    """Whether the heads of a token, which are brought at a time, fill tiles."""
    whole = context.heads == context.group
    return whole and context.heads % ATOM == 0 and ROWS % context.heads == 0


def _blocks_of_rows(context: ColsContext) -> bool:
    """Whether tiles are whole parts of blocks of rows, and keys a block of tokens that stand in order."""
    return (
        ROWS % context.heads == 0
        and context.together % _tokens(context) == 0
        and context.size >= ROWS
        and context.several == context.merge == 1
        and not (context.by_turns or context.segment or context.counted)
        and all(CONDITION.fullmatch(text) for text in _of_places(context))
    )


def shared_bytes(context: ColsContext, stages: int) -> int:
    """Of tiles of rows with their numbers, and of what the groups share and store by."""
    dims = sum(c.width for c in (*context.qk_chunks, *context.v_chunks))
    return stages * ROWS * (dims * 2 + 3 * 4) + 2 * ROWS * ROWS * 2 + ROWS * COLUMNS * 2 + 1024


def streamed(context: ColsContext) -> ColsStreamsContext:
    """The same kernel with its rows in a stream."""
    params: list[Param] = []
    for param in context.params:
        if param.name in ("Q", "DO"):
            of = "Dqk" if param.name == "Q" else "Dv"
            made = Param(
                name=param.name,
                kind="tiles",
                dtype=param.dtype,
                columns=COLUMNS,
                heads=context.heads,
                tokens=_tokens(context) if context.together else 1,
                comment=f"[B, T, Hq, {of}], {COLUMNS} columns of {_whose(context)} a tile",
            )
            params.append(made)
        elif not re.fullmatch(r"(q|do)_[bth]", param.name):
            params.append(param)
    at = [p.name for p in params].index("num_sequences") + 1
    whose = count("whose", "1: each sequence has rows of its own; 0: all lie in one")
    deep = Param(name="STAGES", kind="constexpr", comment="tiles of rows that are in flight")
    return ColsStreamsContext(cols=context, params=(*params[:at], whose, *params[at:], deep))


def _whose(context: ColsContext) -> str:
    """What a tile that is brought is of."""
    if not context.together:
        return f"a token's {context.heads} heads"
    heads = f"{context.heads} heads" if context.heads > 1 else "a head"
    return f"{_tokens(context)} tokens of {heads}"


def of_tiles(kernel: Kernel) -> Kernel:
    """The same kernel in the skeleton that its tiles are of."""
    if not isinstance(kernel.context, ColsContext) or "STAGES" not in dict(
        kernel.config.constexprs
    ):
        return kernel
    return replace(kernel, skeleton="cols_streams", context=streamed(kernel.context))


def launch(launch: Launch, context: ColsStreamsContext) -> Launch:
    """The same launch, with tiles told to the tensor memory accelerator."""
    names = [p.name for p in context.cols.params if p.kind != "constexpr"]
    given = dict(zip(names, launch.arguments, strict=True))
    made: list[str] = []
    for param in context.params:
        if param.kind == "tiles":
            made.append(
                f"batch.tile_of({given[param.name]}, {param.tokens}, {COLUMNS}, {param.heads})"
            )
        elif param.name == "whose":
            made.append("0 if batch.packed else 1")
        elif param.kind != "constexpr":
            made.append(given[param.name])
    return replace(launch, arguments=tuple(made))
