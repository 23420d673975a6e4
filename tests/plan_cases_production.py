"""Small specs of what production models need: the reference's meaning, no kernel has it yet."""

from __future__ import annotations

from plan_cases import (
    DOT,
    MEAN,
    SELECTED,
    SMALL_INDEX,
    WINDOW,
    blocks,
    kept,
    moba,
    spec,
    top,
)

from hsgen.spec import Attend, Combine, Force, Index, Level, Pool, Score, Select, TopP

LATENT = Attend(name="selected", over="block", storage="latent", scale=0.4)
SINK = Attend(name="selected", over="block", sink="learned", softcap=2.0)


def summed(share: str, form: str = "relu_sum", **force: object) -> list[Level]:
    """Blocks of 4 by the sum of an index's heads."""
    score = Score(form=form, share=share, scale=0.5)
    select = Select(top_k=2, force=Force(**force))
    return [Level(name="block", partition=blocks(4), pool=MEAN, score=score, select=select)]


def picked(**force: object) -> list[Level]:
    """Pooled entries that are selected."""
    pool = Pool(keys="mean", values="mean")
    select = Select(top_k=2, force=Force(**force))
    return [Level(name="block", partition=blocks(4, 2), pool=pool, score=DOT, select=select)]


PICKED = Attend(name="picked", over="block", values="pooled")
PRODUCTION = [
    spec("tail", summed("all", tail=True), [SELECTED], index=SMALL_INDEX),
    spec("tail_first", summed("all", first=1, tail=True), [SELECTED], index=SMALL_INDEX),
    spec(
        "tail_added",
        summed("group", "relu_weighted", first=1, counted=False, tail=True),
        [SELECTED],
        index=Index(heads=4, dim=4),
    ),
    spec("tail_of_fraction", kept(Select(fraction=0.3, force=Force(tail=True))), [SELECTED]),
    spec(
        "tail_of_masses",
        kept(Select(top_p=TopP(mass=0.6), force=Force(first=1, tail=True))),
        [SELECTED],
    ),
    spec(
        "tail_of_added_masses",
        kept(Select(top_p=TopP(mass=0.6), force=Force(first=1, counted=False, tail=True))),
        [SELECTED],
    ),
    spec("summed_in_groups", summed("group", last=1), [SELECTED], index=Index(heads=6, dim=4)),
    *(
        spec(f"index_{dtype}", summed("all", last=1), [SELECTED], index=index)
        for dtype in ("bf16", "fp8", "fp8_unscaled")
        for index in [Index(heads=3, dim=4, dtype=dtype)]
    ),
    spec("latent", summed("all", last=1), [LATENT], index=SMALL_INDEX),
    spec("sink", moba(), [SINK]),
    spec("gated_output", moba(), [SELECTED], combine=Combine(output_gate="channel")),
    spec(
        "gated_output_heads",
        moba(),
        [SELECTED, WINDOW],
        combine=Combine(gates="input", output_gate="head"),
    ),
    spec("picked", picked(last=2), [PICKED]),
    spec(
        "picked_union",
        picked(),
        [
            Attend(name="picked", over="block", values="pooled", softcap=3.0),
            Attend(name="window", window=5, softcap=3.0),
        ],
        combine=Combine(softmax="union", sink="learned", output_gate="channel"),
    ),
    spec(
        "latent_union",
        [Level(name="block", partition=blocks(4), pool=MEAN, score=DOT, select=top(2, last=1))],
        [
            Attend(name="picked", over="block", values="pooled", storage="latent"),
            Attend(name="window", window=3, storage="latent"),
            Attend(name="selected", over="block", storage="latent"),
        ],
        combine=Combine(softmax="union", sink="learned"),
    ),
]
