"""segments: one float32 vector an entry, over exactly its tokens."""

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.kernels import SegmentsContext

NAN = float("nan")
DENSE = Sequences(q_lens=(1, 1), k_lens=(22, 13))
PACKED = Sequences(q_lens=(1, 1, 1, 1, 1), k_lens=(7, 0, 3, 12, 5), packed=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def context(**changes):
    fields = dict(name="pool_test", how="mean", heads=2, head_dim=32, size=4, stride=4)
    return SegmentsContext(**(fields | changes))


def expected(c, x, weight, position):
    """Entries of one sequence, by the definition.  x: [S, H, D] -> float64[N, H, D or 2 D]"""
    x, entries = x.double(), []
    for start in range(0, len(x), c.stride):
        tokens = x[start : start + c.size]
        if len(tokens) < c.size and not c.short:
            break
        if c.how == "mean":
            entries.append(tokens.mean(0))
        elif c.how == "max":
            entries.append(tokens.amax(0))
        elif c.how == "minmax":
            entries.append(torch.cat((tokens.amin(0), tokens.amax(0)), -1))
        elif c.how == "sum_rsqrt":
            entries.append(tokens.sum(0) / len(tokens) ** 0.5)
        else:
            shifted = tokens if position is None else tokens + position.double().transpose(0, 1)
            entries.append(torch.einsum("jhd,hjde->he", shifted, weight.double()))
    return torch.stack(entries) if entries else x.new_zeros(0, c.heads, c.width)


def check(tmp_path, device, c, sequences, x, *, blocks, weight=None, position=None, rtol=1e-6):
    """Pool all sequences; what is no entry of any keeps its poison."""
    pool = kernel("segments", c, tmp_path)
    short = int(c.short)
    if sequences.packed:
        entries, length = sequences.keys // c.stride + short * len(sequences), short
    else:
        entries = length = -(-sequences.keys // c.stride)
    pooled = torch.full((sequences.batch, entries, c.heads, c.width), NAN, device=device)
    tiles = sequences.batch * entries // blocks["BLOCK_E"] + len(sequences)
    learned = [t for t in (weight, position) if t is not None]
    pool[(tiles, c.heads)](
        x, 0 if sequences.packed else x.stride(0), x.stride(1), x.stride(2), *learned,
        pooled, length, sequences.table.to(device), len(sequences), **blocks,
    )  # fmt: skip
    written = torch.zeros(pooled.shape[:2], dtype=torch.bool)
    for z, (*_, k_first, k_len) in enumerate(sequences.table.tolist()):
        batch = 0 if sequences.packed else z
        begin = z * short + k_first // c.stride if sequences.packed else 0
        own = x[batch, k_first : k_first + k_len]
        exact = expected(c, own, weight, position)
        got = pooled[batch, begin : begin + len(exact)]
        assert not written[batch, begin : begin + len(exact)].any(), "entries of documents collide"
        written[batch, begin : begin + len(exact)] = True
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=rtol, equal_nan=True)
    assert pooled[~written.to(device)].isnan().all()


def whole_numbers(*shape, device, dtype=torch.float32, most=4):
    return torch.randint(-most, most + 1, shape, device=device).to(dtype)


@pytest.mark.parametrize("sequences", [DENSE, PACKED])
@pytest.mark.parametrize("how", ["mean", "max", "minmax", "sum_rsqrt"])
@pytest.mark.parametrize(
    ("size", "stride", "short"), [(4, 4, False), (4, 4, True), (6, 3, False), (1, 1, True)]
)
def test_entries(tmp_path, device, sequences, how, size, stride, short):
    c = context(how=how, size=size, stride=stride, short=short)
    x = torch.randn(sequences.batch, sequences.keys, 2, 32, device=device)
    check(tmp_path, device, c, sequences, x, blocks={"BLOCK_E": 2, "BLOCK_J": 4})


@pytest.mark.parametrize("dim", [32, 80, 96, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_dims(tmp_path, device, dim, dtype):
    c = context(head_dim=dim, size=5, stride=5, short=True)
    x = torch.randn(2, 22, 2, dim, device=device).to(dtype)
    check(tmp_path, device, c, DENSE, x, blocks={"BLOCK_E": 4, "BLOCK_J": 2})


@pytest.mark.parametrize("how", ["max", "minmax"])
def test_extremes_of_strange_numbers(tmp_path, device, how):
    c = context(how=how, short=True)
    some = torch.tensor([NAN, float("inf"), -float("inf"), 0.0, 1.0], device=device)
    chance = torch.tensor([0.05, 0.1, 0.4, 0.3, 0.15], device=device)
    x = some[torch.multinomial(chance, 2 * 22 * 2 * 32, replacement=True)].view(2, 22, 2, 32)
    check(tmp_path, device, c, DENSE, x, blocks={"BLOCK_E": 1, "BLOCK_J": 2})


def test_strides(tmp_path, device):
    """Heads outside tokens, and every second token of a longer tensor."""
    x = torch.randn(2, 2, 44, 32, device=device).transpose(1, 2)[:, ::2]
    check(tmp_path, device, context(), DENSE, x, blocks={"BLOCK_E": 4, "BLOCK_J": 4})
    x = torch.randn(2, 22, 1, 32, device=device).expand(-1, -1, 2, -1)
    check(tmp_path, device, context(), DENSE, x, blocks={"BLOCK_E": 4, "BLOCK_J": 4})


@pytest.mark.parametrize("tokens", [2, 8])
def test_steps_that_do_not_divide(tmp_path, device, tokens):
    c = context(size=7, stride=7, short=True)
    x = torch.randn(2, 22, 2, 32, device=device)
    check(tmp_path, device, c, DENSE, x, blocks={"BLOCK_E": 8, "BLOCK_J": tokens})


@pytest.mark.parametrize("sequences", [DENSE, PACKED])
@pytest.mark.parametrize(("size", "stride"), [(4, 2), (3, 3)])
@pytest.mark.parametrize("position", [True, False])
def test_linear(tmp_path, device, sequences, size, stride, position):
    """Whole numbers, so exact."""
    c = context(how="linear", size=size, stride=stride, position=position)
    x = whole_numbers(sequences.batch, sequences.keys, 2, 32, device=device)
    weight = whole_numbers(2, size, 32, 32, device=device)
    shift = whole_numbers(2, size, 32, device=device) if position else None
    check(
        tmp_path, device, c, sequences, x, weight=weight, position=shift, rtol=0,
        blocks={"BLOCK_E": 16, "BLOCK_D": 16},
    )  # fmt: skip


@pytest.mark.parametrize(("dim", "block"), [(80, 16), (96, 32), (192, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_head_dims(tmp_path, device, dim, block, dtype):
    c = context(how="linear", heads=1, head_dim=dim, size=2, stride=1, position=True)
    sequences = Sequences(q_lens=(1,), k_lens=(19,))
    x = torch.randn(1, 19, 1, dim, device=device).to(dtype)
    weight = (torch.randn(1, 2, dim, dim, device=device) / dim**0.5).to(dtype)
    shift = torch.randn(1, 2, dim, device=device).to(dtype)
    check(
        tmp_path, device, c, sequences, x, weight=weight, position=shift, rtol=1e-5,
        blocks={"BLOCK_E": 16, "BLOCK_D": block},
    )  # fmt: skip


def test_nothing_to_pool(tmp_path, device):
    sequences = Sequences(q_lens=(1, 1), k_lens=(3, 0))
    x = torch.randn(2, 3, 2, 32, device=device)
    check(tmp_path, device, context(), sequences, x, blocks={"BLOCK_E": 1, "BLOCK_J": 4})
