"""What a spec's values must be to each other: each rule yields the problems it sees.

Knows nothing of text.  What no kernel can do yet is no rule: that is for the planner to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hsgen.errors import nearest
from hsgen.spec.model import (
    SELECT_RULES,
    Blocks,
    Level,
    Path,
    Score,
    Select,
    Spec,
    Static,
    Tokens,
)

_COARSENESS = {"all": 0, "group": 1, "head": 2}
# arguments of a kernel's call; `kv: new` would make another k_new
_ARGUMENTS = {
    **dict.fromkeys(("q", "k", "v"), "the query, keys and values"),
    **dict.fromkeys(("q_index", "k_index", "v_index", "w_index"), "the index"),
    **dict.fromkeys(("k_new", "v_new"), "new tokens of a decode step"),
    **dict.fromkeys(("k_pages", "v_pages"), "the pages of a cache"),
    "gates": "the gates",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One rule broken.  `path` is the culprit, `also` what else the judgement rests on."""

    code: str
    path: Path
    message: str
    help: str
    also: tuple[Path, ...] = ()
    at_key: bool = False  # it is the key that is wrong, whatever its value


Rule = Callable[[Spec], Iterator[Problem]]


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


def _either(one: object) -> str:
    """Of two keys that exclude each other, which there are: all, or none."""
    return "neither" if one is None else "both"


# Names --------------------------------------------------------------------------------------------


def _unique_names(spec: Spec) -> Iterator[Problem]:
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


def _references(spec: Spec) -> Iterator[Problem]:
    names = [level.name for level in spec.levels]
    for i, level in enumerate(spec.levels):
        for key, path, target in (
            ("from", ("levels", i, "score", "source"), level.score.source),
            ("within", ("levels", i, "within"), level.within),
            ("lse_from", ("levels", i, "score", "lse_from"), level.score.lse_from),
        ):
            if target is None:
                continue
            if target not in names:
                yield _unknown_level(target, names, path, spec)
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
    for i, branch in enumerate(spec.attend):
        if branch.over is not None and branch.over not in names:
            yield _unknown_level(branch.over, names, ("attend", i, "over"), spec)


def _unknown_level(target: str, names: list[str], path: Path, spec: Spec) -> Problem:
    close = nearest(target, names)
    levels = f"levels: {', '.join(names)}" if names else "this spec has no levels"
    return Problem(
        code="HS054",
        path=path,
        message=f"unknown level '{target}'",
        help=f"did you mean '{close}'? {levels}" if close else levels,
        also=_names(spec),
    )


def _names(spec: Spec) -> tuple[Path, ...]:
    """All that a judgement about names rests on; -1: there is a list of levels at all."""
    return tuple(("levels", i, "name") for i in range(-1, len(spec.levels)))


_NAMING: tuple[Path, ...] = (("within",), ("score", "source"), ("score", "lse_from"))


def _uses(spec: Spec) -> tuple[Path, ...]:
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


def _tensor_names(spec: Spec) -> Iterator[Problem]:
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
                for letter, noun in (("k", "keys"), ("v", "values")):
                    yield (field, i, "kv"), f"{letter}_{item.kv}", f"the {noun} of 'kv: {item.kv}'"
    for i, level in enumerate(spec.levels):
        for name in _learned(level):
            yield ("levels", i, "name"), name, f"a weight of the level '{level.name}'"


def _learned(level: Level) -> Iterator[str]:
    pool = level.pool
    for which, how in (("key", pool and pool.keys), ("value", pool and pool.values)):
        if how == "linear":
            yield f"{level.name}_{which}_weight"
            yield f"{level.name}_{which}_position"


# Heads, partitions, pools -------------------------------------------------------------------------


def _heads(spec: Spec) -> Iterator[Problem]:
    heads = spec.heads
    if heads and heads.query % heads.kv:
        close = max(1, round(heads.query / heads.kv)) * heads.kv
        yield Problem(
            code="HS050",
            path=("heads", "query"),
            message=f"expected a multiple of the kv heads, {heads.kv}, got {heads.query}",
            help=f"write 'query: {close}'",
            also=(("heads", "kv"),),
        )


def _partitions(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        blocks = level.partition
        if blocks.stride > blocks.size:
            yield Problem(
                code="HS080",
                path=("levels", i, "partition", "stride"),
                message=f"expected a stride of at most the block's size, {blocks.size},"
                f" got {blocks.stride}: tokens between blocks would be in none",
                help=f"write 'stride: {blocks.size}', or leave it out",
                also=(("levels", i, "partition", "size"),),
            )


def _pools(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        here: Path = ("levels", i)
        pool, score = level.pool, level.score
        has_keys = pool is not None and pool.keys is not None
        if isinstance(level.partition, Blocks) and score.form and not (has_keys or score.source):
            yield Problem(
                code="HS063",
                path=(*here, "score", "form"),
                message=f"expected pooled keys that form '{score.form}' scores, got none",
                help="write 'pool: {keys: mean}' in this level",
                also=((*here, "pool", "keys"), (*here, "partition")),
            )
        elif (
            pool is not None
            and score.form
            and has_keys
            and (score.form == "bound") != (pool.keys == "minmax")
        ):
            yield _bound_without_minmax(i, pool.keys, score.form)
        if pool is not None:
            yield from _pool(spec, i, level)


def _bound_without_minmax(i: int, keys: str | None, form: str) -> Problem:
    """The two bounds of an entry and the score that reads them come together."""
    wanted, got = ("minmax", keys) if form == "bound" else ("one vector an entry", "minmax")
    return Problem(
        code="HS090",
        path=("levels", i, "pool", "keys"),
        message=f"expected {wanted} for form '{form}', got {got}",
        help="write 'keys: minmax'" if form == "bound" else "write 'keys: mean', or 'form: bound'",
        also=(("levels", i, "score", "form"),),
    )


def _pool(spec: Spec, i: int, level: Level) -> Iterator[Problem]:
    """A pool that nothing needs, or that lacks what it needs itself."""
    assert level.pool is not None
    path: Path = ("levels", i, "pool")
    pool = level.pool
    pooled = [b for b in spec.attend if b.over == level.name and b.values == "pooled"]
    where, why = path, ""
    if isinstance(level.partition, Tokens):
        why = "a token is an entry of its own"
    elif pool.keys is None and pool.values is None:
        why = "it pools neither keys nor values"
    elif pool.values is not None and level.score.form == "relu_weighted":
        why, where = "an index has no values", (*path, "values")
    elif pool.values is not None and not pooled:
        why, where = (
            f"no branch attends 'over: {level.name}' with 'values: pooled'",
            (*path, "values"),
        )
    elif pool.keys is not None and level.score.source and not pooled:
        why, where = "this level's scores are mapped, not computed from keys", (*path, "keys")
    if why:
        yield Problem(
            code="HS064",
            path=where,
            message=f"'{where[-1]}' has no use here: {why}",
            help=f"remove '{where[-1]}'",
            also=((*path, "keys"), (*path, "values"), (*path[:2], "partition"), *_uses(spec)),
            at_key=True,
        )
    if pool.position and "linear" not in (pool.keys, pool.values):
        yield Problem(
            code="HS065",
            path=(*path, "position"),
            message="expected 'position' with linear pooling only, got it without",
            help="remove 'position', or write 'keys: linear'",
            also=((*path, "keys"), (*path, "values")),
            at_key=True,
        )


# Scores -------------------------------------------------------------------------------------------


def _scores(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        path: Path = ("levels", i, "score")
        score = level.score
        form, source = (*path, "form"), (*path, "source")
        if (score.form is None) == (score.source is None):
            yield Problem(
                code="HS056",
                path=path if score.form is None else source,
                message=f"expected 'form' or 'from' in 'score', got {_either(score.form)}",
                help="write 'form: dot' to score keys, or 'from: LEVEL' with 'map'",
                also=(form, source),
                at_key=True,
            )
        elif score.source is not None:
            yield from _mapped(score, path)
        elif score.form == "relu_weighted":
            yield from _relu_weighted(spec, score, path)
        else:
            yield from _shared(score, path)
        if score.map is not None and score.source is None:
            yield Problem(
                code="HS057",
                path=(*path, "map"),
                message="expected 'map' with 'from' only, got it without",
                help="remove 'map', or write 'from: LEVEL'",
                also=(source,),
                at_key=True,
            )


def _mapped(score: Score, path: Path) -> Iterator[Problem]:
    if score.map is None:
        yield Problem(
            code="HS057",
            path=(*path, "source"),
            message="expected 'map' with 'from', got none",
            help="write 'map: overlap_sum', 'map: overlap_max', 'map: sum' or 'map: max'",
            also=((*path, "map"),),
        )
    for key in ("scale", "normalise", "lse_from", "share", "reduce"):
        if key in score.model_fields_set and getattr(score, key) is not None:
            yield Problem(
                code="HS059",
                path=(*path, key),
                message=f"'{key}' has no meaning with 'from': it is that of '{score.source}'",
                help=f"remove '{key}'; write it in '{score.source}'",
                also=((*path, "source"), (*path, "form")),
                at_key=True,
            )


def _shared(score: Score, path: Path) -> Iterator[Problem]:
    """Heads that score for themselves, and agree or do not."""
    also = ((*path, "share"), (*path, "reduce"))
    if score.share == "head" and score.reduce is not None:
        yield Problem(
            code="HS060",
            path=(*path, "reduce"),
            message="expected 'reduce' where heads share a selection, got 'share: head'",
            help="remove 'reduce', or write 'share: group'",
            also=also,
            at_key=True,
        )
    if score.share != "head" and score.reduce is None:
        yield Problem(
            code="HS060",
            path=(*path, "share"),
            message=f"expected 'reduce' with 'share: {score.share}', got none",
            help=f"write '{{form: {score.form}, share: {score.share}, reduce: sum}}'",
            also=also,
        )


def _relu_weighted(spec: Spec, score: Score, path: Path) -> Iterator[Problem]:
    if spec.index is None:
        yield Problem(
            code="HS061",
            path=(*path, "form"),
            message="expected 'index' in the spec for form 'relu_weighted', got none",
            help="write 'index: {heads: 64, dim: 128}' at the top",
            also=(("index",),),
        )
    if score.share != "all":
        yield Problem(
            code="HS062",
            path=(*path, "share") if "share" in score.model_fields_set else (*path, "form"),
            message=f"expected 'share: all' with form 'relu_weighted', got '{score.share}'",
            help="write '{form: relu_weighted, share: all}': the index heads are one score",
            also=((*path, "share"),),
        )
    if score.reduce is not None:
        yield Problem(
            code="HS062",
            path=(*path, "reduce"),
            message="'reduce' has no meaning with form 'relu_weighted', which sums its own heads",
            help="remove 'reduce'",
            at_key=True,
        )


def _borrowed_sums(spec: Spec) -> Iterator[Problem]:
    """Whether a log-sum-exp taken from another level is used, and is one sum a head."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        score, path = level.score, ("levels", i, "score", "lse_from")
        if score.lse_from is None or score.source is not None:
            continue
        if score.normalise is None:
            yield Problem(
                code="HS091",
                path=path,
                message="expected 'lse_from' with 'normalise' only, got it without",
                help="write 'normalise: softmax', or remove 'lse_from'",
                also=(("levels", i, "score", "normalise"),),
                at_key=True,
            )
        elif score.lse_from in levels:
            j, source = levels[score.lse_from]
            wrong = _no_sum(level, source)
            if wrong:
                yield Problem(
                    code="HS091",
                    path=path,
                    message=f"expected a level that every query head scores, got '{source.name}': "
                    + wrong,
                    help="name a level with 'form: dot', or remove 'lse_from'",
                    also=(("levels", i, "score", "form"), ("levels", j, "score"), ("levels", j)),
                )


def _no_sum(level: Level, source: Level) -> str | None:
    """Why the scores of `source` have no log-sum-exp for `level`."""
    if source.score.source is not None:
        return "its scores are mapped"
    if source.within is not None:
        return f"its scores exist only for children of '{source.within}'"
    if "relu_weighted" in (source.score.form, level.score.form):
        return "the heads of an index are one score"
    return None


def _maps(spec: Spec) -> Iterator[Problem]:
    """Whether the entries of the two levels lie so to each other that the map is defined."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        score = level.score
        if score.map is None or score.source not in levels:
            continue
        j, source = levels[score.source]
        wrong = _map_problem(score.map, source, level)
        if wrong:
            yield Problem(
                code="HS058",
                path=("levels", i, "score", "map"),
                message=f"'map: {score.map}' from '{source.name}': {wrong[0]}",
                help=wrong[1],
                also=(
                    ("levels", i, "score", "source"),
                    ("levels", i, "partition"),
                    ("levels", j, "partition"),
                    ("levels", j, "within"),
                ),
            )


def _map_problem(how: str, source: Level, target: Level) -> tuple[str, str] | None:
    """Expected and got; and what to type."""
    s, t = source.partition, target.partition
    if source.within is not None:
        got = f"its scores exist only for children of '{source.within}'"
        return (
            f"expected scores of every entry, got '{source.name}': {got}",
            "name a level without 'within'",
        )
    if t.stride != t.size:
        return (
            f"expected blocks without overlap, got stride {t.stride}",
            f"write '{{blocks: {t.size}}}'",
        )
    if t.size % s.stride:
        nearer = max(1, round(t.size / s.stride)) * s.stride
        expected = f"expected blocks of a multiple of its stride, {s.stride}, got {t.size}"
        return expected, f"write '{{blocks: {nearer}}}'"
    if how == "overlap_sum" and s.size % s.stride:
        expected = f"expected '{source.name}' to have a size that is a multiple of its stride"
        return (
            f"{expected}, {s.stride}, got {s.size}",
            f"write 'map: max', or another stride in '{source.name}'",
        )
    if how in ("sum", "max") and s.size > t.size:
        expected = f"expected blocks of at least its size, {s.size}, got {t.size}"
        return expected, f"write '{{blocks: {s.size}}}', or 'map: overlap_{how}'"
    return None


# Selections ---------------------------------------------------------------------------------------


def _nesting(spec: Spec) -> Iterator[Problem]:
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        if level.within not in levels:
            continue
        j, parent = levels[level.within]
        rests = (("levels", i, "partition"), ("levels", j, "partition"), ("levels", j, "select"))
        wrong = _nesting_problem(spec, parent, level)
        if wrong:
            code, message, help = wrong
            shares = (("levels", i, "score"), ("levels", j, "score"))
            also = (*rests, *shares) if code == "HS083" else rests
            yield Problem(
                code=code, path=("levels", i, "within"), message=message, help=help, also=also
            )


def _nesting_problem(spec: Spec, parent: Level, child: Level) -> tuple[str, str, str] | None:
    """Code, message and help."""
    p, c = parent.partition, child.partition
    if parent.select is None or parent.select.beam is None:
        got = _kept(parent)
        expected = (
            f"expected '{parent.name}' to have a beam, whose entries are expanded here, got {got}"
        )
        return "HS066", expected, f"write 'select: {{beam: 64}}' in '{parent.name}'"
    for level in (parent, child):
        blocks = level.partition
        if blocks.size != blocks.stride:
            expected = (
                f"expected levels without overlap, got '{level.name}' with stride {blocks.stride}"
            )
            return "HS067", expected, f"write '{{blocks: {blocks.size}}}' in '{level.name}'"
    if p.size % c.size:
        expected = f"expected blocks that divide those of '{parent.name}', {p.size}, got {c.size}"
        nearer = min(
            (n for n in range(1, min(p.size, 4096) + 1) if p.size % n == 0),
            key=lambda n: abs(n - c.size),
        )
        return "HS067", expected, f"write '{{blocks: {nearer}}}'"
    shares = [_share(spec, level) for level in (parent, child)]
    if _COARSENESS[shares[0]] > _COARSENESS[shares[1]]:
        expected = f"expected '{parent.name}' to be shared by all heads that share '{child.name}'"
        got = f"got 'share: {shares[0]}' there and 'share: {shares[1]}' here"
        return "HS083", f"{expected}, {got}", f"write 'share: {shares[1]}' in '{parent.name}'"
    return None


def _share(spec: Spec, level: Level) -> str:
    """Who agrees on a level's scores, its own or those that it takes over."""
    levels = {other.name: other for other in spec.levels}
    for _ in spec.levels:  # a chain of `from` is no longer than that
        if level.score.source not in levels:
            break
        level = levels[level.score.source]
    return "all" if level.score.form == "relu_weighted" else level.score.share


def _selects(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        select = level.select
        if select is None:
            continue
        path: Path = ("levels", i, "select")
        if len(select.rules) != 1:
            got = " and ".join(select.rules) or "none"
            yield Problem(
                code="HS070",
                path=path,
                message=f"expected one of {', '.join(SELECT_RULES)} in 'select', got {got}",
                help="write 'top_k: 16' for what is attended, 'beam: 64' for what is expanded",
                also=_select_keys(path),
            )
            continue
        yield from _forced(select, path)
        yield from _top_p(spec, i, level, path)
        yield from _select_use(spec, level, path)


def _select_keys(path: Path) -> tuple[Path, ...]:
    return tuple((*path, rule) for rule in SELECT_RULES)


def _kept(level: Level) -> str:
    """How a level selects, for the end of a message."""
    return f"a {level.select.rules[0]}" if level.select and level.select.rules else "no select"


def _forced(select: Select, path: Path) -> Iterator[Problem]:
    """More forced entries than there is room for."""
    forced = select.force.first + select.force.last
    keys: tuple[Path, ...] = ((*path, "top_k"), (*path, "beam"))
    key, most = ("top_k" if select.top_k else "beam"), select.budget
    if select.top_p is not None:
        key, most, keys = "max", select.top_p.max or forced, ((*path, "top_p", "max"),)
    if select.force.counted and forced > most > 0:
        yield Problem(
            code="HS071",
            path=(*path, "force"),
            message=f"expected at most {key} = {most} forced entries, got"
            f" first {select.force.first} + last {select.force.last} = {forced}",
            help=f"write '{key}: {forced}', or 'counted: false' to select them on top",
            also=keys,
        )


def _top_p(spec: Spec, i: int, level: Level, path: Path) -> Iterator[Problem]:
    """Masses that are none, and bounds that exclude each other."""
    top_p = level.select and level.select.top_p
    if not top_p:
        return
    if top_p.max is not None and top_p.min > top_p.max:
        yield Problem(
            code="HS100",
            path=(*path, "top_p", "min"),
            message=f"expected at most max = {top_p.max} entries, got min {top_p.min}",
            help=f"write 'max: {top_p.min}', or leave one of the two out",
            also=((*path, "top_p", "max"),),
        )
    j = _scored_by(spec, i)
    if spec.levels[j].score.normalise is None:
        name = spec.levels[j].name
        yield Problem(
            code="HS101",
            path=(*path, "top_p"),
            message=f"expected masses for 'top_p', got scores of '{name}' that are not normalised",
            help=f"write 'normalise: softmax' in the score of '{name}', or 'fraction: 0.1' here",
            also=(
                *(("levels", at, "score", key) for at in {i, j} for key in ("source", "form")),
                ("levels", j, "score", "normalise"),
            ),
        )


def _scored_by(spec: Spec, i: int) -> int:
    """The level whose scores a level selects by: itself, or the one that it takes them from."""
    names = [level.name for level in spec.levels]
    for _ in names:  # a chain of `from` is no longer than that
        source = spec.levels[i].score.source
        if source not in names:
            break
        i = names.index(source)
    return i


def _select_use(spec: Spec, level: Level, path: Path) -> Iterator[Problem]:
    """A selection that nothing attends or expands."""
    assert level.select is not None
    expanded = any(other.within == level.name for other in spec.levels)
    attended = any(b.over == level.name and b.values == "raw" for b in spec.attend)
    also = (*_uses(spec), *_select_keys(path))
    if level.select.beam is not None and not expanded and not attended:
        yield Problem(
            code="HS068",
            path=(*path, "beam"),
            message=f"expected a level within '{level.name}' that expands its beam, got none",
            help=f"write 'within: {level.name}' in a level below, or attend it with 'top_k'",
            also=also,
            at_key=True,
        )
    (rule,) = level.select.rules
    if rule != "beam" and not attended and not expanded:
        yield Problem(
            code="HS069",
            path=(*path, rule),
            message=f"expected a branch that attends the {rule} of '{level.name}', got none",
            help=f"write '{{name: selected, over: {level.name}}}' in 'attend'",
            also=also,
            at_key=True,
        )


# Branches -----------------------------------------------------------------------------------------


def _branches(spec: Spec) -> Iterator[Problem]:
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, branch in enumerate(spec.attend):
        path: Path = ("attend", i)
        keys = ("over", "window", "static")
        said = [key for key in keys if getattr(branch, key) is not None]
        also: tuple[Path, ...] = tuple((*path, key) for key in keys)
        if len(said) != 1:
            yield Problem(
                code="HS073",
                path=(*path, said[1]) if said else path,
                message="expected one of over, window, static in a branch, got"
                f" {' and '.join(said) or 'none'}",
                help="write 'over: LEVEL', 'window: 512' or 'static: {blocks: 64, window: 16}'",
                also=also,
                at_key=bool(said),
            )
        elif branch.over is None and branch.values == "pooled":
            yield Problem(
                code="HS082",
                path=(*path, "values"),
                message=f"expected 'values: pooled' with 'over' only, got it with '{said[0]}'",
                help="remove 'values'",
                also=also,
            )
        if branch.static is not None:
            yield from _static(spec, branch.static, (*path, "static"))
        if branch.over in levels:
            j, level = levels[branch.over]
            yield from _pooled(i, j, level) if branch.values == "pooled" else _raw(i, j, level)


def _static(spec: Spec, static: Static, path: Path) -> Iterator[Problem]:
    """A pattern of nothing, keys that need another one, and heads that it does not come out for."""
    rules = ("window", "sink", "stride", "power_of_two", "per_head")
    if not any(getattr(static, rule) for rule in rules):
        yield Problem(
            code="HS102",
            path=path,
            message=f"expected at least one of {', '.join(rules)} in 'static', got none",
            help="write 'static: {blocks: 64, window: 16}', or 'window: all' for every token",
            also=tuple((*path, rule) for rule in rules),
        )
    per_head = bool(static.per_head)
    for key, wrong, why, others in (
        ("shift", static.shift and not static.stride, "there is no 'stride'", ("stride",)),
        (
            "dilation",
            static.dilation > 1 and not (static.window or per_head),
            "there is no window",
            ("window", "per_head"),
        ),
        ("window", per_head and static.window, "'per_head' has windows of its own", ("per_head",)),
        ("sink", per_head and static.sink, "'per_head' has sinks of its own", ("per_head",)),
    ):
        if wrong:
            yield Problem(
                code="HS103",
                path=(*path, key),
                message=f"'{key}' has no meaning here: {why}",
                help=f"remove '{key}'",
                also=tuple((*path, other) for other in others),
                at_key=True,
            )
    if per_head and spec.heads and spec.heads.query % len(static.per_head):
        yield Problem(
            code="HS104",
            path=(*path, "per_head"),
            message=f"expected a number of heads that divides the query heads, {spec.heads.query},"
            f" got {len(static.per_head)}",
            help="write one entry for each query head, or a pattern that they repeat",
            also=(("heads",),),
        )


def _pooled(i: int, j: int, level: Level) -> Iterator[Problem]:
    pool = level.pool
    lacking = [key for key in ("keys", "values") if pool is None or getattr(pool, key) is None]
    if isinstance(level.partition, Tokens):
        wrong = "a token is not pooled"
        help = "remove 'values'"
    elif level.score.form == "relu_weighted":
        wrong = "its pooled keys are those of the index, which a query cannot attend"
        help = "attend a level with 'form: dot'"
    elif pool is not None and pool.keys == "minmax":
        wrong = "its pooled keys are bounds, which a query cannot attend"
        help = "attend a level with 'keys: mean'"
    elif lacking:
        wrong = f"its pool has no {' and no '.join(lacking)}"
        help = f"write 'pool: {{keys: mean, values: mean}}' in '{level.name}'"
    else:
        return
    yield Problem(
        code="HS074",
        path=("attend", i, "values"),
        message=f"expected a level with pooled keys and values, got '{level.name}': {wrong}",
        help=help,
        also=tuple(("levels", j, *rest) for rest in (("pool",), ("partition",), ("score", "form"))),
    )


def _raw(i: int, j: int, level: Level) -> Iterator[Problem]:
    if level.select is None or level.select.rules == ("beam",):
        got = "a beam, which is expanded and not attended" if level.select else "no select"
        yield Problem(
            code="HS075",
            path=("attend", i, "over"),
            message=f"expected a level with a top_k to attend, got '{level.name}' with {got}",
            help=f"write 'select: {{top_k: 16}}' in '{level.name}', or 'values: pooled' here",
            also=(("levels", j, "select"), ("attend", i, "values")),
        )


def _combines(spec: Spec) -> Iterator[Problem]:
    combine = spec.combine
    if combine is None:
        if len(spec.attend) > 1:
            yield Problem(
                code="HS076",
                path=("attend",),
                message=f"expected 'combine' with {len(spec.attend)} branches, got none",
                help="write 'combine: {gates: input}' or 'combine: {softmax: union}' at the top",
                also=(("combine",),),
            )
    elif (combine.gates is None) == (combine.softmax is None):
        yield Problem(
            code="HS077",
            path=("combine",),
            message=f"expected 'gates' or 'softmax' in 'combine', got {_either(combine.gates)}",
            help="write 'combine: {gates: input}' or 'combine: {softmax: union}'",
        )


def _named(level: Level) -> tuple[str | None, ...]:
    """The levels that a level names."""
    return level.within, level.score.source, level.score.lse_from


# What nothing uses --------------------------------------------------------------------------------


def _unused(spec: Spec) -> Iterator[Problem]:
    forms = {level.score.form for level in spec.levels}
    if spec.index is not None and "relu_weighted" not in forms:
        yield Problem(
            code="HS078",
            path=("index",),
            message="expected a level that scores with the index, got none",
            help="remove 'index', or write 'score: {form: relu_weighted, share: all}' in a level",
            also=tuple(("levels", i, "score", "form") for i in range(-1, len(spec.levels))),
            at_key=True,
        )
    used = {branch.over for branch in spec.attend}
    used |= {name for level in spec.levels for name in _named(level)}
    for i, level in enumerate(spec.levels):
        if level.name not in used and level.select is None:
            yield Problem(
                code="HS079",
                path=("levels", i, "name"),
                message=f"expected a branch or a level that uses '{level.name}', got none",
                help=f"write 'over: {level.name}' in 'attend', or remove the level",
                also=(*_uses(spec), ("levels", i, "select")),
            )


def _kvs(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        if level.kv is not None and level.score.form != "dot" and level.pool is None:
            yield _idle_kv(("levels", i), "this level neither scores nor pools keys")
        elif level.kv is not None and level.score.form == "relu_weighted":
            yield _idle_kv(("levels", i), "the index has keys of its own")
    for i, branch in enumerate(spec.attend):
        if branch.kv is not None and branch.values == "pooled":
            why = f"the pooled entries are those of the level '{branch.over}'"
            yield _idle_kv(("attend", i), why)


def _idle_kv(path: Path, why: str) -> Problem:
    return Problem(
        code="HS081",
        path=(*path, "kv"),
        message=f"'kv' has no use here: {why}",
        help="remove 'kv'",
        also=((*path, "score"), (*path, "pool"), (*path, "values")),
        at_key=True,
    )


_REFERENCES: tuple[Rule, ...] = (_unique_names, _references)
_RULES: tuple[Rule, ...] = (
    _heads,
    _tensor_names,
    _partitions,
    _pools,
    _scores,
    _borrowed_sums,
    _maps,
    _nesting,
    _selects,
    _branches,
    _combines,
    _unused,
    _kvs,
)
