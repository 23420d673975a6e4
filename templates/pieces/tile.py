"""Tiles of rows of a strided tensor whose last dimension is contiguous."""

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, stride, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [N] of one head, columns [OFFSET, OFFSET + WIDTH).  -> [N, WIDTH]"""
    columns = OFFSET + tl.arange(0, WIDTH)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :])


@triton.jit
def load_tile_masked(base, rows, mask, stride, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """As load_tile; 0 where `mask: [N]` is false, and nothing is read there."""
    columns = OFFSET + tl.arange(0, WIDTH)
    address = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(address, mask=mask[:, None], other=0.0)


@triton.jit
def store_tile(base, rows, mask, stride, x, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of load_tile_masked, bit by bit.  x: [N, WIDTH]"""
    columns = OFFSET + tl.arange(0, WIDTH)
    tl.store(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], x, mask=mask[:, None])


@triton.jit
def load_queries(
    base, token, t_stride, head, h_stride, mask, OFFSET: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows of packed (token, head) pairs: token, head, mask: [M] -> [M, WIDTH], 0 where masked."""
    columns = OFFSET + tl.arange(0, WIDTH)
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    return tl.load(base + row[:, None] + columns[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def store_outputs(
    base, token, t_stride, head, h_stride, mask, x, OFFSET: tl.constexpr, WIDTH: tl.constexpr
):
    """The inverse of load_queries.  x: [M, WIDTH]"""
    columns = OFFSET + tl.arange(0, WIDTH)
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    tl.store(
        base + row[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask[:, None]
    )


@triton.jit
def add_outputs(
    base, token, t_stride, head, h_stride, mask, x, OFFSET: tl.constexpr, WIDTH: tl.constexpr
):
    """As store_outputs, of x and what is there, added in float32.  No other program has these rows."""
    columns = OFFSET + tl.arange(0, WIDTH)
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    address = base + row[:, None] + columns[None, :]
    before = tl.load(address, mask=mask[:, None], other=0.0)
    tl.store(address, (before.to(tl.float32) + x).to(base.dtype.element_ty), mask=mask[:, None])


@triton.jit
def load_gates(base, token, t_stride, head, h_stride, mask):
    """One number a (token, head) pair: token, head, mask: [M] -> f32[M], 0 where masked."""
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    return tl.load(base + row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_gates(base, token, t_stride, head, h_stride, mask, x):
    """The inverse of load_gates.  x: [M]"""
    row = token.to(tl.int64) * t_stride + head.to(tl.int64) * h_stride
    tl.store(base + row, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(base, rows, mask, stride, x, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of load_tile_masked.  rows, mask: [N], x: [N, WIDTH]"""
    columns = OFFSET + tl.arange(0, WIDTH)
    address = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, x.to(base.dtype.element_ty), mask=mask[:, None])


@triton.jit
def add_rows(base, rows, mask, stride, x, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """As store_rows, of x and what is there, added in float32.  No other program has these rows."""
    columns = OFFSET + tl.arange(0, WIDTH)
    address = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    before = tl.load(address, mask=mask[:, None], other=0.0)
    tl.store(address, (before.to(tl.float32) + x).to(base.dtype.element_ty), mask=mask[:, None])
