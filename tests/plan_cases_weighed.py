"""Small specs in which entries stand for several tokens, and walks that stop."""

from __future__ import annotations

from plan_cases import (
    BY_MASS,
    BY_MEAN,
    DOT,
    GATES,
    MEAN,
    SELECTED,
    UNION,
    WINDOW,
    blocks,
    kept,
    ordered,
    spec,
    together,
    top,
    top_p,
)

from hsgen.spec import (
    Attend,
    Clusters,
    EarlyStop,
    Force,
    KMeans,
    Level,
    Permute,
    Pool,
    Query,
    Score,
    Select,
    SortInSegment,
    Spec,
    Tier,
    Tokens,
    TopP,
)


def pyramid(
    *tiers: Tier, order: object = None, force: Force | None = None, query: Query | None = None
) -> list[Level]:
    """Blocks of 6 in tiers, by their softmax masses."""
    return [
        Level(
            name="block",
            permute=Permute(keys=order) if order else None,
            partition=blocks(6),
            pool=MEAN,
            score=Score(form="dot", normalise="softmax"),
            query=query,
            select=Select(quota=tiers, force=force or Force()),
        )
    ]


TIERS = (Tier(merge=1, fraction=0.3), Tier(merge=2, fraction=0.2), Tier(merge=3, fraction=0.25))
ENERGY = (Tier(merge=1, mass=0.3, least=0.1), Tier(merge=2, mass=0.3), Tier(merge=6, mass=0.25))
BY_TIER = Attend(name="selected", over="block", values="tiers", bias="log_count")
BOTH = Pool(keys="mean", values="mean")
REST = Attend(name="rest", over="block", values="pooled", which="skipped", bias="log_count")


def stopping(order: object = None, query: Query | None = None, **more: object) -> list[Level]:
    """Tokens, or blocks of an order, walked best first."""
    return [
        Level(
            name="block",
            permute=Permute(keys=order) if order else None,
            partition=blocks(2) if order else Tokens(),
            pool=MEAN if order else None,
            query=query,
            score=DOT,
            select=Select(early_stop=EarlyStop(**more)),
        )
    ]


def compensated(query: Query | None = None, **score: object) -> list[Level]:
    """Clusters, of which the rest is attended pooled."""
    return [
        Level(
            name="block",
            permute=Permute(keys=KMeans(clusters=5, iterations=2)),
            partition=Clusters(),
            pool=BOTH,
            query=query,
            score=Score(**({"form": "dot", "bias": "log_count"} | score)),
            select=top(2),
        )
    ]


# entries that stand for tokens, and how many of them
WEIGHED: list[Spec] = [
    spec("tiers", pyramid(*TIERS, force=Force(last=1)), [BY_TIER]),
    spec("tiers_added", pyramid(*TIERS, force=Force(last=1, counted=False)), [BY_TIER]),
    spec("tiers_unweighed", pyramid(*TIERS), [Attend(name="t", over="block", values="tiers")]),
    spec("tiers_not_causal", pyramid(*ENERGY), [BY_TIER], causal=False),
    spec("tiers_by_mass", pyramid(*ENERGY, force=Force(last=1)), [BY_TIER, WINDOW], combine=UNION),
    spec(
        "tiers_sorted",
        pyramid(*ENERGY, order=SortInSegment(segment=12, by="mean"), force=Force(last=1)),
        [BY_TIER],
    ),
    spec("compensated", compensated(), [SELECTED, REST], combine=UNION, causal=False),
    spec(
        "compensated_by_error",
        compensated(form="pooling_error", bias=None),
        [SELECTED, REST],
        combine=UNION,
        causal=False,
    ),
    spec(
        "error_of_keys",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=MEAN,
                score=Score(form="pooling_error", share="group", reduce="max"),
                select=Select(top_k=3, force=Force(sink=2, last=1)),
            )
        ],
        [SELECTED],
    ),
    spec(
        "sinks_sorted",
        ordered(BY_MASS, select=top_p(force=Force(sink=2, last=1))),
        [SELECTED],
    ),
    spec(
        "log_counts",
        [
            Level(
                name="block",
                partition=blocks(4, 2),
                pool=BOTH,
                score=Score(form="dot", bias="log_count", normalise="softmax"),
                select=top(2, last=1),
            )
        ],
        [
            SELECTED,
            Attend(name="all", over="block", values="pooled", bias="log_count"),
        ],
        combine=GATES,
    ),
    spec("stopped", stopping(gain=0.2, entries=3), [SELECTED]),
    spec(
        "stopped_after",
        stopping(gain=0.3, entries=2, after="window"),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
    spec(
        "stopped_sorted",
        stopping(order=BY_MEAN, gain=0.4, entries=2),
        [SELECTED],
        kv=4,
    ),
    spec(
        "fraction_head",
        kept(Select(fraction=0.25, scope="head")),
        [SELECTED],
        causal=False,
    ),
    spec(
        "tiers_of_rows",
        pyramid(*ENERGY, query=Query(block=4, pool="mean"), force=Force(last=1)),
        [BY_TIER],
    ),
    spec(
        "stopped_together",
        stopping(query=Query(block=4, pool="mean"), gain=0.3, entries=2),
        [SELECTED],
    ),
    spec(
        "errors_of_rows",
        compensated(query=Query(block=3, pool="mean"), form="pooling_error", bias=None),
        [SELECTED, REST],
        combine=UNION,
        causal=False,
    ),
    spec(
        "fraction_head_of_rows",
        together(Query(block=4, pool="mean"), select=Select(fraction=0.3, scope="head")),
        [SELECTED],
        causal=False,
    ),
    spec(
        "sinks_of_rows",
        together(Query(block=8, pool="mean"), select=Select(top_k=6, force=Force(sink=6, last=1))),
        [SELECTED],
    ),
    spec(
        "sinks_on_top",
        ordered(BY_MASS, select=Select(top_k=1, force=Force(sink=3, last=1, counted=False))),
        [SELECTED],
    ),
    spec(
        "peaks",
        [
            Level(
                name="token",
                partition=Tokens(),
                score=Score(form="dot", normalise="max", share="group", reduce="mean"),
            ),
            Level(
                name="block",
                partition=blocks(4),
                query=Query(block=4, reduce="max"),
                score=Score(source="token", map="max"),
                select=top_p(0.6, force=Force(last=1)),
            ),
        ],
        [SELECTED],
    ),
    spec(
        "sinks_by_share",
        kept(Select(fraction=0.2, force=Force(sink=3, counted=False)), share="group"),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
]


def clustered(keys: object, select: Select, how: str = "mean") -> list[Level]:
    """Blocks of 4 keys, or clusters, for clusters of rows."""
    return [
        Level(
            name="block",
            permute=Permute(keys=keys, queries=KMeans(clusters=4, iterations=2)),
            partition=Clusters() if keys else blocks(4),
            pool=MEAN,
            query=Query(by="cluster", pool=how),
            score=Score(form="dot", normalise="softmax"),
            select=select,
        )
    ]


HALF = Select(top_p=TopP(mass=0.5))
MORE = KMeans(clusters=6, iterations=2)

# clusters of rows that choose together
GATHERED: list[Spec] = [
    spec("rows_clustered", clustered(None, HALF), [SELECTED], causal=False),
    spec("clusters_of_both", clustered(MORE, top(2)), [SELECTED], causal=False, kv=4),
    spec(
        "first_of_clusters",
        clustered(None, HALF, "first"),
        [SELECTED, WINDOW],
        combine=UNION,
        causal=False,
    ),
]
