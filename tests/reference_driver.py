"""A driver in place of an emitted one: the same contract, computed by the reference."""

import torch

from hsgen.batch import K_FIRST, K_LEN, Q_FIRST, Q_LEN, Q_OFFSET
from hsgen.execution import Program
from hsgen.operators import autograd_again
from hsgen.reference import reference, tensor_kinds, tensor_shapes


class ReferenceDriver:
    """Reads nothing but what an emitted driver gets; `calls` has every batch it was given."""

    def __init__(self, spec, dtype, apart=False):
        self.spec = spec
        self.dtype = dtype
        self.apart = [{}] if apart else []  # it needs nothing of branches
        self.calls = []

    def forward(self, tensors, batch, config, selection=None):
        result = self._result(tensors, batch, selection)
        chosen = {name: each.indices for name, each in result.selection.items()}
        o = result.o.to(tensors["q"].dtype)
        lse = {name: each.float().contiguous() for name, each in result.lse.items()}
        if batch.packed:
            o, lse = o[None], {name: each[None] for name, each in lse.items()}
            chosen = {name: each[None] for name, each in chosen.items()}
        return o, lse, chosen, *self.apart

    def select(self, tensors, batch, config):
        sizes = tensor_shapes(self.spec, *tensors["q"].shape[:2], keys(tensors))
        absent = {name: torch.zeros(shape) for name, shape in sizes.items() if name not in tensors}
        return self.forward({**absent, **tensors}, batch, config)[2]

    def backward(self, tensors, batch, config, *, o, lse, selection, grad_o, grad_lse, apart=None):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        with torch.enable_grad(), autograd_again():
            made, sums = self.forward(leaves, batch, config, selection)[:2]
            outputs, grads = [made, *sums.values()], [grad_o, *(grad_lse[name] for name in sums)]
            found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return {name: x for name, x in zip(leaves, found, strict=True) if x is not None}

    def _result(self, tensors, batch, selection):
        self.calls.append(batch)
        for name, each in tensors.items():
            assert each.stride(-1) == 1 or each.shape[-1] <= 1, f"{name} has no last stride of 1"
        table = batch.table.tolist()
        kinds = tensor_kinds(self.spec)
        options = {}
        if batch.packed:
            tensors = {n: x if kinds[n] == "parameter" else x[0] for n, x in tensors.items()}
            selection = selection and {name: each[0] for name, each in selection.items()}
            options["cu_seqlens_q"] = ends(table, Q_FIRST, Q_LEN)
            options["cu_seqlens_k"] = ends(table, K_FIRST, K_LEN)
        return reference(
            self.spec,
            tensors,
            **options,
            kv_lens=torch.tensor([row[K_LEN] for row in table]),
            q_offset=torch.tensor([row[Q_OFFSET] for row in table]),
            selection=selection,
            dtype=self.dtype,
        )


def keys(tensors):
    return next(x for name, x in tensors.items() if name.startswith("k")).shape[1]


def ends(table, first, length):
    return torch.tensor([row[first] for row in table] + [table[-1][first] + table[-1][length]])


class StandIn(str):
    """A plan that has no kernels, so nothing is looked up for them."""

    kernels = ()
    alone = ""
    again = ()


def compiler(made=None, *, dtype=torch.float64):
    """A compiler that gives reference drivers; `made` collects what it was asked for."""

    def compile_program(
        spec, target, element, *, interpret, orders=None, backward=False, apart=False
    ):
        driver = ReferenceDriver(spec, dtype, apart and not backward)
        if made is not None:
            made.append((spec, target, element, driver))
        return Program(
            driver=driver,
            plan=StandIn("a plan"),
            config={"attend": {"BLOCK_T": 16, "num_warps": 4}},
            origin={"attend": "default"},
            launches=3,
        )

    return compile_program
