"""index, of blocks of 64 tokens: the rows that chose any of them, in their order, and which."""

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.transposed import TransposedContext

DENSE = Sequences(q_lens=(7, 7), k_lens=(300, 250))
PACKED = Sequences(q_lens=(5, 1, 0, 6), k_lens=(133, 120, 3, 70), packed=True)
AHEAD = Sequences(q_lens=(70,), k_lens=(65,))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def choices(sequences, heads, width, seed=0):
    """int32[B, T, H, K] in no order, with repeats, -1 and tokens that no row sees."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences.batch, sequences.tokens, heads, width)
    chosen = torch.randint(-9, max(sequences.k_lens) + 9, shape, generator=generator)
    chosen[..., -1] = chosen[..., 0]
    odd = torch.tensor([-1, 1 << 30, (1 << 31) - 1, -(1 << 31)])
    odd = odd[torch.randint(len(odd), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.8, chosen, odd).to(torch.int32)


def blocks_of(sequences):
    """The sequence and number of every block, in the order of kernels; None where a place has none."""
    length = 0 if sequences.packed else sequences.keys // 64
    total = len(sequences) * (length + 1) + (sequences.keys // 64 if sequences.packed else 0)
    starts = [z * length + row[4] // 64 + z for z, row in enumerate(sequences.table.tolist())]
    found = []
    for bucket in range(total):
        z = max(z for z, start in enumerate(starts) if start <= bucket)
        found.append((z, bucket - starts[z]))
    return length, found


def expected(sequences, chosen, z, entry, heads, causal):
    """Rows of a block by their tokens, of each head."""
    _, q_first, q_len, q_offset, _, k_len = sequences.table[z].tolist()
    found = {}
    for t in range(q_len):
        seen = max(0, min(q_offset + t + 1, k_len) if causal else k_len)
        rows = chosen[0 if sequences.packed else z, q_first + t]
        each = [{n - 64 * entry for n in rows[h].tolist() if 0 <= n < seen} for h in heads]
        each = [{n for n in tokens if 0 <= n < 64} for tokens in each]
        if any(each):
            found[t] = each
    return found


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "own"), [(1, 1), (2, 1), (6, 3)])
@pytest.mark.parametrize("turn", [2, 100])
def test_rows_of_blocks_are_listed(tmp_path, device, sequences, causal, heads, own, turn):
    """In turns of some blocks, behind each of which no bit is left."""
    width = 11
    fields = dict(heads=heads, own=own, width=width, causal=causal)
    mark = kernel("index", TransposedContext(name="mark_test", how="mark", **fields), tmp_path)
    front = kernel("index", TransposedContext(name="front_test", how="front", **fields), tmp_path)
    chosen = choices(sequences, heads, width)
    given = chosen.transpose(1, 2).contiguous().transpose(1, 2).to(device)
    s_b, *strides = given.stride()
    length, blocks = blocks_of(sequences)
    lists, tokens = heads // own, sequences.tokens
    bits = torch.zeros((heads, turn, tokens), dtype=torch.int64, device=device)
    table, rows = sequences.table.to(device), 0
    for first in range(0, len(blocks), turn):
        count = min(turn, len(blocks) - first)
        counts = torch.full((lists, turn), -5, dtype=torch.int32, device=device)
        listed = torch.full((lists, turn, tokens), -5, dtype=torch.int32, device=device)
        words = torch.full((lists, turn, tokens, own), -5, device=device)
        sizes = (length, turn, tokens, table, len(sequences), first)
        mark[(sequences.tiles(4), heads)](
            given, 0 if sequences.packed else s_b, *strides, bits, *sizes, BLOCK_T=4, BLOCK_K=4
        )
        front[(count, lists)](bits, counts, listed, words, *sizes, BLOCK_N=4)
        assert not bits.any()
        for number, (z, entry) in enumerate(blocks[first : first + turn]):
            for head in range(lists):
                own_heads = range(head * own, head * own + own)
                found = expected(sequences, chosen, z, entry, own_heads, causal)
                rows += len(found)
                assert counts[head, number] == len(found), (z, entry)
                assert listed[head, number, : len(found)].tolist() == sorted(found)
                for place, each in enumerate(found.values()):
                    got = [
                        {n for n in range(64) if word >> n & 1}
                        for word in words[head, number, place].tolist()
                    ]
                    assert got == each, (z, entry, place)
    assert rows
