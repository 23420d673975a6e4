"""Unions of long choices, which are made of bits: pairs of rows and what they chose are too many to sort."""

import pytest
import torch
from shares import covering

from conformance import backends, calls, systems
from conformance.lab import same
from conformance.oracles import check
from conformance.test_latent import LANES
from conformance.test_logits import RUN
from hsgen import knobs, pipeline
from hsgen.kernels import IndexContext
from hsgen.target import H100

WIDTH = 64


def spec_of(name):
    """Every query head for itself, and lists with room for more blocks than there are."""
    return systems.with_budgets(systems.small(name, group=1, kv=2, dims=(16, 16)), lambda _: WIDTH)


@pytest.mark.parametrize("name", ["quest", "infllm_v2"])
def test_tiles_do_not_shrink_for_what_cannot_be_sorted(name):
    plan = pipeline.compile_spec(spec_of(name), H100).plan
    index, attend = plan.kernel("index_selected"), plan.kernel("attend_selected")
    assert isinstance(index.context, IndexContext)
    assert index.context.how == "sets"
    assert attend.config["BLOCK_T"] == 64


@pytest.mark.parametrize("name", ["quest", "glm_kpool"])
def test_tiles_that_are_sorted_can_be(name):
    """Latents of several heads, whose programs share a token's: fewer rows instead of bits."""
    spec = systems.with_budgets(systems.small(name, group=2, kv=1, dims=(48, 32)), lambda _: 500)
    plan = pipeline.compile_spec(spec, H100).plan
    for kernel in plan.kernels:
        leader = plan.kernel(kernel.follows).config.keywords() if kernel.follows else {}
        values = leader | kernel.config.keywords()
        assert not [*knobs.broken(kernel, values, H100, plan)]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("name", "turns"), covering(["quest", "infllm_v2"], [False, True]))
def test_outputs_are_right_and_the_same_twice(name, lane, turns, seed, monkeypatch):
    """Documents of which one is empty, and rows before the first key; a tile at a time too."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    lengths = {"key_lengths": [400, 4, 40], "dtype": dtype, "device": lane, "seed": seed}
    call = calls.pack(spec_of(name), [70, 0, 44], **lengths)[0]
    if turns:
        driver = backends.compiled(call.spec, dtype, streams=lane == "cuda").driver
        monkeypatch.setattr(driver, "SCRATCH_BYTES", 1)
    first = RUN[lane](call)
    check(call, first)
    same(first, RUN[lane](call), what="two runs")
