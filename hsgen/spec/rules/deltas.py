"""Far keys that come back from their changes: where there are any."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Attend, Path, Spec
from hsgen.spec.rules.problem import Problem


def deltas(spec: Spec) -> Iterator[Problem]:
    union = spec.combine is not None and spec.combine.softmax is not None
    for i, branch in enumerate(spec.attend):
        if branch.delta is None:
            continue
        path: Path = ("attend", i)
        if why := _no_far_keys(branch, union=union):
            yield Problem(
                code="HS187",
                path=(*path, "delta"),
                message=f"'delta' has no meaning here: {why}",
                help="remove 'delta'",
                also=(
                    *((*path, key) for key in ("values", "window", "storage")),
                    (*path, "delta", "window"),
                    ("combine",),
                ),
                at_key=True,
            )


def _no_far_keys(branch: Attend, *, union: bool) -> str | None:
    assert branch.delta is not None
    if branch.values == "pooled":
        return "it is tokens that change, and pooled entries are attended"
    if branch.storage:
        return "a latent key holds its value as well"
    if union:
        return "in a union a token has one logit, whichever branch reaches it"
    if isinstance(branch.window, int) and branch.window <= branch.delta.window:
        return f"the branch attends {branch.window} tokens, and all of them are near"
    return None
