"""rank by quotas: of given scores exactly the reference's tiers, whatever scratch holds elsewhere."""

import pytest
import torch
from skeletons import Sequences, kernel
from test_pieces_rank import POISON, device, draw  # noqa: F401, a fixture

from hsgen.kernels import RankContext
from hsgen.planner.selections import tiers_of as planned
from hsgen.reference.choice import tiers_of
from hsgen.schedule.choosing import ends_of
from hsgen.spec import Force, Select, Tier

ROWS, SIZE = 8, 4
BY_NUMBER = (
    Tier(merge=1, fraction=0.1),
    Tier(merge=2, fraction=0.05),
    Tier(merge=4, fraction=0.2),
)
BY_MASS = (
    Tier(merge=1, mass=0.3, least=0.06),
    Tier(merge=2, mass=0.2),
    Tier(merge=4, mass=0.25),
)
WIDENED = (Tier(merge=1, mass=0.2, least=0.3), Tier(merge=2, mass=0.2), Tier(merge=4, mass=0.1))


def context(quota, **changes):
    fields = dict(
        name="rank_tiers", heads=1, k=0, width=0, size=SIZE, stride=SIZE, short=True, causal=True,
        first=1, last=1, counted=True, rows=ROWS, tiers=ends_of(planned(quota)),
    )  # fmt: skip
    return RankContext(**(fields | changes))


def check(tmp_path, device, seed, quota, kind, *, block_n=16, block_r=2, **changes):  # noqa: F811
    """Every block of rows against the reference, among poison where nobody wrote."""
    c = context(quota, **changes)
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
    rule = Select(quota=quota, force=Force(first=c.first, last=c.last, counted=c.counted))
    spread = [x[:, None].expand(-1, c.heads, -1) for x in (begun, forced)]
    expected = tiers_of(rule, scores[:blocks], *spread)
    hidden = scores.clone()
    hidden[:blocks] = torch.where(spread[0], scores[:blocks], POISON[0])
    hidden[blocks:] = POISON[1]
    out = torch.full((blocks + 1, c.heads, width), 7, dtype=torch.int32, device=device)
    rank[(tiles * block_t // block_r, c.heads)](
        hidden.to(device), out, sequences.table.to(device), 1, 0, capacity, width,
        BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_N=block_n,
    )  # fmt: skip
    assert torch.equal(out[:blocks].cpu().long(), expected[..., :width])
    assert (out[blocks:] == 7).all(), "rows that are none"


@pytest.mark.parametrize("quota", [BY_NUMBER, BY_MASS, WIDENED], ids=["number", "mass", "widened"])
@pytest.mark.parametrize("kind", ["real", "alike", "plateau", "special", "denormals", "bits"])
def test_tiers_are_exact(tmp_path, device, seed, kind, quota):  # noqa: F811
    check(tmp_path, device, seed, quota, kind)


@pytest.mark.parametrize("quota", [BY_NUMBER, BY_MASS], ids=["number", "mass"])
@pytest.mark.parametrize(
    "changes",
    [
        {"counted": False},
        {"first": 0, "last": 0, "causal": False},
        {"counted": False, "first": 3},
        {"first": 4, "last": 6},
    ],
    ids=str,
)
def test_what_is_forced_has_the_first_tier(tmp_path, device, seed, changes, quota):  # noqa: F811
    """Also where more are forced than the first tier has, and where all of a row are in registers."""
    for block_n in (16, 32):
        check(tmp_path, device, seed, quota, "real", block_n=block_n, block_r=4, **changes)
