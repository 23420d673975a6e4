"""Small specs of the systems that fit no other family: codes, deltas, estimates, cascades."""

from __future__ import annotations

from plan_cases import MEAN, SELECTED, UNION, WINDOW, blocks, spec

from hsgen.spec import Codes, Force, Level, Score, Select, Spec, Tokens

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


ODD: list[Spec] = [
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
