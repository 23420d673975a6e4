"""The operators: small frozen classes in a closed union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["input", "f32", "i32"]  # input: the dtype of the query tensor


Role = Literal[
    "query",
    "keys",
    "values",
    "index_query",
    "index_keys",
    "index_weights",
    "codebook",
    "scores",
    "split",
    "order",
    "starts",
    "bias",
    "gates",
    "output_gate",
    "route",
    "pool_gates",
    "angles",
    "parameter",
    "state",
]


Which = Literal["own", "kept", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A tensor the caller passes, by name."""

    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisTile:
    """Tiles along one axis of the tokens: so many steps of its length."""

    length: int
    tile: int

    def __str__(self) -> str:
        return f"{self.tile} of {self.length}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The cluster of every token.  keys -> i32[B, S, Hkv]; of queries, of every row: i32[B, T, Hq]

    Lloyd's algorithm from tokens evenly spaced, see the language's `kmeans`; or the `tiles` of axes,
    whatever the keys, in which case there are no iterations.
    """

    level: str
    clusters: int
    iterations: int | None
    tiles: tuple[AxisTile, ...] | None = None
    of: Literal["queries"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Permute:
    """The token of every slot, head by head, -1 of none.  operands -> i32[B, S, Hkv]

    `mass` (keys, query) and `mean` (keys) sort inside whole segments, greatest first, by the mean
    softmax mass that the last `last` rows give and by the dot product with the segment's mean;
    `clusters` (clusters) puts one after another, `given` (order) takes what is a permutation.
    """

    level: str
    by: Literal["mass", "mean", "clusters", "given"]
    segment: int | None
    last: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """The node of every token at one level of a learned tree, -1 of none; see the language's `tree`.

    keys, centroids, [nodes above] -> i32[B, S, Hkv]

    Node e is a child of node e // branching above; with `capacity` it keeps its nearest tokens.
    `takes`: whether a node has each token, i32[B, S, Hkv, nodes], 1 of so many nearest ones.
    """

    level: str
    nodes: int
    branching: int
    capacity: float | None
    takes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The run of every token, counted from 0; see the language's `ragged`.  operand -> i32[B, S]

    keys, whose means over `span` tokens on either side are compared with `threshold`; or starts.
    """

    level: str
    span: int | None
    threshold: float | None


Cut = Literal["order", "clusters", "nodes", "runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """Entries that lie behind each row, at p + 1 - i ** power for every i from `first` on."""

    power: int
    first: int

    def __str__(self) -> str:
        return f"[i^{self.power} from {self.first}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """What of the tokens before an anchor is attended; see the language's `spans`."""

    anchors: Anchors
    factor: float
    power: float
    window: int

    def __str__(self) -> str:
        return f"[{self.factor} p^{self.power} before {self.anchors} window={self.window}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Summarise each entry by one float32 vector.

    x, [gates], [weight, [out]], [position], [order] -> [B, N, H, D]

    `minmax` makes two, the least and the greatest of every channel: [B, N, H, 2, D].  `antidiagonal`
    puts an entry's tokens side by side, 0 where one is not there: [B, N, H, size*D].  `cut`: entries
    are blocks of an order's slots, or clusters, as the last operand has them.  `before`: entries
    begin so many tokens before their place, entry * stride.  `gated` weighs tokens by a softmax of
    gates and position, of each channel or one of all.  `series`: of x and gates slot s takes series
    s // stride.  `centroid`: x is the centroids of nodes, [H, N, D].  See the language's `pool` for
    the others.
    """

    level: str
    how: Literal[
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
    size: int
    stride: int
    position: bool
    cut: Cut | None = None
    before: int | None = None
    softmax: Literal["channel", "token"] | None = None
    series: int | None = None
    seed: int | None = None  # of `sample`


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS norm of an entry's key, eps 1e-6.  x, weight -> the same"""

    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """RoPE of a level's keys, of entries or, `at` token, of what they are pooled from.

    x, [cos, sin of every position] -> the same.  Entry i lies at i * stride, or at its centre.
    `rows`: x are queries, of blocks of so many rows or, `at` token, of each row.
    """

    level: str
    at: Literal["first", "centre", "token"]
    dims: int
    base: float | None
    channels: Literal["first", "last"]
    pairs: Literal["halves", "neighbours"]
    size: int
    stride: int
    before: int | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """What `code_match` compares; see the language's `codes`."""

    words: int
    dim: int
    distance: Literal["l1", "l2"]
    buckets: int | None

    def __str__(self) -> str:
        buckets = f" in {self.buckets} buckets" if self.buckets else ""
        return f"[{self.words} of {self.dim} {self.distance}{buckets}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRows:
    """One query for the rows that choose together.  query [B, T, H, D], [order] -> f32[B, R, H, D]

    R is T/block: rows t // block; T/4x4, of tiles along axes; or 1: the `last` ones, for all.  With
    `cut`, rows are those of clusters, head by head, of which R is the number.
    `antidiagonal` puts them side by side, last first, divided by how many they are:
    [B, R, H, block*D].
    """

    level: str
    how: Literal["mean", "max", "first", "antidiagonal"]
    block: int | None
    last: int | None
    tiles: tuple[AxisTile, ...] | None = None
    clusters: int | None = None
    cut: Cut | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHeads:
    """The mean of the queries, or of the keys, of heads that agree.  [B, R, H, D] -> f32[B, R, H', D]"""

    level: str
    share: Literal["group", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Score entries of a level.

    query, entry keys, [index weights or codebook], [entry biases], [keys, [entry values, values]],
        [cut], [parent selection], [recalled selection] -> f32[B, R, H, N]

    Of a single row, R = T, the complete entries count; of a query that stands for several, those that
    begin by the last of its rows.

    `cosine` is a dot of unit vectors.  `relu_weighted` and `relu_sum`, which has no weights, sum index
    heads themselves, all of them or with `grouped` those of each group; those of `index_dot` stand for
    the key heads.  `bound` reads minmax keys.  `bias` has no query: its keys are the biases of entries,
    one a key head; of other forms they are added, where they are `biased`.  `given` reads scores, and
    nothing else.  `pooling_error` reads what was pooled as well.  `counted`: the logarithm of an entry's
    tokens is added.  With `within`, only children of the parent selection are scored: f32[B, T, H, C].
    `among`: only entries of one more operand, a recalled selection; with `rows` chosen, none of a
    row whose own token is in no entry of it.  `cut`: the order says which
    tokens an entry has; or which node or run each token is in, of the level's own, or of the parent's
    where entries are tokens; a node exists for a row once a token is in it, and a run is complete
    once the next has begun.  `anchors`: entries are tokens behind each row, and keys those of tokens.
    `halves`: keys are those of tokens, and an entry's score is the best of those that halving it comes
    upon.  `diagonal`: entry i of a row is the token i before it.
    """

    level: str
    form: Literal[
        "dot",
        "cosine",
        "bound",
        "index_dot",
        "relu_weighted",
        "relu_sum",
        "code_match",
        "pooling_error",
        "bias",
        "given",
    ]
    scale: float | None  # None: 1/sqrt(qk dim), not bound yet
    size: int
    stride: int
    within: str | None
    grouped: Literal[True] | None = None
    codes: Codes | None = None  # of `code_match`
    biased: Literal[True] | None = None
    among: bool | None = None
    rows: Literal["chosen"] | None = None
    parts: int | None = None  # entries: so many equal parts of what a row sees
    counted: Literal[True] | None = None
    cut: Cut | None = None
    anchors: Anchors | None = None
    halves: Halves | None = None
    diagonal: Literal[True] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Vectors as they are kept in fewer bits, in float32; see the language's `index: {dtype}`."""

    dtype: Literal["bf16", "fp8", "fp8_unscaled", "int8", "int4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSumExp:
    """Natural log of the sum of exp over visible entries.  f32[B, H, T]

    Of a score it is a pass of its own; of an attend or a union, a by-product.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalise:
    """exp(score - lse): the softmax mass of each entry.  score, [lse] -> f32[B, T, H, N]

    With the log-sum-exp of another level's scores or of an attend, masses are 0 where that has no
    entry.  `by` max: exp(score - the greatest of the row), which reads no log-sum-exp.
    """

    level: str
    by: Literal["max"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Make heads agree.  f32[B, T, H, N] -> f32[B, T, H', N]"""

    share: Literal["group", "all"]
    how: Literal["sum", "mean", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceRows:
    """Scores of rows as scores of those that choose together.  f32[B, T, H, N] -> f32[B, R, H, N]

    R is as in PoolRows; rows may be groups of fewer rows already.  An entry counts 0, or for `max`
    nothing, where a row does not see it; of mapped scores, where a row sees none of its sources.
    """

    level: str
    how: Literal["sum", "mean", "max"]
    block: int | None
    last: int | None
    tiles: tuple[AxisTile, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Intervals that are halved until they are so long; see the language's `halving`.

    With `rows`, those that it puts together search as one, by their logits so reduced.
    """

    until: int
    rows: ReduceRows | None

    def __str__(self) -> str:
        if self.rows is None:
            return f"[until {self.until}]"
        which = self.rows.block or self.rows.last or "tiles of"
        return f"[until {self.until} by the {self.rows.how} of {which} rows]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """Carry scores to another level: entry j gathers source entries j * ratio + offset.

    score, [runs] -> f32[B, T, H, N].  `taps` are (offset, weight) pairs; sources that do not exist or
    are incomplete count nothing.  `mean` is over those that do.  `upsample` takes the source entry
    j // ratio, or the run that token j is in, -inf of an incomplete one.  `size` and `stride` are of
    the entries that are made.
    """

    level: str
    how: Literal["overlap_sum", "sum", "max", "mean", "upsample"]
    size: int
    stride: int
    ratio: int
    taps: tuple[tuple[int, int], ...]
    before: int | None = None
    cut: Literal["runs"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """Keep the best entries of each row, ascending, -1 padded.  f32[B, T, H, N] -> i32[B, T, H, K]

    With `within`, only children of the parent selection (second input) are candidates.  The entries
    that the level `joined` selects (next input) are forced, and those with one of the first `sink`
    tokens; `cut`: the order (next input) says which these are, or as in Score.  With `when`, heads
    that the route (last input) sends another way keep none.  `diagonal`: entries are counted
    back from the row's own.
    """

    level: str
    size: int
    stride: int
    k: int
    width: int
    first: int
    last: int
    counted: bool
    final: bool  # attended (top_k), or only expanded (beam)
    within: str | None
    tail: Literal[True] | None = None  # the row's own entry while incomplete, on top
    when: str | None = None
    joined: str | None = None
    before: int | None = None
    sink: int | None = None
    cut: Cut | None = None
    diagonal: Literal[True] | None = None
    ways: tuple[int, ...] | None = None  # of schedules alone: the route's numbers that are `when`


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlike:
    """Where the keys of an entry, or the queries of rows that choose together, are not alike.

    query, keys -> i32[B, R, Hq, N], 1 where one of the two has a mean cosine of all its pairs of at
    most `similarity`.  R is T/block.  `centred`: keys less their mean.
    """

    level: str
    similarity: float
    centred: bool
    block: int
    size: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """The parts of a pyramid: (merge, part, least) of each tier, parts in units of 2^-30.

    Both parts are of all up to that tier: of the mass or of the candidates, and of the candidates.
    """

    by: Literal["fraction", "mass"]
    steps: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        steps = (f"x{merge}:{part}/{least}" for merge, part, least in self.steps)
        return f"[{self.by} {' '.join(steps)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSet:
    """Keep entries by a rule that lets counts vary.  score, ... -> i32[B, T, H, W], bitmap rows

    `fraction` of the candidates, or `of` all entries, rounded up; scores above a `threshold`; the
    best until their mass reaches a part of the total, `top_p`, where `boundary`, `least` and `most`
    count; `top_k`, or as many as `tokens` fill, in both of which a head may keep more than another;
    by `tiers` of a `quota`, a bitmap each; `step` entries at a time, until a step adds less than
    `value` to the softmax of all rows and heads that choose together (`early_stop`), where query and
    keys are inputs, and the log-sum-exp that the walk begins with, if any.
    `scope`: rows of a head, heads of a row, or rows of an entry are ranked together.  `rest`: forced
    entries are neither ranked nor part of a total.  `budget_from`: as many as another level keeps,
    whose selection is the next operand; where that is of one row for all and this is not, the part of
    its candidates that it keeps, of those here, rounded up, all forced ones and the `least`, head by
    head of the finer one.  `budget_in` tokens: as many as hold more of them than it keeps.  `where`:
    entries of the next operand are forced.
    `apart`: what begins before the token of the next operand and what does not are chosen apart.
    `sink`, `cut`, `when` and `diagonal` as in Select.
    """

    level: str
    size: int
    stride: int
    rule: Literal[
        "fraction",
        "threshold",
        "top_p",
        "top_k",
        "tokens",
        "quota",
        "early_stop",
        "budget_from",
    ]
    value: float
    first: int
    last: int
    counted: bool
    boundary: Literal["keep", "drop"] | None = None
    scope: Literal["row", "head", "heads", "entry"] | None = None
    least: int | None = None
    most: int | None = None
    tail: Literal[True] | None = None
    when: str | None = None
    of: Literal["all", "rest"] | None = None
    before: int | None = None
    parts: int | None = None
    tiers: Tiers | None = None
    step: int | None = None
    sink: int | None = None
    cut: Cut | None = None
    budget_from: str | None = None
    budget_in: Literal["tokens"] | None = None
    where: Literal[True] | None = None
    apart: Literal["input"] | None = None
    diagonal: Literal[True] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Keys that come back from thresholded changes, from token to token.  keys -> f32, the same

    See the language's `delta`.
    """

    threshold: float
    against: Literal["previous", "kept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisWindow:
    """A window along one axis of the tokens; see the language's `grid`."""

    length: int | None  # None: bound later, or as long as the tokens need
    window: int
    stride: int
    dilation: int
    causal: bool

    def __str__(self) -> str:
        said = [f"{self.window} of {self.length or 'any'}"]
        said += [f"by {self.stride}"] if self.stride > 1 else []
        said += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        return " ".join([*said, *(["causal"] if self.causal else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What a static attend shows, in units of `size` tokens; see the language's `static`.

    `spans` are (window, growth, sink) of heads, over and over; growth is in units of 2^-30.  `axes`
    are a window of tokens along each axis, the last one fastest; none where there is no such window.
    `by_way`: spans are those of the ways of a sequence, one that is none of them sees nothing; `by_head`:
    of those of a head.
    """

    spans: tuple[tuple[int, int, int], ...]
    dilation: int
    stride: int | None
    shift: int
    power_of_two: bool
    axes: tuple[AxisWindow, ...] = ()
    by_way: bool = False  # of schedules alone: a route and its branches, as one branch
    by_head: bool = False  # likewise, of a way of each head

    def __str__(self) -> str:
        if self.axes and self.without_units:
            return f"[{' x '.join(map(str, self.axes))}]"
        spans = " ".join(f"{window}+{growth}N/{sink}" for window, growth, sink in self.spans)
        strided = f" stride={self.stride} shift={self.shift}" if self.stride else ""
        powers = " power_of_two" if self.power_of_two else ""
        axes = f" or {' x '.join(map(str, self.axes))}" if self.axes else ""
        return f"[{spans} dilation={self.dilation}{strided}{powers}{axes}]"

    @property
    def without_units(self) -> bool:
        """Whether no rule counts units, so that all that is shown lies in the windows of `axes`."""
        return not (any(map(any, self.spans)) or self.stride or self.power_of_two)

    @property
    def most_units(self) -> int | None:
        """Units that a row sees at most, of windows and sinks that do not grow; None of other rules."""
        if self.axes or self.stride or self.power_of_two or self.grows:
            return None
        return max(window + sink for window, _, sink in self.spans)

    @property
    def grows(self) -> bool:
        """Whether windows depend on the length of the whole sequence."""
        return any(growth for _, growth, _ in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """One softmax over one branch's keys.

    query, keys, values, [selection, [scores]], [bias], [far keys], [cut], [row cut], [sink], [route]
        -> [B, T, Hq, Dv]

    A query may be one of rows together, all of which put out the same.

    `over`: blocks of a selection, tokens of a selection, every pooled entry that is complete and has a
    token or, with a selection, those of them that are selected, the last `window` tokens, what a
    static `pattern` of units of `size` tokens shows, or all tokens.  `latent`: values are the first Dv
    channels of keys.
    `cut`: blocks are those of an order's slots, clusters, nodes or runs, as that operand has them.
    `parts`: they are as many equal parts of what a row sees.  `tiers`: entries as means of `merges`
    tokens, tier by tier, 1 as they are.  `which`: pooled entries that are not selected.  `counted`:
    the logarithm of the tokens that a pooled key stands for is added.  `near`: of the last so many
    tokens a row reads the keys, of others the far keys.  `rows`: one that does not see its own token
    sees none.  `spans`: of each selected anchor its span, with a softmax of its own; the output is
    their mean by the softmax of their scores.  `softmax`: so has each selected entry, and the output
    is the mean of those of which the row sees a token.  `diagonal`: entry i of a row is block
    row // size - i.  `row_cut`: rows of the selection are clusters, as that operand has the rows.  With
    `when`, heads that the route sends another way see nothing.
    """

    branch: str
    over: Literal["blocks", "tokens", "spans", "pooled", "tiers", "window", "static", "all"]
    scale: float | None  # None: 1/sqrt(qk dim), not bound yet
    size: int
    stride: int
    window: int | None
    pattern: Pattern | None = None
    cut: Cut | None = None
    before: int | None = None
    latent: Literal[True] | None = None
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sink: Literal[True] | None = None  # one more logit a head, in the denominator only
    biased: Literal[True] | None = None  # the bias of each key and key head is added to its logits
    when: str | None = None
    parts: int | None = None
    merges: tuple[int, ...] | None = None
    which: Literal["skipped"] | None = None
    counted: Literal[True] | None = None
    near: int | None = None
    rows: Literal["chosen"] | None = None
    spans: Spans | None = None
    diagonal: Literal[True] | None = None
    row_cut: Cut | None = None
    softmax: Literal["entry"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which way each takes, a number into `ways`.  [number of the layer, or of the way] -> i32

    `divergence` reads two scores of the last rows instead, f32[B, 1, Hq, N]: where the root of the
    Jensen-Shannon divergence of their parts of their sums is less than that, the first of `ways`.

    One number for a layer, i32[1]; for each head, i32[Hq]; for each sequence, i32[Z], or both.
    `places` are places in `ways`: where they repeat, layer or head i is at place i, over and over,
    and else the operand is a number into them, any other number no way at all.
    """

    by: Literal["layer", "head", "sample", "sample_head"]
    ways: tuple[str, ...]
    places: tuple[int, ...]
    repeats: bool
    divergence: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The branch on whose way a head is, of which it has one at most.  branches... -> [B, T, Hq, Dv]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """o = sum over c of gates[..., c] * branch c.  gates, branches... -> [B, T, Hq, Dv]

    With `column`, one branch times that gate, as an output of its own.  `each` channel has a gate of
    its own: gates[..., c, :].
    """

    column: int | None = None
    each: Literal["channel"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """One softmax over the union of the branches' keys, a raw token counted once.

    branches..., [sink] -> [B, T, Hq, Dv]
    """

    sink: Literal[True] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGate:
    """o * sigmoid(gate), by channel or by head.  gate, o -> [B, T, Hq, Dv]"""

    each: Literal["channel", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Which call of a pass chooses, and which takes over; see the language's `reuse`."""

    over: Literal["layers", "steps"]
    dense: int
    lead: int
    every: int | None
    pattern: str | None

    def __str__(self) -> str:
        rule = f"every={self.every}" if self.every else self.pattern or "once"
        return f"[{self.over} dense={self.dense} lead={self.lead} {rule}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """The set that a call takes, by its turn.  [own], [kept], calls -> i32[B, T, H, K], or bitmap rows

    The own choice may be one of rows together, and is then that of each of them.
    `takes` tells it of a dense, a fresh and a shared call: its `own` choice, the `kept` one, or `all`
    visible entries; an operand that it does not name is not there.  calls: how many there were.
    `width`: slots of a row that the caller brings whatever the call, which then has no number; 0: as many as
    it has.  `block`: rows of a block that chose together, of which each brings what it chose.
    """

    level: str
    size: int
    stride: int
    turns: Turns
    takes: tuple[Which, Which, Which]
    width: int | None = None
    block: int | None = None
    part: float | None = None  # of the entries a list has at most, if that is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """Scores over calls: of a shared one the kept ones, or with those added.  score, kept, calls -> same

    Of rows that choose together, one of each.
    """

    level: str
    turns: Turns
    how: Literal["keep", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(attention || scores), mean over rows.  score, query, keys, [selection] -> f32[]

    Attention is summed, or its maximum is taken, over `heads` that share a score and `tokens` of an
    entry, and over `rows` that choose together.  `masses`: the scores are shares already, not
    logarithms of them.
    """

    level: str
    size: int
    stride: int
    over: Literal["all", "selected"]
    heads: Literal["sum", "max"]
    tokens: Literal["sum", "max"]
    masses: bool
    scale: float | None  # None: 1/sqrt(qk dim), not bound yet
    rows: Literal["sum", "max"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far two branches are apart, mean over numbers.  student, teacher -> f32[]"""

    form: Literal["mse", "smooth_l1"]
    toward: Literal["teacher", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropies:
    """Affinity less balance of a learned tree; see the language's `dual_entropy`.  -> f32[]

    query, keys and centroids of each level, from the root down.
    """

    levels: tuple[str, ...]
    branching: tuple[int, ...]
    temperature: float
    balance: float


Op = (
    Input
    | Cluster
    | Permute
    | Assign
    | Runs
    | Pool
    | PoolRows
    | PoolHeads
    | Norm
    | Rotate
    | Score
    | Round
    | LogSumExp
    | Normalise
    | Reduce
    | ReduceRows
    | Map
    | Select
    | SelectSet
    | Unlike
    | Delta
    | Attend
    | Route
    | Switch
    | Gate
    | Union
    | OutputGate
    | Recall
    | Carry
    | Divergence
    | Distance
    | Entropies
)
