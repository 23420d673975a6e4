"""Routes: which of several ways a layer, a head or a sequence takes."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from hsgen.spec.model.scalars import MAX_WAYS, Identifier, Node, Part

RouteBy = Literal["layer", "head", "sample", "sample_head"]

Ways = Annotated[tuple[Identifier, ...], Field(max_length=MAX_WAYS)]


class Statistic(Node):
    """A number of each head of a prompt, from 0 to 1, that says which of two ways it takes.

    `divergence`: the root of the Jensen-Shannon divergence, by the natural logarithm, of what two levels
    make of the same entries for the prompt's last rows, each as parts of its sum.
    """

    renamed: ClassVar[Mapping[str, str]] = {"from": "source"}
    divergence: Identifier  # of this level
    source: Identifier  # from that one; both come before levels with `when`
    threshold: Part
    below: Identifier  # the way where the number is less than the threshold
    above: Identifier  # the way of the others

    @property
    def levels(self) -> tuple[Identifier, Identifier]:
        """Both levels."""
        return self.divergence, self.source


class Route(Node):
    """Which way is taken: levels and branches with `when: WAY` are there on that way only.

    `table`: layer or head i takes the way in place i, over and over.  The number of the layer is
    bound at load_kernel, or an argument of the call, `layer`.
    `input`: the argument `route` says the place of the way in the list; any other number is no way
    at all, on which nothing is attended but what has no `when`.
    `statistic`: a number that levels without `when` make of the call itself.
    """

    by: RouteBy  # who takes a way: a layer as a whole, each query head, each sequence, or both
    table: Ways = ()
    input: Ways = ()
    statistic: Statistic | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        """Every way, in the order in which they are first said."""
        computed = (self.statistic.below, self.statistic.above) if self.statistic else ()
        return tuple(dict.fromkeys((*self.table, *self.input, *computed)))

    def of_heads(self, heads: int) -> Self:
        """The same route of so many heads, where its table does not divide them."""
        if self.by != "head" or not self.table or heads % len(self.table) == 0:
            return self
        ways = (self.table[i % len(self.table)] for i in range(heads))
        return self.model_copy(update={"table": tuple(ways)})
