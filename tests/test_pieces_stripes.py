"""Anchors and spans as whole numbers: kernels find roots and reaches by floats, and none is one off."""

import math

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.graph import Anchors, Spans
from hsgen.rows import Shape
from hsgen.stripes import STRIDE, SpansContext

FAR = [i * i + d for i in (255, 256, 257, 777, 1000, 1023, 1024) for d in (-1, 0, 1)]
CUBES = [i**3 + d for i in (10, 63, 64, 99, 100) for d in (-1, 0, 1)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def anchors_of(p, spans, keys):
    """The tokens of a row's anchors, the oldest first."""
    i, found = spans.anchors.first, []
    while i**spans.anchors.power <= p + 1:
        found.insert(0, p + 1 - i**spans.anchors.power)
        i += 1
    return [token for token in found if token < keys]


def reach_of(p, spans):
    return math.ceil(round(spans.factor * (p + 1) ** spans.power * (1 << 20)) / (1 << 20))


def found(folder, device, where, spans, chosen):
    """What a kernel finds for rows that chose `chosen`, i32[rows, 1, width].  -> starts, spans, weights"""
    width, dim = chosen.shape[-1], 16
    shape = Shape(query_heads=1, kv_heads=1, qk=dim, v=dim, causal=True, precision="ieee")
    context = SpansContext(name="find", shape=shape, width=width, spans=spans, scale=1.0)
    q = torch.zeros(len(where), where.tokens, 1, dim, device=device)
    k = torch.zeros(1, where.keys, 1, dim, device=device).expand(len(where), -1, -1, -1)
    starts = torch.full(chosen.shape, -7, dtype=torch.int32, device=device)
    ends = torch.full((*chosen.shape, 3), -7, dtype=torch.int32, device=device)
    weights = torch.full(chosen.shape, math.nan, device=device)
    kernel("index", context, folder)[(where.tiles(4), 1)](
        *(q, *q.stride()[:3], k, *k.stride()[:3]),
        *(chosen.to(device), starts, ends, weights, where.table.to(device), len(where)),
        BLOCK_R=4,
    )
    return starts.cpu(), ends.cpu(), weights.cpu()


def hold(where, spans, positions, result, chosen):
    """Rows' first slot is the last anchor, and the second one beside it, or what is behind all."""
    starts, ends, weights = result
    for row, (p, keys) in enumerate(positions):
        tokens, before = anchors_of(p, spans, keys), 0
        valid = [e for e in chosen[row, 0].tolist() if 0 <= e < len(tokens)]
        for slot, e in enumerate(chosen[row, 0].tolist()):
            at = (row, 0, slot)
            if e not in valid:
                assert starts[at] == -1, f"row at {p} has {e}, of {len(tokens)} anchors"
                assert weights[at] == -1.0
                continue
            begin, end = max(tokens[e] - reach_of(p, spans), 0), min(tokens[e], p - spans.window)
            assert ends[at].tolist() == [begin, tokens[e], before], f"row at {p}, anchor {e}"
            assert starts[at] == (begin // STRIDE if begin <= end else -1)
            assert weights[at] == pytest.approx(1 / len(valid))
            before = tokens[e] + 1


@pytest.mark.parametrize(
    ("power", "first", "factor", "root", "window"),
    [(2, 4, 2.0, 0.5, 15), (2, 1, 0.7, 0.55, 3), (3, 2, 1.7, 1.0, 0), (6, 1, 1.0, 0.5, 1)],
)
def test_all_rows_of_a_short_text(tmp_path, device, power, first, factor, root, window):
    """Every position up to 400, of keys that end before some of them."""
    spans = Spans(
        anchors=Anchors(power=power, first=first), factor=factor, power=root, window=window
    )
    where = Sequences(q_lens=(400, 400), k_lens=(400, 331), offsets=(0, 0))
    positions = [(p, keys) for keys in where.k_lens for p in range(400)]
    many = [len(anchors_of(p, spans, keys)) for p, keys in positions]
    chosen = torch.tensor([[[max(n - 2, 0), max(n - 1, 1), n]] for n in many], dtype=torch.int32)
    result = found(tmp_path, device, where, spans, chosen)
    hold(where, spans, positions, result, chosen)


@pytest.mark.parametrize(("power", "ends"), [(2, FAR), (3, CUBES)])
@pytest.mark.parametrize(("factor", "root"), [(2.0, 0.5), (0.7, 0.55)])
def test_rows_where_roots_are_whole(tmp_path, device, power, ends, factor, root):
    """Positions up to a million, right before, at and after the next anchor."""
    spans = Spans(anchors=Anchors(power=power, first=2), factor=factor, power=root, window=3)
    keys = max(ends)
    where = Sequences(
        q_lens=(1,) * len(ends), k_lens=(keys,) * len(ends), offsets=tuple(n - 1 for n in ends)
    )
    positions = [(n - 1, keys) for n in ends]
    many = [len(anchors_of(p, spans, keys)) for p, _ in positions]
    chosen = torch.tensor([[[0, n // 2, n - 1, n]] for n in many], dtype=torch.int32)
    result = found(tmp_path, device, where, spans, chosen)
    hold(where, spans, positions, result, chosen)
