"""Spec -> Graph: one operator a node, each level's steps in the fixed order of the language.

pool -> score (form, scale) -> normalise -> reduce over heads -> map -> select, then the branches.
Decides nothing about kernels.  Takes the rules of the language for granted; what they allow and the
graph cannot say is a PlanError.
"""

from __future__ import annotations

from hsgen.planner.plan import plan, without_losses

__all__ = [
    "plan",
    "without_losses",
]
