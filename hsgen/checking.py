"""Steps of a measurement, whose failures are results too, and what an output must be to be timed."""

from __future__ import annotations

import hashlib
import math
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hsgen import machine, metrics, passes, planner, sharding, standins
from hsgen.errors import PlanError
from hsgen.graph import Select, SelectSet, tensor_inputs
from hsgen.reference import reference
from hsgen.selection import ListSelection, to_list
from hsgen.spec import SortInSegment, Spec

SAMPLED = 8  # consecutive rows of each of the two runs that are checked at full length
TOLERANCE = 1e-2  # |o - reference| / |reference|: above bf16's rounding, far below a wrong result
SAME = 0.95  # of the reference's entries; rounding tells near scores apart otherwise

Figures = dict[str, Any]  # plain data for JSON
Tensors = Mapping[str, Tensor]
Selected = Mapping[str, ListSelection]


class NotExpressibleError(Exception):
    """Something that cannot do this case, with the reason."""


class CheckError(Exception):
    """Figures that are not what the reference says."""


def attempt(action: Callable[[], Figures]) -> Figures:
    """Run an action; a failure is a result too, with what was warned of on the way to it."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return {"status": "ok", **action()}
        except NotExpressibleError as reason:
            return {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001 - every failure of a backend belongs into the table
            said = [f"{type(error).__name__}: {error}", *(str(each.message) for each in warned)]
            reason, trace = " / ".join(dict.fromkeys(said)), traceback.format_exc(limit=-3)
    return {
        "status": "failed",
        "reason": machine.without_paths(reason),
        "trace": machine.without_paths(trace),
    }


def runs_tell(spec: Spec) -> bool:
    """Whether a run of rows has all that its rows choose by; not where rows choose together that are far
    apart, as those of a tile or a cluster, or the last ones for all.
    """
    queries = [x.query for x in spec.levels if x.query]
    orders = [x.permute.keys for x in spec.levels if x.permute]
    far = any(x.tile or x.by or x.last for x in queries)
    return not far and not any(isinstance(x, SortInSegment) and x.last for x in orders)


def sampled(spec: Spec, tokens: int) -> list[tuple[int, int]]:
    """Two runs of rows, in the middle and at the end; of rows that choose together all."""
    together = math.lcm(*(x.query.block for x in spec.levels if x.query and x.query.block))
    middle = max(0, tokens // 2 - SAMPLED // 2)
    runs = [(a, min(a + SAMPLED, tokens)) for a in (middle, max(0, tokens - SAMPLED))]
    return [(a // together * together, min(-(-b // together) * together, tokens)) for a, b in runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the reference says of some rows, and no more of it: its scores and masks are as long as the keys.

    Attributes:
        o: f64[1, R, Hq, Dv].
        chosen: by level, i32[1, R, Hs, K].
    """

    o: Tensor
    chosen: dict[str, Tensor]


class Reference:
    """What the reference says of rows of one sequence, asked once of each choice of entries.

    A card's memory has kernels' tensors of every length.  What does not fit beside them is asked one key
    head after another, where heads are alike; else, or where that does not fit either, on the processor.
    """

    def __init__(self, spec: Spec, tensors: Tensors) -> None:
        self._spec, self._tensors = spec, tensors
        self._known: dict[tuple[int, int, str], Said] = {}

    def __call__(self, a: int, b: int, given: dict[str, ListSelection] | None = None) -> Said:
        """Of the rows from a to b, on what is given or on its own choice."""
        seen = hashlib.sha256()
        for name, chosen in (given or {}).items():
            seen.update(name.encode() + chosen.indices.contiguous().cpu().numpy().tobytes())
        key = (a, b, "" if given is None else seen.hexdigest())
        if key not in self._known:
            self._known[key] = self._said(a, b, given)
        return self._known[key]

    def _said(self, a: int, b: int, given: Selected | None) -> Said:
        for way in (_whole, _by_heads):
            try:
                return way(self._spec, self._tensors, a, b, given)
            except (torch.OutOfMemoryError, PlanError):
                continue
        there = {name: each.cpu() for name, each in self._tensors.items()}
        chosen = given and {
            name: ListSelection(level=name, indices=each.indices.cpu())
            for name, each in given.items()
        }
        return _whole(self._spec, there, a, b, chosen)


def _whole(spec: Spec, tensors: Tensors, a: int, b: int, given: Selected | None) -> Said:
    part = standins.rows_of(spec, tensors, a, b)
    found = reference(spec, part, selection=given, q_offset=a, keep_scores=False)
    return Said(o=found.o, chosen={x: to_list(y).indices for x, y in found.selection.items()})


def _by_heads(spec: Spec, tensors: Tensors, a: int, b: int, given: Selected | None) -> Said:
    """The same, of one key head and its queries after another.

    Raises:
        PlanError: heads agree across key heads, or something is said of each head by its number.
    """
    spec = planner.without_losses(spec)  # which are of all heads, and nothing that rows choose by
    graph = passes.run(planner.plan(spec))
    heads = spec.heads.kv if spec.heads else 1
    one, split = sharding.of_part(spec, graph, heads), sharding.head_dims(spec)
    dims = {each.name: each.type.dims for each in tensor_inputs(graph)}
    of_level = {
        node.op.level: node.type.dims
        for node in graph.nodes()
        if isinstance(node.op, Select | SelectSet)
    }

    def mine(x: Tensor, names: Sequence[str], head: int) -> Tensor:
        for at, name in enumerate(names):
            if name in split:
                x = x.chunk(heads, at)[head]
        return x

    found: list[Said] = []
    for head in range(heads):
        part = {name: mine(x, dims[name], head) for name, x in tensors.items() if name in dims}
        chosen = given and {
            name: ListSelection(level=name, indices=mine(x.indices, of_level[name][:3], head))
            for name, x in given.items()
        }
        found.append(_whole(one, part, a, b, chosen))
    return Said(
        o=torch.cat([each.o for each in found], 2),
        chosen={
            name: _beside([each.chosen[name] for each in found])
            if of_level[name][2] in split
            else found[0].chosen[name]
            for name in found[0].chosen
        },
    )


def _beside(lists: Sequence[Tensor]) -> Tensor:
    """Lists of some heads each as those of all, all as wide as the widest."""
    widest = max(each.shape[-1] for each in lists)
    return torch.cat([pad(each, (0, widest - each.shape[-1]), value=-1) for each in lists], 2)


def compare(
    spec: Spec,
    tensors: Tensors,
    o: Tensor,
    selection: Selected,
    runs: Sequence[tuple[int, int]],
    asked: Reference | None = None,
) -> Figures:
    """Hold outputs and choices of some rows against the reference in float64.

    Args:
        spec: Bound.
        tensors: Of one sequence.
        o: What the kernels put out, on their own choice.
        selection: That choice, by level, or what another layer chose.
        runs: Of rows, from and to.
        asked: The same tensors' reference, where other outputs are compared too.

    Raises:
        CheckError: the output is further off than TOLERANCE, or not finite; or fewer entries than SAME
            of a level are those that the reference chooses.
    """
    error, same = 0.0, dict.fromkeys(selection, 1.0)
    asked = asked or Reference(spec, tensors)
    for a, b in runs:
        given = {
            name: ListSelection(level=name, indices=s.indices[:, a:b])
            for name, s in selection.items()
        }
        expected = asked(a, b, given).o
        error = max(error, relative(o[:, a:b].to(expected.device), expected))
        if spec.brought:  # nothing is chosen
            continue
        free = asked(a, b)
        for name, chosen in given.items():
            own = free.chosen[name][0]  # as kernels choose
            same[name] = min(same[name], shared(chosen.indices[0].to(own.device), own))
    if not error < TOLERANCE:
        raise CheckError(f"relative error {error:.3g} of the output, expected below {TOLERANCE}")
    for name, share in same.items():
        if share < SAME:
            raise CheckError(f"{name}: {share:.1%} of the reference's choice, expected {SAME:.0%}")
    rows = sum(b - a for a, b in runs)
    return {"error": error, "same_choice": min(same.values(), default=1.0), "rows": rows}


def relative(o: Tensor, expected: Tensor) -> float:
    """|o - expected| / |expected|."""
    return float((o.double() - expected).norm() / expected.norm())


def require_close(o: Tensor, expected: Tensor, where: str) -> float:
    """How far off an output is.

    Raises:
        CheckError: further than TOLERANCE, or not finite.
    """
    error = relative(o, expected.double())
    if not error < TOLERANCE:
        raise CheckError(f"relative error {error:.3g} {where}, expected below {TOLERANCE}")
    return error


def shared(chosen: Tensor, own: Tensor) -> float:
    """Share of the reference's own choices that the kernel made too; of none, that it made none.
    i32[R, Hs, K], twice
    """
    if not (own >= 0).any():
        return float(not (chosen >= 0).any())
    entries = 1 + max(int(each.max()) if each.numel() else 0 for each in (chosen, own))
    both = metrics.members(chosen, entries) & metrics.members(own, entries)
    return float(both.sum() / (own >= 0).sum())
