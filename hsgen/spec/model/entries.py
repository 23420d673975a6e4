"""Partitions and pools: what an entry is, and what stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from hsgen.spec.model.scalars import Count, Node, Scale

KeyPool = Literal[
    "mean",
    "max",
    "minmax",
    "sum_rsqrt",
    "linear",
    "mlp",
    "gated",
    "max_min_mean",
    "first",
    "antidiagonal",
]


ValuePool = Literal["mean", "max", "sum_rsqrt", "linear", "mlp", "gated"]


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
    """Entry i covers tokens [i * stride - before, i * stride - before + size); none lie before 0."""

    renamed: ClassVar[Mapping[str, str]] = {"blocks": "size"}
    kind: Literal["blocks"] = "blocks"
    size: Count  # tokens of one block
    stride: Count  # from one block's start to the next; in YAML by default the block's size
    before: Count | None = None  # of a block's tokens, those that lie before its place, i * stride


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


class Parts(Node):
    """Entry i is part i of as many equal parts as are said, of the tokens that a row sees.

    Of n of them token j lies in the part i for which i < (j + 1/2) * parts / n <= i + 1, the nearest.
    Where n is less, some parts are empty, and are chosen all the same.
    """

    renamed: ClassVar[Mapping[str, str]] = {"parts": "count"}
    kind: Literal["parts"] = "parts"
    count: Count  # parts of one row

    @property
    def size(self) -> int:
        """0: parts grow with what a row sees."""
        return 0

    @property
    def stride(self) -> int:
        """0, like the size."""
        return 0


Partition = Tokens | Blocks | Clusters | Parts


class Rotate(Node):
    """RoPE of pooled keys: pair i of `dims` channels turns by position * base^(-2 i / dims).

    at: `first`, position i * stride of entry i, its first token but for those of `before`; `centre`,
        the mean position of its tokens, a half of a whole number as it may be; `token`, every token
        by its own position before it is pooled.
    """

    at: Literal["first", "centre", "token"]
    dims: Count  # channels that are turned
    # left out: cos and sin of every position are inputs, `cos_<level>` and `sin_<level>` [S, dims/2]
    base: Scale | None = None
    channels: Literal["first", "last"] = "first"  # which channels of a key those are
    # halves: channel i with i + dims/2; neighbours: 2 i with 2 i + 1
    pairs: Literal["halves", "neighbours"] = "halves"


class Pool(Node):
    """One vector an entry, in float32: pool, then norm, then rotate.

    `linear`: sum over slots of (token + position) @ weight.  `mlp`: relu of that, with a weight that
    leads to `hidden` channels, times another weight.  `sum_rsqrt`: the sum by the root of the number
    of tokens.  `minmax`: two vectors, the least and the greatest of every channel.  `max_min_mean`:
    the greatest, the least and the mean, each times a weight, summed.  `gated`: the mean weighted by
    a softmax over the entry's tokens of inputs `z_index`, `z` or `z_<kv>`, plus position.  `first`:
    the first token.  `antidiagonal`: all tokens side by side, 0 where one is not there; a pooled query
    has them in reverse order, so that their dot is the mean of the logits on the tile's antidiagonal.
    """

    keys: KeyPool | None = None  # what stands for an entry where it is scored or attended
    values: ValuePool | None = None  # gated: weighted as keys are
    position: Literal["learned"] | None = None  # a learned vector for each slot of an entry
    softmax: Literal["channel", "token"] | None = None  # gated: weights of each channel, or one
    # every token has so many keys and gates: slot s of an entry takes those of series s // stride
    series: Count | None = None
    hidden: Count | None = None  # mlp: channels between its two maps; left out: as many as a key
    then: Literal["norm"] | None = None  # RMS norm of pooled keys, eps 1e-6, with a learned weight
    rotate: Rotate | None = None  # RoPE of pooled keys
