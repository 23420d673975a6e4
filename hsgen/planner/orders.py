"""Orders that entries are cut from."""

from __future__ import annotations

from hsgen import spec as language
from hsgen.graph import Cluster, Cut, Node, Permute
from hsgen.planner.builder import Builder


def cut_of(level: language.Level) -> Cut | None:
    """What the entries of a level are cut from, where it is not the sequence as it stands."""
    if level.permute is None or level.permute.keys is None:
        return None
    return "clusters" if isinstance(level.partition, language.Clusters) else "order"


def order(builder: Builder, level: language.Level) -> tuple[Node, ...]:
    """The operand that says where entries are: slots or clusters; none where they are in place."""
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
        case language.Gather():
            given = builder.input(f"{level.name}_key_order", "order", "B", "S", "Hkv")
            op = Permute(level=level.name, by="given", segment=None, last=None)
            return (builder.add(name, op, given, at=at),)
