"""Small specs that between them use every operator and every field the planner reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hsgen.graph import Graph, partitions, tensor_inputs
from hsgen.graph.rows import block_of
from hsgen.reference import Kept, tensor_shapes
from hsgen.spec import (
    Attend,
    Blocks,
    Clusters,
    Combine,
    Distill,
    Force,
    Gather,
    GridWindow,
    HeadDim,
    Heads,
    HeadSpan,
    Index,
    Kl,
    KMeans,
    Level,
    Loss,
    Permute,
    Pool,
    Query,
    Reuse,
    Route,
    Score,
    Select,
    SortInSegment,
    Spec,
    Static,
    Tokens,
    TopP,
)


def blocks(size: int, stride: int | None = None) -> Blocks:
    return Blocks(size=size, stride=stride or size)


def spec(
    name: str, levels: list[Level], attend: list[Attend], *, kv: int = 2, **more: object
) -> Spec:
    """Four query heads; qk dim 6 and v dim 5."""
    given = {"heads": Heads(query=4, kv=kv), "head_dim": HeadDim(qk=6, v=5)} | more
    return Spec(name=name, levels=tuple(levels), attend=tuple(attend), **given)


def top(k: int, **force: int) -> Select:
    return Select(top_k=k, force=Force(**force))


SELECTED = Attend(name="selected", over="block")
WINDOW = Attend(name="window", window=5)
DOT = Score(form="dot")
MEAN = Pool(keys="mean")
SMALL_INDEX = Index(heads=3, dim=4)


def compressed(size: int, stride: int, **score: object) -> Level:
    return Level(
        name="compressed",
        partition=blocks(size, stride),
        kv="compressed",
        pool=Pool(keys="linear", values="linear", position="learned"),
        score=Score(form="dot", normalise="softmax", share="group", reduce="sum", **score),
    )


def mapped(how: str, size: int = 8, k: int = 3) -> Level:
    return Level(
        name="block",
        partition=blocks(size),
        score=Score(source="compressed", map=how),
        select=top(k, first=1, last=2),
    )


POOLED = Attend(name="compressed", over="compressed", values="pooled")
OWN_WINDOW = Attend(name="window", window=5, kv="window")
GATES = Combine(gates="input")
UNION = Combine(softmax="union")


def moba(share: str = "head", reduce: str | None = None, **more: object) -> list[Level]:
    score = Score(form="dot", scale="none", share=share, reduce=reduce)
    return [Level(name="block", partition=blocks(8), pool=MEAN, score=score, select=top(3, last=1))]


def infllm() -> list[Level]:
    """Masses by a coarser sum, which is empty for the first rows."""
    mass = Score(form="dot", normalise="softmax", lse_from="coarse", share="group", reduce="sum")
    return [
        Level(name="coarse", partition=blocks(8, 4), pool=MEAN, score=DOT),
        Level(name="compressed", partition=blocks(4, 2), pool=MEAN, score=mass),
        mapped("overlap_max"),
    ]


def minimax() -> list[Level]:
    """Blocks by their best token."""
    token = Level(
        name="token", partition=Tokens(), score=Score(form="index_dot", share="group", scale=0.5)
    )
    score = Score(source="token", map="max")
    return [
        token,
        Level(name="block", partition=blocks(4), score=score, select=top(3, last=1)),
    ]


def dma(share: str = "group", reduce: str | None = None) -> list[Level]:
    """Tokens by what is learned of them, whatever the query."""
    score = Score(form="bias", share=share, reduce=reduce)
    return [Level(name="block", partition=Tokens(), score=score, select=top(6))]


def nosa() -> list[Level]:
    """Blocks that queries choose, and then blocks that none asks for."""
    asked = mapped("overlap_max", k=2).model_copy(
        update={"name": "asked", "select": top(2, first=1, last=1)}
    )
    bias = Score(form="bias", share="group")
    return [
        *infllm()[:2],
        asked,
        Level(name="bias", partition=blocks(4, 2), pool=MEAN, score=bias),
        Level(
            name="block",
            partition=blocks(8),
            score=Score(source="bias", map="overlap_max"),
            select=Select(top_k=3, force=Force(level="asked")),
        ),
    ]


def quest(share: str = "head", reduce: str | None = None) -> list[Level]:
    score = Score(form="bound", share=share, reduce=reduce)
    pool = Pool(keys="minmax")
    return [Level(name="block", partition=blocks(4), pool=pool, score=score, select=top(3, last=1))]


def hisa(child_size: int, **force: int) -> list[Level]:
    relu = Score(form="relu_weighted", share="all")
    fine = Tokens() if child_size == 1 else blocks(child_size)
    return [
        Level(
            name="coarse",
            partition=blocks(8),
            pool=MEAN,
            score=relu,
            select=Select(beam=3, force=Force(first=1, last=1)),
        ),
        Level(
            name="block",
            within="coarse",
            partition=fine,
            pool=None if child_size == 1 else MEAN,
            score=relu,
            select=top(7, **force),
        ),
    ]


CASES = [
    spec("moba", moba(), [SELECTED], kv=4),
    spec("moba_gqa", moba(), [SELECTED]),
    spec("moba_group", moba("group", "mean"), [SELECTED]),
    spec("moba_all", moba("all", "max"), [SELECTED]),
    spec("moba_not_causal", moba(), [SELECTED], causal=False),
    spec(
        "nsa",
        [compressed(4, 2), mapped("overlap_sum")],
        [POOLED, SELECTED, OWN_WINDOW],
        combine=GATES,
    ),
    spec("nsa_wide", [compressed(6, 2), mapped("overlap_sum")], [SELECTED, POOLED], combine=GATES),
    spec(
        "nsa_scale", [compressed(4, 2, scale=0.3), mapped("sum")], [POOLED, SELECTED], combine=GATES
    ),
    spec(
        "nsa_not_causal",
        [compressed(4, 4), mapped("max")],
        [POOLED, SELECTED],
        combine=GATES,
        causal=False,
    ),
    spec(
        "nsa_union",
        [compressed(4, 2), mapped("overlap_sum")],
        [POOLED, SELECTED, WINDOW],
        combine=UNION,
    ),
    spec("hisa", hisa(1), [SELECTED], index=SMALL_INDEX),
    spec("hisa_blocks", hisa(2, last=1), [SELECTED], index=SMALL_INDEX),
    spec(
        "union_own_keys",
        moba(),
        [SELECTED, WINDOW, Attend(name="far", window=9, kv="far")],
        combine=UNION,
    ),
    spec("infllm", infllm(), [SELECTED]),
    spec("minimax", minimax(), [SELECTED], index=Index(heads=2, dim=4)),
    spec("quest", quest(), [SELECTED], kv=4),
    spec("quest_group", quest("group", "max"), [SELECTED]),
    spec("quest_not_causal", quest(), [SELECTED], causal=False),
    spec("window", [], [Attend(name="window", window=7)]),
    spec("window_not_causal", [], [Attend(name="window", window=7)], causal=False),
    spec(
        "uncounted",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=Pool(keys="max"),
                score=DOT,
                select=Select(top_k=2, force=Force(first=1, last=2, counted=False)),
            )
        ],
        [SELECTED],
    ),
    spec(
        "overlapping",
        [Level(name="block", partition=blocks(6, 3), pool=MEAN, score=DOT, select=top(3, last=1))],
        [SELECTED],
    ),
    spec(
        "tokens",
        [
            Level(
                name="block",
                partition=Tokens(),
                score=Score(form="dot", normalise="softmax", share="all", reduce="sum"),
                select=top(6),
            )
        ],
        [SELECTED],
    ),
    spec(
        "beam_of_dots",
        [
            Level(
                name="coarse",
                partition=blocks(8),
                pool=MEAN,
                score=Score(form="dot", share="group", reduce="max"),
                select=Select(beam=2, force=Force(last=1)),
            ),
            Level(
                name="block",
                within="coarse",
                partition=blocks(4),
                pool=MEAN,
                score=Score(form="dot", normalise="softmax"),
                select=top(3, first=1, last=1),
            ),
        ],
        [SELECTED],
    ),
]


def kept(select: Select, *, share: str = "head", **score: object) -> list[Level]:
    """Blocks of 4 that a rule keeps by their softmax masses."""
    reduce = None if share == "head" else "sum"
    how = Score(form="dot", normalise="softmax", share=share, reduce=reduce, **score)
    return [Level(name="block", partition=blocks(4), pool=MEAN, score=how, select=select)]


def top_p(mass: float = 0.7, *, force: Force | None = None, **more: object) -> Select:
    return Select(top_p=TopP(mass=mass, **more), force=force or Force(last=1))


def near(window: tuple[int, ...], **more: tuple[int | bool, ...]) -> Attend:
    """A window along each axis of the spec."""
    return Attend(name="near", static=Static(grid=GridWindow(window=window, **more)))


ADDED = Force(first=1, last=2, counted=False)
# rules that let counts vary, and patterns: their meaning is the reference's, no kernel has them yet
SETS = [
    spec("fraction", kept(Select(fraction=0.3, force=Force(last=1))), [SELECTED]),
    spec("fraction_added", kept(Select(fraction=0.2, force=ADDED)), [SELECTED]),
    spec("threshold", kept(Select(threshold=0.2, force=Force(first=1))), [SELECTED]),
    spec("top_p", kept(top_p()), [SELECTED]),
    spec("top_p_shared", kept(top_p(), share="group"), [SELECTED]),
    spec("top_p_drop", kept(top_p(boundary="drop", force=ADDED)), [SELECTED]),
    spec("top_p_drop_counted", kept(top_p(boundary="drop", min=1)), [SELECTED]),
    spec("top_p_limits", kept(top_p(min=2, max=3), share="all"), [SELECTED]),
    spec("top_p_head", kept(top_p(scope="head", max=4)), [SELECTED]),
    spec("top_p_head_added", kept(top_p(scope="head", min=1, force=ADDED)), [SELECTED]),
    spec("top_p_not_causal", kept(top_p(scope="head")), [SELECTED], causal=False),
    spec(
        "top_p_mapped",
        [
            compressed(4, 2),
            Level(
                name="block",
                partition=blocks(8),
                score=Score(source="compressed", map="overlap_sum"),
                select=top_p(0.5),
            ),
        ],
        [POOLED, SELECTED],
        combine=GATES,
    ),
    spec("all_tokens", [], [Attend(name="dense", window="all")]),
    spec("all_tokens_not_causal", [], [Attend(name="dense", window="all")], causal=False),
    spec("sharded", [], [Attend(name="s", static=Static(blocks=2, window=2, stride=4, shift=1))]),
    spec("powers", [], [Attend(name="s", static=Static(blocks=3, sink=1, power_of_two=True))]),
    spec("dilated", [], [Attend(name="s", static=Static(window=3, dilation=4))]),
    spec(
        "dilated_not_causal",
        [],
        [Attend(name="s", static=Static(blocks=2, window=3, dilation=2))],
        causal=False,
    ),
    spec("dma", dma(), [Attend(name="selected", over="block", bias="learned")]),
    spec("dma_not_causal", dma("all", "max"), [SELECTED], causal=False),
    spec("nosa", nosa(), [Attend(name="selected", over="block", bias="learned")]),
    spec(
        "biased",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=MEAN,
                score=Score(form="dot", bias="learned", normalise="softmax"),
                select=top(2, last=1),
            )
        ],
        [
            Attend(name="selected", over="block", bias="learned"),
            Attend(name="window", window=4, bias="learned"),
            Attend(name="far", window=5, kv="far"),
        ],
        combine=UNION,
    ),
    spec("near", [], [near((4, 3))], causal=False, axes=("any", 5)),
    spec("near_1d", [], [near((6,), stride=(4,))], causal=False, axes=("any",)),
    spec("near_fixed", [], [near((3, 2), stride=(2, 2))], causal=False, axes=(8, 5)),
    spec(
        "near_strided",
        [],
        [near((2, 3, 2), stride=(2, 2, 1), dilation=(1, 1, 2), causal=(True, False, True))],
        causal=False,
        axes=("any", 3, 4),
    ),
    spec("near_causal", [], [near((3, 4), dilation=(2, 1))], axes=("any", 6)),
    spec(
        "near_or_sink",
        [],
        [Attend(name="s", static=Static(sink=2, grid=GridWindow(window=(2, 2))))],
        causal=False,
        axes=("any", 3),
    ),
    spec(
        "spans",
        [],
        [
            Attend(
                name="s",
                static=Static(
                    blocks=2,
                    per_head=(HeadSpan(window=2, sink=1), HeadSpan(window=3, grow=0.4)),
                ),
            ),
            WINDOW,
        ],
        combine=UNION,
    ),
]


def ordered(order: object, *, size: int = 4, select: Select | None = None) -> list[Level]:
    """Blocks of an order of keys, or its clusters where the size is 0."""
    return [
        Level(
            name="block",
            permute=Permute(keys=order),
            partition=blocks(size) if size else Clusters(),
            pool=MEAN,
            score=Score(form="dot", normalise="softmax"),
            select=select or top_p(),
        )
    ]


BY_MASS = SortInSegment(segment=8, by="mass", last=3)
BY_MEAN = SortInSegment(segment=12, by="mean")
FREE = Select(top_p=TopP(mass=0.6))
# entries that are cut from an order of the keys
ORDERS = [
    spec("sorted_by_mass", ordered(BY_MASS), [SELECTED]),
    spec("sorted_by_mean", ordered(BY_MEAN, select=top(7, first=1, last=1)), [SELECTED], kv=4),
    spec("sorted_not_causal", ordered(BY_MASS), [SELECTED], causal=False),
    spec(
        "sorted_union",
        ordered(BY_MASS, select=top(5, last=1)),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
    spec(
        "clusters",
        ordered(KMeans(clusters=5, iterations=3), size=0, select=FREE),
        [SELECTED],
        causal=False,
    ),
    spec(
        "blocks_of_clusters",
        ordered(KMeans(clusters=4, iterations=2), select=FREE),
        [SELECTED],
        causal=False,
    ),
    spec("gathered", ordered(Gather(), select=FREE), [SELECTED], causal=False),
    spec(
        "pooled_selection",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=Pool(keys="mean", values="mean"),
                score=DOT,
                select=top(3, last=1),
            )
        ],
        [SELECTED, Attend(name="summary", over="block", values="pooled")],
        combine=GATES,
    ),
]
BOTH = [
    Attend(name="selected", over="block", when="far"),
    Attend(name="near", window=5, when="near"),
]


def far(**more: object) -> list[Level]:
    """Blocks that are chosen on the way `far` only."""
    levels = moba(**more)
    return [levels[0].model_copy(update={"when": "far"})]


# routes: who takes which way; without `combine` no head takes two branches
ROUTES = [
    spec(
        "route_of_layers",
        moba("group", "mean"),
        BOTH,
        route=Route(by="layer", table=("far", "near")),
    ),
    spec("route_of_heads", far(), BOTH, route=Route(by="head", table=("near", "far"))),
    spec("route_of_heads_given", far(), BOTH, route=Route(by="head", input=("near", "far"))),
    spec(
        "route_of_samples",
        far(share="all", reduce="sum"),
        [*BOTH, WINDOW],
        route=Route(by="sample", input=("near", "far")),
        combine=UNION,
    ),
    spec(
        "route_of_samples_and_heads",
        [
            *far(),
            Level(
                name="set",
                when="set",
                partition=blocks(4),
                pool=MEAN,
                score=Score(form="dot", normalise="softmax"),
                select=Select(fraction=0.4, force=Force(last=1)),
            ),
            Level(
                name="pooled",
                partition=blocks(4, 2),
                pool=Pool(keys="max", values="mean"),
                score=DOT,
            ),
        ],
        [
            *BOTH,
            Attend(name="set", over="set", when="set"),
            Attend(name="pooled", over="pooled", values="pooled", when="near"),
        ],
        route=Route(by="sample_head", input=("near", "far", "near", "set")),
        combine=UNION,
    ),
]


def delta(role: str = "final", **reuse: object) -> dict[str, object]:
    return {"reuse": (Reuse(level="block", over="layers", role=role, **reuse),)}


def pages() -> list[Level]:
    """Blocks by the sum of their tokens' masses."""
    mass = Score(form="dot", normalise="softmax", share="all", reduce="max")
    token = Level(name="token", partition=Tokens(), score=mass)
    page = Score(source="token", map="sum")
    return [
        token,
        Level(name="block", partition=blocks(4), score=page, select=top(3, last=2)),
    ]


def cascade(select: Select, query: Query | None = None, *, share: str = "group") -> list[Level]:
    how = Score(form="dot", normalise="softmax", share=share, reduce="sum")
    return [Level(name="block", partition=Tokens(), query=query, score=how, select=select)]


APART = Combine(streams="branches")
APART_GATED = Combine(gates="input", streams="branches")
DISTILL = Loss(distill=Distill(student="block", teacher="window", form="smooth_l1", toward="both"))
# outputs of their own, and losses
TRAINED = [
    spec("streams", moba(), [WINDOW, SELECTED], combine=APART),
    spec(
        "distilled",
        moba(),
        [WINDOW, Attend(name="block", over="block")],
        combine=APART_GATED,
        loss=DISTILL,
    ),
    spec(
        "distilled_gates",
        moba(),
        [WINDOW, Attend(name="block", over="block")],
        combine=GATES,
        loss=Loss(distill=Distill(student="block", teacher="window")),
    ),
    spec("kl", hisa(1), [SELECTED], index=SMALL_INDEX, loss=Loss(kl=Kl(level="coarse"))),
    spec(
        "kl_selected",
        hisa(1),
        [SELECTED],
        index=SMALL_INDEX,
        loss=Loss(kl=Kl(level="block", over="selected")),
    ),
    spec(
        "kl_gate",
        kept(top_p(), share="group"),
        [SELECTED],
        loss=Loss(kl=Kl(level="block", heads="max", tokens="max")),
    ),
    spec("kl_mapped", pages(), [SELECTED], causal=False, loss=Loss(kl=Kl(level="block"))),
]
# calls after calls: each is played several times, with the state of the one before
CALLS = [
    spec("every", hisa(1), [SELECTED], index=SMALL_INDEX, **delta(every=3, lead=1)),
    spec(
        "every_kl",
        hisa(1),
        [SELECTED],
        index=SMALL_INDEX,
        loss=Loss(kl=Kl(level="block")),
        **delta(pattern="FSFSS"),
    ),
    spec("given", pages(), [SELECTED], **delta(every=2, lead=1, attend="given")),
    spec("dense", pages(), [SELECTED], **delta(dense=2, attend="given")),
    spec("dense_once", kept(top_p()), [SELECTED, WINDOW], combine=UNION, **delta(dense=1)),
    spec(
        "beam",
        hisa(1),
        [SELECTED],
        index=SMALL_INDEX,
        reuse=(Reuse(level="coarse", over="steps", role="final"),),
    ),
    spec("cascade", cascade(top(9)), [SELECTED], **delta(role="candidates", every=3)),
    spec(
        "cascade_given",
        cascade(Select(fraction=0.6)),
        [SELECTED],
        **delta(role="candidates", accumulate=True, attend="given"),
    ),
    spec(
        "cascade_forced",
        cascade(Select(fraction=0.5, force=Force(last=2))),
        [SELECTED],
        causal=False,
        **delta(role="candidates", dense=1, lead=1, attend="given"),
    ),
    spec(
        "cascade_of_all_rows",
        cascade(Select(fraction=0.7), Query(last=99, reduce="sum", rows="chosen"), share="all"),
        [Attend(name="selected", over="block", rows="chosen")],
        **delta(role="candidates", accumulate=True, attend="given"),
    ),
    spec(
        "cascade_of_last_rows",
        cascade(top(6, last=1), Query(last=3, reduce="max", rows="chosen")),
        [SELECTED, WINDOW],
        combine=UNION,
        **delta(role="candidates", every=3),
    ),
    spec(
        "cascade_of_blocks",
        cascade(Select(fraction=0.5), Query(block=4, reduce="mean")),
        [SELECTED],
        **delta(role="candidates", accumulate=True, dense=1),
    ),
    spec(
        "cascade_of_pooled_rows",
        cascade(Select(fraction=0.6, force=Force(last=1)), Query(block=4, pool="mean")),
        [SELECTED],
        causal=False,
        **delta(role="candidates", accumulate=True, attend="given"),
    ),
]


def together(query: Query, size: int = 4, *, score: Score = DOT, **more: object) -> list[Level]:
    """Blocks that rows choose together."""
    given = {"pool": MEAN, "select": top(3, last=1)} | more
    return [Level(name="block", partition=blocks(size), query=query, score=score, **given)]


def xattention() -> list[Level]:
    """Masses of antidiagonals, summed over tiles of both."""
    return [
        Level(
            name="strided",
            partition=blocks(2),
            pool=Pool(keys="antidiagonal"),
            query=Query(block=2, pool="antidiagonal"),
            score=Score(form="dot", normalise="softmax"),
        ),
        Level(
            name="block",
            partition=blocks(4),
            query=Query(block=8, reduce="sum"),
            score=Score(source="strided", map="sum"),
            select=top_p(0.6, force=Force(first=1, last=1)),
        ),
    ]


POOLED_ROWS = Query(block=4, pool="mean")
MASS = Score(form="dot", normalise="softmax")
AGREEING = Query(block=4, pool="mean", heads="mean")
# rows that choose together: no kernel has them yet
TOGETHER = [
    spec("rows_mean", together(POOLED_ROWS), [SELECTED]),
    spec("rows_mean_not_causal", together(POOLED_ROWS), [SELECTED], causal=False),
    spec("rows_finer", together(Query(block=3, pool="max"), 6), [SELECTED]),
    spec(
        "rows_coarser", together(Query(block=8, pool="first"), 4, select=top(4, last=2)), [SELECTED]
    ),
    spec("rows_odd", together(Query(block=5, pool="mean"), 3, select=top(4, last=1)), [SELECTED]),
    spec(
        "rows_added",
        together(Query(block=8, pool="mean"), 2, select=Select(top_k=1, force=ADDED)),
        [SELECTED],
    ),
    spec("rows_sum", together(Query(block=4, reduce="sum"), score=MASS), [SELECTED]),
    spec(
        "rows_max",
        together(Query(block=8, reduce="max"), select=top(4, last=1)),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
    spec("rows_average", together(Query(block=4, reduce="mean"), score=MASS), [SELECTED]),
    spec("rows_last", together(Query(last=3, pool="mean")), [SELECTED]),
    spec("rows_last_sum", together(Query(last=3, reduce="sum"), score=MASS), [SELECTED]),
    spec("rows_heads", together(AGREEING, score=Score(form="dot", share="group")), [SELECTED]),
    spec("rows_all_heads", together(AGREEING, score=Score(form="dot", share="all")), [SELECTED]),
    spec(
        "heads_alone",
        together(Query(heads="mean"), score=Score(form="dot", share="group")),
        [SELECTED],
    ),
    spec(
        "rows_bound",
        together(POOLED_ROWS, score=Score(form="bound"), pool=Pool(keys="minmax")),
        [SELECTED],
    ),
    spec("xattention", xattention(), [SELECTED]),
    spec("xattention_not_causal", xattention(), [SELECTED], causal=False),
    spec(
        "rows_of_tokens",
        [
            Level(name="token", partition=Tokens(), score=MASS),
            Level(
                name="block",
                partition=blocks(2),
                query=Query(block=4, reduce="max"),
                score=Score(source="token", map="max"),
                select=Select(threshold=0.2, force=Force(last=1)),
            ),
        ],
        [SELECTED],
    ),
    spec(
        "rows_below_rows",
        [
            *together(Query(block=8, pool="mean"), 8, select=Select(beam=2, force=Force(last=1))),
            Level(
                name="fine",
                within="block",
                partition=blocks(2),
                pool=MEAN,
                query=Query(block=4, pool="mean"),
                score=DOT,
                select=top(4, last=1),
            ),
        ],
        [Attend(name="selected", over="fine")],
    ),
    spec(
        "single_rows_below_rows",
        [
            *together(Query(block=8, pool="mean"), 8, select=Select(beam=2, force=Force(last=1))),
            Level(name="fine", within="block", partition=Tokens(), score=DOT, select=top(6)),
        ],
        [Attend(name="selected", over="fine")],
    ),
    spec(
        "rows_by_index",
        together(Query(block=4, pool="mean"), score=Score(form="index_dot", share="group")),
        [SELECTED],
        index=Index(heads=2, dim=4),
    ),
]


def state_tensors(
    graph: Graph, state: Mapping[str, Kept], rows: int, keys: int, *, batch: int = 1
) -> dict[str, torch.Tensor]:
    """What a graph reads of earlier calls; of none, nothing."""
    made = {}
    for x in tensor_inputs(graph):
        level, _, what = x.name.partition(".")
        old = state.get(level, Kept(calls=0))
        heads = x.type.dims[2] if x.role == "state" and len(x.type.dims) > 2 else "1"
        size = (batch, rows, graph.sizes.get(heads, 1))
        if what == "calls":
            made[x.name] = torch.tensor([old.calls])
        elif what == "kept":
            none = torch.full((*size, 1), -1)
            made[x.name] = none if old.selection is None else old.selection.indices
        elif what == "kept_scores":
            _, stride = partitions(graph)[level]
            none = torch.full((*size, -(-keys // stride)), -torch.inf, dtype=torch.float64)
            found = none if old.scores is None else old.scores
            made[x.name] = found[:, one_of_each(x.type.dims[1], rows, keys)]
    return made


def one_of_each(dim: str, rows: int, keys: int) -> list[int]:
    """The last row of each group of a dimension of rows, aligned at the bottom right."""
    if dim == "1":
        return [rows - 1]
    block = block_of(dim) or 1
    return [t for t in range(rows) if t == rows - 1 or (keys - rows + t + 1) % block == 0]


def random_tensors(
    spec: Spec, rows: int, keys: int, *, batch: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Float64 tensors for every input of a spec."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, batch, rows, keys)
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    for name in (name for name in made if name.endswith("_order")):  # a slot is empty, one repeats
        made[name] = made[name].argsort(1).double()
        made[name][:, 2:4] = torch.tensor([-1.0, 0.0])[: made[name][:, 2:4].shape[1], None]
    for name in (name for name in made if name.endswith("_split")):  # also before all, after all
        made[name] = torch.randint(-1, keys + 2, shapes[name], generator=generator)
    for name in (name for name in made if name.endswith("_starts")):  # every third, about
        made[name] = (made[name] > 0.4).double()
    for name in {"layer", "route"} & {*made}:
        made[name] = torch.randint(-1, 5, shapes[name], generator=generator, dtype=torch.int32)
    return made
