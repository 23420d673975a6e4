"""Partitions and pools: what an entry is, and what stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from hsgen.spec.model.scalars import Count, Node

KeyPool = Literal["mean", "max", "minmax", "sum_rsqrt", "linear", "first", "antidiagonal"]


ValuePool = Literal["mean", "max", "sum_rsqrt", "linear"]


class Tokens(Node):
    """Every token is an entry of its own."""

    kind: Literal["tokens"] = "tokens"

    @property
    def size(self) -> int:
        """Tokens of one entry."""
        return 1

    @property
    def stride(self) -> int:
        """Tokens from one entry's start to the next."""
        return 1


class Blocks(Node):
    """Entry i covers tokens [i * stride, i * stride + size)."""

    renamed: ClassVar[Mapping[str, str]] = {"blocks": "size"}
    kind: Literal["blocks"] = "blocks"
    size: Count  # tokens of one block
    stride: Count  # from one block's start to the next; in YAML by default the block's size


class Clusters(Node):
    """Entry i is cluster i of the order that `permute` puts keys in: of any size, also of none."""

    kind: Literal["clusters"] = "clusters"

    @property
    def size(self) -> int:
        """0: no number of tokens is that of every entry."""
        return 0

    @property
    def stride(self) -> int:
        """0, like the size."""
        return 0


Partition = Tokens | Blocks | Clusters


class Pool(Node):
    """One vector an entry, in float32.

    `linear`: sum over slots of (token + position) @ weight.  `sum_rsqrt`: the sum by the root of the
    number of tokens.  `minmax`: two vectors, the least and the greatest of every channel.
    `first`: the first token.  `antidiagonal`: all tokens side by side, 0 where one is not there; a
    pooled query has them in reverse order, so that their dot is the mean of the logits on the
    antidiagonal of the tile.
    """

    keys: KeyPool | None = None
    values: ValuePool | None = None
    position: Literal["learned"] | None = None
