"""Unions of long choices, which are made of bits: pairs of rows and what they chose are too many to sort."""

import pytest
import torch

from conformance import calls, systems
from conformance.lab import same
from conformance.oracles import check
from conformance.test_latent import LANES
from conformance.test_logits import RUN
from hsgen import pipeline
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


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", ["quest", "infllm_v2"])
def test_outputs_are_right_and_the_same_twice(name, lane, seed):
    """Documents of which one is empty, and rows before the first key."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    lengths = {"key_lengths": [95, 4, 40], "dtype": dtype, "device": lane, "seed": seed}
    call = calls.pack(spec_of(name), [70, 0, 44], **lengths)[0]
    first = RUN[lane](call)
    check(call, first)
    same(first, RUN[lane](call), what="two runs")
