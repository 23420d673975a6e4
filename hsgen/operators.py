"""The torch.library operators: how a Kernel's calls look to torch.compile, autograd and export.

An operator takes tensors, numbers and text only, so a kernel travels as a key.  What an operator
does is the business of the `Implementation` registered under that key.

`Library.define` and `impl` rather than `custom_op`, which costs three times as much a call; not
`triton_op`, which cannot be traced with the interpreter.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from hsgen.errors import HsgenError


class Call(NamedTuple):
    """The arguments of one call, as its operator carries them.

    Attributes:
        layout: "bthd" or "bhtd"; packed tensors are [total, H, D] where cu_seqlens_q is there.
        tensors: those that the operator needs, in the order of the spec.
        selection: indices that the caller brings, of the levels that `levels` names.
        levels: names joined by commas.
        first: q_offset where it is a number.
        length: kv_lens where it is a number.
    """

    layout: str
    tensors: list[Tensor]
    selection: list[Tensor]
    levels: str
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_k: int | None
    q_offset: Tensor | None
    first: int | None
    kv_lens: Tensor | None
    length: int | None


class Implementation(Protocol):
    """What stands behind a key."""

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that select, in the order of the spec."""
        ...

    def forward(self, call: Call) -> list[Tensor]:
        """o, log-sum-exp by branch; selection by level where none was brought along."""
        ...

    def forward_fake(self, call: Call) -> list[Tensor]: ...

    def select(self, call: Call) -> list[Tensor]:
        """Selection by level."""
        ...

    def select_fake(self, call: Call) -> list[Tensor]: ...

    def check_differentiable(self, call: Call) -> None:
        """Raise where there is no backward."""
        ...

    def backward(self, call: Call, grads: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """Gradients of `call.tensors`; outputs are o and each log-sum-exp, grads are theirs."""
        ...


_implementations: dict[str, Implementation] = {}


def register(key: str, implementation: Implementation) -> None:
    """Let operators find an implementation; the first one under a key stays."""
    _implementations.setdefault(key, implementation)


def implementation(key: str) -> Implementation:
    """What is registered under a key.

    Raises:
        HsgenError: this process never loaded that kernel.
    """
    try:
        return _implementations[key]
    except KeyError:
        raise HsgenError(
            f"no kernel {key!r} in this process",
            help="call hsgen.load_kernel with the same spec and options before the compiled model",
        ) from None


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(call: Call) -> bool:
    """Whether PyTorch would only pass a call on, so that the operator and its cost can be skipped.

    Nothing traces, transforms, profiles or differentiates, and no tensor is of a class of its own.
    PyTorch has no public way to ask most of this.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or _functorch.peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    differentiates = torch.is_grad_enabled()
    for tensor in call.tensors:
        if type(tensor) not in _PLAIN or (differentiates and tensor.requires_grad):
            return False
    return True


_ARGUMENTS = (
    "str layout, Tensor[] tensors, Tensor[] selection, str levels, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_k, "
    "Tensor? q_offset, SymInt? first, Tensor? kv_lens, SymInt? length"
)
_library = torch.library.Library("hsgen", "DEF")
_library.define(f"forward(str key, {_ARGUMENTS}) -> Tensor[]")
_library.define(f"select(str key, {_ARGUMENTS}) -> Tensor[]")
_library.define(f"backward(str key, Tensor[] grads, Tensor[] outputs, {_ARGUMENTS}) -> Tensor[]")

forward = torch.ops.hsgen.forward.default
select = torch.ops.hsgen.select.default
backward = torch.ops.hsgen.backward.default


def _forward(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).forward(Call(*arguments))  # type: ignore[arg-type]  # the schema's


def _forward_fake(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).forward_fake(Call(*arguments))  # type: ignore[arg-type]


def _select(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).select(Call(*arguments))  # type: ignore[arg-type]


def _select_fake(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).select_fake(Call(*arguments))  # type: ignore[arg-type]


def _backward(
    key: str, grads: list[Tensor], outputs: list[Tensor], *arguments: object
) -> list[Tensor]:
    return implementation(key).backward(Call(*arguments), grads, outputs)  # type: ignore[arg-type]


def _backward_fake(
    _key: str, _grads: list[Tensor], _outputs: list[Tensor], *arguments: object
) -> list[Tensor]:
    call = Call(*arguments)  # type: ignore[arg-type]
    return [tensor.new_empty(tensor.shape) for tensor in call.tensors]


for _name, _real, _fake in (
    ("forward", _forward, _forward_fake),
    ("select", _select, _select_fake),
    ("backward", _backward, _backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _real, _device)
    torch.library.register_fake(f"hsgen::{_name}", _fake, lib=_library)


# --- autograd: a selection is a constant, so the backward attends what the forward selected


def _save(ctx, inputs: tuple[object, ...], output: list[Tensor]) -> None:
    key, *arguments = inputs
    call = Call(*arguments)  # type: ignore[arg-type]
    known = implementation(str(key))
    known.check_differentiable(call)
    brought = [level for level in call.levels.split(",") if level]
    computed = [] if brought else list(known.levels)
    chosen = output[len(output) - len(computed) :]
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.q_offset, call.kv_lens)
    ctx.grads = len(output) - len(computed)
    outputs = output[: ctx.grads]
    ctx.save_for_backward(*outputs, *call.tensors, *call.selection, *chosen, *lengths)
    ctx.tensors, ctx.brought = len(call.tensors), len(brought)
    ctx.key, ctx.layout, ctx.levels = key, call.layout, ",".join([*brought, *computed])
    ctx.max_seqlen_k, ctx.first, ctx.length = call.max_seqlen_k, call.first, call.length


def _differentiate(ctx, grads: list[Tensor]) -> tuple[object, ...]:
    if torch.is_grad_enabled():  # create_graph=True: `backward` itself has no derivative
        raise HsgenError("a sparse attention can be differentiated once, not twice")
    *saved, cu_seqlens_q, cu_seqlens_k, q_offset, kv_lens = ctx.saved_tensors
    outputs, saved = saved[: ctx.grads], saved[ctx.grads :]
    call = Call(
        layout=ctx.layout,
        tensors=saved[: ctx.tensors],
        selection=saved[ctx.tensors :],
        levels=ctx.levels,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=ctx.max_seqlen_k,
        q_offset=q_offset,
        first=ctx.first,
        kv_lens=kv_lens,
        length=ctx.length,
    )
    found = backward(ctx.key, grads[: ctx.grads], outputs, *call)
    nothing = [None] * len(call)
    nothing[Call._fields.index("tensors")] = found
    nothing[Call._fields.index("selection")] = [None] * ctx.brought
    return (None, *nothing)


torch.library.register_autograd("hsgen::forward", _differentiate, setup_context=_save, lib=_library)
