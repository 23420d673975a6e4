"""Intervals that blocks of rows halve, level below level, and what they find beside a window."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import spec as language

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
# Sizes of the levels, rows of a block, where halving ends, and who agrees on a score.
OTHERS = {
    "as published": {"sizes": (16, 8, 4), "rows": 8},
    "rows over intervals": {"sizes": (8, 4), "rows": 16, "until": 2},
    "neither divides": {"sizes": (16, 4), "rows": 12, "share": "group", "last": 2},
    "heads apart": {"sizes": (4,), "rows": 4, "share": "head", "reduce": None},
    "sums of heads": {"sizes": (8, 4), "rows": 3, "share": "all", "reduce": "sum"},
    "means of a group": {"sizes": (8,), "rows": 16, "share": "group", "reduce": "mean"},
    "searched": {"sizes": (64, 32), "rows": 8, "until": 2},
    "searched for both sides": {"sizes": (32,), "rows": 8, "causal": False, "share": "group"},
    "both sides": {"sizes": (16, 4), "rows": 8, "causal": False},
}


def other(*, sizes, rows, until=1, share="all", reduce="max", last=0, causal=True, **shape):
    """HiP with other levels: each keeps five intervals, and forces its first."""
    spec = systems.load("hip").model_copy(update={"causal": causal})
    levels = []
    for size, level in zip(sizes, spec.levels[-len(sizes) :], strict=True):
        force = level.select.force.model_copy(update={"first": 1, "last": last})
        budget = {"beam": 5, "top_k": None} if level is not spec.levels[-1] else {"top_k": 9}
        halving = {"interval": size, "until": until}
        levels.append(
            level.model_copy(
                update={
                    "within": levels[-1].name if levels else None,
                    "partition": level.partition.model_copy(update=halving),
                    "query": level.query.model_copy(update={"block": rows}),
                    "score": level.score.model_copy(update={"share": share, "reduce": reduce}),
                    "select": level.select.model_copy(update={"force": force, **budget}),
                }
            )
        )
    attend = tuple(
        branch.model_copy(update={"window": 11}) if branch.window else branch
        for branch in spec.attend
    )
    spec = spec.model_copy(update={"levels": tuple(levels), "attend": attend})
    return systems.bind(language.verify(spec), **shape)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_searches_of_other_sizes_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than one, or have no row at all."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    spec = other(**OTHERS[name])
    lengths = {"key_lengths": [61, 5, 21], "dtype": dtype, "device": lane, "seed": seed}
    packed, _ = calls.pack(spec, [23, 0, 21], **lengths)
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
def test_a_search_goes_where_the_later_of_equals_is(lane):
    """Exact arithmetic, so that halves tie: the sets are the reference's."""
    spec = other(**OTHERS["as published"], dims=(64, 32))
    call = calls.make(spec, T=45, dtype=torch.float32, device=lane, integers=True, seed=3)
    outcome, exact = RUN[lane](call), call.reference()
    for level in spec.levels:
        assert torch.equal(
            outcome.selection[level.name].cpu(), exact.selection[level.name].indices.cpu()
        ), level.name
