"""Small specs of nodes that take their tokens, entries that take their rows, and softmaxes of entries."""

from __future__ import annotations

from plan_cases import MEAN, SELECTED, UNION, WINDOW, blocks, spec, top

from hsgen.spec import Attend, Delta, LearnedTree, Level, Partition, Pool, Route, Score, Select

COSINE = Score(form="cosine")
SHARED = Score(form="cosine", scale=2.0, share="group", reduce="max")
ROWS = Select(top_k=7, scope="entry")
APART = Attend(name="apart", over="block", softmax="entry")


def buckets(
    *, takes: int = 6, score: Score = COSINE, select: Select = ROWS, when: str | None = None
) -> list[Level]:
    return [
        Level(
            name="block",
            when=when,
            partition=LearnedTree(branching=5, takes=takes),
            pool=Pool(keys="centroid"),
            score=score,
            select=select,
        )
    ]


def entries(partition: Partition, select: Select, score: Score = COSINE) -> list[Level]:
    return [Level(name="block", partition=partition, pool=MEAN, score=score, select=select)]


BUCKETS = [
    spec("buckets", buckets(), [APART]),
    spec("buckets_not_causal", buckets(), [APART], causal=False),
    spec("buckets_of_groups", buckets(score=SHARED), [APART], kv=1),
    spec("buckets_by_row", buckets(select=top(2)), [APART]),
    spec("buckets_in_a_union", buckets(), [SELECTED, WINDOW], combine=UNION),
    spec(
        "buckets_of_some_heads",
        buckets(when="far"),
        [
            WINDOW.model_copy(update={"when": "near"}),
            APART.model_copy(update={"when": "far"}),
        ],
        route=Route(by="head", table=("near", "far")),
    ),
    spec("blocks_take_rows", entries(blocks(4), ROWS), [APART]),
    spec(
        "overlapping_blocks_apart",
        entries(blocks(8, 4), top(3, last=1), SHARED),
        [APART.model_copy(update={"sink": "learned", "softcap": 3.0})],
    ),
    spec(
        "far_blocks_apart",
        entries(blocks(4), top(3)),
        [APART.model_copy(update={"delta": Delta(threshold=0.5, window=5), "rows": "chosen"})],
    ),
]
