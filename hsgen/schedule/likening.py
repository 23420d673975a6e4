"""Launches that compare the tokens of blocks of keys, and of blocks of rows."""

from __future__ import annotations

from hsgen import configs, together
from hsgen.graph import Node, Unlike
from hsgen.likeness import PIECE, LikenessContext
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft


def flags(node: Node) -> tuple[str, ...]:
    """Which entries are unlike, and which blocks of rows, as a choice reads them."""
    assert isinstance(node.op, Unlike)
    keys, rows, level = *_buffers(node.op.level), node.op.level
    return keys, f"count_unlike_{level}", f"entries_unlike_{level}", rows


def _buffers(level: str) -> tuple[str, str]:
    return f"unlike_{level}", f"unlike_rows_{level}"


def compare(draft: Draft, node: Node, op: Unlike) -> None:
    """Sums of keys, if these are taken less their mean, then a flag for each block of keys and of rows."""
    query, keys = (draft.graph[name] for name in node.inputs)
    level, dim = op.level, draft.size(keys.type.dims[-1])
    of_keys, of_rows = _buffers(level)
    key_heads, row_heads = (draft.size(x.type.dims[2]) for x in (keys, query))
    k = text.input_of(keys.name)
    length, count, entries = (
        f"length_unlike_{level}",
        f"count_unlike_{level}",
        f"entries_unlike_{level}",
    )
    pieces, piece, sums = f"pieces_{level}", f"piece_{level}", f"sums_{level}"
    blocks = f"blocks_unlike_{level}"
    whole = LikenessContext(name=f"sum_{level}_keys", how="sums", heads=key_heads, head_dim=dim)
    alike_keys = LikenessContext(
        name=f"compare_{level}_keys",
        how="alike",
        heads=key_heads,
        head_dim=dim,
        size=op.size,
        short=draft.short(level),
        similarity=op.similarity,
        centred=op.centred,
    )
    alike_rows = LikenessContext(
        name=f"compare_{level}_rows",
        how="alike",
        heads=row_heads,
        head_dim=draft.size(query.type.dims[-1]),
        size=op.block,
        rows=True,
        similarity=op.similarity,
    )
    for context in (*((whole,) if op.centred else ()), alike_keys, alike_rows):
        draft.kernel("segments", context, configs.likeness(context), node.name)
    summed = (
        (
            f"all_{pieces}",
            f"({k}.shape[1] + {PIECE - 1}) // {PIECE} + batch.packed * batch.sequences",
        ),
        (piece, f"1 if batch.packed else all_{pieces}"),
        (pieces, f"{k}.shape[0] * all_{pieces}"),
    )
    sum_buffer = Buffer(
        name=sums, dtype="f32", dims=(pieces, str(key_heads), str(dim)), role="scratch"
    )
    sum_launch = Launch(
        kernel=whole.name,
        grid=(f"{pieces} + batch.sequences", str(key_heads)),
        arguments=(*draft.tensor(keys.name), sums, piece, *text.SEQ),
    )
    short = int(alike_keys.short)
    draft.steps.append(
        Step(
            title=f"compare: {level}",
            needs=node.inputs,
            makes=(node.name,),
            sizes=(
                *(summed if op.centred else ()),
                (
                    length,
                    f"({k}.shape[1] + {op.stride - 1}) // {op.stride} + batch.packed * batch.sequences",
                ),
                (count, f"{short} if batch.packed else {length}"),
                (entries, f"{k}.shape[0] * {length}"),
                (blocks, together.blocks_of(op.block)),
            ),
            buffers=(
                *((sum_buffer,) if op.centred else ()),
                Buffer(name=of_keys, dtype="i32", dims=(str(key_heads), entries), role="level"),
                Buffer(name=of_rows, dtype="i32", dims=(blocks, str(row_heads)), role="level"),
            ),
            launches=(
                *((sum_launch,) if op.centred else ()),
                Launch(
                    kernel=alike_keys.name,
                    grid=(f"{entries} + batch.sequences", str(key_heads)),
                    arguments=(
                        *draft.tensor(keys.name),
                        *((sums, piece) if op.centred else ()),
                        of_keys,
                        count,
                        entries,
                        *text.SEQ,
                    ),
                ),
                Launch(
                    kernel=alike_rows.name,
                    grid=(f"{blocks} + batch.sequences", str(row_heads)),
                    arguments=(*draft.tensor(query.name), of_rows, *text.SEQ),
                ),
            ),
        )
    )
