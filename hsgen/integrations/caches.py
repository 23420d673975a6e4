"""A cache of hsgen's as one of transformers': its layers keep keys, values and what the spec pools of them.

A step then costs what it appends, chooses and attends; with transformers' own caches it pools everything
again.  Padding is left out, so that entries begin at each sequence's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hsgen.cache import FEW, Cache
from hsgen.errors import ArgumentError, HsgenError
from hsgen.runtime import Kernel


class KernelLayer(CacheLayerMixin):
    """One layer: what transformers asks of such, in slots of the batch; `cache` has tokens without padding.

    `update` hands on the new tokens alone, with the layer itself: attention then writes and reads the cache.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.cache: Cache | None = None
        self.slots = 0
        self.whole = 0  # of the last slots, those where every sequence has a token
        self.handed_on = False  # tokens that attention has not seen yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing yet: the first step tells of which kernel the cache is."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = len(key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """The new tokens, as they come."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.handed_on:  # attention would see a step's own tokens alone
            raise HsgenError(
                "cache: tokens of an earlier call never came to an attention that keeps them, as a model "
                "changed its keys behind the cache, or that call failed",
                help="after a failure cache.reset(); of such a model a cache of transformers' own",
            )
        self.handed_on = True
        key_states.hsgen_layer = self  # type: ignore[attr-defined]  # the only way from here to attention
        return key_states, value_states

    def attend(
        self,
        kernel: Kernel,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        rows: Tensor | None,
    ) -> Tensor:
        """o of new tokens, which are kept.  [B, T, Hq, D] -> [B, T, Hq, Dv]

        Args:
            kernel: Always the same one.
            tensors: By name, with one row a token.
            parameters: Those without.
            rows: bool[B, T], which tokens are there; None if all are.
        """
        if not self.handed_on:
            raise HsgenError(
                "cache: expected each layer's own keys, got those of another layer again"
            )
        self.handed_on = False
        given = dict(tensors)
        batch, tokens = given["q"].shape[:2]
        if self.cache is None:
            self.cache = kernel.new_cache(batch, self.capacity, given["k"].dtype, given["k"].device)
        new_lens = order = None
        if rows is not None:  # those that are there come first, in their order
            new_lens = rows.sum(1, dtype=torch.int32)
            order = (~rows).to(torch.int8).argsort(dim=1, stable=True)
            given = {name: _taken(x, order) for name, x in given.items()}
        call: Callable[..., Any] = kernel.decode if tokens <= FEW else kernel.extend
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v", None)
        o = call(q, k, v, self.cache, new_lens=new_lens, **given, **parameters)
        self.slots += tokens
        self.whole = self.whole + tokens if rows is None else _last_whole(rows, self.whole)
        return o if order is None else _taken(o, order.argsort(dim=1))

    # --- what transformers asks of a layer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a mask has, and the first of them."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Slots so far, padding counted."""
        return self.slots

    def get_max_length(self) -> int:
        """Most tokens."""
        return self.capacity

    get_max_cache_shape = get_max_length  # its name in older versions

    def reset(self) -> None:
        """Forget all tokens."""
        self.slots = self.whole = 0
        self.handed_on = False
        if self.cache is not None:
            self.cache.truncate(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: so many, as a number below 0."""
        if tokens_to_remove > 0:  # of versions that differ: a length, or an error
            raise ArgumentError(
                f"crop: expected how many tokens to forget, as a number below 0, got {tokens_to_remove}"
            )
        count = -tokens_to_remove
        if count > self.whole:
            raise ArgumentError(
                f"crop: expected at most {self.whole} tokens, since padding comes before them, got {count}"
            )
        if self.cache is not None and count:
            self.cache.truncate(self.cache.lengths - count)
        self.slots -= count
        self.whole -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences of other beams in place of these."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some sequences, or some of them several times."""
        if self.cache is not None:
            self.cache = self.cache.fork(indices.to(torch.int64))
            self.batch_size = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        if self.cache is not None:
            at = torch.arange(self.cache.shape.batch, device=self.cache.shape.device)
            self.batch_select_indices(at.repeat_interleave(repeats))

    def offload(self) -> None:
        """Stays where it is."""

    def prefetch(self) -> None:
        """Is where it was."""


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each sequence in another order.  x [B, T, ...], order i64[B, T]"""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def _last_whole(rows: Tensor, before: int) -> int:
    """Of the last slots, those where every sequence has a token."""
    there = rows.all(0)
    if bool(there.all()):
        return before + len(there)
    return int(there.flip(0).to(torch.int32).cumprod(0).sum())
