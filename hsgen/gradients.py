"""Gradients of one call by kernels, and what they have to be: what a search of their tiles runs.

Knows programs and tensors, and times nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsgen import backward, passes, planner
from hsgen.batch import Batch
from hsgen.execution import Configs, Program
from hsgen.reference import reference, tensor_kinds
from hsgen.runtime import compile_program
from hsgen.selection import ListSelection
from hsgen.spec import Spec
from hsgen.target import Target
from hsgen.trials import ROUNDOFF, Trial, tensors_of

LARGEST, WHOLE = 4.0, 1.25  # units of rounding: of the largest error, and of all of it
SINGLE = 16.0  # of float32, whose log-sum-exps and delta round as the rest does
OF_PLAIN = 3.0  # times what plain PyTorch gets wrong in the same numbers
ROWS = 64  # of which the worst count by themselves
AT_LENGTH = 2.0**-6  # |theirs - the start's| / |the start's|, where no reference can follow


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """A bound spec's calls as autograd records them, and their gradients, for one GPU and dtype."""

    forward: Program
    backward: Program

    @classmethod
    def of(cls, spec: Spec, target: Target, dtype: torch.dtype, *, interpret: bool) -> Programs:
        """Compile both.

        Raises:
            PlanError: something whose gradient no kernel makes yet.
        """
        apart = backward.keeps_branches(passes.run(planner.plan(spec)))
        forward, gradients = (
            compile_program(spec, target, dtype, interpret=interpret, backward=which, apart=apart)
            for which in (False, True)
        )
        return cls(forward=forward, backward=gradients)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Left:
    """What a call left for its gradients, and the gradients that came of its outputs.

    Attributes:
        o, grad_o: [B, T, Hq, Dv].
        lse, grad_lse: f32[B, Hq, T] by branch.
        selection: i32[B, T, Hs, K] by level.
        apart: [B, T, Hq, Dv] by branch under gates.
    """

    o: Tensor
    lse: Mapping[str, Tensor]
    selection: Mapping[str, Tensor]
    apart: Mapping[str, Tensor]
    grad_o: Tensor
    grad_lse: Mapping[str, Tensor]


def left_by(
    program: Program,
    tensors: Mapping[str, Tensor],
    where: Batch,
    brought: Mapping[str, Tensor] | None,
    seed: int,
) -> Left:
    """Call a program once; gradients of its outputs are drawn, 0 where a row sees nothing."""
    o, lse, chosen, *apart = program.driver.forward(tensors, where, program.config, brought)
    generator = torch.Generator(o.device).manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    return Left(
        o=o,
        lse=lse,
        selection=brought or chosen,
        apart=apart[0] if apart else {},
        grad_o=drawn(o),
        grad_lse={name: torch.where(x.isinf(), 0.0, drawn(x)) for name, x in lse.items()},
    )


def run(
    program: Program, config: Configs, tensors: Mapping[str, Tensor], where: Batch, left: Left
) -> Mapping[str, Tensor]:
    """Gradients by name, of the tensors that have any."""
    apart = {"apart": left.apart} if left.apart else {}
    return program.driver.backward(
        tensors,
        where,
        config,
        o=left.o,
        lse=left.lse,
        selection=left.selection,
        grad_o=left.grad_o,
        grad_lse=left.grad_lse,
        **apart,
    )


def differences(
    found: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """By tensor, |found - start| / |start|: how far two configurations' gradients are apart.

    Of its worst ROWS rows a quarter of that where it is more: one wrong row of many is little of the whole.
    """
    for name, other in start.items():
        apart, sizes = (_norms(x) for x in (found[name] - other, other))
        size = torch.linalg.vector_norm(sizes)
        if not size > 0:
            yield name, float(apart.max())
            continue
        usual = size / math.sqrt(
            len(sizes)
        )  # rows whose gradient is next to nothing are not held to it
        whole, worst = (
            torch.linalg.vector_norm(apart) / size,
            (apart / sizes.clamp(min=usual)).max(),
        )
        yield name, float(torch.maximum(whole, worst / 4))


def _norms(x: Tensor) -> Tensor:
    """Of every ROWS rows of [B, T, H, D], else of all."""
    parts = x.split(ROWS, dim=1) if x.ndim == 4 else (x,)
    return torch.stack([torch.linalg.vector_norm(part.float()) for part in parts])


class Examination:
    """One trial's gradients on a device, for many configurations, and what the reference says."""

    def __init__(self, trial: Trial, programs: Programs, device: str = "cpu") -> None:
        self.trial, self._program = trial, programs.backward
        self._tensors = tensors_of(trial, device)
        given = self._tensors
        self._left = left_by(programs.forward, given.driver, given.batch, given.brought, 0)
        self._exact = self._reference(torch.float64)
        self._plain = self._reference(trial.dtype)

    def problems(self, config: Configs) -> list[str]:
        """Run the kernels.  -> what is wrong, nothing if all is well"""
        given = self._tensors
        found = run(self._program, config, given.driver, given.batch, self._left)
        kinds = tensor_kinds(self.trial.spec)
        wrong: list[str] = []
        for name, exact in self._exact.items():
            got = found.get(name)
            got = torch.zeros_like(exact) if got is None else got
            if self.trial.packed and kinds[name] != "parameter" and got.ndim > exact.ndim:
                got = got[0]
            wrong += self._wrong(name, got.double(), exact, self._plain[name].double())
        return wrong

    def _wrong(self, name: str, got: Tensor, exact: Tensor, plain: Tensor) -> Iterator[str]:
        """Beside the largest number and all of them, and what plain PyTorch gets wrong."""
        if not got.isfinite().all():
            yield f"gradient of {name}: not finite"
            return
        unit, single = ROUNDOFF[self.trial.dtype], self.trial.dtype == torch.float32
        norms = ((LARGEST, math.inf), (WHOLE, 2.0))
        for units, order in norms:
            size, error, own = (
                float(torch.linalg.vector_norm(x, order))
                for x in (exact, got - exact, plain - exact)
            )
            bound = (SINGLE if single else units) * unit * size + OF_PLAIN * own
            if error > max(bound, unit * unit):
                yield f"gradient of {name}: off by {error:.3g}, of {size:.3g}, at most {bound:.3g}"

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference's gradients in a dtype, of the entries that the forward chose."""
        trial, given, left = self.trial, self._tensors, self._left
        leaves = {
            name: x.detach().to(dtype).requires_grad_()
            for name, x in given.reference.items()
            if x.is_floating_point()
        }

        def unpacked(x: Tensor) -> Tensor:
            return x[0] if trial.packed else x

        selection = {
            name: ListSelection(level=name, indices=unpacked(indices))
            for name, indices in left.selection.items()
        }
        lengths = given.lengths
        result = reference(
            trial.spec,
            given.reference | leaves,
            cu_seqlens_q=lengths.get("cu_seqlens_q"),
            cu_seqlens_k=lengths.get("cu_seqlens_k"),
            kv_lens=lengths.get("kv_lens"),
            selection=selection,
            dtype=dtype,
        )
        outputs = [result.o, *(torch.where(x.isinf(), 0.0, x) for x in result.lse.values())]
        grads = [unpacked(left.grad_o), *map(unpacked, left.grad_lse.values())]
        found = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, found, strict=True))
