"""What a call takes over from earlier calls of the same attention."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hsgen.spec.model.scalars import MAX_CALLS, Count, Forced, Identifier, Node

Turn = Literal["dense", "fresh", "shared"]


class Reuse(Node):
    """Take over a level's selection from an earlier call: another layer's, or another step's.

    Calls count from 0.  The first `dense` ones attend every visible token and choose nothing; the
    next `lead` ones are fresh, they choose for themselves; from then on the letters of `pattern` say
    it, over and over: F fresh, S shared, which takes over what was kept.  `every: 4` is FSSS.
    Without either, one fresh call serves all that follow.  `pattern: S` is what is left of a shared
    call alone: none chooses, the caller brings what another call chose; `pattern: F` what is left of
    one that chooses and attends something else.
    """

    renamed: ClassVar[Mapping[str, str]] = {"as": "role"}
    level: Identifier  # whose selection is kept
    over: Literal["layers", "steps"]  # calls are layers of one pass, or steps of one layer
    # final: a shared call's set is the kept one, and nothing is scored.  candidates: it chooses among
    # the kept entries (forced ones are candidates besides), and keeps what it chose: a cascade.
    # Rows that choose together are the same ones in every call, and have one kept set
    role: Literal["final", "candidates"]
    every: Count | None = None
    pattern: Annotated[str, Field(pattern=r"^(F[FS]*|S)$", max_length=MAX_CALLS)] | None = (
        None  # turns of the calls after `dense` and `lead`, over and over
    )
    dense: Forced = 0  # first calls that attend every visible token and choose nothing
    lead: Forced = 0  # calls after them that are fresh, before the pattern begins
    # what branches over the level attend: own: the call's own choice.  given: what it chose from,
    # every visible token on a fresh call, so that its choice serves later calls alone
    attend: Literal["own", "given"] = "own"
    accumulate: bool = False  # candidates: scores of the calls since the fresh one are added up

    @property
    def brought(self) -> bool:
        """Whether every call takes over what another spec's call chose."""
        return self.pattern == "S"

    @property
    def opens(self) -> bool:
        """Whether a call that chooses attends every visible token, not its choice."""
        return self.attend == "given"

    @property
    def fresh(self) -> bool:
        """Whether every call chooses for itself."""
        return self.pattern is not None and not self.dense and set(self.pattern) == {"F"}

    def turn(self, call: int) -> Turn:
        """Which kind of call number `call` is."""
        if call < self.dense:
            return "dense"
        late = call - self.dense - self.lead
        if late < 0:
            return "fresh"
        if self.pattern is not None:
            return "fresh" if self.pattern[late % len(self.pattern)] == "F" else "shared"
        return "fresh" if late % (self.every or late + 1) == 0 else "shared"
