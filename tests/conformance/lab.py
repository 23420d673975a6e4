"""Where a check works: a backend, a spec, a dtype and a device.  And what a check is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from conformance import calls, oracles, systems
from hsgen import analysis, passes, planner


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lab:
    """One backend on one shipped spec.

    Attributes:
        run: Call -> Outcome.
        name: of the spec file.
        dtype: of the tensors.
        device: of the tensors.
        group: query heads of one key head.
        again: the same backend, in another order of programs where it has one.
    """

    run: Callable
    name: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    group: int = 3
    again: Callable | None = None

    @property
    def T(self):
        """Odd, and long enough for budgets to bite; a level of tokens costs a program a row."""
        return 29 if self._slow else 45

    @property
    def short(self):
        """For batches, and where one run is as good as another."""
        return 13 if self._slow else 29

    @property
    def _slow(self):
        return any(level.within for level in systems.load(self.name).levels)

    def spec(self, **shape):
        """The spec, shrunk and bound."""
        return systems.small(self.name, **({"group": self.group} | shape))

    def make(self, spec=None, **options):
        """A call of it with random tensors."""
        given = {"T": self.T, "dtype": self.dtype, "device": self.device} | options
        return calls.make(spec or self.spec(), **given)

    def rerun(self, call):
        """Run a call once more, in another order if the backend can."""
        return (self.again or self.run)(call)

    def checked(self, call):
        """Run a call and hold it against every rule."""
        outcome = self.run(call)
        oracles.check(call, outcome)
        return outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that must hold, and the specs it must hold for."""

    function: Callable
    applies: Callable

    @property
    def name(self):
        return self.function.__name__

    def __call__(self, lab):
        self.function(lab)


def always(spec):
    """The precondition of a law that has none."""
    return True


def check(applies=always):
    """Decorate a function of a Lab that raises AssertionError where something does not hold."""
    return lambda function: Check(function=function, applies=applies)


def collect(namespace):
    """The checks of a module, in its order."""
    return tuple(value for value in namespace.values() if isinstance(value, Check))


@functools.cache
def laws(spec):
    """Which laws the graph of a spec says hold."""
    return analysis.laws(passes.run(planner.plan(spec)))


def same(expected, outcome, *, what="outputs", rows=slice(None)):
    """Both outcomes have the same bits.  `rows`: of dense outputs, those compared."""
    first, second = expected.tensors(), outcome.tensors()
    assert first.keys() == second.keys()
    for name, x in first.items():
        y = second[name]
        if name.startswith("lse"):
            x, y = x.transpose(-1, -2), y.transpose(-1, -2)
        if rows != slice(None):
            x, y = x[:, rows], y[:, rows]
        assert_same_bits(name, x, y, what)


def assert_same_bits(name, x, y, what):
    """Equal as bits, but for the sign of zero; NaN is never right.

    Lists may have different numbers of slots at their end that are not used.
    """
    if x.dtype == y.dtype == torch.int32:
        wide = max(x.shape[-1], y.shape[-1])
        x, y = (torch.nn.functional.pad(z, (0, wide - z.shape[-1]), value=-1) for z in (x, y))
    assert x.shape == y.shape, f"{what}: {name} has shapes {list(x.shape)} and {list(y.shape)}"
    if x.is_floating_point():
        assert not y.isnan().any(), f"{what}: {name} has NaN"
    wrong = x != y
    if wrong.any():
        at = oracles._where(wrong)
        message = f"{what}: {name} differs at {at}: {x[at]} and {y[at]}, {int(wrong.sum())} in all"
        raise AssertionError(message)
