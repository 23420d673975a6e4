"""What a gated call is: which form of its spec it takes, by what the host knows of its length.

Makes no kernel and runs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hsgen import dense, tuned
from hsgen.arguments import Expected
from hsgen.execution import PLANNED, Options
from hsgen.gates import Form, Gate
from hsgen.operators import Call
from hsgen.spec import HeadDim, Heads, Spec
from hsgen.target import Target

NEVER = Gate()


class Gating:
    """The gate of one spec, and the forms that its calls may take."""

    def __init__(
        self, spec: Spec, options: Options, expected: Expected, forms: Mapping[Form, Spec]
    ) -> None:
        self.forms = forms
        self._spec = spec
        self._gate = options.gate
        self._target = options.target
        self._at = {name: number for number, name in enumerate(expected.names)}
        self._inputs = expected.inputs
        dims = [each.type.dims for each in expected.inputs]
        at = next(number for number, each in enumerate(dims) if "S" in each)
        self._keyed = at, len(dims[at]), dims[at].index("S")  # the tensor that says how many keys
        self._known: dict[tuple[torch.dtype, torch.device], Gate] = {}  # where heads are bound
        self._found: dict[tuple[Any, ...], tuned.FoundGates] = {}
        self._branch = forms["dense"].attend[0] if "dense" in forms else None
        self._causal = spec.causal

    def form(self, call: Call) -> Form:
        """What a call is: by the keys of its longest sequence, as far as the host knows them."""
        keys = self._longest(call)
        if keys is None:
            return "own"
        gate = self._gate if isinstance(self._gate, Gate) else self._measured(call)
        form: Form = gate.form(keys)
        return form if form in self.forms else "own"

    def attend(self, call: Call) -> Tensor | None:
        """A dense call by PyTorch's own kernels; None where they cannot do it.

        Packed documents, and lengths or offsets that are tensors, are left to the form's kernel.
        """
        branch = self._branch
        if branch is None or branch.storage or branch.softcap is not None:
            return None
        if any(x is not None for x in (call.cu_seqlens_q, call.q_offset, call.kv_lens)):
            return None
        own = f"_{branch.kv}" if branch.kv else ""
        return dense.attend(
            *(call.tensors[self._at[name]] for name in ("q", f"k{own}", f"v{own}")),
            layout=call.layout,
            causal=self._causal,
            scale=branch.scale,
            first=call.first,
            length=call.length,
        )

    def explain(self) -> str:
        """The gate, and for what tensors it was looked up."""
        if isinstance(self._gate, Gate):
            return f"gate: {self._gate}"
        return "\n".join(map(str, self._found.values())) or 'gate="measured": no call yet'

    def _longest(self, call: Call) -> int | None:
        """None of a tensor that has no such dimension: the spec's own call says what is wrong."""
        at, rank, axis = self._keyed
        keys, packed = call.tensors[at], call.cu_seqlens_q is not None
        if keys.ndim != rank - packed or call.tensors[0].ndim != 4 - packed:
            return None
        swapped = call.layout == "bhtd" and rank == 4 and not packed
        longest = keys.shape[2 if swapped else axis - packed]
        for most in (call.length, call.max_seqlen_k if packed else None):
            if isinstance(most, (int, torch.SymInt)):
                longest = min(longest, most)
        return longest

    def _size(self, call: Call, name: str) -> int:
        """A number of heads, or a length of them, as the first tensor that has it says."""
        for tensor, each in zip(call.tensors, self._inputs, strict=True):
            if name in each.type.dims:
                # from the end, so that packed or not is the same
                axis = each.type.dims.index(name) - len(each.type.dims)
                heads = axis == -2 and call.layout == "bhtd" and tensor.ndim == 4
                return tensor.shape[-3 if heads else axis]
        raise AssertionError(f"no tensor has {name}")

    def _measured(self, call: Call) -> Gate:
        """Of the GPU that runs the call; CPU tensors have one only where a target is named."""
        q, spec = call.tensors[0], self._spec
        if q.dtype not in PLANNED or (q.device.type != "cuda" and self._target is None):
            return NEVER
        if not torch.compiler.is_compiling() and (known := self._known.get((q.dtype, q.device))):
            return known
        dims = spec.head_dim or HeadDim(qk=self._size(call, "Dqk"), v=self._size(call, "Dv"))
        heads = spec.heads or Heads(query=self._size(call, "Hq"), kv=self._size(call, "Hkv"))
        gate = self._look_up(q.dtype, q.device, (heads.query, heads.kv), (dims.qk, dims.v))
        if spec.heads and spec.head_dim and not torch.compiler.is_compiling():
            self._known[q.dtype, q.device] = gate
        return gate

    def _look_up(self, *kind: Any) -> Gate:
        """What was measured for such tensors: read once, and told of once."""
        if kind not in self._found:
            dtype, device, heads, head_dim = kind
            spec = self._spec.bind(heads=heads, head_dim=head_dim)
            target = self._target or Target.current(device.index)
            found = tuned.crossovers(
                tuned.Problem.of(spec, PLANNED[dtype]), tuned.environment(target)
            )
            found.tell()
            self._found[kind] = found
        return self._found[kind].gate

    # What torch.compiler.assume_constant_result does, but for loading the compiler, which takes seconds.
    _look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]
