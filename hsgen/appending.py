"""What puts new tokens into a cache: their rows behind those that are there, then the entries they complete.

A call advances the lengths of all sequences, copies every stream, and pools what became complete: as much
work for a token, however many there are before it.  Of a few tokens one launch does the first two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hsgen import rows
from hsgen.kernels import tunables
from hsgen.plan import Config, Kernel, Launch, Param, Step
from hsgen.rows import SEQ, Chunk, chunks, count, pointer
from hsgen.storage import Storage

TOKENS = "tokens"  # the driver's name for new ones of a sequence, at most
LENGTHS = (
    pointer("LENGTHS", "i32", "[Z] tokens that are cached"),
    pointer("NEW", "i32", "[Z] new ones"),
    pointer("SEQ", "i32", "[Z, 6] sequences"),
    count("tokens", "rows of a sequence in the call's tensors"),
    count("capacity", "most tokens of a sequence"),
)
ADVANCE = ("lengths", "new", "batch.table", TOKENS, "batch.keys")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvanceContext:
    """Everything `segments.py.jinja` reads to say where the sequences of a call lie."""

    name: str = "advance"
    header: str = ""
    pieces: str = ""
    how: str = "advance"
    summary: str = "how long each sequence was, and how long it is with the new tokens."

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            *LENGTHS,
            count("num_sequences", "Z"),
            *tunables("BLOCK_V"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One stream, or of several key heads one series: where new rows come from, and where they go."""

    name: str
    heads: int
    dim: int
    letter: str
    series: str = ""  # which one of the tensors, as what is behind their names
    across: int | None = None  # the dimension of the tensors that its heads are

    @property
    def arguments(self) -> tuple[str, str]:
        """New rows and the cache, as the driver has them."""
        return f"new_{self.name}", f"in_{self.name}"

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.dim)

    @property
    def new(self) -> str:
        return f"NEW_{self.letter.upper()}"

    @property
    def kept(self) -> str:
        return self.letter.upper()

    @property
    def from_b(self) -> str:
        return f"new_{self.letter}_b"

    @property
    def from_t(self) -> str:
        return f"new_{self.letter}_t"

    @property
    def from_h(self) -> str:
        return f"new_{self.letter}_h"

    @property
    def to_b(self) -> str:
        return f"{self.letter}_b"

    @property
    def to_t(self) -> str:
        return f"{self.letter}_t"

    @property
    def to_h(self) -> str:
        return f"{self.letter}_h"

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"{self.heads}, {self.dim}]"
        return (
            *rows.tensor(self.new, f"new_{self.letter}", f"[B, T, {shape} {self.name}", "bth"),
            *rows.tensor(self.kept, self.letter, f"[B, S, {shape}", "bth"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContext:
    """Everything `segments.py.jinja` reads to copy new tokens.  `page` > 0: they lie in pages of so many.

    `advances`: a program has a sequence, and says how long it is too.
    """

    name: str
    header: str = ""
    pieces: str = ""
    how: str = "store"
    streams: tuple[Copied, ...]
    page: int = 0
    advances: bool = False

    @property
    def summary(self) -> str:
        return "new tokens behind those that are cached."

    @property
    def numbers(self) -> int:
        """Of a token."""
        return sum(each.heads * each.dim for each in self.streams)

    @property
    def by_heads(self) -> tuple[tuple[int, int, tuple[Copied, ...]], ...]:
        """Streams that have so many heads, as a tile."""
        counts = sorted({each.heads for each in self.streams})
        return tuple(
            (n, rows.next_power(n), tuple(each for each in self.streams if each.heads == n))
            for n in counts
        )

    @property
    def heads(self) -> int:
        """Programs a token: each takes a head of every stream that has so many."""
        return max(each.heads for each in self.streams)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            *(param for each in self.streams for param in each.params),
            *rows.pages_of(self.page),
            *(LENGTHS if self.advances else (*SEQ, count("tiles", "of tokens, of a sequence"))),
            *tunables("BLOCK_V"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def _copied(storage: Storage) -> tuple[Copied, ...]:
    """All streams; a key head's series, or those of an index, are copied as heads are."""
    found: list[Copied] = []
    for stream in storage.streams:
        match stream.dims:
            case (heads, series, dim) if heads > 1:
                each = Copied(name=stream.name, heads=heads, dim=dim, letter="", across=2)
                found += (replace(each, series=f"[:, :, :, {i}]") for i in range(series))
            case (1, series, dim):
                found.append(Copied(name=stream.name, heads=series, dim=dim, letter="", across=3))
            case (heads, dim):
                found.append(Copied(name=stream.name, heads=heads, dim=dim, letter="", across=2))
            case dims:
                found.append(Copied(name=stream.name, heads=1, dim=math.prod(dims), letter=""))
    letters = "abcdefghijklmnop"[: len(found)]
    return tuple(replace(x, letter=letter) for x, letter in zip(found, letters, strict=True))


def plan(storage: Storage, page: int, *, few: bool) -> tuple[tuple[Kernel, ...], tuple[Step, ...]]:
    """The kernels that every append begins with, and the steps that launch them.  `few`: tokens at a time."""
    streams = _copied(storage)
    store = StoreContext(name="store", streams=streams, page=page, advances=few)
    names = tuple(stream.name for stream in storage.streams)
    copied = (*(x for stream in streams for x in _arguments(stream, page)),)
    copied += rows.page_arguments(page)
    if few:
        kernel = Kernel(
            name="store",
            skeleton="segments",
            context=store,
            config=Config(constexprs=(("BLOCK_V", 1),), num_warps=4, num_stages=1),
            operators=names,
        )
        launch = Launch(
            kernel="store", grid=("batch.sequences", "1"), arguments=(*copied, *ADVANCE)
        )
        step = Step(
            title="lengths and tokens",
            needs=names,
            makes=names,
            buffers=(),
            sizes=((TOKENS, "batch.rows // batch.sequences"),),
            launches=(launch,),
        )
        return (kernel,), (step,)
    kernels = (
        Kernel(
            name="advance",
            skeleton="segments",
            context=AdvanceContext(),
            config=Config(constexprs=(("BLOCK_V", 128),), num_warps=4, num_stages=1),
            operators=(),
        ),
        Kernel(
            name="store",
            skeleton="segments",
            context=store,
            config=Config(constexprs=(("BLOCK_V", 8),), num_warps=4, num_stages=1),
            operators=names,
        ),
    )
    steps = (
        Step(
            title="lengths",
            needs=(),
            makes=(),
            buffers=(),
            sizes=((TOKENS, "batch.rows // batch.sequences"),),
            launches=(
                Launch(
                    kernel="advance",
                    grid=("batch.sequences // {BLOCK_V} + 1", "1"),
                    arguments=(*ADVANCE, "batch.sequences"),
                ),
            ),
        ),
        Step(
            title="tokens",
            needs=names,
            makes=names,
            buffers=(),
            sizes=(
                ("step_store", 'config["store"]["BLOCK_V"]'),
                ("tiles_store", f"({TOKENS} + step_store - 1) // step_store"),
            ),
            launches=(
                Launch(
                    kernel="store",
                    grid=("batch.sequences * tiles_store", str(store.heads)),
                    arguments=(
                        *copied,
                        "batch.table",
                        "batch.sequences",
                        "tiles_store",
                    ),
                ),
            ),
        ),
    )
    return kernels, steps


def _arguments(stream: Copied, page: int) -> tuple[str, ...]:
    """New rows and the cache, with their strides."""
    new, kept = stream.arguments
    head = stream.across
    return (
        f"{new}{stream.series}",
        f"{new}.stride(0)",
        f"{new}.stride(1)",
        f"{new}.stride({head})" if head else "0",
        f"{kept}{stream.series}",
        "0" if page else f"{kept}.stride(0)",
        f"{kept}.stride(1)",
        f"{kept}.stride({head})" if head else "0",
    )
