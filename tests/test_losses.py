"""Losses of a spec as operators and on kernels: their values, whom they teach, what no kernel computes."""

import os

import emitted
import pytest
import torch
from template_lint import lint

from hsgen import dryrun, load_kernel, losses, operators, pipeline, resources
from hsgen.errors import ArgumentError, HsgenError, PlanError
from hsgen.reference import tensor_shapes
from hsgen.spec import Kl, Loss, load, parse
from hsgen.target import H100

GPU = os.environ["HSGEN_TEST_LANE"] == "gpu"

INDEXED = """
hsgen: 1
name: indexed
heads: {{query: 4, kv: 2}}
head_dim: 16
index: {{heads: 2, dim: 16, keys: shared}}
levels:
  - name: token
    partition: tokens
    score: {{form: index_dot, share: group}}
  - name: block
    partition: {{blocks: 4}}
    score: {{from: token, map: max}}
    select: {{top_k: 2, force: {{last: 1}}}}
attend:
  - {{name: selected, over: block}}
loss: {{kl: {{level: block, over: {over}}}}}
"""
GATE = {"q_gate", "k_gate", "block_key_weight", "block_key_norm", "cos_block", "sin_block"}
ALL, SELECTED = (parse(INDEXED.format(over=over)) for over in ("all", "selected"))


def few(name):
    """A shipped spec, of few heads."""
    spec = load(name)
    heads = spec.heads.model_copy(update={"query": 2 * spec.heads.group, "kv": 2})
    return spec.model_copy(update={"heads": heads})


def small(name):
    """And of short ones; other sizes are left alone."""
    spec = few(name)
    dims = spec.head_dim.model_copy(update={"qk": 16, "v": 16})
    return spec.model_copy(update={"head_dim": dims})


def leaves(spec, B=1, T=19, dtype=torch.float32):
    shapes = tensor_shapes(spec, B, T, T)
    return {n: torch.randn(s, dtype=dtype, requires_grad=True) for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("spec", "T", "taught"),
    [
        (ALL, 19, {"q_index", "k_index"}),
        (SELECTED, 19, {"q_index", "k_index"}),
        (few("seer_attention_r"), 130, GATE),
        (small("hirouter"), 19, {"q", "k", "branch_centroids", "leaf_centroids"}),
        (small("ssa"), 19, {"q", "k", "v", "gates"}),
    ],
    ids=["kl", "kl of the selected", "gate", "dual entropy", "two-way distillation"],
)
def test_losses_teach_whom_they_should(spec, T, taught):
    """With the gradients of the reference in float64."""
    kernel, x = load_kernel(spec), leaves(spec, T=T, dtype=torch.float64)
    (name, exact), *_ = kernel.reference_losses(**x).items()
    expected = torch.autograd.grad(
        exact, list(x.values()), materialize_grads=True, allow_unused=True
    )
    found = kernel.losses(**x)
    assert list(found) == [name]
    torch.testing.assert_close(found[name].double(), exact)
    (2 * found[name]).backward()
    for (which, each), grad in zip(x.items(), expected, strict=True):
        assert each.grad.any() == (which in taught), which
        torch.testing.assert_close(each.grad, 2 * grad)


def test_losses_are_operators():
    kernel, x = load_kernel(SELECTED), leaves(SELECTED)
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    torch.library.opcheck(operators.losses, (kernel._key, *call))
    torch._dynamo.reset()

    def train(**y):
        return kernel(**y).square().mean() + 0.1 * kernel.losses(**y)["kl"]

    expected = torch.autograd.grad(train(**x), list(x.values()))
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(**x), list(x.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_learns_what_a_callers_selection_says():
    kernel, x = load_kernel(SELECTED), leaves(SELECTED)
    chosen = kernel.select(**x)
    assert torch.equal(kernel.losses(**x, selection=chosen)["kl"], kernel.losses(**x)["kl"])
    first = {"block": torch.zeros(1, 19, 2, 1, dtype=torch.int32)}  # of one entry, all is known
    assert kernel.losses(**x, selection=first)["kl"] == 0


@pytest.mark.usefixtures("sanitized")
def test_kernels_refuse_a_loss_by_name_and_attend_all_the_same():
    kernel, x = load_kernel(ALL, interpret=True), leaves(ALL)
    words = r"indexed: no kernel computes the loss kl of .* yet\n(.*\n)*.*reference_losses"
    with pytest.raises(PlanError, match=words):
        kernel.losses(**x)
    with torch.no_grad():
        o = kernel(**x)
        torch.testing.assert_close(o.double(), kernel.reference(**x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="spec 'moba' has no loss"):
        load_kernel("moba").losses(x["q"], x["k"], x["v"])


# --- on kernels

TOKENS = """
hsgen: 1
name: {name}
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: 16}}
causal: {causal}
index: {{heads: {heads}, dim: {dim}, keys: shared{stored}}}
levels:
  - name: token
    partition: tokens
    score: {{form: {form}, share: all, scale: 0.7}}
    select: {{top_k: 9}}
attend:
  - {{name: selected, over: token{attend}}}
loss: {{kl: {{level: token, over: {over}, heads: {take}}}}}
"""
CHILDREN = """
hsgen: 1
name: {name}
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: 16}}
index: {{heads: {heads}, dim: {dim}, keys: shared}}
levels:
  - name: block
    partition: {{blocks: 6}}
    pool: {{keys: mean}}
    score: {{form: relu_weighted, share: all}}
    select: {{beam: 3, force: {{first: 1, last: 1}}}}
  - name: token
    within: block
    partition: tokens
    score: {{form: relu_weighted, share: all, scale: 0.7}}
    select: {{top_k: 9}}
attend:
  - {{name: selected, over: token}}
loss: {{kl: {{level: token, over: {over}}}}}
"""
PLAIN = {
    "name": "taught",
    "query": 4,
    "kv": 2,
    "qk": 16,
    "heads": 2,
    "dim": 16,
    "causal": "true",
    "form": "relu_weighted",
    "over": "all",
    "take": "sum",
    "stored": "",
    "attend": "",
}
LATENT = {"query": 3, "kv": 1, "qk": 48, "attend": ", storage: latent", "stored": ", dtype: fp8"}
# of numbers that are rounded before a dot, or come out so
UNIT = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# of many heads some score 0 but for rounding: whether they count is that rounding's
TIES = 2.0**-13 if GPU else 0.0
DOCUMENTS = torch.tensor((0, 13, 13, 14, 33), dtype=torch.int32)


def taught(text=TOKENS, **changes):
    return parse(text.format(**PLAIN | changes))


def learn(kernel, x, **options):
    """The loss, and the gradients of all tensors."""
    loss = kernel.losses(**x, **options)["kl"]
    grads = torch.autograd.grad(loss, list(x.values()), materialize_grads=True, allow_unused=True)
    return loss.detach(), dict(zip(x, grads, strict=True))


def check(spec, *, B=1, T=33, S=None, dtype=torch.float32, packed=None, config=None, **options):
    """Values and gradients of kernels beside those of the reference in float64."""
    device = "cuda" if GPU else "cpu"
    kernel = load_kernel(spec, interpret=not GPU, config=config)
    x = {}
    for name, shape in tensor_shapes(spec, B, T, S or T).items():
        whole = torch.randn(shape[1:] if packed is not None else shape)
        x[name] = whole.to(dtype).to(device).requires_grad_()
    if packed is not None:
        options["cu_seqlens_q"] = packed.to(device)
    chosen = options.get("selection") or (kernel.select(**x, **options) if spec.levels else None)
    exact = kernel.reference_losses(**x, **options | {"selection": chosen})["kl"]
    expected = torch.autograd.grad(
        exact, list(x.values()), materialize_grads=True, allow_unused=True
    )
    loss, grads = learn(kernel, x, **options)
    unit = UNIT[dtype]
    assert abs(loss.double() - exact) <= unit * (1 + abs(exact)), (loss, exact)
    for (name, grad), right in zip(grads.items(), expected, strict=True):
        assert grad.dtype == dtype and grad.isfinite().all(), name
        if not name.endswith("index"):
            assert not grad.any(), name
            continue
        most = 2 * unit + TIES
        off = (grad.double() - right.double()).norm() / right.double().norm()
        assert off <= most, (name, off)
        greatest = right.abs().max()
        assert (grad.double() - right.double()).abs().max() <= 8 * most * greatest, name
    return loss, grads


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize(
    "changes",
    [
        {"over": "all"},
        {"over": "selected"},
        {"over": "selected", "causal": "false", "take": "max"},
        {"query": 3, "kv": 1, "qk": 48, "heads": 3, "dim": 48},
        LATENT | {"over": "selected"},
        {"form": "relu_sum"},
    ],
    ids=["all", "selected", "not causal, max", "odd heads and dims", "latent, fp8", "no weights"],
)
def test_kernels_compute_the_kl_of_an_index(changes):
    check(taught(**changes))


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("over", ["all", "selected"])
def test_kernels_compute_the_kl_below_parents(over):
    """Over all: over all children of blocks that were kept."""
    check(taught(CHILDREN, over=over))


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("over", ["all", "selected"])
def test_documents_learn_apart(over):
    check(taught(over=over), packed=DOCUMENTS, dtype=torch.float16)


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
def test_rows_that_see_nothing_learn_nothing():
    """Rows before the first key are none of the mean."""
    _, grads = check(taught(), T=20, S=11)
    for name in ("q_index", "w_index"):
        assert not grads[name][:, :9].any() and grads[name][:, 10:].any(), name
    check(taught(over="selected"), B=2, T=5, S=30, kv_lens=torch.tensor((30, 7), dtype=torch.int32))


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
def test_rows_whose_choice_attention_hardly_reads_learn_nothing():
    """Their share of it is no float32 number, nor is what it would be divided by."""
    spec = taught(name="hardly", over="selected", query=1, kv=1)
    kernel, x = load_kernel(spec, interpret=True), leaves(spec, T=4)
    with torch.no_grad():
        x["q"].zero_()[..., 0] = 4.0
        x["k"].zero_()[:, 1:, :, 0] = -95.0  # tokens behind the first: exp(-95) of it
    chosen = torch.full((1, 4, 1, 9), -1, dtype=torch.int32)
    chosen[0, :, 0, :2] = torch.tensor(((0, -1), (1, -1), (1, 2), (0, 3)))
    loss, grads = learn(kernel, x, selection={"token": chosen})
    assert 0 < loss < 100
    for name in ("q_index", "w_index"):
        assert grads[name].isfinite().all(), name
        assert grads[name][:, 3].any() and not grads[name][:, :3].any(), name
    assert grads["k_index"].isfinite().all()


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
def test_turns_of_rows_add_up_to_the_same_bits(monkeypatch):
    """So do two runs; by a scratch of one tile of rows, keys are summed in another order."""
    torch.manual_seed(0)
    loss, grads = check(taught(name="whole"), T=70)
    torch.manual_seed(0)
    again, same = check(taught(name="whole"), T=70)
    assert loss == again and all(torch.equal(grads[name], same[name]) for name in grads)
    monkeypatch.setattr(losses, "SCRATCH_BYTES", 1)
    torch.manual_seed(0)
    turns, made = check(taught(name="turns"), T=70)
    assert turns == loss
    assert all(torch.equal(grads[name], made[name]) for name in ("q_index", "w_index"))
    torch.testing.assert_close(made["k_index"], grads["k_index"], rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
def test_the_operator_gives_what_a_recorded_call_does():
    """Whose gradients are made with its value, and once."""
    spec = taught(name="operator")
    kernel, x = load_kernel(spec, interpret=True), leaves(spec)
    loss, grads = learn(kernel, x)
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    (same,) = operators.losses(kernel._key, *call)
    assert same == loss
    for grad, again in zip(
        grads.values(), torch.autograd.grad(same, list(x.values())), strict=True
    ):
        torch.testing.assert_close(again, grad, rtol=1e-6, atol=1e-9)
    index = [x[name] for name in ("q_index", "k_index", "w_index")]
    with pytest.raises(HsgenError, match="once, not twice"):
        torch.autograd.grad(kernel.losses(**x)["kl"], index, create_graph=True)
    with torch.no_grad():
        assert kernel.losses(**x)["kl"] == loss
    with torch.autocast("cpu", torch.float16):
        less, halves = learn(kernel, x)
    assert 0 < abs(less - loss) < 1e-2
    for name, grad in halves.items():
        assert grad.dtype == torch.float32, name
        torch.testing.assert_close(grad, grads[name], rtol=0.1, atol=1e-3)
    assert kernel.losses(**leaves(spec, T=0))["kl"] == 0


@pytest.mark.skipif(GPU, reason="interpreted")
@pytest.mark.usefixtures("sanitized")
def test_a_callers_list_may_repeat_tokens_and_name_ones_that_are_not_seen():
    spec = taught(CHILDREN, over="selected", name="given")
    T = 20
    tokens = torch.randint(-1, T, (1, T, 1, 7), dtype=torch.int32)
    tokens[..., 3] = tokens[..., 2]
    loss, _ = check(spec, T=T, selection={"token": tokens})
    assert loss > 0


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ALL, "of scores that are mapped, normalised or carried"),
    ],
    ids=["mapped"],
)
def test_losses_that_no_kernel_computes_say_which(spec, words):
    name = next(iter(emitted.graph(spec).outputs.loss))
    match = f"no kernel computes the loss {name}{' ' + words if words else ''} yet"
    with pytest.raises(PlanError, match=match):
        losses.plan(emitted.graph(spec), H100)


def large(name, over="all"):
    return load(name).model_copy(
        update={"name": f"{name}_kl", "loss": Loss(kl=Kl(level="token", over=over))}
    )


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize(("name", "over"), [("dsa_gqa", "all"), ("hisa", "selected")])
def test_sources_of_losses_are_golden(name, over, golden):
    spec = large(name, over)
    plan = losses.plan(emitted.graph(spec), H100, gradients=True)
    golden(f"losses/{name}/plan.txt", str(plan))
    for file, text in emitted.sources(plan).items():
        golden(f"losses/{name}/{file}", text)
        assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize("name", ["hisa", "dsa"])
def test_nothing_grows_with_rows_times_keys(name):
    """Scratch is a turn's: a quarter of the bytes of queries, outputs and the index's, or 128 MiB."""
    plan = losses.plan(emitted.graph(large(name)), H100, gradients=True)
    for tokens in (8192, 131072):
        run = dryrun.run(plan, tokens=tokens)
        scratch = sum(x.bytes for buffer, x in run.buffers if buffer.role == "scratch")
        sizes = plan.sizes
        held = sizes["Hq"] * (sizes["Dqk"] + sizes["Dv"]) + sizes["Hi"] * sizes["Di"]
        assert scratch <= max(plan.scratch_bytes, 2 * tokens * held // 4)


@pytest.mark.skipif(GPU, reason="compiled for a card that is not here")
@pytest.mark.parametrize("name", ["hisa", "dsa"])
def test_losses_fit_the_registers_of_an_h100(name):
    artifact = pipeline.compile_losses(large(name, "selected"), H100, gradients=True)
    found = resources.measure(resources.call_jobs(artifact.plan, artifact.module, H100))
    for kernel, one in zip(artifact.plan.kernels, found, strict=True):
        assert isinstance(one, resources.Resources), (kernel.name, one)
        # two stages of scores spill nothing, and take a fifth more time
        assert one.cost.spill_bytes <= (80 if kernel.name == "scores_kl" else 0), kernel.name


@pytest.mark.gpu
@pytest.mark.parametrize("over", ["all", "selected"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_losses_are_right(dtype, over):
    wide = {"query": 8, "qk": 128, "heads": 16, "dim": 128, "over": over}
    check(taught(**wide), T=1500, dtype=dtype)
    check(taught(CHILDREN, **wide), T=700, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "operator"])
def test_what_a_loss_is_times_is_not_rounded_as_its_gradients_are(recorded):
    """2e-6 of 64 rows is half of the least fp16 number; what that is multiplied with makes it more."""
    device = "cuda" if GPU else "cpu"
    spec = taught(name="weighed")
    kernel, x = load_kernel(spec, interpret=not GPU), leaves(spec, T=64, dtype=torch.float16)
    with torch.no_grad():
        x["q_index"] *= 100
    x = {name: each.detach().to(device).requires_grad_() for name, each in x.items()}
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    loss = kernel.losses(**x)["kl"] if recorded else operators.losses(kernel._key, *call)[0]
    (whole,) = torch.autograd.grad(loss, [x["w_index"]], retain_graph=True)
    (less,) = torch.autograd.grad(2e-6 * loss, [x["w_index"]])
    assert less.any()
    torch.testing.assert_close(less.double(), 2e-6 * whole.double(), rtol=2**-9, atol=2**-24)


@pytest.mark.gpu
def test_large_documents_and_latents_learn(monkeypatch):
    """In turns."""
    monkeypatch.setattr(losses, "SCRATCH_BYTES", 1)
    packed = torch.tensor((0, 700, 701, 701, 2001, 2500), dtype=torch.int32)
    wide = LATENT | {"query": 64, "qk": 576, "heads": 32, "dim": 128, "name": "latents_in_turns"}
    check(taught(**wide), T=2500, dtype=torch.bfloat16, packed=packed)


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
def test_a_callers_tiles_end_where_lines_of_the_scratch_do():
    spec = taught(name="tiles")
    kernel = load_kernel(spec, interpret=True, config={"dq_kl": {"BLOCK_N": 256}})
    with pytest.raises(ArgumentError, match="dq_kl: expected BLOCK_N to divide 128, got 256"):
        kernel.losses(**leaves(spec))
    for config in ({"dk_kl": {"BLOCK_R": 64}}, {"scores_kl": {"BLOCK_T": 16}}):
        with pytest.raises(ArgumentError, match="dk_kl: expected BLOCK_R to divide BLOCK_T"):
            load_kernel(spec, interpret=True, config=config).losses(**leaves(spec))
    narrow = {name: {"BLOCK_N": 16} for name in ("scores_kl", "rows_kl", "dq_kl", "dk_kl")}
    check(taught(name="narrow"), config=narrow)
