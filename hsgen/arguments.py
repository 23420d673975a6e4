"""What a kernel's caller must pass, and what to say where it does not: argument, expected, got.

Looks at names, shapes, strides, dtypes and devices; at values only when told to, since that waits
for the device.  Runs once for each new signature of a call, so it may be thorough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hsgen.axes import Tiling
from hsgen.batch import Batch
from hsgen.errors import ArgumentError, nearest
from hsgen.graph import TensorInput
from hsgen.selection import BitmapSelection, ListSelection, Selection, to_list
from hsgen.together import Part

Layout = Literal["bthd", "bhtd"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REFERENCE_DTYPES = (*DTYPES, torch.float64)
SHORT_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "int32",
    torch.int64: "int64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a spec asks of its callers.

    Attributes:
        spec: the spec's name, for messages.
        inputs: the tensors, q first, dimensions by name as the graph writes them.
        sizes: the dimensions that the spec fixes; the others are bound by the tensors.
        selections: by selecting level: its selection heads, a name or a number, and slots of a row, or
            the part of the entries that a row keeps.
        attended: the levels that a caller's selection must have; the others only narrow these.
        brought: the levels that another layer chose of, so that every call must have a selection.
        where: says where the spec states a dimension, as `specs/nsa.yaml:6:1`; "" if unknown.
    """

    spec: str
    inputs: tuple[TensorInput, ...]
    sizes: Mapping[str, int]
    selections: Mapping[str, tuple[str, int | Part]]
    attended: tuple[str, ...]
    brought: tuple[str, ...]
    where: Callable[[str], str]
    names: tuple[str, ...]  # of the inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What the tensors of one call say: every dimension by name, their dtype and device."""

    sizes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    packed: bool
    batch: int
    tokens: int  # T, or the total of all queries when packed
    keys: int  # S, or the total of all keys when packed
    empty: bool  # no query attends to any key

    @property
    def rows(self) -> tuple[int, ...]:
        """Leading dimensions of what has one row a query: (B, T), or (total,) when packed."""
        return (self.tokens,) if self.packed else (self.batch, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lengths:
    """Where sequences start and end, as the caller gave it."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    q_offset: int | Tensor | None = None
    kv_lens: int | Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None


def check_names(expected: Expected, given: Mapping[str, object]) -> None:
    """Every tensor that the spec needs is there, and none that it does not know.

    `k` and `v`, which have places of their own in the signature, may be there unneeded.
    """
    needed = expected.names
    if missing := [name for name in needed if given.get(name) is None]:
        text = "; ".join(str(each) for each in expected.inputs if each.name in missing)
        raise ArgumentError(
            f"{', '.join(missing)}: expected a tensor, got nothing",
            help=f"spec {expected.spec!r} needs {text}",
        )
    if unknown := sorted(set(given) - set(needed) - {"k", "v"}):
        near = nearest(unknown[0], needed)
        hint = f"did you mean {near!r}? " if near else ""
        raise ArgumentError(
            f"{unknown[0]}: spec {expected.spec!r} has no such tensor",
            help=f"{hint}tensors here: {', '.join(needed)}",
        )


def check_tensors(
    expected: Expected,
    tensors: Mapping[str, Tensor],
    *,
    layout: str,
    packed: bool,
    meant: bool = False,
) -> Problem:
    """Ranks, dimensions, strides, dtypes and devices, as one value if all is well.

    Args:
        expected: What the spec asks for.
        tensors: As the caller gave them, by name, none missing.
        layout: The order of dimensions of every 4-D tensor.
        packed: Sequences lie one after the other, without a batch dimension.
        meant: The reference takes them, which computes in float64 on any device.

    Raises:
        ArgumentError: argument, expected and got.
    """
    order = _checked_layout(layout, packed=packed)
    checker = _Checker(
        expected=expected,
        tensors=tensors,
        layout=order,
        packed=packed,
        meant=meant,
        sizes=dict(expected.sizes),
    )
    for each in expected.inputs:
        checker.check(each)
    if packed:
        checker.sizes["B"] = 1
    q, sizes = tensors["q"], checker.sizes
    return Problem(
        sizes=sizes,
        dtype=q.dtype,
        device=q.device,
        layout=order,
        packed=packed,
        batch=sizes["B"],
        tokens=sizes["T"],
        keys=sizes["S"],
        empty=sizes["B"] == 0 or sizes["T"] == 0 or sizes["S"] == 0,
    )


def _checked_layout(layout: str, *, packed: bool) -> Layout:
    for each in get_args(Layout):
        if each == layout:
            if packed and each != "bthd":
                raise ArgumentError(
                    f"layout: packed sequences are [total, H, D], got layout {layout!r}",
                    help="leave layout out where cu_seqlens_q is given",
                )
            return each
    raise ArgumentError(
        f"layout: expected 'bthd' or 'bhtd', got {layout!r}",
        help="'bthd' is [B, T, H, D] (flash-attn), 'bhtd' is [B, H, T, D] (SDPA, transformers)",
    )


def dims_of_caller(dims: tuple[str, ...], layout: str, *, packed: bool) -> tuple[str, ...]:
    """Dimensions of an input in the caller's order."""
    if packed and dims[0] == "B":
        return dims[1:]
    if layout == "bhtd" and len(dims) == 4 and dims[0] == "B":
        return (dims[0], dims[2], dims[1], dims[3])
    return dims


@dataclass(slots=True, kw_only=True)
class _Checker:
    """Compares one tensor after the other; a dimension first met is bound to what it is there."""

    expected: Expected
    tensors: Mapping[str, Tensor]
    layout: Layout
    packed: bool
    meant: bool
    sizes: dict[str, int]

    def check(self, each: TensorInput) -> None:
        tensor = self.tensors[each.name]
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"{each.name}: expected a tensor {self._shown(each)}, got {type(tensor).__name__}"
            )
        dims = self._dims(each)
        if tensor.ndim != len(dims):
            self._fail(each, self._rank_help(tensor.ndim, len(dims)))
        for name, size in zip(dims, tensor.shape, strict=True):
            known = self._size(name)
            if known is None:
                self.sizes[name] = size
            elif size != known:
                self._fail(each, self._help(name))
        self._check_group(each)
        self._check_kind(each, tensor)

    def _check_group(self, each: TensorInput) -> None:
        """Query heads are a multiple of key heads, when both have become known."""
        query, kv = self.sizes.get("Hq"), self.sizes.get("Hkv")
        if query is not None and kv is not None and (kv < 1 or query % kv):
            self._fail(each, f"q has Hq = {query} heads; Hkv must divide that")

    def _check_kind(self, each: TensorInput, tensor: Tensor) -> None:
        q = self.tensors["q"]
        allowed = REFERENCE_DTYPES if self.meant or q.device.type == "cpu" else DTYPES
        if each.type.dtype == "i32":
            if tensor.dtype != torch.int32 or tensor.device != q.device:
                self._fail(
                    each, "numbers are int32, on the device of q; `.to(torch.int32)` converts"
                )
        elif tensor.dtype != q.dtype or tensor.device != q.device:
            self._fail(each, "every tensor has the dtype and the device of q")
        if q.dtype not in allowed:
            names = ", ".join(SHORT_NAMES[dtype] for dtype in allowed)
            self._fail(each, f"dtypes here: {names}")
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ArgumentError(
                f"{each.name}: expected stride 1 in the last dimension, "
                f"got strides {tuple(tensor.stride())}",
                help="all other strides are free, the last is not: lay it out anew once, upstream",
            )

    def _dims(self, each: TensorInput) -> tuple[str, ...]:
        """Dimensions in the caller's order."""
        return dims_of_caller(each.type.dims, self.layout, packed=self.packed)

    def _size(self, name: str) -> int | None:
        return int(name) if name.isdecimal() else self.sizes.get(name)

    def _fits(self, each: TensorInput, dims: tuple[str, ...]) -> bool:
        tensor = self.tensors[each.name]
        return isinstance(tensor, Tensor) and tensor.ndim == len(dims)

    def _shown(self, each: TensorInput) -> str:
        dims = self._dims(each)
        got = self.tensors[each.name].shape if self._fits(each, dims) else ()
        free = dict(zip(dims, got, strict=False))  # what no tensor has bound yet
        sizes = [free.get(name) if self._size(name) is None else self._size(name) for name in dims]
        numbers = ", ".join("?" if size is None else str(size) for size in sizes)
        rename = {"T": "total_q", "S": "total_k"} if self.packed else {}
        names = ", ".join(rename.get(name, name) for name in dims)
        return f"[{names}] = [{numbers}]"

    def _fail(self, each: TensorInput, help: str) -> None:
        tensor = self.tensors[each.name]
        raise ArgumentError(
            f"{each.name}: expected {self._shown(each)} {self._wanted(each)}, "
            f"got {list(tensor.shape)} {_kind(tensor)}",
            help=help,
        )

    def _wanted(self, each: TensorInput) -> str:
        q = self.tensors["q"]
        return f"int32 {q.device}" if each.type.dtype == "i32" else _kind(q)

    def _rank_help(self, got: int, wanted: int) -> str:
        if self.packed and got == wanted + 1:
            return "with cu_seqlens_q tensors are packed and have no batch dimension"
        if not self.packed and got == wanted - 1:
            return "packed sequences need cu_seqlens_q"
        return f"expected {wanted} dimensions, got {got}"

    def _help(self, name: str) -> str:
        """Where the size that was expected comes from."""
        if name in self.expected.sizes or name.isdecimal():
            place = self.expected.where(name)
            stated = f" ({place})" if place else ""
            size = name if name.isdecimal() else f"{name} = {self.expected.sizes[name]}"
            return f"spec {self.expected.spec!r} has {size}{stated}"
        first = next(
            each.name
            for each in self.expected.inputs
            if name in each.type.dims and each.name in self.tensors
        )
        return f"{name} = {self.sizes[name]}, as in {first}"


def _kind(tensor: Tensor) -> str:
    """As in `bf16 cuda:0`."""
    name = SHORT_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return f"{name} {tensor.device}"


# --- lengths


def check_lengths(lengths: Lengths, problem: Problem) -> None:
    """Shapes, dtypes and devices of what says where sequences are; no values."""
    if not lengths.packed:
        for name in ("cu_seqlens_k", "max_seqlen_k"):
            if getattr(lengths, name) is not None:
                raise ArgumentError(f"{name}: expected cu_seqlens_q beside it, got none")
    sequences = _check_cu_seqlens(lengths, problem) if lengths.packed else problem.batch
    if problem.sizes.get("Z", sequences) != sequences:
        got = problem.sizes["Z"]
        raise ArgumentError(f"route: expected one for each of {sequences} sequences, got {got}")
    for name in ("q_offset", "kv_lens"):
        value = getattr(lengths, name)
        if isinstance(value, Tensor):
            _check_int_tensor(name, value, sequences, problem.device, what="one a sequence")
        elif value is not None and (
            isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))
        ):
            raise ArgumentError(
                f"{name}: expected an int or int32 [{sequences}], got {type(value).__name__}"
            )
    if isinstance(lengths.kv_lens, int) and not 0 <= lengths.kv_lens <= problem.keys:
        raise ArgumentError(f"kv_lens: expected 0 to S = {problem.keys}, got {lengths.kv_lens}")
    most = lengths.max_seqlen_k
    if most is not None and (not isinstance(most, (int, torch.SymInt)) or most < 0):
        raise ArgumentError(f"max_seqlen_k: expected an int of at least 0, got {most!r}")


def check_places(places: int, problem: Problem) -> None:
    """Keys of a sequence against what its axes have a place for; lengths of packed ones are values."""
    if not problem.packed and problem.keys > places:
        raise ArgumentError(
            f"k: expected at most {places} tokens, as many as `axes` have places, got {problem.keys}",
            help="give `axes=` to Spec.bind",
        )


def check_packed_places(places: int, batch: Batch) -> None:
    """The same of every sequence of a batch; waits for the device."""
    for z, row in enumerate(batch.table.tolist()):
        if row[5] > places:
            raise ArgumentError(
                f"k: expected at most {places} tokens a sequence, as many as `axes` have places, "
                f"got {row[5]} of sequence {z}",
                help="give `axes=` to Spec.bind",
            )


def _check_cu_seqlens(lengths: Lengths, problem: Problem) -> int:
    """The pair of cumulative lengths.  -> number of sequences"""
    q, k = lengths.cu_seqlens_q, lengths.cu_seqlens_k
    assert q is not None
    if k is None and problem.tokens != problem.keys:
        raise ArgumentError(
            f"cu_seqlens_k: expected it, as q and k have {problem.tokens} and {problem.keys} rows"
        )
    if q.ndim != 1 or len(q) < 1:
        raise ArgumentError(f"cu_seqlens_q: expected int32 [Z + 1], got {list(q.shape)}")
    for name, value in (("cu_seqlens_q", q), ("cu_seqlens_k", k)):
        if value is not None:
            _check_int_tensor(name, value, len(q), problem.device, what="Z + 1")
    return len(q) - 1


def _check_int_tensor(
    name: str, value: Tensor, count: int, device: torch.device, *, what: str
) -> None:
    shape = list(value.shape)
    scalar = value.ndim == 0 and not name.startswith("cu_")
    if value.dtype != torch.int32 or value.device != device or not (shape == [count] or scalar):
        raise ArgumentError(
            f"{name}: expected [{count}] int32 {device}, got {shape} {_kind(value)}",
            help=f"{what}; `.to(torch.int32)` converts",
        )


def check_values(lengths: Lengths, batch: Batch, problem: Problem) -> None:
    """The numbers in lengths; waits for the device."""
    for name, total in (("cu_seqlens_q", problem.tokens), ("cu_seqlens_k", problem.keys)):
        cu = getattr(lengths, name)
        if cu is not None:
            _check_cumulative(name, cu.tolist(), total)
    capacity = _capacities(lengths, batch, problem)
    for z, (row, most) in enumerate(zip(batch.table.tolist(), capacity, strict=True)):
        if not 0 <= row[5] <= most:
            raise ArgumentError(f"kv_lens[{z}]: expected 0 to {most}, got {row[5]}")


def _capacities(lengths: Lengths, batch: Batch, problem: Problem) -> list[int]:
    """Keys that each sequence can have at most."""
    cu = lengths.cu_seqlens_k if lengths.cu_seqlens_k is not None else lengths.cu_seqlens_q
    if cu is None:
        return [problem.keys] * batch.sequences
    sizes = cu.diff().tolist()
    limit = lengths.max_seqlen_k
    if limit is not None and sizes and max(sizes) > limit:
        raise ArgumentError(f"max_seqlen_k: expected at least {max(sizes)}, got {limit}")
    return sizes


def _check_cumulative(name: str, values: list[int], total: int) -> None:
    if values[0] != 0 or values[-1] != total:
        raise ArgumentError(
            f"{name}: expected 0 at the start and {total} at the end, "
            f"got {values[0]} and {values[-1]}"
        )
    for z, (low, high) in enumerate(itertools.pairwise(values)):
        if low > high:
            raise ArgumentError(f"{name}[{z + 1}]: expected at least {low}, got {high}")


# --- selections


def listed_selection(
    expected: Expected, given: Mapping[str, Selection | Tensor] | None
) -> dict[str, Tensor]:
    """A caller's selections as indices [..., Hs, K], by level, in the order of the spec."""
    if missing := [level for level in expected.brought if not given or level not in given]:
        raise ArgumentError(
            f"selection: expected level {missing[0]!r}, got {_levels_text(given)}",
            help=f"spec {expected.spec!r} attends what another layer chose: "
            f"`selection=` of that layer's `select`",
        )
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"selection: expected {{level: selection}}, got {type(given).__name__}",
            help=f"levels here: {', '.join(expected.selections)}",
        )
    for level in given:
        if level not in expected.selections:
            near = nearest(str(level), expected.selections)
            hint = f"did you mean {near!r}? " if near else ""
            raise ArgumentError(
                f"selection: spec {expected.spec!r} has no selecting level {level!r}",
                help=f"{hint}levels here: {', '.join(expected.selections) or 'none'}",
            )
    for level in expected.attended if given else ():
        if level not in given:
            raise ArgumentError(
                f"selection: expected level {level!r}, which is attended, got {', '.join(given)}"
            )
    return {level: _indices(level, given[level]) for level in expected.selections if level in given}


def _levels_text(given: Mapping[str, object] | None) -> str:
    return ", ".join(map(str, given)) if given else "none"


def _indices(level: str, selection: Selection | Tensor) -> Tensor:
    match selection:
        case Tensor():
            return selection
        case ListSelection() | BitmapSelection() if selection.level != level:
            raise ArgumentError(
                f"selection[{level!r}]: expected that level, got one of {selection.level!r}"
            )
        case ListSelection(indices=indices):
            return indices
        case BitmapSelection():
            return to_list(selection).indices
        case _:
            raise ArgumentError(
                f"selection[{level!r}]: expected a ListSelection, a BitmapSelection or int32 "
                f"indices, got {type(selection).__name__}"
            )


def check_selections(
    expected: Expected, problem: Problem, selections: Iterable[tuple[str, Tensor]]
) -> None:
    """Rank, rows, heads, dtype and device of indices that a caller passes in."""
    for level, indices in selections:
        heads, width = expected.selections[level]
        if isinstance(width, Part):
            width = width.entries(problem.keys)
        wanted = int(heads) if heads.isdecimal() else problem.sizes[heads]
        rows = [problem.tokens] if problem.packed else [problem.batch, problem.tokens]
        names = ["total_q"] if problem.packed else ["B", "T"]
        fits = list(indices.shape[:-1]) == [*rows, wanted] and 0 < indices.shape[-1] <= width
        if not fits or indices.dtype != torch.int32 or indices.device != problem.device:
            shown = ", ".join(str(size) for size in [*rows, wanted])
            raise ArgumentError(
                f"selection[{level!r}]: expected [{', '.join(names)}, Hs, K] = "
                f"[{shown}, 1 to {width}] int32 {problem.device}, got {list(indices.shape)} {_kind(indices)}",
                help="selections are [B, T, Hs, K] in every layout; -1 fills unused slots",
            )


def check_selection_values(
    level: str, indices: Tensor, batch: Batch, *, stride: int, tiling: Tiling | None = None
) -> None:
    """Indices that are -1 or of an entry of their sequence; waits for the device.

    Args:
        level: The level they select entries of.
        indices: i32[B, T, Hs, K] or packed.
        batch: Where the sequences are.
        stride: Tokens from one entry of the level to the next.
        tiling: Of entries that are its tiles, wherever they lie.
    """
    flat = indices.reshape(batch.rows, -1)
    for z, (start, _, length, _, _, k_len) in enumerate(batch.table.tolist()):
        limit = tiling.begun(k_len) if tiling else -(-k_len // stride)
        mine = flat[start : start + length]
        wrong = mine[(mine < -1) | (mine >= limit)]
        if wrong.numel():
            raise ArgumentError(
                f"selection[{level!r}]: expected -1 to {limit - 1} in sequence {z}, "
                f"got {int(wrong[0])}"
            )
