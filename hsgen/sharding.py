"""DTensors: a call whose batch or heads are split over ranks runs on each rank's own part.

Nothing is sent but gradients of what every rank has whole.  Rows and keys are never split: a row may
choose any of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hsgen import arguments
from hsgen.arguments import Expected
from hsgen.errors import ArgumentError, PlanError
from hsgen.graph import (
    Attend,
    Gate,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
    OutputGate,
    Pattern,
    Pool,
    PoolRows,
    Reduce,
    ReduceRows,
    Rotate,
    Round,
    Score,
    Select,
    SelectSet,
    Switch,
    Union,
)
from hsgen.operators import Call
from hsgen.spec import Heads, Spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

Split = Literal["batch", "heads", "none"]
HEADS = ("Hq", "Hkv")
# operators that do with each head, or with those of each key head, the same
OF_HEADS = (
    Attend,
    Gate,
    LogSumExp,
    Map,
    Norm,
    Normalise,
    OutputGate,
    Pool,
    PoolRows,
    Reduce,
    ReduceRows,
    Rotate,
    Round,
    Score,
    Select,
    Switch,
    Union,
)
# rules by which a head chooses for itself, but where its entries are ranked with those of other heads
RULES = ("fraction", "threshold", "top_p", "top_k", "quota")


def holds(call: Call) -> bool:
    """Whether tensors of a call are DTensors; asked by name, as loading them takes a second."""
    return any(type(tensor).__name__ == "DTensor" for tensor in call.tensors)


# --- a spec of some of the heads


def of_part(spec: Spec, graph: Graph, parts: int) -> Spec:
    """The spec of one of `parts` equal parts of the heads; every part has the same.

    Raises:
        ArgumentError: so many parts have no key head each.
        PlanError: heads agree across key heads, or something is said of each head by its number.
    """
    if parts == 1 or spec.heads is None:
        return spec
    if spec.heads.kv % parts:
        raise ArgumentError(
            f"heads: expected parts that divide {spec.heads.kv} key heads, got {parts}",
            span=spec.span("heads"),
            help="split the batch over the other ranks",
        )
    heads = head_dims(spec)
    for node in graph.nodes():
        if words := _across(graph, node, heads):
            raise PlanError(
                f"{spec.name}: heads cannot be split over ranks, as {node.name} {words}",
                span=node.span,
                help="split the batch",
            )
    changes: dict[str, object] = {
        "heads": Heads(query=spec.heads.query // parts, kv=spec.heads.kv // parts)
    }
    if spec.index is not None and spec.index_per_key_head:
        index = spec.index.model_copy(update={"heads": spec.index.heads // parts})
        changes["index"] = index
    return spec.model_copy(update=changes)


def head_dims(spec: Spec) -> tuple[str, ...]:
    """Dimensions that are split with the heads."""
    return (*HEADS, "Hi") if spec.index_per_key_head else HEADS


def _across(graph: Graph, node: Node, heads: Sequence[str]) -> str | None:
    """What one operator does that a part of the heads cannot do alone."""
    if isinstance(node.op, Input):
        return None
    own = any(dim in heads for dim in node.type.dims)
    of_heads = any(dim in heads for each in graph.operands(node) for dim in each.type.dims)
    match node.op:
        case _ if of_heads and not own:
            return "is one for all heads"
        case _ if own and not of_heads:
            return "differs by head"
        case Pool(how="sample") | Attend(pattern=Pattern()):
            return "may differ by the number of a head"
        case SelectSet(rule=rule, scope=scope) if own and rule in RULES and scope != "heads":
            return None
        case op if own and not isinstance(op, OF_HEADS):
            return "may differ by the number of a head"
        case _:
            return None


# --- a call of DTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """A call as one rank has it.

    Attributes:
        call: of this rank's tensors.
        mesh: the ranks.
        splits: what each dimension of the mesh splits.
        parts: of the heads.
        batch: sequences of the whole call.
    """

    call: Call
    mesh: DeviceMesh
    splits: tuple[Split, ...]
    parts: int
    batch: int

    def whole(self, local: Tensor, dims: Sequence[str], heads: Sequence[str]) -> Tensor:
        """A rank's output, of some dimensions, as its part of the whole one."""
        library = _library()
        shape = list(local.shape)
        for at, name in enumerate(dims):
            if name == "B":
                shape[at] = self.batch
            elif name in heads:
                shape[at] *= self.parts
        stride, size = [1] * len(shape), 1
        for at in sorted(range(len(shape)), key=local.stride):  # as it lies, whatever the layout
            stride[at], size = size, size * shape[at]
        return library.DTensor.from_local(
            local,
            self.mesh,
            [_placed(split, dims, heads) for split in self.splits],
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )


def part(call: Call, expected: Expected, heads: Sequence[str]) -> Parted:
    """This rank's part of a call: what every rank has whole stays so, its gradients are added up.

    Raises:
        ArgumentError: a tensor is split otherwise than batch or heads, or lies on other ranks.
    """
    packed = call.cu_seqlens_q is not None
    dims = {
        each.name: arguments.dims_of_caller(each.type.dims, call.layout, packed=packed)
        for each in expected.inputs
    }
    given = dict(zip(expected.names, call.tensors, strict=True))
    for name, tensor in given.items():
        if type(tensor).__name__ != "DTensor":
            raise ArgumentError(
                f"{name}: expected a DTensor, as other tensors of the call are",
                help="DTensor.from_local(x, mesh, [Replicate()]) where every rank has all of it",
            )
    mesh: DeviceMesh = next(iter(given.values())).device_mesh  # type: ignore[attr-defined]
    splits: list[Split] = [_split(given, dims, heads, at) for at in range(mesh.ndim)]
    parts = 1
    for at, split in enumerate(splits):
        parts *= mesh.size(at) if split == "heads" else 1
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.q_offset, call.kv_lens)
    if "batch" in splits and any(each is not None for each in lengths):
        raise ArgumentError(
            "kv_lens: expected no lengths of sequences beside a batch that is split over ranks",
            help="split the heads, or call it with each rank's own tensors and lengths",
        )
    local = [_local(x, mesh, splits, dims[name], heads) for name, x in given.items()]
    chosen: list[Tensor] = []
    for level, indices in zip(call.levels.split(","), call.selection, strict=False):
        if type(indices).__name__ != "DTensor":
            raise ArgumentError(f"selection[{level!r}]: expected a DTensor, as q is one")
        chosen.append(
            _local(indices, mesh, splits, dims_of_selection(expected, level, packed=packed), heads)
        )
    numbers = [None if each is None else _replica(each) for each in lengths]
    return Parted(
        call=call._replace(
            tensors=local,
            selection=chosen,
            cu_seqlens_q=numbers[0],
            cu_seqlens_k=numbers[1],
            q_offset=numbers[2],
            kv_lens=numbers[3],
        ),
        mesh=mesh,
        splits=tuple(splits),
        parts=parts,
        batch=0 if packed else call.tensors[0].shape[0],
    )


def dims_of_selection(expected: Expected, level: str, *, packed: bool) -> tuple[str, ...]:
    """Of the indices of a level, the same in every layout."""
    return (*(("T",) if packed else ("B", "T")), expected.selections[level][0], "K")


def _split(
    given: Mapping[str, Tensor],
    dims: Mapping[str, Sequence[str]],
    heads: Sequence[str],
    at: int,
) -> Split:
    """What one dimension of the mesh splits, by all tensors."""
    found: dict[Split, str] = {}
    for name, tensor in given.items():
        placement: Any = tensor.placements[at]  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        dim = dims[name][placement.dim] if placement.is_shard() else "sum"
        if dim != "B" and dim not in heads:
            raise ArgumentError(
                f"{name}: expected it whole, or split by batch or heads, got {placement}",
                help="x.redistribute(placements=...) first; a row may choose any of the keys",
            )
        split: Split = "batch" if dim == "B" else "heads"
        found[split] = name
    if "batch" in found and "heads" in found:
        raise ArgumentError(
            f"{found['heads']}: expected the batch to be split, as of {found['batch']}, got its heads",
            help="x.redistribute(placements=...) first",
        )
    for split in found:
        return split
    return "none"


def _local(
    x: Tensor, mesh: DeviceMesh, splits: Sequence[Split], dims: Sequence[str], heads: Sequence[str]
) -> Tensor:
    """A rank's part of one tensor."""
    library = _library()
    placements = [_placed(split, dims, heads) for split in splits]
    added = [
        library.Partial() if split != "none" and placement.is_replicate() else placement
        for split, placement in zip(splits, placements, strict=True)
    ]
    parted: Any = x.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return parted.to_local(grad_placements=added)


def _placed(split: Split, dims: Sequence[str], heads: Sequence[str]) -> Placement:
    """Where a tensor of some dimensions lies."""
    library = _library()
    for at, name in enumerate(dims):
        if (split == "batch" and name == "B") or (split == "heads" and name in heads):
            return library.Shard(at)
    return library.Replicate()


def _replica(x: Tensor) -> Tensor:
    """A tensor that every rank has whole."""
    found: Any = x
    return found.to_local() if type(x).__name__ == "DTensor" else x


def _library() -> Any:
    import torch.distributed.tensor as library  # noqa: PLC0415

    return library
