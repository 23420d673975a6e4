"""Selections: which entries are kept."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from hsgen.spec.model.scalars import MAX_TIERS, Bound, Cosine, Count, Forced, Identifier, Node, Part

SelectRule = Literal[
    "top_k",
    "beam",
    "fraction",
    "threshold",
    "top_p",
    "tokens",
    "quota",
    "early_stop",
    "budget_from",
]


SELECT_RULES: tuple[SelectRule, ...] = get_args(SelectRule)


class Where(Node):
    """Entries that no one vector stands for: tokens that are at most `similarity` alike.

    How alike some vectors are is the mean cosine of all pairs of them, each with itself among them; a
    vector of zeros is like none.  An entry whose keys are not alike is taken by every row; rows that
    choose together and whose queries are not alike take every entry that they see.
    """

    similarity: Cosine
    centred: bool = False  # keys less the mean key of the whole sequence, as they are compared


class Force(Node):
    """Entries taken whatever their score: the first ones, the last ones, own included, and those
    that another level selects.
    """

    renamed: ClassVar[Mapping[str, str]] = {"from": "level"}
    first: Forced = 0
    last: Forced = 0
    counted: bool = True  # inside `top_k`; false: on top of it
    # the entry that the query stands in, while it is incomplete: its tokens up to the query, raw,
    # on top of what is counted
    tail: bool | None = None
    level: Identifier | None = None  # an earlier level, whose entries are the same; always counted
    # entries that hold one of the first `sink` tokens, wherever those are
    sink: Count | None = None
    where: Where | None = None  # entries by what their tokens are


class TopP(Node):
    """Best entries first, until their masses reach `mass` of the total: how many is the data's say.

    `boundary`: whether the entry that crosses is kept.  `scope`: the total of a row, or of all rows
    of a head, which are then ranked together.  `min` and `max` entries a row, whatever the masses.
    `of: rest`: forced entries are on top, and neither ranked nor part of any total or number.
    """

    mass: Part
    boundary: Literal["keep", "drop"] = "keep"
    scope: Literal["row", "head"] = "row"
    min: Forced = 0
    max: Count | None = None
    of: Literal["rest"] | None = (
        None  # left out: of what forced entries are a part, as `counted` says
    )


class Tier(Node):
    """The next best part of the entries, attended as means of `merge` consecutive tokens of theirs."""

    merge: Count  # 1: token by token
    fraction: Part | None = None  # of a row's visible entries; sums of tiers are rounded up
    # of the total mass; the entry that crosses the sum of masses up to here is of this tier
    mass: Part | None = None
    # of the visible entries, so many in this tier and those before, whatever their masses
    least: Part | None = None


class EarlyStop(Node):
    """Walk entries best first and stop where they add little: the order and the step are meant.

    The rows and heads that choose together walk the ranking `entries` at a time.  They stop after a
    step that adds less than the part `gain` of what it leaves each of them with; what is added up are
    exp(logit) of the tokens that a row sees, beginning with those of the branch `after`.  The step
    after which they stop is still attended.
    """

    gain: Part
    entries: Count
    after: Identifier | None = None  # a window or a pattern; its tokens should not be among entries


class Select(Node):
    """Keep the best: `beam` entries are expanded by a level below, the others are attended.

    `fraction`: of a row's visible entries, or of all that its sequence has, rounded up.
    `threshold`: every score above it.  `tokens`: as many entries as that many tokens fill, to the
    nearest whole number, halves to the even one, and at least one.
    `quota`: the best entries token by token, the next ones as means; forced entries are of the first
    tier.
    `budget_from`: as many as another level keeps in the same row, forced entries among them.  Where
    the prompt's last rows choose there, and others here: the part of the entries that those keep, of
    the entries that a row may keep, rounded up; all that are forced, and at least `min`.  Heads that
    rank as one keep numbers of their own where they have these there.
    `budget_in: tokens`: as many as hold more tokens than that level keeps, one more than they fill.
    `apart: input`: entries before and from the token on that the input `<level>_split` [B] says are
    chosen apart, each of the two by the rule; an entry lies where its first token is.
    `scope`: what is ranked together.  `heads`: entries of all heads that choose, ties to the lower
    head, and as many are kept as all of them may keep.  `head`, of `fraction`: entries of all rows of
    a head, ties to the earlier row, so that some rows may keep nothing.  `entry`, of `top_k`: each
    entry takes so many of the rows that may keep it, by their scores of it, ties to the earlier row,
    so that a row may keep any number of entries.
    """

    top_k: Count | None = None
    beam: Count | None = None
    fraction: Part | None = None
    of: Literal["all"] | None = None  # of `fraction`; left out: of what is visible
    threshold: Bound | None = None
    top_p: TopP | None = None
    tokens: Count | None = None
    quota: Annotated[tuple[Tier, ...] | None, Field(min_length=1, max_length=MAX_TIERS)] = None
    early_stop: EarlyStop | None = None
    budget_from: Identifier | None = None  # an earlier level
    min: Count | None = None  # of `budget_from`, a part: at least so many
    budget_in: Literal["tokens"] | None = None  # of `budget_from`; left out: in entries
    # left out: each row and head that chooses by itself
    scope: Literal["head", "heads", "entry"] | None = None
    apart: Literal["input"] | None = None
    force: Force = Force()

    @property
    def rules(self) -> tuple[SelectRule, ...]:
        """The rules that are given; a valid spec has one."""
        return tuple(rule for rule in SELECT_RULES if getattr(self, rule) is not None)

    @property
    def counts_vary(self) -> bool:
        """Whether rows differ in how many entries they keep, so that they are bitmaps, not lists."""
        return not self.budget or self.scope is not None or self.apart is not None

    @property
    def budget(self) -> int:
        """The number kept before uncounted forced entries are added; 0 where counts vary."""
        return self.top_k or self.beam or 0

    @property
    def width(self) -> int:
        """Slots of one row of the selection, where counts do not vary and rows choose alone."""
        extra = 0 if self.force.counted else self.force.first + self.force.last
        return self.budget + extra + bool(self.force.tail)
