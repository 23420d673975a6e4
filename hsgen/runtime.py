"""load_kernel -> Kernel: a spec as a function of tensors, for models.

Compiles on the first call of a kind and never again as lengths change; tunes nothing.  How a call
is carried out is the business of `execution`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from hsgen import (
    analysis,
    arguments,
    build,
    configs,
    gates,
    operators,
    passes,
    paths,
    pipeline,
    planner,
    sharding,
    tuned,
)
from hsgen.arguments import Expected
from hsgen.cache import Cache, Pages, Shape
from hsgen.decoding import Decoding
from hsgen.errors import ArgumentError, HsgenError
from hsgen.execution import (
    PLANNED,
    Binding,
    Compiler,
    Configs,
    Execution,
    Options,
    Program,
    Stats,
    config_lines,
    interpreting,
)
from hsgen.gates import Form, Gate, GateError
from hsgen.gating import Gating
from hsgen.operators import Call
from hsgen.plan import Cached
from hsgen.schedule import Order
from hsgen.selection import ListSelection, Selection
from hsgen.spec import HeadDim, Heads, Spec, load
from hsgen.target import Target

LengthArguments = tuple[
    Tensor | None, Tensor | None, int | None, int | Tensor | None, int | Tensor | None
]


# o, then as asked for: log-sum-exp, one or by branch, and selections by level
Stepped = Tensor | tuple[Tensor | dict[str, Tensor] | dict[str, ListSelection], ...]


def load_kernel(
    spec: str | Path | Spec,
    *,
    heads: Heads | tuple[int, int] | None = None,
    head_dim: HeadDim | tuple[int, int] | int | None = None,
    layer: int | None = None,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    target: Target | str | None = None,
    interpret: bool = False,
    config: Configs | None = None,
    check: bool | None = None,
    recompute: bool = False,
    gate: Gate | Literal["measured"] | None = None,
) -> Kernel:
    """Load a spec as a function of tensors.

    The same arguments give the same Kernel, which any number of layers and threads may share.

    Args:
        spec: a path, the name of a shipped spec, or a Spec.
        heads: `Heads` or (query, kv), where the spec leaves them open; else the tensors tell.
        head_dim: `HeadDim`, (qk, v) or one number, likewise.
        layer: number of the layer, from 0, where a route goes by it; None leaves it to the call,
            whose argument `layer` it then is.  Where layers take over whole selections it says
            whether this one chooses, or is called with the `selection` that another one chose.
        step: number of the step, from 0, the same where steps of a layer take over: whether this one
            attends everything, or chooses, or is called with what an earlier one chose.
        dtype: what tensors must have; None takes what comes.
        target: the GPU to compile for; None is the one that the tensors are on.
        interpret: run CPU tensors through the emitted kernels, in Triton's interpreter.
        config: by kernel, what replaces values of the tuned or starting configuration.  Kernels of
            steps behind a cache, whose tiles are of fewer rows than those of the same name in a call,
            take `step.NAME` instead where that is there.
        check: look at the values of lengths and selections too, which waits for the device; None
            asks HSGEN_CHECK.
        recompute: keep nothing of branches under gates for a backward, which then computes again what it
            needs of them, as it does under torch.compile; else each branch's output is kept, in
            float32 where there are several, and a backward is the faster for it.
        gate: what short calls compute instead, dense or flat attention; see `Gate`.  "measured" takes
            what `hsgen gate` found on this GPU for this dtype and these heads, and never gates where
            nothing was found.  None: every call computes what the spec says.

    Raises:
        SpecError: the spec is wrong.
        ArgumentError: heads or head_dim contradict it; a negative layer or step; interpret without
            TRITON_INTERPRET=1.
        GateError: the spec has no form that the gate asks for.
    """
    loaded = spec if isinstance(spec, Spec) else load(spec)
    if interpret and not interpreting():
        raise ArgumentError(
            "interpret: expected TRITON_INTERPRET=1 in the environment when triton is imported",
            help="set it before Python starts: TRITON_INTERPRET=1 python ...",
        )
    options = Options(
        dtype=dtype,
        target=Target.named(target) if isinstance(target, str) else target,
        interpret=interpret,
        config=dict(config or {}),
        check=paths.wants_checks() if check is None else check,
        recompute=recompute,
        gate=_checked_gate(gate),
    )
    bound = loaded.bind(heads=heads, head_dim=head_dim, layer=layer, step=step)
    return _shared(bound, options)


def _checked_gate(gate: object) -> Gate | Literal["measured"] | None:
    """A gate that may gate."""
    if gate is None or gate == Gate():
        return None
    if isinstance(gate, Gate):
        return gate
    if gate == "measured":
        return "measured"
    raise ArgumentError(
        f"gate: expected a Gate, 'measured' or None, got {gate!r}",
        help="hsgen.Gate(dense_below=8192, flat_below=65536)",
    )


def compile_program(
    spec: Spec,
    target: Target,
    dtype: torch.dtype,
    *,
    interpret: bool,
    orders: Mapping[str, Order] | None = None,
    backward: bool = False,
    cached: Cached | None = None,
    apart: bool = False,
    losses: Literal["values", "gradients"] | None = None,
) -> Program:
    """Compile a bound spec for a GPU, or its gradients, and import what was emitted.

    apart: The outputs of gated branches are kept for the gradients.
    losses: Those of the spec instead, or their gradients too.
    """
    build.triton_version()  # refuses one that is too old, before its own errors
    if losses:
        derived = losses == "gradients"
        artifact = pipeline.compile_losses(spec, target, PLANNED[dtype], gradients=derived)
    elif backward:
        artifact = pipeline.compile_backward(spec, target, PLANNED[dtype], apart=apart)
    else:
        artifact = pipeline.compile_spec(spec, target, PLANNED[dtype], orders, cached, apart=apart)
    plan = configs.for_interpreter(artifact.plan) if interpret else artifact.plan
    config = {kernel.name: kernel.config.keywords() for kernel in plan.kernels}
    return Program(
        driver=build.load(artifact.module).driver,
        plan=plan,
        config=config,
        origin=dict.fromkeys(config, "for the interpreter" if interpret else "default"),
        launches=sum(len(step.launches) for step in plan.usual),
        rows_apart=any(step.of == "rows" for step in plan.steps),
        texts=artifact.module.texts,
    )


def _refuse_config(spec: Spec, options: Options) -> None:
    """Refuse values of kernels of branches by themselves, which are their own."""
    if others := options.config.keys() - {"distance_distill"}:
        raise ArgumentError(
            f"config: expected nothing but of distance_distill, got {', '.join(sorted(others))}",
            help=f"load_kernel(spec.stream({spec.attend[0].name!r}), config=...) has that of one branch",
        )


def _part_of(
    kernel: Kernel, call: Call, given: Mapping[str, Tensor], *, chooses: bool = False
) -> Call:
    """Of a call of a spec what a kernel of a part of it needs; given: its tensors by name."""
    expected = kernel._choosing if chooses else kernel._attending
    brought = dict(zip(call.levels.split(","), call.selection, strict=False))
    mine = {level: x for level, x in brought.items() if level in kernel._execution.levels}
    return call._replace(
        tensors=[given[name] for name in expected.names],
        selection=list(mine.values()),
        levels=",".join(mine),
    )


_kernels: dict[str, Kernel] = {}
_kernels_lock = Lock()


def _shared(spec: Spec, options: Options) -> Kernel:
    """The one Kernel of a spec and its options."""
    key = _key(spec, options)
    with _kernels_lock:
        if key not in _kernels:
            _kernels[key] = Kernel(spec, options, key=key, compiler=compile_program)
        return _kernels[key]


def _key(spec: Spec, options: Options) -> str:
    """A name for a spec and its options that is the same in every process."""
    parts = {
        "spec": spec.digest,
        "dtype": str(options.dtype),
        "target": repr(options.target),
        "interpret": options.interpret,
        "check": options.check,
        "recompute": options.recompute,
        "config": {name: dict(values) for name, values in options.config.items()},
        "gate": repr(options.gate),
    }
    text = json.dumps(parts, sort_keys=True)
    return f"{spec.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class Kernel:
    """A sparse attention.  Call it with tensors; one may be shared by layers and threads.

    4-D tensors are [B, T, H, D], or [B, H, T, D] with `layout="bhtd"`; with `cu_seqlens_q` they are
    packed, [total, H, D].  Their last stride is 1, the others are free; none is ever copied.

    With a gate a short call computes another form of the spec, which `reference` then computes too;
    `select`, and calls that bring a selection, never do.  How long a call is, is how many keys its
    longest sequence has as far as the host knows: S, or `kv_lens` if that is a number; packed,
    `max_seqlen_k` or else all keys together.  So a CUDA graph keeps the form that it was captured
    with, and a cache of keys counts by its room.  Dense calls run PyTorch's kernels where these are
    right and fast, else one of ours: with a log-sum-exp, packed, in fp32, with lengths or offsets that
    are tensors, with fewer queries than keys but more than one, or where q and v differ in length.
    """

    def __init__(self, spec: Spec, options: Options, *, key: str, compiler: Compiler) -> None:
        self.spec = spec
        self.graph = passes.run(planner.plan(spec))
        self._key = key
        self._options = options
        self._execution = Execution(spec, self.graph, options, compiler)
        self._attending = self._execution.attending
        self._choosing = self._execution.choosing
        self._known_names = frozenset({*self._attending.names, "k", "v"})
        operators.register(key, self._execution)
        self._decoding = Decoding(self._execution, compile_program)
        self._gating: Gating | None = None
        self._forms: dict[Form, Kernel] = {}
        self._parts: dict[int, Kernel] = {}  # of the heads
        self._apart = spec.combine is not None and spec.combine.streams is not None
        self._streams: dict[str, Kernel] = {}
        if (self._apart or self._execution.distilled) and spec.divisible:
            _refuse_config(spec, options)
            alone = replace(options, gate=None, config={})
            self._streams = {
                each.name: Kernel(
                    spec.stream(each.name), alone, key=f"{key}-{each.name}", compiler=compiler
                )
                for each in spec.attend
            }
            self._execution.branch = self._branch
        several = self._execution.named_losses
        self._teachers = (
            {
                name: Kernel(
                    spec.model_copy(update={"loss": spec.loss.only(name)}),
                    replace(options, gate=None, config={}),
                    key=f"{key}-{name}",
                    compiler=compiler,
                )
                for name in several
            }
            if spec.loss is not None and len(several) > 1
            else {}
        )
        if options.gate is not None:
            made = gates.forms(spec, options.gate)
            self._gating = Gating(spec, options, self._attending, made)
            alone = replace(options, gate=None, config={})  # `config` is of the spec's own kernels
            self._forms = {
                form: Kernel(each, alone, key=f"{key}-{form}", compiler=compiler)
                for form, each in made.items()
            }

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        layout: str = "bthd",
        return_lse: bool = False,
        return_selection: bool = False,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        q_offset: int | Tensor | None = None,
        kv_lens: int | Tensor | None = None,
        selection: Mapping[str, Selection | Tensor] | None = None,
        **tensors: Tensor,
    ) -> Stepped:
        """Attend.

        Args:
            q: [B, T, Hq, Dqk].
            k: [B, S, Hkv, Dqk].
            v: [B, S, Hkv, Dv]; None where a latent key holds it.
            layout: "bthd", or "bhtd": the order of dimensions of every 4-D tensor, o included.
            return_lse: return the log-sum-exp too.
            return_selection: return what was chosen too, by level, as `select` gives it and as `selection`
                of another layer or step takes it; of levels that `selection` brings, what it brings.
            cu_seqlens_q: i32[Z + 1], where each packed document's queries start, and their total.
            cu_seqlens_k: the same of keys; default `cu_seqlens_q`.
            max_seqlen_k: no document has more keys; spares memory if it is known.
            q_offset: position of query row 0, an int or i32[B]; the default puts the last query on
                the last key.
            kv_lens: how many keys there are, an int or i32[B]; default all.
            selection: by level, what to attend to instead of choosing; a must where another layer
                chose.
            **tensors: what else the spec needs: gates, index, learned parameters, own K/V.

        Returns:
            o [B, T, Hq, Dv]; with `return_lse` also f32[B, Hq, T], natural logarithm, one by branch
            where gates combine; with `return_selection` also a dict of selections.

        Raises:
            ArgumentError: argument, expected and got.
        """
        given = {"q": q, "k": k, "v": v, **tensors}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_offset, kv_lens)
        call = self._call(given, self._attending, layout, lengths, selection)
        if self._apart and self._streams and self._execution.on_kernels(q.device):
            return self._first_stream(
                call, return_lse=return_lse, return_selection=return_selection
            )
        if return_selection:
            outputs = self._attended(call, selections=True)
            found = self._returned(outputs, return_lse=return_lse)
            chosen = self._selections(call, outputs)
            return (*found, chosen) if isinstance(found, tuple) else (found, chosen)
        form = self._gating.form(call) if self._gating and selection is None else "own"
        if form == "own":
            return self._attend(call, return_lse=return_lse)
        assert self._gating is not None, "only gates know other forms"
        if not torch.compiler.is_compiling():  # what the form does not read may be wrong too
            self._execution.accept(call)
        if form == "dense" and not return_lse:
            o = self._gating.attend(call)
            if o is not None:
                return o
        return self._forms[form]._attend(self._as(form, call), return_lse=return_lse)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        layout: str = "bthd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        q_offset: int | Tensor | None = None,
        kv_lens: int | Tensor | None = None,
        **tensors: Tensor,
    ) -> dict[str, ListSelection]:
        """Choose without attending; arguments as of a call, but those that choosing needs suffice.

        Returns:
            By level, i32[B, T, Hs, K] in every layout; may be passed back as `selection`.  Of rows that
            choose together each has its block's list, T lists in all: a call that is given none keeps one
            a block.

        Raises:
            ArgumentError: argument, expected and got; another layer chose.
        """
        if taken := self.spec.brought:
            raise ArgumentError(
                f"select: level {taken[0]!r} attends what another layer chose, and chooses nothing",
                help="`select` of that layer's kernel; pass what it returns as `selection`",
            )
        given = {"q": q, "k": k, "v": v, **tensors}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_offset, kv_lens)
        call = self._call(given, self._choosing, layout, lengths, None)
        if self._apart and self._streams and self._execution.on_kernels(q.device):
            return self._chosen_by_streams(call)
        return {
            level: ListSelection(level=level, indices=indices)
            for level, indices in zip(self._execution.levels, self._chosen(call), strict=True)
        }

    def _chosen(self, call: Call) -> Sequence[Tensor]:
        """Selections by level."""
        if not operators.is_watched(call):
            return self._execution.select(call)
        if not sharding.holds(call):
            return operators.select(self._key, *call)
        heads = sharding.head_dims(self.spec)
        mine = sharding.part(call, self._choosing, heads)
        if torch.compiler.is_compiling():
            chosen = operators.select(self._key_of_part(mine.parts), *mine.call)
        else:
            chosen = self.part(mine.parts)._chosen(mine.call)
        packed = call.cu_seqlens_q is not None
        return [
            mine.whole(x, sharding.dims_of_selection(self._choosing, level, packed=packed), heads)
            for level, x in zip(self._execution.levels, chosen, strict=True)
        ]

    def losses(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        layout: str = "bthd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        q_offset: int | Tensor | None = None,
        kv_lens: int | Tensor | None = None,
        selection: Mapping[str, Selection | Tensor] | None = None,
        **tensors: Tensor,
    ) -> dict[str, Tensor]:
        """What the spec tells a training besides outputs, by name, f32[] each; arguments as of a call.

        A training adds each of them, times a weight of its own, to the loss of its model.  Gradients
        reach what the loss teaches, such as the tensors of an index.

        Raises:
            ArgumentError: argument, expected and got; the spec has no loss.
            PlanError: no kernel computes one of them yet.
        """
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_offset, kv_lens)
        call = self._losing({"q": q, "k": k, "v": v, **tensors}, layout, lengths, selection)
        if self._teachers and self._execution.on_kernels(q.device):
            given = dict(zip(self._attending.names, call.tensors, strict=True))
            return {
                name: kernel._taught(_part_of(kernel, call, given))[0]
                for name, kernel in self._teachers.items()
            }
        return dict(zip(self._execution.named_losses, self._taught(call), strict=True))

    def _taught(self, call: Call) -> Sequence[Tensor]:
        """All losses of a call."""
        self._execution.check_taught(call)
        if operators.is_watched(call, casts=False) or not operators.is_recorded(call):
            return operators.losses(self._key, *call)
        return operators.record_losses(self._key, operators.cast(call))

    def reference_losses(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        layout: str = "bthd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        q_offset: int | Tensor | None = None,
        kv_lens: int | Tensor | None = None,
        selection: Mapping[str, Selection | Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        **tensors: Tensor,
    ) -> dict[str, Tensor]:
        """The same in plain PyTorch on any device, computed and returned in `dtype`."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_offset, kv_lens)
        call = self._losing({"q": q, "k": k, "v": v, **tensors}, layout, lengths, selection)
        problem = self._execution.check(call, self._attending, meant=True)
        return dict(self._execution.result(call, problem, dtype, self._attending).loss)

    def _losing(
        self,
        given: Mapping[str, Tensor | None],
        layout: str,
        lengths: LengthArguments,
        selection: Mapping[str, Selection | Tensor] | None,
    ) -> Call:
        """The operator's arguments, of a spec that has a loss."""
        if not self._execution.named_losses:
            raise ArgumentError(
                f"losses: spec {self.spec.name!r} has no loss",
                help="`loss: {kl: {level: NAME}}` says what a level learns from",
            )
        call = self._call(given, self._attending, layout, lengths, selection)
        if sharding.holds(call):
            raise ArgumentError(
                "q: expected plain tensors, as a loss is a mean over rows of a rank, got DTensors"
            )
        return call

    # --- calls with a cache

    def new_cache(
        self,
        batch: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        page: int | None = None,
        pages: Mapping[str, Tensor] | None = None,
        block_table: Tensor | None = None,
    ) -> Cache:
        """An empty cache: keys, values, and the entries of every level, which `decode` and `extend` fill.

        Args:
            batch: sequences.
            capacity: most tokens of a sequence.
            dtype: of what it keeps; default that of `load_kernel`, else bf16 on a GPU, fp32 on a CPU.
            device: default the current GPU, if there is one.
            page: tokens of a page, a power of two; None keeps each sequence in one piece.  Entries of
                levels are kept sequence by sequence all the same.
            pages: by name what the spec keeps of tokens, [N, page, H, D] with any strides but the last:
                the caller's pool, which is written to.  Default a pool of its own.
            block_table: i32[B, M], where the caller's pages of each sequence are, M those of `capacity`.
                It is read at each call, so that pages may be handed out as sequences grow.

        Raises:
            PlanError: a row depends on more than the tokens up to its own, heads are not known, or no
                kernel decodes an operator yet.
            GateError: the kernel has a gate.
        """
        if self._options.gate is not None:
            raise GateError(
                f"{self.spec.name}: a kernel with a gate has no cache, as forms of it keep other tensors",
                help="load_kernel without `gate`",
            )
        if device is None:
            on_cpu = self._options.interpret or not torch.cuda.is_available()
            device = "cpu" if on_cpu else "cuda"
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        usual = torch.float32 if where.type == "cpu" else torch.bfloat16
        if (pages is None) != (block_table is None) or (pages is not None and page is None):
            raise ArgumentError(
                "pages: expected `page` and `block_table` beside them, or none of the two"
            )
        given = None
        if pages is not None and block_table is not None:
            given = Pages(tensors=pages, block_table=block_table)
        return self._decoding.new_cache(
            Shape(
                batch=batch,
                capacity=capacity,
                dtype=dtype or self._options.dtype or usual,
                device=where,
                page=page or 0,
            ),
            given,
        )

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        cache: Cache,
        *,
        layout: str = "bthd",
        return_lse: bool = False,
        return_selection: bool = False,
        new_lens: Tensor | None = None,
        selection: Mapping[str, Selection | Tensor] | None = None,
        **tensors: Tensor,
    ) -> Stepped:
        """Attend with one to eight new tokens of each sequence, which the cache then has.

        Row t of a sequence is what row t of prefill is.  Nothing waits for the device: a CUDA graph that
        has captured a step, after one like it, may be replayed as lengths grow.

        Args:
            q: [B, T, Hq, Dqk].
            k: [B, T, Hkv, Dqk], of the new tokens.
            v: [B, T, Hkv, Dv].
            cache: what `new_cache` made.
            layout: as of a call.
            return_lse: as of a call.
            return_selection: return what each new row chose too, by level, as `selection` takes it.
            new_lens: i32[B], how many of the T tokens each sequence has; default all.  Rows of the
                others are empty.
            selection: as of a call, of the new rows.
            **tensors: what else the spec needs, of the new tokens.

        Raises:
            ArgumentError: argument, expected and got; no room in the cache.
        """
        given = {"q": q, "k": k, "v": v, **tensors}
        returns = (return_lse, return_selection)
        return self._step(given, cache, layout, new_lens, selection, returns, few=True)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        cache: Cache,
        *,
        layout: str = "bthd",
        return_lse: bool = False,
        return_selection: bool = False,
        new_lens: Tensor | None = None,
        selection: Mapping[str, Selection | Tensor] | None = None,
        **tensors: Tensor,
    ) -> Stepped:
        """As `decode`, with any number of new tokens: prefill into a cache, whole or chunk by chunk."""
        given = {"q": q, "k": k, "v": v, **tensors}
        returns = (return_lse, return_selection)
        return self._step(given, cache, layout, new_lens, selection, returns, few=False)

    def _step(
        self,
        given: Mapping[str, Tensor | None],
        cache: Cache,
        layout: str,
        new_lens: Tensor | None,
        selection: Mapping[str, Selection | Tensor] | None,
        returns: tuple[bool, bool],
        *,
        few: bool,
    ) -> Stepped:
        again = None
        if selection is None:
            again = self._decoding.again(given, cache, (few, layout), new_lens, returns)
        if again is None:
            call = Call(layout, *self._given(given, self._attending, selection))
            again = self._decoding.step(call, cache, new_lens, returns, few=few)
        outputs, chosen = again
        return_lse, return_selection = returns
        found = self._returned(outputs, return_lse=return_lse)
        if not return_selection:
            return found
        selections = {
            level: ListSelection(level=level, indices=each) for level, each in chosen.items()
        }
        return (*found, selections) if isinstance(found, tuple) else (found, selections)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        layout: str = "bthd",
        return_lse: bool = False,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        q_offset: int | Tensor | None = None,
        kv_lens: int | Tensor | None = None,
        selection: Mapping[str, Selection | Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        **tensors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Compute what the spec means, in plain PyTorch on any device; arguments as of a call.

        Everything is computed, and returned, in `dtype`.  Differentiable, and slow.
        """
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_offset, kv_lens)
        given = {"q": q, "k": k, "v": v, **tensors}
        call = self._call(given, self._attending, layout, lengths, selection)
        form = self._gating.form(call) if self._gating and selection is None else "own"
        if form != "own":
            self._execution.accept(call)
            return self._forms[form]._meant(self._as(form, call), dtype, return_lse=return_lse)
        return self._meant(call, dtype, return_lse=return_lse)

    def _meant(
        self, call: Call, dtype: torch.dtype, *, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor | dict[str, Tensor]]:
        """What the reference says of a call."""
        problem = self._execution.check(call, self._attending, meant=True)
        result = self._execution.result(call, problem, dtype, self._attending)
        lse = (result.lse[branch] for branch in self._execution.branches)
        o = result.o.transpose(1, 2) if call.layout == "bhtd" else result.o
        return self._returned((o, *lse), return_lse=return_lse)

    def warmup(self, q: Tensor, k: Tensor, v: Tensor | None = None, **keywords: object) -> None:
        """Call once, for what a first call compiles: do it before a CUDA graph is captured.

        Takes the arguments of a call.  Tensors of the same shapes, strides and dtype will then run
        without compiling anything.
        """
        with torch.no_grad():
            self(q, k, v, return_lse=True, **keywords)  # type: ignore[arg-type]  # a call's own
            if self._gating:  # without a log-sum-exp it may run other kernels
                self(q, k, v, **keywords)  # type: ignore[arg-type]
        if self._execution.keeps and torch.is_grad_enabled():  # which autograd may have to know of
            self(q, k, v, return_lse=True, **keywords)  # type: ignore[arg-type]

    # --- what people ask of it

    @property
    def plan(self) -> object:
        """The plan of the program that was compiled last; prints.

        Raises:
            HsgenError: nothing is compiled yet.
        """
        programs = list(self._execution.programs.values())
        if not programs:
            raise HsgenError(
                f"{self.spec.name}: nothing is compiled yet",
                help="the first call on a GPU compiles; `hsgen show` plans without one",
            )
        return programs[-1].plan

    def explain(self) -> str:
        """The graph, then every compiled program: its plan, and by size of the call each kernel's
        config, and where that came from; likewise what autograd records, and the gradients.
        """
        parts = [analysis.describe(self.graph)]
        if self._gating:
            parts.append(self._gating.explain())
        programs = self._execution.programs
        plain, recorded = self._execution.choices, self._execution.recorded
        for binding, program in programs.items():
            parts += [f"compiled for {binding}", str(program.plan)]
            for said, choices in (("", plain), (" that autograd records", recorded)):
                for (_, bucket), choice in choices.items():
                    if choice.program is program:
                        parts.append(f"calls of {bucket}{said}")
                        parts += config_lines(choice.config, choice.origin)
        told = set[Binding]()
        for (binding, bucket), program in self._execution.gradients.items():
            if binding not in told:
                parts += [f"gradients compiled for {binding}", str(program.plan)]
                told.add(binding)
            parts.append(f"gradients of calls of {bucket}")
            parts += config_lines(program.config, program.origin)
        if repeated := self._execution.replays.explain():
            parts += ["repeated calls", *repeated]
        behind = self._decoding.explain()
        if not programs and not behind:
            parts.append("nothing is compiled yet: CPU tensors run the reference")
        parts += behind
        parts += [f"{form} calls\n{kernel.explain()}" for form, kernel in self._forms.items()]
        return "\n".join(part.rstrip("\n") for part in parts) + "\n"

    def chosen(self, bucket: tuned.Bucket) -> dict[str, dict[str, object]]:
        """By kernel, what calls of a size ran with, and where that came from: the record of
        `hsgen tune`, and how near it is to such calls.  Nothing before the first such call.
        """
        found: dict[str, dict[str, object]] = {}
        for (_, size), choice in self._execution.choices.items():
            if size == bucket:
                for name, values in choice.config.items():
                    found[name] = {"origin": choice.origin[name], "config": dict(values)}
        return found

    def stats(self) -> Stats:
        """What was done so far, by all who share this kernel; PyTorch's kernels are not counted."""
        return sum((each.stats() for each in self._forms.values()), self._execution.stats)

    def __repr__(self) -> str:
        return f"Kernel({self._key})"

    def __copy__(self) -> Kernel:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Kernel:
        return self

    def __reduce__(self) -> tuple[Callable[[Spec, Options], Kernel], tuple[Spec, Options]]:
        return _shared, (self.spec, self._options)

    # --- from a caller's arguments to an operator's, in a form that torch.compile traces

    def _call(
        self,
        given: Mapping[str, Tensor | None],
        expected: Expected,
        layout: str,
        lengths: LengthArguments,
        selection: Mapping[str, Selection | Tensor] | None,
    ) -> Call:
        """The operator's arguments; of the tensors only names and types are looked at."""
        tensors, indices, levels = self._given(given, expected, selection)
        cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_offset, kv_lens = lengths
        for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if value is not None and not isinstance(value, Tensor):
                raise ArgumentError(f"{name}: expected int32 [Z + 1], got {type(value).__name__}")
        offset_tensor = isinstance(q_offset, Tensor)
        lens_tensor = isinstance(kv_lens, Tensor)
        return Call(
            layout,
            tensors,
            indices,
            levels,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_k,
            q_offset if offset_tensor else None,
            None if offset_tensor else q_offset,
            kv_lens if lens_tensor else None,
            None if lens_tensor else kv_lens,
        )

    def _given(
        self,
        given: Mapping[str, Tensor | None],
        expected: Expected,
        selection: Mapping[str, Selection | Tensor] | None,
    ) -> tuple[list[Tensor], list[Tensor], str]:
        """Tensors in the order of the spec, indices that the caller brings, and of which levels."""
        tensors: list[Tensor] = []
        for name in expected.names:
            tensor = given.get(name)
            if not isinstance(tensor, Tensor):
                arguments.check_names(expected, given)
                raise ArgumentError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            tensors.append(tensor)
        if not self._known_names.issuperset(given):
            arguments.check_names(self._attending, {**dict.fromkeys(self._known_names, 0), **given})
        if selection is None and not expected.brought:
            return tensors, [], ""
        chosen = arguments.listed_selection(self._attending, selection)
        return tensors, list(chosen.values()), ",".join(chosen)

    def _as(self, form: Form, call: Call) -> Call:
        """The same call of another form, with the tensors that it reads."""
        given = dict(zip(self._attending.names, call.tensors, strict=True))
        names = self._forms[form]._attending.names
        return call._replace(tensors=[given[name] for name in names])

    def _attend(
        self, call: Call, *, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Attend as the spec says, whatever the length."""
        return self._returned(self._attended(call), return_lse=return_lse)

    def _selections(self, call: Call, outputs: Sequence[Tensor]) -> dict[str, ListSelection]:
        """By level, what a call brings, or else what is behind its log-sum-exps."""
        given = dict(zip(call.levels.split(","), call.selection, strict=False))
        found = dict(
            zip(
                self._execution.chosen(call),
                outputs[1 + len(self._execution.branches) :],
                strict=True,
            )
        )
        return {
            level: ListSelection(level=level, indices=indices)
            for level, indices in (given | found).items()
        }

    def _attended(self, call: Call, *, selections: bool = False) -> Sequence[Tensor]:
        """o, each log-sum-exp, and selections by level if they are asked for; else they may follow."""
        if not operators.is_watched(call):
            if operators.is_recorded(call):
                return operators.record(self._key, call, selections=selections)
            return self._execution.forward(call, selections=selections)
        if not sharding.holds(call):
            return operators.forward(self._key, *call, selections)
        heads = sharding.head_dims(self.spec)
        mine = sharding.part(call, self._attending, heads)
        if torch.compiler.is_compiling():
            o, *others = operators.forward(self._key_of_part(mine.parts), *mine.call, selections)
        else:
            o, *others = self.part(mine.parts)._attended(mine.call, selections=selections)
        packed = call.cu_seqlens_q is not None
        dims = arguments.dims_of_caller(("B", "T", "Hq", "Dv"), call.layout, packed=packed)
        of_lse = ("Hq", "T") if packed else ("B", "Hq", "T")
        count = len(self._execution.branches)
        found = [
            mine.whole(o, dims, heads),
            *(mine.whole(x, of_lse, heads) for x in others[:count]),
        ]
        if selections:
            levels = self._execution.chosen(call)
            for level, x in zip(levels, others[count:], strict=True):
                dims = sharding.dims_of_selection(self._attending, level, packed=packed)
                found.append(mine.whole(x, dims, heads))
        return found

    # --- branches apart

    def stream(self, branch: str) -> Kernel:
        """The kernel of one branch by itself, with all that a kernel has: gradients, a cache, its levels.

        Its `gates` are the branch's own column, gates[..., i : i + 1]; where there is one a channel,
        gates[..., i : i + 1, :].

        Raises:
            ArgumentError: no such branch, or branches that are not apart.
        """
        if branch not in self._streams:
            self.spec.stream(branch)
            raise ArgumentError(
                f"stream: expected a spec whose branches are apart, got {self.spec.name!r}",
                help="write 'combine: {gates: input, streams: branches}'",
            )
        return self._streams[branch]

    def _alone(self, branch: str, call: Call, *, chooses: bool = False) -> tuple[Kernel, Call]:
        """The kernel of a branch, and its own part of a call."""
        kernel = self._streams[branch]
        names = self._choosing.names if chooses else self._attending.names
        given = dict(zip(names, call.tensors, strict=True))
        column = [x.name for x in self.spec.attend].index(branch)
        if "gates" in given:
            combine = self.spec.combine
            by_channel = combine is not None and combine.gates == "channel"
            given["gates"] = given["gates"].narrow(-2 if by_channel else -1, column, 1)
        return kernel, _part_of(kernel, call, given, chooses=chooses)

    def _branch(self, branch: str, call: Call) -> Tensor:
        kernel, mine = self._alone(branch, call)
        return kernel._attended(mine)[0]

    def _first_stream(self, call: Call, *, return_lse: bool, return_selection: bool) -> Stepped:
        """The output of the first branch, each one's log-sum-exp, and what each chose."""
        if not torch.compiler.is_compiling():
            self._execution.accept(call)
        first, made = self.spec.attend[0].name, dict[str, Sequence[Tensor]]()
        chosen: dict[str, ListSelection] = {}
        for name, kernel in self._streams.items():
            chooses = return_selection and bool(kernel._execution.levels)
            if name == first or return_lse or chooses:
                _, mine = self._alone(name, call)
                made[name] = kernel._attended(mine, selections=chooses)
                chosen |= kernel._selections(mine, made[name]) if chooses else {}
        o, lse = made[first][0], {name: outputs[1] for name, outputs in made.items()}
        more = (*((lse,) if return_lse else ()), *((chosen,) if return_selection else ()))
        return (o, *more) if more else o

    def _chosen_by_streams(self, call: Call) -> dict[str, ListSelection]:
        """What branches choose, each by its own levels."""
        found: dict[str, ListSelection] = {}
        for branch in self.spec.attend:
            if self._streams[branch.name]._execution.levels:
                kernel, mine = self._alone(branch.name, call, chooses=True)
                chosen = kernel._chosen(mine)
                levels = kernel._execution.levels
                pairs = zip(levels, chosen, strict=True)
                found |= {name: ListSelection(level=name, indices=x) for name, x in pairs}
        return found

    def part(self, parts: int) -> Kernel:
        """The kernel of one of so many equal parts of the heads, for a rank that has plain tensors of its
        own heads; of DTensors every kernel knows it.

        Raises:
            ArgumentError: so many parts have no key head each.
            PlanError: heads agree across key heads, or something is said of each head by its number.
        """
        if parts not in self._parts:
            spec = sharding.of_part(self.spec, self.graph, parts)
            self._parts[parts] = self if spec is self.spec else _shared(spec, self._options)
        return self._parts[parts]

    def _key_of_part(self, parts: int) -> str:
        """The key of that kernel, which then exists: all that a compiled model needs of it."""
        return self.part(parts)._key

    # What torch.compiler.assume_constant_result does, but for loading the compiler, which takes seconds.
    _key_of_part._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _returned(
        self, outputs: Sequence[Tensor], *, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor | dict[str, Tensor]]:
        """What a caller gets of o and the log-sum-exps."""
        if not return_lse:
            return outputs[0]
        if len(self._execution.branches) == 1:
            return outputs[0], outputs[1]
        return outputs[0], dict(zip(self._execution.branches, outputs[1:], strict=False))
