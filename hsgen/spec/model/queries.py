"""Queries: which rows score and choose together."""

from typing import Literal

from hsgen.spec.model.scalars import Count, Node, PerAxis
from hsgen.spec.model.scores import Reduce

QueryPool = Literal["mean", "max", "first", "antidiagonal"]


class Query(Node):
    """Rows that choose as one; left out, every row chooses for itself.

    Rows of a block may choose every entry whose first token is not after the block's last row, so
    an entry counts with tokens that some of them must not see.  Attending stays causal token by
    token.  `last: n` of a `force` is the last n entries of each of the rows.

    The rows are either pooled before they score, or score each for itself and are reduced after
    their heads are.  Where scores are taken `from` another level, it is that level's rows that are
    reduced.
    """

    block: Count | None = None  # row t belongs to block t // block of its document
    tile: PerAxis | None = None  # rows of a tile of the spec's `axes`, as `permute` has them
    by: Literal["cluster"] | None = None  # rows of a cluster, which `permute: {queries}` makes
    last: Count | None = None  # that many last rows of the prompt choose, for all of its rows
    pool: QueryPool | None = None  # one query stands for all of them; a row that is not there: 0
    reduce: Reduce | None = None  # how the scores of the rows become those of all of them
    # chosen: of a call that chooses among kept entries, rows whose own token none of them holds see
    # no entry, so that they have no say
    rows: Literal["chosen"] | None = None
    heads: Literal["mean"] | None = None  # pools the queries of heads that `share`, before scores

    # RoPE of the queries that score, as `pool: {rotate}` turns keys: at the first or the middle row of
    # a block, once pooled; or each row at its own position, before
    rotate: Literal["first", "centre", "token"] | None = None

    @property
    def together(self) -> bool:
        """Whether rows choose together at all; else only their heads are pooled."""
        return not self.block == self.last == self.tile == self.by
