"""merge: the gated sum of the branches, in float32."""

import pytest
import torch
from skeletons import kernel

from hsgen.kernels import MergeContext


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def run(tmp_path, context, gates, outputs):
    batch, tokens = gates.shape[:2]
    o = torch.empty_like(outputs[0])
    items = batch * tokens * context.heads
    merge = kernel("merge", context, tmp_path)
    merge[(-(-items // 4),)](gates, *gates.stride(), *outputs, o, tokens, batch * tokens, BLOCK_R=4)
    return o


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 80, 192])
def test_gated_sum(tmp_path, device, dtype, dim):
    context = MergeContext(name="merge", heads=3, head_dim=dim, branches=("one", "two", "three"))
    gates = torch.rand(2, 3, 3, 3, device=device).to(dtype)
    outputs = [torch.randn(2, 3, 3, dim, device=device).to(dtype) for _ in context.branches]
    o = run(tmp_path, context, gates, outputs)
    exact = sum(gates[..., i, None].double() * x.double() for i, x in enumerate(outputs))
    # three products, two sums and one rounding to the output's dtype
    bound = (
        4 * 2**-24 * sum(x.double().abs() for x in outputs) + torch.finfo(dtype).eps * exact.abs()
    )
    assert ((o.double() - exact).abs() <= bound + 1e-9).all()


def test_strided_gates(tmp_path, device):
    """Gates as a caller may hold them, and exact values."""
    context = MergeContext(name="merge", heads=2, head_dim=48, branches=("one", "two"))
    gates = torch.randint(0, 4, (2, 2, 5, 3), device=device).float().permute(2, 3, 1, 0)[:2]
    outputs = [torch.randint(-8, 8, (2, 3, 2, 48), device=device).float() for _ in range(2)]
    o = run(tmp_path, context, gates, outputs)
    assert torch.equal(o, gates[..., :1] * outputs[0] + gates[..., 1:] * outputs[1])


def test_shared_gates(tmp_path, device):
    context = MergeContext(name="merge", heads=5, head_dim=32, branches=("one",))
    gates = torch.full((1, 1, 1, 1), 0.5, device=device).expand(1, 7, 5, 1)
    x = torch.randn(1, 7, 5, 32, device=device)
    assert torch.equal(run(tmp_path, context, gates, [x]), x / 2)
