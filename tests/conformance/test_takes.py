"""Nodes that take keys and rows, on the emitted kernels: other numbers of them, other ways, and ties."""

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
TEXT = """
hsgen: 1
name: buckets
causal: {causal}
{route}
levels:
  - name: bucket
    {when}
    partition: {{tree: {nodes}, takes: {takes}}}
    pool: {{keys: centroid}}
    score: {{form: cosine}}
    select: {{top_k: {rows}, scope: entry}}
attend:
  {other}
  - {{name: buckets, over: bucket, softmax: entry{way}}}
"""
# Nodes, keys and rows of each, and what heads that are in none attend.
OTHERS = {
    "more words than one": {"nodes": 70, "takes": 3, "rows": 9},
    "all keys and rows": {"nodes": 3, "takes": 200, "rows": 200},
    "one node": {"nodes": 1, "takes": 7, "rows": 40, "causal": False},
    "no other way": {"nodes": 6, "takes": 11, "rows": 5, "table": "", "group": 3},
    "heads apart in no order": {
        "nodes": 5,
        "takes": 9,
        "rows": 12,
        "table": "[b, a, a, b, a, b]",
        "other": "{name: near, window: 6, when: a}",
        "group": 3,
        "kv": 2,
    },
    "dense heads": {
        "nodes": 4,
        "takes": 16,
        "rows": 10,
        "other": "{name: all, window: all, when: a}",
        "causal": False,
    },
    "windows of their own": {
        "nodes": 4,
        "takes": 16,
        "rows": 10,
        "other": "{name: near, static: {blocks: 4, per_head: [{window: 1}, {window: 3, sink: 1}]}, when: a}",
        "table": "[a, b, b, a]",
        "kv": 4,
    },
}
NEVER_LEFT_OUT = ("more words than one", "heads apart in no order")
CASES = [
    pytest.param(
        name,
        *lane.values,
        id=f"{name}-{lane.id}",
        marks=lane.marks
        if name in NEVER_LEFT_OUT or lane.id == "gpu"
        else (*lane.marks, pytest.mark.full),
    )
    for name in OTHERS
    for lane in LANES
]
PATTERN = "{name: near, static: {blocks: 4, window: 2}, when: a}"


def other(*, nodes=5, takes=9, rows=7, table="[a, b]", other=PATTERN, causal=True, **shape):
    text = TEXT.format(
        causal=str(causal).lower(),
        route=f"route: {{by: head, table: {table}}}" if table else "",
        when="when: b" if table else "",
        nodes=nodes,
        takes=takes,
        rows=rows,
        other=f"- {other}" if table else "",
        way=", when: b" if table else "",
    )
    return systems.bind(language.parse(text, "buckets"), **({"group": 1, "kv": 2} | shape))


@pytest.mark.parametrize(("name", "lane"), CASES)
def test_other_numbers_are_right(name, lane, seed):
    """Documents with fewer tokens than a node takes, without keys, and without rows."""
    spec = other(dims=(32, 16), **OTHERS[name])
    call, _ = calls.pack(
        spec, [1, 0, 49, 5], key_lengths=[3, 9, 65, 0], dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_of_tokens_that_are_alike_the_first_are_taken(lane):
    """Keys of two kinds and rows of one: a node of five keys has the first five of its kind."""
    spec = other(nodes=2, takes=5, rows=6, dims=(16, 16))
    call = calls.make(spec, T=33, S=33, device=lane, seed=1)
    kinds = torch.eye(16, device=lane)[:2]
    k = kinds[torch.arange(33, device=lane) % 2][None, :, None].expand_as(call.tensors["k"])
    q = kinds[:1][None, :, None].expand_as(call.tensors["q"])
    call = call.with_tensors(
        q=q.contiguous() * 3.0,
        k=k.contiguous(),
        bucket_centroids=(kinds * 5.0).expand_as(call.tensors["bucket_centroids"]).contiguous(),
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    # both nodes have rows 0 to 6, of which the second begins with its first key
    taken = outcome.selection["bucket"][0, :, 1]
    assert [t for t in range(33) if 0 in taken[t]] == [0, 1, 2, 3, 4, 5]
    assert [t for t in range(33) if 1 in taken[t]] == [1, 2, 3, 4, 5, 6]
    # row 6 is in the second alone, and has the mean value of the keys 1, 3 and 5
    values = call.tensors["v"][0, [1, 3, 5], 1].mean(0)
    torch.testing.assert_close(outcome.o[0, 6, 1], values, rtol=1e-5, atol=1e-6)


def _refused(spec, words):
    graph = passes.run(planner.plan(spec))
    with pytest.raises(PlanError, match=words):
        schedule.schedule(graph, Target.named("h100"))


def test_what_no_kernel_does_with_nodes_is_refused():
    _refused(other(nodes=3000), "at most 2048 nodes that take tokens, got 3000")
    _refused(other(takes=9000), "at most 8192 keys of a node, got 9000")
    _refused(other(rows=9000), "at most 8192 rows of a node, got 9000")
    strided = "{name: near, static: {blocks: 4, window: 2, stride: 3}, when: a}"
    _refused(other(other=strided), "no kernel takes a route by head yet")
