"""What `hsgen diff` says: how two specs differ in meaning, in plan and in emitted code.

Values are compared, by name and field; only code is compared as text.  Runs nothing, keeps nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hsgen import emit, passes, pipeline, planner, schedule
from hsgen.configs import DType
from hsgen.errors import PlanError
from hsgen.graph import Graph, Node, op_fields, op_text
from hsgen.plan import Buffer, Launch, Plan, Step, readable
from hsgen.spec import Spec
from hsgen.target import Target

How = Literal["added", "removed", "changed"]
SIGNS: Mapping[How, str] = {"added": "+", "removed": "-", "changed": "~"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A node, a launch, a buffer, a size: one line about it, and its fields as text."""

    summary: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An item that one side lacks, or whose fields differ: field -> a's value and b's, or None."""

    name: str
    how: How
    summary: str
    fields: Mapping[str, tuple[str | None, str | None]]

    def __str__(self) -> str:
        told = [
            f"{'' if name == 'value' else f'{name} '}{a or 'none'} -> {b or 'none'}"
            for name, (a, b) in self.fields.items()
        ]
        return f"{SIGNS[self.how]} {self.name}: {', '.join(told) or self.summary}"

    def record(self) -> dict[str, object]:
        """The same for machines."""
        fields = {name: list(pair) for name, pair in self.fields.items()}
        return {"name": self.name, "how": self.how, "summary": self.summary, "fields": fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """An emitted file that one side lacks, or the unified diff of both."""

    file: str
    how: How
    diff: str

    def __str__(self) -> str:
        return self.diff or f"{SIGNS[self.how]} {self.file}\n"

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {"file": self.file, "how": self.how, "diff": self.diff}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One spec: its graph, its plan, or why there is none, and its files."""

    spec: Spec
    graph: Graph
    plan: Plan | None
    problem: str
    sources: Mapping[str, str]

    def record(self) -> dict[str, object]:
        """What it is called, for machines."""
        return {
            "name": self.spec.name,
            "digest": self.spec.digest,
            "problem": self.problem or None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How `b` differs from `a` on one GPU; plan and code are compared where both have them."""

    a: Side
    b: Side
    target: Target
    dtype: DType
    graph: tuple[Change, ...]
    plan: tuple[Change, ...]
    code: tuple[FileChange, ...]

    @property
    def same(self) -> bool:
        """Whether both mean the same.  Plan and code follow from the graph, so they then agree."""
        return not self.graph

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "same": self.same,
            "a": self.a.record(),
            "b": self.b.record(),
            "target": {"name": self.target.name, "arch": self.target.label},
            "dtype": self.dtype,
            "graph": [change.record() for change in self.graph],
            "plan": [change.record() for change in self.plan],
            "code": [change.record() for change in self.code],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        a, b = (f"{side.spec.name} ({side.spec.digest[:12]})" for side in (self.a, self.b))
        yield f"{a} and {b} for {self.target.name} ({self.target.label}), {self.dtype}"
        if self.same:
            yield "they mean the same"
            return
        yield from ("", "graph", *map(str, self.graph), "")
        problems = [
            f"no plan for {name}: {side.problem}"
            for name, side in (("a", self.a), ("b", self.b))
            if side.problem
        ]
        if problems:
            yield from problems
            return
        yield from ("plan", *(map(str, self.plan) if self.plan else ("the same",)), "")
        yield from ("code", *(str(change).rstrip("\n") for change in self.code))
        if not self.code:
            yield "the same"


def compare(a: Spec, b: Spec, target: Target, dtype: DType = "bf16") -> Comparison:
    """How b differs from a.  Names of the specs, sources, comments and order in the text mean nothing.

    What no kernel can do is no error here: `Side.problem` says it.
    """
    name = a.name if a.name == b.name else f"{a.name} | {b.name}"
    one, other = (_side(spec, name, target, dtype) for spec in (a, b))
    plans = [_plan_items(side.plan) for side in (one, other) if side.plan]
    both = len(plans) == 2
    return Comparison(
        a=one,
        b=other,
        target=target,
        dtype=dtype,
        graph=_changes(_graph_items(one.graph), _graph_items(other.graph)),
        plan=_changes(*plans) if both else (),
        code=_file_changes(one.sources, other.sources) if both else (),
    )


def _side(spec: Spec, name: str, target: Target, dtype: DType) -> Side:
    """Everything of one spec, under a name that both get: it is in the text of every file."""
    graph = passes.run(planner.plan(spec))
    graph = replace(graph, meta=replace(graph.meta, name=name, source=None, digest=""))
    try:
        plan = schedule.schedule(graph, target, dtype)
    except PlanError as error:
        return Side(spec=spec, graph=graph, plan=None, problem=error.message, sources={})
    origin = emit.Provenance(
        version=pipeline.hsgen_version(), spec=name, digest="-", target=target.label
    )
    return Side(spec=spec, graph=graph, plan=plan, problem="", sources=emit.render(plan, origin))


# --- items


def _graph_items(graph: Graph) -> dict[str, Item]:
    """Every node, and what else a graph says: causality, sizes, which nodes the caller gets."""
    outputs = graph.outputs
    said = {
        "causal": str(graph.meta.causal),
        **{f"size {name}": str(size) for name, size in graph.sizes.items()},
        "output o": f"%{outputs.o}",
        **{f"output lse {branch}": f"%{name}" for branch, name in outputs.lse.items()},
        **{f"output selection {level}": f"%{name}" for level, name in outputs.selection.items()},
    }
    nodes = {f"%{node.name}": _node_item(node) for node in graph.nodes()}
    return nodes | {name: Item(summary=text, fields={"value": text}) for name, text in said.items()}


def _node_item(node: Node) -> Item:
    operator, attributes = op_text(node.op).partition("(")[0], op_fields(node.op)
    operands = ", ".join(f"%{name}" for name in node.inputs)
    fields = {"operator": operator, **attributes, "operands": operands, "type": str(node.type)}
    tail = f" <- {operands}" if operands else ""
    return Item(summary=f"{op_text(node.op)} : {node.type}{tail}", fields=fields)


def _plan_items(plan: Plan) -> dict[str, Item]:
    """Launches, buffers and sizes; a launch's place is what it follows."""
    found = dict[str, Item]()
    before = "nothing"
    for step in plan.steps:
        for name, text in step.sizes:
            value = readable(plan, text)
            found[f"size {name}"] = Item(summary=value, fields={"value": value})
        for buffer in step.buffers:
            found[f"buffer {buffer.name}"] = _buffer_item(plan, buffer)
        for launch in step.launches:
            found[f"launch {launch.kernel}"] = _launch_item(plan, step, launch, before)
            before = launch.kernel
    return found


def _buffer_item(plan: Plan, buffer: Buffer) -> Item:
    shape = f"{buffer.dtype}[{readable(plan, ', '.join(buffer.dims))}]"
    return Item(summary=f"{shape} ({buffer.role})", fields={"value": shape, "role": buffer.role})


def _launch_item(plan: Plan, step: Step, launch: Launch, before: str) -> Item:
    kernel = plan.kernel(launch.kernel)
    operators = ", ".join(f"%{name}" for name in kernel.operators)
    names = [param.name for param in kernel.params if param.kind != "constexpr"]
    arguments = {
        f"argument {name}": readable(plan, text)
        for name, text in zip(names, launch.arguments, strict=True)
    }
    fields = {
        "after": before,
        "skeleton": kernel.skeleton,
        "for": operators,
        "grid": f"[{readable(plan, ', '.join(launch.grid))}]",
        **{name: str(value) for name, value in kernel.config.keywords().items()},
        **({"follows": kernel.follows} if kernel.follows else {}),
        **({"turns of": step.chunk} if step.chunk else {}),
        **arguments,
    }
    return Item(summary=f"({kernel.skeleton}) for {operators}", fields=fields)


# --- differences


def _changes(a: Mapping[str, Item], b: Mapping[str, Item]) -> tuple[Change, ...]:
    """In the order of a, then what only b has."""
    found = [_change(name, a.get(name), b.get(name)) for name in {**a, **b}]
    return tuple(change for change in found if change is not None)


def _change(name: str, a: Item | None, b: Item | None) -> Change | None:
    if a is None or b is None:
        item, how = (b, "added") if a is None else (a, "removed")
        assert item is not None, "one side has it"
        return Change(name=name, how=how, summary=item.summary, fields={})
    pairs = {
        field: (a.fields.get(field), b.fields.get(field)) for field in {**a.fields, **b.fields}
    }
    fields = {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
    return Change(name=name, how="changed", summary=b.summary, fields=fields) if fields else None


def _file_changes(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[FileChange, ...]:
    """By file name; the headers are alike, so that they are no difference."""
    found = list[FileChange]()
    for file in sorted({**a, **b}):
        if file not in a or file not in b:
            how: How = "added" if file in b else "removed"
            found.append(FileChange(file=file, how=how, diff=""))
        elif a[file] != b[file]:
            lines = difflib.unified_diff(
                a[file].splitlines(keepends=True),
                b[file].splitlines(keepends=True),
                f"a/{file}",
                f"b/{file}",
            )
            found.append(FileChange(file=file, how="changed", diff="".join(lines)))
    return tuple(found)
