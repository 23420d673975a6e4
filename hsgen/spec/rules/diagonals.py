"""Diagonals: entries that are counted back from a row's own, so that no two rows have the same."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Diagonals, Level, Path, Spec
from hsgen.spec.rules.names import uses
from hsgen.spec.rules.problem import Problem


def diagonals(spec: Spec) -> Iterator[Problem]:
    """Where a row stands is all that says what its diagonals are."""
    for i, level in enumerate(spec.levels):
        if not isinstance(level.partition, Diagonals):
            continue
        path: Path = ("levels", i)
        for wrong, help, *keys in _wrong(spec, level):
            yield Problem(
                code="HS220",
                path=(*path, "partition"),
                message=f"expected {wrong}",
                help=help,
                also=(
                    ("causal",),
                    *((*path, key) for key in keys),
                    *((*path, "score", key) for key in ("form", "source")),
                    *uses(spec),
                ),
            )
            break
        yield from _scored(level, path)


def _wrong(spec: Spec, level: Level) -> Iterator[tuple[str, ...]]:
    """What 'diagonals' lack or cannot have, what to type, and where."""
    within = [x.name for x in spec.levels if x.within == level.name]
    force = level.select and level.select.force
    if not spec.causal:
        yield "'causal: true' with 'diagonals', which go back from a row, got false", "use blocks"
    if level.within or within:
        got = f"'{within[0] if within else level.name}', which nests in others"
        yield f"'diagonals' that nest in nothing, got {got}", "remove 'within'", "within"
    if level.permute is not None:
        yield "'diagonals' of keys as they stand, got 'permute'", "remove 'permute'", "permute"
    if level.query is not None and level.query.pool is not None:
        yield (
            "rows that score each for itself with 'diagonals', got pooled ones",
            "write 'reduce: sum' in 'query'",
            "query",
        )
    if force and (force.last or force.tail or force.sink):
        yield (
            "'force: {first: n}' with 'diagonals', whose first ones are next to the row, got others",
            "write 'first' alone",
            "select",
        )
    if level.select and (level.select.quota or level.select.early_stop):
        yield "no 'quota' and no 'early_stop' with 'diagonals', got one", "use 'top_k'", "select"
    if any(branch.over == level.name and branch.values == "pooled" for branch in spec.attend):
        yield "'values: raw' of 'diagonals', got pooled ones", "remove 'values: pooled'"
    if spec.loss and spec.loss.kl and spec.loss.kl.level == level.name:
        yield "a loss over entries that rows share, got one over 'diagonals'", "remove 'kl'"


def _scored(level: Level, path: Path) -> Iterator[Problem]:
    """Diagonals are scored token by token; blocks of them take the scores of single ones."""
    form, size = level.score.form, level.partition.size
    if form is not None and (form != "dot" or level.score.bias or size > 1):
        got = "'bias'" if form == "dot" and size == 1 else f"form '{form}'"
        what = "of size 1" if size == 1 else f"of size {size}"
        yield Problem(
            code="HS221",
            path=(*path, "score", "form"),
            message=f"expected form 'dot' for diagonals of size 1, and 'from' them for others,"
            f" got {got} for one {what}",
            help="write 'form: dot' in a level of '{diagonals: 1}', and 'from' it here"
            if size > 1
            else "write 'form: dot'",
            also=((*path, "partition"), (*path, "score", "bias")),
        )


def maps_of_diagonals(spec: Spec) -> Iterator[Problem]:
    """How far back an entry lies is no place: diagonals are mapped to diagonals only."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        if level.score.source not in levels:
            continue
        j, source = levels[level.score.source]
        kinds = [isinstance(x.partition, Diagonals) for x in (source, level)]
        if kinds[0] != kinds[1]:
            words = [source.partition.kind, level.partition.kind]
            yield Problem(
                code="HS222",
                path=("levels", i, "score", "source"),
                message=f"expected scores of diagonals for diagonals, and of others for others, got"
                f" those of {words[0]} in '{source.name}' for {words[1]}",
                help="write a level of '{diagonals: 1}' with 'form: dot', and name it here"
                if kinds[1]
                else f"name a level of blocks or tokens, not '{source.name}'",
                also=(("levels", i, "partition"), ("levels", j, "partition")),
            )
