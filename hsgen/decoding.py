"""Calls behind a cache: new tokens go into it, and their rows attend to all that is there.

A few rows of each sequence are shared by programs key by key, many are tiled as in prefill; both choose from
the entries that the cache keeps.  On CPU tensors the reference runs, which keeps no entries and pools again.
Compiles a program on the first call of its kind; never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from hsgen import alike, arguments, configs, plan, replay, tuned
from hsgen.arguments import SHORT_NAMES, Problem
from hsgen.batch import Batch
from hsgen.cache import FEW, Cache, Pages, Shape
from hsgen.configs import Sizes
from hsgen.errors import ArgumentError, HsgenError
from hsgen.execution import (
    KNOWN_CALLS,
    NO_GUARD,
    PLANNED,
    STEP,
    Configs,
    Execution,
    Program,
    as_found,
    config_lines,
    exact_dtype,
    running,
    uniform,
    with_caller_s,
)
from hsgen.knobs import OF_PARTS, OF_ROWS
from hsgen.operators import Call
from hsgen.plan import Plan
from hsgen.replay import Outputs, Replay, Replays
from hsgen.schedule import Order
from hsgen.spec import Spec
from hsgen.storage import Storage, storage_of
from hsgen.target import Target

MOST_PAGE = 1024  # tokens
INTERPRETED_TARGET = "h100"


class CachedCompiler(Protocol):
    """Makes the program of a spec behind a cache."""

    def __call__(
        self,
        spec: Spec,
        target: Target,
        dtype: torch.dtype,
        *,
        interpret: bool,
        cached: plan.Cached,
    ) -> Program: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A program with the configuration of calls of so many rows, and where that came from, by kernel."""

    program: Program
    config: Configs
    origin: Mapping[str, str]


@dataclass(slots=True, kw_only=True, eq=False)
class _Known:
    """A signature that was checked: what it says, and levels whose choice its driver gives."""

    problem: Problem
    take: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # the call's tensors of those that came
    count: int  # of names that came
    said: tuple[Any, ...]  # what is not said of tensors
    like: alike.Likeness  # of tensors, the cache's too, which may lie otherwise to 16 bytes
    requires_grad: bool
    on_kernels: bool
    device: torch.device
    repeats: bool  # that a step like it may be made again without a look at anything else
    plain: bool  # that outputs are returned as kernels give them
    levels: tuple[str, ...] = ()
    again: Replay | None = None  # of tensors that all begin at 16 bytes

    def even(self, addresses: Sequence[int]) -> bool | tuple[bool, ...]:
        """Steps are recorded alike where tensors begin at 16 bytes, or the same ones do not."""
        return alike.even_at(addresses) if self.device.type == "cuda" else True


class Decoding:
    """Calls of one spec with caches."""

    def __init__(self, execution: Execution, compiler: CachedCompiler) -> None:
        self._execution = execution
        self._compiler = compiler
        self._digest = execution.spec.digest
        self._lock = RLock()
        self._programs: dict[tuple[torch.dtype, torch.device, int, str], Program] = {}
        self._ready: dict[tuple[Any, ...], Ready] = {}
        self._known: dict[tuple[object, ...], _Known] = {}
        self._last: _Known | None = None
        self.replays = Replays()

    @cached_property
    def storage(self) -> Storage:
        """What a cache keeps.

        Raises:
            PlanError: no cache can keep it, and why.
        """
        return storage_of(self._execution.graph)

    @property
    def programs(self) -> Mapping[tuple[torch.dtype, torch.device, int, str], Program]:
        """What was compiled so far, oldest first: by dtype, device, page, and few or many rows."""
        with self._lock:
            return dict(self._programs)

    @property
    def ready(self) -> Mapping[tuple[Any, ...], Ready]:
        """What steps and chunks ran with so far; a key ends with most tokens, capacity and sequences."""
        with self._lock:
            return dict(self._ready)

    def explain(self) -> list[str]:
        """Every program behind a cache, its plan, and what its kernels run with."""
        found: list[str] = []
        for (dtype, device, page, kind), program in self.programs.items():
            pages = f", pages of {page}" if page else ""
            what = "steps" if kind == "few" else "chunks of prefill"
            found += [
                f"{what} behind a cache, {SHORT_NAMES[dtype]}, {device}{pages}",
                str(program.plan),
            ]
            for (*_, rows, longest, batch), ready in self.ready.items():
                if ready.program is program:
                    size = f" of up to {rows} tokens, {batch} x {longest}" if kind == "few" else ""
                    found.append(f"{what}{size}")
                    prefix = STEP if kind == "few" else ""
                    found += config_lines(ready.config, ready.origin, prefix)
        if repeated := self.replays.explain():
            found += ["repeated calls behind a cache", *repeated]
        return found

    def new_cache(self, shape: Shape, pages: Pages | None = None) -> Cache:
        """An empty cache.

        Raises:
            PlanError: the spec has none, or no kernel decodes it.
            ArgumentError: a size that is none, or a dtype that kernels do not have.
        """
        for name in ("batch", "capacity"):
            value = getattr(shape, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: expected an int of at least 1, got {value!r}")
        if shape.page and (shape.page != configs.next_power(shape.page) or shape.page > MOST_PAGE):
            raise ArgumentError(
                f"page: expected a power of two up to {MOST_PAGE}, got {shape.page}"
            )
        kernels = self._on_kernels(shape.device)
        allowed = arguments.DTYPES if kernels else arguments.REFERENCE_DTYPES
        if shape.dtype not in allowed:
            names = ", ".join(SHORT_NAMES[dtype] for dtype in allowed)
            raise ArgumentError(f"dtype: expected one of {names}, got {shape.dtype}")
        storage = self.storage
        if kernels:  # what no kernel does is said here, not at the first token
            self._program(shape, "few")
        else:
            storage = replace(storage, levels=())
        return Cache(self._execution.spec, storage, shape, self, pages)

    # --- calls

    def append(
        self, cache: Cache, tensors: Mapping[str, Tensor | None], new_lens: Tensor | None
    ) -> None:
        """Put new tokens into a cache, without attending."""
        names = [x.name for x in cache.storage.streams]
        learned = [x for x in self._execution.attending.inputs if x.name in self._pooling]
        wanted = [*names, *(x.name for x in learned)]
        given: dict[str, Tensor] = {}
        for name in wanted:
            value = tensors.get(name)
            if not isinstance(value, Tensor):
                raise ArgumentError(f"{name}: expected a tensor, got {type(value).__name__}")
            given[name] = value
        if extra := [x for x, value in tensors.items() if x not in wanted and value is not None]:
            raise ArgumentError(
                f"{extra[0]}: no cache of spec {self._execution.spec.name!r} keeps such a tensor",
                help=f"tensors here: {', '.join(wanted)}",
            )
        tokens = given[names[0]].shape[1] if given[names[0]].ndim > 1 else 0
        self._check_streams(cache, given, tokens)
        self._write(cache, given, tokens, new_lens, few=tokens <= FEW)

    def again(
        self,
        given: Mapping[str, Tensor | None],
        cache: Cache,
        how: tuple[bool, str],
        new_lens: Tensor | None,
        returns: tuple[bool, bool],
    ) -> tuple[list[Tensor], dict[str, Tensor]] | None:
        """As `step` of a call without a selection, where it lies as the last step did and that was recorded.

        None where it is not so, whatever is wrong: `step` says that.  Asks no more than must be asked anew,
        and calls as little as it can: this is all that the host does beside launches.

        Args:
            given: What came, by name.
            how: Whether as a step of decoding, and the layout.
        """
        known = self._last
        if known is None or len(given) != known.count or type(cache) is not Cache:
            return None
        if known.said != (*how, "", cache.shape, returns) or cache.digest != self._digest:
            return None
        try:
            tensors = (*known.take(given), *cache.kept, *cache.addressed)
        except KeyError:
            return None
        if not known.like.but_for_addresses(tensors) or not known.repeats:
            return None
        if known.requires_grad and torch.is_grad_enabled():
            return None
        if new_lens is not None:
            cache.check_new_lens(new_lens)
        again, tokens = known.again, known.problem.tokens
        if again is None or replay.watched():
            return None
        given_too = (cache.new(tokens, new_lens), *tensors)
        even = len(given_too) if known.device.type == "cuda" else 0
        cache.reserve(tokens)
        guard = running(known.device)
        if guard is NO_GUARD:
            outputs = again.at(given_too, even)
        else:
            with guard:
                outputs = again.at(given_too, even)
        if outputs is None:  # some begin otherwise
            cache.reserve(-tokens)
            return None
        return _parted(known, outputs, new_lens)

    def step(
        self,
        call: Call,
        cache: Cache,
        new_lens: Tensor | None,
        returns: tuple[bool, bool],
        *,
        few: bool,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """o and the log-sum-exp of each branch of new tokens, which the cache then has; indices by level.

        Args:
            call: Queries, and of keys and values the new tokens'.
            cache: Of this spec.
            new_lens: How many of the tokens each sequence has.
            returns: Whether log-sum-exps are wanted, and indices; else they may be left out.
            few: As a step of decoding, not as a chunk of prefill.
        """
        self._check_cache(cache)
        tensors = [*call.tensors, *call.selection, *cache.kept, *cache.addressed]
        said = (few, call.layout, call.levels, cache.shape, returns)
        known = self._last
        if known is None or known.said != said or not known.like.but_for_addresses(tensors):
            found = self._look_up(call, cache, said, tensors)
            if found is known:  # but for what PyTorch looks at beside: inference mode, say
                found.like = alike.Likeness(tensors)
            known = self._last = found
        if known.requires_grad and torch.is_grad_enabled():
            raise HsgenError(
                f"{self._execution.spec.name}: calls with a cache have no derivative, and an input "
                "requires grad",
                help="call it under torch.no_grad(), or on tensor.detach()",
            )
        problem = known.problem
        cache.check_new_lens(new_lens)
        if problem.tokens == 0:
            return self._nothing(call)
        if not known.on_kernels:
            given = uniform(self._execution.attending, problem, call)
            return self._by_reference(given, call, problem, cache, new_lens)
        self._reserve(cache, problem.tokens)
        outputs = self._on_cache(known, call, cache, tensors, cache.new(problem.tokens, new_lens))
        return _parted(known, outputs, new_lens)

    def _look_up(
        self, call: Call, cache: Cache, said: tuple[Any, ...], tensors: Sequence[Tensor]
    ) -> _Known:
        """What is known about a step like this one; a new one is checked."""
        few, *_ = said
        requires_grad = any(x.requires_grad for x in call.tensors)
        key = (*said, requires_grad, len(call.selection), *alike.parts(tensors))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= KNOWN_CALLS:
                self._known.clear()
            problem = self._check(call, cache, few=few)
            names, on_kernels = self._execution.attending.names, self._on_kernels(problem.device)
            known = self._known[key] = _Known(
                problem=problem,
                take=itemgetter(*names),
                count=len({*names, "k", "v"}),
                said=said,
                like=alike.Likeness(tensors),
                requires_grad=requires_grad,
                on_kernels=on_kernels,
                device=problem.device,
                repeats=on_kernels and not self._execution.options.check,
                plain=call.layout == "bthd" and said[-1] == (False, False),
            )
        return known

    def _on_cache(
        self, known: _Known, call: Call, cache: Cache, tensors: Sequence[Tensor], new: Tensor
    ) -> Outputs:
        """What kernels give of new tokens: o, and as far as they are wanted each log-sum-exp, and what was
        chosen.

        tensors: The call's, its selection, and the cache's.
        """
        problem = known.problem
        brought: dict[str, Tensor] = {}
        if call.selection:
            brought = self._execution.padded_selection(call, problem)
            tensors = [*call.tensors, *brought.values(), *cache.kept, *cache.addressed]
        given = [new, *tensors]
        addresses = alike.addresses(given)
        key = ("step", known, known.even(addresses))
        with running(problem.device):
            again = self.replays.find(key)
            if again is not None:
                known.again = again if again.direct is not None and key[-1] is True else None
                outputs = again.at(addresses)
                assert outputs is not None, "nothing was asked of addresses"
                return outputs
            few, *_, (return_lse, return_selection) = known.said
            ready = self._prepared(cache.shape, "few" if few else "many", problem.tokens)

            def arranged(driver: Any, tensors: Sequence[Tensor], where: Batch) -> Outputs:
                new, *rest = tensors
                left = iter(rest)
                tokens = dict(zip(self._execution.attending.names, left, strict=False))
                selection = dict(zip(brought, left, strict=False)) or None
                kept = dict(zip(cache.tensors, left, strict=False))
                driver.append(tokens, kept, next(left), new, where, ready.config)
                asked = {"rows": return_selection} if ready.program.rows_apart else {}
                o, lse, chosen = driver.forward(
                    {**tokens, **kept}, where, ready.config, selection, **asked
                )
                outputs = [o]
                if return_lse:
                    outputs += [lse[branch] for branch in self._execution.branches]
                if return_selection:
                    known.levels = tuple(name for name, x in chosen.items() if x is not None)
                    outputs += [chosen[name] for name in known.levels]
                return outputs

            views = [*uniform(self._execution.attending, problem, call).values()]
            views = [new, *views, *brought.values(), *cache.kept]
            where = cache.batch(problem.tokens)
            return self.replays.drive(key, ready.program.driver, arranged, views, where)

    def _nothing(self, call: Call) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Of no new tokens."""
        made = self._execution.forward_fake(call)
        outputs = [x for x in made if x.is_floating_point()]
        names = self._execution.chosen(call)
        return outputs, dict(zip(names, made[len(outputs) :], strict=True))

    # --- checking

    def _check_cache(self, cache: Cache) -> None:
        """It is one of this spec."""
        if not isinstance(cache, Cache):
            raise ArgumentError(f"cache: expected what new_cache made, got {type(cache).__name__}")
        spec = self._execution.spec
        if cache.digest != self._digest:
            alike = " that says something else" if cache.spec.name == spec.name else ""
            raise ArgumentError(
                f"cache: expected one of spec {spec.name!r}, got one of {cache.spec.name!r}{alike}",
                help="each spec keeps other tensors: new_cache of this kernel",
            )

    def _check(self, call: Call, cache: Cache, *, few: bool) -> Problem:
        """Everything about a call but its values."""
        problem = self._execution.check(call, self._execution.attending)
        if problem.keys != problem.tokens:
            raise ArgumentError(
                f"k: expected the {problem.tokens} new tokens that q has, got {problem.keys}",
                help="a cache has the tokens before",
            )
        if few and problem.tokens > FEW:
            raise ArgumentError(
                f"q: expected at most {FEW} new tokens of a sequence, got {problem.tokens}",
                help="`extend` takes any number: chunks of prefill",
            )
        self._check_streams(
            cache, uniform(self._execution.attending, problem, call), problem.tokens
        )
        return problem

    def _check_streams(self, cache: Cache, tensors: Mapping[str, Tensor], tokens: int) -> None:
        """New tokens are as what the cache keeps."""
        shape = cache.shape
        for stream in cache.storage.streams:
            new = tensors[stream.name]
            wanted = (shape.batch, tokens, *stream.dims)
            alike = new.dtype == shape.dtype and new.device == shape.device
            if tuple(new.shape) != wanted or not alike:
                raise ArgumentError(
                    f"{stream.name}: expected {list(wanted)} {SHORT_NAMES[shape.dtype]} {shape.device}, "
                    f"as the cache has, got {list(new.shape)} "
                    f"{SHORT_NAMES.get(new.dtype, new.dtype)} {new.device}"
                )
            if new.shape[-1] > 1 and new.stride(-1) != 1:
                raise ArgumentError(
                    f"{stream.name}: expected stride 1 in the last dimension, got strides {new.stride()}"
                )

    @cached_property
    def _pooling(self) -> frozenset[str]:
        """Tensors that pools have learned: what they read, and no cache keeps."""
        graph, kept = self._execution.graph, {x.name for x in self.storage.streams}
        pools = {level.name for level in self.storage.levels}
        read: set[str] = set()
        for name in pools:
            todo = [name]
            while todo:
                inputs = graph[todo.pop()].inputs
                read.update(inputs)
                todo += inputs
        inputs = {x.name for x in self._execution.attending.inputs}
        return frozenset((read & inputs) - kept)

    # --- kernels

    def _on_kernels(self, device: torch.device) -> bool:
        return device.type == "cuda" or self._execution.options.interpret

    def _write(
        self,
        cache: Cache,
        tensors: Mapping[str, Tensor],
        tokens: int,
        new_lens: Tensor | None,
        *,
        few: bool = False,
    ) -> None:
        """New tokens into the cache, by kernels or row by row."""
        cache.check_new_lens(new_lens)
        if not tokens:
            return
        self._reserve(cache, tokens)
        if not self._on_kernels(cache.shape.device):
            _write_rows(cache, tensors, tokens, new_lens)
            return
        ready = self._prepared(cache.shape, "few" if few else "many", tokens)
        driver: Any = ready.program.driver
        with running(cache.shape.device):
            driver.append(
                tensors,
                cache.tensors,
                cache.lengths,
                cache.new(tokens, new_lens),
                cache.batch(tokens),
                ready.config,
            )

    def _reserve(self, cache: Cache, tokens: int) -> None:
        cache.reserve(tokens)
        if self._execution.options.check:
            cache.check_pages()

    def _prepared(self, shape: Shape, kind: str, tokens: int) -> Ready:
        rows = configs.next_power(tokens) if kind == "few" else 0
        longest = shape.capacity if kind == "few" else 0
        # of a step merges are compiled for as many parts as a batch leaves room for
        batch = shape.batch if kind == "few" else 0
        key = (shape.dtype, shape.device, shape.page, kind, rows, longest, batch)
        ready = self._ready.get(key)
        if ready is None:
            self._refuse_capture(shape.device)
            program = self._program(shape, kind)
            made = program.plan
            if kind == "few":
                made = configs.for_rows(made, tokens, longest, batch)
            starts = {kernel.name: kernel.config.keywords() for kernel in made.kernels}
            of_rows, given = replace(program, plan=made, config=starts), self._given(kind)
            if kind == "few":
                _refuse_rows(starts, given, self._execution.options.config)
                of_rows = self._tuned(of_rows, program.plan, shape, rows)
            config, origin = with_caller_s(of_rows, given, self._target(shape.device))
            ready = Ready(program=program, config=config, origin=origin)
            ready = self._ready.setdefault(key, ready)
        return ready

    def _tuned(self, of_rows: Program, plan: Plan, shape: Shape, rows: int) -> Program:
        """A program of steps with what is tuned for their sizes, as far as it is.  `plan`: of any sizes."""
        spec, target = self._execution.spec, self._target(shape.device)
        sizes = Sizes(tokens=rows, keys=shape.capacity, sequences=shape.batch, page=shape.page)

        def compiled(orders: Mapping[str, Order]) -> tuned.Compiled:
            if orders:  # of a record that somebody wrote by hand
                raise ArgumentError(f"orders: expected none of a step, got {dict(orders)}")
            return tuned.Compiled(
                plan=of_rows.plan,
                target=target,
                texts=of_rows.texts,
                at=lambda other: configs.for_steps(plan, other.sizes()),
            )

        interpret = shape.device.type != "cuda"
        found = tuned.look_up(
            tuned.Problem.of(spec, PLANNED[shape.dtype], "decode", shape.page),
            tuned.Bucket.of_steps(sizes),
            tuned.environment(target, interpreted=interpret),
            compiled,
        )
        self._execution.tell(found, interpret=interpret)
        return as_found(of_rows, found)

    def _given(self, kind: str) -> Configs:
        """The caller's configuration, of a step what is said of steps alone first."""
        given = self._execution.options.config
        plain = {name: x for name, x in given.items() if not name.startswith(STEP)}
        if kind == "few":
            plain |= {n.removeprefix(STEP): x for n, x in given.items() if n.startswith(STEP)}
        return plain

    def _program(self, shape: Shape, kind: str) -> Program:
        interpret = shape.device.type != "cuda"
        key = (shape.dtype, shape.device, shape.page, kind)
        with self._lock:
            if key not in self._programs:
                spec, target = self._execution.spec, self._target(shape.device)
                program = self._compiler(
                    spec,
                    target,
                    shape.dtype,
                    interpret=interpret,
                    cached=plan.Cached(rows="few" if kind == "few" else "many", page=shape.page),
                )
                mine = [*program.config]
                if kind == "few":
                    mine += [f"{STEP}{name}" for name in program.config]
                self._execution.check_names(mine, spec, target, shape.dtype)
                self._programs[key] = program
            return self._programs[key]

    def _target(self, device: torch.device) -> Target:
        """The GPU of a cache."""
        target = self._execution.options.target
        if target is None and device.type == "cuda":
            target = Target.current(device.index)
        return target or Target.named(INTERPRETED_TARGET)

    def _refuse_capture(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise HsgenError(
                f"{self._execution.spec.name}: a CUDA graph is being captured, and steps of so many "
                "tokens have never run",
                help="take a step with a cache of the same shape before the capture",
            )

    # --- the reference

    def _by_reference(
        self,
        given: Mapping[str, Tensor],
        call: Call,
        problem: Problem,
        cache: Cache,
        new_lens: Tensor | None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the spec means, of all that the cache has."""
        before = cache.lengths.clone()
        self._write(cache, given, problem.tokens, new_lens)
        tensors = {**given, **{x.name: cache.whole(x.name) for x in cache.storage.streams}}
        names = self._execution.attending.names
        capacity = cache.shape.capacity
        whole = call._replace(
            layout="bthd",
            tensors=[tensors[name] for name in names],
            q_offset=before,
            kv_lens=cache.lengths.clone(),
        )
        sizes = {**problem.sizes, "S": capacity}
        wide = replace(problem, layout="bthd", keys=capacity, sizes=sizes)
        expected, dtype = self._execution.attending, exact_dtype(problem.dtype)
        result = self._execution.result(whole, wide, dtype, expected)
        o = result.o.to(problem.dtype)
        lse = [result.lse[name].to(torch.float32) for name in self._execution.branches]
        chosen = {level: each.indices for level, each in result.selection.items()}
        return _finished([o, *lse], chosen, problem, new_lens)


def _refuse_rows(starts: Configs, given: Configs, said: Configs) -> None:
    """Refuse a caller's values of what follows from the rows and the parts of a step."""
    for name, start in starts.items():
        for each, value in given.get(name, {}).items():
            follows = each in OF_ROWS or each.startswith(OF_PARTS)
            if follows and start.get(each, value) != value:
                step = f"{STEP}{name}"
                alone = "" if step in said else f"; {step!r} beside it is of steps alone"
                raise ArgumentError(
                    f"config: {step if step in said else name}: expected {each}={start[each]} in a step, "
                    f"got {value}",
                    help=f"a step's rows and parts say it{alone}",
                )


def _parted(
    known: _Known, outputs: Outputs, new_lens: Tensor | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What kernels gave as `step` returns it."""
    if new_lens is None and known.plain:
        return outputs, {}
    count = len(outputs) - len(known.levels)
    found = dict(zip(known.levels, outputs[count:], strict=True))
    return _finished(outputs[:count], found, known.problem, new_lens)


def _finished(
    outputs: list[Tensor], chosen: dict[str, Tensor], problem: Problem, new_lens: Tensor | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs in the caller's layout, and choices; rows of tokens that are not there, which no kernel
    writes, are empty ones.
    """
    o, *lse = outputs
    if new_lens is not None:
        row = torch.arange(problem.tokens, device=problem.device)
        absent = row[None, :] >= new_lens[:, None]
        o = o.masked_fill(absent[:, :, None, None], 0.0)
        lse = [each.masked_fill(absent[:, None, :], float("-inf")) for each in lse]
        chosen = {
            level: each.masked_fill(absent[:, :, None, None], -1) for level, each in chosen.items()
        }
    return [o.transpose(1, 2) if problem.layout == "bhtd" else o, *lse], chosen


def _write_rows(
    cache: Cache, tensors: Mapping[str, Tensor], tokens: int, new_lens: Tensor | None
) -> None:
    """Row by row, on a CPU."""
    new = cache.new(tokens, new_lens).clamp(0, tokens).tolist()
    for z, (first, count) in enumerate(zip(cache.lengths.tolist(), new, strict=True)):
        kept = min(count, cache.shape.capacity - first)
        for stream in cache.storage.streams:
            cache.put(stream.name, z, first, tensors[stream.name][z, :kept])
        cache.lengths[z] = first + kept
