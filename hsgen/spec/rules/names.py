"""Names: unique, known, earlier, and no tensor under two of them."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.errors import nearest
from hsgen.spec.model import LearnedTree, Level, Path, Ragged, Spec
from hsgen.spec.rules.problem import Problem

# arguments of a kernel's call; `kv: new` would make another k_new
_ARGUMENTS = {
    **dict.fromkeys(("q", "k", "v"), "the query, keys and values"),
    **dict.fromkeys(("q_index", "k_index", "v_index", "w_index"), "the index"),
    **dict.fromkeys(("k_new", "v_new"), "new tokens of a decode step"),
    **dict.fromkeys(("k_pages", "v_pages"), "the pages of a cache"),
    "gates": "the gates",
    "output_gate": "the gate of the output",
    **dict.fromkeys(("z", "z_index"), "the gates of a pool"),
    "sink": "the sink of the union",
    **dict.fromkeys(("layer", "route"), "the route"),
    "bias": "the bias",
}


def unique_names(spec: Spec) -> Iterator[Problem]:
    for field, items in (("levels", spec.levels), ("attend", spec.attend)):
        seen: set[str] = set()
        for i, item in enumerate(items):
            if item.name in seen:
                yield Problem(
                    code="HS052",
                    path=(field, i, "name"),
                    message=f"duplicate name '{item.name}' in '{field}'",
                    help=f"write another name, as '{_free(item.name, seen)}'",
                )
            seen.add(item.name)


def _free(name: str, taken: set[str]) -> str:
    tries = (f"{name[:44]}_{i}" for i in range(2, 1000))
    return next(option for option in tries if option not in taken)


def references(spec: Spec) -> Iterator[Problem]:
    names = [level.name for level in spec.levels]
    branches = [branch.name for branch in spec.attend]
    for i, level in enumerate(spec.levels):
        for key, path, target in (
            ("from", ("levels", i, "score", "source"), level.score.source),
            ("within", ("levels", i, "within"), level.within),
            ("lse_from", ("levels", i, "score", "lse_from"), level.score.lse_from),
            ("from", ("levels", i, "select", "force", "level"), _forced_by(level)),
            ("budget_from", ("levels", i, "select", "budget_from"), _counted_by(level)),
        ):
            if target is None:
                continue
            if key == "lse_from" and target not in names:
                if target not in branches:
                    yield _unknown_sum(target, [*names, *branches], path, spec)
            elif target not in names:
                yield unknown_level(target, names, path, spec)
            elif names.index(target) >= i:
                yield Problem(
                    code="HS055",
                    path=path,
                    message=f"expected '{key}' to name an earlier level, got '{target}'"
                    + (" itself" if target == level.name else ", which comes later"),
                    help=f"move the level '{target}' before '{level.name}'"
                    if target != level.name
                    else f"write the name of a level above '{level.name}'",
                    also=_names(spec),
                )
    for path, target in _named_later(spec):
        if target is not None and target not in names:
            yield unknown_level(target, names, path, spec)


def _named_later(spec: Spec) -> Iterator[tuple[Path, str | None]]:
    """Levels that are named from outside of `levels`."""
    for i, branch in enumerate(spec.attend):
        yield ("attend", i, "over"), branch.over
    for i, reuse in enumerate(spec.reuse):
        yield ("reuse", i, "level"), reuse.level
    if spec.loss and spec.loss.dual_entropy:
        yield ("loss", "dual_entropy", "tree"), spec.loss.dual_entropy.tree
    if spec.loss and spec.loss.kl:
        yield ("loss", "kl", "level"), spec.loss.kl.level


def _forced_by(level: Level) -> str | None:
    return level.select and level.select.force.level


def _counted_by(level: Level) -> str | None:
    return level.select and level.select.budget_from


def unknown_level(target: str, names: list[str], path: Path, spec: Spec) -> Problem:
    close = nearest(target, names)
    levels = f"levels: {', '.join(names)}" if names else "this spec has no levels"
    return Problem(
        code="HS054",
        path=path,
        message=f"unknown level '{target}'",
        help=f"did you mean '{close}'? {levels}" if close else levels,
        also=_names(spec),
    )


def _unknown_sum(target: str, names: list[str], path: Path, spec: Spec) -> Problem:
    close = nearest(target, names)
    listed = f"levels and branches: {', '.join(names)}"
    return Problem(
        code="HS054",
        path=path,
        message=f"unknown level or branch '{target}'",
        help=f"did you mean '{close}'? {listed}" if close else listed,
        also=(*_names(spec), *(("attend", i, "name") for i in range(-1, len(spec.attend)))),
    )


def _of_q(level: Level) -> str:
    heads = ", one a group" if level.one_query_a_group else ""
    return f"the queries of 'q: {level.q}'{heads}"


def _names(spec: Spec) -> tuple[Path, ...]:
    """All that a judgement about names rests on; -1: there is a list of levels at all."""
    return tuple(("levels", i, "name") for i in range(-1, len(spec.levels)))


_NAMING: tuple[Path, ...] = (
    ("within",),
    ("score", "source"),
    ("score", "lse_from"),
    ("select", "force", "level"),
    ("select", "budget_from"),
)


def uses(spec: Spec) -> tuple[Path, ...]:
    """All that a judgement about what is unused rests on."""
    levels = range(-1, len(spec.levels))
    branches = range(-1, len(spec.attend))
    return (
        *_names(spec),
        *(("levels", i, *field) for i in levels for field in _NAMING),
        *(
            ("attend", i, field)
            for i in branches
            for field in ("over", "window", "static", "values")
        ),
    )


def tensor_names(spec: Spec) -> Iterator[Problem]:
    """Two tensors of the call under one name."""
    taken = dict(_ARGUMENTS)
    seen: set[Path] = set()
    for path, name, what in _tensors(spec):
        if taken.setdefault(name, what) != what and path not in seen:
            seen.add(path)
            yield Problem(
                code="HS053",
                path=path,
                message=f"{what} would be the argument '{name}', which is {taken[name]}",
                help="write another name",
                also=_names(spec),
            )


def _tensors(spec: Spec) -> Iterator[tuple[Path, str, str]]:
    """Field that names it, name and meaning of each tensor whose name the spec makes."""
    for field, items in (("levels", spec.levels), ("attend", spec.attend)):
        for i, item in enumerate(items):
            if item.kv is not None:
                for letter, noun in (("k", "keys"), ("v", "values"), ("z", "gates")):
                    yield (field, i, "kv"), f"{letter}_{item.kv}", f"the {noun} of 'kv: {item.kv}'"
    for i, level in enumerate(spec.levels):
        if level.q is not None:
            yield ("levels", i, "q"), f"q_{level.q}", _of_q(level)
    for i, level in enumerate(spec.levels):
        for name in _learned(level):
            yield ("levels", i, "name"), name, f"a weight of the level '{level.name}'"
    for i, branch in enumerate(spec.attend):
        if branch.sink is not None:
            yield ("attend", i, "name"), f"{branch.name}_sink", f"the sink of '{branch.name}'"


def _learned(level: Level) -> Iterator[str]:
    if level.score.form == "code_match":
        yield f"{level.name}_codebook"
    if level.score.form == "given":
        yield f"{level.name}_score"
    if level.select and level.select.apart:
        yield f"{level.name}_split"
    pool = level.pool
    for which, how in (("key", pool and pool.keys), ("value", pool and pool.values)):
        if how in ("linear", "mlp", "max_min_mean"):
            yield f"{level.name}_{which}_weight"
        if how == "mlp":
            yield f"{level.name}_{which}_out"
        if how in ("linear", "mlp", "gated"):
            yield f"{level.name}_{which}_position"
    if pool and pool.then:
        yield f"{level.name}_key_norm"
    if pool and pool.rotate and pool.rotate.base is None:
        yield from (f"cos_{level.name}", f"sin_{level.name}")
    if isinstance(level.partition, LearnedTree):
        yield f"{level.name}_centroids"
    if isinstance(level.partition, Ragged) and level.partition.boundaries == "given":
        yield f"{level.name}_starts"
