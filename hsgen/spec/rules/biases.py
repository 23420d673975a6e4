"""The learned term that asks no query: what it scores, and where it is added."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Path, Spec
from hsgen.spec.rules.problem import Problem


def biases(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        score, path = level.score, ("levels", i, "score")
        if score.form == "bias" and score.share == "head":
            yield Problem(
                code="HS145",
                path=(*path, "share") if "share" in score.model_fields_set else (*path, "form"),
                message="expected 'share: group' or 'all' with form 'bias', got 'head'",
                help="write '{form: bias, share: group}': a key head has one bias for its group",
                also=((*path, "share"),),
            )
        why = (
            "the bias is the score already"
            if score.form == "bias"
            else f"the scores are those of '{score.source}'"
            if score.form is None
            else "scores are given as they are"
            if score.form == "given"
            else "counts of equal codes have none"
            if score.form == "code_match"
            else "the heads of an index have none"
            if score.by_index
            else "it is an error that is scored"
            if score.form == "pooling_error"
            else None
        )
        if score.bias == "learned" and why is not None:
            yield _no_bias(path, why, (*path, "form"), (*path, "source"))
    for i, branch in enumerate(spec.attend):
        if branch.bias == "learned" and branch.values != "raw":
            why = "it is tokens that have one, and pooled entries are attended"
            yield _no_bias(("attend", i), why, ("attend", i, "values"))
    if spec.combine and spec.combine.softmax:
        yield from _one_logit_a_token(spec)


def _one_logit_a_token(spec: Spec) -> Iterator[Problem]:
    """A token that a union reaches twice counts once, so it has one logit."""
    raw = [(i, branch) for i, branch in enumerate(spec.attend) if branch.values != "pooled"]
    for i, branch in raw:
        without = [x for _, x in raw if x.kv == branch.kv and x.bias != "learned"]
        if branch.bias == "learned" and without:
            why = f"in the union, '{without[0].name}' attends the same tokens without it"
            kvs = (("attend", j, "kv") for j, _ in raw)
            yield _no_bias(("attend", i), why, ("combine",), ("attend",), *kvs)


def _no_bias(path: Path, why: str, *also: Path) -> Problem:
    return Problem(
        code="HS146",
        path=(*path, "bias"),
        message=f"'bias' has no meaning here: {why}",
        help="remove 'bias'",
        also=also,
        at_key=True,
    )
