"""All rules, in two rounds: names first, then what rests on them."""

from __future__ import annotations

from hsgen.spec.model import Path, Spec
from hsgen.spec.rules.biases import biases
from hsgen.spec.rules.branches import branches, combines, kvs, unused
from hsgen.spec.rules.calls import losses, reuses
from hsgen.spec.rules.choices import nesting, selects
from hsgen.spec.rules.codes import codes
from hsgen.spec.rules.compress import around, borrowed_budgets, least_parts, rows_chosen
from hsgen.spec.rules.deltas import deltas
from hsgen.spec.rules.diagonals import diagonals, maps_of_diagonals
from hsgen.spec.rules.entries import heads, partitions, pools
from hsgen.spec.rules.estimates import branch_sums, score_dtypes
from hsgen.spec.rules.grids import axes, grid_windows
from hsgen.spec.rules.likeness import likeness
from hsgen.spec.rules.names import references, tensor_names, unique_names
from hsgen.spec.rules.orders import orders
from hsgen.spec.rules.parts import budgets, given_scores, parts
from hsgen.spec.rules.pooling import early, pool_keys, rotations, series
from hsgen.spec.rules.problem import Problem, Rule
from hsgen.spec.rules.queries import (
    antidiagonal_keys,
    queries,
    rows_alone,
    rows_fit,
    rows_of_losses,
    rows_with_a_say,
    tiled_rows,
    turned_queries,
)
from hsgen.spec.rules.routes import on_ways, routes, ways
from hsgen.spec.rules.row_orders import row_orders
from hsgen.spec.rules.scores import borrowed_sums, maps, scores
from hsgen.spec.rules.softmaxes import latents, one_softmax, tails
from hsgen.spec.rules.statistics import statistics
from hsgen.spec.rules.takes import nodes_take, rows_taken, softmaxes_of_entries
from hsgen.spec.rules.trees import apart, assigned, dual_entropies, spans
from hsgen.spec.rules.weights import errors_and_counts, quotas, stands_for, walks


def problems(spec: Spec, broken: set[Path] | None = None) -> list[Problem]:
    """Every broken rule.

    Args:
        spec: any Spec.
        broken: fields already known to be wrong; what rests on them is not judged.
    """
    known = set(broken or ())
    found: list[Problem] = []
    for rules in (_REFERENCES, _RULES):
        new = [problem for rule in rules for problem in rule(spec) if not _rests_on(problem, known)]
        known |= {problem.path for problem in new}
        found += new
    return found


def _rests_on(problem: Problem, broken: set[Path]) -> bool:
    """Whether a problem is, or may be, only the shadow of something already reported."""
    return any(
        bad[: len(path)] == path or path[: len(bad)] == bad
        for path in (problem.path, *problem.also)
        for bad in broken
    )


_REFERENCES: tuple[Rule, ...] = (unique_names, references, routes)


_RULES: tuple[Rule, ...] = (
    heads,
    tensor_names,
    partitions,
    orders,
    pools,
    scores,
    codes,
    borrowed_sums,
    branch_sums,
    score_dtypes,
    maps,
    queries,
    antidiagonal_keys,
    rows_fit,
    rows_alone,
    rows_of_losses,
    turned_queries,
    rows_with_a_say,
    nesting,
    selects,
    branches,
    combines,
    unused,
    kvs,
    biases,
    axes,
    grid_windows,
    latents,
    one_softmax,
    tails,
    row_orders,
    quotas,
    walks,
    stands_for,
    errors_and_counts,
    ways,
    on_ways,
    reuses,
    losses,
    pool_keys,
    series,
    rotations,
    early,
    given_scores,
    parts,
    budgets,
    deltas,
    around,
    borrowed_budgets,
    least_parts,
    rows_chosen,
    assigned,
    spans,
    apart,
    dual_entropies,
    diagonals,
    maps_of_diagonals,
    tiled_rows,
    statistics,
    likeness,
    nodes_take,
    rows_taken,
    softmaxes_of_entries,
)
