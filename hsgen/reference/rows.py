"""What is known of some rows of one sequence, and of a level once it is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsgen.reference.grids import axis_lengths
from hsgen.reference.inputs import some_keys
from hsgen.reference.layouts import Layout
from hsgen.reference.queries import Together, of_rows, together
from hsgen.reference.reuse import Taken
from hsgen.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Some rows of one sequence, and all of its keys.

    Attributes:
        x: Tensors by name: [T, H, D], [S, H, D], and learned parameters.
        pooled: By level: "key" [N, H, D] and "value" [N, Hkv, Dv], where it has them; minmax keys
            are [N, H, 2, D].
        layouts: By level: where its entries lie.
        clusters: By level whose queries are clustered: that of each row and head, [Hq, T].
        p: Position of every row, [T].
        taken: Place of each query head's way in `route.ways`, [Hq]; None without a route.
        given: By level: the selection to take instead of the level's own, [T, Hs, K].
        reused: By reused level: what this call does with it.
        stored: What turned queries are kept in, and pooled entries.
    """

    spec: Spec
    x: dict[str, Tensor]
    pooled: dict[str, dict[str, Tensor]]
    layouts: dict[str, Layout]
    clusters: dict[str, Tensor]
    p: Tensor
    taken: Tensor | None
    given: dict[str, Tensor]
    reused: dict[str, Taken]
    stored: torch.dtype

    @property
    def S(self) -> int:
        return some_keys(self.spec, self.x).shape[0]

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Steps of every axis, where tokens lie along axes."""
        return axis_lengths(self.spec, self.S) if self.spec.axes else None

    @property
    def seen_tokens(self) -> Tensor:
        """How many tokens each row sees, all before them included.  -> i64[T]"""
        return (
            (self.p + 1).clamp(0, self.S) if self.spec.causal else torch.full_like(self.p, self.S)
        )

    @property
    def Hkv(self) -> int:
        return some_keys(self.spec, self.x).shape[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """One level for R groups of rows that choose together: the fields are [R, Hs, N]; see Result.

    groups: Which rows they are; where nothing is said, every row for itself, and R = T.
    complete: bool[R, N], the entries that count.
    lse: of the scores by head, of what scores, where another level normalises by it.
    chosen: bool, None where the level does not select.
    chooser: Whose choice a row takes: its group's, or its own where a caller chooses.
    tiers: i64, of a pyramid: the tier of each entry that is chosen, as `chosen` is by group or row.
    """

    groups: Together
    complete: Tensor
    candidates: Tensor
    forced: Tensor
    scores: Tensor
    lse: Tensor | None
    chosen: Tensor | None
    chooser: Together
    tiers: Tensor | None = None


def row_by_row(scored: Scored) -> Scored:
    """Every row with what its group scored and chose."""
    row = scored.groups.row
    each = together(None, torch.arange(len(row), device=row.device))
    chosen, tiers = (
        None if y is None else of_rows(y, scored.chooser) for y in (scored.chosen, scored.tiers)
    )
    return replace(
        scored,
        groups=each,
        chooser=each,
        complete=scored.complete[row],
        candidates=of_rows(scored.candidates, scored.groups),
        forced=of_rows(scored.forced, scored.groups),
        scores=of_rows(scored.scores, scored.groups),
        chosen=chosen,
        tiers=tiers,
    )


def spread(y: Tensor, heads: int) -> Tensor:
    """Give every head its selection head's row.  [T, Hs, N] -> [T, heads, N]"""
    assert heads % y.shape[1] == 0, f"{y.shape[1]} selecting heads cannot serve {heads}"
    return y.repeat_interleave(heads // y.shape[1], 1)
