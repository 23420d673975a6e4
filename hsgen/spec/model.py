"""The spec as frozen values: what a sparse attention means, and the range of each single value.

Reads no text and judges no two values against each other: `reader` and `rules` do.
"""

from __future__ import annotations

import hashlib
import json
import keyword
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr
from pydantic.config import JsonDict

from hsgen.errors import ArgumentError, Span

Path = tuple[str | int, ...]  # fields from the Spec down: ("levels", 0, "score", "form")

MAX_COUNT = 1 << 24
MAX_FORCED = 1 << 20
MAX_LEVELS = 16
MAX_BRANCHES = 16
MAX_SPANS = 256
LANGUAGE = 1


def _no_keyword(name: str) -> str:
    """Names become parts of emitted names, so Python's own words are not among them."""
    if keyword.iskeyword(name):
        msg = "a word of Python"
        raise ValueError(msg)
    return name


def _one_line(text: str) -> str:
    if not text.isprintable():
        msg = "not one printable line"
        raise ValueError(msg)
    return text


# a JSON Schema learns of no validator, so each is said once more in its words
_NO_KEYWORD: JsonDict = {"not": {"enum": [*keyword.kwlist]}}
# about printable: the rest of it are classes of Unicode that not every editor's patterns know
_ONE_LINE: JsonDict = {"pattern": r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"}

Identifier = Annotated[
    str,
    Field(pattern=r"^[a-z][a-z0-9_]{0,47}$", json_schema_extra=_NO_KEYWORD),
    AfterValidator(_no_keyword),
]
Text = Annotated[str, Field(max_length=200, json_schema_extra=_ONE_LINE), AfterValidator(_one_line)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
Forced = Annotated[int, Field(strict=True, ge=0, le=MAX_FORCED)]
# scores are float32: outside this range they all become 0 or infinite
Scale = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
Bound = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
# parts of a whole are counted in units of 2^-30; the smallest part is far above one unit
Part = Annotated[float, Field(ge=1e-6, le=1.0, allow_inf_nan=False)]
Growth = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]

SelectRule = Literal["top_k", "beam", "fraction", "threshold", "top_p"]
SELECT_RULES: tuple[SelectRule, ...] = get_args(SelectRule)
KeyPool = Literal["mean", "max", "minmax", "sum_rsqrt", "linear"]
ValuePool = Literal["mean", "max", "sum_rsqrt", "linear"]
ScoreForm = Literal["dot", "bound", "index_dot", "relu_weighted"]
MapHow = Literal["overlap_sum", "overlap_max", "sum", "max"]
Share = Literal["head", "group", "all"]
Reduce = Literal["sum", "mean", "max"]


class Node(BaseModel):
    """A frozen mapping of the spec; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class Heads(Node):
    """How many heads; query heads of one group share a key/value head.  `group = query / kv`."""

    query: Count  # of the query and of the output
    kv: Count  # of keys and values

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.query // self.kv


class HeadDim(Node):
    """Length of one head's query/key vector, and of its value vector."""

    qk: Count  # of a query and of a key
    v: Count  # of a value and of the output


class Index(Node):
    """A separate low-cost scorer: `q_index [B,T,Hi,Di]`, `k_index [B,S,Di]`, `w_index [B,T,Hi]`."""

    heads: Count  # of the index's queries
    dim: Count  # length of one head's query, and of a key
    dtype: Literal["input"] = "input"  # scores are of tensors as they are given
    keys: Literal["shared"] = "shared"  # all heads of the index have the same keys


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

    kind: Literal["blocks"] = "blocks"
    size: Count  # tokens of one block
    stride: Count  # from one block's start to the next; in YAML by default the block's size


Partition = Tokens | Blocks


class Pool(Node):
    """One vector an entry, in float32.

    `linear`: sum over slots of (token + position) @ weight.  `sum_rsqrt`: the sum by the root of the
    number of tokens.  `minmax`: two vectors, the least and the greatest of every channel.
    """

    keys: KeyPool | None = None
    values: ValuePool | None = None
    position: Literal["learned"] | None = None


class Score(Node):
    """form -> scale -> normalise -> reduce over heads -> map; the order of steps is fixed.

    `bound`: the most that a key between an entry's minmax keys can score, channel by channel.
    `index_dot`: index head h scores for the group of key head h.
    """

    form: ScoreForm | None = None
    source: Identifier | None = None  # YAML key `from`: the level whose scores are mapped
    map: MapHow | None = None
    scale: Scale | Literal["none"] | None = None  # None: 1, or 1/sqrt(qk dim) for dot and bound
    normalise: Literal["softmax"] | None = None
    lse_from: Identifier | None = None  # the level whose log-sum-exp normalises; None: its own
    share: Share = "head"
    reduce: Reduce | None = None

    @property
    def by_index(self) -> bool:
        """Whether queries and keys are those of the index."""
        return self.form in ("index_dot", "relu_weighted")


class Force(Node):
    """Entries taken whatever their score: the first ones, and the last ones, own included."""

    first: Forced = 0
    last: Forced = 0
    counted: bool = True  # inside `top_k`; false: on top of it


class TopP(Node):
    """Best entries first, until their masses reach `mass` of the total: how many is the data's say.

    `boundary`: whether the entry that crosses is kept.  `scope`: the total of a row, or of all rows
    of a head, which are then ranked together.  `min` and `max` entries a row, whatever the masses.
    """

    mass: Part
    boundary: Literal["keep", "drop"] = "keep"
    scope: Literal["row", "head"] = "row"
    min: Forced = 0
    max: Count | None = None


class Select(Node):
    """Keep the best: `beam` entries are expanded by a level below, the others are attended.

    `fraction`: of a row's visible entries, rounded up.  `threshold`: every score above it.
    """

    top_k: Count | None = None
    beam: Count | None = None
    fraction: Part | None = None
    threshold: Bound | None = None
    top_p: TopP | None = None
    force: Force = Force()

    @property
    def rules(self) -> tuple[SelectRule, ...]:
        """The rules that are given; a valid spec has one."""
        return tuple(rule for rule in SELECT_RULES if getattr(self, rule) is not None)

    @property
    def counts_vary(self) -> bool:
        """Whether rows differ in how many entries they keep, so that they are bitmaps, not lists."""
        return not self.budget

    @property
    def budget(self) -> int:
        """The number kept before uncounted forced entries are added; 0 where counts vary."""
        return self.top_k or self.beam or 0

    @property
    def width(self) -> int:
        """Slots of one row of the selection, where counts do not vary."""
        extra = 0 if self.force.counted else self.force.first + self.force.last
        return self.budget + extra


class Level(Node):
    """One scored partition of the keys; `within` narrows it to children of another level's beam."""

    name: Identifier  # what other levels and branches call it
    within: Identifier | None = None  # the level above, whose survivors' children are scored
    partition: Annotated[Partition, Field(discriminator="kind")]  # what an entry is
    kv: Identifier | None = None  # pools `k_<kv>`, `v_<kv>` instead of `k`, `v`
    pool: Pool | None = None
    score: Score
    select: Select | None = None


class HeadSpan(Node):
    """What one head sees of a `static` rule.  Of N units it sees the last
    window + grow * max(0, N - window), rounded down, and the first `sink`.
    """

    window: Count
    grow: Growth = 0.0
    sink: Forced = 0


class Static(Node):
    """A pattern that depends on positions and heads alone: the union of the rules that are given.

    Positions are counted in units of `blocks` tokens.  A query in unit m sees a unit n at distance
    d = m - n (|m - n| without causality), by head h, where

        d < window * dilation and dilation divides d;  n < sink;
        stride divides n + 1 + shift * h;  power_of_two, and d is 0 or a power of two.

    `per_head` gives windows and sinks head by head, over and over until every head has one.
    """

    blocks: Count = 1
    window: Count | None = None
    dilation: Count = 1
    sink: Forced = 0
    stride: Count | None = None
    shift: Forced = 0
    power_of_two: bool = False
    per_head: Annotated[tuple[HeadSpan, ...], Field(max_length=MAX_SPANS)] = ()


class Attend(Node):
    """One branch: raw tokens of selected entries, pooled entries, the last `window` tokens or all of
    them, or what a `static` rule says.
    """

    name: Identifier
    over: Identifier | None = None
    window: Count | Literal["all"] | None = None
    static: Static | None = None
    values: Literal["raw", "pooled"] = "raw"
    kv: Identifier | None = None  # attends `k_<kv>`, `v_<kv>` instead of `k`, `v`


class Combine(Node):
    """`gates`: o = sum of gate * branch.  `softmax`: one softmax over the union of all branches."""

    gates: Literal["input"] | None = None
    softmax: Literal["union"] | None = None


class Spec(Node):
    """What an attention means.  Equal text up to comments and layout gives an equal Spec."""

    hsgen: Literal[1] = 1  # version of the language
    name: Identifier  # of the spec, and of what is compiled from it
    source: Text | None = None  # where it was published, as arXiv:2502.11089
    heads: Heads | None = None  # None: bound at load_kernel
    head_dim: HeadDim | None = None
    causal: bool = True  # a row sees no token after its own
    index: Index | None = None
    levels: Annotated[tuple[Level, ...], Field(max_length=MAX_LEVELS)] = ()  # earlier first
    attend: Annotated[tuple[Attend, ...], Field(min_length=1, max_length=MAX_BRANCHES)]
    combine: Combine | None = None

    # where each field stood in the text; no part of the value
    _spans: Mapping[Path, Span] = PrivateAttr(default_factory=dict[Path, Span])

    def __eq__(self, other: object) -> bool:
        """Compare what is meant and where it was published, not where the text stood."""
        return isinstance(other, Spec) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def level(self, name: str) -> Level:
        """The level called `name`; KeyError where there is none."""
        return {level.name: level for level in self.levels}[name]

    @property
    def index_per_key_head(self) -> bool:
        """Whether index head h stands for key head h, so that there are as many of both."""
        return any(level.score.form == "index_dot" for level in self.levels)

    @property
    def digest(self) -> str:
        """sha256 of the meaning: all fields but `source`, defaults filled in."""
        fields = _without_news(self.model_dump(mode="json", exclude={"source"}))
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def spans(self) -> Mapping[Path, Span]:
        """Where the text says each field; empty where the Spec was built in Python."""
        return MappingProxyType(dict(self._spans))

    def span(self, *path: str | int) -> Span | None:
        """The place of a field, or of the nearest thing around it: `span("levels", 0, "pool")`."""
        for end in range(len(path), -1, -1):
            if found := self._spans.get(path[:end]):
                return found
        return None

    def located(self, spans: Mapping[Path, Span]) -> Spec:
        """The same Spec that knows where its fields stood."""
        located = self.model_copy()
        located._spans = dict(spans)
        return located

    def bind(
        self,
        *,
        heads: Heads | tuple[int, int] | None = None,
        head_dim: HeadDim | tuple[int, int] | int | None = None,
    ) -> Spec:
        """Fill in what the text left open.

        Args:
            heads: `Heads`, or (query, kv).
            head_dim: `HeadDim`, (qk, v), or one number for both.

        Raises:
            ArgumentError: the text says otherwise, or query is no multiple of kv.
        """
        if isinstance(heads, tuple):
            heads = Heads(query=_count("heads", heads[0]), kv=_count("heads", heads[1]))
        if isinstance(head_dim, int):
            head_dim = (head_dim, head_dim)
        if isinstance(head_dim, tuple):
            qk, v = (_count("head_dim", number) for number in head_dim)
            head_dim = HeadDim(qk=qk, v=v)
        if heads is not None and heads.query % heads.kv:
            msg = f"heads: expected query to be a multiple of kv, {heads.kv}, got {heads.query}"
            raise ArgumentError(msg)
        bound = self._bound("heads", heads)._bound("head_dim", head_dim)
        return bound.located(self._spans)

    def _bound(self, field: str, value: Heads | HeadDim | None) -> Spec:
        said: Heads | HeadDim | None = getattr(self, field)
        if value is None or value == said:
            return self
        if said is not None:
            msg = f"{field}: expected {said!r} as the spec '{self.name}' says, got {value!r}"
            raise ArgumentError(msg, span=self.span(field))
        return self.model_copy(update={field: value})


# keys that the language got later: a spec that does not say them keeps the digest it had before
_NEWS = {"fraction", "threshold", "top_p", "static", "lse_from"}


def _without_news(fields: object) -> object:
    """Fields of a dump without those that are new and say nothing."""
    if isinstance(fields, list):
        return [_without_news(item) for item in cast("list[object]", fields)]
    if not isinstance(fields, dict):
        return fields
    items = cast("dict[str, object]", fields).items()
    return {key: _without_news(x) for key, x in items if key not in _NEWS or x is not None}


def _count(name: str, value: int) -> int:
    """A number that pydantic would take for a Count, or an error in our own form."""
    if isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        msg = f"{name}: expected a whole number from 1 to {MAX_COUNT}, got {value!r}"
        raise ArgumentError(msg)
    return value
