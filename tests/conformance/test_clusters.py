"""Rows and keys in clusters, on the emitted kernels: k-means, what clusters choose, and lists of rows."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import passes, planner, schedule
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.target import Target

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
# Clusters of keys and of rows, rounds, and least that are kept.
OTHERS = {
    "more clusters than tokens": {"name": "svg2", "keys": 70, "rows": 66, "least": 60},
    "one cluster of rows": {"name": "svg2", "keys": 9, "rows": 1, "rounds": 3, "least": 0},
    "errors of many": {"name": "svg_ear", "keys": 11, "rows": 4, "rounds": 3, "group": 2},
}
NEVER_LEFT_OUT = "errors of many"
CASES = [
    pytest.param(
        name,
        *lane.values,
        id=f"{name}-{lane.id}",
        marks=lane.marks
        if name == NEVER_LEFT_OUT or lane.id == "gpu"
        else (*lane.marks, pytest.mark.full),
    )
    for name in OTHERS
    for lane in LANES
]


def other(*, name, keys=7, rows=7, rounds=2, least=None, **shape):
    """A system of clusters with other numbers."""
    spec = systems.small(name, **shape)
    levels = []
    for level in spec.levels:
        sides = {"keys": keys, "queries": rows}
        changes = {
            side: order.model_copy(update={"clusters": sides[side], "iterations": rounds})
            for side, order in level.permute
            if side in sides
        }
        update = {"permute": level.permute.model_copy(update=changes)}
        if least is not None and level.select.top_p:
            top_p = level.select.top_p.model_copy(update={"min": least})
            update["select"] = level.select.model_copy(update={"top_p": top_p})
        levels.append(level.model_copy(update=update))
    return language.verify(spec.model_copy(update={"levels": tuple(levels)}))


@pytest.mark.parametrize(("name", "lane"), CASES)
def test_other_numbers_are_right(name, lane, seed):
    """Documents with fewer tokens than clusters, without keys, and without rows."""
    spec = other(dims=(32, 16), **{"group": 1, "kv": 1} | OTHERS[name])
    call, _ = calls.pack(
        spec, [1, 0, 19, 5], key_lengths=[3, 9, 35, 0], dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_rounds_end_where_no_token_moves(lane):
    """Tokens of three kinds: later rounds change nothing, and equal centroids leave all to the first."""
    spec = other(name="svg2", keys=6, rows=4, rounds=9, least=0, dims=(16, 16), group=1, kv=1)
    call = calls.make(spec, T=33, S=47, device=lane, seed=1)
    kinds = torch.eye(16, device=lane)[:3] * 8.0
    q, k = (kinds[torch.arange(n, device=lane) % 3][None, :, None] for n in (33, 47))
    values = torch.arange(47.0, device=lane)[None, :, None, None].expand_as(call.tensors["v"])
    call = call.with_tensors(q=q.contiguous(), k=k.contiguous(), v=values.contiguous())
    outcome = RUN[lane](call)
    check(call, outcome)
    # a row takes the keys of its kind, which are one cluster
    assert ((outcome.selection["cluster"] >= 0).sum(-1) == 1).all()
    for t in range(3):
        mean = torch.arange(t, 47, 3).double().mean()
        near = float(outcome.o[0, t, 0, 0])  # others weigh exp(-16)
        assert near == pytest.approx(float(mean), abs=1e-3)


def _refused(spec, words):
    graph = passes.run(planner.plan(spec))
    with pytest.raises(PlanError, match=words):
        schedule.schedule(graph, Target.named("h100"))


def test_what_no_kernel_does_with_clusters_is_refused():
    _refused(other(name="svg2", keys=5000), "no kernel has more than 4096 clusters yet")
    spec = other(name="svg2")
    (level,) = spec.levels
    top_p = level.select.top_p.model_copy(update={"boundary": "drop"})
    select = level.select.model_copy(update={"top_p": top_p})
    level = level.model_copy(update={"select": select})
    spec = language.verify(spec.model_copy(update={"levels": (level,)}))
    _refused(spec, "no kernel clusters keys but for masses, or errors, of means of all of them yet")
