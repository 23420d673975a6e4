"""Entries that stand for several tokens: tiers, walks, what is skipped, and logarithms of counts."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Attend, Blocks, EarlyStop, Level, Parts, Path, Spec, Tier
from hsgen.spec.rules.problem import Problem


def quotas(spec: Spec) -> Iterator[Problem]:
    """Tiers that are no parts of one whole, and entries that they cannot be cut from."""
    for i, level in enumerate(spec.levels):
        quota = level.select and level.select.quota
        if not quota:
            continue
        path: Path = ("levels", i, "select", "quota")
        wrong = _no_parts(quota) or _no_pyramid(spec, level, quota)
        if wrong:
            yield Problem(
                code="HS136",
                path=path,
                message=f"expected {wrong[0]}",
                help=wrong[1],
                also=(
                    *(("levels", i, *rest) for rest in (("partition",), ("score",), ("select",))),
                    ("causal",),
                ),
                at_key=True,
            )


def _no_parts(quota: tuple[Tier, ...]) -> tuple[str, str] | None:
    """Expected and got, what to type."""
    example = (
        "write '[{merge: 1, fraction: 0.1}, {merge: 8, fraction: 0.2}]', or 'mass' in all tiers"
    )
    said = [
        [key for key in ("fraction", "mass") if getattr(tier, key) is not None] for tier in quota
    ]
    if any(len(keys) != 1 for keys in said) or len({keys[0] for keys in said}) > 1:
        got = ", ".join(" and ".join(keys) or "neither" for keys in said)
        return f"'fraction' in every tier, or 'mass' in every tier, got {got}", example
    whole = sum((tier.fraction or 0.0) + (tier.mass or 0.0) for tier in quota)
    if whole > 1.0 + 1e-9:
        return f"tiers of at most 1 together, got {whole:g}", "write smaller parts"
    if any(tier.least is not None and tier.mass is None for tier in quota):
        return "'least' with 'mass' only, got it with 'fraction'", "remove 'least'"
    merges = [tier.merge for tier in quota]
    if merges != sorted({*merges}):
        return f"tiers that merge more and more tokens, got {merges}", "write the finest tier first"
    return None


def _no_pyramid(spec: Spec, level: Level, quota: tuple[Tier, ...]) -> tuple[str, str] | None:
    blocks, force = level.partition, level.select and level.select.force
    if not isinstance(blocks, Blocks) or blocks.size != blocks.stride:
        return "blocks without overlap to merge tokens of, got others", "write '{blocks: 128}'"
    odd = next((tier.merge for tier in quota if blocks.size % tier.merge), None)
    if odd is not None:
        help = f"write 'merge: {_divisor(blocks.size, odd)}'"
        return f"tiers that divide the blocks, {blocks.size}, got 'merge: {odd}'", help
    if spec.causal and quota[0].merge != 1:
        return (
            "'merge: 1' in the first tier, where forced blocks are, of which a causal row sees a part,"
            f" got {quota[0].merge}",
            "write 'merge: 1' in the first tier, or 'causal: false'",
        )
    if quota[0].mass is not None and _scoring(spec, level).score.normalise is None:
        help = "write 'normalise: softmax' in the score, or 'fraction' in the tiers"
        return "masses for tiers by 'mass', got scores that are not normalised", help
    if force and force.tail:
        return "forced blocks in the first tier, got 'tail', which is in none", "write 'last: 1'"
    return None


def _divisor(size: int, near: int) -> int:
    return min(
        (n for n in range(1, min(size, 4096) + 1) if not size % n), key=lambda n: abs(n - near)
    )


def _scoring(spec: Spec, level: Level) -> Level:
    """The level whose scores a level selects by."""
    levels = {other.name: other for other in spec.levels}
    for _ in spec.levels:  # a chain of `from` is no longer than that
        if level.score.source not in levels:
            break
        level = levels[level.score.source]
    return level


def walks(spec: Spec) -> Iterator[Problem]:
    """Walks that begin nowhere, or walk entries twice."""
    for i, level in enumerate(spec.levels):
        select, path = level.select, ("levels", i, "select")
        if select is None:
            continue
        if select.early_stop is not None:
            yield from _walk(spec, level, select.early_stop, (*path, "early_stop"))


def _walk(spec: Spec, level: Level, stop: EarlyStop, path: Path) -> Iterator[Problem]:
    branches = {branch.name: (j, branch) for j, branch in enumerate(spec.attend)}
    wrong = help = key = ""
    also: tuple[Path, ...] = ()
    if stop.after is not None and stop.after not in branches:
        wrong, key = f"expected a branch in 'after', got '{stop.after}', which is none", "after"
        help = f"branches: {', '.join(branches)}"
        also = tuple(("attend", j, "name") for j in range(len(spec.attend)))
    elif stop.after is not None and branches[stop.after][1].over is not None:
        wrong = "expected a window or a pattern in 'after', which are there before anything is"
        wrong, key = f"{wrong} selected, got '{stop.after}'", "after"
        help = "name a branch with 'window' or 'static', or remove 'after'"
        also = (("attend", branches[stop.after][0]),)
    elif level.select and level.select.force.tail:
        wrong = "expected forced entries to be walked first, got 'tail', which is not walked"
        help, key, also = "write 'last: 1'", "gain", ((*path[:3], "force"),)
    elif isinstance(level.partition, Parts):
        wrong, help = (
            "expected entries of tokens to walk, got parts of what a row sees",
            "use blocks",
        )
        key, also = "entries", ((*path[:2], "partition"),)
    elif level.partition.size != level.partition.stride:
        wrong, help = "expected entries without overlap to walk, got others", "leave 'stride' out"
        key, also = "entries", ((*path[:2], "partition"),)
    if wrong:
        yield Problem(code="HS137", path=(*path, key), message=wrong, help=help, also=also)


def stands_for(spec: Spec) -> Iterator[Problem]:
    """Branches over what is skipped, by tiers, and weighed by counts."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, branch in enumerate(spec.attend):
        j, level = levels.get(branch.over or "", (-1, None))
        also: tuple[Path, ...] = (("attend", i), ("levels", j, "select"), ("levels", j, "name"))
        for key, wrong, help in _misplaced(branch, level):
            yield Problem(
                code="HS138",
                path=("attend", i, key),
                message=wrong,
                help=help,
                also=also[1:],
                at_key=key != "values",
            )


def _misplaced(branch: Attend, level: Level | None) -> Iterator[tuple[str, str, str]]:
    """Key, expected and got, what to type."""
    if branch.values == "tiers" and (level is None or not (level.select and level.select.quota)):
        help = "write 'quota: [{merge: 1, fraction: 0.1}, ...]' in the level's select"
        yield "values", "expected a level with a quota for 'values: tiers', got none", help
    if branch.which is not None and (
        branch.values != "pooled" or level is None or not level.select
    ):
        got = "raw tokens" if branch.values != "pooled" else "a level without 'select'"
        wrong = f"expected pooled entries of a selection with 'which: skipped', got {got}"
        yield "which", wrong, "write 'values: pooled' with a level that selects, or remove 'which'"
    if branch.bias == "log_count" and branch.values == "raw":
        wrong = "expected 'bias: log_count' with 'values: pooled' or 'tiers', got raw tokens"
        yield "bias", f"{wrong}, which are one each", "remove 'bias'"


def errors_and_counts(spec: Spec) -> Iterator[Problem]:
    """Scores of what pooling gets wrong, and logarithms that are added to scores."""
    for i, level in enumerate(spec.levels):
        score, path = level.score, ("levels", i, "score")
        wrong = help = key = ""
        pool = level.pool
        if score.form == "pooling_error":
            key = "form"
            if level.partition.size != level.partition.stride:
                wrong, help = "entries without overlap, got others", "leave 'stride' out"
            elif pool is None or "linear" in (pool.keys, pool.values):
                wrong, help = "means in place of tokens, got none", "write 'pool: {keys: mean}'"
            elif score.normalise is not None:
                wrong, help = "errors as they are, got 'normalise'", "remove 'normalise'"
            elif score.bias == "log_count":
                wrong, help = "errors as they are, got 'bias'", "remove 'bias'"
        elif score.bias == "log_count" and score.form != "dot":
            wrong = f"logits to add the logarithm of counts to, got form '{score.form}'"
            help, key = "remove 'bias', or write 'form: dot'", "bias"
        if wrong:
            yield Problem(
                code="HS139",
                path=(*path, key),
                message=f"expected {wrong}",
                help=help,
                also=(path, ("levels", i, "partition"), ("levels", i, "pool"))[1:],
                at_key=key == "bias",
            )
