"""Small specs of the systems that fit no other family: codes, deltas, estimates, cascades."""

from __future__ import annotations

from plan_cases import DOT, MEAN, SELECTED, UNION, WINDOW, blocks, spec, top

from hsgen.spec import (
    Attend,
    Clusters,
    Codes,
    Combine,
    Delta,
    Force,
    Level,
    Parts,
    Permute,
    Pool,
    Query,
    Reuse,
    Score,
    Select,
    Spec,
    Tile,
    Tokens,
    TopP,
)

EIGHTH = Select(fraction=0.3, of="all")


def coded(codes: Codes, select: Select = EIGHTH, *, size: int = 1, **score: object) -> list[Level]:
    """Entries with most codes in common."""
    return [
        Level(
            name="block",
            partition=blocks(size) if size > 1 else Tokens(),
            pool=MEAN if size > 1 else None,
            score=Score(form="code_match", codes=codes, **score),
            select=select,
        )
    ]


def estimated(count: int, select: Select, **score: object) -> list[Level]:
    """Parts of what a row sees, by scores that are given."""
    score = Score(form="given", **score)
    return [Level(name="block", partition=Parts(count=count), score=score, select=select)]


def compressed_tokens(boundary: str = "drop", **top: object) -> list[Level]:
    """As many tokens as all heads together say, those that each head says."""
    asked = Query(last=3, reduce="mean")
    mass = Score(form="dot", normalise="softmax")
    shared = mass.model_copy(update={"share": "all", "reduce": "mean"})
    least = TopP(mass=0.8, boundary=boundary, of="rest", **top)
    by_level = {"partition": Tokens()}
    return [
        Level(name="all_mass", query=asked, score=shared, **by_level),
        Level(
            name="all",
            score=Score(source="all_mass", map="around", width=3),
            select=Select(top_p=least, force=Force(last=2)),
            **by_level,
        ),
        Level(name="mass", query=asked, score=mass, **by_level),
        Level(
            name="block",
            score=Score(source="mass", map="around", width=3),
            select=Select(budget_from="all", force=Force(last=2)),
            **by_level,
        ),
    ]


def apart(select: Select, *, alone: bool = False) -> list[Level]:
    """Blocks by exact attention, for four rows together or for each, before and after a token."""
    query = None if alone else Query(block=4, reduce="mean")
    mass = Score(form="dot", normalise="softmax")
    score = Score(source="mass", map="sum")
    return [
        Level(name="mass", partition=Tokens(), query=query, score=mass),
        Level(name="block", partition=blocks(4), score=score, select=select),
    ]


def tiled(
    name: str = "block",
    *,
    pool: Pool = MEAN,
    select: Select | None = None,
    tile: tuple[int, ...] | None = None,
    **score: object,
) -> Level:
    """Tiles of axes, of keys and of rows, two steps along each."""
    two = select is None or bool(score)
    tile = tile or ((2, 2) if two else (2, 2, 2))
    return Level(
        name=name,
        permute=Permute(keys=Tile(tile=tile)),
        partition=Clusters(),
        query=Query(tile=tile, pool="mean"),
        pool=pool,
        score=Score(form="dot", **score),
        select=select,
    )


CHOSEN_ROWS = SELECTED.model_copy(update={"rows": "chosen"})
ODD: list[Spec] = [
    spec("compressed_tokens", compressed_tokens(), [CHOSEN_ROWS]),
    spec("compressed_keys", compressed_tokens("keep", min=4), [SELECTED], causal=False),
    spec(
        "budgets_of_rows",
        [
            Level(name="some", partition=blocks(4), pool=MEAN, score=DOT, select=top(2, last=1)),
            Level(
                name="block",
                partition=blocks(2),
                pool=MEAN,
                score=Score(form="dot", scale="none"),
                select=Select(budget_from="some", force=Force(first=1, counted=False)),
            ),
        ],
        [CHOSEN_ROWS, WINDOW],
        combine=UNION,
    ),
    spec(
        "masses_of_the_rest",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=MEAN,
                score=Score(form="dot", normalise="softmax"),
                select=Select(
                    top_p=TopP(mass=0.5, of="rest", min=1, max=2, scope="head"),
                    force=Force(first=1, last=1),
                ),
            )
        ],
        [SELECTED],
    ),
    spec("changes", [], [Attend(name="s", window="all", delta=Delta(threshold=0.9, window=3))]),
    spec(
        "changes_kept",
        [],
        [
            Attend(
                name="s",
                window=11,
                softcap=2.0,
                sink="learned",
                delta=Delta(threshold=0.7, window=4, against="kept"),
            )
        ],
        causal=False,
    ),
    spec(
        "changes_of_blocks",
        [Level(name="block", partition=blocks(4), pool=MEAN, score=DOT, select=top(3, last=1))],
        [
            Attend(
                name="selected",
                over="block",
                bias="learned",
                delta=Delta(threshold=0.5, window=2, against="kept"),
            )
        ],
    ),
    spec(
        "tiles",
        [tiled(select=top(2))],
        [SELECTED],
        causal=False,
        axes=(3, 4, 5),
    ),
    spec(
        "tiles_coarse_and_fine",
        [
            tiled("coarse", pool=Pool(keys="mean", values="mean")),
            tiled(select=Select(fraction=0.3), share="all", reduce="sum"),
        ],
        [
            Attend(name="coarse", over="coarse", values="pooled", query="pooled"),
            SELECTED,
        ],
        causal=False,
        axes=(8, 5),
        combine=Combine(gates="channel"),
    ),
    spec(
        "tiles_of_rows_alone",
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=MEAN,
                query=Query(tile=(2, 3), reduce="max"),
                score=Score(form="dot", normalise="softmax"),
                select=Select(top_p=TopP(mass=0.6)),
            )
        ],
        [Attend(name="selected", over="block"), WINDOW],
        causal=False,
        axes=(8, 5),
        combine=UNION,
    ),
    spec("apart", apart(Select(fraction=0.4, apart="input")), [SELECTED], causal=False),
    spec(
        "apart_forced",
        apart(Select(top_k=2, apart="input", force=Force(first=1, last=1)), alone=True),
        [SELECTED],
    ),
    spec(
        "apart_by_mass",
        apart(Select(top_p=TopP(mass=0.7, min=1), apart="input"), alone=True),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
    spec("parts", estimated(5, Select(tokens=3, scope="heads")), [SELECTED]),
    spec("parts_not_causal", estimated(7, Select(tokens=4)), [SELECTED], causal=False),
    spec(
        "parts_of_groups", estimated(6, Select(top_k=2, scope="heads"), share="group"), [SELECTED]
    ),
    spec(
        "parts_by_part",
        estimated(4, Select(fraction=0.4, scope="heads")),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
    spec(
        "parts_by_mass",
        estimated(4, Select(top_p=TopP(mass=0.6)), share="all", normalise="softmax"),
        [SELECTED],
    ),
    spec(
        "given_blocks",
        [
            Level(
                name="block",
                partition=blocks(4),
                score=Score(form="given", share="group", scale=0.5),
                select=Select(tokens=10, scope="heads", force=Force(last=1, counted=False)),
            )
        ],
        [SELECTED],
    ),
    spec(
        "given_tokens",
        [
            Level(
                name="coarse",
                partition=blocks(4),
                score=Score(form="given", share="all"),
                select=Select(beam=2, force=Force(last=1)),
            ),
            Level(
                name="block",
                within="coarse",
                partition=Tokens(),
                score=Score(form="given"),
                select=top(3),
            ),
        ],
        [SELECTED],
    ),
    spec("codes", coded(Codes(words=4, dim=2)), [SELECTED]),
    spec("codes_l1", coded(Codes(words=3, dim=1, distance="l1", buckets=3)), [SELECTED], kv=4),
    spec(
        "codes_of_blocks",
        coded(
            Codes(words=3, dim=3, distance="l1"),
            Select(fraction=0.2, of="all", force=Force(last=1, counted=False)),
            size=4,
            share="group",
            reduce="sum",
        ),
        [SELECTED, WINDOW],
        combine=UNION,
    ),
    spec("codes_not_causal", coded(Codes(words=3, dim=2, buckets=2)), [SELECTED], causal=False),
]

# calls after calls
ODD_CALLS: list[Spec] = [
    spec(
        "diffusion",
        apart(Select(fraction=0.4, apart="input")),
        [SELECTED],
        causal=False,
        reuse=(Reuse(level="block", over="steps", role="final", dense=1, attend="given"),),
    ),
]
