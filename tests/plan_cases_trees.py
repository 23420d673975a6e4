"""Small specs whose entries are searched or assigned: trees, runs, halves, stripes, samples."""

from __future__ import annotations

from plan_cases import DOT, GATES, MEAN, SELECTED, UNION, WINDOW, blocks, spec, top

from hsgen.spec import (
    Attend,
    DualEntropy,
    Force,
    Halving,
    KeyPool,
    LearnedTree,
    Level,
    Loss,
    Pool,
    Query,
    Ragged,
    Route,
    Score,
    Select,
    Spans,
    Stripes,
    Tokens,
    TopP,
)

GROUP = Score(form="dot", share="group", reduce="max")
MASS = Score(form="dot", normalise="softmax", share="group", reduce="sum")


def tree(name: str, *, within: str | None = None, capacity: float | None = None) -> Level:
    return Level(
        name=name,
        within=within,
        partition=LearnedTree(branching=3, capacity=capacity),
        pool=Pool(keys="centroid"),
        score=GROUP,
        select=Select(beam=2),
    )


def router(*, capacity: float | None = None, select: Select | None = None) -> list[Level]:
    token = Level(
        name="block", within="leaf", partition=Tokens(), score=GROUP, select=select or top(5)
    )
    return [tree("branch"), tree("leaf", within="branch", capacity=capacity), token]


def runs(
    pool: KeyPool = "mean",
    *,
    name: str = "block",
    select: Select | None = None,
    score: Score = GROUP,
    query: Query | None = None,
    **partition: object,
) -> Level:
    given = {"boundaries": "given"} | partition
    return Level(
        name=name,
        query=query,
        partition=Ragged(**given),
        pool=Pool(keys=pool),
        score=score,
        select=select,
    )


FOUND = {"boundaries": "similarity", "span": 2, "threshold": 0.4}


def upsampled(source: Level) -> list[Level]:
    how = Score(source=source.name, map="upsample")
    return [source, Level(name="block", partition=Tokens(), score=how, select=top(5, last=1))]


def mapped(how: str, size: int, select: Select) -> list[Level]:
    coarse = Level(name="coarse", partition=blocks(4), pool=MEAN, score=DOT)
    score = Score(source="coarse", map=how)
    return [coarse, Level(name="block", partition=blocks(size), score=score, select=select)]


def halved(*, query: Query | None = None, force: Force | None = None) -> list[Level]:
    return [
        Level(
            name="chunk",
            query=query,
            partition=Halving(interval=8, until=2),
            score=GROUP,
            select=Select(beam=2, force=force or Force()),
        ),
        Level(
            name="block",
            within="chunk",
            query=query,
            partition=Halving(interval=2),
            score=GROUP,
            select=top(3) if force is None else Select(top_k=4, force=force),
        ),
    ]


def striped(select: Select | None = None, **stripes: int) -> list[Level]:
    return [
        Level(
            name="block",
            q="search",
            partition=Stripes(**({"power": 2} | stripes)),
            score=GROUP,
            select=select or top(2),
        )
    ]


SPANS = Attend(name="spans", over="block", spans=Spans(factor=0.7, power=0.5, window=2))
HALVES = Query(block=4, pool="mean")
TREES = [
    spec("tree", router(), [SELECTED]),
    spec("tree_one_group", router(), [SELECTED], kv=1),
    spec(
        "tree_learns",
        router(),
        [SELECTED],
        loss=Loss(dual_entropy=DualEntropy(tree="leaf", temperature=0.3, balance=0.7)),
    ),
    spec("tree_not_causal", router(), [SELECTED], causal=False),
    spec("tree_capacity", router(capacity=1.25), [SELECTED]),
    spec("tree_forced", router(select=top(4, first=1, last=2)), [SELECTED, WINDOW], combine=UNION),
    spec("tree_of_nodes", [tree("block").model_copy(update={"select": top(1)})], [SELECTED]),
    spec("tree_together", [x.model_copy(update={"query": HALVES}) for x in router()], [SELECTED]),
    spec("runs", [runs(select=top(2, last=1))], [SELECTED]),
    spec("runs_root", [runs("sum_rsqrt", select=top(2, first=1, last=1))], [SELECTED]),
    spec("runs_drawn", [runs("sample", select=top(2))], [SELECTED]),
    spec("runs_tail", [runs("max", select=top(2, tail=True))], [SELECTED]),
    spec("runs_found", [runs(select=top(2, last=1), **FOUND)], [SELECTED]),
    spec("runs_not_causal", [runs(select=top(2), **FOUND)], [SELECTED], causal=False),
    spec(
        "runs_by_mass",
        [runs(select=Select(top_p=TopP(mass=0.6), force=Force(last=1)), score=MASS)],
        [SELECTED],
    ),
    spec("runs_together", [runs(select=top(3, last=1), query=HALVES)], [SELECTED]),
    spec(
        "runs_of_tokens",
        [
            runs(name="run", select=Select(beam=2, force=Force(last=1))),
            Level(
                name="block", within="run", partition=Tokens(), score=GROUP, select=top(3, last=1)
            ),
        ],
        [SELECTED],
    ),
    spec("upsampled", upsampled(runs("sum_rsqrt", name="run")), [SELECTED]),
    spec("upsampled_together", upsampled(runs(name="run", query=HALVES, **FOUND)), [SELECTED]),
    spec("upsampled_blocks", mapped("upsample", 2, top(4, last=1)), [SELECTED]),
    spec("averaged", mapped("avg_pool", 8, top(2, last=1)), [SELECTED]),
    spec("averaged_not_causal", mapped("avg_pool", 8, top(2)), [SELECTED], causal=False),
    spec("halved", halved(), [SELECTED]),
    spec("halved_not_causal", halved(), [SELECTED], causal=False),
    spec("halved_together", halved(query=HALVES, force=Force(first=1, last=1)), [SELECTED]),
    spec("halved_rows", halved(query=Query(block=4, reduce="max")), [SELECTED]),
    spec("halved_means", halved(query=Query(block=3, reduce="mean")), [SELECTED]),
    spec("halved_last", halved(query=Query(last=3, reduce="sum")), [SELECTED]),
    spec(
        "drawn",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=Pool(keys="sample", seed=5),
                score=DOT,
                select=top(2, last=1),
            )
        ],
        [SELECTED],
    ),
    spec("stripes", striped(), [SPANS]),
    spec("stripes_cubed", striped(power=3, first=2), [SPANS, WINDOW], combine=GATES),
    spec(
        "stripes_alone", striped(top(3)), [Attend(name="anchors", over="block", spans=SPANS.spans)]
    ),
    spec(
        "stripes_on_a_way",
        striped(),
        [SPANS.model_copy(update={"when": "far"}), WINDOW.model_copy(update={"when": "near"})],
        route=Route(by="head", table=("far", "near")),
    ),
]
