"""rank against a threshold: entries of a block of rows whose softmax masses are above it, and forced ones."""

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.kernels import ThresholdContext

ROWS = 4  # of a block, and tokens of an entry


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def ranked(scores, threshold, tmp_path, device, *, tokens, width, block_n, last=1):
    """What blocks of the last rows keep, of scores where they may choose and of NaN elsewhere."""
    c = ThresholdContext(
        name="rank_test", heads=scores.shape[1], rows=ROWS, size=ROWS, stride=ROWS, short=True,
        causal=True, first=0, last=last, threshold=threshold,
    )  # fmt: skip
    sequences = Sequences(q_lens=(tokens,), k_lens=(tokens,))
    blocks, heads, capacity = scores.shape
    out = torch.full((blocks, heads, width), 7, dtype=torch.int32, device=device)
    rank = kernel("rank", c, tmp_path)
    seen = torch.arange(capacity) <= torch.arange(blocks)[:, None, None]
    there = scores.masked_fill(~seen, float("nan")).to(device)
    rank[(-(-blocks // 4) * 2, heads)](
        there, out, sequences.table.to(device), 1, 0, capacity, width,
        BLOCK_T=4, BLOCK_R=2, BLOCK_N=block_n,
    )  # fmt: skip
    return out.cpu(), seen


@pytest.mark.parametrize("block_n", [4, 16])
def test_what_has_enough_mass_is_kept(tmp_path, device, seed, block_n):
    """Of rows that are read in one piece and in several, some entries of which are beyond all numbers."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(8, 2, 12, generator=generator)
    scores[5, :, 2] = 300.0
    scores[6, :, 1] = -float("inf")
    out, seen = ranked(scores, 0.05, tmp_path, device, tokens=30, width=9, block_n=block_n)
    mass = scores.double().masked_fill(~seen, -float("inf")).softmax(-1)
    for block in range(8):
        for head in range(2):
            kept = [e for e in range(block + 1) if e == block or mass[block, head, e] > 0.05]
            assert out[block, head].tolist() == kept + [-1] * (9 - len(kept))


def test_masses_that_are_the_threshold_are_not_above_it(tmp_path, device):
    """Entries alike weigh exactly the same part, whatever their logits and however they are read."""
    scores = torch.full((8, 1, 12), 1.7)
    for block_n in (2, 16):
        out, _ = ranked(scores, 0.25, tmp_path, device, tokens=32, width=8, block_n=block_n, last=0)
        kept = [[e for e in row if e >= 0] for row in out[:, 0].tolist()]
        assert kept == [[0], [0, 1], [0, 1, 2], [], [], [], [], []]
