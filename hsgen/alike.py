"""How tensors lie: all but their values and their addresses, of which only where they begin to 16 bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes
_PARTS = (Tensor.size, Tensor.stride, attrgetter("dtype"), attrgetter("device"))


def parts(tensors: Sequence[Tensor]) -> list[object]:
    """Sizes, strides, dtypes and devices."""
    return [x for of in _PARTS for x in map(of, tensors)]


def even(tensors: Sequence[Tensor]) -> bool | tuple[bool, ...]:
    """Whether all begin where the tensor memory accelerator can begin, or which ones."""
    return not tensors[0].is_cuda or even_at(addresses(tensors))


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where they begin."""
    return [*map(Tensor.data_ptr, tensors)]


def even_at(addresses: Sequence[int]) -> bool | tuple[bool, ...]:
    """As `even`, of addresses on a GPU."""
    if functools.reduce(or_, addresses) % ALIGNED == 0:
        return True
    return tuple(each % ALIGNED == 0 for each in addresses)


def lies_even(x: Tensor) -> bool:
    """The same of one."""
    return not x.is_cuda or x.data_ptr() % ALIGNED == 0


class Likeness:
    """Whether tensors lie as others did, without a list of how they lie: a tenth of the time.

    May say no of some that do: of another class, or that require grad.  Keeps no tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._even = even(tensors)
        first = dict[int, int]()  # of several that are one tensor, which PyTorch does not compare
        self._same = [
            (i, j) for i, x in enumerate(tensors) if (j := first.setdefault(id(x), i)) != i
        ]
        self._firsts = [*first.values()]
        self._check = _check_of([tensors[i] for i in self._firsts])

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        return self.but_for_addresses(tensors) and even(tensors) == self._even

    def but_for_addresses(self, tensors: Sequence[Tensor]) -> bool:
        """The same, wherever they begin."""
        if len(tensors) != self._count:
            return False
        each = tensors
        if self._same:
            if not all(tensors[i] is tensors[j] for i, j in self._same):
                return False
            each = [tensors[i] for i in self._firsts]
        return self._check(*each)


def _check_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What PyTorch itself compares by, before it runs what it compiled."""
    kind: Any = _guards()
    if kind is None:
        before = _with_grad(tensors)
        return lambda *others: _with_grad(others) == before
    sizes, strides = ([[*f(x)] for x in tensors] for f in (Tensor.size, Tensor.stride))
    return kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _with_grad(tensors: Sequence[Tensor]) -> list[object]:
    """Parts, and whether each requires grad, which PyTorch's own comparison looks at too."""
    return [*parts(tensors), *(x.requires_grad for x in tensors)]


@functools.cache
def _guards() -> Any:
    """Its class, which is not public; None where it is not as it is known here."""
    kind = getattr(
        getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None
    )
    x = torch.empty(2, 3, device="cpu")
    try:
        made = kind(x, dynamic_dims_sizes=[[2, 3]], dynamic_dims_strides=[[3, 1]])  # type: ignore[misc]
        known = made.check(x) and not any(map(made.check, (x[:, :2], x.int(), x.t())))
    except (TypeError, SystemError):
        return None
    return kind if known else None
