"""Launches whose numbers stay where they are: of a repetition the addresses are written, in one go.

Triton's launcher is a function of some forty Python objects, each of which it takes apart in every launch.
What it calls in the end wants one pointer an argument.  So numbers that do not change are kept in memory, as
the driver of the card reads them, and pointers to addresses lead into one table of all that a call has, which
`launching.c` writes.  That is built as Triton builds its own launchers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

compile_module_from_src: Any = None
with contextlib.suppress(ImportError):  # the reference runs without
    from triton.runtime.build import compile_module_from_src

WARP = 32  # threads
MOST = 512  # tensors of a call
NO_CONTEXT = 201  # of the thread that launches
UNEVEN = -1  # a tensor does not begin at 16 bytes
FORMATS = {  # of numbers, by how Triton writes their types
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"},
    **{"fp32": "f", "f32": "f", "fp64": "d"},
}


class Configuration(ctypes.Structure):
    """CUlaunchConfig, as CUDA 12 and later have it."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One launch.

    Attributes:
        function: the card's handle.
        threads: of a program.
        shared: bytes of memory that they share.
        types: by parameter, as Triton writes them; what is compiled in is `constexpr`.
        values: in the same order.
        addresses: of parameters that are pointers, by place, which one in the table.
    """

    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    types: tuple[str, ...]
    values: tuple[Any, ...]
    addresses: Mapping[int, int]

    @property
    def known(self) -> bool:
        """Whether every argument is an address, or a number of a known type."""
        pairs = enumerate(zip(self.types, self.values, strict=True))
        return all(
            of == "constexpr"
            or (of[0] == "*" and (i in self.addresses or value is None))
            or (of in FORMATS and isinstance(value, int | float))
            for i, (of, value) in pairs
        )


class Launches:
    """Launches in order, of one table of addresses: those of tensors, then places in the last of these."""

    def __init__(
        self,
        prepared: Sequence[Prepared],
        tensors: int,
        places: Sequence[tuple[int, int]],
        function: int,
        ordinal: int,
    ) -> None:
        """`tensors`: how many there are; `places`: by buffer which of them it is in, and how far behind;
        `function`: cuLaunchKernelEx, or what stands for it; `ordinal`: of the card.
        """
        self._ordinal = ordinal
        self._launch: Callable[..., int] = _helper().launch
        # the last one is 0, of pointers to nothing
        self._table = (ctypes.c_uint64 * (tensors + len(places) + 1))()
        flat = [number for place in places for number in place]
        self._places = (ctypes.c_int64 * len(flat))(*flat)
        self._kept: list[Any] = []  # what is pointed to
        each = [number for one in prepared if 0 not in one.grid for number in self._add(one)]
        self._each = (ctypes.c_void_p * len(each))(*each)
        where = (self._each, self._table, self._places)
        launches, table, placed = map(ctypes.addressof, where)
        self._fixed = (function, launches, len(each) // 3, table, placed, len(places))

    def _add(self, one: Prepared) -> tuple[int, int, int]:
        """Its configuration, function and arguments."""
        grid = (*one.grid, 1, 1)[:3]
        configuration = Configuration(*grid, one.threads, 1, 1, one.shared, None, None, 0)
        first, last, places = ctypes.addressof(self._table), len(self._table) - 1, list[int]()
        for i, (of, value) in enumerate(zip(one.types, one.values, strict=True)):
            if of == "constexpr":
                continue
            if of[0] == "*":
                places.append(first + 8 * one.addresses.get(i, last))
                continue
            number = ctypes.create_string_buffer(8)
            struct.pack_into(FORMATS[of], number, 0, value)
            self._kept.append(number)
            places.append(ctypes.addressof(number))
        # behind a kernel's own: memory that Triton might give it, and has none of
        places += [first + 8 * last] * 2
        arguments = (ctypes.c_void_p * len(places))(*places)
        self._kept += (configuration, arguments)
        return ctypes.addressof(configuration), one.function, ctypes.addressof(arguments)

    def __call__(self, tensors: tuple[Any, ...], stream: int, even: int = 0) -> bool:
        """Launch on a stream of the current device, which tensors must outlive; they may be addresses.

        even: How many of the first have to begin at 16 bytes; False where one does not, and nothing is done.

        Raises:
            RuntimeError: the driver refuses.
        """
        code = self._launch(*self._fixed, stream, even, tensors)
        if code == NO_CONTEXT:  # a thread's first use of a card makes one; nothing was launched
            _make_current(self._ordinal)
            code = self._launch(*self._fixed, stream, even, tensors)
        if code > 0:
            raise RuntimeError(f"CUDA: a launch failed: {_said(code)}")
        return code != UNEVEN


@functools.cache
def function() -> int | None:
    """Where cuLaunchKernelEx is; None where nothing launches so, or no compiler is there to."""
    found = getattr(_library(), "cuLaunchKernelEx", None)
    if found is None:
        return None
    try:
        _helper()
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return (
            None  # Triton had its own launchers, built before; `Kernel.explain` says who launches
        )
    return ctypes.cast(found, ctypes.c_void_p).value


@functools.cache
def _helper() -> Any:
    """`launching.c`."""
    text = Path(__file__).with_suffix(".c").read_text()
    return compile_module_from_src(text, "hsgen_launching")


@functools.cache
def _library() -> Any:
    """The card's driver; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _make_current(ordinal: int) -> None:
    """The context that everybody shares on a card, as Triton's launcher does."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    cuda = _library()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    cuda.cuCtxSetCurrent(context)


def _said(code: int) -> str:
    """An error in the driver's words."""
    words, cuda = ctypes.c_char_p(), _library()
    if cuda is None or cuda.cuGetErrorString(code, ctypes.byref(words)) or words.value is None:
        return f"error {code}"
    return words.value.decode()
