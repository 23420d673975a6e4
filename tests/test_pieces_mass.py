"""rank by mass: of given scores exactly the reference's sets, whatever scratch holds where nobody wrote."""

import pytest
import torch
from skeletons import Sequences, kernel
from test_pieces_rank import POISON, device, draw  # noqa: F401, a fixture

from hsgen.kernels import RankContext
from hsgen.reference.choice import choose, fixed
from hsgen.spec import Force, Select, TopP

ROWS, SIZE = 8, 4


def context(mass, **changes):
    fields = dict(
        name="rank_mass", heads=1, k=0, width=0, size=SIZE, stride=SIZE, short=True, causal=True,
        first=1, last=1, counted=True, rows=ROWS, mass=fixed(mass, up=False),
    )  # fmt: skip
    return RankContext(**(fields | changes))


def check(tmp_path, device, seed, mass, kind, *, block_n=16, block_r=2, **changes):  # noqa: F811
    """Every block of rows against the reference, among poison where nobody wrote."""
    c = context(mass, **changes)
    rank = kernel("rank", c, tmp_path)
    q_len, k_len, block_t = 37, 102, 4
    sequences = Sequences(q_lens=(q_len,), k_lens=(k_len,))
    offset = k_len - q_len
    blocks = (k_len - 1) // ROWS - offset // ROWS + 1
    width, capacity = -(-k_len // SIZE), k_len // SIZE + 1
    tiles = -(-blocks // block_t)
    generator = torch.Generator().manual_seed(seed)
    scores = draw(kind, (tiles * block_t, c.heads, capacity), generator)
    if kind == "real":
        scores = (4 * scores).softmax(-1) * 16
    last = (torch.arange(blocks) + offset // ROWS) * ROWS + ROWS - 1
    entry = torch.arange(capacity)
    begun = (entry * SIZE < k_len) & ((entry * SIZE <= last[:, None]) | (not c.causal))
    own = (entry >= (last[:, None] - ROWS + 1) // SIZE - c.last + 1) & (
        entry <= last[:, None] // SIZE
    )
    forced = ((entry < c.first) | (own & (c.last > 0))) & begun
    least = {"min": c.least} if c.least else {}
    rule = Select(
        top_p=TopP(mass=mass, **least),
        force=Force(first=c.first, last=c.last, counted=c.counted),
    )
    spread = [x[:, None].expand(-1, c.heads, -1) for x in (begun, forced)]
    expected = choose(rule, scores[:blocks], *spread)
    hidden = scores.clone()
    hidden[:blocks] = torch.where(spread[0], scores[:blocks], POISON[0])
    hidden[blocks:] = POISON[1]
    out = torch.full((blocks, c.heads, width), 7, dtype=torch.int32, device=device)
    rank[(tiles * block_t // block_r, c.heads)](
        hidden.to(device), out, sequences.table.to(device), 1, 0, capacity, width,
        BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_N=block_n,
    )  # fmt: skip
    for row in range(blocks):
        for head in range(c.heads):
            wanted = expected[row, head].nonzero().flatten().tolist()
            got = out[row, head].tolist()
            assert got == wanted + [-1] * (width - len(wanted)), (row, head)


@pytest.mark.parametrize("kind", ["real", "alike", "plateau", "special", "denormals", "bits"])
def test_sets_are_exact(tmp_path, device, seed, kind):  # noqa: F811
    check(tmp_path, device, seed, 0.7, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"counted": False},
        {"first": 0, "last": 0, "causal": False},
        {"least": 9},
        {"least": 5, "counted": False, "first": 3},
        {"first": 4, "last": 6},
    ],
    ids=str,
)
def test_what_is_forced_and_how_many_there_must_be(tmp_path, device, seed, changes):  # noqa: F811
    check(tmp_path, device, seed, 0.8, "real", block_n=32, block_r=4, **changes)
