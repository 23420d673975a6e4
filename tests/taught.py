"""A spec's loss on kernels beside the reference in float64: its value, and gradients of all tensors."""

import os

import torch

from hsgen import load_kernel
from hsgen.reference import tensor_kinds, tensor_shapes

GPU = os.environ["HSGEN_TEST_LANE"] == "gpu"
# of numbers that are rounded before a dot, or come out so
UNIT = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
TIMES = 4096.0  # what a training in fp16 multiplies its loss with
DOCUMENTS = torch.tensor((0, 13, 13, 14, 33), dtype=torch.int32)


def drawn(spec, B, T, S, dtype, *, packed=False):
    """Leaves; parameters have no batch."""
    device, kinds = "cuda" if GPU else "cpu", tensor_kinds(spec)
    found, tables = {}, {name for name in kinds if name.startswith(("cos_", "sin_"))}
    for name, shape in tensor_shapes(spec, B, T, S).items():
        rows = packed and kinds[name] != "parameter"
        found[name] = torch.randn(shape[1:] if rows else shape).to(dtype).to(device)
    return {name: x.requires_grad_(name not in tables) for name, x in found.items()}


def learn(kernel, x, name, **options):
    """The loss, and the gradients of all tensors."""
    loss = kernel.losses(**x, **options)[name]
    times = TIMES if x["q"].dtype == torch.float16 else 1.0
    grads = derived(loss * times, x)
    if times != 1.0:  # they are no small fp16 numbers
        grads = {tensor: grad.float() / times for tensor, grad in grads.items()}
    return loss.detach(), grads


def derived(loss, x):
    """Gradients by name, 0 where there is none."""
    leaves = {name: each for name, each in x.items() if each.requires_grad}
    grads = torch.autograd.grad(
        loss, list(leaves.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(leaves, grads, strict=True))


def compare(kernel, x, name, reached, *, more=1.0, **options):
    """Hold both to float64's, of the tensors that are `reached`; others have none."""
    dtype = x["q"].dtype
    chosen = options.get("selection") or {}
    given = options | ({"selection": chosen} if chosen else {})
    exact = kernel.reference_losses(**x, **given)[name]
    expected = derived(exact, x)
    loss, grads = learn(kernel, x, name, **options)
    unit = more * UNIT[dtype]
    assert abs(loss.double() - exact) <= unit * (1 + abs(exact)), (loss, exact)
    for tensor, grad in grads.items():
        right = expected[tensor]
        assert grad.isfinite().all(), tensor
        if tensor not in reached:
            assert not grad.any(), tensor
            continue
        size = right.double().norm()
        assert (grad.double() - right.double()).norm() <= 2 * unit * size + 1e-9, (
            tensor,
            (grad.double() - right.double()).norm() / size,
        )
        worst = (grad.double() - right.double()).abs().max()
        assert worst <= 16 * unit * right.abs().max() + 1e-9, (tensor, worst)
    return loss, grads


def check(
    spec, name, reached, *, B=1, T=33, S=None, dtype=torch.float32, packed=None, config=None, **x
):
    """Of drawn tensors."""
    kernel = load_kernel(spec, interpret=not GPU, config=config)
    tensors = drawn(spec, B, T, S or T, dtype, packed=packed is not None)
    if packed is not None:
        x["cu_seqlens_q"] = packed.to(tensors["q"].device)
    return compare(kernel, tensors, name, reached, **x)
