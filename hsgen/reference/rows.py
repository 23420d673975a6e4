"""What is known of some rows of one sequence, and of a level once it is scored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hsgen.reference.inputs import some_keys
from hsgen.reference.layouts import Layout
from hsgen.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Some rows of one sequence, and all of its keys.

    Attributes:
        x: Tensors by name: [T, H, D], [S, H, D], and learned parameters.
        pooled: By level: "key" [N, H, D] and "value" [N, Hkv, Dv], where it has them; minmax keys
            are [N, H, 2, D].
        layouts: By level: where its entries lie.
        p: Position of every row, [T].
        taken: Place of each query head's way in `route.ways`, [Hq]; None without a route.
        given: By level: the selection to take instead of the level's own, [T, Hs, K].
    """

    spec: Spec
    x: dict[str, Tensor]
    pooled: dict[str, dict[str, Tensor]]
    layouts: dict[str, Layout]
    p: Tensor
    taken: Tensor | None
    given: dict[str, Tensor]

    @property
    def S(self) -> int:
        return some_keys(self.spec, self.x).shape[0]

    @property
    def Hkv(self) -> int:
        return some_keys(self.spec, self.x).shape[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """One level for some rows: complete: bool[T, N], the rest [T, Hs, N]; see Result.

    lse: of its scores by head, [T, H], where another level normalises by it.
    chosen: bool, None where the level does not select.
    tiers: i64, of a pyramid: the tier of each entry that is chosen.
    """

    complete: Tensor
    candidates: Tensor
    forced: Tensor
    scores: Tensor
    lse: Tensor | None
    chosen: Tensor | None
    tiers: Tensor | None = None


def spread(y: Tensor, heads: int) -> Tensor:
    """Give every head its selection head's row.  [T, Hs, N] -> [T, heads, N]"""
    assert heads % y.shape[1] == 0, f"{y.shape[1]} selecting heads cannot serve {heads}"
    return y.repeat_interleave(heads // y.shape[1], 1)
