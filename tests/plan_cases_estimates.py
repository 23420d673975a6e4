"""Small specs whose levels estimate: vectors in few bits, masses by a branch's sum."""

from __future__ import annotations

from plan_cases import MEAN, SELECTED, UNION, WINDOW, blocks, quest, together, top
from plan_cases import spec as make

from hsgen.spec import Attend, Force, Level, Pool, Query, Rotate, Score, Select, Static, Tokens

LOCAL = Attend(name="local", static=Static(blocks=2, window=2, sink=1))


def sale(dtype: str | None = "int4", **score: object) -> list[Level]:
    """Tokens by a cheap logit over the sum of what is near, blocks by the best of theirs."""
    mass = Score(form="dot", dtype=dtype, normalise="softmax", lse_from="local", **score)
    return [
        Level(name="token", partition=Tokens(), score=mass),
        Level(
            name="block",
            partition=blocks(4),
            query=Query(block=8, reduce="max"),
            score=Score(source="token", map="max"),
            select=Select(threshold=0.3),
        ),
    ]


def rounded(dtype: str, **more: object) -> list[Level]:
    return [
        Level(
            name="block",
            partition=blocks(4),
            score=Score(form="dot", dtype=dtype),
            **({"pool": MEAN, "select": top(3, last=1)} | more),
        )
    ]


def bound_by(branch: str) -> list[Level]:
    """Bounds over a window's sum, so that masses are above 1."""
    (level,) = quest("group", "max")
    score = level.score.model_copy(update={"normalise": "softmax", "lse_from": branch})
    return [
        level.model_copy(
            update={"score": score, "select": Select(threshold=2.0, force=Force(last=1))}
        )
    ]


ESTIMATES = [
    make("sale", sale(), [LOCAL, SELECTED], combine=UNION),
    make("sale_not_causal", sale("int8"), [SELECTED, LOCAL], combine=UNION, causal=False),
    make(
        "sale_by_window",
        sale(None, share="group", reduce="sum"),
        [Attend(name="local", window=5, scale=0.7, softcap=2.0), SELECTED],
        combine=UNION.model_copy(update={"softmax": None, "gates": "input"}),
    ),
    make("bound_by_window", bound_by("window"), [SELECTED, WINDOW], combine=UNION),
    *(make(f"dot_{dtype}", rounded(dtype), [SELECTED]) for dtype in ("bf16", "fp8", "int8")),
    make(
        "rows_int4",
        together(Query(block=4, pool="mean"), score=Score(form="dot", dtype="int4")),
        [SELECTED],
    ),
    make(
        "rotated_int4",
        rounded("int4", pool=Pool(keys="mean", rotate=Rotate(at="first", dims=4, base=100.0))),
        [SELECTED],
    ),
]
