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

from hsgen.spec import (
    Attend,
    Blocks,
    Combine,
    Force,
    Index,
    Level,
    Pool,
    Rotate,
    Score,
    Select,
    TopP,
)

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
LATENT_PICKED = Attend(name="picked", over="block", values="pooled", storage="latent")
LATENT_WINDOW = Attend(name="window", window=4, storage="latent")
SINKING = Combine(softmax="union", sink="learned")
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


def pooled(pool: Pool, size: int = 4, stride: int | None = None, **more: object) -> list[Level]:
    """Blocks by the sum of an index's heads over keys that are pooled in some way."""
    return [
        Level(
            name="block",
            partition=Blocks(size=size, stride=stride or size, **more),
            pool=pool,
            score=Score(form="relu_weighted", share="all"),
            select=Select(top_k=2, force=Force(last=1)),
        )
    ]


def attended(pool: Pool, size: int = 4, stride: int | None = None, **more: object) -> list[Level]:
    """Pooled keys and values of their own that are attended, as many as two of them."""
    return [
        Level(
            name="block",
            partition=Blocks(size=size, stride=stride or size, **more),
            kv="own",
            pool=pool,
            score=DOT,
            select=Select(top_k=2),
        )
    ]


def csa() -> list[Level]:
    """Entries of two series, chosen by those of an index that lie alike."""
    entries = Blocks(size=6, stride=3, before=3)
    rotate = Rotate(at="first", dims=2, channels="last", pairs="neighbours")
    pool = Pool(
        keys="gated", softmax="channel", position="learned", series=2, then="norm", rotate=rotate
    )
    return [
        Level(
            name="index",
            partition=entries,
            pool=pool,
            score=Score(form="relu_weighted", share="all"),
        ),
        Level(
            name="block",
            partition=entries,
            kv="block",
            pool=pool,
            score=Score(source="index", map="max"),
            select=Select(top_k=2),
        ),
    ]


BY_CHANNEL = Pool(keys="gated", softmax="channel", position="learned")
BY_TOKEN = Pool(keys="gated", values="gated", softmax="token", position="learned")
PRODUCTION += [
    spec("gated_channels", pooled(BY_CHANNEL), [SELECTED], index=SMALL_INDEX),
    spec("gated_plain", pooled(Pool(keys="gated", softmax="token")), [SELECTED], index=SMALL_INDEX),
    spec("gated_tokens", attended(BY_TOKEN), [PICKED]),
    spec("gated_tokens_not_causal", attended(BY_TOKEN), [PICKED], causal=False),
    spec("gated_heads", attended(BY_CHANNEL, 6, 3), [LATENT_PICKED]),
    spec("early", pooled(MEAN, 5, 2, before=3), [SELECTED], index=SMALL_INDEX),
    spec(
        "early_not_causal",
        pooled(MEAN, 5, 2, before=2),
        [SELECTED],
        index=SMALL_INDEX,
        causal=False,
    ),
    spec("csa", csa(), [LATENT_PICKED, LATENT_WINDOW], index=SMALL_INDEX, combine=SINKING),
    spec(
        "mlp",
        attended(Pool(keys="mlp", values="mlp", hidden=7, position="learned"), 4, 2),
        [PICKED],
    ),
    spec("mlp_of_index", pooled(Pool(keys="mlp")), [SELECTED], index=SMALL_INDEX),
    spec("three_parts", attended(Pool(keys="max_min_mean", values="max")), [PICKED]),
    spec("three_parts_of_index", pooled(Pool(keys="max_min_mean")), [SELECTED], index=SMALL_INDEX),
    *(
        spec(f"rotated_{at}_{pairs}", pooled(pool), [SELECTED], index=SMALL_INDEX)
        for at in ("first", "centre", "token")
        for pairs in ("halves", "neighbours")
        for rotate in [Rotate(at=at, dims=4, base=100.0, pairs=pairs)]
        for pool in [Pool(keys="mean", then="norm", rotate=rotate)]
    ),
    spec(
        "rotated_by_table",
        attended(Pool(keys="max", values="mean", rotate=Rotate(at="token", dims=4))),
        [PICKED],
    ),
]
