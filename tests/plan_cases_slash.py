"""Small specs of the family that chooses columns, diagonals and blocks head by head."""

from __future__ import annotations

from plan_cases import MEAN, SELECTED, UNION, WINDOW, blocks, spec, top

from hsgen.spec import (
    Attend,
    Diagonals,
    Force,
    Level,
    Query,
    Route,
    Score,
    Select,
    Spec,
    Statistic,
    Tokens,
    TopP,
    Where,
)

MASS = Score(form="dot", normalise="softmax")
LAST = Query(last=4, reduce="sum")
SLASHES = Attend(name="slashes", over="slash")


def slash(select: Select | None = None, *, size: int = 1, **more: object) -> Level:
    """Entries by how far they lie before a row."""
    given = {"score": MASS, "query": LAST} | more
    return Level(name="slash", partition=Diagonals(size=size), select=select or near(3, 1), **given)


def near(k: int, first: int) -> Select:
    """The first diagonals are those next to the row."""
    return Select(top_k=k, force=Force(first=first))


def columns(select: Select, **more: object) -> Level:
    """Tokens that all rows see alike."""
    given = {"score": MASS, "query": LAST} | more
    return Level(name="block", partition=Tokens(), select=select, **given)


def wide(size: int, select: Select, **more: object) -> list[Level]:
    """Diagonals, and blocks of them."""
    return [
        slash().model_copy(update={"name": "thin", "select": None} | more),
        Level(
            name="slash",
            partition=Diagonals(size=size),
            score=Score(source="thin", map="sum"),
            select=select,
        ),
    ]


def flex(threshold: float, **more: object) -> Spec:
    """By a statistic, blocks that are pooled or columns and diagonals."""
    share = Select(top_p=TopP(mass=0.6))
    fewest = Select(budget_from="column", budget_in="tokens", force=Force(first=1))
    part = Statistic(
        divergence="estimate",
        source="column_block",
        threshold=threshold,
        below="pooled",
        above="vertical_slash",
    )
    taken = Score(source="column", map="sum")
    levels = [
        Level(
            name="estimate",
            partition=blocks(4),
            pool=MEAN,
            query=Query(last=4, pool="mean"),
            score=MASS,
        ),
        columns(share).model_copy(update={"name": "column"}),
        slash(share),
        Level(name="column_block", partition=blocks(4), score=taken),
        Level(name="block", when="vertical_slash", partition=blocks(4), score=taken, select=fewest),
        Level(
            name="slash_block",
            when="vertical_slash",
            partition=Diagonals(size=4),
            score=Score(source="slash", map="sum"),
            select=fewest.model_copy(update={"budget_from": "slash"}),
        ),
        Level(
            name="pooled",
            when="pooled",
            partition=blocks(4),
            pool=MEAN,
            query=Query(block=4, pool="mean"),
            score=MASS,
            select=Select(
                top_p=TopP(mass=0.6, boundary="drop", scope="head"),
                force=Force(first=1, last=1, counted=False),
            ),
        ),
    ]
    branches = [
        SELECTED.model_copy(update={"when": "vertical_slash"}),
        Attend(name="slashes", over="slash_block", when="vertical_slash"),
        Attend(name="blocks", over="pooled", when="pooled"),
    ]
    route = Route(by="sample_head", statistic=part)
    return spec("flex", levels, branches, route=route, combine=UNION, **more)


def unlike(
    similarity: float,
    select: Select | None = None,
    *,
    size: int = 4,
    rows: int = 4,
    centred: bool = True,
    top_p: TopP | None = None,
) -> list[Level]:
    """Means of blocks, where tokens are alike."""
    top_p = top_p or TopP(mass=0.7, boundary="drop", min=1, of="rest")
    where = Where(similarity=similarity, centred=centred)
    return [
        Level(
            name="block",
            partition=blocks(size),
            pool=MEAN,
            query=Query(block=rows, pool="mean"),
            score=MASS,
            select=select or Select(top_p=top_p, force=Force(where=where)),
        )
    ]


def sparge(similarity: float, *, kv: int = 2, causal: bool = True, **more: object) -> Spec:
    name = "sparge" if not more else "sparge_of_" + "_".join(more)
    return spec(name, unlike(similarity, **more), [SELECTED], kv=kv, causal=causal)


SLASH: list[Spec] = [
    spec("diagonals", [slash()], [SLASHES]),
    spec("diagonals_of_each_row", [slash(query=None)], [SLASHES]),
    spec("diagonals_of_blocks", [slash(query=Query(block=4, reduce="max"))], [SLASHES]),
    spec(
        "diagonals_of_groups",
        [slash(score=MASS.model_copy(update={"share": "group", "reduce": "mean"}))],
        [SLASHES, WINDOW],
        combine=UNION,
    ),
    spec("diagonals_by_mass", [slash(Select(top_p=TopP(mass=0.6)))], [SLASHES]),
    spec("diagonals_by_share", [slash(Select(fraction=0.3), query=None)], [SLASHES]),
    spec(
        "columns_and_diagonals", [columns(near(4, 2)), slash()], [SELECTED, SLASHES], combine=UNION
    ),
    spec("wide_diagonals", wide(4, near(2, 1)), [SLASHES]),
    spec("wide_diagonals_alone", wide(3, near(2, 1), query=None), [SLASHES]),
    spec(
        "minference",
        [
            columns(near(4, 2), when="vertical_slash"),
            slash(when="vertical_slash"),
            Level(
                name="pooled",
                when="block_sparse",
                partition=blocks(4),
                pool=MEAN,
                query=Query(block=4, pool="mean"),
                score=Score(form="dot"),
                select=top(2),
            ),
        ],
        [
            SELECTED.model_copy(update={"when": "vertical_slash"}),
            SLASHES.model_copy(update={"when": "vertical_slash"}),
            Attend(name="blocks", over="pooled", when="block_sparse"),
            WINDOW.model_copy(update={"when": "a_shape"}),
        ],
        route=Route(by="head", input=("vertical_slash", "block_sparse", "a_shape")),
        combine=UNION,
    ),
    flex(0.1),
    flex(0.3).model_copy(update={"name": "flex_between"}),
    flex(0.9, kv=4).model_copy(update={"name": "flex_pooled"}),
    spec(
        "computed_window",
        [
            Level(name="token", partition=Tokens(), query=LAST, score=MASS),
            Level(
                name="other",
                partition=Tokens(),
                query=Query(last=4, pool="mean"),
                score=MASS,
            ),
        ],
        [
            WINDOW.model_copy(update={"when": "near"}),
            Attend(name="all", window="all", when="far"),
        ],
        route=Route(
            by="sample_head",
            statistic=Statistic(
                divergence="token", source="other", threshold=0.2, below="near", above="far"
            ),
        ),
    ),
    sparge(0.3),
    sparge(0.5, size=3, rows=6, centred=False, top_p=TopP(mass=0.5, of="rest")),
    sparge(0.4, size=6, rows=3, kv=4).model_copy(update={"name": "sparge_wide_keys"}),
    sparge(0.4, causal=False).model_copy(update={"name": "sparge_not_causal"}),
    spec(
        "unlike_by_share",
        unlike(0.3, Select(fraction=0.4, force=Force(counted=False, where=Where(similarity=0.3)))),
        [SELECTED],
    ),
    spec(
        "unlike_above",
        unlike(0.3, Select(threshold=0.2, force=Force(last=1, where=Where(similarity=0.3)))),
        [SELECTED],
    ),
]
