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
from hsgen.batch import Batch
from hsgen.errors import ArgumentError
from hsgen.spec import Spec
from hsgen.storage import Storage


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


class Cache:
    """What `Kernel.new_cache` makes.

    Attributes:
        spec: whose it is, heads and head dims bound.
        storage: what is kept of each token.
        shape: sequences, their capacity in tokens, dtype and device.
        lengths: i32[B], tokens of each sequence, on the device.
        tensors: by name [B, capacity, ...] of the caller's tensors, and of levels the entries
            [B, N, heads, width].
    """

    def __init__(self, spec: Spec, storage: Storage, shape: Shape, writer: Writer) -> None:
        self.spec = spec
        self.digest = spec.digest
        self.storage = storage
        self.shape = shape
        self.tensors = _tensors(storage, shape)
        zeros = torch.zeros(shape.batch, 6, dtype=torch.int32, device=shape.device)
        self.lengths = torch.zeros_like(zeros[:, 0])
        self._table = zeros
        self._writer = writer
        self._most = 0  # no sequence is longer, as far as the host knows
        self._new: dict[int, Tensor] = {}

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

    def fork(self, sequences: Tensor) -> Cache:
        """A cache whose sequence i is a copy of this one's `sequences[i]`.  int64[any]"""
        if sequences.ndim != 1 or sequences.dtype != torch.int64:
            raise ArgumentError(
                f"sequences: expected int64 [any], got {sequences.dtype} {list(sequences.shape)}"
            )
        shape = Shape(
            batch=len(sequences),
            capacity=self.shape.capacity,
            dtype=self.shape.dtype,
            device=self.shape.device,
        )
        made = Cache(self.spec, self.storage, shape, self._writer)
        for name, tensor in self.tensors.items():
            torch.index_select(tensor, 0, sequences, out=made.tensors[name])
        torch.index_select(self.lengths, 0, sequences, out=made.lengths)
        made._most = self._most
        return made

    # --- for those who write

    def batch(self, tokens: int) -> Batch:
        """Where the sequences of a call of so many tokens lie; its table is filled on the device."""
        shape = self.shape
        return Batch(
            table=self._table,
            sequences=shape.batch,
            rows=shape.batch * tokens,
            keys=shape.capacity,
            packed=False,
        )

    def new(self, tokens: int, new_lens: Tensor | None) -> Tensor:
        """How many tokens come to each sequence.  -> i32[B]"""
        if new_lens is not None:
            return new_lens
        if tokens not in self._new:
            self._new[tokens] = torch.full_like(self.lengths, tokens)
        return self._new[tokens]

    def reserve(self, tokens: int) -> None:
        """Count on so many more tokens.

        A replayed graph is not counted; what then finds no room is left out by the kernels.

        Raises:
            ArgumentError: some sequence has no room for them.
        """
        if self.shape.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
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
        """Shape, dtype and device; no values: more than T count as T."""
        if new_lens is not None:
            self._check_lens("new_lens", new_lens)


def _tensors(storage: Storage, shape: Shape) -> dict[str, Tensor]:
    """Room for everything.  A head's tokens lie side by side: a block of them is one piece."""
    made: dict[str, Tensor] = {}
    options = {"dtype": shape.dtype, "device": shape.device}
    for stream in storage.streams:
        *heads, dim = stream.dims
        room = torch.zeros(shape.batch, *heads, shape.capacity, dim, **options)
        made[stream.name] = room.transpose(1, 2) if heads else room
    for level in storage.levels:
        entries = max(1, shape.capacity // level.stride)
        made[level.name] = torch.zeros(shape.batch, entries, level.heads, level.width, **options)
    return made
