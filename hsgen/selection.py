"""Selections as values: which entries of a level each row attends to, as lists or as bitmap rows.

Chooses nothing: the order is the reference's and the kernels' business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsgen.errors import ArgumentError

WORD = 32  # entries one bitmap word holds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ListSelection:
    """At most K entries a row.  indices: i32[B, T, Hs, K] or packed [total, Hs, K].

    A selection that hsgen hands out is ascending and -1 padded at the end.  One that a user hands
    in is a set in any order: -1 is ignored in every slot, a duplicate changes nothing.
    """

    level: str
    indices: Tensor

    def __repr__(self) -> str:
        return f"{self.level}: list i32{list(self.indices.shape)}, {_sizes(self)}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class BitmapSelection:
    """Any number of entries a row.  words: i32[B, T, Hs, ceil(N / 32)].

    Entry e is bit e % 32 of word e // 32; bits at and after `entries` are zero.
    """

    level: str
    words: Tensor
    entries: int

    @property
    def indices(self) -> Tensor:
        """The same sets as lists, as wide as the largest; costs a look at the data."""
        return to_list(self).indices

    def __repr__(self) -> str:
        return (
            f"{self.level}: bitmap of {self.entries}, i32{list(self.words.shape)}, {_sizes(self)}"
        )


Selection = ListSelection | BitmapSelection


def members(selection: Selection, entries: int) -> Tensor:
    """Spread a selection out.  -> bool[..., Hs, entries]

    Indices that are negative or not below `entries` select nothing.
    """
    match selection:
        case ListSelection(indices=indices):
            inside = (indices >= 0) & (indices < entries)
            slots = torch.where(inside, indices, entries).long()
            mask = torch.zeros(*indices.shape[:-1], entries + 1, dtype=torch.bool)
            mask = mask.to(indices.device).scatter_(-1, slots, torch.ones_like(inside))
            return mask[..., :entries]
        case BitmapSelection(words=words):
            bits = torch.arange(WORD, device=words.device, dtype=torch.int32)
            mask = ((words.unsqueeze(-1) >> bits) & 1).bool().flatten(-2)
            have = min(entries, mask.shape[-1])
            return torch.nn.functional.pad(mask[..., :have], (0, entries - have))


def from_members(level: str, mask: Tensor, *, width: int | None = None) -> ListSelection:
    """Write sets as lists.  bool[..., Hs, N] -> i32[..., Hs, width], ascending, -1 padded.

    Args:
        level: The level the entries belong to.
        mask: The members.
        width: Slots of a row; None takes the largest set.  Sets that do not fit lose their tail, so
            callers give a width that fits.
    """
    entries = mask.shape[-1]
    if width is None:
        width = int(mask.sum(-1).max()) if mask.numel() else 0
    numbers = torch.arange(entries, device=mask.device, dtype=torch.int32)
    found = torch.where(mask, numbers, entries).sort(-1).values[..., :width]
    found = torch.nn.functional.pad(found, (0, width - found.shape[-1]), value=entries)
    return ListSelection(level=level, indices=torch.where(found < entries, found, -1))


def to_list(selection: Selection, *, width: int | None = None) -> ListSelection:
    """The same sets as ascending, duplicate-free lists, -1 padded at the end.

    A width below the largest set would lose entries: ArgumentError.
    """
    match selection:
        case ListSelection(indices=indices):
            entries = int(indices.max()) + 1 if indices.numel() else 0
        case BitmapSelection(entries=entries):
            pass
    mask = members(selection, max(entries, 0))
    largest = int(mask.sum(-1).max()) if mask.numel() else 0
    if width is not None and width < largest:
        raise ArgumentError(
            f"selection {selection.level!r}: expected at least {largest} slots a row, got {width}"
        )
    return from_members(selection.level, mask, width=width)


def to_bitmap(selection: Selection, entries: int) -> BitmapSelection:
    """The same sets as bitmap rows of `entries` bits; what lies outside is dropped."""
    return bitmap_from_members(selection.level, members(selection, entries))


def bitmap_from_members(level: str, mask: Tensor) -> BitmapSelection:
    """Write sets as bitmap rows.  bool[..., Hs, N] -> i32[..., Hs, ceil(N / 32)]"""
    entries = mask.shape[-1]
    count = -(-entries // WORD)
    mask = torch.nn.functional.pad(mask, (0, count * WORD - entries)).unflatten(-1, (count, WORD))
    bits = torch.arange(WORD, device=mask.device)
    words = (mask.long() << bits).sum(-1)
    words = torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words)
    return BitmapSelection(level=level, words=words.to(torch.int32), entries=entries)


def checked(selection: Selection, *, level: str, rows: tuple[int, ...], heads: int) -> Selection:
    """Return a caller's selection, or say what is wrong with its level, dtype or shape.

    Args:
        selection: What the caller handed in.
        level: The level it is meant for.
        rows: Leading dimensions: (B, T), or (total,) when packed.
        heads: Selection heads of the level.

    Raises:
        ArgumentError: expected against got.
    """
    if not isinstance(selection, ListSelection | BitmapSelection):
        raise ArgumentError(
            f"selection {level!r}: expected a ListSelection or BitmapSelection, "
            f"got {type(selection).__name__}"
        )
    if selection.level != level:
        raise ArgumentError(f"selection: expected level {level!r}, got {selection.level!r}")
    data, slots = _storage(selection)
    if data.dtype != torch.int32:
        raise ArgumentError(f"selection {level!r}: expected torch.int32, got {data.dtype}")
    expected = (*rows, heads)
    if tuple(data.shape[:-1]) != expected or data.ndim != len(expected) + 1:
        raise ArgumentError(
            f"selection {level!r}: expected [{', '.join(map(str, expected))}, {slots}], "
            f"got {list(data.shape)}"
        )
    return selection


def checked_range(selection: Selection, entries: int) -> Selection:
    """Return a selection whose indices are all below `entries`; costs a look at the data."""
    if isinstance(selection, ListSelection) and bool((selection.indices >= entries).any()):
        largest = int(selection.indices.max())
        raise ArgumentError(
            f"selection {selection.level!r}: expected indices below {entries}, got {largest}"
        )
    return selection


def _storage(selection: Selection) -> tuple[Tensor, str]:
    """The tensor of a selection and what its last dimension counts."""
    match selection:
        case ListSelection(indices=indices):
            return indices, "K"
        case BitmapSelection(words=words, entries=entries):
            return words, str(-(-entries // WORD))


def _sizes(selection: Selection) -> str:
    """How many entries the rows hold, for printing."""
    match selection:
        case ListSelection(indices=indices):
            counts = (indices >= 0).sum(-1)
        case BitmapSelection(entries=entries):
            counts = members(selection, entries).sum(-1)
    if not counts.numel():
        return "no rows"
    least, most = int(counts.min()), int(counts.max())
    return f"{least} entries a row" if least == most else f"{least}..{most} entries a row"
