"""Partitions and pools: what an entry is, and what stands for it."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from hsgen.spec.model.scalars import Bound, Count, Forced, Node, Power, Scale, Slack

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
    "sample",
    "centroid",
]


ValuePool = Literal["mean", "max", "sum_rsqrt", "linear", "mlp", "gated"]


class OneToken(Node):
    """A partition whose entries are single tokens."""

    @property
    def size(self) -> int:
        """Tokens of one entry."""
        return 1

    @property
    def stride(self) -> int:
        """Tokens from one entry's start to the next."""
        return 1


class AnyLength(Node):
    """A partition whose entries have as many tokens as the data gives them."""

    @property
    def size(self) -> int:
        """0: no number of tokens is that of every entry."""
        return 0

    @property
    def stride(self) -> int:
        """0, like the size."""
        return 0


class Tokens(OneToken):
    """Every token is an entry of its own."""

    kind: Literal["tokens"] = "tokens"


class Blocks(Node):
    """Entry i covers tokens [i * stride - before, i * stride - before + size); none lie before 0."""

    renamed: ClassVar[Mapping[str, str]] = {"blocks": "size"}
    kind: Literal["blocks"] = "blocks"
    size: Count  # tokens of one block
    stride: Count  # from one block's start to the next; in YAML by default the block's size
    before: Count | None = None  # of a block's tokens, those that lie before its place, i * stride


class Clusters(AnyLength):
    """Entry i is cluster i of the order that `permute` puts keys in: of any size, also of none."""

    kind: Literal["clusters"] = "clusters"


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


class Halving(Node):
    """Entry i covers tokens [i * interval, (i + 1) * interval), and is searched anew by every query.

    As long as the search's interval is longer than `until`, the key in the middle of each half is
    scored, token (l + r) // 2 of a half [l, r), and the half that scores more is searched next; of
    equals the later one.  The entry's score is the best of all that were scored.  Every head
    searches for itself, and so does a row; rows that choose together search as one, by a pooled query
    or by their logits reduced.
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


class LearnedTree(AnyLength):
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
    # instead, a node takes so many tokens of largest cosine, of equals the earlier, whatever the
    # others take: a token may be in several nodes, or in none.  Of a tree of one level
    takes: Count | None = None


class Ragged(AnyLength):
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


class Stripes(OneToken):
    """Entries are single tokens at distances from the query that grow by a power.

    A row at position p has the anchors p + 1 - i ** stripes, for every i from `first` on that leaves
    it at 0 or later.  Entry 0 is the oldest of them.
    """

    renamed: ClassVar[Mapping[str, str]] = {"stripes": "power"}
    kind: Literal["stripes"] = "stripes"
    power: Power  # of the distances
    first: Count = 1  # the least i: nearer tokens are for a window


class Diagonals(Node):
    """Entry i of a row is the `size` keys that begin at (row // size - i) * size: counted back from it.

    Of size 1 it is the key i before the row, so that an entry is one diagonal of all rows and keys; of
    a greater size it is one of blocks of so many rows and keys.  Entry i of size s is complete for a
    row that has (i + 1) * s keys up to its own.
    """

    renamed: ClassVar[Mapping[str, str]] = {"diagonals": "size"}
    kind: Literal["diagonals"] = "diagonals"
    size: Count  # rows and keys of one block

    @property
    def stride(self) -> int:
        """Blocks do not overlap."""
        return self.size


Partition = (
    Tokens | Blocks | Clusters | Parts | Halving | LearnedTree | Ragged | Stripes | Diagonals
)


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
    """One vector an entry, kept in the input's dtype: pool, then norm, then rotate.

    `linear`: sum over slots of (token + position) @ weight.  `mlp`: relu of that, with a weight that
    leads to `hidden` channels, times another weight.  `sum_rsqrt`: the sum by the root of the number
    of tokens.  `minmax`: two vectors, the least and the greatest of every channel.  `max_min_mean`:
    the greatest, the least and the mean, each times a weight, summed.  `gated`: the mean weighted by
    a softmax over the entry's tokens of inputs `z_index`, `z` or `z_<kv>`, plus position.  `first`:
    the first token.  `antidiagonal`: all tokens side by side, 0 where one is not there; a pooled query
    has them in reverse order, so that their dot is the mean of the logits on the tile's antidiagonal.
    `sample`: one token of each, drawn by a fixed hash of `seed`, head and entry (docs/decisions.md).
    `centroid`: the learned centroid of a tree's node, at unit length.
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
    seed: Forced | None = None  # of `sample`; left out: 0
