"""Routes: which of several ways a layer, a head or a sequence takes."""

from typing import Annotated, Literal

from pydantic import Field

from hsgen.spec.model.scalars import MAX_WAYS, Identifier, Node

RouteBy = Literal["layer", "head", "sample", "sample_head"]

Ways = Annotated[tuple[Identifier, ...], Field(max_length=MAX_WAYS)]


class Route(Node):
    """Which way is taken: levels and branches with `when: WAY` are there on that way only.

    `table`: layer or head i takes the way in place i, over and over.  The number of the layer is
    bound at load_kernel, or an argument of the call, `layer`.
    `input`: the argument `route` says the place of the way in the list; any other number is no way
    at all, on which nothing is attended but what has no `when`.
    """

    by: RouteBy  # who takes a way: a layer as a whole, each query head, each sequence, or both
    table: Ways = ()
    input: Ways = ()

    @property
    def ways(self) -> tuple[str, ...]:
        """Every way, in the order in which they are first said."""
        return tuple(dict.fromkeys((*self.table, *self.input)))
