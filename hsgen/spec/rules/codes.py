"""Codes: what compares them, and codewords that fit the heads."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Codes, Path, Spec
from hsgen.spec.rules.problem import Problem


def codes(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        path: Path = ("levels", i, "score", "codes")
        codes, form = level.score.codes, (*path[:-1], "form")
        if (level.score.form == "code_match") != (codes is not None):
            yield Problem(
                code="HS180",
                path=path if codes else form,
                message="expected 'form: code_match' and 'codes' together, got one of the two",
                help="write '{form: code_match, codes: {words: 16, dim: 8}}'",
                also=(path, form),
                at_key=codes is not None,
            )
        elif codes is not None and spec.head_dim is not None:
            yield from _fit(codes, spec.head_dim.qk, path)


def _fit(codes: Codes, width: int, path: Path) -> Iterator[Problem]:
    """Runs that make up a head's vector, and at least one of them a bucket."""
    runs = width // codes.dim
    if width % codes.dim:
        nearer = next(n for n in range(min(codes.dim, width), 0, -1) if width % n == 0)
        yield Problem(
            code="HS181",
            path=(*path, "dim"),
            message=f"expected runs that divide the head dim of keys, {width}, got {codes.dim}",
            help=f"write 'dim: {nearer}'",
            also=(("head_dim",),),
        )
    elif codes.buckets is not None and codes.buckets > runs:
        yield Problem(
            code="HS181",
            path=(*path, "buckets"),
            message=f"expected at most a bucket for each of the {runs} runs, got {codes.buckets}",
            help=f"write 'buckets: {runs}', or leave it out",
            also=((*path, "dim"), ("head_dim",)),
        )
