"""Launches from memory: what the card's driver reads, by a function that stands for it."""

import ctypes
import struct
import types

import pytest
import torch

from hsgen import launching

TYPES = ("*bf16", "i32", "constexpr", "*fp32", "i64", "*i32", "fp32")
seen, answers = [], []


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
def note(configuration, function, arguments, _):
    launch = launching.Configuration.from_address(configuration)
    places = (ctypes.c_void_p * 8).from_address(arguments)
    grid = (launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x, launch.shared)
    seen.append((function, grid, launch.stream, [ctypes.string_at(at, 8) for at in places]))
    return answers.pop(0) if answers else 0


@pytest.fixture(autouse=True)
def fresh():
    seen.clear()
    answers.clear()


def prepared(grid=(3, 2), **changes):
    fields = {
        "function": 77,
        "grid": grid,
        "threads": 128,
        "shared": 4096,
        "types": TYPES,
        "values": (None, -5, 64, None, 1 << 40, None, 0.5),
        "addresses": {0: 1, 3: 4},  # a tensor, and a place
    }
    return launching.Prepared(**(fields | changes))


def launches(*each):
    """Of three tensors, the last of which is a room with two places."""
    function = ctypes.cast(note, ctypes.c_void_p).value
    return launching.Launches(each, 3, [(2, 0), (2, 256)], function, 0)


def test_the_driver_reads_what_a_launch_has():
    assert prepared().known
    x = [torch.ones(4) for _ in range(3)]
    assert launches(prepared(), prepared(grid=(4, 0)), prepared(grid=(9,)))((*x,), 5)
    assert [grid for _, grid, *_ in seen] == [(3, 2, 1, 128, 4096), (9, 1, 1, 128, 4096)]
    for function, _, stream, (first, five, place, wide, none, half, *scratch) in seen:
        assert (function, stream) == (77, 5)
        assert struct.unpack("Q", first) == (x[1].data_ptr(),)
        assert struct.unpack("Q", place) == (x[2].data_ptr() + 256,)
        assert struct.unpack_from("i", five) == (-5,)
        assert struct.unpack("q", wide) == (1 << 40,)
        assert struct.unpack_from("f", half) == (0.5,)
        assert {none, *scratch} == {bytes(8)}


def test_addresses_will_do_and_others_are_of_their_own_call():
    of = launches(prepared())
    for at in (16, 1 << 63):
        assert of((0, at, 32), 0)
    read = [struct.unpack("Q", places[0]) for *_, places in seen]
    assert read == [(16,), (1 << 63,)]
    assert seen[0][2] is None  # the stream that is everybody's


def test_where_tensors_do_not_begin_at_16_bytes_nothing_is_launched():
    of = launches(prepared())
    assert not of((16, 24, 32), 0, 2)
    assert not seen
    assert of((16, 32, 24), 0, 2)  # behind those that have to
    assert of((16, 24, 32), 0)
    assert len(seen) == 2


def test_a_launch_that_the_driver_refuses_is_told():
    answers.append(1)
    with pytest.raises(RuntimeError, match="CUDA: a launch failed: "):
        launches(prepared(), prepared())((0, 0, 0), 0)
    assert len(seen) == 1  # and those behind it are not made


@pytest.mark.parametrize("built", [True, False])
def test_without_a_compiler_triton_launches(built, monkeypatch):
    """Whose launchers may have been built before, elsewhere."""

    def build(*_):
        if not built:
            raise RuntimeError("no compiler")

    card = types.SimpleNamespace(cuLaunchKernelEx=note)
    monkeypatch.setattr(launching, "_library", lambda: card)
    monkeypatch.setattr(launching, "compile_module_from_src", build)
    monkeypatch.setattr(launching, "_helper", launching._helper.__wrapped__)
    found = launching.function.__wrapped__()
    assert found == (ctypes.cast(note, ctypes.c_void_p).value if built else None)


def test_a_thread_without_a_context_gets_one(monkeypatch):
    made = []
    monkeypatch.setattr(launching, "_make_current", made.append)
    answers.append(launching.NO_CONTEXT)
    assert launches(prepared())((0, 0, 0), 0)
    assert (made, len(seen)) == ([0], 2)


def test_what_is_no_tensor_is_an_error_and_no_launch():
    with pytest.raises(AttributeError, match="data_ptr"):
        launches(prepared())((0, "x", 0), 0)
    assert not seen


@pytest.mark.parametrize(
    "changes",
    [
        {"types": ("nvTmaDesc", *TYPES[1:])},
        {"types": ("fp16", *TYPES[1:])},
        {"values": ("x", -5, 64, None, 1, None, 0.5), "addresses": {3: 4}},
        {"values": (None, None, 64, None, 1, None, 0.5)},
    ],
    ids=["tiles", "a half", "a pointer to something else", "no number"],
)
def test_arguments_that_are_not_known_are_triton_s(changes):
    assert not prepared(**changes).known


def test_configurations_lie_as_the_driver_has_them():
    """CUlaunchConfig of CUDA 12 and 13: seven numbers, a stream, attributes, and how many."""
    fields = ("grid_x", "block_x", "shared", "stream", "attributes", "count")
    at = [getattr(launching.Configuration, name).offset for name in fields]
    assert at == [0, 12, 24, 32, 40, 48]
    assert ctypes.sizeof(launching.Configuration) == 56
