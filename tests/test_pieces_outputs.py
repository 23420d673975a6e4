"""Outputs of branches: each times its gate, in turn added to what is there, in float32."""

import math

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.buckets import PartsContext
from hsgen.rows import Gated


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def run(tmp_path, gates, branches, seen=None):
    """Branches of one part each, one after the other.  branches: [B, T, H, D]; seen: bool[B, T, H]"""
    batch, tokens, heads, dim = branches[0].shape
    where = Sequences(q_lens=(tokens,) * batch, k_lens=(tokens,) * batch)
    table = where.table.to(gates.device)
    o = torch.full_like(branches[0], math.nan)
    lse = torch.empty(batch, heads, tokens, device=gates.device)
    part_lse = torch.zeros(batch, tokens, heads, device=gates.device)
    if seen is not None:
        part_lse[~seen] = -math.inf
    part_lse = part_lse.permute(2, 0, 1).contiguous()
    for i, x in enumerate(branches):
        gate = Gated(column=i, branches=len(branches), first=i == 0)
        context = PartsContext(name=f"merge_{i}", width=1, head_dim=dim, turn=gate)
        parts = x.permute(2, 0, 1, 3).contiguous()
        kernel("merge", context, tmp_path)[(where.tiles(4), heads)](
            parts,
            part_lse,
            gates,
            *gates.stride(),
            o,
            *o.stride()[:3],
            lse,
            *lse.stride(),
            where.rows,
            table,
            len(where),
            0,
            BLOCK_R=4,
        )
    return o


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 80, 192])
def test_gated_sum(tmp_path, device, dtype, dim):
    gates = torch.rand(2, 3, 3, 3, device=device).to(dtype)
    outputs = [torch.randn(2, 3, 3, dim, device=device).to(dtype) for _ in range(3)]
    o = run(tmp_path, gates, outputs)
    parts = [gates[..., i, None].double() * x.double() for i, x in enumerate(outputs)]
    sums = [sum(parts[: i + 1]) for i in range(3)]
    # three products, two sums, and a rounding to the output's dtype of every partial sum
    bound = 8 * 2**-24 * sum(x.double().abs() for x in outputs)
    bound += torch.finfo(dtype).eps * sum(x.abs() for x in sums)
    assert ((o.double() - sums[-1]).abs() <= bound + 1e-7).all()


def test_partial_sums_are_rounded_once_in_turn(tmp_path, device):
    gates = torch.rand(1, 5, 2, 3, device=device).bfloat16()
    outputs = [torch.randn(1, 5, 2, 16, device=device).bfloat16() for _ in range(3)]
    expected = torch.zeros_like(outputs[0])
    for i, x in enumerate(outputs):
        expected = (expected.float() + gates[..., i, None].float() * x.float()).bfloat16()
    assert torch.equal(run(tmp_path, gates, outputs), expected)


def test_strided_gates(tmp_path, device):
    """Gates as a caller may hold them, and exact values."""
    gates = torch.randint(0, 4, (2, 2, 5, 3), device=device).float().permute(2, 3, 1, 0)[:2]
    outputs = [torch.randint(-8, 8, (2, 3, 2, 48), device=device).float() for _ in range(2)]
    o = run(tmp_path, gates, outputs)
    assert torch.equal(o, gates[..., :1] * outputs[0] + gates[..., 1:] * outputs[1])


def test_gates_of_another_dtype_shared_by_rows(tmp_path, device):
    gates = torch.full((1, 1, 1, 1), 0.5, device=device, dtype=torch.float16).expand(1, 7, 5, 1)
    x = torch.randn(1, 7, 5, 32, device=device)
    assert torch.equal(run(tmp_path, gates, [x]), x / 2)


def test_rows_without_keys_begin_a_sum_with_zero(tmp_path, device):
    """What the output held before is never read."""
    seen = torch.rand(1, 9, 2, device=device) < 0.5
    gates = torch.rand(1, 9, 2, 2, device=device)
    outputs = [torch.randn(1, 9, 2, 16, device=device) for _ in range(2)]
    o = run(tmp_path, gates, outputs, seen)
    assert (o[~seen] == 0).all()
    assert (o[seen] != 0).any()
