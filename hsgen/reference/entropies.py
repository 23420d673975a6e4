"""How sharply keys and queries choose their way down a learned tree, and how evenly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.inputs import named
from hsgen.reference.partitions import centroids
from hsgen.reference.rows import Rows
from hsgen.spec import DualEntropy, LearnedTree


def dual_entropy(rows: Rows, loss: DualEntropy) -> Tensor:
    """Affinity less balance, mean over levels, key heads, and keys and queries.  -> []"""
    x, levels = rows.x, rows.spec.tree(loss.tree)
    found: list[Tensor] = []
    for side in ("k", "q"):
        node = torch.zeros(1, 1, dtype=torch.long, device=rows.p.device)
        for level in levels:
            assert isinstance(level.partition, LearnedTree)
            vectors = x[named(side, level.kv if side == "k" else level.q)]
            if not len(vectors):
                break
            y = (
                F.normalize(vectors, dim=-1)
                .unflatten(1, (rows.Hkv, -1))
                .transpose(0, 1)
                .flatten(1, 2)
            )
            alike = torch.einsum("hmd,hnd->hmn", y, centroids(level, x))
            family = torch.arange(alike.shape[-1], device=node.device) // level.partition.branching
            others = family != node[..., None]
            p, log_p = _shares(alike / loss.temperature, others)
            affinity = -(p * log_p).sum(-1).mean(-1)
            found.append((affinity - loss.balance * _entropy(p.mean(1))).mean())
            node = alike.detach().masked_fill(others, -torch.inf).argmax(-1)
    return torch.stack(found).mean() if found else x["q"].sum() * 0.0


def _shares(logits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax among siblings and its logarithm, 0 of all others."""
    log_p = logits.masked_fill(others, -torch.inf).log_softmax(-1)
    return log_p.exp(), log_p.masked_fill(others, 0.0)


def _entropy(p: Tensor) -> Tensor:
    """Of shares that sum to 1; what is 0 adds nothing, and has no gradient."""
    return -(p * p.masked_fill(p == 0, 1.0).log()).sum(-1)
