"""Attention of a few rows: programs share the keys of a row, and its parts are merged.

One row of one sequence has too few programs to fill a GPU, so each walks a share of the keys and leaves a
part of the softmax; shares follow from the shapes of a call, so equal calls have equal bits (Flash-Decoding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hsgen import rows
from hsgen.kernels import tunables
from hsgen.plan import Buffer, Config, Kernel, Launch, Param, Step
from hsgen.rows import SEQ, Chunk, RowsContext, chunks, count, pointer

MOST = 64  # shares of a row
SHARE_KEYS = 128  # of a share, at least
FILLED = 2  # programs that a processor should have
TURNS = 16  # the same where each has LONG_SHARE keys: so many that none waits long for the last
LONG_SHARE = 512
MERGED = 16  # parts that a program of the merge takes

ITEMS = count("items", "rows * splits")
SPLITS = count("splits", "parts of a row")
PART_LSE = pointer("PART_LSE", "f32", "f32[Hq, items]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitsContext(rows.InTurn):
    """Everything `merge.py.jinja` reads to merge the parts that shares of the keys gave.

    `head_dim` of a value; 0: of log-sum-exps alone.
    """

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int
    heads: int
    sink: bool = False
    turn: rows.Gated | rows.Joined | None = None
    how: str = "shares"

    @property
    def summary(self) -> str:
        return "one softmax from the parts that shares of its keys gave."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        outputs = rows.OUTPUTS if self.head_dim else rows.OUTPUTS[-4:]
        part_o = pointer("PART_O", "f32", f"f32[Hq, items, {self.head_dim}]")
        return (
            *((part_o,) if self.head_dim else ()),
            PART_LSE,
            *((rows.SINK,) if self.sink else ()),
            *rows.gates_of(self.turn),
            *outputs,
            ITEMS,
            SPLITS,
            *SEQ,
            *tunables("BLOCK_H", "BLOCK_P"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def shares(
    name: str, *, sms: int, rows_of: str, heads: int, keys: str
) -> tuple[tuple[str, str], ...]:
    """The sizes that say how many programs share the keys of a row; the last is `splits_` and the name.

    Enough to fill all processors, none with next to nothing to do; of many keys enough for several turns.

    Args:
        name: Of the kernel.
        sms: Of the target.
        rows_of: Times `heads` the programs that there are anyway.
        heads: Programs of a row or a tile of rows.
        keys: That a row may walk, as an expression.
    """
    return (
        (f"there_{name}", f"{rows_of} * {heads}"),
        (f"filled_{name}", f"min({FILLED * sms} // there_{name}, {keys} // SHARE_KEYS)"),
        (f"turns_{name}", f"min({TURNS * sms} // there_{name}, {keys} // LONG_SHARE)"),
        (f"wanted_{name}", f"max(filled_{name}, turns_{name})"),
        (f"splits_{name}", f"max(1, min({MOST}, wanted_{name}))"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the step needs to know of a branch: names in the driver, arguments, numbers of the spec."""

    name: str
    title: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    buffers: tuple[Buffer, ...]  # of what is merged
    arguments: tuple[str, ...]  # of the kernel that attends, up to its outputs
    more: tuple[str, ...]  # and behind them
    outputs: tuple[
        str, ...
    ]  # of the merge: sink and gates if there are any, o and lse, and their strides
    query_heads: int
    grid: tuple[str, str]  # tiles by heads
    sizes: tuple[tuple[str, str], ...]  # that the grid needs
    alone: bool  # a tile is one row
    keys: str  # that a row may walk, as an expression
    sms: int
    sink: bool
    turn: rows.Gated | rows.Joined | None
    lists: tuple[tuple[Kernel, Launch, Buffer], ...] = ()  # what makes the list that is walked


def plan(
    context: RowsContext, branch: Branch, tiles: Callable[[RowsContext], Config]
) -> tuple[tuple[Kernel, ...], Step]:
    """The kernels of one branch and the step that launches them.  `context`: as if it were not shared."""
    name, width = context.name, sum(c.width for c in context.v_chunks)
    split = rows.with_split(context)
    merge = SplitsContext(
        name=f"merge_{name}",
        head_dim=width,
        heads=branch.query_heads,
        sink=branch.sink,
        turn=branch.turn,
    )
    config = Config(constexprs=(("BLOCK_H", 1), ("BLOCK_P", MOST)), num_warps=4, num_stages=1)
    kernels = (
        *(kernel for kernel, _, _ in branch.lists),
        Kernel(
            name=name,
            skeleton="rows",
            context=split,
            config=tiles(split),
            operators=branch.makes,
            by_slot=context.one_token and not context.united,
        ),
        Kernel(
            name=merge.name,
            skeleton="merge",
            context=merge,
            config=config,
            operators=branch.makes,
        ),
    )
    splits, items, merged = f"splits_{name}", f"items_{name}", f"merged_{name}"
    part_o, part_lse = f"part_o_{name}", f"part_lse_{name}"
    heads = str(branch.query_heads)
    # of a row's parts: its output lies head by head, a row's parts side by side
    o = (part_o, "0", str(width), f"{items} * {width}") if width else ()
    found = Buffer(name=part_o, dtype="f32", dims=(heads, items, str(width)), role="list")
    there = "batch.rows" if branch.alone else "batch.sequences"
    return kernels, Step(
        title=branch.title,
        needs=branch.needs,
        makes=branch.makes,
        sizes=(
            *branch.sizes,
            *shares(
                name, sms=branch.sms, rows_of=there, heads=int(branch.grid[1]), keys=branch.keys
            ),
            (items, f"batch.rows * {splits}"),
            (f"parts_{name}", f"1 << ({splits} - 1).bit_length()"),
            (
                merged,
                f"max(1, min({rows.next_power(branch.query_heads)}, {MERGED} // parts_{name}))",
            ),
        ),
        buffers=(
            *(buffer for _, _, buffer in branch.lists),
            *((found,) if width else ()),
            Buffer(name=part_lse, dtype="f32", dims=(heads, items), role="list"),
            *branch.buffers,
        ),
        launches=(
            *(launch for _, launch, _ in branch.lists),
            Launch(
                kernel=name,
                grid=(*branch.grid, splits),
                arguments=(*branch.arguments, *o, part_lse, "0", items, "1", *branch.more),
            ),
            Launch(
                kernel=merge.name,
                grid=(
                    "batch.sequences",
                    f"({heads} + {merged} - 1) // {merged}",
                    "batch.rows // batch.sequences",
                ),
                arguments=(
                    *((part_o,) if width else ()),
                    part_lse,
                    *branch.outputs,
                    items,
                    splits,
                    "batch.table",
                    "batch.sequences",
                ),
                given=(("BLOCK_H", merged), ("BLOCK_P", f"parts_{name}")),
            ),
        ),
    )
