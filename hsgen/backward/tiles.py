"""The tile sizes that kernels of gradients start from: what fits the GPU, and what measured best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hsgen import cols, rows
from hsgen import unpool as unpool_
from hsgen import unweigh as unweigh_
from hsgen.configs import DType
from hsgen.errors import PlanError
from hsgen.plan import Config
from hsgen.rows import RowsContext, next_power
from hsgen.target import Target

WIDE = 256  # of a key and a value: accumulators beyond fill the registers
MEASURED = 320  # of a key and a value: most that tiles of dk and dv were tried with
LATENT = 768  # of a key and a value: more are gradients that fill the registers of eight warps
SUMS = 1 << 14  # of an accumulator that four warps hold
CHUNK = 1024  # rows of a block's list that one program takes


def of_rows(
    context: RowsContext, target: Target, dtype: DType, *, most: int = 128, block: int | None = None
) -> Config:
    """dq, or delta: rows and their gradients stay, and for dq an accumulator as wide as a key."""
    dims = _dims(context.qk_chunks, context.v_chunks)
    streamed = _dims(context.qk_chunks) if context.latent else dims
    limit, wide = (64, 64 if dims <= WIDE else 32) if dtype != "fp32" else (32, 32)
    if dtype == "fp32" and dims > WIDE:
        limit = 16  # three-pass TF32 holds operands twice, in registers too
    if dims > LATENT:
        limit = min(limit, 32)
    if block and block == next_power(block):
        wide = max(16, min(wide, block))
    for count, heads in _packings(context, limit, most):
        block_m = max(16, next_power(count * heads))
        for width in _halves(wide, 16):
            for stages in (3, 2, 1) if dims > WIDE else (2, 1):
                numbers = block_m * dims + stages * width * streamed + block_m * width
                if numbers * _bytes(dtype, target) <= target.smem_per_block:
                    values = (("BLOCK_T", count), ("BLOCK_M", block_m), ("BLOCK_N", width))
                    values += (("BLOCK_H", heads),) if context.parts else ()
                    warps = 8 if dims > LATENT or block_m * _dims(context.qk_chunks) > SUMS else 4
                    return Config(constexprs=values, num_warps=warps, num_stages=stages)
    raise _too_large(context.name, target)


def of_cols(context: cols.ColsContext, target: Target, dtype: DType) -> Config:
    """dk and dv: keys, values and both accumulators stay, rows stream."""
    dims = _dims(context.qk_chunks, context.v_chunks)
    held = _dims(context.qk_chunks) if context.latent else dims
    wide, limit, deep = (32, 32, 2) if dtype == "fp32" else (128 if dims <= MEASURED else 64, 32, 3)
    if dtype == "fp32" and dims > WIDE:
        wide = 16
    if context.list_heads:
        # of lists two programs a processor pay, for all that they spill; of ranges one with wide tiles
        wide = max(16, min(wide, 64, next_power(context.size)))
        limit = 16 if dtype != "fp32" and WIDE < dims <= LATENT else limit
        deep = 2 if context.marked else deep  # dsa_gqa, 32,768 tokens: 21.7 ms, of three 23.2
    if context.together:
        # xattention, 32,768 tokens: 16.0 ms, of 128 keys 20.1; seer_attention: 13.2, by three stages 15.1
        wide = max(16, min(wide, 64, next_power(context.size)))
        deep = 2
    if dims > LATENT:
        wide = min(wide, 32)
    chunk = (("BLOCK_C", CHUNK),) if context.in_chunks else ()
    for count, heads in _packings(context, limit, limit):
        block_m = max(16, next_power(count * heads))
        for width in _halves(wide, 16):
            for stages in range(deep, 0, -1):
                numbers = width * held + stages * block_m * dims + block_m * width
                if numbers * _bytes(dtype, target) <= target.smem_per_block:
                    values = (("BLOCK_T", count), ("BLOCK_M", block_m), ("BLOCK_N", width))
                    values += (("BLOCK_H", heads),) if context.parts else ()
                    warps = 8 if width > 64 or dims > (WIDE if dtype == "fp32" else MEASURED) else 4
                    return Config(constexprs=(*chunk, *values), num_warps=warps, num_stages=stages)
    raise _too_large(context.name, target)


def of_tiles(context: cols.ColsContext, target: Target, dtype: DType) -> Config:
    """dk and dv of a tile of axes: as of lists, of rows that lie side by side."""
    config = of_cols(replace(context, heads=1, group=1), target, dtype)
    least = max(16, next_power(context.size))
    rows_, width = (min(least, config[name]) for name in ("BLOCK_M", "BLOCK_N"))
    values = (("BLOCK_T", rows_), ("BLOCK_M", rows_), ("BLOCK_N", min(64, width)))
    return replace(config, constexprs=values, num_warps=4)


def _packings(
    context: RowsContext | cols.ColsContext, limit: int, most: int
) -> Iterator[tuple[int, int]]:
    """Tokens and heads of a tile of at most `limit` rows: fewer tokens, then fewer heads of one."""
    heads = next_power(context.heads) if context.parts else context.heads
    tokens = 1 << max(1, min(most, limit // heads)).bit_length() - 1
    if not context.parts:
        yield from ((count, heads) for count in _halves(tokens, 1))
        return
    yield from ((count, heads) for count in _halves(tokens, 2))
    yield from ((1, count) for count in _halves(min(heads, limit), min(heads, 16)))


def _halves(most: int, least: int) -> tuple[int, ...]:
    """64, 32, 16."""
    return tuple(most >> i for i in range((most // least).bit_length()))


def _too_large(kernel: str, target: Target) -> PlanError:
    return PlanError(
        f"kernel {kernel} cannot run on {target.name} ({target.label}): its tiles do not fit "
        f"{target.smem_per_block:,} bytes of shared memory"
    )


def unpool(how: unpool_.How, dim: int, dtype: DType) -> Config:
    """Of the gradient of a pool: tokens or entries a program, and channels a step."""
    if how == "unpool":
        return Config(constexprs=(("BLOCK_V", 32),), num_warps=4, num_stages=1)
    tile = 32 if dtype == "fp32" else 64
    values = (("BLOCK_E", tile), ("BLOCK_D", min(tile, dim & -dim)))
    return Config(constexprs=values, num_warps=4, num_stages=2)


def unweigh(how: unweigh_.How, dim: int) -> Config:
    """Of the gradient of what gates weigh: tokens or entries a program or a step, and channels."""
    channels = ("BLOCK_D", min(64, dim & -dim))
    match how:
        case "unweigh":
            values = (("BLOCK_V", 32), channels)
        case "turns":
            values = (("BLOCK_E", 8),)
        case _:
            values = (("BLOCK_E", 32), channels)
    return Config(constexprs=values, num_warps=4, num_stages=1)


def listing(width: int) -> Config:
    """Choices that a program compares with each other at a time."""
    values = (("BLOCK_T", max(1, 64 // width)),)
    return Config(constexprs=values, num_warps=4, num_stages=1)


def before() -> Config:
    values = (("BLOCK_S", 64), ("BLOCK_N", 32))
    return Config(constexprs=values, num_warps=4, num_stages=1)


def chunks() -> Config:
    return Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)


def delta() -> Config:
    return Config(constexprs=(("BLOCK_R", 32),), num_warps=4, num_stages=1)


def one_tile() -> Config:
    return Config(constexprs=(), num_warps=4, num_stages=1)


def sums() -> Config:
    return Config(constexprs=(), num_warps=4, num_stages=1)


def take() -> Config:
    """Tiles whose places are looked at at a time, and whose parts are summed beside each other."""
    return Config(constexprs=(("BLOCK_T", 128), ("BLOCK_E", 4)), num_warps=4, num_stages=1)


def _dims(*cuts: tuple[rows.Chunk, ...]) -> int:
    return sum(c.width for cut in cuts for c in cut)


def _bytes(dtype: DType, target: Target) -> int:
    """Of a number in shared memory; three-pass TF32 holds it twice."""
    return 2 if dtype != "fp32" else 8 if target.dot_precision == "tf32x3" else 4
