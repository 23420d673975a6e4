"""Dual entropy of learned trees on kernels: values, and gradients of keys, queries and centroids."""

import emitted
import pytest
import torch
from taught import DOCUMENTS, GPU, check, drawn, learn
from template_lint import lint

from hsgen import dryrun, load_kernel, losses, operators, pipeline, resources
from hsgen.errors import ArgumentError, PlanError
from hsgen.spec import load, parse
from hsgen.target import H100

TREE = """
hsgen: 1
name: {name}
heads: {{query: {query}, kv: {kv}}}
head_dim: {dim}
causal: {causal}
levels:
  - name: branch
    partition: {{tree: {branching}}}
    pool: {{keys: centroid}}
    score: {{form: dot, share: group, reduce: sum}}
    select: {{beam: 2}}
  - name: leaf
    within: branch
    partition: {{tree: {branching}}}
    pool: {{keys: centroid}}
    score: {{form: dot, share: group, reduce: sum}}
    select: {{beam: 2}}
  - name: token
    within: leaf
    partition: tokens
    score: {{form: dot, share: group, reduce: sum}}
    select: {{top_k: 8}}
attend:
  - {{name: selected, over: token}}
loss: {{dual_entropy: {{tree: {tree}, temperature: 0.1, balance: 0.7}}}}
"""
PLAIN = {
    "name": "tree",
    "query": 4,
    "kv": 2,
    "dim": 16,
    "branching": 4,
    "causal": "true",
    "tree": "leaf",
}
TAUGHT = {"q", "k", "branch_centroids", "leaf_centroids"}
interpreted = pytest.mark.skipif(GPU, reason="interpreted")


def tree(**changes):
    return parse(TREE.format(**PLAIN | changes))


@interpreted
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {"T": 33}),
        ({"query": 3, "kv": 1, "dim": 48, "branching": 5}, {"T": 5, "S": 40}),
        ({"tree": "branch", "causal": "false"}, {"T": 1}),
        ({}, {"packed": DOCUMENTS, "dtype": torch.float16}),
    ],
    ids=["plain", "odd, more keys than rows", "one row, one level", "documents in fp16"],
)
def test_kernels_compute_the_dual_entropy_of_a_tree(changes, sizes):
    reached = TAUGHT - ({"leaf_centroids"} if changes.get("tree") == "branch" else set())
    check(tree(**changes), "dual_entropy", reached, more=4, **sizes)


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_sequences_count_as_often_as_they_have_keys():
    """Those of others of the batch have no gradient."""
    lengths = torch.tensor((21, 7), dtype=torch.int32)
    _, grads = check(tree(), "dual_entropy", TAUGHT, B=2, T=5, S=30, more=4, kv_lens=lengths)
    assert grads["k"][1, :7].any() and not grads["k"][1, 7:].any()


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_two_runs_have_the_same_bits_and_tiles_are_free():
    spec = tree()
    x = drawn(spec, 1, 19, 19, torch.float32)
    loss, grads = learn(load_kernel(spec, interpret=True), x, "dual_entropy")
    again, same = learn(load_kernel(spec, interpret=True), x, "dual_entropy")
    assert loss == again and all(torch.equal(grads[name], same[name]) for name in grads)
    config = {
        "walk_k_dual_entropy": {"BLOCK_T": 16},
        "nodes_q_dual_entropy": {"BLOCK_E": 32},
    }
    kernel = load_kernel(spec, interpret=True, config=config)
    other, made = learn(kernel, x, "dual_entropy")
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    for name, grad in made.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-7)
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    (traced,) = operators.losses(kernel._key, *call)
    for grad, name in zip(torch.autograd.grad(traced, [x["q"], x["k"]]), "qk", strict=True):
        torch.testing.assert_close(grad, made[name], rtol=1e-5, atol=1e-8)


@interpreted
def test_tiles_that_no_dot_takes_are_refused():
    spec = tree()
    kernel = load_kernel(spec, interpret=True, config={"walk_k_dual_entropy": {"BLOCK_M": 8}})
    with pytest.raises(ArgumentError, match="walk_k_dual_entropy: expected BLOCK_M of at least 16"):
        kernel.losses(**drawn(spec, 1, 4, 4, torch.float32))


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
def test_trees_of_vectors_of_their_own_say_so():
    text = TREE.format(**PLAIN).replace("within: branch", "within: branch\n    kv: own", 1)
    spec = parse(text.replace("within: leaf", "kv: own\n    within: leaf"))
    with pytest.raises(PlanError, match="dual_entropy of levels with vectors of their own yet"):
        losses.plan(emitted.graph(spec), H100)


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
def test_sources_of_trees_are_golden(golden):
    plan = losses.plan(emitted.graph(load("hirouter")), H100, gradients=True)
    golden("losses/hirouter/plan.txt", str(plan))
    for file, text in emitted.sources(plan).items():
        golden(f"losses/hirouter/{file}", text)
        assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
def test_scratch_is_a_share_of_what_a_call_is_given():
    plan = losses.plan(emitted.graph(load("hirouter")), H100, gradients=True)
    for tokens in (8192, 131072):
        run = dryrun.run(plan, tokens=tokens)
        sizes = {role: 0 for role in ("scratch", "output")}
        for buffer, x in run.buffers:
            sizes[buffer.role] += x.bytes
        given = 2 * tokens * 128 * (32 + 8 + 8)
        assert sizes["scratch"] <= 0.2 * (given + sizes["output"])


@pytest.mark.skipif(GPU, reason="compiled for a card that is not here")
def test_trees_fit_the_registers_of_an_h100():
    """Kernels of queries have the text of those of keys, with more heads."""
    artifact = pipeline.compile_losses(load("hirouter"), H100, gradients=True)
    jobs = resources.call_jobs(artifact.plan, artifact.module, H100)
    names = [kernel.name for kernel in artifact.plan.kernels]
    own = ("walk_k", "vectors_k", "nodes_k")
    large = [job for name, job in zip(names, jobs, strict=True) if name.startswith(own)]
    for one in resources.measure(large):
        assert isinstance(one, resources.Resources), one
        assert one.cost.spill_bytes <= 80  # gradients of all columns beside units in three parts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_trees_are_right(dtype):
    wide = {"query": 8, "dim": 128, "branching": 16, "name": "wide_tree"}
    check(tree(**wide), "dual_entropy", TAUGHT, T=1500, dtype=dtype)
    packed = torch.tensor((0, 300, 301, 301, 700), dtype=torch.int32)
    check(tree(**wide), "dual_entropy", TAUGHT, T=700, dtype=dtype, packed=packed)
