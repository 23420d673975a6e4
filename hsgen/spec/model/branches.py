"""Branches: what is attended, and how branches are combined."""

from typing import Annotated, Literal

from pydantic import Field

from hsgen.spec.model.scalars import (
    MAX_AXES,
    MAX_SPANS,
    Count,
    Forced,
    Growth,
    Identifier,
    Node,
    Part,
    PerAxis,
    Scale,
)


class HeadSpan(Node):
    """What one head sees of a `static` rule.  Of N units it sees the last
    window + grow * max(0, N - window), rounded down, and the first `sink`.
    """

    window: Count
    grow: Growth = 0.0
    sink: Forced = 0


class GridWindow(Node):
    """A window along every axis of `axes`; a token is seen that lies in all of them.

    Along an axis of n steps: rows and keys `dilation` steps apart see each other and no others, so
    each residue class is an axis of its own, of n' steps, where a row stands at i.  Rows of `stride`
    steps have one window, that of their leader, l = i // stride * stride + stride // 2, or the last
    step where there is none.  It begins at l - window // 2, and is moved inside where it would begin
    before 0 or end after n'; one longer than n' is all of it.  With `causal` the leader is the last
    of its rows, the window ends with it, is cut short at 0, and no row sees a step after its own.
    """

    window: PerAxis
    stride: PerAxis | None = None  # left out: 1 along every axis
    dilation: PerAxis | None = None  # left out: 1 along every axis
    # left out: false along every axis
    causal: Annotated[tuple[bool, ...], Field(max_length=MAX_AXES)] | None = None


class Static(Node):
    """A pattern that depends on positions and heads alone: the union of the rules that are given.

    Positions are counted in units of `blocks` tokens.  A query in unit m sees a unit n at distance
    d = m - n (|m - n| without causality), by head h, where

        d < window * dilation and dilation divides d;  n < sink;
        stride divides n + 1 + shift * h;  power_of_two, and d is 0 or a power of two;

    and the tokens that `grid` shows, whatever `blocks` is.

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
    grid: GridWindow | None = None  # tokens near each other along the spec's `axes`


class Delta(Node):
    """Keys as they come back from the changes that are worth keeping, from token to token.

    The first key of a sequence stays as it is, and so does each channel of a later one that differs
    by no more than `threshold`, from the key before or from what was kept of it.  Where it does not
    stay, the whole difference is added.  A row reads the last `window` keys as they are.
    """

    threshold: Scale
    window: Count
    # previous: from the key before, so that small changes are lost for good; kept: from what was
    # kept, so that no channel is ever further off than the threshold
    against: Literal["previous", "kept"] = "previous"


class Spans(Node):
    """A span of tokens that ends at each selected anchor, with a softmax of its own.

    Of a row at position p, the span of an anchor at a holds the tokens from a - n to a, where
    n = ceil(factor * (p + 1) ** power), taken to the nearest 2^-20 before; and the last `window`
    tokens.  The output is the mean of the spans' outputs by the softmax of their anchors' scores,
    through which gradients reach what the anchors are scored with.  A row without an anchor attends
    to its window.
    """

    factor: Scale
    power: Part
    window: Forced = 0


class Attend(Node):
    """One branch: raw tokens of selected entries, pooled entries, the last `window` tokens or all of
    them, or what a `static` rule says.
    """

    name: Identifier
    over: Identifier | None = None
    window: Count | Literal["all"] | None = None
    static: Static | None = None
    values: Literal["raw", "pooled", "tiers"] = "raw"  # tiers: each entry as its tier has it
    # of pooled entries: those that `over` did not select, so that they stand for what is left out
    which: Literal["skipped"] | None = None
    kv: Identifier | None = None  # attends `k_<kv>`, `v_<kv>` instead of `k`, `v`
    # latent: there are no values; a key's first v channels are its value, as in absorbed MLA
    storage: Literal["latent"] | None = None
    scale: Scale | None = None  # of logits; None: 1/sqrt(qk dim)
    softcap: Scale | None = None  # logits become softcap * tanh(logits / softcap)
    # one more logit a head, input `<name>_sink`, in the denominator only: it has no value
    sink: Literal["learned"] | None = None
    when: Identifier | None = None  # the way of the route on which it attends; None: on every one
    # pooled: rows that choose together in the level attend by their one query, and all put out the same
    query: Literal["pooled"] | None = None
    # chosen: a row sees nothing unless its own token is one of those that the branch shows it
    rows: Literal["chosen"] | None = None
    delta: Delta | None = None  # far keys come back from thresholded changes
    # added to logits, after scale and softcap: the input `bias` of each key and key head, or the
    # natural logarithm of how many tokens a pooled key stands for
    bias: Literal["learned", "log_count"] | None = None
    spans: Spans | None = None  # of tokens before anchors, instead of the anchors alone
    # entry: each selected entry has a softmax of its own, and the output is the mean of the outputs of
    # those in which the row sees a token; the log-sum-exp is of all tokens that it sees, each once
    softmax: Literal["entry"] | None = None


class Combine(Node):
    """`gates`: o = sum of gate * branch; the input `gates` has a number for each head and branch, or for
    each `channel` of them.  `softmax`: one softmax over the union of all branches.

    `output_gate` multiplies what comes of that, or of a single branch, by a sigmoid.
    `streams`: every branch is an output of its own, times its gate where there are gates; `o` is the
    first.
    """

    gates: Literal["input", "channel"] | None = None
    softmax: Literal["union"] | None = None
    sink: Literal["learned"] | None = None  # one logit a head, input `sink`, for the whole union
    # o * sigmoid(input `output_gate`), which has a number a channel, or a number a head
    output_gate: Literal["channel", "head"] | None = None

    def of(self, branches: int) -> "Combine | None":
        """What is left of it where only so many branches are: one needs no union, but for its sink."""
        left = self if branches > 1 or self.sink else self.model_copy(update={"softmax": None})
        return left if left != Combine() else None

    streams: Literal["branches"] | None = None
