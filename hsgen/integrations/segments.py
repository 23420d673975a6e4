"""What transformers' mask functions say, as numbers of documents: which rows of a batch are whose.

A mask function that is registered for an attention says how its layers are masked.  Ours puts that into
i32[B, S]: the number of a token's document, from 1; PADDING; ABSENT where a static cache has no token yet.
None means that every token is there and is of one document.  Masks of other kinds are bool[B, 1 or H, T, S],
as scaled_dot_product_attention takes them.  A copy without the numbers of documents, but of what is 0, still
says what is padding, as transformers takes such a tensor for a padding mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, sdpa_mask

PADDING, ABSENT = 0, -1
PROBES = 16  # columns of every row at which a mask is compared with documents

MaskFunction = Callable[..., Any]


def segments(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **others: object,
) -> Tensor | None:
    """The mask function of every registered spec, with the arguments that transformers gives such.

    Waits for the device if there is a padding mask, as the one for flash attention does.
    """
    begins = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    if mask_function is not causal_mask_function:
        if begins and attention_mask is None and not use_vmap:
            found = _documents(mask_function, batch_size, q_length, device)
            if found is not None:
                return found
        return _as_usual(
            sdpa_mask,
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            use_vmap=use_vmap,
            **{**others, "allow_is_causal_skip": False},
        )
    used = q_offset + q_length  # slots of the cache that have a token, or padding
    static = isinstance(used, Tensor) or used < kv_length
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not static and not padded:
        return None
    found = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if attention_mask is not None and padded:
        given = attention_mask[:, :kv_length]
        found[:, : given.shape[1]] = given.to(torch.int32)
    slot = torch.arange(kv_length, device=device)
    found.masked_fill_(slot >= used, ABSENT)
    found.hsgen_whole = not padded  # type: ignore[attr-defined]  # spares a look at the numbers
    return found


def _as_usual(made: Callable[..., Tensor | None], **arguments: object) -> Tensor | None:
    """What transformers' own mask function says, whose types are narrower than what it takes."""
    return made(**arguments)


def _documents(
    mask_function: MaskFunction, batch: int, tokens: int, device: torch.device | str
) -> Tensor | None:
    """Documents, if a mask is causal within them and has nothing else; else None.

    A row's document begins where a row does not see the one before it.  The rest is compared at the ends of
    each row's document, around them, and at random.
    """
    b, t = torch.arange(batch, device=device)[:, None], torch.arange(tokens, device=device)[None]
    begins = ~_asked(mask_function, b, t, (t - 1).clamp(min=0))
    begins[:, 0] = True
    start = torch.where(begins, t, 0).cummax(1).values
    drawn = torch.Generator().manual_seed(0)
    at_random = torch.randint(0, tokens, (PROBES, 1, tokens), generator=drawn).to(device)
    probes = [
        start - 1,
        start,
        (start + t) // 2,
        t.expand(batch, -1),
        t.expand(batch, -1) + 1,
        *at_random,
    ]
    for column in probes:
        s = column.clamp(0, tokens - 1).expand(batch, -1)
        expected = (s >= start) & (s <= t)
        if not torch.equal(_asked(mask_function, b, t, s), expected):
            return None
    return begins.cumsum(1).to(torch.int32)


def _asked(mask_function: MaskFunction, b: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Whether row t of sequence b sees column s.  -> bool[B, T]"""
    seen = mask_function(b, torch.zeros_like(b), t, s)
    return seen.expand(b.shape[0], t.shape[1]).clone()


# --- what is done with them


def rows_of(numbers: Tensor, tokens: int) -> Tensor:
    """The documents of the queries, which have the last slots that are there.  i32[B, S] -> i32[B, T]"""
    used = (numbers != ABSENT).any(0).sum()
    slot = used - tokens + torch.arange(tokens, device=numbers.device)
    return numbers[:, slot]


def mask(numbers: Tensor | None, batch: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """What each row sees.  -> bool[B, 1, T, S]"""
    slot = torch.arange(keys, device=device)
    if numbers is None:
        seen = slot <= slot[keys - rows :, None]
        return seen.expand(batch, 1, rows, keys)
    used = (numbers != ABSENT).any(0).sum()
    at = used - rows + torch.arange(rows, device=device)
    mine = rows_of(numbers, rows)
    alike = (mine[:, :, None] == numbers[:, None]) & (mine[:, :, None] != PADDING)
    return (alike & (slot <= at[:, None]))[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packing:
    """A batch as documents one behind the other.

    Attributes:
        rows: bool[B, T], the queries that there are.
        keys: bool[B, S].
        cu_seqlens_q: i32[Z + 1].
        cu_seqlens_k: i32[Z + 1].
        max_seqlen_k: No document has more keys.
    """

    rows: Tensor
    keys: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_k: int

    def unpacked(self, o: Tensor) -> Tensor:
        """Outputs at their places, 0 where there is padding.  [total, ...] -> [B, T, ...]"""
        wide = o.new_zeros(*self.rows.shape, *o.shape[1:])
        return wide.index_put((self.rows,), o)


def packing(numbers: Tensor, tokens: int) -> Packing:
    """Where the documents of a batch lie when padding is left out; waits for the device."""
    mine = rows_of(numbers, tokens)
    rows, keys = mine > 0, numbers > 0
    most = int(numbers.max().clamp(min=1))
    first = most * torch.arange(len(numbers), device=numbers.device)[:, None] - 1
    sizes = [
        torch.bincount((x + first)[there], minlength=most * len(numbers))
        for x, there in ((mine, rows), (numbers, keys))
    ]
    starts = [F.pad(size.cumsum(0), (1, 0)).to(torch.int32) for size in sizes]
    return Packing(
        rows=rows,
        keys=keys,
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        max_seqlen_k=int(sizes[1].max()),
    )
