"""The memory a launch may touch: which view a pointer belongs to, and who touched each element.

A pointer carries the number of its tensor argument in its top byte, so an index of -1 is a fault of
that argument even where the address happens to lie inside another one.
"""

from dataclasses import dataclass

import numpy as np

TAG_SHIFT = 56
ADDRESS_MASK = np.uint64((1 << TAG_SHIFT) - 1)
MANY = 1  # ticks are above it
PAGE_BITS = 14
DENSE_LIMIT = 1 << 22


@dataclass(frozen=True, slots=True)
class Problem:
    """One violated rule.  `lanes` counts the offending elements of the operation."""

    kind: str
    detail: str
    lanes: int


@dataclass(slots=True, eq=False)
class View:
    """One tensor argument.  `levels` are (stride, size, span inside) in elements, outermost first."""

    name: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    extent: int
    levels: tuple[tuple[int, int], ...]
    region: "Region | None" = None

    @property
    def end(self):
        """First byte behind the view."""
        return self.start + self.extent

    def describe(self):
        """Name, shape and strides for a report."""
        return f"{self.name} (shape {list(self.shape)}, strides {list(self.strides)})"


def make_view(name, tensor):
    """The view that a tensor argument opens: its elements, not its whole storage."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    itemsize = tensor.element_size()
    if 0 in shape:
        return View(name, tensor.data_ptr(), shape, strides, itemsize, 0, ())
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return View(
        name,
        tensor.data_ptr(),
        shape,
        strides,
        itemsize,
        extent * itemsize,
        _levels(shape, strides),
    )


def _levels(shape, strides):
    """Strides from large to small with what is contiguous merged; () where ranges are enough."""
    dims = sorted(
        ((s, n) for n, s in zip(shape, strides, strict=True) if n > 1 and s > 0), reverse=True
    )
    merged: list[tuple[int, int]] = []
    for stride, size in dims:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    if len(merged) <= 1 and all(stride == 1 for stride, _ in merged):
        return ()
    inner = 1
    for stride, size in reversed(merged):
        if stride < inner:  # windows that overlap: an element has no unique index
            return ()
        inner = (size - 1) * stride + inner
    return tuple(merged)


def outside(view, offsets, size):
    """Which byte offsets from the view's start do not name an element of it.  [N] -> bool[N]"""
    wrong = (offsets < 0) | (offsets > view.extent - size)
    if not view.levels or wrong.all():
        return wrong
    rest = np.where(wrong, 0, offsets) // view.itemsize
    for stride, count in view.levels:
        index = np.minimum(rest // stride, count - 1)
        rest = rest - index * stride
    return wrong | (rest != 0)


def offsets_inside(view, pointers, tag, size):
    """Byte offsets of pointers that all have the tag and name elements of a view; None where one does not."""
    start = np.uint64((tag << TAG_SHIFT) | view.start)
    offsets = pointers - start  # of what lies before it, huge
    if size > view.extent or np.count_nonzero(offsets > np.uint64(view.extent - size)):
        return None
    offsets = offsets.view(np.int64)
    if view.levels and np.count_nonzero(outside(view, offsets, size)):
        return None
    return offsets


class Region:
    """Bytes that one or several overlapping views cover, with a shadow of who touched what.

    The shadow holds ticks: every program, and every barrier in it, starts a new one.  0 is nobody,
    MANY, which is less than any, is more than one program.  Large regions are paged, since a test of
    64-bit offsets views far more memory than it touches.
    """

    def __init__(self, start, end, granule):
        """Cover [start, end) in granules of so many bytes."""
        self.start, self.end, self.granule = start, end, granule
        self.shift = granule.bit_length() - 1
        count = -(-(end - start) // granule)
        self.pages = None if count <= DENSE_LIMIT else np.zeros((count >> PAGE_BITS) + 1, np.int32)
        size = count if self.pages is None else 1 << PAGE_BITS
        self.written = np.zeros(size, np.int32)
        self.read = np.zeros(size, np.int32)
        self.updated = np.zeros(size, np.int32)
        self.has_writes = self.has_updates = self.has_reads = False

    def locate(self, offsets, size):
        """Offsets in bytes from the start -> positions in the shadow."""
        index = offsets >> self.shift
        if size > self.granule:
            index = (index[:, None] + np.arange(size // self.granule)).reshape(-1)
        if self.pages is None:
            return index
        page = index >> PAGE_BITS
        fresh = np.unique(page[self.pages[page] == 0])
        if fresh.size:
            self._open(fresh)
        return (self.pages[page].astype(np.int64) << PAGE_BITS) | (index & ((1 << PAGE_BITS) - 1))

    def _open(self, pages):
        first = self.written.size >> PAGE_BITS
        self.pages[pages] = np.arange(first, first + pages.size)
        more = np.zeros(pages.size << PAGE_BITS, np.int32)
        self.written = np.concatenate([self.written, more])
        self.read = np.concatenate([self.read, more])
        self.updated = np.concatenate([self.updated, more])

    def load(self, index, first, tick):
        """A program reads.  Its ticks are >= first, the present one is `tick`.  -> problems"""
        found = []
        if self.has_writes:
            marks = self.written[index]
            found += [*_others("read-write race", marks, first), *_unsynchronised(marks, tick)]
        if self.has_updates:
            marks = self.updated[index]
            found += [*_others("atomic race", marks, first), *_unsynchronised(marks, tick)]
        _mark(self.read, index, first, tick)
        self.has_reads = True
        return found

    def store(self, index, first, tick):
        """A program writes.  -> problems"""
        found = []
        if self.has_writes:
            found += _others("write-write race", self.written[index], first)
        if self.has_reads:
            found += _others("read-write race", self.read[index], first)
        if self.has_updates:
            marks = self.updated[index]
            found += [*_others("atomic race", marks, first), *_unsynchronised(marks, tick)]
        self.written[index] = tick
        self.has_writes = True
        return found

    def update(self, index, first, tick):
        """A program changes memory atomically: no conflict with other atomics.  -> problems"""
        found = []
        if self.has_writes:
            marks = self.written[index]
            found += [*_others("atomic race", marks, first), *_unsynchronised(marks, tick)]
        if self.has_reads:
            found += _others("atomic race", self.read[index], first)
        _mark(self.updated, index, first, tick)
        self.has_updates = True
        return found


def _foreign(marks, first):
    """Which were made by another program, or by several: 0 < mark < first.  int32[N] -> bool[N]"""
    return (marks - np.int32(1)).view(np.uint32) < np.uint32(first - 1)


def _mark(shadow, index, first, tick):
    foreign = _foreign(shadow[index], first)
    shadow[index] = np.where(foreign, np.int32(MANY), np.int32(tick)) if foreign.any() else tick


def _others(kind, marks, first):
    count = np.count_nonzero(_foreign(marks, first))
    return [Problem(kind, "another program touches the same address", count)] if count else []


def _unsynchronised(marks, tick):
    count = np.count_nonzero(marks == tick)
    detail = "this program changed the address and no tl.debug_barrier lies between"
    return [Problem("missing barrier", detail, count)] if count else []


def assign_regions(views):
    """Group views that share bytes, so that a race through an alias is seen too."""
    group: list[View] = []
    end = -1
    for view in sorted((v for v in views if v.extent), key=lambda v: v.start):
        if view.start >= end and group:
            _close(group)
            group = []
        group.append(view)
        end = max(end, view.end)
    if group:
        _close(group)


def _close(group):
    start, end = group[0].start, max(v.end for v in group)
    region = Region(start, end, min(v.itemsize for v in group))
    for view in group:
        view.region = region
