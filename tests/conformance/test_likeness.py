"""Blocks that are forced by what their tokens are, and masses where they are ranked, of other sizes."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.spec import Blocks, Force, Select, TopP
from hsgen.spec.model.choices import Where

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
FULL = pytest.mark.full


def always(values, number):
    """All of them on both lanes, of which the CPU has so many in every run."""
    return [
        pytest.param(
            value,
            *lane.values,
            id=f"{value}-{lane.id}",
            marks=(*lane.marks, *((FULL,) if i >= number and lane.id == "cpu" else ())),
        )
        for i, value in enumerate(values)
        for lane in LANES
    ]


ALIKE = Where(similarity=0.2, centred=True)
PLAIN = Force(where=Where(similarity=0.3))
FORCED = Force(first=1, last=2, where=ALIKE)
REST = TopP(mass=0.5, boundary="drop", min=1, of="rest")


def other(*, rows=8, size=4, top_p=REST, force=None, causal=True, **shape):
    """The shipped spec with other blocks, masses, and forced entries."""
    spec = systems.small("sparge", **({"group": 2, "dims": (32, 32)} | shape))
    (level,) = spec.levels
    changes = {
        "partition": Blocks(size=size, stride=size),
        "query": level.query.model_copy(update={"block": rows}),
        "select": Select(top_p=top_p, force=force or Force(where=ALIKE)),
    }
    level = level.model_copy(update=changes)
    return language.verify(spec.model_copy(update={"levels": (level,), "causal": causal}))


OTHERS = {
    "keys over rows": lambda: other(rows=4, size=8, dims=(48, 32), force=FORCED),
    "neither divides": lambda: other(rows=12, size=5, group=3),
    "without causality": lambda: other(causal=False, top_p=TopP(mass=0.7, of="rest"), force=PLAIN),
    "forced ones count": lambda: other(
        top_p=TopP(mass=0.6, boundary="drop", min=3), force=Force(first=2), group=1
    ),
    "forced on top": lambda: other(
        top_p=TopP(mass=0.6, min=2), force=Force(last=1, counted=False), group=1
    ),
}


@pytest.mark.parametrize(("name", "lane"), always(OTHERS, 2))
def test_other_sizes_and_rules_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than one, or have no row at all."""
    lengths, keys = [1, 0, 21, 5], [30, 9, 40, 2]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", [pytest.param("cpu", id="cpu", marks=FULL), LANES[1]])
def test_rows_that_fit_in_no_registers_are_right(lane, seed):
    """Scores that are read again in every pass, and means of more keys than one program adds up."""
    spec = other(size=16, dims=(16, 16), force=Force(first=1, where=ALIKE))
    call = calls.make(spec, T=5, S=1100, device=lane, seed=seed)
    k = call.tensors["k"]
    k[:, 256:512] += 3.0  # which are alike but for their mean
    k[:, :16] = 0.0  # and which are like nothing
    forced = {"rank_block": {"BLOCK_N": 64, "BLOCK_R": 1}}
    check(call, RUN[lane](call, forced=forced))


@pytest.mark.parametrize(("size", "lane"), always((1e-30, 1e30), 1))
def test_lengths_are_those_of_any_numbers(size, lane, seed):
    """Whose squares are no numbers of float32."""
    call = calls.make(other(dims=(16, 16)), T=33, device=lane, seed=seed)
    call.tensors["q"].mul_(1e-30)
    call.tensors["k"].mul_(size)
    check(call, RUN[lane](call))


@pytest.mark.parametrize(
    ("top_p", "words"),
    [
        (TopP(mass=0.5, max=3, of="rest"), "selects by top_p, and more"),
        (TopP(mass=0.5, scope="head", of="rest"), "selects by top_p, and more"),
    ],
)
def test_what_no_kernel_does_is_refused(top_p, words):
    with pytest.raises(PlanError, match=words):
        backends.compiled(other(top_p=top_p), torch.float32)
