"""Orders: how tokens are put before entries, or query blocks, are cut from them."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hsgen.spec.model.scalars import Count, Node, PerAxis


class SortInSegment(Node):
    """The tokens of every whole segment, greatest first; a shorter last segment stays as it is.

    `mass`: by the mean softmax mass that the last `last` rows of the call give a key, over the keys
    of all whole segments and without causality; of key heads, also the mean over their query heads.
    `mean`: by the dot product with the mean of the segment.  Ties go to the lower position.
    """

    renamed: ClassVar[Mapping[str, str]] = {"sort_in_segment": "segment"}
    kind: Literal["sort_in_segment"] = "sort_in_segment"
    segment: Count  # tokens of one segment
    by: Literal["mass", "mean"]
    last: Count | None = None  # rows whose masses count, where `by: mass`


class KMeans(Node):
    """Clusters one after another, by Lloyd's algorithm in Euclidean distance; a cluster keeps order.

    Cluster i starts at token floor(i * S / clusters).  Each iteration gives every token to the nearest
    centroid, ties to the lower cluster, and then takes means; an empty cluster keeps its centroid.
    """

    renamed: ClassVar[Mapping[str, str]] = {"kmeans": "clusters"}
    kind: Literal["kmeans"] = "kmeans"
    clusters: Count  # of one head
    iterations: Count  # all of them are made, however little centroids move


class Gather(Node):
    """In slot i the token that the input `<level>_key_order`, or `_query_order`, says for it.

    [B, S, Hkv] of keys, [B, T, Hq] of queries: positions from the start of the sequence.  What is no
    position, or was named by an earlier slot, leaves its slot empty.
    """

    kind: Literal["gather"] = "gather"


class Tile(Node):
    """Tiles of the spec's `axes` one after another, the last axis fastest; a tile's tokens keep order.

    A tile has so many steps along every axis, and fewer where the axis ends.
    """

    kind: Literal["tile"] = "tile"
    tile: PerAxis


Order = Annotated[SortInSegment | KMeans | Gather | Tile, Field(discriminator="kind")]


class Permute(Node):
    """The orders that a level's entries, and rows together, are cut from, head by head.

    Tokens and outputs stay in place: a token is seen by its own position, wherever it is put.
    """

    keys: Order | None = None  # of keys, and of their values
    queries: KMeans | None = None  # rows of a cluster choose together: `query: {by: cluster}`
