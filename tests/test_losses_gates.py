"""KL of a gate of blocks against pooled attention, on kernels: values, and gradients of what it reads."""

import emitted
import pytest
import torch
from taught import DOCUMENTS, GPU, check, drawn, learn
from template_lint import lint

from hsgen import dryrun, load_kernel, losses, operators, pipeline, resources
from hsgen.errors import ArgumentError, PlanError
from hsgen.spec import load, parse
from hsgen.target import H100

# units that score: blocks of rows with a gate a head, or rows with one a group
TEXT = """
hsgen: 1
name: {name}
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {dim}, v: 16}}
causal: {causal}
levels:
  - name: block
    partition: {{blocks: {size}}}
    kv: gate
    q: gate
    pool: {{keys: {pool}, {then}rotate: {{at: first, dims: {turned}}}}}
    {units}
attend:
  - {{name: selected, over: block}}
loss:
  kl: {{level: block, tokens: {tokens}, {taken}}}
"""
BLOCKS = """query: {{block: {rows}, pool: mean, rotate: first}}
    score: {{form: dot, normalise: softmax}}
    select: {{threshold: 0.01, force: {{last: 1}}}}"""
ROWS = """query: {{rotate: token}}
    score: {{form: dot, normalise: softmax, share: group}}
    select: {{top_k: 2, force: {{last: 1}}}}"""
PLAIN = {
    "query": 4,
    "kv": 2,
    "dim": 16,
    "causal": "true",
    "size": 4,
    "pool": "max_min_mean",
    "then": "",
    "turned": 16,
    "tokens": "max",
}
NORMED = {"then": "then: norm, "}
MEAN = {"pool": "mean"}
interpreted = pytest.mark.skipif(GPU, reason="interpreted")


def blocks(rows=8, by="max", **changes):
    said = {"name": "blocks", "units": BLOCKS.format(rows=rows), "taken": f"rows: {by}"}
    return parse(TEXT.format(**PLAIN | said | changes))


def rows(take="max", **changes):
    said = {"name": "rows", "units": ROWS.format(), "taken": f"heads: {take}"}
    return parse(TEXT.format(**PLAIN | said | changes))


def reached(spec):
    pool = spec.levels[0].pool
    found = {"q_gate", "k_gate"}
    found |= {"block_key_weight"} if pool.keys == "max_min_mean" else set()
    return found | ({"block_key_norm"} if pool.then else set())


def hold(spec, **sizes):
    return check(spec, "kl", reached(spec), more=4, **sizes)


@interpreted
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (blocks(), {"T": 35}),
        (rows(**NORMED), {"T": 35}),
        (blocks(rows=16, by="sum", size=64, tokens="sum", turned=8), {"T": 70}),
        (blocks(causal="false", size=6, dim=48), {"T": 5, "S": 40}),
        (rows("sum", tokens="sum", size=256, **NORMED), {"T": 3, "S": 530}),
        (rows(query=1, kv=1, size=2, turned="8, pairs: neighbours"), {"T": 1, "S": 9}),
        (blocks(), {"T": 20, "S": 11}),
    ],
    ids=[
        *("blocks", "rows", "sums", "not causal, odd sizes", "large entries"),
        *("one row, other pairs", "rows before keys"),
    ],
)
def test_kernels_compute_the_kl_of_a_gate(spec, sizes):
    hold(spec, **sizes)


@interpreted
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("spec", [blocks(), rows(**MEAN)], ids=["blocks", "rows"])
def test_documents_learn_apart(spec):
    hold(spec, packed=DOCUMENTS, dtype=torch.float16)


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_keys_of_others_of_the_batch_have_no_gradient():
    lengths = torch.tensor((40, 13), dtype=torch.int32)
    _, grads = hold(rows(size=6, causal="false", **NORMED, **MEAN), B=2, T=9, S=40, kv_lens=lengths)
    assert grads["k_gate"][1, :13].any() and not grads["k_gate"][1, 13:].any()


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_equal_tokens_share_what_the_greatest_has():
    """As PyTorch's `amax` has it."""
    spec = blocks()
    kernel, x = load_kernel(spec, interpret=True), drawn(spec, 1, 19, 19, torch.float32)
    with torch.no_grad():
        x["k_gate"].round_()
    exact = kernel.reference_losses(**x)["kl"]
    (right,) = torch.autograd.grad(exact, [x["k_gate"]])
    _, grads = learn(kernel, x, "kl")
    torch.testing.assert_close(grads["k_gate"], right.float(), rtol=1e-4, atol=1e-6)


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_turns_of_rows_have_the_same_bits(monkeypatch):
    """But for entries, whose sums are in another order; so does the operator have the same."""
    x = drawn(blocks(), 1, 35, 35, torch.float32)
    loss, grads = learn(load_kernel(blocks(name="whole"), interpret=True), x, "kl")
    monkeypatch.setattr(losses, "SCRATCH_BYTES", 1)
    kernel = load_kernel(blocks(name="turns"), interpret=True)
    turns, made = learn(kernel, x, "kl")
    assert turns == loss
    assert torch.equal(grads["q_gate"], made["q_gate"])
    torch.testing.assert_close(made["k_gate"], grads["k_gate"], rtol=1e-5, atol=1e-7)
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    (traced,) = operators.losses(kernel._key, *call)
    (again,) = torch.autograd.grad(traced, [x["k_gate"]])
    torch.testing.assert_close(again, made["k_gate"], rtol=1e-6, atol=1e-9)


@interpreted
def test_tiles_that_no_dot_takes_are_refused():
    spec = blocks()
    for name, values, words in (
        ("truth_kl", {"BLOCK_U": 1}, "BLOCK_U of at least 2"),
        ("finish_kl", {"BLOCK_E": 8}, "BLOCK_E of at least 16"),
    ):
        kernel = load_kernel(spec, interpret=True, config={name: values})
        with pytest.raises(ArgumentError, match=f"{name}: expected {words}"):
            kernel.losses(**drawn(spec, 1, 4, 4, torch.float32))


@interpreted
def test_tables_of_angles_have_no_gradient_and_say_so():
    spec = rows()
    kernel, x = load_kernel(spec, interpret=True), drawn(spec, 1, 9, 9, torch.float32)
    x["cos_block"].requires_grad_()
    with pytest.raises(ArgumentError, match="cos_block: expected a constant"):
        kernel.losses(**x)


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (blocks(rows=12), "of blocks of rows that are no power of two"),
        (rows(pool="max"), "of keys that are not pooled by max_min_mean or mean"),
        (rows("sum"), "of which heads and tokens are taken differently"),
    ],
    ids=["blocks of 12", "greatest keys", "greatest of sums"],
)
def test_gates_that_no_kernel_teaches_say_so(spec, words):
    with pytest.raises(PlanError, match=f"no kernel computes the loss kl {words}"):
        losses.plan(emitted.graph(spec), H100)


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize("name", ["seer_attention", "seer_attention_r"])
def test_sources_of_gates_are_golden(name, golden):
    plan = losses.plan(emitted.graph(load(name)), H100, gradients=True)
    golden(f"losses/{name}/plan.txt", str(plan))
    for file, text in emitted.sources(plan).items():
        golden(f"losses/{name}/{file}", text)
        assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize("name", ["seer_attention", "seer_attention_r"])
def test_nothing_grows_with_rows_times_keys(name):
    """Scratch of a turn is 128 MiB, or an eighth of the bytes of queries and outputs."""
    plan = losses.plan(emitted.graph(load(name)), H100, gradients=True)
    for tokens in (32768, 131072):
        run = dryrun.run(plan, tokens=tokens)
        found = {"scratch": 0, "level": 0, "output": 0, "turn": 0}
        for buffer, x in run.buffers:
            turn = buffer.name.startswith(("truth_", "lse_", "scores_", "target_"))
            found["turn" if turn else buffer.role] += x.bytes
        heads = 32 + 8 + 8 + (32 if name == "seer_attention" else 8) + 8
        given = 2 * tokens * (128 * heads + 2 * 64)
        assert found["turn"] <= max(plan.scratch_bytes, 2 * tokens * 32 * 256 // 8)
        assert found["scratch"] + found["level"] <= 0.12 * (given + found["output"])


@pytest.mark.skipif(GPU, reason="compiled for a card that is not here")
def test_gates_fit_the_registers_of_an_h100():
    artifact = pipeline.compile_losses(load("seer_attention_r"), H100, gradients=True)
    jobs = resources.call_jobs(artifact.plan, artifact.module, H100)
    names = [kernel.name for kernel in artifact.plan.kernels]
    own = {"truth_kl", "marks_kl", "shares_kl", "of_queries_kl", "of_entries_kl"}
    large = [job for name, job in zip(names, jobs, strict=True) if name in own]
    assert len(large) == len(own)
    for one in resources.measure(large):
        assert isinstance(one, resources.Resources), one
        assert one.cost.spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_gates_are_right(dtype):
    wide = {"query": 8, "dim": 128, "turned": 128, "size": 64}
    hold(blocks(rows=64, name="wide_blocks", **wide), T=1500, dtype=dtype)
    hold(rows(name="wide_rows", **wide, **NORMED), T=1500, dtype=dtype)
    packed = torch.tensor((0, 300, 301, 301, 700), dtype=torch.int32)
    hold(rows("sum", name="some_rows", **wide, tokens="sum"), T=700, dtype=dtype, packed=packed)
    hold(blocks(rows=64, name="some_blocks", **wide, by="sum"), T=700, dtype=dtype, packed=packed)
