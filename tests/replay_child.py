"""Calls on a GPU that is not there: kernels are compiled as launches do, and what is launched is noted.

    python replay_child.py SPEC SCRATCH_BYTES

Compares launches of repeated calls with those that the driver makes itself, and says how long calls take.
With kernels that stream keys, what is encoded of tiles for the device is compared, too; of others, what the
card's driver is given in memory.
"""

import ctypes
import ctypes.util
import itertools
import json
import struct
import sys
import time

import launching_child
import torch
from triton.backends.nvidia.driver import CudaLauncher, make_tensordesc_arg
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from benchmarks import overhead
from hsgen import batch, execution, launching, replay
from hsgen.errors import HsgenError
from hsgen.reference import tensor_kinds, tensor_shapes
from hsgen.runtime import Kernel, compile_program
from hsgen.spec import load
from hsgen.target import Target, with_streams

noted = []
HOOKS, BEFORE = 10, 13  # where hooks stand in what is launched, and a kernel's own arguments


class Launcher(CudaLauncher):
    """Triton's own, but for what is compiled of it; encodes tiles as that does."""

    def __init__(self, _, metadata):
        self.tiles = getattr(metadata, "tensordesc_meta", None) or []
        self.num_ctas = 1
        for name in (
            "global_scratch_size",
            "global_scratch_align",
            "profile_scratch_size",
            "profile_scratch_align",
            "launch_cooperative_grid",
            "launch_pdl",
        ):
            setattr(self, name, getattr(metadata, name))

    def launch(self, *launch):
        tiles = [x for x in launch if isinstance(x, TensorDescriptor)]
        pairs = zip(tiles, self.tiles, strict=True)
        encoded = iter([make_tensordesc_arg(x, meta) for x, meta in pairs])
        if noting:
            noted.append((launch[:HOOKS], [seen(x, encoded) for x in launch[BEFORE:]]))


class Utils(launching_child.Utils):
    loaded = itertools.count(4096)

    def load_binary(self, *_):
        return 0, next(self.loaded), 32, 0, 1024

    def fill_tma_descriptor(self, pointer, *described):
        return pointer, *described


class H100(launching_child.H100):
    utils, launcher_cls = Utils(), Launcher


class Launches(launching.Launches):
    """As they are, but for what is launched, which is read from memory as the card's driver does."""

    prepared = {}  # by handle

    def __init__(self, prepared, *how):
        self.prepared.update((one.function, one) for one in prepared)
        super().__init__(prepared, *how)


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
def read(configuration, function, arguments, _):
    launch, one = launching.Configuration.from_address(configuration), Launches.prepared[function]
    at = iter((ctypes.c_void_p * 64).from_address(arguments))

    def value(of, given):
        if of == "constexpr":
            return given
        form = "Q" if of[0] == "*" else launching.FORMATS[of]
        return struct.unpack_from(form, ctypes.string_at(next(at), 8))[0]

    values = [value(*x) for x in zip(one.types, one.values, strict=True)]
    assert [ctypes.c_uint64.from_address(next(at)).value for _ in range(2)] == [0, 0]
    assert (launch.block_y, launch.block_z, launch.attributes, launch.count) == (1, 1, None, 0)
    grid = (launch.grid_x, launch.grid_y, launch.grid_z)
    sizes = (launch.block_x // 32, 1, launch.shared)
    head = (*grid, launch.stream or 0, function, 0, 0, None, None, sizes)
    if noting:
        straight.append(function)
        noted.append((head, values))
    return 0


def nothing():
    """What takes no arguments, does nothing and says 0."""
    found = ctypes.CDLL(ctypes.util.find_library("m")).fegetround
    return ctypes.cast(found, ctypes.c_void_p).value


straight = []  # launches that no launcher of Triton made
noting = False
alive = []  # so that no address is used twice


def keeping(allocate):
    def allocated(*size, **options):
        x = allocate(*size, **options)
        if noting:
            alive.append(x)
        return x

    return allocated


def keeping_given(again):
    def called(self, tensors):
        if noting:
            alive.extend(tensors)
        return again(self, tensors)

    return called


def seen(x, encoded):
    """An argument: tensors as addresses, and of a tile all that the device is told of it."""
    alive.append(x)
    if isinstance(x, TensorDescriptor):
        (pointer, *how), *sizes = next(encoded)
        size = x.base.nbytes if isinstance(x.base, torch.Tensor) else None
        return ("tile", pointer, size, (how, sizes))
    if isinstance(x, torch.Tensor):
        return ("tensor", x.data_ptr(), x.nbytes, content(x.data_ptr(), x.nbytes))
    return x


def content(pointer, size):
    """Whether what is there is 0; without a launch nothing else gets there."""
    begins = ctypes.string_at(
        pointer, min(size, 64)
    )  # most are large, and begin with something else
    return not any(begins) and ctypes.string_at(pointer, size).count(0) == size


def notes(f):
    global noting
    noted.clear()
    noting = True
    outputs = f()
    noting = False
    return outputs, list(noted)


def own(f):
    """The same by the driver's own launches."""
    before, replay.watched = replay.watched, lambda: True
    try:
        return f()
    finally:
        replay.watched = before


def same(again, plain, given):
    """How many launches there are, and tiles of tensors that were given and of those that were made.

    Launches have to be alike: addresses that a caller gave are the same, others go by one renaming, and share
    memory where no launch needs both.
    """
    assert len(again) == len(plain) > 0
    renamed, places = {}, {}
    tiles, tiles_made = 0, 0
    for launch, ((head, values), (wanted_head, wanted)) in enumerate(
        zip(again, plain, strict=True)
    ):
        assert head == wanted_head
        for value, want in zip(values, wanted, strict=True):
            if not (isinstance(want, tuple) and want[0] in ("tensor", "tile")):
                assert value == want, (head, value, want)
                continue
            kind, pointer, size, more = want
            if kind == "tile":
                assert value[0] == "tile"
                assert value[2] is None, "not of a replay"
                assert value[3] == more
                value = value[1]
                tiles += pointer in given
                tiles_made += pointer not in given
            if pointer in given:
                assert value == pointer
            elif pointer:  # else nothing is there
                assert renamed.setdefault(pointer, value) == value
                assert value % 16 == 0
                assert kind == "tile" or content(value, size) == more
                places.setdefault((value, pointer), (size, []))[1].append(launch)
    for (value, (size, life)), (other, (more, beside)) in itertools.combinations(places.items(), 2):
        apart = life[-1] < beside[0] or beside[-1] < life[0]
        assert apart or value[0] + size <= other[0] or other[0] + more <= value[0]
    return [len(again), tiles, tiles_made]


def least(f, rounds=15, calls=20):
    """Microseconds of a call, in the best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def compared(f, made, kept=()):
    """What `same` says of a call of f with what is made, beside the driver's."""
    alive.clear()
    x = made()
    outputs, again = notes(lambda: f(x))
    wanted, plain = notes(lambda: own(lambda: f(x)))
    outputs, wanted = ([y] if isinstance(y, torch.Tensor) else y for y in (outputs, wanted))
    for y, z in zip(outputs, wanted, strict=True):
        assert (y is None) == (z is None)
        assert y is None or (y.shape, y.stride(), y.dtype) == (z.shape, z.stride(), z.dtype)
        assert y is None or x["q"].requires_grad or y._base is None
    given = {each.data_ptr() for each in (*x.values(), *kept)}
    assert any(isinstance(v, int) and v in given for _, values in again for v in values)
    return same(again, plain, given)


def moved(kernel, tokens):
    """A backward whose saved tensors come back with other strides, where those of a call were recorded."""
    shapes = tensor_shapes(kernel.spec, 1, tokens, tokens)

    def both(x):
        def back(y):
            return y.transpose(1, 2).contiguous().transpose(1, 2) if y.ndim == 4 else y

        with torch.autograd.graph.saved_tensors_hooks(lambda y: y, back):
            o = kernel(**x)
            return torch.autograd.grad(o, list(x.values()), torch.ones_like(o), allow_unused=True)

    def made():
        return {n: torch.ones(s, dtype=torch.bfloat16).requires_grad_() for n, s in shapes.items()}

    for _ in range(2):
        both(made())
    return compared(both, made)


def steps(kernel):
    """The same of steps and chunks, recorded with another cache than they are made again with."""
    found = {}
    for what, page, tokens, new_lens in (
        ("step", None, 1, None),
        ("paged step", 64, 1, None),
        ("wide step", None, 5, torch.tensor([5, 3], dtype=torch.int32)),
        ("chunk", None, 40, None),
    ):
        caches = [kernel.new_cache(2, 4096, torch.bfloat16, page=page) for _ in range(2)]
        shapes = tensor_shapes(kernel.spec, 2, tokens, tokens)

        def made(shapes=shapes):
            return {n: torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}

        def step(x, cache, tokens=tokens, new_lens=new_lens):
            take = kernel.decode if tokens <= 8 else kernel.extend
            how = {"return_lse": True, "return_selection": True, "new_lens": new_lens}
            o, lse, chosen = take(**x, cache=cache, **how)
            lse = lse.values() if isinstance(lse, dict) else [lse]
            return [o, *lse, *[each.indices for each in chosen.values()]]

        for _ in range(2):
            step(made(), caches[1])
        cache = caches[0]
        kept = [*cache.tensors.values(), cache.lengths, cache._table, cache._few[min(tokens, 8)]]
        found[what] = compared(lambda x, c=cache, f=step: f(x, c), made, kept)
    return found


def others(kernel):
    """Steps behind one that is made again from memory, that are not like it: what each is answered, and how
    many launches it makes.
    """
    cache, full = (kernel.new_cache(2, 64, torch.bfloat16) for _ in range(2))
    shapes = tensor_shapes(kernel.spec, 2, 1, 1)

    def made(**changes):
        return {n: torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()} | changes

    def step(x, cache=cache, **how):
        try:
            kernel.decode(**x, cache=cache, **how)
        except HsgenError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    for _ in range(4):
        step(made())
    assert kernel._decoding._last.again.direct is not None
    full.lengths.fill_(64)
    full._most = 64
    q = made()["q"]
    found = {}
    for what, x, how in (
        ("like it", made(), {}),
        ("dtype", made(q=q.float()), {}),
        ("tokens", made(q=torch.cat((q, q), 1)), {}),
        ("strides", made(q=q.repeat_interleave(2, -1)[..., ::2]), {}),
        ("nothing", made(k=None), {}),
        ("number", made(k=3), {}),
        ("more", made(strange=q), {}),
        ("grad", made(q=q.clone().requires_grad_()), {}),
        ("lengths", made(), {"new_lens": torch.ones(3, dtype=torch.int32)}),
        ("cache", made(), {"cache": 3}),
        ("layout", made(), {"layout": "hbtd"}),
        ("full", made(), {"cache": full}),
        ("less", {n: y for n, y in made().items() if n != "k"} | {"k": None}, {}),
    ):
        said, launches = notes(lambda x=x, how=how: step(x, **how))
        found[what] = [said, len(launches)]
    cache.tensors["k"] = cache.tensors["k"].clone(memory_format=torch.preserve_format)
    kept = [*cache.tensors.values(), cache.lengths, cache._table, cache._few[1]]
    moved = compared(lambda x: kernel.decode(**x, cache=cache), made, kept)
    found["moved"] = ["no error", moved[0]]
    return found


def steps_took(kernel):
    """Microseconds of a step that is made again, of one by its driver, and of the launches alone.

    Buffers are allocated as on a card, by what has a twin for CPU tensors.
    """
    launching.function = nothing
    replay._empty_of = lambda _: torch._C._dynamo.guards._empty_strided_cpu
    cache = kernel.new_cache(1, 4096, torch.bfloat16)
    x = {
        n: torch.ones(s, dtype=torch.bfloat16)
        for n, s in tensor_shapes(kernel.spec, 1, 1, 1).items()
    }
    kernel._decoding.replays._kept.clear()

    def step():
        return kernel.decode(**x, cache=cache)

    for _ in range(4):
        step()
    again = kernel._decoding._last.again
    table = [cache._few[1], *x.values(), *cache.kept, *cache.addressed]
    assert again.direct is not None
    made = (*table, *[torch.ones(1) for _ in (*again.made, *again.rooms)])

    def raw():
        return again.direct(made, 0)

    rounds = [(least(step, rounds=3), least(raw, rounds=3)) for _ in range(8)]
    took, alone = map(min, zip(*rounds, strict=True))
    return {"step took": [took, own(lambda: least(step))], "step alone": alone}


def main():
    driver.set_active(H100())
    replay.Launches = Launches
    launching.function = lambda: ctypes.cast(read, ctypes.c_void_p).value
    batch._processors = lambda _: 132
    for allocates in ("empty", "empty_strided", "zeros_like", "ones_like"):
        setattr(torch, allocates, keeping(getattr(torch, allocates)))
    replay.Replay.__call__ = keeping_given(replay.Replay.__call__)
    torch.use_deterministic_algorithms(True)  # what is allocated is filled, so that zeros are seen
    name, scratch, target = sys.argv[1], int(sys.argv[2]), with_streams(Target.named("h100"))
    assert target.streams

    def compiler(spec, _, dtype, *, interpret, **options):  # noqa: ARG001
        made = compile_program(spec, target, dtype, interpret=False, **options)
        made.driver.SCRATCH_BYTES = scratch
        return made

    kernel = Kernel(load(name), execution.Options(interpret=True), key="null", compiler=compiler)
    kernel._decoding._compiler = compiler
    kinds, tokens = tensor_kinds(kernel.spec), 96
    found = {}
    # many keys: scores are chosen from in several turns; few: no entry is whole
    for layout, queries, keys in (
        ("bthd", tokens, tokens),
        ("bhtd", tokens, tokens),
        ("packed", tokens, tokens),
        ("many", tokens, 32768),
        ("few", 8, 8),
    ):
        shapes = tensor_shapes(kernel.spec, 1, queries, keys)

        def made(*, grad=False, layout=layout, shapes=shapes):
            x = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}
            for n, each in x.items():
                if layout == "bhtd" and each.ndim == 4 and kinds[n] != "parameter":
                    x[n] = each.transpose(1, 2)
                if layout == "packed" and kinds[n] != "parameter":
                    x[n] = each[0]
            return {n: each.requires_grad_(grad) for n, each in x.items()}

        how = {"layout": "bhtd"} if layout == "bhtd" else {}
        if layout == "packed":
            how["cu_seqlens_q"] = torch.tensor([0, 40, tokens], dtype=torch.int32)

        def call(x, how=how):
            return kernel(**x, **how)

        def choose(x, how=how):
            return [each.indices for each in kernel.select(**x, **how).values()]

        def gradients(x, how=how):
            o = kernel(**x, **how)
            grad = torch.ones_like(o)
            return torch.autograd.grad(o, list(x.values()), grad, allow_unused=True)

        for what, f, grad in (
            ("call", call, False),
            ("select", choose, False),
            ("both", gradients, True),
        ):
            for _ in range(2):  # compiles, is recorded
                f(made(grad=grad))
            found[f"{layout} {what}"] = compared(f, lambda grad=grad, made=made: made(grad=grad))
    found["moved both"] = moved(kernel, tokens)
    found |= steps(kernel)
    found["others"] = others(kernel)
    torch.use_deterministic_algorithms(False)
    alive.clear()
    x = made()
    found["took"] = [least(lambda: call(x)), own(lambda: least(lambda: call(x)))]
    found["overhead"] = overhead.measure(kernel, tokens, device="cpu", rounds=2)
    recorded = [x.what for x in kernel._execution.replays._kept.values()]
    launches = [y for x in recorded if isinstance(x, replay.Replay) for y in x.launches]
    found["straight to the card"] = len(straight)
    found["straight"] = [isinstance(each.run, Launcher) for each in launches].count(False)
    found["explained"] = kernel.explain()
    replay.MOST_LAUNCHES = 0
    found["not recorded"] = overhead.measure(kernel, tokens + 1, device="cpu", rounds=1)
    found["explained late"] = kernel.explain()
    replay.MOST_LAUNCHES = 64
    found |= steps_took(kernel)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
