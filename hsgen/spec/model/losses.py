"""Losses: what a call tells a training besides its output."""

from collections.abc import Container
from typing import Literal

from hsgen.spec.model.scalars import Identifier, Node, Scale


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
    rows: Literal["sum", "max"] | None = None  # p of entries over rows that choose together


class Distill(Node):
    """The distance of two branches' outputs, after their gates, mean over all numbers."""

    student: Identifier  # a branch
    teacher: Identifier  # a branch
    form: Literal["mse", "smooth_l1"] = "mse"  # smooth_l1: quadratic within 1
    # teacher: the teacher is a constant.  both: the sum of that and of the other way round
    toward: Literal["teacher", "both"] = "teacher"


class DualEntropy(Node):
    """Affinity less balance of a learned tree: few doubts of each key and query, and no node idle.

    p of a key or query: softmax(cosine / temperature) over the children of the node that it is in,
    from the root down, as keys are assigned to nodes of any capacity.  Affinity is the mean entropy
    of p, balance the entropy of the mean p over all nodes of a level.  Mean over levels, key heads,
    and keys and queries; of several sequences, the mean by their keys.  Gradients reach centroids,
    keys and queries; the nodes they are in are constants.
    """

    tree: Identifier  # the lowest level of the tree
    temperature: Scale
    balance: Scale = 1.0  # how many times the balance is taken


class Loss(Node):
    """Losses by name; each is a number of its own, for the training to weigh."""

    kl: Kl | None = None
    distill: Distill | None = None
    dual_entropy: DualEntropy | None = None

    def only(self, name: str) -> "Loss":
        """One of them by itself."""
        return Loss.model_validate({name: getattr(self, name)})

    def of(self, levels: Container[str | None], branches: Container[str | None]) -> "Loss | None":
        """What is left where only some levels and branches are."""
        kl = self.kl if self.kl and self.kl.level in levels else None
        pair = self.distill
        kept = pair is not None and pair.student in branches and pair.teacher in branches
        dual = self.dual_entropy if self.dual_entropy and self.dual_entropy.tree in levels else None
        left = Loss(kl=kl, distill=pair if kept else None, dual_entropy=dual)
        return left if left != Loss() else None
