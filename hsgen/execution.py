"""What the operators of a kernel do: CPU tensors go to the reference, or by request to the emitted
kernels in Triton's interpreter; CUDA tensors go to the emitted kernels, on the current stream.

Compiles a program on the first call of its kind; never waits for the device, unless checks are on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock, RLock
from typing import Any, Literal, Protocol, get_args

import networkx as nx
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from hsgen import (
    alike,
    arguments,
    backward,
    batch,
    clusters,
    flops,
    knobs,
    losses,
    operators,
    passes,
    paths,
    planner,
    takes,
    tuned,
)
from hsgen.arguments import Expected, Lengths, Problem
from hsgen.axes import tiling_of
from hsgen.batch import Batch
from hsgen.configs import DType
from hsgen.entropies import PULL
from hsgen.errors import ArgumentError, HsgenError, PlanError, Span
from hsgen.flops import Work
from hsgen.gates import Gate
from hsgen.graph import Attend, Graph, Node, Recall, Rotate, tensor_inputs
from hsgen.learn import SLOPE
from hsgen.operators import Call
from hsgen.plan import STREAMED, Cached, Plan
from hsgen.plan import Kernel as PlannedKernel
from hsgen.reference import Result, reference
from hsgen.replay import Outputs, Replays
from hsgen.schedule import Order, combining, part_of, schedule
from hsgen.selection import BitmapSelection, to_list
from hsgen.spec import Spec
from hsgen.target import Target
from hsgen.together import Part

try:
    from triton.language import cdiv
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
except ImportError:  # where Triton does not exist, the reference still runs
    cdiv = InterpretedFunction = interpreter_builder = None

Configs = Mapping[str, Mapping[str, int]]  # by kernel: constexprs, num_warps, num_stages

FIELDS = {
    "Hq": ("heads", "query"),
    "Hkv": ("heads", "kv"),
    "Dqk": ("head_dim", "qk"),
    "Dv": ("head_dim", "v"),
    "Hi": ("index", "heads"),
    "Di": ("index", "dim"),
}  # where a spec states a dimension
PLANNED: Mapping[torch.dtype, DType] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
KNOWN_CALLS = 4096  # signatures of calls that one Execution remembers
STEP = "step."  # before the name of a kernel: that of a step behind a cache, alone
INTERPRETED_TARGET = "h100"  # whose plan the interpreter runs, unless one is named

# the interpreter replaces functions of triton.language while it runs
_interpreter_lock = Lock()


class Driver(Protocol):
    """The module `driver` of a compiled spec."""

    def forward(
        self,
        tensors: Mapping[str, Tensor],
        batch: Batch,
        config: Configs,
        selection: Mapping[str, Tensor] | None,
        **options: bool,
    ) -> tuple[Any, ...]:
        """o [B, T, Hq, Dv], log-sum-exp f32[B, Hq, T] by branch, i32[B, T, Hs, K] by level.

        options: `rows=False`, of a driver that can, leaves the selections out.
        Of a program whose branches are apart, their own outputs too, by branch.
        """
        ...

    def select(
        self, tensors: Mapping[str, Tensor], batch: Batch, config: Configs
    ) -> Mapping[str, Tensor]:
        """i32[B, T, Hs, K] by level."""
        ...

    def backward(
        self,
        tensors: Mapping[str, Tensor],
        batch: Batch,
        config: Configs,
        *,
        o: Tensor,
        lse: Mapping[str, Tensor],
        selection: Mapping[str, Tensor],
        grad_o: Tensor,
        grad_lse: Mapping[str, Tensor],
        **apart: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Of a program of gradients: those of some tensors, by name; others have none."""
        ...

    def losses(
        self,
        tensors: Mapping[str, Tensor],
        batch: Batch,
        config: Configs,
        selection: Mapping[str, Tensor],
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Of a program of losses: f32[rows, 2] by loss, and gradients of sums of the first by tensor."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A spec compiled for one GPU and dtype.

    Attributes:
        driver: launches the kernels.
        plan: prints as launches and buffers.
        config: by kernel, what it starts from.
        origin: by kernel, where that came from.
        launches: of kernels, a call; a launch that is repeated over chunks of rows counts once.
        texts: by kernel, the digest of its text.
        rows_apart: the driver can leave out the lists of rows, which nothing that attends reads.
    """

    driver: Driver
    plan: Plan
    config: Configs
    origin: Mapping[str, str]
    launches: int
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    rows_apart: bool = False

    @property
    def streams(self) -> bool:
        """Whether a kernel has tensors brought to it, which must lie as what brings them wants."""
        return any(kernel.skeleton in STREAMED for kernel in self.plan.kernels)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """What calls of one bucket run: a program, and by kernel its config and where that came from."""

    program: Program
    config: Configs
    origin: Mapping[str, str]
    orders: Mapping[str, Order] = field(default_factory=dict[str, Order])


class Compiler(Protocol):
    """Makes the program of a spec whose heads and head dims are bound."""

    def __call__(
        self,
        spec: Spec,
        target: Target,
        dtype: torch.dtype,
        *,
        interpret: bool,
        orders: Mapping[str, Order],
        backward: bool = False,
        apart: bool = False,
        losses: Literal["values", "gradients"] | None = None,
    ) -> Program: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a kernel was asked for, beside its spec; see `load_kernel`."""

    dtype: torch.dtype | None = None
    target: Target | None = None
    interpret: bool = False
    config: Configs = field(default_factory=dict[str, Mapping[str, int]], hash=False)
    check: bool = False
    recompute: bool = False
    gate: Gate | Literal["measured"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What was done so far.

    Attributes:
        calls: of the attention and of `select`, whatever they ran on.
        compiles: programs compiled, or loaded from the cache.
        launches: of kernels; a launch that is repeated over chunks of rows counts once.
        bytes: of the tensors that calls on kernels returned.
    """

    calls: int = 0
    compiles: int = 0
    launches: int = 0
    bytes: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            calls=self.calls + other.calls,
            compiles=self.compiles + other.compiles,
            launches=self.launches + other.launches,
            bytes=self.bytes + other.bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a program is compiled for."""

    query_heads: int
    kv_heads: int
    qk: int
    v: int
    dtype: torch.dtype
    device: torch.device
    orders: tuple[tuple[str, Order], ...] = ()  # by branch, where they are not the plan's own
    aligned: bool = True  # tensors as the tensor memory accelerator wants them
    apart: bool = False  # gated branches keep their outputs for the gradients

    def __str__(self) -> str:
        dtype = arguments.SHORT_NAMES[self.dtype]
        heads = f"heads {self.query_heads}/{self.kv_heads}"
        orders = "".join(f", {branch}: {order} stay" for branch, order in self.orders)
        aligned = "" if self.aligned else ", not aligned"
        apart = ", branches apart" if self.apart else ""
        where = f"{self.device}{orders}{aligned}{apart}"
        return f"{heads}, head dim {self.qk}/{self.v}, {dtype}, {where}"


class _Like:
    """Whether calls are like one, but for numbers of lengths; may say no of some that are."""

    def __init__(self, call: Call) -> None:
        self._said = self._says(call)
        self._tensors = alike.Likeness(_tensors_of(call))

    def __call__(self, call: Call) -> bool:
        return self._says(call) == self._said and self._tensors(_tensors_of(call))

    @staticmethod
    def _says(call: Call) -> tuple[object, ...]:
        return (
            call.layout,
            call.levels,
            call.cu_seqlens_q is None,
            call.cu_seqlens_k is None,
            call.q_offset is None,
            call.kv_lens is None,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grads:
    """A backward whose tensors kernels read as they came: how all of them lie, its key and its program."""

    like: alike.Likeness
    key: tuple[Any, ...]
    program: Program


@dataclass(slots=True, kw_only=True, eq=False)
class _Known:
    """A signature that was checked: what it says, and what runs it (None: the reference)."""

    problem: Problem
    expected: Expected
    choice: Choice | None
    apart: Choice | None = None  # where gated branches keep their outputs for the gradients
    bytes: int = 0  # of its outputs
    ran: bool = False  # so nothing is left to compile
    apart_ran: bool = False  # the same of `apart`
    like: dict[str, _Like] = field(default_factory=dict[str, "_Like"])
    last_grads: _Grads | None = None


class Execution:
    """The operators' implementation of one spec; see `operators.Implementation`."""

    def __init__(self, spec: Spec, graph: Graph, options: Options, compiler: Compiler) -> None:
        self.spec = spec
        self.graph = graph
        self.options = options
        self.levels = tuple(graph.outputs.selection)
        self.branches = tuple(graph.outputs.lse)
        self.sums = len(self.branches)
        self.named_losses = tuple(graph.outputs.loss)
        self.attending = expected_tensors(spec, graph)
        self.choosing = _choosing(self.attending, graph)
        self._compiler = compiler
        self._lock = RLock()
        self._programs: dict[Binding, Program] = {}
        self._choices: dict[tuple[Binding, tuned.Bucket], Choice] = {}
        self._known: dict[tuple[object, ...], _Known] = {}
        self._last: dict[str, _Known] = {}  # which come again in a loop
        self.replays = Replays()
        self._recorded: dict[tuple[Binding, tuned.Bucket], Choice] = {}
        self._gradients: dict[tuple[Binding, tuned.Bucket], Program] = {}
        self._differentiated: dict[Binding, Program] = {}  # as compiled, whatever the size
        self._losing: dict[tuple[Binding, str], Program] = {}
        self._bound_graphs: dict[Binding, Graph] = {}
        # calls one branch by itself; who has kernels of it says so
        self.branch: Callable[[str, Call], Tensor] = _no_branch
        self._calls = self._launches = self._bytes = 0

    def on_kernels(self, device: torch.device) -> bool:
        """Whether calls of tensors there run kernels."""
        return self._on_kernels(device)

    @property
    def programs(self) -> Mapping[Binding, Program]:
        """What was compiled so far, oldest first."""
        with self._lock:
            return dict(self._programs)

    @property
    def choices(self) -> Mapping[tuple[Binding, tuned.Bucket], Choice]:
        """What calls got so far, oldest first; their bindings say nothing of orders."""
        with self._lock:
            return dict(self._choices)

    @property
    def recorded(self) -> Mapping[tuple[Binding, tuned.Bucket], Choice]:
        """The same of calls that autograd records, whose gated branches are apart."""
        with self._lock:
            return dict(self._recorded)

    @property
    def gradients(self) -> Mapping[tuple[Binding, tuned.Bucket], Program]:
        """Programs of gradients that calls got so far, oldest first."""
        with self._lock:
            return dict(self._gradients)

    @property
    def stats(self) -> Stats:
        """What was done so far; counts of threads that race may be lost."""
        return Stats(
            calls=self._calls,
            compiles=len(self._programs),
            launches=self._launches,
            bytes=self._bytes,
        )

    # --- the operators

    def forward(self, call: Call, *, selections: bool = True) -> list[Tensor]:
        """o, log-sum-exp by branch, selection by level where the caller brings none.

        selections: Without them, those that cost more than what they are made of are left out.
        """
        known = self._look_up("forward", self.attending, call)
        return self._forward(known, known.choice, call, selections)[0]

    def traced(self, call: Call, *, selections: bool = True) -> list[Tensor]:
        """The same for an operator, whose outputs are as many whatever records them.

        selections: Without them, those that `backward` makes again are left out.
        """
        return self.forward(call, selections=selections or self._returns_selections(call))

    def _returns_selections(self, call: Call) -> bool:
        """Whether a backward needs them: where no kernels run, or none chooses again."""
        on_kernels = self._on_kernels(call.tensors[0].device)
        return not self.chooses_again or not on_kernels or bool(call.levels)

    def record(
        self, call: Call, *, selections: bool = False
    ) -> tuple[list[Tensor], list[Tensor], object]:
        """The same, outputs of gated branches, and what `backward` need not look up again.

        selections: Without them, those that it makes again are left out.
        """
        known = self._look_up("forward", self.attending, call, "record")
        choice = known.choice
        if choice is None or not self.keeps or known.problem.empty:
            selections = selections or choice is None or not self.chooses_again
            return *self._forward(known, choice, call, selections), known
        apart = known.apart = known.apart or self._apart(known.problem, call, choice)
        if not known.apart_ran:
            self._refuse_capture(known.problem.device)
        outputs, kept = self._forward(known, apart, call, selections=True, apart=True)
        known.apart_ran = True
        return outputs, kept, known

    def _forward(
        self,
        known: _Known,
        choice: Choice | None,
        call: Call,
        selections: bool,
        *,
        apart: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and those of branches that are kept apart."""
        problem = known.problem
        if problem.empty:
            return _filled(self.forward_fake(call, selections=selections)), []
        where = _batch(call, problem)
        if self.options.check:
            self._check_values(call, problem, where)
        if choice is None:
            result = self.result(call, problem, exact_dtype(problem.dtype), self.attending)
            return self._from_result(call, problem, result), []
        if call.selection and (level := choice.program.plan.alone):
            raise ArgumentError(
                f"selection: expected none, since all rows share one list of level {level!r} and no kernel "
                f"takes those of rows, got {call.levels}",
                help="`reference` attends any selection",
            )
        without = choice.program.rows_apart and not selections
        brought = self.padded_selection(call, problem) if call.selection else {}
        even = alike.even([*brought.values()]) if brought else True
        key = ("forward", known, apart, where.sizes, without, even)
        with running(problem.device):
            again = self.replays.find(key)
            if again is not None:
                found = again([*call.tensors, *brought.values(), where.table])
            else:
                found = self._drive(key, choice, call, brought, where)
        count = 1 + len(self.branches) + (0 if without else len(self.chosen(call)))
        return self._done(known, choice.program, found[:count]), found[count:]

    def _drive(
        self,
        key: tuple[Any, ...],
        choice: Choice,
        call: Call,
        brought: Mapping[str, Tensor],
        where: Batch,
    ) -> Outputs:
        """What the driver of a forward gives: outputs in the caller's layout, and those of branches apart."""
        _, known, _, _, without, _ = key
        options = {"rows": False} if without else {}
        levels = () if without else self.chosen(call)

        def arranged(driver: Driver, tensors: Sequence[Tensor], where: Batch) -> Outputs:
            each = iter(tensors)
            named = dict(zip(known.expected.names, each, strict=False))
            given = dict(zip(brought, each, strict=True)) or None
            o, lse, chosen, *apart = driver.forward(named, where, choice.config, given, **options)
            outputs = [o, *[lse[branch] for branch in self.branches]]
            outputs += [chosen[level] for level in levels]
            kept = [x for by_branch in apart for x in by_branch.values()]
            return [*_as_asked(outputs, known.problem), *kept]

        views = [*uniform(known.expected, known.problem, call).values(), *brought.values()]
        return self.replays.drive(key, choice.program.driver, arranged, views, where)

    def forward_fake(self, call: Call, *, selections: bool = True) -> list[Tensor]:
        """Outputs of `traced`, nothing in them; shapes and strides are exact."""
        problem = self.check(call, self.attending)
        q = call.tensors[0]
        rows = problem.rows
        heads, width = problem.sizes["Hq"], problem.sizes["Dv"]
        o = q.new_empty(*rows, heads, width)
        lse_shape = (heads, *rows) if problem.packed else (rows[0], heads, rows[1])
        outputs = [o.transpose(1, 2) if problem.layout == "bhtd" else o]
        outputs += [q.new_empty(*lse_shape, dtype=torch.float32) for _ in self.branches]
        if not (selections or self._returns_selections(call)):
            return outputs
        return outputs + self._empty_selections(call, problem)

    def select(self, call: Call) -> list[Tensor]:
        """Selection by level."""
        known = self._look_up("select", self.choosing, call)
        problem, choice = known.problem, known.choice
        if problem.empty:
            return _filled(self.select_fake(call))
        where = _batch(call, problem)
        if self.options.check:
            self._check_values(call, problem, where)
        if choice is None:
            result = self.result(call, problem, exact_dtype(problem.dtype), self.choosing)
            return self._lists(call, problem, result, self.levels)
        key = ("select", known, where.sizes)

        def arranged(driver: Driver, tensors: Sequence[Tensor], where: Batch) -> Outputs:
            named = dict(zip(known.expected.names, tensors, strict=True))
            chosen = driver.select(named, where, choice.config)
            return _as_asked([chosen[level] for level in self.levels], problem)

        with running(problem.device):
            again = self.replays.find(key)
            if again is not None:
                found = again([*call.tensors, where.table])
            else:
                views = [*uniform(known.expected, problem, call).values()]
                driver = choice.program.driver
                found = self.replays.drive(key, driver, arranged, views, where)
        return self._done(known, choice.program, found)

    def select_fake(self, call: Call) -> list[Tensor]:
        """Outputs of `select`, nothing in them."""
        return self._empty_selections(call, self.check(call, self.choosing))

    def check_differentiable(self, call: Call) -> None:
        """Raise where an input requires a gradient that kernels do not make."""
        if self._lacking is None or not self._on_kernels(call.tensors[0].device):
            return
        words, span = self._lacking
        raise PlanError(
            f"{self.spec.name}: an input requires grad, and {words}",
            span=span,
            help="call it under torch.no_grad(), or on tensor.detach(); on CPU tensors the "
            "reference has derivatives",
        )

    def check_taught(self, call: Call) -> None:
        """Raise where a loss on kernels would leave out a gradient that the reference has."""
        if not self._angles or not self._on_kernels(call.tensors[0].device):
            return
        for name, x in zip(self.attending.names, call.tensors, strict=True):
            if name in self._angles and x.requires_grad:
                raise ArgumentError(
                    f"{name}: expected a constant, as no kernel has the gradient of angles, got a tensor "
                    "that requires grad",
                    help="tensor.detach(); `reference_losses` has all derivatives",
                )

    @functools.cached_property
    def _angles(self) -> frozenset[str]:
        """Tables of positions by which a loss turns what it scores."""
        if not self.named_losses:
            return frozenset()
        turns = [node for node in self.graph.nodes() if isinstance(node.op, Rotate)]
        return frozenset(name for node in turns for name in node.inputs[1:])

    @functools.cached_property
    def _lacking(self) -> tuple[str, Span | None] | None:
        """What no kernel has the gradient of, and where the spec says it."""
        for node in self.graph.nodes():
            if words := backward.lacking(self.graph, node):
                return words, node.span
        return None

    def backward(
        self,
        call: Call,
        grads: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        wanted: Sequence[bool] | None = None,
        known: object = None,
        apart: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Gradients of the tensors that are wanted, the selection taken as it is."""
        if not isinstance(known, _Known):
            call = call._replace(tensors=[*map(_in_rows, call.tensors)])
            known = self._look_up_gradients(call)
        problem = known.problem
        wanted = wanted or [True] * len(call.tensors)
        grads = _whole(grads, outputs)
        if self._on_kernels(problem.device):
            return self._backward_on_kernels(call, known, grads, outputs, wanted, apart)
        with torch.enable_grad(), operators.autograd_again():
            tensors = [tensor.detach() for tensor in call.tensors]
            leaves = [each.requires_grad_() for each in tensors if each.is_floating_point()]
            again = call._replace(tensors=tensors)
            result = self.result(again, problem, exact_dtype(problem.dtype), self.attending)
            made = self._from_result(again, problem, result)[: len(grads)]
            pairs = [pair for pair in zip(made, grads, strict=True) if pair[0].requires_grad]
            derived = torch.autograd.grad(
                [output for output, _ in pairs],
                leaves,
                [grad for _, grad in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        found = iter(derived)
        made = [next(found) if x.requires_grad else torch.zeros_like(x) for x in tensors]
        return [
            each.contiguous() if want else None for each, want in zip(made, wanted, strict=True)
        ]

    def losses(self, call: Call) -> list[Tensor]:
        """Every loss of the spec, f32[] each."""
        problem = self.check(call, self.attending)
        if self._on_kernels(problem.device):
            return self._losses_on_kernels(call, problem)
        result = self.result(call, problem, exact_dtype(problem.dtype), self.attending)
        return [result.loss[name].to(torch.float32) for name in self.named_losses]

    def losses_backward(self, call: Call, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of tensors; 0 of those that no loss teaches."""
        problem = self.check(call, self.attending)
        if self._on_kernels(problem.device):
            return self._losses_backward_on_kernels(call, problem, grads)
        with torch.enable_grad(), operators.autograd_again():
            tensors = [tensor.detach() for tensor in call.tensors]
            leaves = [each.requires_grad_() for each in tensors if each.is_floating_point()]
            again = call._replace(tensors=tensors)
            result = self.result(again, problem, exact_dtype(problem.dtype), self.attending)
            made = [result.loss[name].to(torch.float32) for name in self.named_losses]
            pairs = [pair for pair in zip(made, grads, strict=True) if pair[0].requires_grad]
            found = torch.autograd.grad(
                [loss for loss, _ in pairs],
                leaves,
                [grad for _, grad in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        derived = iter(found)
        return [(next(derived) if x.requires_grad else _zeros(x)).contiguous() for x in tensors]

    def _losses_on_kernels(self, call: Call, problem: Problem) -> list[Tensor]:
        if problem.empty:
            return [call.tensors[0].new_zeros((), dtype=torch.float32) for _ in self.named_losses]
        outputs = None
        if self.distilled:
            outputs = {side: self.branch(name, call) for side, name in self.distilled.items()}
        found, _ = self._drive_losses(call, problem, "values", outputs)
        return [_mean(found[name])[0] for name in self.named_losses]

    def _losses_backward_on_kernels(
        self, call: Call, problem: Problem, grads: Sequence[Tensor]
    ) -> list[Tensor]:
        _, share, made = self._learn(call, problem)
        share = (grads[0] * share).reshape(1)  # a number would be rounded to the gradient's dtype
        return [
            _zeros(x) if grad is None else grad.mul_(share).to(x.dtype)
            for x, grad in zip(call.tensors, made, strict=True)
        ]

    def record_losses(self, call: Call) -> tuple[list[Tensor], Tensor, list[Tensor | None]] | None:
        """Losses, a number, and by tensor what its gradient is times that; None: not by kernels."""
        problem = self.check(call, self.attending)
        if not self._on_kernels(problem.device):
            return None
        return self._learn(call, problem)

    def _learn(
        self, call: Call, problem: Problem
    ) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        """The same by kernels: gradients are of the sum over rows, and how many count is known at the end."""
        if problem.empty:
            nothing = call.tensors[0].new_zeros((), dtype=torch.float32)
            return [nothing for _ in self.named_losses], nothing, [None for _ in call.tensors]
        if self.distilled:
            return self._distil(call, problem)
        found, derived = self._drive_losses(call, problem, "gradients")
        (name,) = self.named_losses
        value, count = _mean(found[name])
        made: list[Tensor | None] = []
        for each in self.attending.inputs:
            grad = derived.get(each.name)
            if grad is not None:
                grad = grad.sum(0) if grad.ndim > len(each.type.dims) else grad
                packed = problem.packed and each.type.dims[0] == "B"
                grad = grad[0] if packed else _swapped(grad, each.type.dims, problem)
            made.append(grad if grad is None else grad.contiguous())
        return [value], 1.0 / self._gain / count, made

    def _distil(
        self, call: Call, problem: Problem
    ) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        """The same of two branches' outputs: their gradients are made by the kernels of each alone.

        All is of the sum, and what it is divided by is taken last, or small numbers were none in 16 bits.
        One branch goes back after the other, and what it needed passes.
        """
        with torch.enable_grad(), operators.autograd_again():
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in call.tensors]
            again = call._replace(tensors=leaves)
            outputs = {side: self.branch(name, again) for side, name in self.distilled.items()}
            there = {side: o.detach() for side, o in outputs.items()}
            found, derived = self._drive_losses(call, problem, "gradients", there)
            del there
            (name,) = self.named_losses
            value, count = _mean(found[name])
            made: list[Tensor | None] = [None] * len(leaves)
            taught = [i for i, x in enumerate(leaves) if x.requires_grad]
            outputs = {side: outputs[side] for side in derived}
            derived = dict(derived)
            for side in [*derived]:
                grad, o = derived.pop(side), outputs.pop(side)
                grad = (
                    grad[0] if problem.packed else _swapped(grad, ("B", "T", "Hq", "Dv"), problem)
                )
                mine = [leaves[i] for i in taught]
                each = [*torch.autograd.grad(o, mine, grad, allow_unused=True)]
                del grad, o
                for i in reversed(taught):
                    more, before = each.pop(), made[i]
                    if more is not None:
                        made[i] = more if before is None else before.add_(more)
        return [value], 1.0 / self._gain / count, made

    @functools.cached_property
    def _gain(self) -> float:
        """What gradients of a loss are times, as kernels leave them."""
        dual = self.spec.loss and self.spec.loss.dual_entropy
        return SLOPE if self.distilled else PULL if dual else 1.0

    @functools.cached_property
    def distilled(self) -> Mapping[str, str]:
        """Student and teacher, and the branch that each is; nothing where no branch learns from another."""
        pair = self.spec.loss and self.spec.loss.distill
        return {"student": pair.student, "teacher": pair.teacher} if pair else {}

    def _drive_losses(
        self,
        call: Call,
        problem: Problem,
        of: Literal["values", "gradients"],
        outputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What the driver of losses gives, on what the call brings of selections or on the kernels' own.

        outputs: of branches, beside the call's tensors.
        """
        program = self._loss_program(problem, of)
        where = _batch(call, problem)
        if self.options.check:
            self._check_values(call, problem, where)
        chosen = self.padded_selection(call, problem)
        if program.plan.selection.keys() - chosen.keys():
            named = dict(zip(self.attending.names, call.tensors, strict=True))
            asked = call._replace(
                tensors=[named[name] for name in self.choosing.names], selection=[], levels=""
            )
            own = call._replace(selection=self.select(asked), levels=",".join(self.levels))
            chosen = {**self.padded_selection(own, problem), **chosen}
        call = call._replace(tensors=[*map(_in_rows, call.tensors)])
        self._launches += program.launches
        with running(problem.device):
            tensors = uniform(self.attending, problem, call)
            for side, o in (outputs or {}).items():
                tensors[side] = _rows_of(o, problem)
            return program.driver.losses(tensors, where, program.config, chosen)

    def _loss_program(self, problem: Problem, of: Literal["values", "gradients"]) -> Program:
        """The program of losses for these tensors, compiled once."""
        binding = replace(_binding(problem), aligned=False)
        with self._lock:
            if (binding, of) not in self._losing:
                self._refuse_capture(problem.device)
                _, target, interpret = self._bound(binding)
                heads = (binding.query_heads, binding.kv_heads)
                spec = self.spec.bind(heads=heads, head_dim=(binding.qk, binding.v))
                try:
                    made = self._compiler(
                        spec,
                        target,
                        binding.dtype,
                        interpret=interpret,
                        orders={},
                        losses=of,
                    )
                except PlanError as error:
                    raise PlanError(
                        f"{self.spec.name}: {error.message}",
                        span=error.span,
                        help="`reference_losses` computes it on any device, in plain PyTorch",
                    ) from error
                config, origin = with_caller_s(made, self.options.config, target)
                self._losing[binding, of] = replace(made, config=config, origin=origin)
            return self._losing[binding, of]

    def flops(self, call: Call, work: Work) -> float:
        """Operations of a call as PyTorch counts them; lengths are read where there are numbers."""
        choosing = work == "select"
        problem = self.check(call, self.choosing if choosing else self.attending)
        binding = replace(_binding(problem), device=torch.device("meta"))
        if binding not in self._bound_graphs:
            heads = (binding.query_heads, binding.kv_heads)
            bound = self.spec.bind(heads=heads, head_dim=(binding.qk, binding.v))
            self._bound_graphs[binding] = passes.run(planner.plan(bound))
        brought = [] if choosing or not call.levels else call.levels.split(",")
        return flops.of_call(self._bound_graphs[binding], work, brought, _spans(call, problem))

    def _backward_on_kernels(
        self,
        call: Call,
        known: _Known,
        grads: Sequence[Tensor],
        outputs: Sequence[Tensor],
        wanted: Sequence[bool],
        apart: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The same by kernels; a tensor that only a choice reads has no gradient, which is 0."""
        problem = known.problem
        if problem.empty:
            return [
                _zeros(x) if want else None for x, want in zip(call.tensors, wanted, strict=True)
            ]
        where = _batch(call, problem)
        came = [*call.tensors, *outputs, *grads, *call.selection, *apart]
        last, again = known.last_grads, None
        if last is not None and last.key[2:4] == (where.sizes, len(apart)) and last.like(came):
            again = self.replays.find(last.key)
        if again is None:
            found = self._drive_backward(call, known, grads, outputs, apart, where)
        else:
            assert last is not None
            with running(problem.device):
                found = again([*came, where.table])
            self._launches += last.program.launches
        made: list[Tensor | None] = []
        packed = problem.packed
        for each, x, grad, want in zip(
            self.attending.inputs, call.tensors, found, wanted, strict=True
        ):
            if not want:
                made.append(None)
            elif grad is None:
                made.append(_zeros(x))
            elif packed and each.type.dims[0] == "B":
                made.append(grad[0])
            else:
                made.append(_swapped(grad, each.type.dims, problem).contiguous())
        return made

    def _drive_backward(
        self,
        call: Call,
        known: _Known,
        grads: Sequence[Tensor],
        outputs: Sequence[Tensor],
        apart: Sequence[Tensor],
        where: Batch,
    ) -> Outputs:
        """What the driver of a backward gives, in the order of tensors; of some that do not lie as kernels
        want, they read copies: hooks on what autograd saves may give back others than a forward had.
        """
        problem, packed = known.problem, known.problem.packed
        came = [*call.tensors, *outputs, *grads, *call.selection, *apart]
        call = call._replace(tensors=[*map(_in_rows, call.tensors)])
        program = self._gradient_program(problem, call, apart=bool(apart))
        if program.plan.again and self._aligned(call) and not self._even(call):
            call = self._with_even_queries(call)  # what chooses again is what the forward streamed
            program = self._gradient_program(problem, call, apart=bool(apart))
        self._launches += program.launches
        o, grad_o, apart = _in_rows(outputs[0]), _in_rows(grads[0]), [*map(_in_rows, apart)]
        if program.streams and not _aligned(_rows_of(grad_o, problem)):
            grad_o = grad_o.clone(memory_format=torch.contiguous_format)
        lse, grad_lse = ([x.contiguous() for x in each[1:]] for each in (outputs, grads))
        brought = self.padded_selection(call, problem)
        kept: Sequence[str] = ()
        if apart:
            assert known.apart is not None
            kept = tuple(known.apart.program.plan.apart)
        given = [*call.tensors, o, *lse, grad_o, *grad_lse, *brought.values(), *apart]
        key = ("backward", known, where.sizes, len(apart), *alike.parts(given), alike.even(given))
        if all(x.data_ptr() == y.data_ptr() for x, y in zip(given, came, strict=True)):
            known.last_grads = _Grads(like=alike.Likeness(came), key=key, program=program)

        def arranged(driver: Driver, tensors: Sequence[Tensor], where: Batch) -> Outputs:
            left = iter(tensors)
            found = driver.backward(
                dict(zip(self.attending.names, left, strict=False)),
                where,
                program.config,
                o=next(left),
                lse=dict(zip(self.branches, left, strict=False)),
                grad_o=next(left),
                grad_lse=dict(zip(self.branches, left, strict=False)),
                selection=dict(zip(brought, left, strict=False)),
                **({"apart": dict(zip(kept, left, strict=True))} if kept else {}),
            )
            return [found.get(name) for name in self.attending.names]

        with running(problem.device):
            again = self.replays.find(key)
            if again is not None:
                found = again([*given, where.table])
            else:
                views = [*_views(self.attending, problem, call.tensors).values()]
                for rows, each in ((o, lse), (grad_o, grad_lse)):
                    views.append(_rows_of(rows, problem))
                    views += [x.unsqueeze(0) if packed else x for x in each]
                views += [*brought.values(), *apart]
                found = self.replays.drive(key, program.driver, arranged, views, where)
        return found

    def _look_up_gradients(self, call: Call) -> _Known:
        """What is known about gradients of calls like this one; a new one is checked."""
        signature = _signature("backward", call)
        known = self._known.get(signature)
        if known is None:
            self.check_differentiable(call)
            problem = self.check(call, self.attending)
            new = _Known(problem=problem, expected=self.attending, choice=None)
            known = self._remember(signature, new)
        return known

    def _gradient_program(self, problem: Problem, call: Call, *, apart: bool) -> Program:
        """The program of gradients for these tensors, and the configuration of calls as large as this one."""
        even = self._aligned(call) and self._even(call)
        binding = replace(_binding(problem), aligned=even, apart=apart)
        bucket = _bucket(problem, call)
        with self._lock:
            if (binding, bucket) not in self._gradients:
                self._refuse_capture(problem.device)
                made = self._choose_gradients(binding, bucket)
                if again := made.plan.again:
                    own = self._choice(problem, call)
                    made = _choosing_as(made, own, again)
                self._gradients[binding, bucket] = made
            return self._gradients[binding, bucket]

    def _even(self, call: Call) -> bool:
        """Whether queries can come in a stream too, as they do where dk and dv are made."""
        return _aligned(call.tensors[self.attending.names.index("q")])

    def _with_even_queries(self, call: Call) -> Call:
        """The same call, whose queries lie so in a copy."""
        at = self.attending.names.index("q")
        q = call.tensors[at].clone(memory_format=torch.contiguous_format)
        return call._replace(tensors=[*call.tensors[:at], q, *call.tensors[at + 1 :]])

    def _choose_gradients(self, binding: Binding, bucket: tuned.Bucket) -> Program:
        """Look up what is tuned, and compile once for all sizes."""
        spec, target, interpret = self._bound(binding)
        if binding not in self._differentiated:
            self._differentiated[binding] = self._compiler(
                spec,
                target,
                binding.dtype,
                interpret=interpret,
                orders={},
                backward=True,
                apart=binding.apart,
            )
        made = self._differentiated[binding]

        def compiled_with(orders: Mapping[str, Order]) -> tuned.Compiled:
            if orders:  # of a record that somebody wrote by hand
                raise ArgumentError(f"orders: expected none of gradients, got {dict(orders)}")
            return tuned.Compiled(plan=made.plan, target=target, texts=made.texts)

        found = tuned.look_up(
            tuned.Problem.of(spec, PLANNED[binding.dtype], "gradients"),
            bucket,
            tuned.environment(target, interpreted=interpret),
            compiled_with,
        )
        self.tell(found, interpret=interpret)
        choice = _chosen(made, found, self.options.config, target)
        return replace(made, config=choice.config, origin=choice.origin)

    @staticmethod
    def tell(found: tuned.Found, *, interpret: bool) -> None:
        """Say what a call lacks that could be measured, or refuse it."""
        if paths.requires_tuned():
            found.require()
        if not interpret:
            found.tell()

    def check_names(
        self, mine: Iterable[str], spec: Spec, target: Target, dtype: torch.dtype
    ) -> None:
        """Raise where a caller's configuration is of a kernel that no call of a spec has.

        mine: Those of a program that was compiled; only for other names others are planned.
        """
        if self.options.config.keys() <= {*mine}:
            return
        names = dict.fromkeys((*mine, *self._other_kernels(spec, target, PLANNED[dtype])))
        for name in self.options.config:
            if name not in names:
                raise ArgumentError(f"config: expected one of {', '.join(names)}, got {name!r}")

    def _other_kernels(self, spec: Spec, target: Target, dtype: DType) -> list[str]:
        """The names of the kernels of a spec's calls, as far as it has such calls: plain in every order,
        that autograd records, gradients, chunks behind a cache, and steps.
        """
        graph = passes.run(planner.plan(spec))
        lacking = any(backward.lacking(graph, node) for node in graph.nodes())
        branches = [x.op.branch for x in graph.nodes() if isinstance(x.op, Attend)]
        each_order: list[dict[str, Order]] = [{}]
        each_order += [{branch: order} for branch in branches for order in get_args(Order)]
        plans: list[Callable[[], Plan]] = []
        for apart in (False, True) if self.keeps and not lacking else (False,):
            plans += [partial(schedule, graph, target, dtype, x, apart=apart) for x in each_order]
            if not lacking:
                plans.append(partial(backward.plan, graph, target, dtype, apart=apart))
        plans.append(partial(schedule, graph, target, dtype, cached=Cached(rows="many")))
        if self.named_losses:
            bound = self.spec.bind(heads=spec.heads, head_dim=spec.head_dim)
            losing = passes.run(planner.plan(bound))
            plans.append(partial(losses.plan, losing, target, dtype, gradients=True))
        names = [kernel.name for plan in plans for kernel in _kernels(plan)]
        steps = _kernels(partial(schedule, graph, target, dtype, cached=Cached(rows="few")))
        return [*names, *(x.name for x in steps), *(f"{STEP}{x.name}" for x in steps)]

    # --- checking

    def check(self, call: Call, expected: Expected, *, meant: bool = False) -> Problem:
        """Everything about a call but its values; `meant`: for the reference, whose dtype is free."""
        tensors = dict(zip(expected.names, call.tensors, strict=True))
        lengths = _lengths(call)
        problem = arguments.check_tensors(
            expected, tensors, layout=call.layout, packed=lengths.packed, meant=meant
        )
        if not meant and self.options.dtype not in (None, problem.dtype):
            wanted = arguments.SHORT_NAMES.get(self.options.dtype, str(self.options.dtype))
            got = arguments.SHORT_NAMES[problem.dtype]
            raise ArgumentError(f"q: expected {wanted}, as load_kernel was told, got {got}")
        arguments.check_lengths(lengths, problem)
        if (tiling := tiling_of(self.graph)) is not None:
            arguments.check_places(tiling.places, problem)
        arguments.check_selections(expected, problem, brought(call))
        return problem

    def _look_up(self, what: str, expected: Expected, call: Call, slot: str = "") -> _Known:
        """What is known about a call like this one; a new one is checked, and compiled for.

        slot: Where calls of a loop that are alike find each other, if not by what is called.
        """
        self._calls += 1
        slot = slot or what
        known = self._last.get(slot)
        if known is None or not known.like[slot](call):
            known = self._look_up_signature(what, expected, call)
            if slot not in known.like:
                known.like[slot] = _Like(call)
            self._last[slot] = known
        elif (call.first, call.length, call.max_seqlen_k) != (None, None, None):
            arguments.check_lengths(_lengths(call), known.problem)
        if not known.ran:
            self._refuse_capture(known.problem.device)
        return known

    def _look_up_signature(self, what: str, expected: Expected, call: Call) -> _Known:
        """The same by all that the call is."""
        signature = _signature(what, call)
        known = self._known.get(signature)
        if known is None:
            problem = self.check(call, expected)
            on_kernels = self._on_kernels(problem.device)
            choice = self._choice(problem, call) if on_kernels else None
            new = _Known(problem=problem, expected=expected, choice=choice)
            known = self._remember(signature, new)
        elif (call.first, call.length, call.max_seqlen_k) != (None, None, None):
            arguments.check_lengths(_lengths(call), known.problem)
        return known

    def accept(self, call: Call) -> None:
        """Check a call that something else will run, but for values; once for each signature.

        Raises:
            ArgumentError: argument, expected and got.
        """
        signature = _signature("accept", call)
        known = self._known.get(signature)
        if known is None:
            problem = self.check(call, self.attending)
            new = _Known(problem=problem, expected=self.attending, choice=None)
            known = self._remember(signature, new)
        elif (call.first, call.length, call.max_seqlen_k) != (None, None, None):
            arguments.check_lengths(_lengths(call), known.problem)

    def _remember(self, signature: tuple[object, ...], known: _Known) -> _Known:
        """What is known of calls with a signature; the first of several threads to say so."""
        with self._lock:
            if len(self._known) >= KNOWN_CALLS:
                self._known.clear()
            return self._known.setdefault(signature, known)

    def _check_values(self, call: Call, problem: Problem, where: Batch) -> None:
        """Lengths and indices themselves; waits for the device."""
        arguments.check_values(_lengths(call), where, problem)
        if (tiling := tiling_of(self.graph)) is not None:
            arguments.check_packed_places(tiling.places, where)
        for level, indices in brought(call):
            stride = self.spec.level(level).partition.stride
            arguments.check_selection_values(
                level, indices, where, stride=stride, tiling=tiling_of(self.graph)
            )

    def _refuse_capture(self, device: torch.device) -> None:
        """A first call compiles, which would spoil a CUDA graph that is being captured."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise HsgenError(
                f"{self.spec.name}: a CUDA graph is being captured, and tensors of these shapes, "
                "strides and dtype have never run",
                help="call warmup(...) with the same arguments before the capture",
            )

    # --- programs

    def _on_kernels(self, device: torch.device) -> bool:
        match device.type:
            case "cuda":
                return True
            case "cpu" | "meta":
                return self.options.interpret
            case kind:
                raise ArgumentError(f"q: expected a cuda or cpu tensor, got one on {kind}")

    def _choice(self, problem: Problem, call: Call) -> Choice:
        """The program for these tensors, and the configuration of calls as large as this one.

        Chosen and compiled once, by whoever asks first; the others wait.
        """
        binding = replace(_binding(problem), aligned=self._aligned(call))
        bucket = _bucket(problem, call)
        with self._lock:
            if (binding, bucket) not in self._choices:
                self._refuse_capture(problem.device)
                self._choices[binding, bucket] = self._choose(binding, bucket)
            return self._choices[binding, bucket]

    def _apart(self, problem: Problem, call: Call, choice: Choice) -> Choice:
        """As what was chosen, whose configurations it takes over, but gated branches keep their outputs."""
        orders = tuple(sorted(choice.orders.items()))
        aligned = self._aligned(call)
        binding = replace(_binding(problem), aligned=aligned, orders=orders, apart=True)
        with self._lock:
            if binding not in self._programs:
                self._refuse_capture(problem.device)
                spec, target, interpret = self._bound(binding)
                self._programs[binding] = self._compiler(
                    spec,
                    target,
                    binding.dtype,
                    interpret=interpret,
                    orders=choice.orders,
                    apart=True,
                )
            program = self._programs[binding]
        given = {n: x for n, x in self.options.config.items() if n not in choice.config}
        known = {**choice.config, **given}
        config = {name: {**x, **known.get(name, {})} for name, x in program.config.items()}
        _refuse_values(program, config, given, self._bound(binding)[1])
        told = {**choice.origin, **dict.fromkeys(given, "caller")}
        origin = {name: told.get(name, x) for name, x in program.origin.items()}
        made = replace(choice, program=program, config=config, origin=origin)
        with self._lock:
            self._recorded[binding, _bucket(problem, call)] = made
        return made

    @functools.cached_property
    def chooses_again(self) -> bool:
        """Whether gradients need no lists of rows of a call that chose for itself."""
        return backward.chooses_again(self.graph)

    @functools.cached_property
    def gated(self) -> bool:
        """Whether gates weigh branches."""
        return combining.gates(self.graph) is not None

    @property
    def keeps(self) -> bool:
        """Whether a call that autograd records keeps outputs of branches, of which delta is made."""
        return self.gated and not self.options.recompute

    def _aligned(self, call: Call) -> bool:
        """Whether keys and values, of as many rows as there are tokens, can come in a stream."""
        of_all = len(call.tensors) == len(self.attending.names)
        names = (self.attending if of_all else self.choosing).names
        return aligned(self.graph, dict(zip(names, call.tensors, strict=True)))

    def _choose(self, binding: Binding, bucket: tuned.Bucket) -> Choice:
        """Look up what is tuned; the orders of a record decide the program."""
        spec, target, interpret = self._bound(binding)

        def program(orders: Mapping[str, Order]) -> Program:
            ordered = replace(binding, orders=tuple(sorted(orders.items())))
            if ordered not in self._programs:
                self._programs[ordered] = self._compiler(
                    spec, target, binding.dtype, interpret=interpret, orders=orders
                )
            return self._programs[ordered]

        def compiled(orders: Mapping[str, Order]) -> tuned.Compiled:
            made = program(orders)
            return tuned.Compiled(plan=made.plan, target=target, texts=made.texts)

        found = tuned.look_up(
            tuned.Problem.of(spec, PLANNED[binding.dtype]),
            bucket,
            tuned.environment(target, interpreted=interpret),
            compiled,
        )
        self.tell(found, interpret=interpret)
        made = program(found.orders)
        self.check_names(made.config, spec, target, binding.dtype)
        return _chosen(made, found, self.options.config, target)

    @functools.cached_property
    def _without_losses(self) -> Spec:
        return planner.without_losses(self.spec)

    def _bound(self, binding: Binding) -> tuple[Spec, Target, bool]:
        """The spec of a program, its GPU as far as it is for these tensors, and whether it is interpreted."""
        spec = self._without_losses.bind(
            heads=(binding.query_heads, binding.kv_heads), head_dim=(binding.qk, binding.v)
        )
        interpret = binding.device.type != "cuda"
        target = self.options.target
        if target is None and not interpret:
            target = Target.current(binding.device.index)
        target = target or Target.named(INTERPRETED_TARGET)
        if interpret or not binding.aligned:
            target = replace(target, streams=False)
        return spec, target, interpret

    def _done(self, known: _Known, program: Program, outputs: list[Tensor]) -> list[Tensor]:
        """Remember that kernels ran."""
        if not known.ran:
            known.bytes = sum(each.nbytes for each in outputs)
            known.ran = True
        self._launches += program.launches
        self._bytes += known.bytes
        return outputs

    # --- the reference

    def result(
        self, call: Call, problem: Problem, dtype: torch.dtype, expected: Expected
    ) -> Result:
        """What the reference makes of a call; tensors that only attending needs may be absent."""
        tensors = dict(zip(expected.names, call.tensors, strict=True))
        given = {
            each.name: _swapped(tensors[each.name], each.type.dims, problem)
            for each in expected.inputs
        }
        sizes = {"Dv": problem.sizes["Dqk"], "Hkv": problem.sizes["Hq"], **problem.sizes}
        for each in self.attending.inputs:
            if each.name not in given:
                dims = each.type.dims[1:] if problem.packed else each.type.dims
                shape = [int(name) if name.isdecimal() else sizes[name] for name in dims]
                given[each.name] = call.tensors[0].new_zeros(()).expand(shape)
        cu = call.cu_seqlens_q
        sequences = problem.batch if cu is None else len(cu) - 1
        kv_lens = call.kv_lens
        if kv_lens is not None:
            kv_lens = kv_lens.expand(sequences)
        elif call.length is not None:
            kv_lens = torch.full((sequences,), call.length)
        return reference(
            self.spec,
            given,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            q_offset=call.q_offset if call.q_offset is not None else call.first,
            kv_lens=kv_lens,
            selection=dict(brought(call)),
            dtype=dtype,
            keep_scores=False,
        )

    def _from_result(self, call: Call, problem: Problem, result: Result) -> list[Tensor]:
        """A reference's result as the outputs of `forward`."""
        o = result.o.to(problem.dtype).contiguous()
        outputs = [o.transpose(1, 2) if problem.layout == "bhtd" else o]
        outputs += [result.lse[name].to(torch.float32).contiguous() for name in self.branches]
        return outputs + self._lists(call, problem, result, self.chosen(call))

    def _lists(
        self, call: Call, problem: Problem, result: Result, levels: Sequence[str]
    ) -> list[Tensor]:
        """A reference's selections, as wide as the kernels'."""
        found: list[Tensor] = []
        for level in levels:
            chosen = result.selection[level]
            if isinstance(chosen, BitmapSelection):
                chosen = to_list(chosen, width=self._slots(level, call, problem))
            found.append(chosen.indices.contiguous())
        return found

    # --- selections

    def chosen(self, call: Call) -> tuple[str, ...]:
        """Levels that `forward` chooses from itself: a caller's selection replaces choosing whole."""
        return () if call.levels else self.levels

    def _empty_selections(self, call: Call, problem: Problem) -> list[Tensor]:
        """Room for every selection that is made."""
        shapes = [
            (*problem.rows, self._heads(level, problem), self._slots(level, call, problem))
            for level in self.chosen(call)
        ]
        return [call.tensors[0].new_empty(*shape, dtype=torch.int32) for shape in shapes]

    def _slots(self, level: str, call: Call, problem: Problem) -> int:
        """Slots of a row; of a part of the entries, as many as the longest sequence needs."""
        _, width = self.attending.selections[level]
        if isinstance(width, int):
            return width
        if call.cu_seqlens_q is not None:
            most = call.max_seqlen_k
            return width.slots(problem.keys if most is None else min(problem.keys, most))
        return width.slots(problem.keys if call.length is None else call.length)

    def _heads(self, level: str, problem: Problem) -> int:
        name, _ = self.attending.selections[level]
        return int(name) if name.isdecimal() else problem.sizes[name]

    def padded_selection(self, call: Call, problem: Problem) -> dict[str, Tensor]:
        """A caller's indices as wide as the kernels read them, with a batch dimension."""
        found: dict[str, Tensor] = {}
        for level, indices in brought(call):
            width = self.attending.selections[level][1]
            missing = width - indices.shape[-1] if isinstance(width, int) else 0
            wide = F.pad(indices, (0, missing), value=-1) if missing else indices
            found[level] = wide.unsqueeze(0) if problem.packed else wide
        return found


def interpreting() -> bool:
    """Whether triton was imported with its interpreter switched on."""
    return InterpretedFunction is not None and isinstance(cdiv, InterpretedFunction)


def compute_integers_once() -> None:
    """For this process: the interpreter computes them twice, for an assertion that it never raises."""
    builder: Any = interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):  # not in every version
        builder.options = replace(builder.options, sanitize_overflow=False)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the reference computes in, so that its own rounding does not matter."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


# --- what a spec expects


def expected_tensors(spec: Spec, graph: Graph) -> Expected:
    """What a call must bring."""
    selections: dict[str, tuple[str, int | Part]] = {}
    for level, name in graph.outputs.selection.items():
        select = spec.level(level).select
        assert select is not None, f"{level} selects in the graph, not in the spec"
        whole = clusters.slots_of(graph, name) or takes.slots_of(graph, name)
        part = whole or _part(graph[name]) or part_of(graph, graph[name])
        if select.counts_vary and part is None:
            raise PlanError(
                f"level {level}: no kernel selects by {select.rules[0]} yet",
                span=graph[name].span,
                help="hsgen.reference.reference runs it on tensors of any device",
            )
        width = part or spec.width(spec.level(level))
        selections[level] = (graph[name].type.dims[2], width)
    over = {branch.over for branch in spec.attend}
    inputs = tuple(each for each in tensor_inputs(graph) if each.name not in _kept(spec))
    return Expected(
        spec=spec.name,
        inputs=inputs,
        sizes=dict(graph.sizes),
        selections=selections,
        attended=tuple(level for level in selections if level in over),
        brought=spec.brought,
        where=lambda name: _where(spec, name),
        names=tuple(each.name for each in inputs),
    )


def _part(selection: Node) -> Part | None:
    """How long lists are that are brought, of any length up to all entries."""
    op = selection.op
    if not isinstance(op, Recall) or op.width != 0:
        return None
    return Part(units=1 << 30, stride=op.stride, forced=0, counted=True)


def _kept(spec: Spec) -> frozenset[str]:
    """Inputs that are no tensors of their own: they come as `selection`."""
    return frozenset(f"{level}.kept" for level in spec.brought)


def _choosing(expected: Expected, graph: Graph) -> Expected:
    """What `select` must bring: what selections depend on, q, and k for its shape."""
    needed: set[str] = {"q", "k"}
    for name in graph.outputs.selection.values():
        needed |= nx.ancestors(graph.digraph, name)
    inputs = tuple(each for each in expected.inputs if each.name in needed)
    return replace(expected, inputs=inputs, names=tuple(each.name for each in inputs))


def _where(spec: Spec, dimension: str) -> str:
    """Where the spec states a dimension."""
    span = spec.span(*FIELDS[dimension]) if dimension in FIELDS else None
    return f"{span}" if span else ""


# --- one call


def _tensors_of(call: Call) -> list[Tensor]:
    """All of them."""
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.q_offset, call.kv_lens)
    return [*call.tensors, *call.selection, *(x for x in lengths if x is not None)]


def _signature(what: str, call: Call) -> tuple[object, ...]:
    """All that checking a call depends on, and compiling for it; numbers of lengths left out."""
    parts = alike.parts([*call.tensors, *call.selection])
    for optional in (call.cu_seqlens_q, call.cu_seqlens_k, call.q_offset, call.kv_lens):
        if optional is None:
            parts.append(None)
        else:
            parts += (optional.shape, optional.dtype, optional.device)
    count = len(call.tensors)
    return (what, call.layout, call.levels, count, alike.even(call.tensors), *parts)


def aligned(graph: Graph, tensors: Mapping[str, Tensor]) -> bool:
    """Whether keys and values, of as many rows as there are tokens, can come in a stream."""
    dims = {each.name: each.type.dims for each in tensor_inputs(graph)}
    rows = [name for name in tensors if len(dims[name]) > 2 and dims[name][1] == "S"]
    return all(_aligned(tensors[name]) for name in rows)


def _aligned(x: Tensor) -> bool:
    """Whether its rows begin there too."""
    strides = [s for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    even = all(
        s and s * x.element_size() % alike.ALIGNED == 0 for s in strides
    )  # 0: it is broadcast
    return alike.lies_even(x) and even


def _lengths(call: Call) -> Lengths:
    return Lengths(
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_k=call.max_seqlen_k,
        q_offset=call.q_offset if call.q_offset is not None else call.first,
        kv_lens=call.kv_lens if call.kv_lens is not None else call.length,
    )


def _spans(call: Call, problem: Problem) -> list[flops.Span]:
    """The sequences of a call; where lengths are tensors without numbers, as if all keys were there."""
    tensors = (call.cu_seqlens_q, call.cu_seqlens_k, call.kv_lens, call.q_offset)
    there = [each for each in tensors if each is not None]
    if there and not any(isinstance(each, FakeTensor) or each.is_meta for each in there):
        table = _batch(call, problem).table.tolist()
        return [flops.Span(first, rows, keys) for _, _, rows, first, _, keys in table]
    keys = problem.keys if call.length is None else call.length
    first = keys - problem.tokens if call.first is None else call.first
    count = 1 if problem.packed else problem.batch
    return [flops.Span(first, problem.tokens, keys)] * count


def _batch(call: Call, problem: Problem) -> Batch:
    """Where the sequences of a call lie."""
    offset = call.q_offset if call.q_offset is not None else call.first
    lens = call.kv_lens if call.kv_lens is not None else call.length
    if call.cu_seqlens_q is None:
        return batch.dense(
            problem.batch,
            problem.tokens,
            problem.keys,
            problem.device,
            q_offset=offset,
            kv_lens=lens,
        )
    cu_seqlens_k = call.cu_seqlens_q if call.cu_seqlens_k is None else call.cu_seqlens_k
    return batch.packed(
        call.cu_seqlens_q,
        cu_seqlens_k,
        problem.tokens,
        problem.keys,
        max_seqlen_k=call.max_seqlen_k,
        q_offset=offset,
        kv_lens=lens,
    )


def brought(call: Call) -> list[tuple[str, Tensor]]:
    """The caller's indices by level."""
    if not call.selection:
        return []
    return list(zip(call.levels.split(","), call.selection, strict=True))


def _no_branch(name: str, call: Call) -> Tensor:  # noqa: ARG001
    raise AssertionError(f"branch {name}: nobody has kernels of it")


def uniform(expected: Expected, problem: Problem, call: Call) -> dict[str, Tensor]:
    """Tensors by name as [B, T, H, D], all of them views."""
    return _views(expected, problem, call.tensors)


def _views(expected: Expected, problem: Problem, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same of a call's tensors."""
    if problem.layout == "bthd" and not problem.packed:
        return dict(zip(expected.names, tensors, strict=True))
    found: dict[str, Tensor] = {}
    for each, tensor in zip(expected.inputs, tensors, strict=True):
        view = _swapped(tensor, each.type.dims, problem)
        lift = problem.packed and each.type.dims[0] == "B"
        found[each.name] = view.unsqueeze(0) if lift else view
    return found


def _in_rows(x: Tensor) -> Tensor:
    """A tensor whose last stride is 1, as kernels read it: of a gradient that is one number, say, a copy."""
    by_rows = not x.ndim or x.stride(-1) == 1 or x.shape[-1] <= 1
    return x if by_rows else x.contiguous()


def _rows_of(o: Tensor, problem: Problem) -> Tensor:
    """An output, or its gradient, as [B, T, H, D]."""
    if problem.packed:
        return o.unsqueeze(0)
    return o.transpose(1, 2) if problem.layout == "bhtd" else o


def _binding(problem: Problem) -> Binding:
    """What a call's program is compiled for, orders apart."""
    sizes = problem.sizes
    return Binding(
        query_heads=sizes["Hq"],
        kv_heads=sizes["Hkv"],
        qk=sizes["Dqk"],
        v=sizes.get("Dv", sizes["Dqk"]),  # choosing reads no values
        dtype=problem.dtype,
        device=problem.device,
    )


def _bucket(problem: Problem, call: Call) -> tuned.Bucket:
    """How large a call is, as records count."""
    cu = call.cu_seqlens_q
    sequences = problem.batch if cu is None else len(cu) - 1
    rows = problem.batch * problem.tokens
    return tuned.Bucket.of(rows, problem.keys, sequences, problem.packed)


def _as_asked(outputs: list[Tensor], problem: Problem) -> list[Tensor]:
    """Outputs of a driver in the caller's layout."""
    # `.data`: an output is nobody's view, or writing to it in place would be refused
    if problem.packed:
        return [each[0].data for each in outputs]
    if problem.layout == "bhtd" and outputs[0].is_floating_point():
        outputs[0] = outputs[0].transpose(1, 2).data
    return outputs


def _swapped(tensor: Tensor, dims: tuple[str, ...], problem: Problem) -> Tensor:
    """Undo `layout="bhtd"`."""
    swap = problem.layout == "bhtd" and len(dims) == 4 and dims[0] == "B"
    return tensor.transpose(1, 2) if swap else tensor


def _whole(grads: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of o and log-sum-exps, 0 where there is none; log-sum-exps, which are alike, share it."""
    absent = [number for number, grad in enumerate(grads) if grad is None]
    zeros = {number: _zeros(outputs[number]) for number in absent[:1] if number == 0}
    if absent and absent[-1]:
        zeros |= dict.fromkeys(absent[bool(zeros) :], _zeros(outputs[absent[-1]]))
    return [zeros[number] if grad is None else grad for number, grad in enumerate(grads)]


def _mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of what rows add, and how many do, at least 1.  f32[rows, 2] -> f32[] each"""
    total, count = rows.sum(0, dtype=torch.float64).unbind()
    count = count.clamp(min=1)
    return (total / count).float(), count.float()


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def _filled(outputs: list[Tensor]) -> list[Tensor]:
    """Outputs where there is nothing to attend to: 0, -inf, -1."""
    outputs[0].zero_() if outputs[0].is_floating_point() else outputs[0].fill_(-1)
    for each in outputs[1:]:
        each.fill_(float("-inf") if each.is_floating_point() else -1)
    return outputs


NO_GUARD = nullcontext()


def running(device: torch.device) -> AbstractContextManager[object]:
    """The guard that kernels run under."""
    if device.type != "cuda":
        return _interpreter_lock
    # what torch.cuda.current_device asks where CUDA is in use
    if torch._C._cuda_getDevice() == device.index:
        return NO_GUARD
    return torch.cuda.device(device)


def _chosen(program: Program, found: tuned.Found, given: Configs, target: Target) -> Choice:
    """What was found, with the caller's configuration where it says something."""
    config, origin = with_caller_s(as_found(program, found), given, target)
    return Choice(program=program, config=config, origin=origin, orders=found.orders)


def as_found(program: Program, found: tuned.Found) -> Program:
    """A program that starts with what was found, kernel by kernel, and says where that is from."""
    config, origin = dict[str, Mapping[str, int]](), dict[str, str]()
    for name, start in program.config.items():
        config[name] = {**start, **found.configs.get(name, {})}
        said = found.origins.get(name, tuned.START)
        start_too = said.startswith(tuned.START)
        origin[name] = said.replace(tuned.START, program.origin[name], 1) if start_too else said
    return replace(program, config=config, origin=origin)


def _choosing_as(program: Program, choice: Choice, kernels: Sequence[str]) -> Program:
    """Gradients whose choices, which they make again, have the configurations of the forward's."""
    for name in kernels:
        mine, forward = program.config[name], choice.config.get(name)
        if forward is None or forward.keys() != mine.keys():
            had = ", ".join(forward) if forward is not None else "no such kernel"
            raise AssertionError(
                f"{name} chooses again: expected the knobs of the forward's, {had}, got {', '.join(mine)}"
            )
    return replace(
        program,
        config={**program.config, **{name: choice.config[name] for name in kernels}},
        origin={**program.origin, **{name: choice.origin[name] for name in kernels}},
    )


def with_caller_s(
    program: Program, given: Configs, target: Target
) -> tuple[Configs, Mapping[str, str]]:
    """A program's configuration with the caller's values, and where each kernel's came from."""
    config = {name: {**x, **given.get(name, {})} for name, x in program.config.items()}
    _refuse_values(program, config, given, target)
    return config, {n: "caller" if n in given else x for n, x in program.origin.items()}


def config_lines(config: Configs, origin: Mapping[str, str], prefix: str = "") -> list[str]:
    """By kernel, its values and where they came from."""
    lines: list[str] = []
    for name, values in config.items():
        text = " ".join(f"{each}={value}" for each, value in values.items())
        lines.append(f"  {prefix}{name}: {text}  ({origin[name]})")
    return lines


def _kernels(plan: Callable[[], Plan]) -> Sequence[PlannedKernel]:
    """Those of a plan; none where a spec has none."""
    try:
        return plan().kernels
    except PlanError:
        return ()


def _refuse_values(program: Program, config: Configs, given: Configs, target: Target) -> None:
    """Refuse a caller's values that a kernel cannot run with, as `knobs.refused` says."""
    for kernel in program.plan.kernels:
        name = kernel.name
        if name in given and (
            wrong := knobs.refused(kernel, given[name], config[name], program.plan, target)
        ):
            raise ArgumentError(f"config: {name}: {wrong}")
    for kernel in program.plan.kernels if given else ():  # a caller may change either of two
        if wrong := knobs.past_a_tile(kernel, config):
            raise ArgumentError(f"config: {kernel.name}: {wrong}")
