"""Runs of tokens that are cut where keys change, of other sizes."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.spec import Force

LANES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(
    *, span=3, threshold=0.7, rows=8, keep=13, pool="sum_rsqrt", causal=True, force=None, **shape
):
    """The shipped spec with other numbers."""
    spec = systems.small("dhsa", causal=causal, **({"group": 2, "kv": 1} | shape))
    chunk, token = spec.levels
    cut = chunk.partition.model_copy(update={"span": span, "threshold": threshold})
    chunk = chunk.model_copy(
        update={
            "partition": cut,
            "query": chunk.query.model_copy(update={"block": rows}),
            "pool": chunk.pool.model_copy(update={"keys": pool}),
        }
    )
    changes = {"top_k": keep, "force": force or token.select.force}
    token = token.model_copy(update={"select": token.select.model_copy(update=changes)})
    return language.verify(spec.model_copy(update={"levels": (chunk, token)}))


OTHERS = {
    "one run": lambda: other(threshold=-1.0, span=1, dims=(32, 16), rows=12, keep=29),
    "means, forced on top": lambda: other(
        pool="mean", force=Force(first=5, last=3, counted=False), group=3, dims=(48, 16)
    ),
    "both sides": lambda: other(causal=False, span=5, dims=(16, 16), force=Force()),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_are_right(name, lane, seed):
    """Documents of more keys than rows, of fewer, or with no row at all; then what a caller brings."""
    lengths, keys = [1, 0, 37, 5, 9], [30, 9, 55, 2, 9]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(-3, 57, outcome.selection["token"].shape, generator=generator)
    call = call.with_options(selection={"token": picks.clamp(min=-1).to(torch.int32).to(lane)})
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_runs_begin_where_keys_change(lane):
    """Three runs of keys that are alike: all of the best is kept, and of the next the first tokens."""
    spec = other(rows=4, keep=48, dims=(16, 16), group=1, threshold=0.5, force=Force())
    call = calls.make(spec, B=1, T=90, device=lane, seed=1)
    axis = torch.zeros(90, dtype=torch.long)
    axis[40:70], axis[70:] = 1, 2
    k = torch.nn.functional.one_hot(axis, 16)[None, :, None].to(call.tensors["k"])
    q = torch.zeros_like(call.tensors["q"])
    q[..., 1], q[..., 0] = 2.0, 1.0  # of the second run most, then of the first
    outcome = RUN[lane](call.with_tensors(q=q, k=k))
    last = outcome.selection["token"][0, -1, 0].cpu()
    assert (last == torch.cat((torch.arange(18), torch.arange(40, 70)))).all()


def test_boundaries_of_a_caller_are_refused():
    spec = other()
    chunk, token = spec.levels
    given = {"boundaries": "given", "span": None, "threshold": None}
    chunk = chunk.model_copy(update={"partition": chunk.partition.model_copy(update=given)})
    spec = language.verify(spec.model_copy(update={"levels": (chunk, token)}))
    with pytest.raises(PlanError, match="level chunk: no kernel cuts keys into runs"):
        backends.compiled(spec, torch.float32)
