"""What a graph says about itself: causality, laws, costs, and the text that `show` prints.

Knows nothing of kernels: costs are of operators, one by one, before any share a launch.

    causality    what row t depends on
    laws         which laws hold, and why one does not
    calls        calls that choose, and calls that take over
    polynomials  costs as functions of the number of tokens
    counts       rows, entries and pairs of them
    work         arithmetic and bytes of each operator
    costs        what operators cost, one by one and together
    text         what `show` prints
"""

from __future__ import annotations

from hsgen.analysis.calls import calls_text
from hsgen.analysis.causality import causality, causality_text, query_block
from hsgen.analysis.costs import (
    LENGTHS,
    at_most,
    costs,
    dense,
    moved,
    must_move,
    total,
    unbound_sizes,
)
from hsgen.analysis.laws import laws, not_dense_because
from hsgen.analysis.polynomials import Cost, Polynomial, quantity
from hsgen.analysis.text import describe

__all__ = [
    "Cost",
    "LENGTHS",
    "Polynomial",
    "at_most",
    "calls_text",
    "causality",
    "causality_text",
    "costs",
    "dense",
    "describe",
    "laws",
    "moved",
    "must_move",
    "not_dense_because",
    "quantity",
    "query_block",
    "total",
    "unbound_sizes",
]
