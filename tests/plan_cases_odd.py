"""Small specs of the systems that fit no other family: codes, deltas, estimates, cascades."""

from __future__ import annotations

from plan_cases import MEAN, SELECTED, UNION, WINDOW, blocks, spec, top

from hsgen.spec import Codes, Force, Level, Parts, Score, Select, Spec, Tokens, TopP

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


ODD: list[Spec] = [
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
