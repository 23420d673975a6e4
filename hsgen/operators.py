"""The torch.library operators: how a Kernel's calls look to torch.compile, autograd and export.

An operator takes tensors, numbers and text only, so a kernel travels as a key.  What an operator
does is the business of the `Implementation` registered under that key.

`Library.define` and `impl` rather than `custom_op`, which costs three times as much a call; not
`triton_op`, which cannot be traced with the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils.flop_counter import register_flop_formula

from hsgen.errors import HsgenError
from hsgen.flops import Work


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
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    q_offset: Tensor | None = None
    first: int | None = None
    kv_lens: Tensor | None = None
    length: int | None = None


class Implementation(Protocol):
    """What stands behind a key."""

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that select, in the order of the spec."""
        ...

    @property
    def sums(self) -> int:
        """How many log-sum-exps there are."""
        ...

    def traced(self, call: Call, *, selections: bool = True) -> list[Tensor]:
        """o, log-sum-exp by branch; selection by level where none was brought along.

        selections: Without them, those that `backward` makes again are left out, all or none.
        """
        ...

    def record(
        self, call: Call, *, selections: bool = False
    ) -> tuple[list[Tensor], list[Tensor], object]:
        """The same, tensors that `backward` is given again, and what it may be told of the call.

        selections: Without them, those that `backward` does not read are left out, all or none.
        """
        ...

    def forward_fake(self, call: Call, *, selections: bool = True) -> list[Tensor]: ...

    def select(self, call: Call) -> list[Tensor]:
        """Selection by level."""
        ...

    def select_fake(self, call: Call) -> list[Tensor]: ...

    def check_differentiable(self, call: Call) -> None:
        """Raise where there is no backward."""
        ...

    def backward(
        self,
        call: Call,
        grads: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        wanted: Sequence[bool] | None = None,
        known: object = None,
        apart: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Gradients of `call.tensors`, or of those that are wanted; outputs are o and each log-sum-exp.

        grads: Theirs; None is 0.
        known: What `record` said of the call.
        apart: Tensors that it gave.
        """
        ...

    @property
    def named_losses(self) -> tuple[str, ...]:
        """Losses of the spec."""
        ...

    def losses(self, call: Call) -> list[Tensor]:
        """f32[] each."""
        ...

    def losses_backward(self, call: Call, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `call.tensors`; grads are those of the losses."""
        ...

    def record_losses(self, call: Call) -> tuple[list[Tensor], Tensor, list[Tensor | None]] | None:
        """Losses, a number, and by tensor what its gradient is times that; None: call `losses`."""
        ...

    def flops(self, call: Call, work: Work) -> float:
        """Multiplications and additions of one operator."""
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


_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_requires_grad = attrgetter("requires_grad")


def is_watched(call: Call, *, casts: bool = True) -> bool:
    """Whether PyTorch would do more with a call than pass it on, or differentiate it.

    Something traces, transforms, casts or profiles, or a tensor is of a class of its own: then the
    operator has to be called.  PyTorch has no public way to ask most of this.

    casts: Count it that something does nothing but cast, which `cast` does too.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or (casts and torch._C._is_any_autocast_enabled())
        or _functorch.peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return True
    return not _PLAIN.issuperset(map(type, call.tensors))


def is_recorded(call: Call) -> bool:
    """Whether autograd has to know of a call."""
    return torch.is_grad_enabled() and any(map(_requires_grad, call.tensors))


_ARGUMENTS = (
    "str layout, Tensor[] tensors, Tensor[] selection, str levels, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_k, "
    "Tensor? q_offset, SymInt? first, Tensor? kv_lens, SymInt? length"
)
_library = torch.library.Library("hsgen", "DEF")
_library.define(f"forward(str key, {_ARGUMENTS}, bool selections=True) -> Tensor[]")
_library.define(f"select(str key, {_ARGUMENTS}) -> Tensor[]")
_library.define(f"backward(str key, Tensor[] grads, Tensor[] outputs, {_ARGUMENTS}) -> Tensor[]")
_library.define(f"losses(str key, {_ARGUMENTS}) -> Tensor[]")
_library.define(f"losses_backward(str key, Tensor[] grads, {_ARGUMENTS}) -> Tensor[]")

forward = torch.ops.hsgen.forward.default
select = torch.ops.hsgen.select.default
backward = torch.ops.hsgen.backward.default
losses = torch.ops.hsgen.losses.default
losses_backward = torch.ops.hsgen.losses_backward.default


_CALL = len(Call._fields)


def _forward(key: str, *arguments: object) -> list[Tensor]:
    call = Call(*arguments[:_CALL])  # type: ignore[arg-type]  # the schema's
    return implementation(key).traced(call, selections=all(arguments[_CALL:]))


def _forward_fake(key: str, *arguments: object) -> list[Tensor]:
    call = Call(*arguments[:_CALL])  # type: ignore[arg-type]
    return implementation(key).forward_fake(call, selections=all(arguments[_CALL:]))


def _select(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).select(Call(*arguments))  # type: ignore[arg-type]


def _select_fake(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).select_fake(Call(*arguments))  # type: ignore[arg-type]


def _backward(
    key: str, grads: list[Tensor], outputs: list[Tensor], *arguments: object
) -> list[Tensor]:
    call = Call(*arguments)  # type: ignore[arg-type]
    found = implementation(key).backward(call, grads, outputs)
    assert all(each is not None for each in found), "all are wanted"
    return found  # type: ignore[return-value]


def _backward_fake(
    _key: str, _grads: list[Tensor], _outputs: list[Tensor], *arguments: object
) -> list[Tensor]:
    call = Call(*arguments)  # type: ignore[arg-type]
    return [tensor.new_empty(tensor.shape) for tensor in call.tensors]


def _losses(key: str, *arguments: object) -> list[Tensor]:
    return implementation(key).losses(Call(*arguments))  # type: ignore[arg-type]


def _losses_fake(key: str, *arguments: object) -> list[Tensor]:
    call = Call(*arguments)  # type: ignore[arg-type]
    q = call.tensors[0]
    return [q.new_empty((), dtype=torch.float32) for _ in implementation(key).named_losses]


def _losses_backward(key: str, grads: list[Tensor], *arguments: object) -> list[Tensor]:
    return implementation(key).losses_backward(Call(*arguments), grads)  # type: ignore[arg-type]


def _losses_backward_fake(key: str, grads: list[Tensor], *arguments: object) -> list[Tensor]:
    return _backward_fake(key, grads, [], *arguments)


for _name, _real, _fake in (
    ("forward", _forward, _forward_fake),
    ("select", _select, _select_fake),
    ("backward", _backward, _backward_fake),
    ("losses", _losses, _losses_fake),
    ("losses_backward", _losses_backward, _losses_backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _real, _device)
    torch.library.register_fake(f"hsgen::{_name}", _fake, lib=_library)


def autograd_again() -> AbstractContextManager[object]:
    """For an operator that differentiates inside: below a mode of PyTorch, or below its own autograd,
    nothing would be recorded, and gradients would be 0.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded)


# --- autocast: floating tensors of a call get one dtype, that of the region


def _casting(operator: Callable[..., list[Tensor]], device: str) -> Callable[..., list[Tensor]]:
    """An operator where autocast is on; float64 stays, as everywhere in PyTorch."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(name: str, *arguments: object) -> list[Tensor]:
        call = Call(*arguments[:_CALL])  # type: ignore[arg-type]
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(name, *_in_dtype(call, dtype), *arguments[_CALL:])

    return cast


def _in_dtype(call: Call, dtype: torch.dtype) -> Call:
    tensors = [
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
        for x in call.tensors
    ]
    return call._replace(tensors=tensors)


def cast(call: Call) -> Call:
    """As the operators have it in a region of autocast."""
    device = call.tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return call
    return _in_dtype(call, torch.get_autocast_dtype(device))


for _device in ("cpu", "cuda"):
    for _name, _operator in (("forward", forward), ("select", select), ("losses", losses)):
        _library.impl(_name, _casting(_operator, _device), f"Autocast{_device.upper()}")


# --- autograd: a selection is a constant, so the backward attends what the forward selected


def _keep(
    ctx,
    key: str,
    call: Call,
    output: Sequence[Tensor],
    *,
    chooses: bool = True,
    apart: Sequence[Tensor] = (),
) -> int:
    """Keep what the backward needs.  -> how many of the outputs have a gradient

    chooses: The last outputs are selections, where the call brings none.
    apart: Tensors beside them that it needs.
    """
    brought = call.levels.split(",") if call.levels else []
    chooses = chooses and len(output) > 1 + implementation(key).sums
    computed = list(implementation(key).levels) if chooses and not brought else []
    ctx.grads = len(output) - len(computed)
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.q_offset, call.kv_lens)
    selections = (*call.selection, *output[ctx.grads :])
    ctx.save_for_backward(*apart, *output[: ctx.grads], *call.tensors, *selections, *lengths)
    ctx.apart, ctx.tensors, ctx.brought = len(apart), len(call.tensors), len(brought)
    ctx.key, ctx.layout, ctx.levels = key, call.layout, ",".join([*brought, *computed])
    ctx.max_seqlen_k, ctx.first, ctx.length = call.max_seqlen_k, call.first, call.length
    return ctx.grads


def _kept(ctx) -> tuple[Call, list[Tensor], list[Tensor]]:
    """The call, with the selection that was made, o and each log-sum-exp, and what is beside them."""
    if torch.is_grad_enabled():  # create_graph=True: `backward` itself has no derivative
        raise HsgenError(
            "a sparse attention can be differentiated once, not twice",
            help="leave out create_graph=True; the reference (`Kernel.reference`) has all derivatives",
        )
    *saved, cu_seqlens_q, cu_seqlens_k, q_offset, kv_lens = ctx.saved_tensors
    apart, saved = saved[: ctx.apart], saved[ctx.apart :]
    outputs, saved = saved[: ctx.grads], saved[ctx.grads :]
    call = Call(
        ctx.layout,
        saved[: ctx.tensors],
        saved[ctx.tensors :],
        ctx.levels,
        cu_seqlens_q,
        cu_seqlens_k,
        ctx.max_seqlen_k,
        q_offset,
        ctx.first,
        kv_lens,
        ctx.length,
    )
    return call, outputs, apart


def _save(ctx, inputs: tuple[object, ...], output: list[Tensor]) -> None:
    key, *arguments = inputs
    call = Call(*arguments[:_CALL])  # type: ignore[arg-type]  # the schema's
    implementation(str(key)).check_differentiable(call)
    _keep(ctx, str(key), call, output)
    ctx.told = not all(arguments[_CALL:])  # PyTorch leaves out what is as by default


def _differentiate(ctx, grads: list[Tensor]) -> tuple[object, ...]:
    call, outputs, _ = _kept(ctx)
    nothing: list[object] = [None] * len(call)
    nothing[Call._fields.index("tensors")] = backward(ctx.key, grads[: ctx.grads], outputs, *call)
    nothing[Call._fields.index("selection")] = [None] * ctx.brought
    return (None, *nothing, *([None] * ctx.told))


torch.library.register_autograd("hsgen::forward", _differentiate, setup_context=_save, lib=_library)


def _save_losses(ctx, inputs: tuple[object, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    key, *arguments = inputs
    _keep(ctx, str(key), Call(*arguments), [], chooses=False)  # type: ignore[arg-type]


def _differentiate_losses(ctx, grads: list[Tensor]) -> tuple[object, ...]:
    call, _, _ = _kept(ctx)
    nothing: list[object] = [None] * len(call)
    nothing[Call._fields.index("tensors")] = losses_backward(ctx.key, grads, *call)
    nothing[Call._fields.index("selection")] = [None] * ctx.brought
    return (None, *nothing)


torch.library.register_autograd(
    "hsgen::losses", _differentiate_losses, setup_context=_save_losses, lib=_library
)


class _Recorded(torch.autograd.Function):
    """`forward` and its gradient without the operators, whose lists of tensors cost 0.1 ms a call."""

    @staticmethod
    def forward(ctx, key: str, call: Call, selections: bool, *_: Tensor) -> tuple[Tensor, ...]:
        known = implementation(key)
        known.check_differentiable(call)
        outputs, apart, ctx.known = known.record(call, selections=selections)
        grads = _keep(ctx, key, call, outputs, apart=apart)
        ctx.mark_non_differentiable(*outputs[grads:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, outputs, apart = _kept(ctx)
        grads = grads[: ctx.grads]
        if is_watched(call):
            pairs = zip(grads, outputs, strict=True)
            whole = [torch.zeros_like(o) if grad is None else grad for grad, o in pairs]
            return (None, None, None, *backward(ctx.key, whole, outputs, *call))
        wanted = ctx.needs_input_grad[3:]
        return (
            None,
            None,
            None,
            *implementation(ctx.key).backward(call, grads, outputs, wanted, ctx.known, apart),
        )


def record(key: str, call: Call, *, selections: bool = False) -> Sequence[Tensor]:
    """Call `forward` so that autograd knows of it, where nothing else has to.

    selections: Without them, those that nothing of it reads are left out, all or none.
    """
    # `Function.apply` looks at transforms first, of which there are none here: 5 us for 12 tensors
    apply = super(torch.autograd.Function, _Recorded).apply  # pyright: ignore[reportAttributeAccessIssue]
    return apply(key, call, selections, *call.tensors)


class _RecordedLosses(torch.autograd.Function):
    """`losses` and its gradient in one go, where nothing else watches: what is made of scores is kept, in
    place of the tensors, and scores are made once.
    """

    @staticmethod
    def forward(
        ctx, key: str, made: tuple[list[Tensor], Tensor, list[Tensor | None]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        values, share, grads = made
        ctx.key, ctx.there = key, [grad is not None for grad in grads]
        ctx.dtypes = [x.dtype for x in tensors]
        ctx.save_for_backward(share, *(grad for grad in grads if grad is not None))
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise HsgenError(
                "a loss on kernels can be differentiated once, not twice",
                help="leave out create_graph=True; `Kernel.reference_losses` has all derivatives",
            )
        share, *made = ctx.saved_tensors
        # of one dimension: a number would be rounded to the gradient's dtype, where 1 / rows may be 0
        left, share = iter(made), (share * grads[0]).reshape(1)
        found = [
            _times(next(left), share, dtype) if there else None
            for there, dtype in zip(ctx.there, ctx.dtypes, strict=True)
        ]
        return (None, None, *found)


def _times(grad: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(grad, share, out=torch.empty_like(grad, dtype=dtype))


def record_losses(key: str, call: Call) -> Sequence[Tensor]:
    """Call `losses` so that autograd knows of it, where nothing else has to."""
    with torch.no_grad():
        made = implementation(key).record_losses(call)
    if made is None:
        return losses(key, *call)
    return _RecordedLosses.apply(key, made, *call.tensors)


# --- what FlopCounterMode counts


def _count(work: Work) -> Callable[..., int]:
    """Arguments of an operator -> its operations; lists stand before the call of a backward."""
    lists = {"backward": 2, "losses_backward": 1}.get(work, 0)

    def count(key: str, *arguments: object, **_: object) -> int:
        call = Call(*arguments[lists : lists + _CALL])  # type: ignore[arg-type]
        return round(implementation(key).flops(call, work))

    return count


for _name in get_args(Work):
    register_flop_formula(getattr(torch.ops.hsgen, _name), get_raw=True)(_count(_name))
