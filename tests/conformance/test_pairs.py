"""Pairs of blocks of rows and entries that a head ranks together, of other sizes, some of them forced."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.lab import same
from conformance.oracles import check
from conformance.test_likeness import LANES, always
from hsgen import spec as language
from hsgen.spec import Blocks, Force, Select

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(*, rows=8, size=4, fraction=0.4, force=None, causal=True, **shape):
    """Blocks of tokens in place of tiles of axes."""
    spec = systems.small("sparge", **({"group": 2, "dims": (32, 32)} | shape))
    (level,) = spec.levels
    changes = {
        "partition": Blocks(size=size, stride=size),
        "query": level.query.model_copy(update={"block": rows}),
        "select": Select(fraction=fraction, scope="head", force=force or Force()),
    }
    level = level.model_copy(update=changes)
    return language.verify(spec.model_copy(update={"levels": (level,), "causal": causal}))


OTHERS = {
    "keys over rows": lambda: other(rows=4, size=8),
    "neither divides": lambda: other(rows=12, size=5, group=3, force=Force(first=1, last=1)),
    "without causality": lambda: other(causal=False, force=Force(first=1, counted=False)),
}


@pytest.mark.parametrize(("name", "lane"), always(OTHERS, 1))
def test_other_sizes_and_forced_entries_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than one, or have no row at all."""
    lengths, keys = [1, 0, 21, 5], [30, 9, 40, 2]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_rows_of_several_steps_and_pairs_alike_are_right(lane):
    """Of pairs that weigh the same those of earlier rows are kept, and of a row the earlier entries."""
    spec = other(rows=4, size=2, causal=False, fraction=0.3, group=1, dims=(16, 16))
    call = calls.make(spec, T=17, S=90, device=lane, integers=True)
    call.tensors["k"][:, 40:] = call.tensors["k"][:, :1]  # so that few are left out
    outcome = RUN[lane](call)
    check(call, outcome)
    expected = call.reference().selection["block"].indices
    assert torch.equal(outcome.selection["block"].cpu()[..., : expected.shape[-1]], expected.cpu())
    forced = {"edge_block": {"BLOCK_R": 2}, "score_block": {"BLOCK_T": 2, "BLOCK_M": 16}}
    same(outcome, RUN[lane](call, forced=forced), what="other tiles")
