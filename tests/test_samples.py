"""Inputs that are timed on: of a call's shape, and drawn so that neighbours want the same keys."""

import pytest
import torch

from benchmarks import common
from hsgen import captures, samples
from hsgen.measurer import Shape
from hsgen.reference import reference, tensor_shapes
from hsgen.selection import members
from hsgen.spec import load
from hsgen.standins import bind

MOBA = bind(load("moba"), query=4, kv=2, dim=16)


@pytest.mark.parametrize(
    "shape", [Shape(queries=40, keys=40), Shape(queries=3, keys=40, sequences=2)]
)
@pytest.mark.parametrize("name", ["nsa", "dsa", "hisa"])
def test_every_tensor_has_the_shape_of_the_call(name, shape):
    spec = load(name)
    made = samples.for_shape(spec, shape, (), device="cpu", seed=0)
    expected = tensor_shapes(spec, shape.sequences, shape.queries, shape.keys)
    assert {name: tuple(t.shape) for name, t in made.items()} == expected
    assert all(t.isfinite().all() and t.std() > 0.1 for name, t in made.items() if name in "qkv")


@pytest.mark.parametrize("captured", [False, True])
def test_only_vectors_drift(captured):
    """Weights of an index stay above 0, as without; a capture has nothing in their place."""
    groups = captures.load(common.SHIPPED_CAPTURE) if captured else ()
    shape = Shape(queries=50, keys=50)
    made = samples.for_shape(load("dsa"), shape, groups, device="cpu", seed=0)
    assert (made["w_index"] >= 0).all()
    near, far = (
        made["k_index"][0, 1:] - made["k_index"][0, :-1],
        made["k_index"][0, 25:] - made["k_index"][0, :25],
    )
    assert near.float().norm(dim=-1).mean() < far.float().norm(dim=-1).mean()


def test_the_same_seed_draws_the_same():
    first, again, other = (
        samples.for_shape(MOBA, Shape(queries=9, keys=9), (), device="cpu", seed=n)["q"]
        for n in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_neighbours_choose_alike():
    """Of the blocks that rows are free to choose; moba's mean of many tokens forgets their noise."""
    moba = common.with_budget(common.with_blocks(MOBA, "chunk", 16), "chunk", 6)
    drawn = {
        "random": samples.make(moba, "random", 1024, "cpu", 0, (), dtype=torch.float32),
        "drifting": samples.for_shape(
            moba, Shape(queries=1024, keys=1024), (), device="cpu", seed=0, dtype=torch.float32
        ),
    }
    shares = {}
    for kind, x in drawn.items():
        chosen = members(reference(moba, x).selection["chunk"], 64)[0, 512:, 0]
        shares[kind] = float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum())
    assert shares["drifting"] > shares["random"] + 0.3, shares
