"""Branches apart on kernels, and their distance: outputs, log-sum-exps, choices, gradients."""

from dataclasses import replace

import emitted
import pytest
import torch
from taught import DOCUMENTS, GPU, UNIT, check, compare, derived, drawn, learn
from template_lint import lint

from hsgen import backward, dryrun, load_kernel, losses, operators, schedule
from hsgen.errors import ArgumentError, PlanError
from hsgen.spec import HeadDim, Heads, load, parse
from hsgen.target import H100

interpreted = pytest.mark.skipif(GPU, reason="interpreted")
ALL = {"q", "k", "v", "gates"}
SUMMED = """
hsgen: 1
name: summed
heads: {query: 4, kv: 2}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: near, window: 5}
  - {name: far, over: block}
combine: {gates: input}
loss: {distill: {student: far, teacher: near}}
"""


SEVERAL = """
hsgen: 1
name: several
heads: {query: 2, kv: 1}
head_dim: 16
index: {heads: 2, dim: 16, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 3}
attend:
  - {name: chosen, over: token}
  - {name: near, window: 5}
combine: {gates: input}
loss: {kl: {level: token}, distill: {student: chosen, teacher: near}}
"""


def ssa(name="ssa", *, dims=(16, 16), group=2, **changes):
    spec = load("ssa")
    few = {"heads": Heads(query=2 * group, kv=2), "head_dim": HeadDim(qk=dims[0], v=dims[1])}
    (level,) = spec.levels
    select = level.select.model_copy(update={"top_k": 4})
    partition = level.partition.model_copy(update={"size": 4, "stride": 4})
    level = level.model_copy(update={"select": select, "partition": partition})
    distill = spec.loss.distill.model_copy(update=changes)
    loss = spec.loss.model_copy(update={"distill": distill})
    return spec.model_copy(update=few | {"name": name, "levels": (level,), "loss": loss})


@interpreted
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (ssa(), {"T": 21}),
        (ssa(form="mse", toward="teacher", group=1, dims=(48, 16)), {"T": 5, "S": 30}),
        (ssa(), {"packed": DOCUMENTS, "dtype": torch.float16}),
        (parse(SUMMED), {"T": 7}),
    ],
    ids=["both ways", "towards the teacher", "documents in fp16", "of a sum of branches"],
)
def test_kernels_compute_the_distance_of_branches(spec, sizes):
    check(spec, "distill", ALL, more=4, **sizes)


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_calls_are_those_of_branches():
    """In both layouts: of the first the output, of each its log-sum-exp and choice; gradients of all."""
    spec = ssa()
    kernel, x = load_kernel(spec, interpret=True), drawn(spec, 2, 18, 18, torch.float32)
    o, lse = kernel(**x, return_lse=True)
    exact, sums = kernel.reference(**x, return_lse=True)
    torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-5)
    assert lse.keys() == sums.keys()
    grads = derived(o.square().sum() + lse["sparse"].sum(), x)
    right = derived(exact.square().sum() + sums["sparse"].sum(), x)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), right[name].double(), rtol=1e-4, atol=1e-5)
    turned = {name: each.detach().transpose(1, 2) for name, each in x.items()}
    other = kernel(**turned, layout="bhtd").transpose(1, 2)
    torch.testing.assert_close(other, o.detach(), rtol=1e-6, atol=1e-6)
    (loss,) = kernel.losses(**turned, layout="bhtd").values()
    torch.testing.assert_close(loss, kernel.losses(**x)["distill"].detach())
    chosen = kernel.select(**x)
    sparse = kernel.stream("sparse")
    mine = x | {"gates": x["gates"][..., 1:]}
    assert torch.equal(chosen["block"].indices, sparse.select(**mine)["block"].indices)
    assert torch.equal(sparse(**mine, selection=chosen), sparse(**mine))
    _, same = kernel(**x, return_selection=True)
    assert torch.equal(same["block"].indices, chosen["block"].indices)
    given = {"block": torch.zeros(2, 18, 2, 1, dtype=torch.int32)}
    other = kernel.losses(**x, selection=given)["distill"]
    torch.testing.assert_close(
        other.double(), kernel.reference_losses(**x, selection=given)["distill"]
    )


@interpreted
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("branch", ["full", "sparse"])
def test_a_stream_decodes(branch):
    spec = ssa()
    kernel, x = load_kernel(spec, interpret=True), drawn(spec, 1, 9, 9, torch.float32)
    stream, column = kernel.stream(branch), ["full", "sparse"].index(branch)
    x = {name: each.detach() for name, each in x.items()}
    x["gates"] = x["gates"][..., column : column + 1]
    whole = stream(**x)
    cache = stream.new_cache(1, 16, torch.float32)
    steps = [
        stream.decode(**{name: each[:, t : t + 1] for name, each in x.items()}, cache=cache)
        for t in range(9)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_each_of_several_losses_teaches_its_own():
    spec = parse(SEVERAL)
    kernel, x = load_kernel(spec, interpret=True), drawn(spec, 1, 9, 9, torch.float32)
    assert list(kernel.losses(**x)) == ["kl", "distill"]
    compare(kernel, x, "kl", {"q_index", "k_index", "w_index"})
    compare(kernel, x, "distill", ALL, more=4)
    with pytest.raises(ArgumentError, match="config: expected one of .* got 'distance_distill'"):
        load_kernel(spec, interpret=True, config={"distance_distill": {}})(**x)


@interpreted
@pytest.mark.usefixtures("sanitized")
def test_the_operator_gives_what_a_recorded_call_does():
    spec = ssa()
    kernel, x = load_kernel(spec, interpret=True), drawn(spec, 1, 19, 19, torch.float32)
    loss, grads = learn(kernel, x, "distill")
    again, same = learn(kernel, x, "distill")
    assert loss == again and all(torch.equal(grads[name], same[name]) for name in grads)
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    (traced,) = operators.losses(kernel._key, *call)
    assert traced == loss
    for name, grad in derived(traced, x).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        assert kernel.losses(**x)["distill"] == loss
    assert kernel.losses(**drawn(spec, 1, 0, 0, torch.float32))["distill"] == 0


@interpreted
def test_what_is_not_apart_says_so():
    kernel = load_kernel(ssa(), interpret=True)
    with pytest.raises(ArgumentError, match="stream: expected one of full, sparse, got 'dense'"):
        kernel.stream("dense")
    with pytest.raises(ArgumentError, match="expected a spec whose branches are apart, got 'moba'"):
        load_kernel("moba", interpret=True).stream("selected")
    with pytest.raises(PlanError, match="branches apart have kernels one by one"):
        kernel.new_cache(1, 16, torch.float32)
    with pytest.raises(ArgumentError, match="config: expected nothing but of distance_distill"):
        load_kernel(ssa(), interpret=True, config={"attend_full": {"num_warps": 4}})


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
def test_source_of_a_distance_is_golden(golden):
    plan = losses.plan(emitted.graph(load("ssa")), H100, gradients=True)
    golden("losses/ssa/plan.txt", str(plan))
    for file, text in emitted.sources(plan).items():
        golden(f"losses/ssa/{file}", text)
        assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
def test_a_distance_holds_two_outputs_and_little_else():
    run = dryrun.run(losses.plan(emitted.graph(load("ssa")), H100, gradients=True), tokens=32768)
    outputs = 2 * 2 * 32768 * 32 * 64
    assert sum(x.bytes for _, x in run.buffers) <= 1.01 * outputs


def held_by_a_loss(tokens, *, kept):
    """The most that a call of ssa's loss has at a time; inputs and gradients; what branches keep."""
    spec, target = load("ssa"), replace(H100, streams=True)
    distance = dryrun.run(losses.plan(emitted.graph(spec), target, gradients=True), tokens=tokens)
    found, saved, back = [], [], []
    for branch in ("sparse", "full"):
        graph = emitted.graph(spec.stream(branch))
        forward = schedule.schedule(graph, target, apart=kept)
        run = dryrun.run(forward, tokens=tokens)
        found.append(run.given + sum(saved) + run.peak)
        saved.append(run.of("output", "selection"))
        plain = schedule.schedule(graph, target)
        gradients = backward.plan(graph, target, apart=kept)
        back.append(dryrun.gradients(gradients, plain, tokens=tokens))
    found.append(run.given + sum(saved) + distance.peak)
    found.append(run.given + sum(saved) + back[0].peak)
    found.append(run.given + saved[1] + back[0].of("output") + back[1].peak)
    return max(found), run.given + back[0].of("output"), sum(saved)


@pytest.mark.skipif(GPU, reason="of plans, which no card is asked about")
@pytest.mark.parametrize("tokens", [4096, 32768, 131072])
def test_a_loss_of_branches_holds_its_outputs_and_what_it_keeps(tokens):
    peak, given, saved = held_by_a_loss(tokens, kept=True)
    assert peak <= 1.1 * (given + saved)
    least, _, fewer = held_by_a_loss(tokens, kept=False)
    assert least <= 1.1 * (given + fewer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_branches_are_right(dtype):
    """A choice is one of both; of numbers of 16 bits rows may choose otherwise than float64's."""
    spec = ssa("large_ssa", dims=(64, 64), group=16)
    kernel = load_kernel(spec, interpret=not GPU)
    x = drawn(spec, 1, 1500, 1500, dtype)
    chosen = kernel.select(**x)
    loss, grads = learn(kernel, x, "distill", selection=chosen)
    exact = kernel.reference_losses(**x, selection=chosen)["distill"]
    assert abs(loss.double() - exact) <= 8 * UNIT[dtype] * (1 + abs(exact))
    for name, right in derived(exact, x).items():
        off = (grads[name].double() - right.double()).norm() / right.double().norm()
        assert off <= 8 * UNIT[dtype], (name, off)
