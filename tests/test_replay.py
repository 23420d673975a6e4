"""Repeated calls launch what the driver would, and take less time; on a GPU that is not there."""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from hsgen import alike, batch, load_kernel, replay
from hsgen.reference import tensor_shapes

FOLDER = Path(__file__).parent


SCRATCH = {"moba": 2**27, "nsa": 1}  # bytes of scores, of which nsa then has several turns
LAYOUTS = ("bthd", "bhtd", "packed", "many", "few")  # the last two by how many keys there are


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("nsa", marks=pytest.mark.slow),
        pytest.param("moba", marks=pytest.mark.full),
    ],
)
def told(request):
    """What the child says: by what was called the launches, tiles that were given, others; microseconds."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(FOLDER.parent)
    child = [sys.executable, "replay_child.py", request.param, str(SCRATCH[request.param])]
    run = subprocess.run(
        child, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return request.param, json.loads(run.stdout.splitlines()[-1])


def test_calls_launch_what_the_driver_would(told):
    """The child compares kernels, grids, numbers, addresses, buffers that are 0, and outputs' strides."""
    _, found = told
    for layout in LAYOUTS:
        launches = [found[f"{layout} {what}"][0] for what in ("select", "call", "both")]
        assert 0 < launches[0] < launches[1] < launches[2]


def test_tiles_are_of_the_tensors_of_a_call(told):
    """Of nsa's, which streams keys: of some that a caller brings, and of some that are pooled."""
    system, found = told
    for layout in LAYOUTS:
        _, given, others = found[f"{layout} call"]
        assert (given > 0) == (others > 0) == (system == "nsa")


def test_choosing_in_several_turns_is_recorded(told):
    system, found = told
    if system == "nsa":
        more = found["many select"][0] - found["bthd select"][0]
        assert more > 0
        assert more % 2 == 0  # a turn scores and chooses


def test_a_backward_of_tensors_that_hooks_moved_is_recorded_by_itself(told):
    _, found = told
    assert found["moved both"][0] == found["bthd both"][0]


def test_steps_launch_what_the_driver_would_whichever_cache_they_are_of(told):
    """Recorded with one cache, made again with another: in one piece and in pages, of some tokens each."""
    _, found = told
    for what in ("step", "paged step", "wide step", "chunk"):
        assert found[what][0] > 2, what  # of which an append is one or two


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("like it", "no error"),
        ("moved", "no error"),
        ("dtype", "ArgumentError: k: expected [B, S, Hkv, Dqk]"),
        ("tokens", "ArgumentError: "),
        ("strides", "ArgumentError: q: expected stride 1"),
        ("nothing", "ArgumentError: k: expected a tensor, got nothing"),
        ("number", "ArgumentError: k: expected a tensor, got int"),
        ("less", "ArgumentError: k: expected a tensor, got nothing"),
        ("more", "ArgumentError: strange: "),
        ("grad", "HsgenError: nsa: calls with a cache have no derivative"),
        ("lengths", "ArgumentError: new_lens: expected [2] int32"),
        ("cache", "ArgumentError: cache: expected what new_cache made, got int"),
        ("layout", "ArgumentError: layout: "),
        ("full", "ArgumentError: cache: no room for 1 more tokens"),
    ],
)
def test_what_is_not_like_the_step_before_is_answered_as_ever(told, what, said):
    """And launches nothing; a cache that was given another tensor is read where that is."""
    system, found = told
    answer, launches = found["others"][what]
    assert answer.startswith(said.replace("nsa", system))
    assert (launches > 0) == (said == "no error")


def test_a_repeated_call_takes_less_of_the_host(told):
    for what in ("took", "step took"):
        again, by_driver = told[1][what]
        assert again < by_driver / 1.5, what
        assert again < 1000, what


def test_a_step_takes_little_beside_its_launches(told):
    """Of launches that do nothing, from memory: Python is nearly all of it."""
    found = told[1]
    assert found["step took"][0] < 9 * found["step alone"]


def test_launches_are_those_that_triton_s_launcher_makes(told):
    """The child notes what reaches its end, which calls that are made again go straight to; and what the
    card's driver reads where not even that is asked.
    """
    assert told[1]["straight"] > 0
    assert told[1]["straight to the card"] > 0


def test_the_host_is_timed_where_nothing_is_recorded(told):
    """No time of launches alone then, and what a call takes above is said to be above its driver."""
    _, found = told
    recorded, others = found["overhead"], found["not recorded"]
    assert recorded.keys() - others.keys() == {"raw", "raw recorded", "raw both"}
    assert others.keys() < recorded.keys()
    assert "not recorded" not in overhead.above(recorded)
    assert "(driver: not recorded)" in overhead.above(others)
    assert "(driver both: not recorded)" in overhead.above(others)


def test_explaining_says_what_was_recorded_and_why_not(told):
    _, found = told
    assert re.search(r"step: \d+ launches from memory, recorded", found["explained"])
    assert re.search(r"forward: \d+ launches( from memory)?, recorded", found["explained"])
    assert "not recorded: of " in found["explained late"]
    assert f"more than {0}" in found["explained late"]


# --- what is no driver's


class Functions:
    """As a module of a driver."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


def where():
    return batch.dense(1, 2, 2, torch.device("cpu"))


def plus_one(driver, tensors, _):
    return [driver.forward(*tensors)]


def test_what_launches_no_kernel_is_not_recorded():
    x, replays = torch.ones(3), replay.Replays()
    driver = Functions(forward=lambda y: y + 1)
    for said in ("came once", "launches no compiled kernel", "launches no compiled kernel"):
        outputs = replays.drive(("forward",), driver, plus_one, [x], where())
        assert torch.equal(outputs[0], x + 1)
        assert replays.find(("forward",)) is None
        assert said in "".join(replays.explain())


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        ("operator", "torch.sort"),
        ("given", "no buffer of its own"),
        ("part", "no buffer of its own"),
        ("turned", "in two ways"),
        ("foreign", "neither an input nor a buffer"),
        ("long", "more than"),
    ],
)
def test_notes_of_what_no_driver_does_are_no_replay(strange, said, monkeypatch):
    """Another operator of torch, tensors from elsewhere, an output that was given, or part of a buffer."""
    monkeypatch.setattr(replay, "MOST_LAUNCHES", 3)
    x, notes = torch.ones(4), replay._Notes()
    noted = replay._Torch(notes)
    made = noted.empty((2, 2), dtype=noted.float32, device="cpu")
    read = torch.ones(4) if strange == "foreign" else x
    kernel = Functions(name="k", run=None, function=0, packed_metadata=())
    notes.launches += [(kernel, (1,), [read, made])] * (4 if strange == "long" else 1)
    if strange == "operator":
        noted.sort(x)
    outputs = {"given": [x], "part": [made[:1]], "turned": [made, made.t()]}
    found = notes.replay([x], x.device, outputs.get(strange, [made]))
    assert isinstance(found, replay.Refusal)
    assert said in found.why


def test_buffers_of_different_launches_lie_in_the_same_memory():
    """Those of one launch never; what has to be 0 at the beginning; a large one leaves others its room."""
    large = replay.ALONE
    buffers = [
        (300, range(3)),  # has to be 0
        (10, range(1)),  # that too
        (2 * large, range(2, 4)),
        (large, range(2)),
        (large, range(1, 3)),
        (600, range(4, 6)),
        (600, range(3, 6)),
        (500, range(1, 2)),
    ]
    rooms, places = replay.placed(buffers)
    assert rooms == [768, 2 * large, large]
    assert places[:2] == [(0, 0), (0, 512)]
    assert places[2:] == [(1, 0), (1, 0), (2, 0), (1, 0), (2, 0), (1, large)]
    spans = [
        (room, at, at + size, set(life))
        for (room, at), (size, life) in zip(places, buffers, strict=True)
    ]
    for (room, start, end, life), (other, first, last, beside) in itertools.combinations(spans, 2):
        assert room != other or end <= first or last <= start or not life & beside


def test_what_has_to_be_0_lies_where_it_is_filled():
    """Of the first room, even where the next place behind it is beyond a large buffer's least bytes."""
    rooms, places = replay.placed([(replay.ALONE - 4, range(2)), (8, range(1))])
    assert rooms == [replay.ALONE + replay.BETWEEN]
    assert places == [(0, 0), (0, replay.ALONE)]


def kept(replays):
    return [*replays._kept]


def test_the_least_recently_made_goes_first(monkeypatch):
    monkeypatch.setattr(replay, "KEPT", 3)
    replays = replay.Replays()
    again = replay.Replay(
        launches=(),
        made=(),
        outputs=(),
        rooms=(),
        places=(),
        zeros=0,
        ordinal=0,
        empty=torch.empty_strided,
    )
    for key in (("a",), ("b",), ("c",)):
        replays._keep(key, again)
    assert replays.find(("a",)) is again
    replays._keep(("d",), again)
    assert kept(replays) == [("a",), ("c",), ("d",)]
    assert len(replays) == 3


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launches_are_triton_s_own_while_somebody_listens(hook, monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    assert not replay.watched()

    def listen(metadata):
        return metadata

    getattr(knobs.runtime, hook).add(listen)
    try:
        assert replay.watched()
    finally:
        getattr(knobs.runtime, hook).remove(listen)
    assert not replay.watched()
    monkeypatch.setattr(knobs.runtime, hook, listen)
    assert replay.watched()


def test_kernels_compiled_in_another_way_are_triton_s_own_too(monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert replay.watched()


@pytest.mark.parametrize("public", [False, True], ids=["as PyTorch compares", "by parts"])
def test_tensors_lie_alike(public, monkeypatch):
    """Both ways say no of what differs; neither keeps a tensor, and one may come twice."""
    if public:
        monkeypatch.setattr(alike, "_guards", lambda: None)
    else:
        assert alike._guards() is not None
    x = torch.ones(2, 3, 4)
    like = alike.Likeness([x, x.int()])
    assert like([torch.zeros(2, 3, 4), x.int()])
    others = (
        x.double(),
        x[:1],
        x.transpose(0, 1),
        x.to("meta"),
        x[None],
        x.expand(2, 3, 4)[:, :, :3],
    )
    others += (torch.ones(2, 4, 3).transpose(1, 2),)
    for y in others:
        assert not like([y, x.int()])
    assert not like([x])
    assert not like([x, x.int(), x])
    assert not like([x.clone().requires_grad_(), x.int()])
    y = x.clone()
    twice = alike.Likeness([x, y, x])
    assert twice([y, x, y])
    assert not twice([x, y, y])
    assert not twice([x.double(), y, x])
    assert not twice([x, y.double(), x])
    assert not twice([x, y])


@pytest.mark.gpu
@pytest.mark.parametrize("system", ["moba", "nsa"])
def test_the_same_bits_as_of_the_driver(system, monkeypatch):
    """Alone, on another stream, and in a graph that is replayed on other values."""
    kernel = load_kernel(system)
    shapes = tensor_shapes(kernel.spec, 1, 512, 512)

    def made():
        return {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) for n, s in shapes.items()}

    def called(x):
        with torch.no_grad():
            return kernel(**x)

    called(made())
    x = made()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = called(x)
    again = called(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        apart = called(x)
    graph.replay()
    torch.cuda.synchronize()
    monkeypatch.setattr(replay, "watched", lambda: True)
    wanted = called(x)
    for o in (again, apart, captured):
        assert torch.equal(o, wanted)
    x["q"].mul_(0.5)
    graph.replay()
    assert torch.equal(captured, called(x))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 64])
@pytest.mark.parametrize("system", ["moba", "nsa"])
def test_steps_have_the_same_bits_too(system, page, monkeypatch):
    """Of two caches, one by the driver; some tokens are not there, and a graph's are many steps."""
    kernel = load_kernel(system)

    def recorded():
        told = kernel._decoding.replays.told()
        return sum(count for (_, said), count in told.items() if said.endswith("recorded"))

    before = recorded()  # of other tests: a kernel is loaded once
    caches = [kernel.new_cache(2, 1024, torch.bfloat16, "cuda", page=page) for _ in range(2)]
    kept = tensor_shapes(kernel.spec, 2, 1, 1)

    def made(tokens):
        shapes = tensor_shapes(kernel.spec, 2, tokens, tokens)
        x = {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) for n, s in shapes.items()}
        return {n: y * 0.05 if n.endswith("weight") else y for n, y in x.items()}

    learned = {n: y for n, y in made(1).items() if kept[n][:2] != (2, 1)}

    def step(x, cache, lens=None):
        how = {"return_lse": True, "return_selection": True, "new_lens": lens}
        o, lse, chosen = kernel.decode(**{**x, **learned}, cache=cache, **how)
        lse = [*lse.values()] if isinstance(lse, dict) else [lse]
        return [o, *lse, *[each.indices for each in chosen.values()]]

    def same(ours, wanted):
        for y, z in zip(ours, wanted, strict=True):
            assert torch.equal(y, z)
        for name, y in caches[0].tensors.items():
            assert torch.equal(y, caches[1].tensors[name]), name

    def by_driver(*given):
        with monkeypatch.context() as patch:
            patch.setattr(replay, "watched", lambda: True)
            return step(*given)

    first = {**made(300), **learned}
    for cache in caches:
        kernel.extend(**first, cache=cache)
    lens = torch.tensor([3, 2], dtype=torch.int32, device="cuda")
    for tokens, how_many in (*((1, None), (3, lens)) * 4, *((1, None),) * 4, *((3, lens),) * 4):
        x = made(tokens)
        same(step(x, caches[0], how_many), by_driver(x, caches[1], how_many))
    x = made(3)
    with futures.ThreadPoolExecutor(1) as other:  # which has no context of the card yet
        same(other.submit(step, x, caches[0], lens).result(), by_driver(x, caches[1], lens))
    for _ in range(3):
        x = made(1)
        same(step(x, caches[0]), by_driver(x, caches[1]))
    known = pytest.importorskip("triton").__version__.startswith("3.6.") and not torch.version.hip
    assert (kernel._decoding._last.again is not None) == known
    x = made(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, caches[0])
    for _ in range(3):
        for name, y in made(1).items():
            x[name].copy_(y)
        graph.replay()
        same(captured, by_driver(x, caches[1]))
    assert recorded() == before + 3  # the prompt, which came twice, and either kind of step
