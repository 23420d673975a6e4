"""Partitions and pools: what an entry is, and what stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from hsgen.spec.model.scalars import Bound, Count, Forced, Node, Power, Slack

KeyPool = Literal["mean", "max", "minmax", "sum_rsqrt", "linear", "sample", "centroid"]


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


class Halving(Node):
    """Entry i covers tokens [i * interval, (i + 1) * interval), and is searched anew by every query.

    As long as the search's interval is longer than `until`, the key in the middle of each half is
    scored, token (l + r) // 2 of a half [l, r), and the half that scores more is searched next; of
    equals the later one.  The entry's score is the best of all that were scored.  Rows that choose
    together, and have their scores reduced, search together; every head searches for itself.
    """

    renamed: ClassVar[Mapping[str, str]] = {"halving": "interval"}
    kind: Literal["halving"] = "halving"
    interval: Count  # tokens of one entry, `until` times a power of two
    until: Count = 1  # the search ends at an interval of this many tokens

    @property
    def size(self) -> int:
        """Tokens of one entry."""
        return self.interval

    @property
    def stride(self) -> int:
        """Tokens from one entry's start to the next."""
        return self.interval


class LearnedTree(Node):
    """Entries are the nodes of one level of a learned tree, for each key head; tokens are assigned.

    Node e of a level inside another tree level is a child of e // tree.  Its centroid is that of
    the input `<level>_centroids [Hkv, N, Dqk]`.  From the root down, a token goes to the child whose
    centroid has the largest cosine with its key; ties go to the lower node.  A node is scored by
    its centroid, and exists for a row once a token at or before the row is in it.
    """

    renamed: ClassVar[Mapping[str, str]] = {"tree": "branching"}
    kind: Literal["tree"] = "tree"
    branching: Count  # children of each node of the level above; of the root, without one
    # a node keeps the ceil(capacity * tokens / nodes) tokens of largest cosine, of equals the
    # earlier; the others are in no node.  Left out: it keeps all
    capacity: Slack | None = None

    @property
    def size(self) -> int:
        """0: no number of tokens is that of every entry."""
        return 0

    @property
    def stride(self) -> int:
        """0, like the size."""
        return 0


class Ragged(Node):
    """Entries are runs of tokens of any length, one after another; the first begins at token 0.

    `given`: an entry begins where the input `<level>_starts [B, S]` is not 0.  `similarity`: an entry
    begins at a token where the cosine of the mean keys of `span` tokens before it and of `span`
    tokens from it on, mean over key heads, is below `threshold`, and is the least within less than
    `span` tokens; of equals the earlier.  An entry is complete for the rows of those after it.
    """

    renamed: ClassVar[Mapping[str, str]] = {"ragged": "boundaries"}
    kind: Literal["ragged"] = "ragged"
    boundaries: Literal["given", "similarity"]
    span: Count | None = None  # tokens compared on either side
    threshold: Bound | None = None  # of the cosine

    @property
    def size(self) -> int:
        """0: no number of tokens is that of every entry."""
        return 0

    @property
    def stride(self) -> int:
        """0, like the size."""
        return 0


class Stripes(Node):
    """Entries are single tokens at distances from the query that grow by a power.

    A row at position p has the anchors p + 1 - i ** stripes, for every i from `first` on that leaves
    it at 0 or later.  Entry 0 is the oldest of them.
    """

    renamed: ClassVar[Mapping[str, str]] = {"stripes": "power"}
    kind: Literal["stripes"] = "stripes"
    power: Power  # of the distances
    first: Count = 1  # the least i: nearer tokens are for a window

    @property
    def size(self) -> int:
        """An anchor is one token."""
        return 1

    @property
    def stride(self) -> int:
        """As `size`."""
        return 1


Partition = Tokens | Blocks | Clusters | Halving | LearnedTree | Ragged | Stripes


class Pool(Node):
    """One vector an entry, in float32.

    `linear`: sum over slots of (token + position) @ weight.  `sum_rsqrt`: the sum by the root of the
    number of tokens.  `minmax`: two vectors, the least and the greatest of every channel.  `sample`:
    one token of each, drawn by a fixed hash of `seed`, head and entry (docs/decisions.md).
    `centroid`: the learned centroid of a tree's node, at unit length.
    """

    keys: KeyPool | None = None
    values: ValuePool | None = None
    position: Literal["learned"] | None = None
    seed: Forced | None = None  # of `sample`; left out: 0
