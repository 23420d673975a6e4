"""Losses of a call, as sums over rows and counts of what was summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.entropies import dual_entropy
from hsgen.reference.inputs import loss_keys
from hsgen.reference.queries import reduced
from hsgen.reference.rows import Rows, Scored
from hsgen.reference.scores import dot, softmax
from hsgen.spec import Distill, Kl, Level


def terms(rows: Rows, levels: dict[str, Scored], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum and count of every loss of the spec.  outputs: [T, Hq, Dv] by branch.  -> [1, 2] each"""
    loss = rows.spec.loss
    found: dict[str, Tensor] = {}
    if loss and loss.kl:
        found["kl"] = _kl(rows, loss.kl, levels[loss.kl.level])
    if loss and loss.distill:
        found["distill"] = _distill(loss.distill, outputs)
    if loss and loss.dual_entropy:
        found["dual_entropy"] = _part(dual_entropy(rows, loss.dual_entropy) * rows.S, rows.S)
    return found


def mean(parts: Tensor) -> Tensor:
    """The loss of all parts together; of nothing it is 0.  [parts, 2] -> []"""
    total, count = parts.sum(0)
    return total / count.detach().clamp(min=1)


def _part(total: Tensor, count: int) -> Tensor:
    return torch.stack((total, total.new_tensor(float(count)))).unsqueeze(0)


def _kl(rows: Rows, kl: Kl, scored: Scored) -> Tensor:
    """KL(target || softmax of scores) of every row and head where attention reaches an entry."""
    level = rows.spec.level(kl.level)
    inside = scored.scores.detach() > -torch.inf
    if kl.over == "selected":
        assert scored.chosen is not None, f"{kl.level} selects"
        inside = inside & scored.chosen
    target = _target(rows, kl, level, scored.scores.shape[1])
    if kl.rows is not None:
        there = torch.ones_like(target, dtype=torch.bool)
        target = reduced(kl.rows, target, there, scored.groups.members)
    target = target.masked_fill(~inside, 0.0)
    total = target.sum(-1, keepdim=True)
    there = total.squeeze(-1) > 0
    target = (target / total.masked_fill(total == 0, 1.0))[there]
    inside, learnt = inside[there], _log_share(rows, level, scored.scores[there], inside[there])
    rowwise = (torch.xlogy(target, target) - target * learnt.masked_fill(~inside, 0.0)).sum(-1)
    return _part(rowwise.sum(), len(rowwise))


def _log_share(rows: Rows, level: Level, scores: Tensor, inside: Tensor) -> Tensor:
    """Logarithm of each entry's share of a row: of masses, or of exp(score)."""
    while level.score.source:
        level = rows.spec.level(level.score.source)
    if level.score.normalise:
        return scores.masked_fill(~inside, 0.0).log() - torch.log(
            scores.masked_fill(~inside, 0.0).sum(-1, keepdim=True)
        )
    return scores.masked_fill(~inside, -torch.inf).log_softmax(-1)


def _target(rows: Rows, kl: Kl, level: Level, heads: int) -> Tensor:
    """What attention gives each entry, head by head that scores.  -> [T, Hs, N], a constant"""
    q, k = rows.x["q"].detach(), rows.x[loss_keys(rows.spec)].detach()
    token = torch.arange(len(k), device=k.device)
    visible = (token <= rows.p[:, None]) | (not rows.spec.causal)
    branch = rows.spec.learned_from
    scale = branch.scale if branch and branch.scale is not None else q.shape[-1] ** -0.5
    p, _ = softmax(dot(q, k) * scale, visible[:, None])
    by_head = p.unflatten(1, (heads, -1))
    p = by_head.amax(2) if kl.heads == "max" else by_head.sum(2)
    slots = rows.layouts[level.name].slots  # [1 or Hkv, N, M], -1 where there is no token
    slots = slots.masked_fill(slots < 0, len(k)).repeat_interleave(heads // len(slots), 0)
    padded = F.pad(p, (0, 1)).unbind(1)
    of_entry = torch.stack([x[:, at] for x, at in zip(padded, slots, strict=True)], 1)
    return of_entry.amax(-1) if kl.tokens == "max" else of_entry.sum(-1)


def _distill(distill: Distill, outputs: dict[str, Tensor]) -> Tensor:
    """Distance of the student from the teacher held still, and with `both` the other way round."""
    student, teacher = outputs[distill.student], outputs[distill.teacher]
    far = F.smooth_l1_loss if distill.form == "smooth_l1" else F.mse_loss
    total = far(student, teacher.detach(), reduction="sum")
    if distill.toward == "both":
        total = total + far(teacher, student.detach(), reduction="sum")
    return _part(total, student.numel())
