"""The spec as frozen values: what a sparse attention means, and the range of each single value.

Reads no text and judges no two values against each other: `reader` and `rules` do.  Annotations are no
strings here: pydantic would compile each of them again, a third of what `hsgen check` takes.

    scalars   single values, and the range of each
    permutes  orders that entries are cut from
    entries   partitions and pools
    codes     vectors as numbers of codewords
    scores    what entries are ordered by
    queries   which rows score and choose together
    choices   which entries are kept
    routes    which of several ways is taken
    branches  what is attended, and how branches are combined
    reuse     what a call takes over from earlier ones
    losses    what a call tells a training besides
    whole     a level, and the spec
"""

from hsgen.spec.model.branches import Attend, Combine, Delta, GridWindow, HeadSpan, Spans, Static
from hsgen.spec.model.choices import (
    SELECT_RULES,
    EarlyStop,
    Force,
    Select,
    SelectRule,
    Tier,
    TopP,
    Where,
)
from hsgen.spec.model.codes import Codes
from hsgen.spec.model.entries import (
    Blocks,
    Clusters,
    Diagonals,
    Halving,
    KeyPool,
    LearnedTree,
    Partition,
    Parts,
    Pool,
    Ragged,
    Rotate,
    Stripes,
    Tokens,
    ValuePool,
)
from hsgen.spec.model.losses import Distill, DualEntropy, Kl, Loss
from hsgen.spec.model.permutes import Gather, KMeans, Order, Permute, SortInSegment, Tile
from hsgen.spec.model.queries import Query, QueryPool
from hsgen.spec.model.reuse import Reuse, Turn
from hsgen.spec.model.routes import Route, RouteBy, Statistic
from hsgen.spec.model.scalars import (
    LANGUAGE,
    MAX_AXES,
    MAX_BRANCHES,
    MAX_CALLS,
    MAX_COUNT,
    MAX_FORCED,
    MAX_LEVELS,
    MAX_SPANS,
    MAX_WAYS,
    Axis,
    Bound,
    Count,
    Forced,
    Growth,
    Identifier,
    Node,
    Part,
    Path,
    Scale,
    Text,
)
from hsgen.spec.model.scores import MapHow, Reduce, Score, ScoreForm, Share, Stored
from hsgen.spec.model.whole import HeadDim, Heads, Index, Level, Spec

__all__ = [
    "Attend",
    "Axis",
    "Blocks",
    "Bound",
    "Clusters",
    "Codes",
    "Combine",
    "Count",
    "Delta",
    "Diagonals",
    "Distill",
    "DualEntropy",
    "EarlyStop",
    "Force",
    "Forced",
    "Gather",
    "Growth",
    "GridWindow",
    "Halving",
    "HeadDim",
    "HeadSpan",
    "Heads",
    "Identifier",
    "Index",
    "KMeans",
    "KeyPool",
    "Kl",
    "LANGUAGE",
    "Level",
    "MAX_AXES",
    "Loss",
    "MAX_BRANCHES",
    "MAX_CALLS",
    "MAX_COUNT",
    "MAX_FORCED",
    "MAX_LEVELS",
    "MAX_SPANS",
    "MAX_WAYS",
    "MapHow",
    "Node",
    "Order",
    "Part",
    "Partition",
    "Parts",
    "Path",
    "Permute",
    "Pool",
    "Query",
    "QueryPool",
    "Ragged",
    "Reduce",
    "Route",
    "RouteBy",
    "Reuse",
    "Rotate",
    "SELECT_RULES",
    "Scale",
    "Score",
    "ScoreForm",
    "Select",
    "SelectRule",
    "Share",
    "SortInSegment",
    "Spans",
    "Spec",
    "Static",
    "Statistic",
    "Stored",
    "Stripes",
    "Text",
    "Tier",
    "Tile",
    "Tokens",
    "TopP",
    "Turn",
    "LearnedTree",
    "ValuePool",
    "Where",
]
