"""Scores: forms, sharing, borrowed sums and maps."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import (
    Clusters,
    LearnedTree,
    Level,
    Path,
    Ragged,
    Score,
    Spec,
    Stripes,
    Tokens,
)
from hsgen.spec.rules.problem import Problem, either
from hsgen.spec.rules.trees import named


def scores(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        path: Path = ("levels", i, "score")
        score = level.score
        form, source = (*path, "form"), (*path, "source")
        if (score.form is None) == (score.source is None):
            yield Problem(
                code="HS056",
                path=path if score.form is None else source,
                message=f"expected 'form' or 'from' in 'score', got {either(score.form)}",
                help="write 'form: dot' to score keys, or 'from: LEVEL' with 'map'",
                also=(form, source),
                at_key=True,
            )
        elif score.source is not None:
            yield from _mapped(score, path)
        elif score.by_index:
            yield from _by_index(spec, score, path)
        elif score.form == "given":
            continue  # `given_scores` says so
        elif score.form != "bias" or score.share == "all":
            yield from _shared(level, path)
        elif score.reduce is not None:
            yield Problem(
                code="HS062",
                path=(*path, "reduce"),
                message="'reduce' has no meaning with form 'bias': a group has one bias",
                help="remove 'reduce'",
                also=((*path, "share"),),
                at_key=True,
            )
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
            help="write 'map: overlap_sum', 'map: overlap_max', 'map: sum', 'map: max',"
            " 'map: around' or 'map: upsample'",
            also=((*path, "map"),),
        )
    for key in ("scale", "bias", "normalise", "lse_from", "share", "reduce"):
        if key in score.model_fields_set and getattr(score, key) is not None:
            yield Problem(
                code="HS059",
                path=(*path, key),
                message=f"'{key}' has no meaning with 'from': it is that of '{score.source}'",
                help=f"remove '{key}'; write it in '{score.source}'",
                also=((*path, "source"), (*path, "form")),
                at_key=True,
            )


def _shared(level: Level, path: Path) -> Iterator[Problem]:
    """Heads that score for themselves, and agree or do not; or whose queries are one before."""
    score = level.score
    one = bool(level.query and level.query.heads) or level.one_query_a_group
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
    if score.share != "head" and score.reduce is None and not one:
        yield Problem(
            code="HS060",
            path=(*path, "share"),
            message=f"expected 'reduce' with 'share: {score.share}', got none",
            help=f"write '{{form: {score.form}, share: {score.share}, reduce: sum}}'",
            also=also,
        )


def _by_index(spec: Spec, score: Score, path: Path) -> Iterator[Problem]:
    wanted, why = (
        ("group", "an index head chooses for a key head")
        if score.form == "index_dot"
        else ("all", "the index heads are one score")
    )
    fits = score.share == wanted or (score.sums_index and score.share == "group")
    if spec.index is None:
        yield Problem(
            code="HS061",
            path=(*path, "form"),
            message=f"expected 'index' in the spec for form '{score.form}', got none",
            help="write 'index: {heads: 64, dim: 128}' at the top",
            also=(("index",),),
        )
    elif score.form == "index_dot" and spec.heads and spec.index.heads != spec.heads.kv:
        yield Problem(
            code="HS092",
            path=("index", "heads"),
            message=f"expected an index head for each kv head, {spec.heads.kv}, with form"
            f" 'index_dot', got {spec.index.heads}",
            help=f"write 'heads: {spec.heads.kv}'",
            also=((*path, "form"), ("heads", "kv")),
        )
    elif score.sums_index and score.share == "group" and spec.heads:
        yield from _heads_in_groups(spec.index.heads, spec.heads.kv, path)
    if not fits:
        yield Problem(
            code="HS062",
            path=(*path, "share") if "share" in score.model_fields_set else (*path, "form"),
            message=f"expected 'share: {wanted}' with form '{score.form}', got '{score.share}'",
            help=f"write '{{form: {score.form}, share: {wanted}}}': {why}",
            also=((*path, "share"),),
        )
    if score.reduce is not None:
        yield Problem(
            code="HS062",
            path=(*path, "reduce"),
            message=f"'reduce' has no meaning with form '{score.form}': {why}",
            help="remove 'reduce'",
            at_key=True,
        )


def _heads_in_groups(heads: int, groups: int, path: Path) -> Iterator[Problem]:
    """Index heads that are summed inside a group are as many in each."""
    if heads % groups:
        close = max(1, round(heads / groups)) * groups
        yield Problem(
            code="HS173",
            path=("index", "heads"),
            message=f"expected a multiple of the kv heads, {groups}, whose groups sum index heads"
            f" of their own, got {heads}",
            help=f"write 'heads: {close}', or 'share: all' for one sum of all",
            also=((*path, "share"), (*path, "form"), ("heads", "kv")),
        )


def borrowed_sums(spec: Spec) -> Iterator[Problem]:
    """Whether a log-sum-exp taken from another level is used, and is one sum a head."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        score, path = level.score, ("levels", i, "score", "lse_from")
        if score.lse_from is None or score.source is not None:
            continue
        if score.normalise != "softmax":
            got = f"with 'normalise: {score.normalise}'" if score.normalise else "without"
            yield Problem(
                code="HS091",
                path=path,
                message=f"expected 'lse_from' with 'normalise: softmax' only, got it {got}",
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
    if source.score.by_index or level.score.by_index:
        return "the heads of an index are others"
    if source.one_query_a_group != level.one_query_a_group:
        return "one of the two has a query for each group"
    if "bias" in (source.score.form, level.score.form):
        return "it is key heads that have a bias"
    return None


def maps(spec: Spec) -> Iterator[Problem]:
    """Whether the entries of the two levels lie so to each other that the map is defined."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        score = level.score
        if score.map is None or score.source not in levels:
            continue
        j, source = levels[score.source]
        if isinstance(source.partition, Clusters) or isinstance(level.partition, Clusters):
            continue  # of no size; `orders` says so
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
    if how == "upsample":
        return _upsample_problem(source, target)
    odd = [level for level in (source, target) if isinstance(level.partition, _ODD)]
    if odd:
        return (
            f"expected levels of blocks or tokens, got '{odd[0].name}', {named(odd[0])}",
            "write 'map: upsample' for tokens of runs, or score this level with 'form: dot'",
        )
    if source.within is not None:
        got = f"its scores exist only for children of '{source.within}'"
        return (
            f"expected scores of every entry, got '{source.name}': {got}",
            "name a level without 'within'",
        )
    if s == t and how in ("sum", "max", "around"):
        return None  # the same entries, overlapping or not
    if how == "around":
        return f"expected the entries of '{source.name}', got others", "write its partition here"
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
    if how in ("sum", "max", "avg_pool") and s.size > t.size:
        expected = f"expected blocks of at least its size, {s.size}, got {t.size}"
        other = "upsample" if how == "avg_pool" else f"overlap_{how}"
        return expected, f"write '{{blocks: {s.size}}}', or 'map: {other}'"
    return None


def _upsample_problem(source: Level, target: Level) -> tuple[str, str] | None:
    """Every entry lies in one of the source."""
    s, t = source.partition, target.partition
    if source.within is not None:
        got = f"its scores exist only for children of '{source.within}'"
        return (
            f"expected scores of every entry, got '{source.name}': {got}",
            "remove 'within' there",
        )
    if isinstance(s, Ragged) and not isinstance(t, Tokens):
        return f"expected tokens of runs, got {named(target)}", "write 'partition: tokens'"
    odd = [x for x in (source, target) if isinstance(x.partition, LearnedTree | Stripes)]
    odd += [target] if isinstance(t, Ragged) else []
    if odd:
        expected = f"expected blocks, runs or tokens, got '{odd[0].name}', {named(odd[0])}"
        return expected, "score this level with 'form: dot'"
    for level in (source, target):
        if level.partition.size != level.partition.stride:
            got = f"'{level.name}' with stride {level.partition.stride}"
            return (
                f"expected blocks without overlap, got {got}",
                f"write '{{blocks: {level.partition.size}}}' in '{level.name}'",
            )
    if not isinstance(s, Ragged) and s.size % t.size:
        expected = f"expected blocks that divide those of '{source.name}', {s.size}, got {t.size}"
        return expected, f"write '{{blocks: {s.size}}}', or 'partition: tokens'"
    return None


_ODD = (Ragged, Stripes, LearnedTree)
