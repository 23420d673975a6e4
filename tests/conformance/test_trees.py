"""Learned trees of other depths, on the emitted kernels: tokens by leaf, and rows that go down."""

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
LEVEL = """
  - name: {name}{within}
    partition: {{tree: {branching}}}
    pool: {{keys: centroid}}
    score: {{form: dot, share: group, reduce: {reduce}}}
    select: {{beam: {beam}}}
"""
TEXT = """
hsgen: 1
name: tree
causal: {causal}
levels:{levels}
  - name: token
    within: {last}
    partition: tokens
    score: {{form: dot, share: group, reduce: {reduce}}}
    select: {{top_k: {k}}}
attend: [{{name: selected, over: token}}]
"""
# Children of a node and nodes that are kept, level by level; tokens that are.
OTHERS = {
    "one level": {"tree": ((6, 3),), "k": 9},
    "three levels": {"tree": ((3, 2), (2, 3), (4, 3)), "k": 5},
    "means for both sides": {"tree": ((4, 2), (4, 2)), "k": 4, "reduce": "mean", "causal": False},
    "all are kept": {"tree": ((2, 2), (2, 4)), "k": 64},
}


def other(*, tree, k, reduce="sum", causal=True, **shape):
    levels, above = "", None
    for i, (branching, beam) in enumerate(tree):
        within = f"\n    within: {above}" if above else ""
        above = f"level{i}"
        levels += LEVEL.format(
            name=above, within=within, branching=branching, beam=beam, reduce=reduce
        ).rstrip()
    text = TEXT.format(causal=str(causal).lower(), levels=levels, last=above, k=k, reduce=reduce)
    return systems.bind(language.parse(text, "tree"), **shape)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_trees_of_other_depths_are_right(name, lane, seed):
    """Documents of which one is shorter than the tree is wide, and one has no row at all."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    spec = other(**OTHERS[name], group=3, kv=1)
    lengths = {"key_lengths": [31, 5, 2], "dtype": dtype, "device": lane, "seed": seed}
    packed, _ = calls.pack(spec, [11, 0, 2], **lengths)
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("group", [1, 5])
def test_rows_keep_the_best_of_more_than_they_have_room_for(lane, group, seed):
    """Rows of a tile whose leaves have hundreds of tokens, beside rows that keep all of theirs."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    spec = other(tree=((2, 2), (3, 5)), k=20, group=group, kv=1, dims=(16, 16))
    lengths = {"key_lengths": [700, 30], "dtype": dtype, "device": lane, "seed": seed}
    packed, _ = calls.pack(spec, [21, 30], **lengths)
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
def test_queries_whose_sum_is_beyond_their_type_are_right(lane, seed):
    """Four heads of fp16 below its greatest number, whose sum is not."""
    spec = other(tree=((2, 2), (3, 5)), k=20, group=4, kv=1, dims=(16, 16))
    call = calls.make(spec, T=40, S=300, dtype=torch.float16, device=lane, seed=seed)
    q, k = (call.tensors[name] for name in "qk")
    call = call.with_tensors(q=(q * 12800).clamp(-60000, 60000), k=k * 0.001)
    assert call.tensors["q"].float().sum(2).abs().max() > 65504
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("keys", [24, 600])
def test_of_equal_tokens_the_earlier_are_kept(lane, keys):
    """Whatever leaves they are in: keys of one direction in two lengths, which all rows score alike."""
    spec = other(tree=((2, 2), (2, 4)), k=5, group=1, kv=1, dims=(16, 16))
    call = calls.make(spec, T=24, S=keys, dtype=torch.float32, device=lane, seed=1)
    k = call.tensors["k"]
    ones = torch.zeros_like(k)
    ones[..., 0] = 1.0
    ones[..., 1] = (torch.arange(k.shape[1], device=k.device) % 3 - 1.0)[None, :, None] / 4
    q = torch.zeros_like(call.tensors["q"])
    q[..., 0] = 2.0
    centroids = {
        f"level{i}_centroids": torch.randn(
            1, 2 ** (i + 1), 16, generator=torch.Generator().manual_seed(i)
        ).to(lane)
        for i in range(2)
    }
    call = call.with_tensors(k=ones, q=q, **centroids)
    outcome, exact = RUN[lane](call), call.reference()
    chosen = outcome.selection["token"].cpu()
    assert torch.equal(chosen, exact.selection["token"].indices.cpu())
    assert chosen[0, -1, 0].tolist() == [0, 1, 2, 3, 4]
