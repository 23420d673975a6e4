"""Small calls of a spec's emitted kernels in Triton's interpreter, each judged by the reference.

Runs in a child of `verify`, one line of JSON a trial.  A budget of thousands of tokens never bites in
a small call, so most trials are of a shrunk copy of the spec, whose kernels differ in numbers only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import traceback
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen import batch, drawn
from hsgen.arguments import SHORT_NAMES
from hsgen.batch import Batch
from hsgen.errors import HsgenError
from hsgen.execution import Configs, Program, compute_integers_once, interpreting
from hsgen.plan import Plan
from hsgen.reference import Result, reference, tensor_kinds, tensor_shapes
from hsgen.rows import RowsContext
from hsgen.runtime import compile_program
from hsgen.schedule import TILE_OF_HEADS
from hsgen.selection import ListSelection, members
from hsgen.spec import (
    Attend,
    Blocks,
    Diagonals,
    Halving,
    HeadDim,
    Heads,
    KMeans,
    LearnedTree,
    Level,
    Permute,
    Select,
    SortInSegment,
    Spec,
    Static,
    parse,
)
from hsgen.spec import verify as verify_spec
from hsgen.streams import StreamsContext
from hsgen.target import Target

Numbers = Literal["real", "integers", "plateau"]

BLOCK = 8  # tokens of the largest block of a shrunk copy
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
WIDE = 256  # slots of a selection that make the interpreter slow
MOST_KEYS = 1024
KNOWN_CHOICES = 8  # that an examination remembers the reference of
LSE_BOUND = 1e-5  # of 1 + its size
SCORE_BOUND = 1e-4  # of a row's largest score: far above rounding, far below a wrong score
EIGHT_BOUND = 2.0**-8  # likewise, where a card's units add products of e4m3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One call.

    Attributes:
        name: says what it is, for a report.
        spec: heads and head dims bound.
        queries: rows of each sequence.
        keys: of each sequence.
        packed: documents one after the other; else all have the first one's rows and, of the first
            one's keys, each its own number.
        numbers: `integers` and `plateau` (all scores alike) make the choice exact.
    """

    name: str
    spec: Spec
    dtype: torch.dtype
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    packed: bool = False
    numbers: Numbers = "real"

    @property
    def exact(self) -> bool:
        """The arithmetic of scores has no rounding, so every choice is known."""
        return self.numbers == "plateau" or (
            self.numbers == "integers" and _exact_on_integers(self.spec)
        )


def trials(spec: Spec) -> tuple[Trial, ...]:
    """The trials of a spec, the most telling first."""
    small = shrink(spec)
    full = _one_key_head(spec)
    half, single = torch.float16, torch.float32
    return (
        Trial(
            name="shrunk, integers",
            spec=small,
            dtype=single,
            queries=(53,),
            keys=(53,),
            numbers="integers",
        ),
        Trial(
            name="shrunk, all scores alike",
            spec=small,
            dtype=single,
            queries=(37,),
            keys=(37,),
            numbers="plateau",
        ),
        Trial(
            name="shrunk, documents",
            spec=small,
            dtype=half,
            queries=(1, 0, 17),
            keys=(1, 0, 29),
            packed=True,
        ),
        Trial(
            name="shrunk, a prefix in the keys",
            spec=small,
            dtype=single,
            queries=(5, 5),
            keys=(29, 11),
        ),
        Trial(
            name="one key head",
            spec=full,
            dtype=half,
            queries=(2 if _widest(spec) > WIDE else 5,),
            keys=(min(_largest(spec), MOST_KEYS) + 22,),
        ),
    )


def _widest(spec: Spec) -> int:
    return max((level.select.width for level in spec.levels if level.select), default=0)


def _largest(spec: Spec) -> int:
    return max((level.partition.size for level in spec.levels), default=1)


# --- specs that fit


def shrink(spec: Spec) -> Spec:
    """The same structure in small: blocks of at most 8 tokens, budgets that bite, few heads.

    Sizes and strides are divided by one power of two, so partitions nest and overlap as before.
    """
    divisor, heads = _divisor(spec), _few_heads(spec, kv=2)
    levels: list[Level] = []
    for level in spec.levels:
        levels.append(_shrunk_level(spec, level, divisor, {x.name: x.select for x in levels}))
    units = _units(levels)
    changes: dict[str, object] = {
        "levels": tuple(levels),
        "attend": tuple(_shrunk_branch(x, heads, units.get(x.name, 2)) for x in spec.attend),
        "heads": heads,
        "head_dim": _few_dims(spec),
        "route": spec.route and spec.route.of_heads(heads.query),
    }
    if spec.index:
        few = 2 if spec.index_per_key_head else min(spec.index.heads, 4)
        changes["index"] = spec.index.model_copy(update={"heads": few, "dim": 16})
    return verify_spec(spec.model_copy(update=changes))


def _units(levels: Sequence[Level]) -> dict[str, int]:
    """By branch that estimates are held against, tokens of the blocks that these keep: whole units."""
    kept = {x.score.source: x.partition.size for x in levels if x.score.source}
    named = [(x.score.lse_from, kept.get(x.name, 2)) for x in levels]
    return {name: size for name, size in named if name}


def _divisor(spec: Spec) -> int:
    """The largest power of two that makes no block smaller than needed, and divides all but the smallest."""
    blocks = [x.partition for x in spec.levels if isinstance(x.partition, Blocks)]
    numbers = [n for x in blocks for n in (x.size, x.stride)]
    numbers += [x.query.block for x in spec.levels if x.query and x.query.block]
    numbers = [n for n in numbers if n >= BLOCK]  # others become 2
    tiers = [  # means of a tier divide what they are of
        (x.partition.size, tier.merge)
        for x in spec.levels
        if x.select and isinstance(x.partition, Blocks)
        for tier in x.select.quota or ()
    ]
    divisor = 1
    while (
        max(numbers, default=1) // (divisor * 2) >= BLOCK
        and all(n % (divisor * 2) == 0 for n in numbers)
        and all(n // (divisor * 2) % merge == 0 for n, merge in tiers)
    ):
        divisor *= 2
    return divisor


def _part(n: int, divisor: int) -> int:
    """Of the size of a block, or of one of few tokens as many as 2."""
    return n // divisor if n >= BLOCK else max(min(n, 2), n // divisor)


def _shrunk_level(
    spec: Spec, level: Level, divisor: int, above: Mapping[str, Select | None]
) -> Level:
    """A level, given the selections of those before it."""
    changes: dict[str, object] = {}
    blocks = isinstance(level.partition, Blocks)
    if isinstance(level.partition, Blocks):
        lengths = (level.partition.size, level.partition.stride, level.partition.before or 0)
        size, stride, before = (_part(n, divisor) for n in lengths)
        changes["partition"] = Blocks(size=size, stride=stride, before=before or None)
    if isinstance(level.partition, Diagonals):
        changes["partition"] = Diagonals(size=_part(level.partition.size, divisor))
    if isinstance(level.partition, Halving):
        changes["partition"] = _searched_less(level.partition)
    if isinstance(level.partition, LearnedTree) and level.partition.takes:
        fewer = {"branching": min(level.partition.branching, 5)}
        fewer["takes"] = min(level.partition.takes, 17)
        changes["partition"] = level.partition.model_copy(update=fewer)
    if level.pool and level.pool.rotate:
        turn = level.pool.rotate.model_copy(update={"dims": min(level.pool.rotate.dims, 16)})
        changes["pool"] = level.pool.model_copy(update={"rotate": turn})
    if level.permute:
        changes["permute"] = _ordered_less(level.permute, divisor)
    if level.query and level.query.block:
        rows = _part(level.query.block, divisor)
        changes["query"] = level.query.model_copy(update={"block": rows})
    if level.query and level.query.last:
        few_rows = {"last": min(level.query.last, 8)}
        changes["query"] = level.query.model_copy(update=few_rows)
    if level.select:
        few = {
            "last": min(level.select.force.last, 2)
        }  # a long window would leave nothing to choose
        if isinstance(level.partition, Halving):
            few["first"] = min(level.select.force.first, 2)  # of long intervals' tokens, as many
        force = level.select.force.model_copy(update=few)
        if rule := _of_few_entries(level.select):
            changes["select"] = level.select.model_copy(update={**rule, "force": force})
            return level.model_copy(update=changes)
        kept = "top_k" if level.select.top_k else "beam"
        forced = force.first + force.last + (spec.own_entries(level) - 1 if force.last else 0)
        joined = force.level and above[force.level]
        forced += joined.width if joined else 0
        budget = min(level.select.budget, max(forced + 1, 3 if blocks else 6))
        changes["select"] = level.select.model_copy(update={kept: budget, "force": force})
    return level.model_copy(update=changes)


def _ordered_less(permute: Permute, divisor: int) -> Permute:
    """Shorter segments, and a few clusters after a few rounds."""
    changes: dict[str, object] = {}
    for side, order in permute:
        if isinstance(order, SortInSegment):
            changes[side] = _sorted_less(order, divisor)
        if isinstance(order, KMeans):
            changes[side] = _clustered_less(order, clusters=5, rounds=2)
    return permute.model_copy(update=changes)


def _sorted_less(order: SortInSegment, divisor: int) -> SortInSegment:
    """Segments of as many blocks, by the masses of a few rows."""
    less = {"segment": _part(order.segment, divisor), "last": order.last and min(order.last, 8)}
    return order.model_copy(update=less)


def _clustered_less(order: KMeans, *, clusters: int, rounds: int) -> KMeans:
    """A few clusters, after a few rounds."""
    less = {"clusters": min(order.clusters, clusters), "iterations": min(order.iterations, rounds)}
    return order.model_copy(update=less)


def _searched_less(halving: Halving) -> Halving:
    """Half of the rounds, rounded up: of intervals inside one another each stays inside the next."""
    rounds = (halving.interval // halving.until).bit_length() - 1
    return halving.model_copy(update={"interval": halving.until << (rounds + 1) // 2})


def _of_few_entries(select: Select) -> dict[str, object]:
    """A rule that lets counts vary, so that of few entries some are kept; empty of another."""
    if select.fraction:
        return {"fraction": max(select.fraction, 0.4)}  # more than is forced
    if select.threshold:
        return {"threshold": max(select.threshold, 0.1)}
    if select.top_p:
        return {"top_p": select.top_p.model_copy(update={"mass": min(select.top_p.mass, 0.6)})}
    if select.quota:
        return {"quota": select.quota}
    if select.budget_from:
        return {"min": select.min and min(select.min, 2)}
    if select.early_stop:  # short steps, the first of which may add too little
        less = {"entries": min(select.early_stop.entries, 3), "gain": 0.2}
        return {"early_stop": select.early_stop.model_copy(update=less)}
    return {}


def _shrunk_branch(branch: Attend, heads: Heads, unit: int) -> Attend:
    if branch.static:
        static = _shrunk_static(branch.static, heads.query, unit)
        return branch.model_copy(update={"static": static})
    if branch.window is None or branch.window == "all":
        return branch
    return branch.model_copy(update={"window": min(branch.window, 9)})


def _shrunk_static(static: Static, heads: int, unit: int) -> Static:
    """Units of at most so many tokens, short windows, kinds of heads of which the heads are a multiple."""
    kinds = static.per_head[: math.gcd(heads, len(static.per_head))]
    if static.grid:
        return static
    return static.model_copy(
        update={
            "blocks": min(static.blocks, unit),
            "window": static.window and min(static.window, 5),
            "sink": min(static.sink, 3),
            "per_head": tuple(
                kind.model_copy(update={"window": min(kind.window, 5)}) for kind in kinds
            ),
        }
    )


def _few_heads(spec: Spec, *, kv: int) -> Heads:
    """A group that is 1, a power of two or neither, as the spec's is."""
    group = spec.heads.group if spec.heads else 2
    if group >= TILE_OF_HEADS and any(branch.storage for branch in spec.attend):
        return Heads(query=TILE_OF_HEADS + 1, kv=1)  # two programs a token, as with 128
    small = group if group <= 4 else 4 if group & (group - 1) == 0 else 3
    return Heads(query=kv * small, kv=kv)


def _few_dims(spec: Spec) -> HeadDim:
    """Of latents a value is a part of a key."""
    if _same_dims(spec):
        return HeadDim(qk=16, v=16)
    latent = any(branch.storage for branch in spec.attend)
    return HeadDim(qk=48, v=32) if latent else HeadDim(qk=16, v=32)


def _same_dims(spec: Spec) -> bool:
    return spec.head_dim is None or spec.head_dim.qk == spec.head_dim.v


def _one_key_head(spec: Spec) -> Spec:
    """The spec itself, with the same group but one key head: the grid is all that differs.  As many as have
    all ways, where a table says which heads go.
    """
    group = spec.heads.group if spec.heads else 4
    ways = len(spec.route.table) if spec.route and spec.route.by == "head" else 0
    heads = ways // math.gcd(ways, group) if ways else 1
    changes: dict[str, object] = {
        "heads": Heads(query=group * heads, kv=heads),
        "head_dim": spec.head_dim or HeadDim(qk=64, v=64),
    }
    if spec.index and spec.index_per_key_head:
        changes["index"] = spec.index.model_copy(update={"heads": 1})
    changes["levels"] = tuple(_one_round(level) for level in spec.levels)
    return spec.model_copy(update=changes)


def _one_round(level: Level) -> Level:
    """All clusters that there are, of one round."""
    if level.permute is None:
        return level
    changes = {
        side: _clustered_less(order, clusters=order.clusters, rounds=1)
        for side, order in level.permute
        if isinstance(order, KMeans)
    }
    return level.model_copy(update={"permute": level.permute.model_copy(update=changes)})


def differences(spec: Spec) -> str:
    """What the shrunk copy has in small, as `block 64 -> 8`."""
    small = shrink(spec)
    parts = [
        f"{level.name} {_level_text(level)} -> {_level_text(other)}"
        for level, other in zip(spec.levels, small.levels, strict=True)
        if _level_text(level) != _level_text(other)
    ]
    parts += [
        f"{branch.name} window {branch.window} -> {other.window}"
        for branch, other in zip(spec.attend, small.attend, strict=True)
        if branch.window != other.window
    ]
    parts += [
        f"{branch.name} units of {branch.static.blocks} -> {other.static.blocks}"
        for branch, other in zip(spec.attend, small.attend, strict=True)
        if branch.static and other.static and branch.static != other.static
    ]
    assert small.heads is not None, "shrink binds them"
    assert small.head_dim is not None, "shrink binds them"
    parts.append(f"heads {small.heads.query}/{small.heads.kv}")
    parts.append(f"head dim {small.head_dim.qk}/{small.head_dim.v}")
    return ", ".join(parts)


def _level_text(level: Level) -> str:
    size = f"{level.partition.size}/{level.partition.stride}"
    if isinstance(level.partition, LearnedTree) and level.partition.takes:
        size = f"{level.partition.branching} nodes of {level.partition.takes}"
    if level.select and level.select.fraction:
        return f"{size} a part of {level.select.fraction:g}"
    if level.select and level.select.threshold:
        return f"{size} masses above {level.select.threshold:g}"
    if level.select and level.select.top_p:
        return f"{size} {level.select.top_p.mass:g} of the mass"
    if level.select and level.select.quota:
        return f"{size} in {len(level.select.quota)} tiers"
    if level.select and level.select.budget_from:
        return f"{size} as {level.select.budget_from} says"
    return f"{size} top {level.select.budget}" if level.select else size


def _exact_on_integers(spec: Spec) -> bool:
    """Whether scores of small integers come out exactly, whatever the order of operations."""
    assert spec.heads is not None, "trials are of bound specs"
    assert spec.head_dim is not None, "trials are of bound specs"
    root = math.isqrt(spec.head_dim.qk)
    for level in spec.levels:
        score = level.score
        if score.normalise is not None or isinstance(score.scale, float):
            return False
        scaled = score.form in ("dot", "bound") and score.scale is None
        if scaled and not _is_power(root, spec.head_dim.qk):
            return False
        if level.pool and level.pool.keys in ("sum_rsqrt", "centroid"):
            return False
        if (
            level.query and level.query.pool == "mean"
        ):  # of a last block, whose rows may be any number
            return False
        if level.pool and level.pool.keys == "mean" and not _power_of_two(level.partition.size):
            return False
        if score.reduce == "mean" and not _power_of_two(spec.heads.query // spec.heads.kv):
            return False
    return True


def _is_power(root: int, square: int) -> bool:
    return root * root == square and _power_of_two(root)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


# --- one call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tensors:
    """A trial's tensors as the driver takes them, and as the reference does; lists of another layer."""

    driver: dict[str, Tensor]
    brought: dict[str, Tensor] | None
    reference: dict[str, Tensor]
    batch: Batch
    lengths: dict[str, Tensor]


def judge(trial: Trial, target: Target) -> list[str]:
    """Run one trial in the interpreter.  -> what is wrong, nothing if all is well"""
    program = _program(trial.spec, target, trial.dtype)
    return Examination(trial).problems(program, program.config)


class Examination:
    """One trial on a device, for many configurations: its tensors, and what the reference says.

    The reference is asked once for each choice of entries, and configurations choose alike.
    """

    def __init__(self, trial: Trial, device: str = "cpu") -> None:
        self.trial = trial
        self._on_card = device != "cpu"
        self._tensors = tensors_of(trial, device)
        self._known: dict[str, tuple[Result, Result]] = {}
        self._free: Result | None = None

    def problems(self, program: Program, config: Configs) -> list[str]:
        """Run a program's kernels.  -> what is wrong, nothing if all is well"""
        tensors = self._tensors
        o, lse, own = program.driver.forward(tensors.driver, tensors.batch, config, tensors.brought)
        return self.wrong(o, lse, own, program.plan)

    def wrong(
        self, o: Tensor, lse: Mapping[str, Tensor], own: Mapping[str, Tensor], plan: Plan
    ) -> list[str]:
        """What is wrong with what kernels gave.

        own: What they chose, by level, where nothing is brought.
        """
        trial, tensors = self.trial, self._tensors
        chosen = tensors.brought or own
        if trial.packed:
            o, lse = o[0], {name: each[0] for name, each in lse.items()}
            chosen = {name: each[0] for name, each in chosen.items()}
        selection = {
            name: ListSelection(level=name, indices=indices) for name, indices in chosen.items()
        }
        forced, plain = self._references(selection)
        varying = any(x.when or (x.select and x.select.counts_vary) for x in trial.spec.levels)
        if self._free is None and (trial.exact or varying) and not tensors.brought:
            self._free = _reference(trial, tensors, torch.float64, None)
        wrong = [
            problem
            for level in trial.spec.levels
            if level.select and not tensors.brought
            for problem in _wrong_selection(
                level,
                selection[level.name],
                forced,
                self._free,
                self._apart(level, plan),
                trial.queries,
                split=tensors.driver.get(f"{level.name}_split"),
            )
        ]
        if trial.exact and not tensors.brought:
            assert self._free is not None, "asked for above"
            wrong += _other_sets(self._free, selection)
        wrong += _wrong_output(o, plain.o.to(trial.dtype), forced.o, trial.dtype)
        for (name, got), expected in zip(lse.items(), forced.lse.values(), strict=True):
            wrong += _wrong_lse(name, got, expected, self._step_of(name))
        return wrong

    def _apart(self, level: Level, plan: Plan) -> float:
        """How far apart entries may be whose scores are right, as a part of the largest."""
        eight = self._on_card and _scored_in_eight(level, plan)
        return max(_step(self.trial, level), EIGHT_BOUND if eight else SCORE_BOUND)

    def _step_of(self, branch: str) -> float:
        """Of the log-sum-exp of a branch, or of all of them."""
        spec = self.trial.spec
        pooled = (
            spec.level(b.over)
            for b in spec.attend
            if b.values == "pooled" and b.over and branch in (b.name, "o")
        )
        return max((_step(self.trial, level) for level in pooled), default=0.0)

    def _references(self, selection: dict[str, ListSelection]) -> tuple[Result, Result]:
        """In float64 and in float32, of these entries."""
        seen = hashlib.sha256()
        for chosen in selection.values():
            seen.update(chosen.indices.cpu().numpy().tobytes())
        key = seen.hexdigest()
        if key not in self._known:
            if len(self._known) >= KNOWN_CHOICES:
                self._known.clear()
            self._known[key] = (
                _reference(self.trial, self._tensors, torch.float64, selection),
                _reference(self.trial, self._tensors, torch.float32, selection),
            )
        return self._known[key]


@functools.lru_cache(maxsize=8)
def _program(spec: Spec, target: Target, dtype: torch.dtype) -> Program:
    return compile_program(spec, target, dtype, interpret=True)


def _reference(
    trial: Trial, tensors: Tensors, dtype: torch.dtype, selection: dict[str, ListSelection] | None
) -> Result:
    lengths = tensors.lengths
    return reference(
        trial.spec,
        tensors.reference,
        cu_seqlens_q=lengths.get("cu_seqlens_q"),
        cu_seqlens_k=lengths.get("cu_seqlens_k"),
        kv_lens=lengths.get("kv_lens"),
        selection=selection,
        dtype=dtype,
    )


def tensors_of(trial: Trial, device: str) -> Tensors:
    """Tensors and lengths of a trial; the same each time, whatever the device."""
    generator = torch.Generator().manual_seed(zlib.crc32(trial.name.encode()))
    kinds = tensor_kinds(trial.spec)
    sequences = 1 if trial.packed else len(trial.queries)
    rows = sum(trial.queries) if trial.packed else trial.queries[0]
    keys = sum(trial.keys) if trial.packed else trial.keys[0]
    shapes = tensor_shapes(trial.spec, sequences, rows, keys)
    made = {
        name: _halves(trial, device)
        if name.endswith("_split")
        else _numbers(trial, name, shape, generator).to(device, trial.dtype)
        for name, shape in shapes.items()
        if name != "route"
    }
    if trial.spec.route and trial.spec.route.input:  # each way in turn, the last one first
        many = math.prod(shapes["route"]) if "head" in trial.spec.route.by else len(trial.queries)
        ways = torch.arange(many, dtype=torch.int32, device=device) + 1
        made["route"] = (ways % len(trial.spec.route.input)).view(shapes["route"])
    brought = drawn.any_lists(trial.spec, sequences, rows, keys, generator)
    brought = {name: x.to(device) for name, x in brought.items()} or None
    if not trial.packed:
        lens = torch.tensor(trial.keys, dtype=torch.int32, device=device)
        where = batch.dense(sequences, rows, keys, lens.device, kv_lens=lens)
        return Tensors(
            driver=made, reference=made, batch=where, lengths={"kv_lens": lens}, brought=brought
        )
    cu_q, cu_k = (_cumulative(each).to(device) for each in (trial.queries, trial.keys))
    whole = ("parameter", "sequence")
    flat = {name: x if kinds[name] in whole else x[0] for name, x in made.items()}
    return Tensors(
        driver=made,
        reference=flat,
        batch=batch.packed(cu_q, cu_k, rows, keys),
        lengths={"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k},
        brought=brought,
    )


def _cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(lengths[:z]) for z in range(len(lengths) + 1)], dtype=torch.int32)


def _halves(trial: Trial, device: str) -> Tensor:
    """Where the second half of each sequence begins."""
    return torch.tensor([n // 2 for n in trial.keys], dtype=torch.int32, device=device)


def _numbers(trial: Trial, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers fit for a tensor's part: learned maps keep the size of what they map."""
    if trial.numbers == "plateau" and name in ("q", "q_index"):
        return torch.zeros(shape)
    # of whole centroids many are as long and as near as one another, and at unit length none is whole
    if trial.numbers == "integers" and name != "gates" and not name.endswith("_centroids"):
        return torch.randint(-2, 3, shape, generator=generator).float()
    x = torch.randn(shape, generator=generator)
    if name.endswith("_weight"):
        return x / math.sqrt(shape[1] * shape[2])
    return x


# --- judgement


def _scored_in_eight(level: Level, plan: Plan) -> bool:
    """Whether the kernel that scores a level reads e4m3 numbers, as the plan says it."""
    for kernel in plan.kernels:
        context = (
            kernel.context.rows if isinstance(kernel.context, StreamsContext) else kernel.context
        )
        if kernel.name == f"score_{level.name}" and isinstance(context, RowsContext):
            return context.eight
    return False


def _step(trial: Trial, level: Level) -> float:
    """How far apart entries may be that two right sums of a pool, a tie between them, round to."""
    if level.score.source:
        return _step(trial, trial.spec.level(level.score.source))
    pool = level.pool
    copies = pool is None or pool.keys in ("max", "minmax", "first")
    if trial.dtype == torch.float32 or (copies and not (pool and (pool.then or pool.rotate))):
        return 0.0
    return 2 * ROUNDOFF[trial.dtype]


def _wrong_selection(
    level: Level,
    chosen: ListSelection,
    given: Result,
    own: Result | None,
    apart: float,
    queries: tuple[int, ...],
    *,
    split: Tensor | None,
) -> Iterator[str]:
    """Structure, and what scores say: no unselected entry may be clearly better than a selected one.

    `apart`: by which part of a row's largest score it would be so.
    `given` is the reference on the kernels' own selections, so a child is judged by its own parent.
    `own`: the one that chooses, where rows differ in how many they keep, which no score decides, or heads in
    whether they keep any.
    `queries`: of each sequence, whose rows entries may take.
    `split`: where entries of each begin that are chosen apart.
    """
    assert level.select is not None
    scores, candidates = given.scores[level.name], given.candidates[level.name]
    forced = given.forced[level.name]
    if level.when:  # heads on another way choose nothing, and so does a row that sees nothing
        assert own is not None, "asked where heads differ"
        on_way = (own.selection[level.name].indices >= 0).any(-1, keepdim=True)
        if level.select.scope == "entry":  # a row on the way may be in none
            on_way = on_way.any(-3, keepdim=True)
        candidates, forced = candidates & on_way, forced & on_way
    mask = members(chosen, scores.shape[-1])
    count = mask.sum(-1)
    if not torch.equal(_ascending(mask, chosen.indices.shape[-1]), chosen.indices):
        yield f"{level.name}: a row is not ascending, or not a set, or not -1 padded"
        return
    keep = torch.full_like(count, level.select.budget)
    if not level.select.force.counted or level.select.force.tail:
        keep = keep + forced.sum(-1)
    if level.select.scope == "entry":
        for z in (z for z, n in enumerate(queries) if n):
            of = slice(sum(queries[:z]), sum(queries[: z + 1])) if scores.ndim == 3 else z
            taken, score, there = (x[of].transpose(0, 2) for x in (mask, scores, candidates))
            for text, bad in (
                ("takes a row that sees none of it", (taken & ~there).any(-1)),
                (
                    "has not as many rows as it should",
                    taken.sum(-1) != there.sum(-1).clamp(max=level.select.budget),
                ),
                ("leaves out a better row", _left_out(score, taken, there, there & False, apart)),
            ):
                if bad.any():
                    yield f"{level.name}: entry {_row(bad)} {text}"
        return
    if own is not None and level.select.counts_vary:
        keep = members(own.selection[level.name], mask.shape[-1]).sum(-1)
    for text, bad in (
        ("selects what is no candidate", (mask & ~candidates).any(-1)),
        ("lacks a forced entry", (forced & ~mask).any(-1)),
        ("has not the size it should", count != torch.minimum(keep, candidates.sum(-1))),
        (
            "leaves out a better entry",
            torch.stack(
                [
                    _left_out(scores, mask & side, candidates & side, forced & side, apart)
                    for side in _sides(level, scores, split, queries)
                ]
            ).any(0),
        ),
    ):
        if bad.any():
            yield f"{level.name}: {_row(bad)} {text}"


def _sides(
    level: Level, scores: Tensor, split: Tensor | None, queries: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Entries that are chosen apart from each other: of most levels all are chosen together."""
    first = torch.arange(scores.shape[-1], device=scores.device) * level.partition.stride
    if split is None:
        return (first >= 0,)
    if scores.ndim == 3:  # packed
        split = split.repeat_interleave(torch.tensor(queries, device=split.device))
    late = first >= split.view(-1, *(1,) * (scores.ndim - 1))
    return late, ~late


def _ascending(mask: Tensor, width: int) -> Tensor:
    """Members as sorted lists.  bool[..., N] -> i32[..., width]"""
    entries = mask.shape[-1]
    numbers = (
        torch.where(mask, torch.arange(entries, device=mask.device), entries)
        .sort(-1)
        .values[..., :width]
    )
    numbers = torch.nn.functional.pad(numbers, (0, width - numbers.shape[-1]), value=entries)
    return torch.where(numbers < entries, numbers, -1).to(torch.int32)


def _left_out(
    scores: Tensor, mask: Tensor, candidates: Tensor, forced: Tensor, apart: float
) -> Tensor:
    """Rows whose lowest selected score is clearly below the highest unselected one.  -> bool[...]"""
    lowest = scores.masked_fill(~mask | forced, math.inf).amin(-1)
    highest = scores.masked_fill(mask | ~candidates, -math.inf).amax(-1)
    size = scores.masked_fill(~scores.isfinite(), 0.0).abs().amax(-1)
    return highest - lowest > apart * size


def _other_sets(expected: Result, chosen: dict[str, ListSelection]) -> Iterator[str]:
    """Where arithmetic is exact, the sets are those of the reference, ties included; lists may be longer."""
    for name, selection in expected.selection.items():
        wanted, got = selection.indices, chosen[name].indices
        width = max(wanted.shape[-1], got.shape[-1])
        wanted, got = (F.pad(x, (0, width - x.shape[-1]), value=-1) for x in (wanted, got))
        differs = (wanted != got).any(-1)
        if differs.any():
            yield f"{name}: {_row(differs)} is not the exact choice"


def _wrong_output(o: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> Iterator[str]:
    """Compare row by row and as a whole with float64, by the error of plain PyTorch in that dtype.

    Rows are vectors of one head; a whole has no bias, as rounding has none.
    """
    unit = ROUNDOFF[dtype]
    if not o.isfinite().all():
        yield f"o: {_row(~o.isfinite().all(-1))} is not finite"
        return
    error, own = o.double() - exact, plain.double() - exact
    size = _rms(exact)
    floor = 4 * unit * exact.abs().amax() / math.sqrt(exact.shape[-1])
    bad = _rms(error) > 3 * _rms(own) + 4 * unit * size + floor
    if bad.any():
        yield f"o: {_row(bad)} is off by {float(_rms(error)[bad].max()):.2g} of {float(size.max()):.2g}"
    bias = float((error * exact).sum() / (exact * exact).sum().clamp(min=1e-30))
    if abs(bias) > max(unit / 4, 1e-6):
        yield f"o: on average {bias:+.2g} too large"


def _wrong_lse(name: str, lse: Tensor, exact: Tensor, step: float) -> Iterator[str]:
    empty = exact == -math.inf
    bound = max(LSE_BOUND, step) * (1 + exact.masked_fill(empty, 0.0).abs())
    off = (lse.double() - exact).masked_fill(empty, 0.0)
    bad = (off.abs() > bound) | off.isnan() | ((lse == -math.inf) != empty)
    if bad.any():
        yield f"lse of {name}: {_row(bad)} is wrong"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def _row(bad: Tensor) -> str:
    """The first bad row, as its index, and how many there are."""
    where = bad.nonzero()
    return f"row {where[0].tolist()} (of {len(where)} in {bad.numel()})"


# --- the child


def _poisoned_empty(*size: Any, **keywords: Any) -> Tensor:
    """torch.empty filled with what must not be read, so that what no kernel writes is seen."""
    made = _empty(*size, **keywords)
    return made.fill_(math.nan) if made.is_floating_point() else made.fill_(-(1 << 30))


_empty = torch.empty


@contextmanager
def poisoned() -> Generator[None, None, None]:
    """Within the block, nobody gets zeros from torch.empty by luck."""
    torch.empty = _poisoned_empty
    try:
        yield
    finally:
        torch.empty = _empty


def answer(request: dict[str, object]) -> dict[str, object]:
    """Judge the trial that a request names; an empty one asks for the list of trials."""
    spec = parse(str(request["spec"]))
    known = trials(spec)
    if "trial" not in request:
        names = [f"{trial.name}, {SHORT_NAMES[trial.dtype]}" for trial in known]
        return {"trials": names, "shrunk": differences(spec)}
    trial = known[int(str(request["trial"]))]
    try:
        return {"problems": judge(trial, Target.named(str(request["target"])))}
    except HsgenError as error:
        return {"problems": [str(error)]}
    except Exception:  # noqa: BLE001 - whatever a kernel does wrong is a finding
        return {"problems": [traceback.format_exc(limit=-4)]}


def main() -> None:
    """Answer each line of stdin by a line on stdout."""
    assert interpreting(), "the parent sets TRITON_INTERPRET"
    torch.set_num_threads(1)
    torch.empty = _poisoned_empty
    compute_integers_once()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
