"""Names and expressions of the driver, in which steps and launches are written."""

from __future__ import annotations

from hsgen import rows

SEQ = ("batch.table", "batch.sequences")
TILES = "batch.rows // {BLOCK_T} + batch.sequences"
STEP_ROWS = "batch.rows // batch.sequences"  # of a sequence, where all have as many


def tiles(context: rows.RowsContext | None = None) -> str:
    """How many tiles rows have at most; those of boxes in slabs, of which a sequence may begin within one."""
    if context is None or context.box is None:
        return TILES
    return _of_boxes(context.box, f"(({context.box.tokens} + {{BLOCK_T}} - 1) // {{BLOCK_T}})")


def tiles_of_boxes(context: rows.RowsContext, name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The same of boxes.  -> the tiles by the pieces of a box, and sizes that say how many these are"""
    assert context.box is not None, "of a branch whose rows are boxes"
    rows_, pieces = f"rows_{name}", f"pieces_{name}"
    sizes = (
        (rows_, f'config["{name}"]["BLOCK_T"]'),
        (pieces, f"({context.box.tokens} + {rows_} - 1) // {rows_}"),
    )
    return _of_boxes(context.box, pieces), sizes


def _of_boxes(box: rows.Box, pieces: str) -> str:
    return f"(batch.rows // {box.slab} + 3 * batch.sequences) * {box.across} * {pieces}"


def step_tiles(context: rows.RowsContext) -> str:
    """The same of a step: a tile has all rows of a sequence, or a program one of them."""
    if not context.alike:
        return tiles()
    return "batch.sequences * {BLOCK_T}" if context.one_token else "batch.sequences"


def tiles_of(kernel: str, tiles: str = TILES) -> str:
    """The same, outside of the kernel's own grid."""
    return tiles.replace("{BLOCK_T}", f'config["{kernel}"]["BLOCK_T"]')


def grid(shape: rows.Shape, context: rows.RowsContext, tiles: str) -> tuple[str, str]:
    """Programs of an attend: tiles by heads, where the parts of a token's heads are next to each other."""
    if context.parts:
        return f"{tiles} * parts_{context.name}", str(shape.kv_heads)
    return tiles, str(shape.query_heads // context.heads)


def parts(*contexts: rows.RowsContext) -> tuple[tuple[str, str], ...]:
    """The sizes that `grid` needs: how many programs share the heads of one token."""
    sizes: list[tuple[str, str]] = []
    for context in contexts:
        if context.parts:
            heads = f"heads_{context.name}"
            sizes.append((heads, f'config["{context.name}"]["BLOCK_H"]'))
            sizes.append((f"parts_{context.name}", f"({context.heads} + {heads} - 1) // {heads}"))
    return tuple(sizes)


def per_stride(tokens: str, stride: int) -> str:
    """How many entries begin within so many tokens."""
    return tokens if stride == 1 else f"{tokens} // {stride}"


def safe(name: str) -> str:
    return name.replace(".", "_")


def input_of(name: str) -> str:
    return f"in_{name}"


def buffer(name: str) -> str:
    """The driver's name for what a node makes; no input or size can be called so."""
    return f"made_{safe(name)}"


def strides(x: str) -> tuple[str, ...]:
    """A tensor and its strides: of batch, token and head; of a log-sum-exp of batch, head and token."""
    return x, f"0 if batch.packed else {x}.stride(0)", f"{x}.stride(1)", f"{x}.stride(2)"
