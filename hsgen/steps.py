"""Steps behind a cache by kernels, and what they have to be: what a search of their tiles runs.

Knows programs, caches and tensors, and times nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsgen import drawn, passes, planner
from hsgen.cache import Cache, Shape
from hsgen.execution import Configs, Program
from hsgen.plan import Cached
from hsgen.reference import tensor_kinds
from hsgen.runtime import compile_program
from hsgen.spec import Spec
from hsgen.storage import storage_of
from hsgen.target import Target
from hsgen.trials import Examination, Trial, tensors_of

CHUNK = 1 << 29  # bytes of one tensor that are put into a cache at a time

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """A bound spec's steps behind a cache, and what fills one, for one GPU and dtype."""

    spec: Spec
    dtype: torch.dtype
    page: int
    few: Program
    many: Program

    @classmethod
    def of(
        cls, spec: Spec, target: Target, dtype: torch.dtype, page: int, *, interpret: bool
    ) -> Programs:
        """Compile both.

        Raises:
            PlanError: the spec has no cache, or no kernel decodes it.
        """
        few, many = (
            compile_program(
                spec, target, dtype, interpret=interpret, cached=Cached(rows=rows, page=page)
            )
            for rows in ("few", "many")
        )
        return cls(spec=spec, dtype=dtype, page=page, few=few, many=many)

    def append(
        self, cache: Cache, tensors: Mapping[str, Tensor | None], new_lens: Tensor | None
    ) -> None:
        """Put new tokens into a cache, however many."""
        given = {name: x for name, x in tensors.items() if x is not None}
        tokens = given[cache.storage.streams[0].name].shape[1]
        cache.reserve(tokens)
        new, where = cache.new(tokens, new_lens), cache.batch(tokens)
        driver, config = self.many.driver, self.many.config
        driver.append(given, cache.tensors, cache.lengths, new, where, config)  # type: ignore[attr-defined]

    def filled(self, tensors: Tensors, batch: int, capacity: int, tokens: int) -> Cache:
        """A cache that has the first so many tokens of some sequences, which it repeats where it has more."""
        graph = passes.run(planner.plan(self.spec))
        device = tensors["q"].device
        shape = Shape(
            batch=batch, capacity=capacity, dtype=self.dtype, device=device, page=self.page
        )
        cache = Cache(self.spec, storage_of(graph), shape, self)
        kinds, which = tensor_kinds(self.spec), torch.arange(batch, device=device)
        which %= len(tensors["q"])
        widest = max(stream.numbers for stream in cache.storage.streams)
        step = max(1, min(tokens, CHUNK // (batch * widest * self.dtype.itemsize)))
        for first in range(0, tokens, step):
            some = slice(first, min(first + step, tokens))
            self.append(
                cache,
                {n: x[which, some] if kinds[n] == "key" else x for n, x in tensors.items()},
                None,
            )
        return cache

    def run(
        self,
        config: Configs,
        cache: Cache,
        new: Tensors,
        selection: Tensors | None,
        *,
        lists: bool = True,
    ) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Put the tokens of a step into a cache, and attend.  -> o, log-sum-exps, what was chosen

        lists: Without, choices may be left out that cost more than what they are made of, as a step's caller
            has it who does not ask for them.
        """
        tokens = new["q"].shape[1]
        where, driver = cache.batch(tokens), self.few.driver
        counts = cache.new(tokens, None)
        driver.append(new, cache.tensors, cache.lengths, counts, where, config)  # type: ignore[attr-defined]
        asked = {} if lists or not self.few.rows_apart else {"rows": False}
        given = {**new, **cache.tensors}
        o, lse, chosen = driver.forward(given, where, config, selection, **asked)
        return o, lse, chosen


def new_tokens(spec: Spec, tensors: Tensors, ends: Tensor, tokens: int) -> Tensors:
    """What a step has of tensors with a row a token: the rows before the ends of sequences.

    tensors: Of those with a row a query the step's own.
    ends: i64[B].
    """
    kinds = tensor_kinds(spec)
    at = ends[:, None] - tokens + torch.arange(tokens, device=ends.device)
    which = torch.arange(len(ends), device=ends.device)[:, None] % len(tensors["q"])
    found: Tensors = {}
    for name, x in tensors.items():
        match kinds[name]:
            case "key":
                found[name] = x[which, at]
            case "parameter":
                found[name] = x
            case _:
                found[name] = x[which[:, 0]]
    return found


class StepExamination:
    """A trial whose rows are a step behind a cache, for many configurations, and what the reference says.

    The step before it puts tokens there too, so that rows see entries which a step completed.
    """

    def __init__(self, trial: Trial, programs: Programs, device: str = "cpu") -> None:
        self.trial, self._programs = trial, programs
        self._judge = Examination(trial, device)
        given = tensors_of(trial, device)
        self._brought = given.brought
        self._lengths = given.lengths["kv_lens"]
        self._tokens = trial.queries[0]
        batch, longest = len(trial.keys), trial.keys[0]
        self._cache = programs.filled(given.driver, batch, longest, longest)
        self._full = {name: x.clone() for name, x in self._cache.tensors.items()}
        ends = self._lengths.long()
        before = ends - self._tokens
        self._before = new_tokens(trial.spec, given.driver, before, self._tokens)
        self._new = new_tokens(trial.spec, given.driver, ends, self._tokens)

    def problems(self, config: Configs) -> list[str]:
        """Run the kernels.  -> what is wrong, nothing if all is well"""
        for name, x in self._full.items():  # whatever another configuration has put there
            self._cache.tensors[name].copy_(x)
        self._cache.lengths.copy_(self._lengths - 2 * self._tokens)
        self._programs.run(config, self._cache, self._before, self._brought)
        o, lse, chosen = self._programs.run(config, self._cache, self._new, self._brought)
        return self._judge.wrong(o, lse, chosen, self._programs.few.plan)


class Steps:
    """Caches of one size, all alike, and the same step behind each; what one holds is in none's way.

    Attributes:
        caches: so many that none is near when it comes again.
        new: what the step brings.
    """

    def __init__(
        self,
        programs: Programs,
        sets: list[Tensors],
        sizes: tuple[int, int, int],
        generator: torch.Generator,
    ) -> None:
        """`sets`: tensors of some sequences, a cache of each; `sizes`: sequences, capacity, tokens there."""
        self._programs = programs
        batch, capacity, there = sizes
        spec, tokens = programs.spec, sets[0]["q"].shape[1]
        self.caches = [programs.filled(each, batch, capacity, there) for each in sets]
        ends = torch.full((batch,), there + tokens, device=sets[0]["q"].device)
        self.new = [new_tokens(spec, each, ends, tokens) for each in sets]
        lists = drawn.lists(spec, batch, tokens, there + tokens, generator)
        self.selection = lists or None
        self._there = self.caches[0].lengths.clone()

    def rewind(self) -> None:
        """Take back what steps have put into the caches."""
        for cache in self.caches:
            cache.lengths.copy_(self._there)

    def __call__(self, config: Configs) -> None:
        """One step behind each cache."""
        for cache, new in zip(self.caches, self.new, strict=True):
            self._programs.run(config, cache, new, self.selection, lists=False)

    def first(
        self, config: Configs, selection: Tensors | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """o and the choice of a step behind the first cache, whose choice may be given."""
        self.rewind()
        given = selection or self.selection
        o, _, chosen = self._programs.run(config, self.caches[0], self.new[0], given)
        return o, chosen
