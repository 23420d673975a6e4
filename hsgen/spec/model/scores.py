"""Scores of entries."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from hsgen.spec.model.codes import Codes
from hsgen.spec.model.scalars import Count, Identifier, Node, Scale

ScoreForm = Literal[
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


# how vectors are kept that are multiplied; see `Index`
Stored = Literal["input", "bf16", "fp8", "fp8_unscaled", "int8", "int4"]


MapHow = Literal["overlap_sum", "overlap_max", "sum", "max", "around", "upsample", "avg_pool"]


Share = Literal["head", "group", "all"]


Reduce = Literal["sum", "mean", "max"]


class Score(Node):
    """form -> scale -> normalise -> reduce over heads -> map; the order of steps is fixed.

    `cosine`: the dot of query and entry key, both at unit length.
    `bound`: the most that a key between an entry's minmax keys can score, channel by channel.
    `index_dot`: index head h scores for the group of key head h.
    `relu_weighted`, `relu_sum`: the sum of relu(dot) over index heads, weighted by `w_index` or not;
    with `share: group` over those of a group, the first Hi / Hkv heads for key head 0 and so on.
    `code_match`: in how many runs of channels query and key have the same code.
    `pooling_error`: how wrong attending an entry as one pooled key and value would be, a token on
    average: of its tokens k, v the mean of |exp(q key - m) value - exp(q k - m) v|^2, where m is the
    greatest logit of what the query sees there; without pooled values of
    (exp(q key - m) - exp(q k - m))^2.
    `bias`: the input `bias` of a token and key head, whatever the query; of an entry, what its
    `pool` makes of them.
    `given`: the input `<level>_score` [B, T, heads that choose, entries], whatever made it.
    `map`: what an entry gets of the scores of the level it takes them from; `upsample`: that of the
    entry that holds it, -inf where that is not complete; `avg_pool`: the mean of the complete ones
    inside it, 0 of none.
    `lse_from`: scores are divided by the sum of exp over that level's entries, or over what that
    branch sees of tokens, so that masses may be above 1 and need not add up to 1.
    """

    renamed: ClassVar[Mapping[str, str]] = {"from": "source"}
    form: ScoreForm | None = None
    codes: Codes | None = None  # what `code_match` compares
    dtype: Stored | None = None  # what queries and entry keys are rounded to, as in `index`
    source: Identifier | None = None  # the level whose scores are mapped
    map: MapHow | None = None
    width: Count | None = None  # of `around`: as many entries, the same one in their middle, summed
    scale: Scale | Literal["none"] | None = None  # None: 1, or 1/sqrt(qk dim) for dot and bound
    # learned: the mean input `bias` of an entry's tokens is added to the scaled scores of the key
    # head's group; log_count: the natural logarithm of how many tokens it has
    bias: Literal["learned", "log_count"] | None = None
    # softmax: each entry's part of the row's mass; max: exp(score - the greatest of the row)
    normalise: Literal["softmax", "max"] | None = None
    # the level, or if none is called so the branch, whose log-sum-exp normalises; None: its own
    lse_from: Identifier | None = None
    share: Share = "head"
    reduce: Reduce | None = None

    @property
    def by_index(self) -> bool:
        """Whether queries and keys are those of the index."""
        return self.form in ("index_dot", "relu_weighted", "relu_sum")

    @property
    def sums_index(self) -> bool:
        """Whether the score is a sum over heads of the index."""
        return self.form in ("relu_weighted", "relu_sum")

    @property
    def by_bias(self) -> bool:
        """Whether the input `bias` is all that scores, or some of it."""
        return self.form == "bias" or self.bias == "learned"
