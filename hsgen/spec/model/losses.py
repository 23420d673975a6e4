"""Losses: what a call tells a training besides its output."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from hsgen.spec.model.scalars import Identifier, Node


class Kl(Node):
    """KL(p || q), mean over rows: q is the softmax of a level's scores, over its entries.

    p is what attention itself gives an entry: softmax(scale q k) of every visible token by query
    head, taken together over the heads that share a score and over the tokens of an entry, then
    divided by its sum.  p is a constant: gradients reach what the level scores with, nothing else.
    """

    level: Identifier  # whose scores learn
    over: Literal["all", "selected"] = "all"  # complete entries, or those of them that were chosen
    heads: Literal["sum", "max"] = "sum"  # p over heads that share a score
    tokens: Literal["sum", "max"] = "sum"  # p over the tokens of an entry


class Distill(Node):
    """The distance of two branches' outputs, after their gates, mean over all numbers."""

    student: Identifier  # a branch
    teacher: Identifier  # a branch
    form: Literal["mse", "smooth_l1"] = "mse"  # smooth_l1: quadratic within 1
    # teacher: the teacher is a constant.  both: the sum of that and of the other way round
    toward: Literal["teacher", "both"] = "teacher"


class Loss(Node):
    """Losses by name; each is a number of its own, for the training to weigh."""

    kl: Kl | None = None
    distill: Distill | None = None

    def of(self, levels: Container[str | None], branches: Container[str | None]) -> Loss | None:
        """What is left where only some levels and branches are."""
        kl = self.kl if self.kl and self.kl.level in levels else None
        pair = self.distill
        kept = pair is not None and pair.student in branches and pair.teacher in branches
        return Loss(kl=kl, distill=pair if kept else None) if kl or kept else None
