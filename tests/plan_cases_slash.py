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
    Tokens,
    TopP,
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
]
