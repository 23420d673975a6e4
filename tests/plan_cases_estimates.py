"""Small specs whose levels estimate: vectors in few bits, masses by a branch's sum."""

from __future__ import annotations

from plan_cases import DOT, MASS, MEAN, SELECTED, UNION, WINDOW, blocks, quest, together, top
from plan_cases import spec as make

from hsgen.spec import (
    Attend,
    Force,
    Kl,
    Level,
    Loss,
    Pool,
    Query,
    Rotate,
    Score,
    Select,
    Static,
    Tokens,
    TopP,
)

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


def proxy(size: int = 8, *, heads: str = "head", **select: object) -> list[Level]:
    """A ranking by strided tokens of pooled heads, as long as each head's masses of the last rows."""
    shared = {} if heads == "head" else {"share": heads, "reduce": "sum"}
    return [
        Level(
            name="mass",
            partition=Tokens(),
            query=Query(last=5, reduce="mean"),
            score=Score(form="dot", normalise="softmax", **shared),
        ),
        Level(
            name="budget",
            partition=blocks(4),
            score=Score(source="mass", map="sum"),
            select=Select(top_p=TopP(mass=0.6)),
        ),
        Level(
            name="proxy",
            partition=blocks(2),
            pool=Pool(keys="first"),
            query=Query(block=2, pool="first", heads="mean"),
            score=Score(form="dot", normalise="softmax", share="group"),
        ),
        Level(
            name="block",
            partition=blocks(4),
            query=Query(block=size, reduce="max"),
            score=Score(source="proxy", map="max"),
            select=Select(budget_from="budget", **select),
        ),
    ]


def gate(query: Query, *, score: Score = MASS, share: bool = False, **more: object) -> list[Level]:
    """Blocks by queries and keys of a gate, which are turned once they are pooled."""
    turn = Rotate(at="first", dims=4, base=more.pop("base", None))
    how = score.model_copy(update={"share": "group"}) if share else score
    pool = Pool(keys="max_min_mean", rotate=turn, **more)
    select = Select(threshold=0.3, force=Force(last=1))
    return [
        Level(
            name="block",
            partition=blocks(4),
            kv="gate",
            q="gate",
            pool=pool,
            query=query,
            score=how,
            select=select,
        )
    ]


def learns(**kl: str) -> Loss:
    return Loss(kl=Kl(level="block", heads="max", tokens="max", **kl))


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


PART_OF_ROWS = [
    *proxy(heads="group", min=2)[:2],
    Level(name="block", partition=Tokens(), score=DOT, select=Select(budget_from="budget")),
]
OWN = Force(first=1, last=1)
ESTIMATES = [
    make("proxy", proxy(min=2, force=OWN), [SELECTED]),
    make("proxy_added", proxy(4, force=OWN.model_copy(update={"counted": False})), [SELECTED]),
    make("proxy_all", proxy(heads="all", force=Force(last=2)), [SELECTED], causal=False),
    make(
        "gate_of_blocks",
        gate(Query(block=4, pool="mean", rotate="first")),
        [SELECTED],
        loss=learns(rows="max"),
    ),
    make(
        "gate_of_wide_blocks",
        gate(Query(block=8, pool="max", rotate="centre"), base=10.0),
        [SELECTED],
        loss=learns(rows="sum"),
        causal=False,
    ),
    make(
        "gate_of_groups",
        gate(Query(rotate="token"), share=True, then="norm"),
        [SELECTED],
        loss=learns(),
    ),
    make(
        "gate_turned_before",
        gate(Query(block=4, pool="mean", rotate="token"), share=True, base=9.0),
        [SELECTED],
    ),
    make("part_of_rows", PART_OF_ROWS, [SELECTED]),
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
