"""What calls of one attention hand on: which call chooses, what is kept, what a level then does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.errors import ArgumentError
from hsgen.selection import ListSelection, Selection
from hsgen.spec import Reuse, Spec, Turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """What a call leaves to the next one of a reused level.

    Attributes:
        calls: How many calls there were, so that the next one knows its number.
        selection: What the last call that chose has chosen; None where none has.
        scores: f[B, T, Hs, N] or packed.  Added up since the last fresh call where the spec
            accumulates; those of the last fresh call where a loss trains them; else None.
    """

    calls: int
    selection: Selection | None = None
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """A reused level in one call, for some rows.

    Attributes:
        reuse: What the spec says of the level.
        turn: Which kind of call this is.
        indices: Kept entries, [T, Hs, K]; None unless the call shares.
        scores: Kept scores, [T, Hs, N].
    """

    reuse: Reuse
    turn: Turn
    indices: Tensor | None = None
    scores: Tensor | None = None

    @property
    def scored(self) -> bool:
        """Whether the call scores the level's entries, and chooses."""
        return self.turn == "fresh" or (self.turn == "shared" and self.reuse.role == "candidates")

    @property
    def narrowed(self) -> bool:
        """Whether the call chooses among the kept entries."""
        return self.turn == "shared" and self.reuse.role == "candidates"

    @property
    def attends_all(self) -> bool:
        """Whether branches over the level attend every visible token."""
        return self.turn == "dense" or (self.turn == "fresh" and self.reuse.attend == "given")

    @property
    def attends_kept(self) -> bool:
        """Whether branches over the level attend the kept entries, whatever the call chooses."""
        return self.narrowed and self.reuse.attend == "given"


def with_brought(
    spec: Spec, state: Mapping[str, Kept], selection: Mapping[str, Selection | Tensor]
) -> Mapping[str, Kept]:
    """The state, where no call chooses also what the caller brings as a selection."""
    found = dict(state)
    for reuse in spec.reuse:
        if reuse.brought and (brought := selection.get(reuse.level)) is not None:
            if isinstance(brought, Tensor):
                brought = ListSelection(level=reuse.level, indices=brought)
            found[reuse.level] = Kept(calls=1, selection=brought)
    return found


def turns(spec: Spec, state: Mapping[str, Kept]) -> dict[str, Turn]:
    """Which kind of call this is, by reused level.

    Raises:
        ArgumentError: the call shares, and nothing was kept.
    """
    found: dict[str, Turn] = {}
    for reuse in spec.reuse:
        kept = state.get(reuse.level, Kept(calls=0))
        turn = found[reuse.level] = reuse.turn(kept.calls)
        if turn == "shared" and kept.selection is None:
            msg = (
                f"state[{reuse.level!r}]: call {kept.calls} of {reuse.over} shares the selection of an"
                " earlier one, expected it, got none"
            )
            raise ArgumentError(msg)
    return found


def reached(spec: Spec, taken: Mapping[str, Taken]) -> set[str]:
    """The levels that a call has to do with: what is taken over needs no level of its own."""
    if not taken:
        return {level.name for level in spec.levels}
    needed = {branch.over for branch in spec.attend}
    if spec.loss and spec.loss.kl:
        needed.add(spec.loss.kl.level)
    for level in reversed(spec.levels):
        if level.name in needed and (level.name not in taken or taken[level.name].scored):
            needed |= level.named
    return {level.name for level in spec.levels if level.name in needed}


def carries_scores(spec: Spec, level: str) -> bool:
    """Whether later calls need the scores of a reused level."""
    reuse = spec.reuse_of(level)
    trained = spec.loss is not None and spec.loss.kl is not None and spec.loss.kl.level == level
    return reuse is not None and (reuse.accumulate or trained)


def rows_of(taken: Taken, a: int, b: int) -> Taken:
    """The rows from a to b."""
    parts = {
        name: None if (x := getattr(taken, name)) is None else x[a:b]
        for name in ("indices", "scores")
    }
    return replace(taken, **parts)


def kept_scores(taken: Taken, N: int) -> Tensor | None:
    """Kept scores of N entries; those that nothing is kept of are -inf.  -> [T, Hs, N]"""
    if taken.scores is None:
        return None
    missing = max(0, N - taken.scores.shape[-1])
    return F.pad(taken.scores[..., :N], (0, missing), value=-torch.inf)


def kept_after(
    spec: Spec,
    state: Mapping[str, Kept],
    selection: Mapping[str, Selection],
    scores: Mapping[str, Tensor],
) -> dict[str, Kept]:
    """What the next call takes over, of every reused level: what was chosen, or else was kept."""
    found: dict[str, Kept] = {}
    for reuse in spec.reuse:
        name, old = reuse.level, state.get(reuse.level, Kept(calls=0))
        chose = Taken(reuse=reuse, turn=reuse.turn(old.calls)).scored
        carried = scores[name] if chose and carries_scores(spec, name) else old.scores
        found[name] = Kept(
            calls=old.calls + 1,
            selection=selection[name] if chose else old.selection,
            scores=carried,
        )
    return found
