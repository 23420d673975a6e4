"""What PyTorch expects of an operator that has a gradient."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from reference_driver import compiler
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from hsgen import analysis, load_kernel, operators
from hsgen.errors import HsgenError
from hsgen.execution import Options
from hsgen.reference import tensor_shapes
from hsgen.runtime import Kernel
from hsgen.spec import parse

SMALL = parse("""
hsgen: 1
name: small
heads: {query: 2, kv: 1}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
  - {name: near, window: 5}
combine: {gates: input}
""")


def tensors(T=17, dtype=torch.float32, B=1):
    shapes = tensor_shapes(SMALL, B, T, T)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def leaves(x):
    return {name: y.detach().clone().requires_grad_() for name, y in x.items()}


def gradients(f, x, grad=None):
    """Of f(**x), beside it."""
    x = leaves(x)
    o = f(**x)
    o.backward(torch.ones_like(o) if grad is None else grad)
    return o, *(each.grad for each in x.values())


MADE = itertools.count()


@pytest.fixture(scope="module", params=["reference", "driver"])
def kernel(request):
    """By both ways; a driver is one of emitted kernels, but for what it computes with."""
    if request.param == "reference":
        return load_kernel(SMALL)
    # operators find a kernel by its key, and pytest may make this one again, in a process that has the last
    key = f"small-driven-{next(MADE)}"
    return Kernel(SMALL, Options(interpret=True), key=key, compiler=compiler())


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def near(found, expected):
    """Where one of both has delta from outputs of branches: what `test_backward` allows each."""
    for a, b in zip(found, expected, strict=True):
        unit = 16 * 2.0**-23 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps / 2
        a, b = a.double(), b.double()
        assert (a - b).norm() <= 2 * unit * b.norm()


def check_all_ways(kernel, lengths, alike=same):
    """Operators called and compiled as one graph have the same bits; what is eager too, or is near."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in lengths:
        x = tensors(T)
        with torch.profiler.profile():  # it shows operators, so they are called
            expected = gradients(kernel, x)
        same(gradients(compiled, x), expected)
        alike(gradients(kernel, x), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def check_operators(kernel, T, device="cpu"):
    x = {name: each.to(device) for name, each in tensors(T).items()}
    call = kernel._call(leaves(x), kernel._attending, "bthd", (None,) * 5, None)
    torch.library.opcheck(operators.forward, (kernel._key, *call))
    with torch.no_grad():
        o, *lse, chosen = operators.forward(kernel._key, *call)
    call = call._replace(
        tensors=[each.detach() for each in call.tensors], selection=[chosen], levels="block"
    )
    grads = [torch.randn_like(each) for each in (o, *lse)]
    torch.library.opcheck(operators.backward, (kernel._key, grads, [o, *lse], *call))


def test_all_ways_are_one(kernel):
    check_all_ways(kernel, (17, 21))


def test_operators_pass_opcheck(kernel):
    check_operators(kernel, 17)


@pytest.mark.full
def test_emitted_kernels_are_operators():
    kernel = load_kernel(SMALL, interpret=True)
    check_all_ways(kernel, (9, 11), near)  # what is eager keeps outputs of gated branches
    check_operators(kernel, 9)


def test_gradients_may_be_broadcast_strided_or_absent(kernel):
    x, shape = tensors(B=2), (2, 17, 2, 16)
    for grad in (
        torch.tensor(0.5).expand(shape),
        torch.randn(16, 2, 17, 2).permute(3, 2, 1, 0),
        torch.randn(2, 17, 1, 1).expand(shape),
    ):
        same(gradients(kernel, x, grad), gradients(kernel, x, grad.contiguous()))
    y, z = leaves(x), leaves(x)
    kernel(**y, return_lse=True)[1]["near"].sum().backward()  # of o, and of one branch, nothing
    o, lse = kernel(**z, return_lse=True)
    (o.sum() * 0 + lse["near"].sum() + lse["selected"].sum() * 0).backward()
    same([each.grad for each in y.values()], [each.grad for each in z.values()])


def test_only_what_requires_grad_gets_one(kernel):
    x = tensors()
    x["v"].requires_grad_()
    kernel(**x).sum().backward()
    assert x["v"].grad is not None
    assert all(each.grad is None for name, each in x.items() if name != "v")


def test_autocast_gives_every_tensor_its_dtype(kernel):
    """That of the region, and gradients that of the leaf."""
    x = tensors()
    x["q"], x["k"] = (
        x["q"].half(),
        x["k"].half(),
    )  # of a layer that autocast ran; v, gates: parameters
    y = leaves(x)
    with torch.autocast("cpu", torch.float16):
        o = kernel(**y)
        chosen = kernel.select(**x)
    half = {name: each.half() for name, each in x.items()}
    expected = kernel(**half)
    assert o.dtype == torch.float16
    assert torch.equal(o, expected)
    assert torch.equal(chosen["block"].indices, kernel.select(**half)["block"].indices)
    o.sum().backward()
    assert y["v"].grad.dtype == torch.float32
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.float16):
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**x), expected)


@pytest.mark.parametrize("way", ["whole", "reentrant", "selective"])
def test_activations_may_be_checkpointed(kernel, way):
    x, calls = tensors(), kernel.stats().calls

    def block(**y):
        y = {name: each * 2 for name, each in y.items()}
        return kernel(**y) * 2

    keep = lambda _, op, *arguments, **more: (  # noqa: E731
        CheckpointPolicy.MUST_SAVE
        if op == torch.ops.hsgen.forward.default
        else CheckpointPolicy.PREFER_RECOMPUTE
    )
    options = {
        "whole": {"use_reentrant": False},
        "reentrant": {"use_reentrant": True},
        "selective": {
            "use_reentrant": False,
            "context_fn": lambda: create_selective_checkpoint_contexts(keep),
        },
    }[way]
    names = list(x)
    run = lambda *values: block(**dict(zip(names, values, strict=True)))  # noqa: E731
    found = gradients(lambda **y: checkpoint(run, *y.values(), **options), x)
    assert kernel.stats().calls - calls == (1 if way == "selective" else 2)
    same(found, gradients(block, x))


def test_a_second_derivative_is_refused(kernel):
    x = leaves(tensors())
    with pytest.raises(HsgenError, match=r"once, not twice\n.*create_graph=True"):
        torch.autograd.grad(kernel(**x).sum(), x["q"], create_graph=True)
    exact = kernel.reference(**x).square().sum()
    (first,) = torch.autograd.grad(exact, x["v"], create_graph=True)
    assert torch.autograd.grad(first.sum(), x["v"])[0].any()


def test_floating_point_operations_are_counted(kernel):
    """Of a whole prompt what `hsgen show` says; its halves are it together, and documents their sum."""

    def count(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    x = tensors(32)
    whole = analysis.total(kernel.graph).flops
    assert count(lambda: kernel(**x)) == whole.evaluate(32)
    assert count(
        lambda: kernel(**{n: torch.cat([y, y]) for n, y in x.items()})
    ) == 2 * whole.evaluate(32)
    cu = torch.tensor([0, 12, 32], dtype=torch.int32)
    packed = {name: each[0] for name, each in x.items()}
    parts = whole.evaluate(12) + whole.evaluate(20)
    assert count(lambda: kernel(**packed, cu_seqlens_q=cu)) == parts
    tail = {**x, "q": x["q"][:, 16:], "gates": x["gates"][:, 16:]}
    later = whole.evaluate(32) - whole.evaluate(16)
    assert count(lambda: kernel(**tail)) == later
    select = count(lambda: kernel.select(**x))
    assert count(lambda: kernel(**x, selection=kernel.select(**x))) == whole.evaluate(32)
    attends = sum(
        cost.flops.evaluate(32)
        for name, cost in analysis.costs(kernel.graph).items()
        if name in ("selected.o", "near.o", "o")
    )
    assert select == whole.evaluate(32) - attends
    o = kernel(**leaves(x))
    assert count(lambda: o.sum().backward()) == 2 * attends


@pytest.mark.gpu
def test_cuda_trains_compiled_cast_and_recomputed():
    """Forward and backward under inductor and autocast, checkpointed, and nothing waits for the device."""
    kernel = load_kernel(SMALL)
    x = {name: each.cuda() for name, each in tensors(100, torch.bfloat16).items()}
    expected = gradients(kernel, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = gradients(kernel, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(again, expected)
    names = list(x)
    run = lambda *values: kernel(**dict(zip(names, values, strict=True)))  # noqa: E731
    same(gradients(lambda **y: checkpoint(run, *y.values(), use_reentrant=False), x), expected)
    # what is eager keeps outputs of gated branches; operators, by which compiled and cast calls go, keep
    # none: each branch adds to o in its turn, and delta comes from the logits again
    with torch.no_grad():
        o = kernel(**x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        called = gradients(kernel, x)
    same(called[:1], [o])
    near(called, expected)
    torch._dynamo.reset()
    same(gradients(torch.compile(kernel, fullgraph=True), x), called)
    wide = {name: each.float() for name, each in x.items()}
    with torch.autocast("cuda", torch.bfloat16):
        o, *grads = gradients(kernel, wide)
    same([o, *(each.bfloat16() for each in grads)], called)
    check_operators(kernel, 40, "cuda")


PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_page_on_training_runs(monkeypatch):
    """All but what needs two ranks, which `ranks_child` runs; inductor would compile for half a minute."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    torch._dynamo.reset()
    found = {}
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert sum("init_device_mesh" in text for text in snippets) == 1
    for text in snippets:
        if "init_device_mesh" not in text:
            text = text.replace("fullgraph=True", "fullgraph=True, backend='aot_eager'")
            exec(compile(text, "training.md", "exec"), found)
    assert found["y"].shape == (2, 50, 64)
    assert all(each.grad.any() for each in found["tree"].values())
    attends = [found["counts"][getattr(torch.ops.hsgen, name)] for name in ("forward", "backward")]
    assert attends[1] > attends[0] > 0
