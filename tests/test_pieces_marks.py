"""index, where rows chose tokens: blocks of 64, a bit a token, and where the union is too dear."""

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.kernels import MarksContext

DENSE = Sequences(q_lens=(7, 7), k_lens=(300, 250))
PACKED = Sequences(q_lens=(5, 1, 0, 6), k_lens=(133, 120, 3, 70), packed=True)
AHEAD = Sequences(q_lens=(8,), k_lens=(5,))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def context(**changes):
    fields = dict(name="index_test", heads=2, width=24, causal=True)
    return MarksContext(**(fields | changes))


def lists(c, sequences, *, most=None, seed=0):
    """int32[B, T, H, K], ascending, each token once, then -1; some beyond what the row sees."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.full((sequences.batch, sequences.tokens, c.heads, c.width), -1, dtype=torch.int32)
    for row in made.flatten(0, 2):
        tokens = torch.randperm(most or max(sequences.k_lens) + 9, generator=generator)
        tokens = tokens[: int(torch.randint(0, c.width + 1, (), generator=generator))]
        row[: len(tokens)] = tokens.sort().values.int()
    return made


def expected(c, sequences, chosen, tile, head, block_t):
    """Tokens that each row of a tile sees and chose, and how many slots the rows may use."""
    z, t0 = sequences.tile(tile, block_t)
    _, q_first, q_len, q_offset, _, k_len = sequences.table[z].tolist()
    batch = 0 if sequences.packed else z
    rows = range(min(block_t, q_len - t0))
    seen = [max(0, min(q_offset + t0 + row + 1, k_len) if c.causal else k_len) for row in rows]
    tokens = [
        {n for n in chosen[batch, q_first + t0 + row, head].tolist() if 0 <= n < seen[row]}
        for row in rows
    ]
    return tokens, min(max(seen), c.width) * len(rows)


def check(tmp_path, device, c, sequences, chosen, *, dear, block_t=4, turn=None):
    """Every tile's blocks, count and bits, in turns of some tiles.  -> tiles whose union was dear"""
    index = kernel("index", c, tmp_path)
    tiles, capacity, cheap = sequences.tiles(block_t), -(-max(sequences.k_lens) // 64), []
    turn = turn or tiles
    for first in range(0, tiles, turn):
        count = min(turn, tiles - first)
        shape = (count, c.heads)
        counts = torch.full(shape, -5, dtype=torch.int32, device=device)
        entries = torch.full((*shape, capacity), -5, dtype=torch.int32, device=device)
        marks = torch.full((count * block_t, c.heads, capacity), -5, device=device)
        index[shape](
            chosen.to(device), counts, entries, marks, capacity,
            sequences.table.to(device), len(sequences), first,
            BLOCK_T=block_t, BLOCK_K=16, BLOCK_N=2, DEAR=dear,
        )  # fmt: skip
        for tile in range(count):
            if sequences.tile(first + tile, block_t) is None:
                continue
            for head in range(c.heads):
                tokens, used = expected(c, sequences, chosen, first + tile, head, block_t)
                blocks = sorted({n // 64 for each in tokens for n in each})
                cheap.append(len(blocks) * 64 * dear <= used)
                assert counts[tile, head] == (len(blocks) if cheap[-1] else -1)
                assert entries[tile, head, : len(blocks)].tolist() == blocks
                for row, own in enumerate(tokens):
                    words = marks[tile * block_t + row, head].tolist()
                    got = {b * 64 + n for b in blocks for n in range(64) if words[b] >> n & 1}
                    assert got == own, (tile, head, row)
    return cheap


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_and_bits(tmp_path, device, sequences, causal):
    c = context(causal=causal)
    assert all(check(tmp_path, device, c, sequences, lists(c, sequences), dear=0, turn=2))


def test_a_union_is_dear_where_rows_share_little(tmp_path, device):
    """Tiles of both kinds in one call."""
    c = context(heads=1, width=128)
    sequences = Sequences(q_lens=(16,), k_lens=(500,))
    chosen = lists(c, sequences)
    chosen[:, :8] = lists(c, sequences, most=128)[:, :8]
    cheap = check(tmp_path, device, c, sequences, chosen, dear=2, block_t=4)
    assert cheap[:4] == [True, True, False, False]


def test_the_highest_bit_is_a_sign(tmp_path, device):
    c = context(heads=1, width=2, causal=False)
    chosen = torch.tensor([63, 191], dtype=torch.int32).expand(1, 3, 1, 2).contiguous()
    assert check(tmp_path, device, c, Sequences(q_lens=(3,), k_lens=(200,)), chosen, dear=0)


def test_nothing_chosen(tmp_path, device):
    c = context()
    chosen = torch.full((2, 7, 2, 24), -1, dtype=torch.int32)
    assert all(check(tmp_path, device, c, DENSE, chosen, dear=2))


# --- tokens, each for itself


def selection(c, sequences, chosen, device):
    """A selection, and where it lies if that is said."""
    if not c.alone:
        return (chosen.to(device),)
    given = chosen.to(device) if device != "cpu" else chosen
    s_b, *strides = given.stride()
    return (given, 0 if sequences.packed else s_b, *strides)


def check_picked(
    tmp_path, device, c, sequences, chosen, *, dear=0, block_t=4, turn=None, block_n=16
):
    """Every tile's tokens, count and rows, in turns of some tiles.  -> tiles whose union was dear"""
    index = kernel("index", c, tmp_path)
    tiles, capacity, cheap = sequences.tiles(block_t), max(sequences.k_lens), []
    turn = turn or tiles
    for first in range(0, tiles, turn):
        shape = (min(turn, tiles - first), c.heads)
        counts = torch.full(shape, -5, dtype=torch.int32, device=device)
        entries, members = torch.full((2, *shape, capacity), -5, dtype=torch.int32, device=device)
        index[shape](
            *selection(c, sequences, chosen, device), counts, entries, members, capacity,
            sequences.table.to(device), len(sequences), first,
            BLOCK_T=block_t, BLOCK_K=16, BLOCK_N=block_n, **({} if c.alone else {"DEAR": dear}),
        )  # fmt: skip
        for tile in range(shape[0]):
            if sequences.tile(first + tile, block_t) is None:
                continue
            for head in range(c.heads):
                tokens, used = expected(c, sequences, chosen, first + tile, head, block_t)
                union = sorted(set().union(*tokens))
                cheap.append(len(union) * dear <= used)
                assert counts[tile, head] == (len(union) if cheap[-1] else -1)
                assert entries[tile, head, : len(union)].tolist() == union
                words = members[tile, head, : len(union)].tolist()
                for row in range(block_t):
                    got = {n for n, word in zip(union, words, strict=True) if word >> row & 1}
                    assert got == (tokens[row] if row < len(tokens) else set()), (tile, head, row)
    return cheap


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_n", [4, 128])
def test_picked_tokens_and_rows(tmp_path, device, sequences, causal, block_n):
    """Where a tile's words are read in many steps, and in one."""
    c = context(causal=causal, how="picked")
    chosen = lists(c, sequences)
    assert all(
        check_picked(tmp_path, device, c, sequences, chosen, dear=0, turn=2, block_n=block_n)
    )


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD])
def test_picked_tokens_of_lists_in_no_order(tmp_path, device, sequences):
    """With repeats, as they lie: every second slot of a list whose heads lie outside of tokens."""
    c = context(how="picked", alone=True, width=24)
    chosen = lists(context(width=48), sequences).flip(-1)
    chosen[..., ::6] = chosen[..., 2::6]
    strided = chosen.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
    assert all(check_picked(tmp_path, device, c, sequences, strided))


def test_picked_tokens_are_dear_where_rows_share_little(tmp_path, device):
    c = context(heads=1, width=128, how="picked")
    sequences = Sequences(q_lens=(16,), k_lens=(500,))
    chosen = lists(c, sequences)
    chosen[:, :8] = lists(c, sequences, most=128)[:, :8]
    cheap = check_picked(tmp_path, device, c, sequences, chosen, dear=3)
    assert cheap[:3] == [True, True, False]


def test_the_last_of_as_many_rows_as_a_word_has_bits(tmp_path, device):
    c = context(heads=1, width=2, causal=False, how="picked")
    chosen = torch.tensor([63, 191], dtype=torch.int32).expand(1, 33, 1, 2).contiguous()
    sequences = Sequences(q_lens=(33,), k_lens=(200,))
    assert check_picked(tmp_path, device, c, sequences, chosen, dear=0, block_t=32, block_n=1)
