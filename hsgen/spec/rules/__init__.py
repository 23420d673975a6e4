"""What a spec's values must be to each other: each rule yields the problems it sees.

Knows nothing of text.  What no kernel can do yet is no rule: that is for the planner to say.
"""

from __future__ import annotations

from hsgen.spec.rules.judge import problems
from hsgen.spec.rules.problem import Problem

__all__ = [
    "Problem",
    "problems",
]
