"""What entries are cut from: orders, and the nodes or runs that tokens are assigned to."""

from __future__ import annotations

import math
from typing import Literal

from hsgen import spec as language
from hsgen.errors import PlanError, Span
from hsgen.graph import Assign, AxisTile, Cluster, Cut, Node, Permute, Runs
from hsgen.planner.builder import Builder, some


def cut_of(level: language.Level) -> Cut | None:
    """What the entries of a level are cut from, where it is not the sequence as it stands."""
    if own := _assigned_to(level):
        return own
    if level.permute is None or level.permute.keys is None:
        return None
    return "clusters" if isinstance(level.partition, language.Clusters) else "order"


def order(builder: Builder, level: language.Level) -> tuple[Node, ...]:
    """The operand that says where entries are, slots, clusters, nodes or runs; none where in place."""
    if level.name in builder.assigned:
        return (builder.assigned[level.name],)
    said = level.permute and level.permute.keys
    if said is None:
        return ()
    at = builder.place(level, "permute", "keys")
    name, keys = f"{level.name}.order", builder.keys(level.kv)
    match said:
        case language.SortInSegment():
            op = Permute(level=level.name, by=said.by, segment=said.segment, last=said.last)
            judges = (builder.query(),) if said.by == "mass" else ()
            return (builder.add(name, op, keys, *judges, at=at),)
        case language.KMeans():
            op = Cluster(level=level.name, clusters=said.clusters, iterations=said.iterations)
            clusters = builder.add(f"{level.name}.clusters", op, keys, at=at)
            if cut_of(level) == "clusters":
                return (clusters,)
            op = Permute(level=level.name, by="clusters", segment=None, last=None)
            return (builder.add(name, op, clusters, at=at),)
        case language.Tile():
            axes = axis_tiles(builder, said.tile, at)
            number = math.prod(-(-axis.length // axis.tile) for axis in axes)
            op = Cluster(level=level.name, clusters=number, iterations=None, tiles=axes)
            tiles = builder.add(f"{level.name}.tiles", op, keys, at=at)
            if cut_of(level) == "clusters":
                return (tiles,)
            op = Permute(level=level.name, by="clusters", segment=None, last=None)
            return (builder.add(name, op, tiles, at=at),)
        case language.Gather():
            given = builder.input(f"{level.name}_key_order", "order", "B", "S", "Hkv")
            op = Permute(level=level.name, by="given", segment=None, last=None)
            return (builder.add(name, op, given, at=at),)


def row_cut_of(level: language.Level) -> Cut | None:
    """What the rows that choose together are cut from, where it is not the sequence as it stands."""
    return "clusters" if level.permute and level.permute.queries else None


def row_order(builder: Builder, level: language.Level) -> tuple[Node, ...]:
    """The operand that says which cluster every row is in; none where rows are in place."""
    said = level.permute and level.permute.queries
    if said is None:
        return ()
    at, queries = builder.place(level, "permute", "queries"), builder.query(level.q)
    op = Cluster(level=level.name, clusters=said.clusters, iterations=said.iterations, of="queries")
    return (builder.add(f"{level.name}.row_clusters", op, queries, at=at),)


Assigned = Literal["nodes", "runs"]


def _assigned_to(level: language.Level | None) -> Assigned | None:
    match level and level.partition:
        case language.LearnedTree():
            return "nodes"
        case language.Ragged():
            return "runs"
        case _:
            return None


def lies_in(builder: Builder, level: language.Level) -> tuple[Assigned | None, tuple[Node, ...]]:
    """The nodes or runs that a level's entries are, or that hold them where they are tokens."""
    within = builder.spec.level(level.within) if level.within else None
    held = level if _assigned_to(level) else within
    cut = _assigned_to(held)
    return (cut, (builder.assigned[held.name],)) if cut and held else (None, ())


def assign(builder: Builder, level: language.Level) -> None:
    """Which node or run each token is in, where a level's entries are such."""
    at, name = builder.place(level, "partition"), f"{level.name}.{_assigned_to(level)}"
    match level.partition:
        case language.LearnedTree() as tree:
            op = Assign(
                level=level.name,
                nodes=builder.spec.nodes(level.name),
                branching=tree.branching,
                capacity=tree.capacity,
                takes=tree.takes,
            )
            operands = [builder.keys(level.kv), centroids(builder, level)]
            operands += some(builder.assigned.get(level.within or ""))
        case language.Ragged() as ragged:
            op = Runs(level=level.name, span=ragged.span, threshold=ragged.threshold)
            given = ragged.boundaries == "given"
            operands = [_starts(builder, level) if given else builder.keys(level.kv)]
        case _:
            return
    builder.assigned[level.name] = builder.add(name, op, *operands, at=at)


def centroids(builder: Builder, level: language.Level) -> Node:
    nodes = str(builder.spec.nodes(level.name))
    return builder.input(f"{level.name}_centroids", "parameter", "Hkv", nodes, "Dqk")


def _starts(builder: Builder, level: language.Level) -> Node:
    return builder.input(f"{level.name}_starts", "starts", "B", "S")


def axis_tiles(builder: Builder, tile: tuple[int, ...], at: Span | None) -> tuple[AxisTile, ...]:
    """The tiles of every axis.

    Raises:
        PlanError: an axis is open, and how many tiles there are is not known.
    """
    axes = builder.spec.axes
    assert axes is not None
    found = [
        AxisTile(length=length, tile=size)
        for length, size in zip(axes, tile, strict=True)
        if length != "any"
    ]
    if len(found) < len(axes):
        raise PlanError(
            "how many tiles there are depends on axes that are not known",
            span=at,
            help="give `axes` in the spec or to Spec.bind",
        )
    return tuple(found)
