"""Dense attention by PyTorch's own kernels, for the calls that these can do; the rest is left to ours.

Decides by what the host knows, never waits for the device, and gives no log-sum-exp.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DEVICES = ("cuda",)  # CPU tensors run the reference
DTYPES = (torch.float16, torch.bfloat16)
LONGEST_HEAD = 256
FASTEST = [  # first
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str,
    causal: bool,
    scale: float | None,
    first: int | None,
    length: int | None,
) -> Tensor | None:
    """Attend to every visible token.

    Equal sequences only, and with causality only the mask of a square, or none for a single row:
    PyTorch aligns others at the top left, or keeps them in memory.

    Args:
        q: [B, T, Hq, D], or by `layout`.
        k: [B, S, Hkv, D].
        v: [B, S, Hkv, D].
        layout: "bthd" or "bhtd".
        causal: No row sees a token after its own.
        scale: Of logits; None is 1/sqrt(D).
        first: Position of row 0; None puts the last row on the last key.
        length: Keys that exist; None is S.

    Returns:
        o, in the layout of q; None where PyTorch cannot do it, or not fast.
    """
    if not _supported(q, k, v):
        return None
    if layout == "bthd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    if length is not None:
        keys = min(keys, length)
    if causal and first is not None:
        if first + rows > keys:
            return None  # rows after the last key
        keys = first + rows
    if rows == 0 or keys == 0 or (causal and rows not in (1, keys)):
        return None
    if keys < k.shape[2]:
        k, v = k[:, :, :keys], v[:, :, :keys]
    # asking for an order costs the host more than a single row costs the card
    with nullcontext() if rows == 1 else sdpa_kernel(FASTEST, set_priority=True):
        o = scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=causal and rows > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return o.transpose(1, 2) if layout == "bthd" else o


def _supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels are there for such tensors, and none would be converted."""
    return (
        q.device.type in DEVICES
        and q.dtype in DTYPES
        and q.ndim == k.ndim == v.ndim == 4
        and q.shape[-1] == v.shape[-1] <= LONGEST_HEAD
        and q.shape[-1] % 8 == 0
        and not torch.is_autocast_enabled(q.device.type)
    )
