"""Tiles of a tensor as the tensor memory accelerator of Hopper is told of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NVMMASharedLayout: Any = None
TensorDescriptor: Any = None
try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # an older Triton, for which no kernel is written that takes any
    pass

SWIZZLED = 128  # bytes of a row of shared memory


def tile_of(x: Tensor, rows: int, columns: int, heads: int = 1) -> Any:
    """Tiles of `rows` by `columns`, of one head or more.

    Args:
        x: [B, S, H, D], or [B, S, D] of one head; 16-byte aligned, and so its strides.
        rows: tokens a tile.
        columns: channels a tile.
        heads: of H that are next to each other.
    """
    if x.ndim == 3:
        x = x.unsqueeze(2)
    if not x.numel():  # no tile of it is ever fetched
        x = x.new_zeros((1, 1, heads, columns))
    layout = _layout(columns, x.element_size())
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, heads, columns], layout)


def type_of(dtype: str, rows: int, columns: int, heads: int) -> str:
    """The type of such a parameter as Triton writes it; `dtype` as Triton does: bf16, fp16, fp8e4nv."""
    size = 1 if dtype.startswith("fp8") else 2
    return f"tensordesc<{dtype}[1, {rows}, {heads}, {columns}],{_layout(columns, size)!r}>"


@cache
def _layout(columns: int, size: int) -> Any:
    """Rows of 128 bytes, swizzled, as dots read them."""
    width = min(SWIZZLED, columns * size)
    return NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * size, rank=4)
