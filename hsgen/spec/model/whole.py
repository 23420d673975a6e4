"""A level, and the whole spec."""

import hashlib
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, cast

from pydantic import Field, PrivateAttr

from hsgen.errors import ArgumentError, Span
from hsgen.spec.model.branches import Attend, Combine
from hsgen.spec.model.choices import Force, Select
from hsgen.spec.model.entries import Blocks, LearnedTree, Partition, Pool
from hsgen.spec.model.losses import Loss
from hsgen.spec.model.permutes import Permute
from hsgen.spec.model.queries import Query
from hsgen.spec.model.reuse import Reuse
from hsgen.spec.model.routes import Route
from hsgen.spec.model.scalars import (
    MAX_AXES,
    MAX_BRANCHES,
    MAX_LEVELS,
    Axis,
    Count,
    Identifier,
    Node,
    Path,
    Text,
    count,
)
from hsgen.spec.model.scores import Score, Stored


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
    """A separate low-cost scorer: `q_index [B,T,Hi,Di]`, `k_index [B,S,Di]`, `w_index [B,T,Hi]`.

    dtype: `input` as given.  `bf16`, and with that first: `fp8`, e4m3 by a power-of-two scale a vector,
    the least that keeps its greatest number at most 448; `fp8_unscaled`, e4m3 as they are.  `int8` and
    `int4`: the nearest multiples, ties to even, of the 127th or 7th part of a vector's greatest number.
    """

    heads: Count  # of the index's queries
    dim: Count  # length of one head's query, and of a key
    # what queries and entry keys are rounded to before they are multiplied; see `Stored`
    dtype: Stored = "input"
    keys: Literal["shared"] = "shared"  # all heads of the index have the same keys


class Level(Node):
    """One scored partition of the keys; `within` narrows it to children of another level's beam."""

    name: Identifier  # what other levels and branches call it
    within: Identifier | None = None  # the level above, whose survivors' children are scored
    when: Identifier | None = None  # the way of the route on which it selects; None: on every one
    permute: Permute | None = None
    partition: Annotated[Partition, Field(discriminator="kind")]  # what an entry is
    kv: Identifier | None = None  # pools `k_<kv>`, `v_<kv>` instead of `k`, `v`
    # scores by `q_<q>` instead of `q`; where a group shares and nothing reduces, a query for each group
    q: Identifier | None = None
    pool: Pool | None = None
    query: Query | None = None  # which rows choose together; left out: those of `from`, or none
    score: Score
    select: Select | None = None

    @property
    def one_query_a_group(self) -> bool:
        """Whether its own queries are as many as key heads, so that heads share without `reduce`."""
        pooled = self.query is not None and self.query.heads is not None
        return bool(self.q) and self.score.share == "group" and not (self.score.reduce or pooled)

    @property
    def named(self) -> frozenset[str]:
        """The levels that this one names."""
        forced = self.select.force.level if self.select else None
        budget = self.select.budget_from if self.select else None
        names = (self.within, self.score.source, self.score.lse_from, forced, budget)
        return frozenset(name for name in names if name is not None)


class Spec(Node):
    """What an attention means.  Equal text up to comments and layout gives an equal Spec."""

    hsgen: Literal[1] = 1  # version of the language
    name: Identifier  # of the spec, and of what is compiled from it
    source: Text | None = None  # where it was published, as arXiv:2502.11089
    heads: Heads | None = None  # None: bound at load_kernel
    head_dim: HeadDim | None = None
    causal: bool = True  # a row sees no token after its own
    # what tokens lie along, the last axis fastest, as [30, 48, 80] of a video.  `any`: bound later;
    # the first axis, where nothing binds it, is as long as a sequence needs
    axes: Annotated[tuple[Axis, ...], Field(max_length=MAX_AXES)] | None = None
    index: Index | None = None
    route: Route | None = None
    levels: Annotated[tuple[Level, ...], Field(max_length=MAX_LEVELS)] = ()  # earlier first
    attend: Annotated[tuple[Attend, ...], Field(min_length=1, max_length=MAX_BRANCHES)]
    combine: Combine | None = None
    reuse: Annotated[tuple[Reuse, ...], Field(max_length=MAX_LEVELS)] = ()  # by level
    loss: Loss | None = None

    # where each field stood in the text; no part of the value
    _spans: Mapping[Path, Span] = PrivateAttr(default_factory=dict[Path, Span])

    def __eq__(self, other: object) -> bool:
        """Compare what is meant and where it was published, not where the text stood."""
        return isinstance(other, Spec) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def rows_of(self, level: Level) -> Query | None:
        """Which rows of a level choose together; without a word of its own, those of `from`."""
        levels = {other.name: other for other in self.levels}
        for _ in self.levels:  # a chain of `from` is no longer than that
            if level.query is not None or level.score.source not in levels:
                break
            level = levels[level.score.source]
        return level.query if level.query and level.query.together else None

    def summed(self, level: Level) -> Level | Attend | None:
        """The level that `lse_from` names, or else the branch."""
        named = (x for x in (*self.levels, *self.attend) if x.name == level.score.lse_from)
        return next(named, None)

    def part_of(self, level: Level) -> Level | None:
        """The level whose part of its entries is the budget here: its rows are the prompt's last."""
        named = level.select and level.select.budget_from
        other = next((x for x in self.levels if x.name == named), None)
        rows = self.rows_of(other) if other else None
        return other if rows and rows.last and rows != self.rows_of(level) else None

    def own_entries(self, level: Level) -> int:
        """How many entries the own ones of rows that choose together are, at most."""
        rows, stride = self.rows_of(level), level.partition.stride
        block = (rows.block if rows else None) or 1
        if not stride:
            return 1
        nested = block % stride == 0 or stride % block == 0
        return 1 + (block - 1) // stride + (not nested)

    def most_forced(self, level: Level) -> int:
        """How many entries are forced at most: the last ones of each of the rows."""
        if level.select is None:
            return 0
        force = level.select.force
        last = force.last + self.own_entries(level) - 1 if force.last else 0
        return _first_entries(level, force) + last

    def width(self, level: Level) -> int:
        """Slots of one row of a level's selection, where counts do not vary."""
        assert level.select is not None, f"{level.name} does not select"
        force = level.select.force
        more = self.most_forced(level) - force.first - force.last
        return level.select.width + (0 if force.counted else more)

    def level(self, name: str) -> Level:
        """The level called `name`; KeyError where there is none."""
        return {level.name: level for level in self.levels}[name]

    def reuse_of(self, level: str | None) -> Reuse | None:
        """How calls reuse the selection of a level, if they do."""
        return next((reuse for reuse in self.reuse if reuse.level == level), None)

    @property
    def brought(self) -> tuple[str, ...]:
        """The levels that no call of this spec chooses of: another layer's did."""
        return tuple(reuse.level for reuse in self.reuse if reuse.brought)

    @property
    def learned_from(self) -> Attend | None:
        """The branch whose attention a `kl` loss learns from: the first over raw tokens."""
        return next((branch for branch in self.attend if branch.values == "raw"), None)

    def nodes(self, name: str) -> int:
        """How many nodes a level of a learned tree has."""
        partitions = [level.partition for level in self.tree(name)]
        return math.prod(x.branching for x in partitions if isinstance(x, LearnedTree))

    def tree(self, name: str) -> tuple[Level, ...]:
        """The levels of a learned tree down to the one called `name`."""
        level = self.level(name)
        inside = level.within and isinstance(self.level(level.within).partition, LearnedTree)
        return (*(self.tree(level.within or "") if inside else ()), level)

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

    def located(self, spans: Mapping[Path, Span]) -> "Spec":
        """The same Spec that knows where its fields stood."""
        located = self.model_copy()
        located._spans = dict(spans)
        return located

    def bind(
        self,
        *,
        heads: Heads | tuple[int, int] | None = None,
        head_dim: HeadDim | tuple[int, int] | int | None = None,
        axes: tuple[int, ...] | None = None,
        layer: int | None = None,
        step: int | None = None,
    ) -> "Spec":
        """Fill in what the text left open.

        Args:
            heads: `Heads`, or (query, kv).
            head_dim: `HeadDim`, (qk, v), or one number for both.
            axes: the length of every axis of the tokens.
            layer: number of the layer, from 0: where layers take ways, only its own is left; where
                they take over whole selections, whether it chooses.  It changes nothing where they
                do neither.
            step: number of the step, from 0: the same where steps of a layer take over.

        Raises:
            ArgumentError: the text says otherwise, or query is no multiple of kv; a negative layer or
                step.
        """
        if isinstance(heads, tuple):
            heads = Heads(query=count("heads", heads[0]), kv=count("heads", heads[1]))
        if isinstance(head_dim, int):
            head_dim = (head_dim, head_dim)
        if isinstance(head_dim, tuple):
            qk, v = (count("head_dim", number) for number in head_dim)
            head_dim = HeadDim(qk=qk, v=v)
        if heads is not None and heads.query % heads.kv:
            msg = f"heads: expected query to be a multiple of kv, {heads.kv}, got {heads.query}"
            raise ArgumentError(msg)
        bound = self._bound("heads", heads)._bound("head_dim", head_dim)
        return bound._laid(axes).located(self._spans)._on_layer(layer)._on_step(step)

    def _laid(self, axes: tuple[int, ...] | None) -> "Spec":
        """With every axis that is open bound; the others as the text says."""
        if axes is None:
            return self
        said = self.axes or ()
        lengths = tuple(count("axes", number) for number in axes)
        fit = [a in (b, "any") for a, b in zip(said, lengths, strict=False)]
        if len(said) != len(lengths) or not all(fit):
            shown = f"[{', '.join(map(str, said))}]" if said else "none"
            msg = f"axes: expected {shown} as the spec '{self.name}' says, got {list(lengths)}"
            raise ArgumentError(msg, span=self.span("axes"))
        return self.model_copy(update={"axes": lengths})

    def _on_layer(self, layer: int | None) -> "Spec":
        """What is left of the spec for one layer."""
        if layer is None:
            return self
        _check_number("layer", layer, self.span("route"))
        route, left = self.route, self
        if route is not None and route.by == "layer" and route.table:
            left = self._on_way(route.table[layer % len(route.table)])
        return left._on_turn("layers", layer)

    def _on_step(self, step: int | None) -> "Spec":
        """What is left of the spec for one step of a layer."""
        if step is None:
            return self
        _check_number("step", step, self.span("reuse"))
        return self._on_turn("steps", step)

    def _on_turn(self, over: str, call: int) -> "Spec":
        """What is left of one call where others take over: no reuse, or what it attends and brings.

        A call that attends everything and chooses nothing has no level of it.
        """
        mine = [each for each in self.reuse if each.over == over and self._whole(each)]
        dense = [each.level for each in mine if each.turn(call) == "dense"]
        left = self._opened(dense) if dense else self
        made = [
            (i, left._of_turn(each, call) if each in mine else each)
            for i, each in enumerate(left.reuse)
        ]
        kept = [(i, each) for i, each in made if each is not None]
        reuse = tuple(each for _, each in kept)
        return left if reuse == left.reuse else left._moved({"reuse": [i for i, _ in kept]}, reuse)

    def _whole(self, reuse: Reuse) -> bool:
        """Whether calls take over a whole selection, and do so alone: none chooses among what was kept, none
        learns.
        """
        kl = self.loss and self.loss.kl
        return reuse.role == "final" and not (kl and kl.level == reuse.level)

    def _of_turn(self, reuse: Reuse, call: int) -> Reuse | None:
        """What is left of one reuse: nothing where the call chooses for itself and attends that."""
        alone: dict[str, object] = {"every": None, "pattern": "S", "dense": 0, "lead": 0}
        if reuse.turn(call) == "shared":
            return reuse.model_copy(update=alone | {"attend": "own"})
        return reuse.model_copy(update=alone | {"pattern": "F"}) if reuse.opens else None

    def _opened(self, levels: list[str]) -> "Spec":
        """Branches over some levels attend every token, and these levels are gone."""
        every = {"over": None, "window": "all"}
        attend = tuple(
            branch.model_copy(update=every) if branch.over in levels else branch
            for branch in self.attend
        )
        statistic = self.route and self.route.statistic
        needed = {branch.over for branch in attend}
        needed |= {*statistic.levels} if statistic else set()
        for level in reversed(self.levels):
            needed |= level.named if level.name in needed else set()
        kept = [j for j, level in enumerate(self.levels) if level.name in needed]
        others = tuple(self.levels[j] for j in kept)
        index = self.index if any(level.score.by_index for level in others) else None
        left = self.model_copy(update={"attend": attend, "levels": others, "index": index})
        reuse = [i for i, each in enumerate(self.reuse) if each.level in needed]
        moved = {"levels": kept, "reuse": reuse}
        return left._moved(moved, tuple(self.reuse[i] for i in reuse))

    def _moved(self, kept: Mapping[str, list[int]], reuse: tuple[Reuse, ...]) -> "Spec":
        """The same with another `reuse`, and with places of what lists have only some items of."""
        places = ((_moved(path, kept), span) for path, span in self._spans.items())
        spans = {path: span for path, span in places if path is not None}
        return self.model_copy(update={"reuse": reuse}).located(spans)

    def _on_way(self, way: str) -> "Spec":
        """What is left of the spec where one way is taken: a spec without a route."""
        branches = [i for i, branch in enumerate(self.attend) if branch.when in (None, way)]
        return self._of_branches(branches)

    def stream(self, branch: str) -> "Spec":
        """One of the branches that gates or nothing weigh, by itself: with the levels that it needs, under a
        gate of its own.

        Raises:
            ArgumentError: no such branch, or one that is not apart from others.
        """
        names = [each.name for each in self.attend]
        if branch not in names:
            raise ArgumentError(f"stream: expected one of {', '.join(names)}, got {branch!r}")
        combine = self.combine or Combine()
        if not self.divisible:
            msg = f"stream: branch {branch} of the spec '{self.name}' is not apart from others"
            raise ArgumentError(msg, span=self.span("combine"))
        alone = self._of_branches([names.index(branch)])
        gated = Combine(gates=combine.gates) if combine.gates else None
        said = {"name": f"{self.name}_{branch}", "combine": gated, "loss": None}
        return alone.model_copy(update=said).located(alone._spans)

    @property
    def divisible(self) -> bool:
        """Whether each branch is a spec by itself, and nothing but gates is between them."""
        combine = self.combine or Combine()
        together = combine.output_gate or combine.softmax or combine.sink
        return not (self.route or self.reuse or together)

    def _of_branches(self, branches: list[int]) -> "Spec":
        """What is left where there are some of the branches alone."""
        needed = {self.attend[i].over for i in branches}
        for level in reversed(self.levels):
            needed |= level.named if level.name in needed else set()
        levels = [j for j, level in enumerate(self.levels) if level.name in needed]
        loss = self.loss and self.loss.of(needed, {self.attend[i].name for i in branches})
        reuse = [i for i, each in enumerate(self.reuse) if each.level in needed]
        gone = {"when": None}
        left = self.model_copy(
            update={
                "route": None,
                "index": self.index if any(self.levels[j].score.by_index for j in levels) else None,
                "levels": tuple(self.levels[j].model_copy(update=gone) for j in levels),
                "attend": tuple(self.attend[i].model_copy(update=gone) for i in branches),
                "combine": self.combine and self.combine.of(len(branches)),
                "reuse": tuple(self.reuse[i] for i in reuse),
                "loss": loss,
            }
        )
        moved = {"levels": levels, "attend": branches, "reuse": reuse}
        places = ((_moved(path, moved), span) for path, span in self._spans.items())
        return left.located({path: span for path, span in places if path is not None})

    def _bound(self, field: str, value: Heads | HeadDim | None) -> "Spec":
        said: Heads | HeadDim | None = getattr(self, field)
        if value is None or value == said:
            return self
        if said is not None:
            msg = f"{field}: expected {said!r} as the spec '{self.name}' says, got {value!r}"
            raise ArgumentError(msg, span=self.span(field))
        return self.model_copy(update={field: value})


def _check_number(name: str, number: int, span: Span | None) -> None:
    """A layer or a step is counted from 0."""
    if isinstance(number, bool) or number < 0:
        message = f"{name}: expected a whole number of at least 0, got {number!r}"
        raise ArgumentError(message, span=span)


def _first_entries(level: Level, force: Force) -> int:
    """How many entries are forced as the first ones, or hold one of the first tokens, at most."""
    if force.sink is None:
        return force.first
    if level.permute is not None:  # each in another entry
        return force.first + force.sink
    before = (level.partition.before or 0) if isinstance(level.partition, Blocks) else 0
    return max(force.first, -(-(force.sink + before) // max(level.partition.stride, 1)))


def _moved(path: Path, kept: Mapping[str, list[int]]) -> Path | None:
    """Where a field is once lists have only some of their items; None where it is gone."""
    if len(path) < 2 or path[0] not in kept or path[1] == -1:
        return path
    items = kept[str(path[0])]
    return (path[0], items.index(int(path[1])), *path[2:]) if path[1] in items else None


# keys that the language got later: a spec that does not say them keeps the digest it had before;
# `attend.scale`: of branches alone, since scores have always had one
_NEWS = {
    "attend.scale",
    "axes",
    "bias",
    "fraction",
    "grid",
    "level",
    "lse_from",
    "output_gate",
    "permute",
    "sink",
    "softcap",
    "static",
    "storage",
    "tail",
    "threshold",
    "top_p",
    "route",
    "when",
    "codes",
    "score.dtype",
    "of",
    "reuse",
    "loss",
    "streams",
    "before",
    "pool.softmax",
    "series",
    "hidden",
    "then",
    "rotate",
    "query",
    "query.by",
    "queries",
    "tokens",
    "scope",
    "quota",
    "early_stop",
    "which",
    "delta",
    "width",
    "budget_from",
    "select.min",
    "kl.rows",
    "budget_in",
    "statistic",
    "where",
    "rows",
    "apart",
    "seed",
    "q",
    "spans",
    "dual_entropy",
    "takes",
    "attend.softmax",
    "tile",
}


def _without_news(fields: object, of: str = "") -> object:
    """Fields of a dump without those that are new and say nothing; `of`: the key that holds them."""
    if isinstance(fields, list):
        return [_without_news(item, of) for item in cast("list[object]", fields)]
    if not isinstance(fields, dict):
        return fields
    items = cast("dict[str, object]", fields).items()
    said = ((key, x) for key, x in items if x not in (None, []) or not {key, f"{of}.{key}"} & _NEWS)
    return {key: _without_news(x, key) for key, x in said}
