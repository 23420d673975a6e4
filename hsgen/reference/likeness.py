"""How alike tokens of one entry are, and rows that choose together."""

from __future__ import annotations

from torch import Tensor

from hsgen.reference.inputs import named
from hsgen.reference.layouts import tokens_of
from hsgen.reference.queries import Together
from hsgen.reference.rows import Rows, spread
from hsgen.spec import Level


def unlike_entries(rows: Rows, level: Level, groups: Together) -> Tensor:
    """Entries that are taken because their keys, or the rows' queries, are not alike.  -> bool[R, Hq, N]"""
    where = level.select and level.select.force.where
    assert where is not None, f"{level.name} forces no entries by what they are"
    q, k = rows.x[named("q", level.q)].detach(), rows.x[named("k", level.kv)].detach()
    if where.centred and len(k):
        k = k - k.mean(0)
    of_keys = alike(*tokens_of(rows.layouts[level.name].slots, k)) <= where.similarity  # [N, Hkv]
    there = (groups.members >= 0)[..., None, None]
    of_rows = alike(q[groups.members.clamp(min=0)], there) <= where.similarity  # [R, Hq]
    return spread(of_keys.T[None], q.shape[1]) | of_rows[..., None]


def alike(x: Tensor, there: Tensor) -> Tensor:
    """The mean cosine of all pairs: the squared length of the mean of unit vectors.

    f[..., M, H, D], bool[..., M, H or 1, 1] -> f[..., H]
    """
    length = x.norm(dim=-1, keepdim=True)
    unit = (x / length.masked_fill(length == 0, 1.0)).masked_fill(~there, 0.0)
    mean = unit.sum(-3) / there.sum(-3).clamp(min=1)
    return mean.square().sum(-1)
