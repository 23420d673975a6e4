"""What a driver did, done again with other tensors: of a repeated call only addresses change.

An emitted driver allocates buffers and launches kernels, and decides both by shapes, strides and numbers
alone.  So calls that are alike in these launch the same kernels with the same numbers, and what Triton finds
out of every launch, which takes longer than the launch, is found out once.  A driver that does anything else
with tensors is not recorded, nor are kernels that are interpreted; then every call runs the driver, and
`Replays.explain` says why.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from types import FunctionType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hsgen import alike, launching
from hsgen.batch import Batch
from hsgen.launching import Launches, Prepared
from hsgen.tiling import TensorDescriptor

JITFunction: Any = None
drivers: Any = None
knobs: Any = None
triton: Any = None
try:
    import triton
    from triton import knobs
    from triton.runtime.driver import driver as drivers
    from triton.runtime.jit import JITFunction
except ImportError:  # the reference runs without
    pass

# what compiled models allocate by, which is not public
_empty_strided_cuda: Any = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)

KEPT = 512  # calls of one kernel, each with some 2 KB a launch; the least recently made goes first
MOST_LAUNCHES = 64  # of a call; a longer one hides what its launches cost
BETWEEN = 256  # bytes; where buffers begin in what is allocated for several
ALONE = 2**24  # bytes of a buffer that has a piece of its own: one for all would be hard to find

Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]  # size, stride
Outputs = list[Any]  # tensors; of a driver of gradients some may be None
Arranged = Callable[[Any, Sequence[Tensor], Batch], Outputs]


class Launch(NamedTuple):
    """One launch.

    Attributes:
        run: what launches the compiled kernel.
        values: all that it is given, None where the stream goes, or a tensor.
        pointers: places of addresses among them, and which one.
        tiles: places of tiles, of what is at which address, and what describes them.
    """

    run: Callable[..., None]
    values: list[object]
    pointers: tuple[tuple[int, int], ...]
    tiles: tuple[tuple[int, int, Mapping[str, object]], ...]


STREAM: Final = 3  # its place, behind a grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A tensor that is allocated by itself, because a caller gets it or it is large and has to be 0."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A call of a driver.  Keeps no tensor.

    Attributes:
        launches: in order; addresses are numbered: of all tensors that were given, of what is made, of the
            other buffers.
        made: what is allocated by itself.
        zeroed: numbers of these that have to be 0.
        outputs: numbers of these that a caller gets, None where the driver gives none.
        rooms: bytes of what is allocated for other buffers.
        places: in which of these each of them begins, and where.
        zeros: bytes of the first, at its beginning, that have to be 0.
        ordinal: of the device, as Triton counts.
        empty: what allocates there.
        direct: the same launches without Triton's launcher; None where one has tiles, which it encodes, or
            something else that is not known here.
    """

    launches: tuple[Launch, ...]
    made: tuple[Made, ...]
    outputs: tuple[int | None, ...]
    rooms: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    zeros: int
    ordinal: int
    empty: Empty
    zeroed: tuple[int, ...] = ()
    direct: Launches | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Outputs:
        """Launch on the current stream.

        Args:
            tensors: All that the driver was given and its batch's, like those that were recorded, but for
                their values; of views what they are views of will do.
        """
        outputs = self.at(alike.addresses(tensors) if self.direct is None else tensors)
        assert outputs is not None, "nothing was asked of addresses"
        return outputs

    def at(self, given: Sequence[Tensor] | Sequence[int], even: int = 0) -> Outputs | None:
        """The same by addresses of tensors, which must outlive the launches; where launches are direct,
        tensors will do.

        even: Of direct launches, how many of what is given has to begin at 16 bytes; None where one does not,
            and nothing is done.
        """
        empty = self.empty
        made = [empty(each.size, each.stride, each.dtype) for each in self.made]
        rooms = [empty((size,), (1,), torch.uint8) for size in self.rooms]
        if self.zeros or self.zeroed:
            zeros = [made[i] for i in self.zeroed]
            zeros += [rooms[0][: self.zeros]] if self.zeros else []
            torch._foreach_zero_(zeros)  # pyright: ignore[reportPrivateImportUsage]
        stream = drivers.active.get_current_stream(self.ordinal)
        if self.direct is not None:
            if not self.direct((*given, *made, *rooms), stream, even):
                return None
            return [None if i is None else made[i] for i in self.outputs]
        starts = alike.addresses(rooms)
        at: list[Any] = [*given, *alike.addresses(made)]
        at += [starts[room] + place for room, place in self.places]
        for run, given_values, pointers, tiles in self.launches:
            values = given_values.copy()
            values[STREAM] = stream
            for place, which in pointers:
                values[place] = at[which]
            for place, which, described in tiles:
                values[place] = _tiles(at[which], described)
            run(*values)
        return [None if i is None else made[i] for i in self.outputs]


def _empty_of(device: torch.device) -> Empty:
    """The quickest of what allocates on a device, the current one."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return _empty_strided_cuda
    return partial(_empty_strided, device)


def _empty_strided(
    device: torch.device, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Calls that run their driver each time, and why."""

    why: str


ONCE: Final = Refusal(why="they came once")


@dataclass(slots=True, eq=False)
class _Kept:
    """What is known of calls with one key, and when one was last made."""

    what: Replay | Refusal
    used: int


class Replays:
    """Calls of one kernel that were recorded, by keys that begin with a word for what was called.

    Calls with one key are alike in all that a driver decides by: shapes, strides, dtypes, device, whether
    addresses are multiples of 16, numbers, configuration.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._clock = itertools.count()
        self._lock = Lock()

    def find(self, key: tuple[Any, ...]) -> Replay | None:
        """What stands for the driver in calls with a key."""
        kept = self._kept.get(key)
        if kept is None or not isinstance(kept.what, Replay) or watched():
            return None
        kept.used = next(self._clock)
        return kept.what

    def drive(
        self,
        key: tuple[Any, ...],
        driver: Any,
        arranged: Arranged,
        tensors: Sequence[Tensor],
        where: Batch,
    ) -> Outputs:
        """What the driver gives; the second time a key comes, how it does is recorded.

        Many calls come once: lengths of prompts, say, and recording takes longer than it spares then.

        Args:
            key: See `find`.
            driver: Module.
            arranged: Calls functions of the driver, or of what stands for it, with such tensors and such
                a batch; puts outputs in order.
            tensors: All that they are given; the batch's come behind them in a replay.
            where: The batch.
        """
        kept = self._kept.get(key)
        if watched() or not (kept is None or kept.what is ONCE):
            return arranged(driver, tensors, where)
        if kept is None:
            self._keep(key, ONCE)
            return arranged(driver, tensors, where)
        outputs, what = record(driver, arranged, tensors, where)
        self._keep(key, what)
        return outputs

    def _keep(self, key: tuple[Any, ...], what: Replay | Refusal) -> None:
        with self._lock:
            if key not in self._kept and len(self._kept) >= KEPT:
                del self._kept[min(self._kept, key=lambda each: self._kept[each].used)]
            self._kept[key] = _Kept(what, next(self._clock))

    def __len__(self) -> int:
        """Keys that something is known of."""
        return len(self._kept)

    def told(self) -> Counter[tuple[str, str]]:
        """How many kinds of calls there are by what was called and what became of it."""
        with self._lock:
            kept = [(str(key[0]), each.what) for key, each in self._kept.items()]
        found: Counter[tuple[str, str]] = Counter()
        for word, what in kept:
            if isinstance(what, Replay):
                how = "" if what.direct is None else " from memory"
                found[word, f"{len(what.launches)} launches{how}, recorded"] += 1
            else:
                found[word, f"not recorded: {what.why}"] += 1
        return found

    def explain(self) -> list[str]:
        """The same as lines."""
        return [f"  {word}: {said}  ({count})" for (word, said), count in self.told().items()]


def watched() -> bool:
    """Whether Triton itself has to make launches: somebody wants to be told of them, or to have kernels
    compiled in another way.
    """
    if knobs is None:
        return False
    of = knobs.runtime
    return bool(
        of.debug
        or knobs.compilation.instrumentation_mode
        or _calls(of.launch_enter_hook)
        or _calls(of.launch_exit_hook)
    )


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def record(
    driver: Any, arranged: Arranged, tensors: Sequence[Tensor], where: Batch
) -> tuple[Outputs, Replay | Refusal]:
    """Call a driver, and what it did, or why that cannot be done again; arguments as of `Replays.drive`."""
    if JITFunction is None or torch.version.hip:
        why = "ROCm compiles kernels for how much lies behind a pointer, too"
        return arranged(driver, tensors, where), Refusal(why=why)
    notes = _Notes()
    aliases = [x.detach() for x in tensors]  # one tensor may come under several names
    of_batch = {name: x.detach() for name, x in _tensors_of(where).items()}
    outputs = arranged(_Driver(driver, notes), aliases, _Where(where, of_batch, notes))  # type: ignore[arg-type]
    return outputs, notes.replay([*aliases, *of_batch.values()], where.table.device, outputs)


def _tensors_of(where: Batch) -> dict[str, Tensor]:
    """Those of a batch, in the order in which a replay takes them."""
    found = {name: getattr(where, name, None) for name in ("table", "pages")}
    return {name: x for name, x in found.items() if x is not None}


@dataclass(slots=True, eq=False)
class _Notes:
    """What a driver does, and the first thing that cannot be done again."""

    launches: list[tuple[Any, tuple[int, ...], list[object]]] = field(default_factory=list)
    buffers: list[tuple[Tensor, bool]] = field(default_factory=list)
    tiles: list[tuple[object, Tensor]] = field(default_factory=list)
    why: str = ""

    def refuse(self, why: str) -> None:
        self.why = self.why or why

    def replay(
        self, tensors: Sequence[Tensor], device: torch.device, outputs: Outputs
    ) -> Replay | Refusal:
        """All of it."""
        if not self.launches:
            self.refuse("it launches no compiled kernel")
        if len(self.launches) > MOST_LAUNCHES:
            self.refuse(f"of {len(self.launches)} launches, more than {MOST_LAUNCHES}")
        numbers, made = self._given(outputs)
        for i, (x, zeros) in enumerate(self.buffers):
            if i not in made and zeros and x.nbytes >= ALONE:
                made[i] = Made(size=(*x.shape,), stride=x.stride(), dtype=x.dtype, zeros=True)
        lives = self._lives()
        scratch = [i for i in range(len(self.buffers)) if i not in made]
        scratch.sort(key=lambda i: (not self.buffers[i][1], -self.buffers[i][0].nbytes))
        zeros = sum(_whole(self.buffers[i][0].nbytes) for i in scratch if self.buffers[i][1])
        rooms, places = placed((self.buffers[i][0].nbytes, lives[i]) for i in scratch)
        order = [*tensors, *(self.buffers[i][0] for i in (*made, *scratch))]
        numbers_of = {id(x): i for i, x in enumerate(order)}
        launches = [self._launch(*each, numbers_of) for each in self.launches]
        if self.why:
            return Refusal(why=self.why)
        ordinal = drivers.active.get_current_device()
        return Replay(
            launches=tuple(launches),
            made=tuple(made.values()),
            outputs=tuple(numbers),
            rooms=tuple(rooms),
            places=tuple(places),
            zeros=zeros,
            ordinal=ordinal,
            empty=_empty_of(device),
            zeroed=tuple(i for i, x in enumerate(made.values()) if x.zeros),
            direct=self._direct(numbers_of, len(order) - len(places), len(rooms), places, ordinal),
        )

    def _direct(
        self,
        numbers_of: Mapping[int, int],
        whole: int,
        rooms: int,
        places: Sequence[tuple[int, int]],
        ordinal: int,
    ) -> Launches | None:
        """The launches as the card's driver takes them, where it is known how.

        whole: How many tensors come before rooms, in which the others are.
        """
        function = launching.function()
        if function is None or self.tiles or whole + rooms > launching.MOST:
            return None
        found: list[Prepared] = []
        for kernel, grid, values in self.launches:
            alone = _straight(kernel.run)[1] == (0, 0, None, None)
            if not alone or kernel.metadata.num_ctas != 1:
                return None
            warps, _, shared = kernel.packed_metadata
            numbers = {i: numbers_of.get(id(x)) for i, x in enumerate(values)}
            one = Prepared(
                function=kernel.function,
                grid=grid,
                threads=launching.WARP * warps,
                shared=shared,
                types=tuple(kernel.src.signature.values()),
                values=tuple(None if isinstance(x, Tensor) else x for x in values),
                addresses={
                    i: x if x < whole else x + rooms for i, x in numbers.items() if x is not None
                },
            )
            if not one.known:
                return None
            found.append(one)
        inside = [(whole + room, behind) for room, behind in places]
        return Launches(found, whole + rooms, inside, function, ordinal)

    def _lives(self) -> list[range]:
        """By buffer the launches that need it, the first to the last; what has to be 0, from the start."""
        numbers = {id(x): i for i, (x, _) in enumerate(self.buffers)}
        numbers |= {id(tile): numbers[id(x)] for tile, x in self.tiles if id(x) in numbers}
        lives = [range(0)] * len(self.buffers)
        for launch, (_, _, given) in enumerate(self.launches):
            for i in {numbers[id(value)] for value in given if id(value) in numbers}:
                first = lives[i].start if lives[i] else launch
                lives[i] = range(0 if self.buffers[i][1] else first, launch + 1)
        return lives

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        given: Sequence[object],
        numbers_of: Mapping[int, int],
    ) -> Launch:
        run, between = _straight(kernel.run)
        no_hooks = (None, None, None)
        before = [*grid, 1, 1][:STREAM]
        before += [None, kernel.function, *between, kernel.packed_metadata, *no_hooks]
        values = [*before, *given]
        tiled = {id(tile): numbers_of.get(id(x)) for tile, x in self.tiles}
        pointers, tiles = list[tuple[int, int]](), list[tuple[int, int, Any]]()
        for place, value in enumerate(given, len(before)):
            if (address := numbers_of.get(id(value))) is not None:
                pointers.append((place, address))
            elif (address := tiled.get(id(value))) is not None:
                tiles.append((place, address, {**vars(value), "base": None}))
            elif isinstance(value, (Tensor, TensorDescriptor or ())):
                self.refuse(f"{kernel.name} reads a tensor that is neither an input nor a buffer")
        for place, *_ in (*pointers, *tiles):
            values[place] = None
        return Launch(
            run=run,
            values=values,
            pointers=tuple(pointers),
            tiles=tuple(tiles),
        )

    def _given(self, outputs: Outputs) -> tuple[list[int | None], dict[int, Made]]:
        """Which buffers a caller gets, each whole and in one way; branches may share one."""
        owners = {x.untyped_storage().data_ptr(): i for i, (x, _) in enumerate(self.buffers)}
        numbers = list[int | None]()
        made = dict[int, Made]()
        for x in outputs:
            if x is None:
                numbers.append(None)
                continue
            owner = owners.get(x.untyped_storage().data_ptr()) if x.numel() else None
            if owner is None or x.nbytes != self.buffers[owner][0].nbytes:
                self.refuse("it gives a tensor that is no buffer of its own")
                continue
            how = (x.shape, x.stride(), x.dtype)
            one = made.get(owner)
            if one is None:
                zeros = self.buffers[owner][1]
                made[owner] = Made(size=(*x.shape,), stride=x.stride(), dtype=x.dtype, zeros=zeros)
            elif (one.size, one.stride, one.dtype) != how:
                self.refuse("it gives one buffer in two ways")
            numbers.append([*made].index(owner))
        return numbers, made


def placed(buffers: Iterable[tuple[int, range]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Where buffers lie, those of different launches in the same memory: bytes of rooms, and by buffer which
    room it is in and where.

    A large one has a room of its own, or is in that of a larger one which is needed at other times; the first
    room has the others, one after the other where they are needed together.

    Args:
        buffers: Bytes, and which launches need them; those that have to be 0 first, then the largest.
    """
    rooms, taken, places = [0], [list[tuple[int, int, range]]()], list[tuple[int, int]]()
    for bytes_, life in buffers:
        size = _whole(bytes_)
        ways = ((room, _free(taken[room], size, life)) for room in range(1, len(rooms)))
        room, at = next((x for x in ways if x[1] + size <= rooms[x[0]]), (0, 0))
        if room == 0 and bytes_ >= ALONE:
            room = len(rooms)
            rooms.append(size)
            taken.append([])
        elif room == 0:
            at = _free(taken[0], size, life)
            rooms[0] = max(rooms[0], at + size)
        taken[room].append((at, at + size, life))
        places.append((room, at))
    return rooms, places


def _free(taken: Iterable[tuple[int, int, range]], size: int, life: range) -> int:
    """The first place for so many bytes beside what is needed by some of the same launches."""
    at = 0
    for start, end, other in sorted(taken, key=lambda x: x[0]):
        if max(life.start, other.start) < min(life.stop, other.stop):
            if at + size <= start:
                break
            at = max(at, end)
    return at


def _whole(size: int) -> int:
    """Bytes up to where the next buffer may begin."""
    return -(-size // BETWEEN) * BETWEEN


def _straight(launcher: Any) -> tuple[Callable[..., None], tuple[object, ...]]:
    """What a launcher of Triton calls in the end, and what it gives it behind the function: half of the time
    of a launch is spent on the way there.  The launcher itself where it gives a kernel room of its own, and
    of versions that may do otherwise.
    """
    known = triton.__version__.startswith("3.6.") and hasattr(launcher, "launch")
    if not known or launcher.global_scratch_size or launcher.profile_scratch_size:
        return launcher, ()
    return launcher.launch, (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)


class _Driver:
    """A driver whose functions work with stand-ins, which note what they do."""

    def __init__(self, driver: Any, notes: _Notes) -> None:
        self._driver = driver
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._driver, name)
        if not isinstance(function, FunctionType):
            return function  # so that no launch of it is noted
        used = {x: function.__globals__.get(x) for x in function.__code__.co_names}
        kernels = {
            x: _Kernel(kernel, self._notes)
            for x, kernel in used.items()
            if isinstance(kernel, JITFunction)
        }
        if not kernels:
            return function
        again = FunctionType(
            function.__code__,
            {**function.__globals__, **kernels, "torch": _Torch(self._notes)},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        again.__kwdefaults__ = function.__kwdefaults__
        return again


class _Kernel:
    """A kernel whose launches are noted."""

    def __init__(self, kernel: Any, notes: _Notes) -> None:
        self._kernel = kernel
        self._notes = notes

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: object, **keywords: object) -> None:
        kernel = self._kernel
        made = kernel.run(*arguments, grid=grid, warmup=False, **keywords)
        made = made.result() if hasattr(made, "result") else made
        if made is None or kernel.pre_run_hooks:
            self._notes.refuse(f"hooks of Triton take part in launches of {kernel.__name__}")
            return
        signature = kernel.signature
        named = {name: x for name, x in keywords.items() if name in signature.parameters}
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        self._notes.launches.append((made, grid, [*bound.arguments.values()]))


class _Torch:
    """What drivers use of torch."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes

    def empty(self, size: Sequence[int], **options: Any) -> Tensor:
        return self._noted(torch.empty(size, **options), zeros=False)

    def zeros(self, size: Sequence[int], **options: Any) -> Tensor:
        return self._noted(torch.zeros(size, **options), zeros=True)

    def _noted(self, x: Tensor, *, zeros: bool) -> Tensor:
        self._notes.buffers.append((x, zeros))
        return x

    def __getattr__(self, name: str) -> object:
        found = getattr(torch, name)
        if not isinstance(found, torch.dtype):
            self._notes.refuse(f"its driver uses torch.{name}")
        return found


class _Where:
    """A Batch that notes which tensors it describes tiles of."""

    def __init__(self, where: Batch, tensors: Mapping[str, Tensor], notes: _Notes) -> None:
        self._where = where
        self._tensors = tensors
        self._notes = notes

    def laid(self, table: Tensor, rows: int, keys: int) -> _Where:
        return _Where(self._where.laid(table, rows, keys), {}, self._notes)

    def tile_of(self, x: Tensor, rows: int, columns: int, heads: int = 1) -> object:
        made: Any = self._where.tile_of(x, rows, columns, heads)
        if not x.numel():  # of a tensor that nothing reads, but of which tiles can be described
            x = made.base
            self._notes.buffers.append((x, False))
        self._notes.tiles.append((made, x))
        return made

    def __getattr__(self, name: str) -> object:
        return self._tensors[name] if name in self._tensors else getattr(self._where, name)


@dataclass(slots=True, eq=False)
class _Base:
    """What tiles are of, as far as a launch asks, which encodes a descriptor for the device."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _tiles(address: int, described: Mapping[str, object]) -> object:
    """Tiles of another tensor, or buffer, that is like the one they were described of."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(described)
    made.base = _Base(address)
    return made
