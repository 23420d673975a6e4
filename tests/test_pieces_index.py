"""index: union lists with member bits, from selections in any order and with anything in them."""

import pytest
import torch
from skeletons import Sequences, kernel

from hsgen.kernels import IndexContext, UniteContext


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


@pytest.fixture(params=["union", "sets"])
def how(request):
    """Pairs that are sorted, or bits that are set."""
    return request.param


def context(**changes):
    fields = dict(name="index_test", heads=2, width=4, size=4, stride=4, causal=True)
    return IndexContext(**(fields | changes))


def choices(c, sequences, *, spread=1.0, seed=0):
    """int32[B, T, H, K] with -1, duplicates and indices out of range, mostly among few entries."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences.batch, sequences.tokens, c.heads, c.width)
    most = max(1, int(spread * (max(sequences.k_lens) // c.stride + 1)))
    chosen = torch.randint(0, most, shape, generator=generator)
    odd = torch.tensor([-1, -1, -1, -7, 1 << 30, (1 << 31) - 1, -(1 << 31)])
    odd = odd[torch.randint(len(odd), shape, generator=generator)]
    keep = torch.rand(shape, generator=generator) < 0.75
    return torch.where(keep, chosen, odd).to(torch.int32)


def expected(c, sequences, chosen, tile, head, block_t):
    """Two ascending lists of (entry, rows): what every row sees whole and chose, and the rest."""
    z, t0 = sequence = sequences.tile(tile, block_t)
    _, q_first, q_len, q_offset, _, k_len = sequences.table[z].tolist()
    batch = 0 if sequences.packed else z
    rows = range(min(block_t, q_len - t0))
    members = {}
    for row in rows:
        p = q_offset + t0 + row
        for e in chosen[batch, q_first + t0 + row, head].tolist():
            if (
                0 <= e
                and e * c.stride < k_len
                and (not c.causal or (p >= 0 and e <= p // c.stride))
            ):
                members.setdefault(e, set()).add(row)

    def full(e):
        end = e * c.stride + c.size
        seen = end <= k_len and (not c.causal or end - 1 <= q_offset + t0)
        return seen and members[e] == set(rows)

    assert sequence is not None
    whole = [e for e in sorted(members) if full(e)]
    return whole, [e for e in sorted(members) if e not in whole], members


def check(tmp_path, device, c, sequences, chosen, *, block_t=4):
    index = kernel("index", c, tmp_path)
    tiles, capacity, words = sequences.tiles(block_t), block_t * c.width, -(-block_t // 32)
    sets = c.how == "sets"
    length = -(-max(sequences.k_lens) // c.stride)
    capacity = min(capacity, length) if sets else capacity
    programs = min(tiles, 2) if sets else tiles
    shape = (tiles, c.heads)
    counts = torch.full((*shape, 2), -5, dtype=torch.int32, device=device)
    entries = torch.full((*shape, capacity), -5, dtype=torch.int32, device=device)
    bits = torch.full((*shape, capacity, words), -5, dtype=torch.int32, device=device)
    given = chosen.to(device) if device != "cpu" else chosen
    s_b, *strides = given.stride()
    marks = torch.full((programs, c.heads, length, words), -5, dtype=torch.int32, device=device)
    half = tiles // 2 if sets else 0  # in two turns
    for first, turn in ((0, half), (half, tiles - half))[0 if half else 1 :]:
        outs = (x[first:] for x in (counts, entries, bits))
        index[(min(programs, turn), c.heads)](
            given, 0 if sequences.packed else s_b, *strides, *outs,
            *((marks, capacity, length, turn) if sets else ()),
            sequences.table.to(device), len(sequences), *((first,) if sets else ()),
            BLOCK_T=block_t, **(dict(BLOCK_K=2, BLOCK_N=4) if sets else {}),
        )  # fmt: skip
    kinds = {"full": 0, "partial": 0}
    for tile in range(tiles):
        for head in range(c.heads):
            if sequences.tile(tile, block_t) is None:
                assert counts[tile, head].tolist() == ([0, 0] if sets else [-5, -5])
                continue
            whole, rest, members = expected(c, sequences, chosen, tile, head, block_t)
            kinds["full"] += len(whole)
            kinds["partial"] += len(rest)
            assert counts[tile, head].tolist() == [len(whole), len(rest)], (tile, head)
            listed = [*whole, *rest]
            assert entries[tile, head, : len(listed)].tolist() == listed, (tile, head)
            assert (entries[tile, head, len(listed) :] == -5).all()
            for place, e in enumerate(listed):
                row = [w & 0xFFFFFFFF for w in bits[tile, head, place].tolist()]
                got = {t for t in range(32 * words) if row[t // 32] >> t % 32 & 1}
                assert got == members[e], (tile, head, e)
    return kinds


DENSE = Sequences(q_lens=(7, 7), k_lens=(30, 25))
PACKED = Sequences(q_lens=(5, 1, 0, 6), k_lens=(33, 20, 3, 6), packed=True)
AHEAD = Sequences(q_lens=(8,), k_lens=(5,))


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_lists(tmp_path, device, how, sequences, causal, width):
    c = context(how=how, causal=causal, width=width)
    check(tmp_path, device, c, sequences, choices(c, sequences))


def test_full_and_partial(tmp_path, device, how):
    c = context(how=how, width=6)
    kinds = check(tmp_path, device, c, DENSE, choices(c, DENSE, spread=0.4))
    assert kinds["full"] and kinds["partial"]


def test_every_row_chose_the_same(tmp_path, device, how):
    c = context(how=how, width=5, causal=False)
    sequences = Sequences(q_lens=(6,), k_lens=(18,))  # the last entry is short
    chosen = torch.tensor([4, 0, 3, 0, -1], dtype=torch.int32).expand(1, 6, 2, 5)
    kinds = check(tmp_path, device, c, sequences, chosen)
    assert kinds == {"full": 2 * 2 * 2, "partial": 2 * 2}


def test_nothing_chosen(tmp_path, device, how):
    c = context(how=how)
    chosen = torch.full((2, 7, 2, 4), -1, dtype=torch.int32)
    assert check(tmp_path, device, c, DENSE, chosen) == {"full": 0, "partial": 0}


@pytest.mark.parametrize("block_t", [1, 2, 32, 64, 128])
def test_words(tmp_path, device, how, block_t):
    """Bits of up to four words; the top bit of each is the sign of an int32."""
    c = context(how=how, heads=1, width=2)
    rows = block_t + 3
    sequences = Sequences(q_lens=(rows,), k_lens=(rows + 40,))
    if block_t < 32:
        sequences = Sequences(q_lens=(5,), k_lens=(20,))
    check(tmp_path, device, c, sequences, choices(c, sequences, spread=0.2), block_t=block_t)


def test_strides(tmp_path, device, how):
    """A selection as a caller may hold it: heads outside tokens, every second slot."""
    c = context(how=how, width=3)
    wide = choices(context(width=6), DENSE).transpose(1, 2).contiguous().transpose(1, 2)
    check(tmp_path, device, c, DENSE, wide[..., ::2])
    check(tmp_path, device, c, DENSE, choices(c, DENSE)[:, :, :1].expand(-1, -1, 2, -1))


def test_overlapping_entries(tmp_path, device, how):
    c = context(how=how, size=8, stride=4, width=4)
    kinds = check(tmp_path, device, c, DENSE, choices(c, DENSE, spread=0.3))
    assert kinds["partial"]


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD])
@pytest.mark.parametrize(("group", "width"), [(2, 1), (3, 5), (4, 4), (4, 33), (3, 43)])
def test_heads_of_a_group_share_a_list(tmp_path, device, sequences, group, width):
    """Each entry once, ascending, with the heads that chose it; what no row sees is not among them."""
    kv = 2
    fields = dict(name="unite_test", kv_heads=kv, group=group, width=width, size=4, causal=True)
    c = UniteContext(**fields)
    chosen = choices(context(heads=kv * group, width=width), sequences, spread=0.4)
    total, length = sum(sequences.q_lens), 1 + group * width
    lists = torch.full((total, kv, length), -5, dtype=torch.int32, device=device)
    given = chosen.to(device) if device != "cpu" else chosen
    s_b, *strides = given.stride()
    most = (max(sequences.k_lens) // c.size + 4) // 4 * 4
    marks = torch.empty((total, kv, most), dtype=torch.int32, device=device)
    kernel("index", c, tmp_path)[(len(sequences), kv, max(sequences.q_lens))](
        given, 0 if sequences.packed else s_b, *strides, lists,
        *((marks, most) if c.marked else ()), sequences.table.to(device),
    )  # fmt: skip
    assert c.marked == (width > 32)
    shared = 0
    for tile in range(sequences.tiles(1)):
        if (found := sequences.tile(tile, 1)) is None:
            continue
        z, t = found
        q_start, q_first, _, q_offset, _, k_len = sequences.table[z].tolist()
        for head in range(kv):
            members = {}
            for member in range(group):
                row = chosen[0 if sequences.packed else z, q_first + t, head * group + member]
                for e in row.tolist():
                    if 0 <= e <= (q_offset + t) // c.size and e * c.size < k_len:
                        members[e] = members.get(e, 0) | 1 << member
            expect = [e << group | bits for e, bits in sorted(members.items())]
            got = lists[q_start + t, head].tolist()
            assert got == [len(expect), *expect, *[-5] * (length - 1 - len(expect))], (z, t, head)
            shared += any(bits & (bits - 1) for bits in members.values())
    assert shared or width == 1
