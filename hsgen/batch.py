"""Batch: where every sequence of a call lies, as one int32 table on the device.

Never waits for the device: lengths that are tensors stay tensors.  Checks nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from hsgen import tiling
from hsgen.target import Target

Q_START, Q_FIRST, Q_LEN, Q_OFFSET, K_FIRST, K_LEN = range(6)  # columns of Batch.table

CACHED = 512  # batches of equal sequences


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The sequences of one call.

    Attributes:
        table: i32[Z, 6], a row a sequence: q_start, q_first, q_len, q_offset, k_first, k_len.
            q_start counts the rows of all sequences before; q_first and k_first are row indices
            inside the tensors that are addressed; q_offset is the position of the first query.
        sequences: Z.
        rows: query rows of all sequences.
        keys: no sequence has more keys.
        packed: the sequences share one [1, total, H, D] tensor.
        from_start: it is known that no sequence has a query before its position 0 or behind a prefix.
    """

    table: Tensor
    sequences: int
    rows: int
    keys: int
    packed: bool
    from_start: bool = False

    @property
    def sizes(self) -> tuple[int, bool]:
        """What a driver decides by, beside shapes."""
        return self.keys, self.from_start

    @property
    def squares(self) -> int:
        """Squares from 1 to `keys`: no fewer than there are greater powers."""
        return math.isqrt(self.keys)

    @property
    def processors(self) -> int:
        """The GPU's, of which each runs one program of a kernel that streams keys.

        Interpreted programs run one after the other: few of them, with several tiles each.
        """
        return _processors(self.table.device)

    def laid(self, table: Tensor, rows: int, keys: int) -> Batch:
        """The same sequences where their tokens lie in another order, of which a driver made the table."""
        return replace(self, table=table, rows=rows, keys=keys)

    def tile_of(self, x: Tensor, rows: int, columns: int, heads: int = 1) -> object:
        """As `tiling.tile_of`, for drivers."""
        return tiling.tile_of(x, rows, columns, heads)


@cache
def _processors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else Target.current(device.index).sms


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paged(Batch):
    """Sequences whose keys lie in pages.

    Attributes:
        pages: i32[Z, M], where each page of a sequence is among all.
        page_rows: rows of a tensor of keys from one page to the next.
        pool: pages that there are.
    """

    pages: Tensor
    page_rows: int
    pool: int


def dense(
    batch: int,
    tokens: int,
    keys: int,
    device: torch.device,
    *,
    q_offset: int | Tensor | None = None,
    kv_lens: int | Tensor | None = None,
) -> Batch:
    """Queries [B, T, ...] on keys [B, S, ...], the last query on the last key by default.

    Args:
        batch: B.
        tokens: T.
        keys: S.
        device: where the table lives.
        q_offset: position of query row 0, for all sequences or i32[B]; default k_len - T.
        kv_lens: k_len, the keys that exist, for all sequences or i32[B]; default S.
    """
    length = keys if kv_lens is None or isinstance(kv_lens, Tensor) else kv_lens
    offset = length - tokens if q_offset is None or isinstance(q_offset, Tensor) else q_offset
    equal = _equal_sequences(batch, tokens, offset, length, device)
    if not isinstance(kv_lens, Tensor) and not isinstance(q_offset, Tensor):
        return equal
    equal, table = replace(equal, from_start=False), equal.table.clone()
    if isinstance(kv_lens, Tensor):
        table[:, K_LEN] = kv_lens
    if isinstance(q_offset, Tensor):
        table[:, Q_OFFSET] = q_offset
    elif q_offset is None:
        torch.sub(table[:, K_LEN], tokens, out=table[:, Q_OFFSET])
    return replace(equal, table=table)


def packed(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: int,
    keys: int,
    *,
    max_seqlen_k: int | None = None,
    q_offset: int | Tensor | None = None,
    kv_lens: int | Tensor | None = None,
) -> Batch:
    """Documents one after the other in [total, H, D]; each is a sequence of its own.

    Args:
        cu_seqlens_q: i32[Z + 1], where each document's queries start, and their total.
        cu_seqlens_k: i32[Z + 1], the same of keys.
        rows: total of queries.
        keys: total of keys.
        max_seqlen_k: no document has more keys; smaller grids and scratch if it is known.
        q_offset: position of each document's first query, one int or i32[Z]; default k_len - q_len.
        kv_lens: keys that exist of each document, one int or i32[Z]; default all.
    """
    q_first, k_first = cu_seqlens_q[:-1], cu_seqlens_k[:-1]
    q_len = cu_seqlens_q[1:] - q_first
    k_len = _column(kv_lens, q_first)
    if k_len is None:
        k_len = cu_seqlens_k[1:] - k_first
    offset = _column(q_offset, q_first)
    if offset is None:
        offset = k_len - q_len
    table = torch.stack((q_first, q_first, q_len, offset, k_first, k_len), 1)
    alike = cu_seqlens_q is cu_seqlens_k and kv_lens is None
    from_start = alike if q_offset is None else isinstance(q_offset, int) and q_offset == 0
    longest = keys if max_seqlen_k is None else min(keys, max_seqlen_k)
    return Batch(
        table=table,
        sequences=len(q_first),
        rows=rows,
        keys=longest,
        packed=True,
        from_start=from_start,
    )


def _column(value: int | Tensor | None, like: Tensor) -> Tensor | None:
    """An i32[Z] column of one value for every sequence, or of one each."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.expand_as(like)
    return torch.full_like(like, value)


_batches: dict[tuple[object, ...], Batch] = {}  # oldest first
_batches_lock = Lock()


def _equal_sequences(
    batch: int, tokens: int, offset: int, length: int, device: torch.device
) -> Batch:
    """The Batch of sequences that are all alike, built once per stream.

    A table is read only on the stream that wrote it, so nothing need wait.  A graph capture does
    not read the cache, as replays would outlive an entry, nor fill it, as nothing has run yet.
    """
    stream = 0
    if device.type == "cuda":
        if device == torch.device("cuda"):  # the current one, which is another one later
            device = torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_current_stream_capturing():
            return _new_batch(batch, tokens, offset, length, device)
        # its number alone, of which torch.cuda.current_stream makes an object
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # pyright: ignore[reportPrivateUsage]
    key = (batch, tokens, offset, length, device, stream)
    found = _batches.get(key)
    if found is None:
        found = _new_batch(batch, tokens, offset, length, device)
        with _batches_lock:
            if len(_batches) >= CACHED:
                _batches.pop(next(iter(_batches)), None)
            _batches[key] = found
    return found


def _new_batch(batch: int, tokens: int, offset: int, length: int, device: torch.device) -> Batch:
    table = _fill_table(batch, tokens, offset, length, device)
    return Batch(
        table=table,
        sequences=batch,
        rows=batch * tokens,
        keys=length,
        packed=False,
        from_start=offset == 0,
    )


def _fill_table(batch: int, tokens: int, offset: int, length: int, device: torch.device) -> Tensor:
    """Fill on the device, without a copy from the host.  -> i32[B, 6]"""
    table = torch.zeros(batch, 6, dtype=torch.int32, device=device)
    if batch > 1:
        table[:, Q_START] = torch.arange(batch, dtype=torch.int32, device=device) * tokens
    table[:, Q_LEN].fill_(tokens)
    table[:, Q_OFFSET].fill_(offset)
    table[:, K_LEN].fill_(length)
    return table
