"""Pieces of loops whose keys and values one warp streams into shared memory, in Gluon (Hopper)."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)


@gluon.jit
def load_packed(base, token, t_stride, head, h_stride, mask, columns):
    """Rows of packed (token, head) pairs: token, head, mask: [M] -> [M, columns], 0 where masked."""
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    return gl.load(base + row[:, None] + columns[None, :], mask=mask[:, None], other=0.0)


@gluon.constexpr_function
def lines(width, dtype):
    """How 64 rows are laid out to be written: as a dot leaves them, but 16 bytes a thread."""
    registers, threads = [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16]]
    if dtype.primitive_bitwidth == 32:
        registers, threads = [[0, 1], [0, 2], [8, 0], [0, 16]], [[0, 8], [0, 4]]
    registers += [[0, 1 << bit] for bit in range(5, width.bit_length() - 1)]
    threads += [[1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, threads, warps, [], [64, width])


@gluon.jit
def laid_out_as(other, x):
    """x: [64, columns], laid out as another is: one as a dot leaves it, the other in lines.

    The four threads that have a row exchange it, first by pairs: two such steps are made by shuffles,
    where one for both would go through shared memory.
    """
    x = gl.convert_layout(x, lines(x.shape[1], gl.float32))
    return gl.convert_layout(x, other.type.layout)


@gluon.jit
def store_packed(base, token, t_stride, head, h_stride, mask, x, columns):
    """Rows x: [M, columns] to their (token, head) pairs, in the tensor's own precision."""
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    address = base + row[:, None] + columns[None, :]
    x = laid_out_as(address, x.to(base.dtype.element_ty))
    gl.store(address, x, mask=mask[:, None])


@gluon.jit
def add_packed(base, token, t_stride, head, h_stride, mask, x, columns):
    """As store_packed, of x and what is there, added in float32.  No other program has these rows."""
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    address = base + row[:, None] + columns[None, :]
    before = gl.load(address, mask=mask[:, None], other=0.0)
    x = laid_out_as(x, before).to(tl.float32) + x
    x = laid_out_as(address, x.to(base.dtype.element_ty))
    gl.store(address, x, mask=mask[:, None])


@gluon.jit
def bring(tensor, sequence, row, head, column: gl.constexpr, full, buffer, slot):
    """A tile into its slot; `full` counts its bytes."""
    place = [sequence, row, head, column]
    tma.async_copy_global_to_shared(tensor, place, full.index(slot), buffer.index(slot))


@gluon.constexpr_function
def room_for_queries(dims, keys, value_dims):
    """Whether registers have room for 64 rows' queries beside their scores, weights and sums."""
    return dims // 4 + keys // 2 + keys // 4 + value_dims // 2 <= 208


@gluon.jit
def held(q, layout: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """Queries as dots take them: from registers, so that shared memory gives keys only, or as they lie."""
    if IN_REGISTERS:
        rows = q.load(gl.DotOperandLayout(0, layout, 2))
    else:
        rows = q
    return rows


@gluon.jit
def dot_keys(q, tile, s, ADD: gl.constexpr):
    """Begins s + q . keys, or q . keys.  q: [M, D], tile: [1, N, 1, D], s: [M, N]"""
    keys = tile.reshape([tile.shape[1], tile.shape[3]]).permute((1, 0))
    return warpgroup_mma(q, keys, s, use_acc=ADD, is_async=True)


@gluon.jit
def dot_queries(tile, q, s, ADD: gl.constexpr):
    """Begins s + keys . q, or keys . q.  tile: [1, N, 1, D], q: [M, D], s: [N, M]"""
    keys = tile.reshape([tile.shape[1], tile.shape[3]])
    return warpgroup_mma(keys, q.permute((1, 0)), s, use_acc=ADD, is_async=True)


@gluon.jit
def dot_values(p, tile, total):
    """Begins total + p . values.  p: [M, N], tile: [1, N, 1, D], total: [M, D]"""
    values = tile.reshape([tile.shape[1], tile.shape[3]])
    return warpgroup_mma(p, values, total, is_async=True)


@gluon.jit
def gather(buffer, base, row, column: gl.constexpr, inside, layout: gl.constexpr):
    """Begins to copy columns of rows that lie `row: [N]` behind base; 0 where not inside: [N].

    Rows begin at 16 bytes, which is what a thread copies; strides do not say it of themselves.
    """
    columns = column + gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, layout))
    address = gl.multiple_of(base + row[:, None] + columns[None, :], [1, 16])
    async_copy.async_copy_global_to_shared(buffer, address, mask=inside[:, None])


@gluon.jit
def dot_latents(q, tile, s, ADD: gl.constexpr):
    """Begins s + q . keys, or q . keys.  q: [M, D], tile: [N, D], s: [M, N]"""
    return warpgroup_mma(q, tile.permute((1, 0)), s, use_acc=ADD, is_async=True)


@gluon.jit
def dot_gathered(p, tile, total):
    """Begins total + p . values.  p: [M, N], tile: [N, D], total: [M, D]"""
    return warpgroup_mma(p, tile, total, is_async=True)


@gluon.jit
def give_keys(weights, rows, total, ADD: gl.constexpr):
    """Begins total + weights' . rows, or weights' . rows.  weights: [M, N], rows: [M, D], total: [N, D]"""
    return warpgroup_mma(weights.permute((1, 0)), rows, total, use_acc=ADD, is_async=True)


@gluon.jit
def leave(base, row, STRIDE: gl.constexpr, x, columns):
    """Rows x: [N, columns] to rows of a scratch that has room for all of them, in its precision."""
    address = base + row.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    gl.store(address, laid_out_as(address, x.to(base.dtype.element_ty)))


@gluon.jit
def give(weights_to, weights, rescale_to, rescale, full, free, given):
    """Weights [M, N] of a step to the other group, and what its sums are to be rescaled by: [M]."""
    mbarrier.wait(free, (given & 1) ^ 1)
    weights_to.store(weights)
    rescale_to.store(rescale)
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def by_rows(x, factor):
    """x: [M, D], times factor: [M]"""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def pass_over(full, free, slot, phase):
    """A tile that these rows do not want: the stream may go on once it is there."""
    mbarrier.wait(full.index(slot), phase)
    mbarrier.arrive(free.index(slot), count=1)


@gluon.jit
def clear_rows(tile, first, stop, layout: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """0 in the rows of a tile that lie at `stop` or behind: tile: [1, ROWS, 1, WIDTH], first: its row 0.

    Their weights are 0, and 0 times what is no number would be none.  Groups that both do so write the same.
    """
    if first + ROWS > stop:
        for r in gl.static_range(0, ROWS, 16):
            part = tile.reshape([ROWS, WIDTH]).slice(r, 16, dim=0)
            row = first + r + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
            x = part.load(layout)
            part.store(gl.where((row < stop)[:, None], x, gl.zeros_like(x)))
        fence_async_shared()


@gluon.jit
def clear_outside(
    tile,
    first,
    stop,
    layout: gl.constexpr,
    TOKENS: gl.constexpr,
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """As clear_rows, of tokens before 0, and at `stop` or behind.  tile: [1, TOKENS, HEADS, WIDTH]"""
    if (first < 0) | (first + TOKENS > stop):
        for r in gl.static_range(0, TOKENS * HEADS, 16):
            part = tile.reshape([TOKENS * HEADS, WIDTH]).slice(r, 16, dim=0)
            token = first + (r + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))) // HEADS
            there = (token >= 0) & (token < stop)
            x = part.load(layout)
            part.store(gl.where(there[:, None], x, gl.zeros_like(x)))
        fence_async_shared()


@gluon.constexpr_function
def bits_of(first, end):
    """Bits first to end - 1 of a word of 32, as a signed number; those of words beside it are not its."""
    first, end = max(first, 0), min(end, 32)
    bits = (1 << end) - (1 << first) if first < end else 0
    return bits - (1 << 32) if bits >> 31 else bits


@gluon.jit
def own_of(words, there, FIRST: gl.constexpr, END: gl.constexpr):
    """What is not 0 where one of the tokens FIRST to END - 1 of a tile chose a step, by its member words."""
    found = gl.load(words + FIRST // 32, mask=there, other=0) & bits_of(
        FIRST % 32, END - FIRST // 32 * 32
    )
    for w in gl.static_range(FIRST // 32 + 1, (END + 31) // 32):
        found |= gl.load(words + w, mask=there, other=0) & bits_of(0, END - w * 32)
    return found


@gluon.jit
def bring_token(
    tensor, sequence, token, head, column: gl.constexpr, full, buffer, slot, PLACE: gl.constexpr
):
    """One token's heads to their place in a tile; `full` counts their bytes.  A token of -1: 0."""
    place = [sequence, token, head, column]
    part = buffer.index(slot).slice(PLACE, 1, dim=1)
    tma.async_copy_global_to_shared(tensor, place, full.index(slot), part)


@gluon.jit
def keys_held(
    base, row, mask, stride, COLUMN: gl.constexpr, load: gl.constexpr, held: gl.constexpr
):
    """Rows of keys as dots take them from registers: row, mask: [N] -> [N, 64], 0 where masked."""
    columns = COLUMN + gl.arange(0, 64, layout=gl.SliceLayout(0, load))
    address = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    return gl.convert_layout(gl.load(address, mask=mask[:, None], other=0.0), held)


@gluon.jit
def dot_rows(keys, tile, s, ADD: gl.constexpr):
    """Begins s + keys . rows, or keys . rows.  keys: [N, D], tile: [1, T, H, D], s: [N, T * H]"""
    rows = tile.reshape([tile.shape[1] * tile.shape[2], tile.shape[3]])
    return warpgroup_mma(keys, rows.permute((1, 0)), s, use_acc=ADD, is_async=True)


@gluon.jit
def add_rows_of(weights, tile, total):
    """Begins total + weights . rows.  weights: [N, T * H], tile: [1, T, H, D], total: [N, D]"""
    rows = tile.reshape([tile.shape[1] * tile.shape[2], tile.shape[3]])
    return warpgroup_mma(weights, rows, total, is_async=True)


@gluon.jit
def store_keys(base, row, mask, stride, x, columns):
    """Rows of keys x: [N, columns], in the tensor's own precision.  row, mask: [N]"""
    address = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    x = laid_out_as(address, x.to(base.dtype.element_ty))
    gl.store(address, x, mask=mask[:, None])


@gluon.jit
def add_keys(base, row, mask, stride, x, columns):
    """As store_keys, of x and what is there, added in float32.  No other program has these rows."""
    address = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    before = gl.load(address, mask=mask[:, None], other=0.0)
    x = laid_out_as(x, before).to(tl.float32) + x
    x = laid_out_as(address, x.to(base.dtype.element_ty))
    gl.store(address, x, mask=mask[:, None])


@gluon.jit
def parents_at(lists, place, there, WIDTH: gl.constexpr):
    """What stands at a place of each list, which ends with -1 or is full: the greatest number behind it."""
    parent = gl.load(lists + place, mask=there & (place < WIDTH), other=-1)
    return gl.where(parent < 0, 0x7FFFFFFF, parent)
