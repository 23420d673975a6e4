"""Mixed batches of a server: packed rows of sequences, some of which decode and some prefill, on its pages.

A server hands out pages, shares those of equal prefixes and takes them back; sequences come and go with every
step.  So what a spec pools of tokens is kept by the page in which an entry ends: it holds for whoever has
that page, since a page has one prefix.  No sequence has a state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsgen.cache import FEW, Cache
from hsgen.errors import ArgumentError
from hsgen.reference import tensor_kinds
from hsgen.runtime import Kernel
from hsgen.storage import Kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The sequences of one call.

    Attributes:
        starts: Where the rows of each begin in packed tensors, and their total.
        lengths: i32[Z], tokens of each with the new ones, on the device.
        block_table: i32[Z, M], the pages of each, on the device.
        longest: No sequence has more tokens.
    """

    starts: Sequence[int]
    lengths: Tensor
    block_table: Tensor
    longest: int


class PagedLayer:
    """Keys and values of one layer in a server's pages, and what a spec pools of them.

    Attributes:
        kernel: Heads and head dims bound, or there is no telling what it keeps.
        entries: By level, [pages + 1, entries that end in a page, heads, width]; the last page takes what
            has no place.
    """

    def __init__(self, kernel: Kernel, k_pages: Tensor, v_pages: Tensor) -> None:
        """
        Args:
            kernel: Keeps k and v alone of tokens.
            k_pages: [N, page, Hkv, D] with any strides but the last.
            v_pages: [N, page, Hkv, Dv].

        Raises:
            PlanError: no cache can keep what the spec needs.
            ArgumentError: the spec keeps more than k and v, or entries that do not fit pages.
        """
        self.kernel = kernel
        self.pages = {"k": k_pages, "v": v_pages}
        self.page = k_pages.shape[1]
        unknown = [name for name in tensor_kinds(kernel.spec) if name not in ("q", "k", "v")]
        if unknown:
            raise ArgumentError(
                f"spec {kernel.spec.name}: expected one of q, k and v alone, which a server's models have, "
                f"got one that needs {', '.join(unknown)}"
            )
        example = self._cache(torch.zeros(1, 1, dtype=torch.int32, device=k_pages.device))
        self.entries: dict[str, Tensor] = {}
        self._levels: tuple[Kept, ...] = example.storage.levels
        for level in self._levels:
            if self.page % level.stride and level.stride % self.page:
                raise ArgumentError(
                    f"page: expected one that level {level.level!r} divides, or that divides it, since its "
                    f"entries begin every {level.stride} tokens, got {self.page}"
                )
            most = max(1, self.page // level.stride)
            self.entries[level.name] = k_pages.new_zeros(
                len(k_pages) + 1, most, level.heads, level.width
            )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, out: Tensor | None = None
    ) -> Tensor:
        """Write new tokens to their pages, and attend with them.

        Sequences with few rows go together, as a step; each with many goes alone, as a chunk of prefill.

        Args:
            q: [total, Hq, D], packed.
            k: [total, Hkv, D], of the new tokens.
            v: [total, Hkv, Dv].
            rows: Whose they are; rows behind the last start belong to nobody.
            out: [total, Hq, Dv], written to.

        Returns:
            o [total, Hq, Dv]; what belongs to nobody is 0.
        """
        if out is None:
            out = q.new_empty(*q.shape[:2], v.shape[-1])
        counts = [b - a for a, b in zip(rows.starts, rows.starts[1:], strict=False)]
        out[rows.starts[-1] :] = 0
        few = [z for z, count in enumerate(counts) if 0 < count <= FEW]
        if few:
            self._together((q, k, v), rows, few, out)
        for z, count in enumerate(counts):
            if count > FEW:
                at = slice(rows.starts[z], rows.starts[z] + count)
                some = (x[at][None] for x in (q, k, v))
                where = torch.tensor([z], device=q.device)
                out[at] = self._call(self.kernel.extend, tuple(some), rows, where, None)[0]
        return out

    def _together(
        self, new: tuple[Tensor, Tensor, Tensor], rows: Rows, few: Sequence[int], out: Tensor
    ) -> None:
        """A step of the sequences with few rows; their numbers ascend."""
        firsts = [rows.starts[z] for z in few]
        counts = [rows.starts[z + 1] - rows.starts[z] for z in few]
        most, device = max(counts), out.device
        where = torch.tensor(few, device=device)
        end = firsts[0] + most * len(few)
        if firsts == list(range(firsts[0], end, most)) and min(counts) == most:
            at = slice(firsts[0], end)  # side by side, as servers sort them
            some = tuple(x[at].unflatten(0, (len(few), most)) for x in new)
            out[at] = self._call(self.kernel.decode, some, rows, where, None).flatten(0, 1)
            return
        first, count = torch.tensor([firsts, counts], device=device)
        step = torch.arange(most, device=device)
        there = step < count[:, None]
        index = (first[:, None] + step).where(there, first[:, None])
        some = tuple(x[index] for x in new)
        o = self._call(self.kernel.decode, some, rows, where, count.to(torch.int32))
        out[index[there]] = o[there]

    def _call(
        self,
        call: Callable[..., Any],
        tensors: tuple[Tensor, ...],
        rows: Rows,
        where: Tensor,
        new_lens: Tensor | None,
    ) -> Tensor:
        """One call of some of the sequences.  [b, T, H, D] -> [b, T, Hq, Dv]"""
        tokens, used = tensors[0].shape[1], -(-rows.longest // self.page)
        table = rows.block_table[:, :used].index_select(0, where)
        lengths = rows.lengths.index_select(0, where)
        before = lengths - (tokens if new_lens is None else new_lens)
        cache = self._cache(table)
        cache.resume(before)
        for level in self._levels:
            self._gather(level, table, cache.tensors[level.name])
        o = call(*tensors, cache, new_lens=new_lens)
        for level in self._levels:
            self._scatter(level, table, cache.tensors[level.name], before, lengths, tokens)
        return o

    def _cache(self, table: Tensor) -> Cache:
        """One that lies in the server's pages."""
        k = self.pages["k"]
        return self.kernel.new_cache(
            len(table),
            table.shape[1] * self.page,
            k.dtype,
            k.device,
            page=self.page,
            pages=self.pages,
            block_table=table,
        )

    # --- entries, between pages and sequences

    def _places(self, level: Kept, table: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Page and place in it of entries i64[b, n], whose last token says which."""
        last = entry * level.stride + level.size - 1
        number = (last // self.page).clamp(max=table.shape[1] - 1)
        place = last % self.page // level.stride if self.page > level.stride else last * 0
        return table.gather(1, number).long(), place

    def _gather(self, level: Kept, table: Tensor, into: Tensor) -> None:
        """Entries of each sequence, in order; of those that are not complete anything."""
        kept = self.entries[level.name]
        entry = torch.arange(into.shape[1], device=table.device).expand(len(table), -1)
        number, place = self._places(level, table, entry)
        into.copy_(kept[number.clamp(0, len(kept) - 1), place])

    def _scatter(
        self,
        level: Kept,
        table: Tensor,
        found: Tensor,
        before: Tensor,
        lengths: Tensor,
        tokens: int,
    ) -> None:
        """What a call completed, to the pages that it ends in."""
        kept = self.entries[level.name]
        first = ((before - level.size) // level.stride + 1).clamp(min=0).long()
        entry = first[:, None] + torch.arange(tokens // level.stride + 1, device=table.device)
        last = entry * level.stride + level.size
        made = (last > before[:, None]) & (last <= lengths[:, None])
        entry = entry.clamp(max=found.shape[1] - 1)
        number, place = self._places(level, table, entry)
        z = torch.arange(len(table), device=table.device)[:, None]
        kept[number.where(made, len(kept) - 1), place] = found[z, entry]
