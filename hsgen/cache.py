"""Cache: keys, values and the pooled entries of every level, of sequences that grow.

Lengths are a tensor on the device, so nothing waits for it and a CUDA graph may be replayed as they grow.
What is pooled follows from a length alone: a cache that is cut off is as if the rest had never been there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hsgen.arguments import SHORT_NAMES
from hsgen.batch import Batch, Paged
from hsgen.errors import ArgumentError
from hsgen.spec import Spec
from hsgen.storage import Storage

FEW = 8  # rows of a sequence that a step may have


class Writer(Protocol):
    """What appends: kernels of the cache's spec."""

    def append(
        self, cache: Cache, tensors: Mapping[str, Tensor | None], new_lens: Tensor | None
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """All that kernels depend on of a cache."""

    batch: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    page: int = 0  # tokens of a page; 0: a sequence lies in one piece

    @property
    def pages(self) -> int:
        """Most pages of a sequence."""
        return -(-self.capacity // self.page) if self.page else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pages:
    """Pages by tensor, [N, page, H, D] of any strides, and where those of each sequence are.

    Attributes:
        tensors: by name.
        block_table: i32[B, M].
    """

    tensors: Mapping[str, Tensor]
    block_table: Tensor


class Cache:
    """What `Kernel.new_cache` makes.

    Attributes:
        spec: whose it is, heads and head dims bound.
        storage: what is kept of each token.
        shape: sequences, their capacity in tokens, dtype and device.
        lengths: i32[B], tokens of each sequence, on the device.
        tensors: by name [B, capacity, ...] of the caller's tensors, or pages [N, page, ...] of all
            sequences, and of levels the entries [B, N, heads, width].
        block_table: i32[B, M], where the pages of each sequence are; None without pages.  Whoever hands
            out pages writes it, before tokens need them.
    """

    def __init__(
        self,
        spec: Spec,
        storage: Storage,
        shape: Shape,
        writer: Writer,
        pages: Pages | None = None,
    ) -> None:
        self.spec = spec
        self.digest = spec.digest
        self.storage = storage
        self.shape = shape
        self.tensors = _streams(storage, shape) if pages is None else _given(storage, shape, pages)
        self.tensors |= _levels(storage, shape)
        self._names = tuple(self.tensors)
        self.block_table = _table(shape, pages)
        zeros = torch.zeros(shape.batch, 6, dtype=torch.int32, device=shape.device)
        self.lengths = torch.zeros_like(zeros[:, 0])
        self._table = zeros
        self._writer = writer
        self._most = 0  # no sequence is longer, as far as the host knows
        few = torch.arange(FEW + 1, dtype=torch.int32, device=shape.device)
        room = -(-shape.batch // 4) * 4  # each begins at 16 bytes, as other tensors do
        self._few = few[:, None].expand(-1, room).contiguous()[:, : shape.batch].unbind()

    # --- what is in it

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """By tensor, what a token takes: of a level its part of an entry."""
        size = self.shape.dtype.itemsize
        kept = (*self.storage.streams, *self.storage.levels)
        return {each.name: each.numbers * size for each in kept}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, whether they are in use or not."""
        return sum(each.nbytes for each in self.tensors.values())

    def __repr__(self) -> str:
        shape = self.shape
        dtype = SHORT_NAMES[shape.dtype]
        total = sum(self.bytes_per_token.values())
        return (
            f"Cache({self.spec.name}: {shape.batch} sequences of {shape.capacity} tokens, {dtype}, "
            f"{shape.device}, {total:g} bytes a token)"
        )

    # --- growing and shrinking

    def append(
        self,
        k: Tensor,
        v: Tensor | None = None,
        *,
        new_lens: Tensor | None = None,
        **tensors: Tensor,
    ) -> None:
        """Put tokens behind those that are there; nothing attends.

        Args:
            k: [B, T, Hkv, Dqk], for any T.
            v: [B, T, Hkv, Dv].
            new_lens: i32[B], how many of the T are there; default all.
            **tensors: what else the spec keeps of tokens, and what its pools have learned.

        Raises:
            ArgumentError: argument, expected and got; no room.
        """
        self._writer.append(self, {"k": k, "v": v, **tensors}, new_lens)

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget what comes after so many tokens, of all sequences or i32[B]; shorter ones stay."""
        if isinstance(lengths, Tensor):
            self._check_lens("lengths", lengths)
            torch.minimum(self.lengths, lengths.clamp(min=0), out=self.lengths)
            return
        if isinstance(lengths, bool) or not isinstance(lengths, int) or lengths < 0:
            raise ArgumentError(
                f"lengths: expected an int of at least 0 or int32 [B], got {lengths!r}"
            )
        self.lengths.clamp_(max=lengths)
        self._most = min(self._most, lengths)

    def resume(self, lengths: Tensor) -> None:
        """Take it that so many tokens, i32[B], of each sequence are there: in pages that another cache
        filled, and with entries that the caller puts into `tensors`.
        """
        self._check_lens("lengths", lengths)
        self.lengths.copy_(lengths)
        self._most = 0  # kernels leave out what finds no room

    def fork(self, sequences: Tensor, block_table: Tensor | None = None) -> Cache:
        """A cache whose sequence i goes on from this one's `sequences[i]`.

        Args:
            sequences: int64[any].
            block_table: i32[any, M], a must where there are pages: pages of the prefix may be shared, but
                the one that the next token goes to has to be each sequence's own.  Entries are copied.
        """
        if sequences.ndim != 1 or sequences.dtype != torch.int64:
            raise ArgumentError(
                f"sequences: expected int64 [any], got {sequences.dtype} {list(sequences.shape)}"
            )
        shape = Shape(
            batch=len(sequences),
            capacity=self.shape.capacity,
            dtype=self.shape.dtype,
            device=self.shape.device,
            page=self.shape.page,
        )
        shared = [x.name for x in self.storage.streams] if self.shape.page else []
        pages = None
        if self.shape.page:
            if block_table is None:
                raise ArgumentError(
                    "block_table: expected where the pages of each fork are, got none",
                    help="`block_table=`; what forks share, they must not write to",
                )
            pages = Pages(tensors={n: self.tensors[n] for n in shared}, block_table=block_table)
        made = Cache(self.spec, self.storage, shape, self._writer, pages)
        for name in self.tensors.keys() - set(shared):
            torch.index_select(self.tensors[name], 0, sequences, out=made.tensors[name])
        torch.index_select(self.lengths, 0, sequences, out=made.lengths)
        made._most = self._most
        return made

    # --- for those who write

    def batch(self, tokens: int) -> Batch:
        """Where the sequences of a call of so many tokens lie; its table is filled on the device."""
        shape = self.shape
        where = {
            "table": self._table,
            "sequences": shape.batch,
            "rows": shape.batch * tokens,
            "keys": shape.capacity,
            "packed": False,
        }
        if self.block_table is None:
            return Batch(**where)
        first = self.tensors[self.storage.streams[0].name]
        return Paged(
            **where,
            pages=self.block_table,
            page_rows=first.stride(0) // first.stride(1),
            pool=first.shape[0],
        )

    @property
    def kept(self) -> list[Tensor]:
        """All that a call reads and writes: tensors and lengths."""
        return [*map(self.tensors.__getitem__, self._names), self.lengths]

    @property
    def addressed(self) -> tuple[Tensor, ...]:
        """Tensors of such a batch."""
        return (self._table,) if self.block_table is None else (self._table, self.block_table)

    def whole(self, name: str, sequences: slice = slice(None)) -> Tensor:
        """A stream as [B, capacity, ...], of some sequences: pages put together."""
        if self.block_table is None:
            return self.tensors[name][sequences]
        found = self.tensors[name][self.block_table[sequences].long()].flatten(1, 2)
        return found[:, : self.shape.capacity]

    def put(self, name: str, z: int, first: int, rows: Tensor) -> None:
        """Rows of one sequence to their places, one by one."""
        kept, page = self.tensors[name], self.shape.page
        for i, row in enumerate(rows):
            place = first + i
            if self.block_table is None:
                kept[z, place] = row
            else:
                kept[self.block_table[z, place // page], place % page] = row

    def check_pages(self) -> None:
        """The numbers of pages that are in use, and of the next; waits for the device.

        Raises:
            ArgumentError: one that is not there.
        """
        if self.block_table is None:
            return
        pool = self.tensors[self.storage.streams[0].name].shape[0]
        lengths = self.lengths.tolist()
        for z, (row, length) in enumerate(zip(self.block_table.tolist(), lengths, strict=True)):
            for i, number in enumerate(row[: length // self.shape.page + 1]):
                if not 0 <= number < pool:
                    raise ArgumentError(
                        f"block_table[{z}, {i}]: expected one of {pool} pages, got {number}"
                    )

    def new(self, tokens: int, new_lens: Tensor | None) -> Tensor:
        """How many tokens come to each sequence.  -> i32[B]"""
        if new_lens is not None:
            return new_lens
        return self._few[tokens] if tokens <= FEW else torch.full_like(self.lengths, tokens)

    def reserve(self, tokens: int) -> None:
        """Count on so many more tokens.

        A replayed graph is not counted; what then finds no room is left out by the kernels.

        Raises:
            ArgumentError: some sequence has no room for them.
        """
        if self.lengths.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._most + tokens > self.shape.capacity:
            self._most = int(self.lengths.max())  # a bound was too high, or there is no room
        if self._most + tokens > self.shape.capacity:
            raise ArgumentError(
                f"cache: no room for {tokens} more tokens, as a sequence has {self._most} of "
                f"{self.shape.capacity}",
                help="new_cache with a greater capacity, or truncate",
            )
        self._most += tokens

    def _check_lens(self, name: str, value: Tensor) -> None:
        wanted = self.lengths
        if (
            value.shape != wanted.shape
            or value.dtype != wanted.dtype
            or value.device != wanted.device
        ):
            raise ArgumentError(
                f"{name}: expected [{len(wanted)}] int32 {wanted.device}, got {list(value.shape)} "
                f"{SHORT_NAMES.get(value.dtype, value.dtype)} {value.device}"
            )

    def check_new_lens(self, new_lens: Tensor | None) -> None:
        """Shape, dtype, device and stride; no values: more than T count as T."""
        if new_lens is None:
            return
        if not isinstance(new_lens, Tensor):
            raise ArgumentError(f"new_lens: expected a tensor, got {type(new_lens).__name__}")
        self._check_lens("new_lens", new_lens)
        if not new_lens.is_contiguous():
            raise ArgumentError(f"new_lens: expected stride 1, got {new_lens.stride(0)}")


def _streams(storage: Storage, shape: Shape) -> dict[str, Tensor]:
    """Room for all tokens.  A head's lie side by side, so that a block of them is one piece; those of a page
    lie as they come, so that from one page to the next there are as many rows in every tensor.
    """
    made: dict[str, Tensor] = {}
    options = {"dtype": shape.dtype, "device": shape.device}
    for stream in storage.streams:
        *heads, dim = stream.dims
        if shape.page:
            pool = (shape.batch * shape.pages, shape.page)
            made[stream.name] = torch.zeros(*pool, *stream.dims, **options)
        else:
            room = torch.zeros(shape.batch, *heads, shape.capacity, dim, **options)
            made[stream.name] = room.movedim(-2, 1)
    return made


def _levels(storage: Storage, shape: Shape) -> dict[str, Tensor]:
    """Room for all entries, sequence by sequence."""
    made: dict[str, Tensor] = {}
    for level in storage.levels:
        dims = (shape.batch, max(1, shape.capacity // level.stride), level.heads, level.width)
        made[level.name] = torch.zeros(dims, dtype=shape.dtype, device=shape.device)
    return made


def _given(storage: Storage, shape: Shape, pages: Pages) -> dict[str, Tensor]:
    """A caller's pages, looked at once."""
    names = [stream.name for stream in storage.streams]
    if set(pages.tensors) != set(names):
        got = ", ".join(sorted(pages.tensors)) or "none"
        raise ArgumentError(f"pages: expected those of {', '.join(names)}, got {got}")
    first = pages.tensors[names[0]]
    for stream in storage.streams:
        x = pages.tensors[stream.name]
        wanted = (first.shape[0], shape.page, *stream.dims)
        if tuple(x.shape) != wanted or (x.dtype, x.device) != (shape.dtype, shape.device):
            raise ArgumentError(
                f"pages[{stream.name!r}]: expected {list(wanted)} {SHORT_NAMES[shape.dtype]} {shape.device}, "
                f"got {list(x.shape)} {SHORT_NAMES.get(x.dtype, x.dtype)} {x.device}"
            )
        step, rest = divmod(x.stride(0), x.stride(1))
        if x.stride(-1) != 1 or rest or step != first.stride(0) // first.stride(1):
            raise ArgumentError(
                f"pages[{stream.name!r}]: expected stride 1 in the last dimension, and as many rows from one "
                f"page to the next as in {names[0]!r}, got strides {x.stride()}"
            )
    return {name: pages.tensors[name] for name in names}


def _table(shape: Shape, pages: Pages | None) -> Tensor | None:
    """Where pages are: the caller's, or one behind the other."""
    if not shape.page:
        return None
    wanted = (shape.batch, shape.pages)
    if pages is None:
        numbers = torch.arange(shape.batch * shape.pages, dtype=torch.int32, device=shape.device)
        return numbers.view(wanted)
    table = pages.block_table
    fits = tuple(table.shape) == wanted and table.stride(-1) == 1
    if not fits or table.dtype != torch.int32 or table.device != shape.device:
        raise ArgumentError(
            f"block_table: expected {list(wanted)} int32 {shape.device}, got {list(table.shape)} "
            f"{SHORT_NAMES.get(table.dtype, table.dtype)} {table.device}"
        )
    return table
