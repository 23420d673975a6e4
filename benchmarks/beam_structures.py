"""Levels whose beams are measured: chains of mean-pooled blocks, HiP's halved intervals, HiRouter's trees.

Each is a function of the beam's width, and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen import spec as language
from hsgen.captures import Group
from hsgen.reference import reference
from hsgen.spec import (
    Attend,
    Blocks,
    Force,
    Halving,
    HeadDim,
    Heads,
    LearnedTree,
    Level,
    Pool,
    Score,
    Select,
    Spec,
    Tokens,
)

FORCED = 2  # entries of every level of blocks: the sink, and what is not complete yet
ENDS = Force(first=1, last=1)
ITERATIONS = 20  # of k-means
STEPS, BATCH, RATE = 100, 512, 0.02  # of Adam on HiRouter's loss: steps, tokens drawn in each
SEED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A group's heads and text, and how many of its tokens are kept in the end."""

    heads: int
    dim: int
    tokens: int
    kept: int

    def entries(self, size: int, width: float = 1.0) -> int:
        """How many blocks hold `width` times as many tokens as are kept; room for those forced."""
        return max(math.ceil(self.kept * width / size), FORCED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """Levels, the last of which keeps the same number of entries, of `size` tokens, at every width.

    spec: By width; None is the last level alone, with every entry scored.
    inputs: What the spec takes besides queries, keys and values.
    exact: The entries that the last level's own scores are an estimate of.
    rows: How many times as many rows are measured, where many choose as one.
    """

    name: str
    look: str  # in the picture
    size: int
    spec: Callable[[Problem, float | None], Spec]
    inputs: Callable[[Group], Mapping[str, Tensor]] = lambda _: {}
    exact: Callable[[Problem], Spec] | None = None
    rows: int = 1


# Chains of blocks -----------------------------------------------------------------------------------


def chain(*sizes: int, look: str) -> Structure:
    """Mean-pooled blocks in blocks, from the top down; 1 is tokens."""

    def spec(problem: Problem, width: float | None) -> Spec:
        return _nested(sizes if width else sizes[-1:], problem, width or 1.0)

    name = " > ".join("tokens" if size == 1 else str(size) for size in sizes)
    return Structure(name=name, look=look, size=sizes[-1], spec=spec)


def _nested(sizes: Sequence[int], problem: Problem, width: float) -> Spec:
    levels = [
        Level(
            name=f"level{i}",
            within=f"level{i - 1}" if i else None,
            partition=Tokens() if size == 1 else Blocks(size=size, stride=size),
            pool=None if size == 1 else Pool(keys="mean"),
            score=Score(form="dot"),
            select=select,
        )
        for i, (size, select) in enumerate(zip(sizes, _budgets(sizes, problem, width), strict=True))
    ]
    spec = Spec(
        name="beams",
        heads=Heads(query=problem.heads, kv=1),
        head_dim=HeadDim(qk=problem.dim, v=problem.dim),
        levels=tuple(levels),
        attend=(Attend(name="selected", over=levels[-1].name),),
    )
    return language.verify(spec)


def _budgets(sizes: Sequence[int], problem: Problem, width: float) -> list[Select]:
    """The last level keeps what is kept, those above `width` times that."""
    beams = [Select(beam=problem.entries(size, width), force=ENDS) for size in sizes[:-1]]
    return [*beams, Select(top_k=problem.entries(sizes[-1]), force=ENDS)]


# Shipped specs --------------------------------------------------------------------------------------


def _shipped(name: str, problem: Problem, selects: Sequence[Select]) -> Spec:
    """The last levels of a shipped spec, as many as there are budgets, and what attends them."""
    spec = language.load(name)
    levels = [
        level.model_copy(update={"select": select, "within": level.within if i else None})
        for i, (level, select) in enumerate(zip(spec.levels[-len(selects) :], selects, strict=True))
    ]
    return language.verify(
        spec.model_copy(
            update={
                "heads": Heads(query=problem.heads, kv=1),
                "head_dim": HeadDim(qk=problem.dim, v=problem.dim),
                "levels": tuple(levels),
                "attend": tuple(x for x in spec.attend if x.over == levels[-1].name),
                "combine": None,
                "loss": spec.loss if len(levels) == len(spec.levels) else None,
            }
        )
    )


def hip() -> Structure:
    """specs/hip.yaml with the budgets and forced entries of a chain, and without its window."""
    levels = language.load("hip").levels
    sizes = [x.partition.interval for x in levels if isinstance(x.partition, Halving)]
    query = levels[-1].query
    assert query is not None

    def spec(problem: Problem, width: float | None) -> Spec:
        of = sizes if width else sizes[-1:]
        return _shipped("hip", problem, _budgets(of, problem, width or 1.0))

    def exact(problem: Problem) -> Spec:
        """Blocks by their best key, where HiP has the best that halving them comes upon."""
        found = spec(problem, None)
        last = found.levels[-1]
        each = last.model_copy(
            update={"name": "token", "partition": Tokens(), "select": None, "query": query}
        )
        by_best = last.model_copy(
            update={
                "partition": Blocks(size=sizes[-1], stride=sizes[-1]),
                "query": None,
                "score": Score(source="token", map="max"),
            }
        )
        return language.verify(found.model_copy(update={"levels": (each, by_best)}))

    name = f"HiP, {' > '.join(map(str, sizes))}"
    return Structure(name=name, look="HiP", size=sizes[-1], spec=spec, exact=exact, rows=4)


def hirouter(name: str, look: str, tree: Callable[[Group], Mapping[str, Tensor]]) -> Structure:
    """specs/hirouter.yaml with other budgets; nothing is forced.

    A node has any number of tokens: its share of the text is counted.
    """

    def spec(problem: Problem, width: float | None) -> Spec:
        last = Select(top_k=problem.kept)
        if width is None:
            return _shipped("hirouter", problem, [last])
        share = problem.kept * width / problem.tokens
        beams = [Select(beam=max(1, math.ceil(share * n))) for n in _nodes()]
        return _shipped("hirouter", problem, [*beams, last])

    return Structure(name=f"HiRouter, {name}", look=look, size=1, spec=spec, inputs=tree)


def _nodes() -> list[int]:
    """Nodes of each level of HiRouter's tree, from the top down."""
    found, count = [], 1
    for level in language.load("hirouter").levels:
        if isinstance(level.partition, LearnedTree):
            count *= level.partition.branching
            found.append(count)
    return found


# HiRouter's trees -----------------------------------------------------------------------------------


def random_tree(group: Group) -> dict[str, Tensor]:
    """Directions that know nothing of the keys: what a tree is worth is measured against them."""
    drawn = torch.Generator().manual_seed(SEED)
    dim = group.k.shape[-1]
    return _centroids([torch.randn(n, dim, generator=drawn) for n in _nodes()])


def means_tree(group: Group) -> dict[str, Tensor]:
    """Centroids by k-means of the keys' directions, and by k-means of each node's own below it."""
    drawn = torch.Generator().manual_seed(SEED)
    keys = F.normalize(group.k.float(), dim=-1)
    node, count = torch.zeros(len(keys), dtype=torch.long), 1
    levels: list[Tensor] = []
    for n in _nodes():
        own = [_means(keys[node == parent], n // count, drawn) for parent in range(count)]
        levels.append(torch.cat(own))
        parent = torch.arange(n) // (n // count)
        alike = (keys @ levels[-1].T).masked_fill(parent != node[:, None], -torch.inf)
        node, count = alike.argmax(-1), n
    return _centroids(levels)


def _means(keys: Tensor, n: int, drawn: torch.Generator) -> Tensor:
    """Spherical k-means from `n` keys, or random directions where there are fewer.  -> [n, D]"""
    start = keys[torch.randperm(len(keys), generator=drawn)[:n]]
    more = torch.randn(n - len(start), keys.shape[-1], generator=drawn)
    means = torch.cat((start, F.normalize(more, dim=-1)))
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(means).index_add(0, (keys @ means.T).argmax(-1), keys)
        means = torch.where(sums.any(-1, keepdim=True), F.normalize(sums, dim=-1), means)
    return means


def trained_tree(group: Group) -> dict[str, Tensor]:
    """The k-means tree after some steps on the spec's own loss, on the same keys and queries."""
    problem = Problem(heads=group.q.shape[1], dim=group.q.shape[-1], tokens=len(group.k), kept=1)
    levels = [Select(beam=1) for _ in _nodes()]
    spec = _shipped("hirouter", problem, [*levels, Select(top_k=1)])
    tree = {name: x.requires_grad_() for name, x in means_tree(group).items()}
    adam = torch.optim.Adam(tree.values(), lr=RATE)
    drawn = torch.Generator().manual_seed(SEED)
    for _ in range(STEPS):
        at = torch.randint(len(group.k), (BATCH,), generator=drawn)
        x = {"q": group.q[None, at], "k": group.k[None, at, None], "v": group.v[None, at, None]}
        loss = reference(spec, {**x, **tree}, dtype=torch.float32, keep_scores=False).loss
        adam.zero_grad()
        loss["dual_entropy"].backward()
        adam.step()
    return {name: x.detach() for name, x in tree.items()}


def _centroids(levels: Sequence[Tensor]) -> dict[str, Tensor]:
    """As the spec's inputs, for the one key head."""
    names = [x.name for x in language.load("hirouter").levels]
    return {f"{name}_centroids": x[None] for name, x in zip(names, levels, strict=False)}


# What is measured; those of one panel of blocks choose the same entries.
PANELS = {
    "blocks of 16": (
        chain(64, 16, look="below 64"),
        chain(256, 64, 16, look="below 256 > 64"),
        chain(256, 128, 64, 32, 16, look="with more levels between"),
    ),
    "tokens": (
        chain(64, 1, look="below 64"),
        chain(256, 64, 1, look="below 256 > 64"),
        chain(256, 64, 16, 1, look="with more levels between"),
    ),
    "trees": (
        hip(),
        hirouter("trained", "HiRouter, trained tree", trained_tree),
        hirouter("k-means", "HiRouter, k-means tree", means_tree),
        hirouter("random", "HiRouter, random tree", random_tree),
    ),
}
