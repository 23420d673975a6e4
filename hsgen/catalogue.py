"""What `hsgen specs` says: each shipped spec, what it costs, and how far its kernels reach.

All of it is derived: from the spec's own file, its graph and its plan.  Measures and compiles nothing.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from hsgen import analysis, backward, emit, passes, pipeline, planner, schedule
from hsgen.errors import HsgenError, PlanError
from hsgen.graph import Graph, align
from hsgen.plan import Cached, Plan
from hsgen.spec import Spec, dump, files, parse, syntax
from hsgen.spec.syntax import Items, Keys, Tree, Word
from hsgen.target import Target

TOKENS = 131072  # at which a spec is compared with dense attention
HEADS, HEAD_DIM = (32, 8), 128  # of a spec that leaves them open
LAYERS = 64  # of a model: among them is one that takes over, if any does
_SENTENCE = re.compile(r".*?\.(?=\n|\s+[A-Z]|$)", re.DOTALL)  # not the one in "eq. 9"
MODELINE = "# yaml-language-server:"

# What every system is composed of, in the order of the language.
OPERATORS = (
    *("partition", "permute", "pool", "score", "select"),
    *("route", "attend", "combine", "reuse", "loss"),
)
ABOUT = {"hsgen", "name", "source", "heads", "head_dim", "causal", "levels"}  # no operator

# How far hsgen means to go with a system; systems that are no spec yet stand here already.  No part of a
# spec, since `hsgen new` copies those.  A new spec is one word here, unless it is a preset of a system that
# is here, as nsa_fla is of nsa: those have its tier.  A shipped spec without a tier fails a test.
TIERS = {
    # fast, trained and decoded
    "A": "dsa hip hirouter hisa infllm_v2 minimax_m3 moba nsa psa quest seer_attention vsa xattention",
    # right and compiled, fast where its operators are those of an A
    "B": "biformer deepseek_csa deepseek_hca delta dhsa dma draft_attention flash_moba flex_prefill "
    "flux_attention fsa glm_kpool gna hylra index_cache kinetics minference moa nosa pbs_attn "
    "power_attention proxy_attn qwen_qsa routing_transformer s2_attention s2o sale sparge sparse_d sqa "
    "ssa step_csa superlinear svg2 svg_ear token_sparse",
    # spec and reference, compiled where the kernels of others reach it
    "C": "delta_llm hydra sea small_thinker spatten spt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The kinds of layers of a spec that is another by layer, or its branches where these are apart, and
    the plans of those with kernels.

    what: by what they differ.
    """

    kinds: int
    plans: tuple[Plan, ...]
    phases: tuple[str, ...]  # that every kind has
    what: str = "layer"

    @property
    def complete(self) -> bool:
        """Whether every layer has kernels."""
        return len(self.plans) == self.kinds

    def __str__(self) -> str:
        counts = " and ".join(str(len(plan.kernels)) for plan in self.plans)
        if not self.complete:
            return f"{counts} kernels of some {self.what}s"
        return f"{counts} kernels by {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One spec.  Without a plan, `problem` says why; without a graph, neither cost nor causality."""

    spec: Spec
    essence: str
    graph: Graph | None
    plan: Plan | None
    problem: str
    layers: Layers | None = None  # where the spec as a whole has no plan, but layers differ
    more: tuple[str, ...] = ()  # phases that have plans of their own

    @property
    def tier(self) -> str | None:
        """How far hsgen means to go with it."""
        return tier(self.spec.name)

    @property
    def causality(self) -> str | None:
        return analysis.causality_text(self.graph) if self.graph else None

    @property
    def phases(self) -> tuple[str, ...]:
        """What can be launched: a whole call, the choice alone, steps behind a cache, gradients."""
        if self.plan is None:
            return self.layers.phases if self.layers else ()
        select = ("select",) if self.plan.selection else ()
        return ("prefill", *select, *self.more)

    @property
    def flops(self) -> str | None:
        """Arithmetic of one call as a polynomial in T, batch 1, S = T."""
        return f"{analysis.total(self.graph).flops}" if self.graph else None

    @property
    def calls(self) -> str:
        """Of which calls that is, where they differ: some take over what others chose."""
        return analysis.calls_text(self.graph) if self.graph else ""

    @property
    def of_dense(self) -> float | None:
        """Its arithmetic at TOKENS tokens, dense attention's being 1."""
        if self.graph is None:
            return None
        dense = analysis.dense(self.graph).flops.evaluate(TOKENS)
        return analysis.total(self.graph).flops.evaluate(TOKENS) / dense

    @property
    def at_most(self) -> bool:
        """Whether its arithmetic is only bounded: a rule or a pattern leaves less of it."""
        return self.graph is not None and bool(analysis.at_most(self.graph))

    @property
    def status(self) -> str:
        """Of its kernels."""
        if self.plan:
            return f"{len(self.plan.kernels)} kernels"
        if self.layers and self.layers.complete:
            return str(self.layers)
        of_some = f"; {self.layers}" if self.layers and self.layers.plans else ""
        return f"none: {self.problem}{of_some}"

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "name": self.spec.name,
            "essence": self.essence,
            "source": self.spec.source,
            "tier": self.tier,
            "levels": [level.name for level in self.spec.levels],
            "operators": dict(operators(self.spec)),
            "causality": self.causality,
            "phases": list(self.phases),
            "flops": self.flops,
            "calls": self.calls or None,
            "of_dense": self.of_dense,
            "at_most": self.at_most,
            "kernels": [kernel.name for kernel in self.plan.kernels] if self.plan else None,
            "kernels_by_layer": [
                [kernel.name for kernel in plan.kernels]
                for plan in (self.layers.plans if self.layers else ())
            ]
            or None,
            "problem": self.problem or None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Every shipped spec, planned for one GPU."""

    entries: tuple[Entry, ...]
    target: Target

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "target": self.target.name,
            "tokens": TOKENS,
            "specs": [entry.record() for entry in self.entries],
        }

    def __str__(self) -> str:
        heads = ("spec", "tier", "source", "levels", "causality", "phases", "of dense", "kernels")
        table = align([heads, *map(_cells, self.entries)])
        below = [_below(entry) for entry in self.entries]
        rows = [line for row, lines in zip(table[1:], below, strict=True) for line in (row, *lines)]
        last = (
            f"of dense: arithmetic at {TOKENS:,} tokens; kernels: as planned for {self.target.name}"
        )
        return "\n".join([table[0], *rows, last]) + "\n"

    def page(self) -> str:
        """docs/systems.md."""
        planned = [entry for entry in self.entries if entry.plan]
        return _PAGE.format(
            tokens=f"{TOKENS:,}",
            target=self.target.name,
            heads=f"{HEADS[0]} and {HEADS[1]} heads of {HEAD_DIM}",
            table="\n".join(map(_row, self.entries)),
            served=_served(planned, self.entries, self.target),
            lines="\n".join(map(_line, self.entries)),
            unused=_unused(self.entries),
        )


def catalogue(target: Target) -> Catalogue:
    """Plan every shipped spec for a GPU that need not be there.

    Raises:
        SpecError: a shipped spec has mistakes.
    """
    entries = [entry(path, target) for path in files.shipped().values()]
    return Catalogue(entries=tuple(entries), target=target)


def entry(path: Path, target: Target) -> Entry:
    """One spec file, planned; what it leaves open is bound first.

    Raises:
        SpecError: it has mistakes.
    """
    _, text = files.read(path)
    spec = parse(text, path.name)
    bound = spec.bind(
        heads=None if spec.heads else HEADS, head_dim=None if spec.head_dim else HEAD_DIM
    )
    graph = plan = layers = None
    problem, more = "", ()
    try:
        graph = passes.run(planner.plan(bound))
        plan = schedule.schedule(graph, target)
        more = _more(graph, target)
    except PlanError as error:
        problem = _one_line(error)
        layers = _layers(bound, target)
    return Entry(
        spec=spec,
        essence=essence(text.decode()),
        graph=graph,
        plan=plan,
        problem=problem,
        layers=layers,
        more=more,
    )


def _more(graph: Graph, target: Target) -> tuple[str, ...]:
    """What else than a whole call can be planned: a step behind a cache, gradients."""
    plans: Mapping[str, Callable[[], Plan]] = {
        "decode": lambda: schedule.schedule(graph, target, cached=Cached(rows="few")),
        "gradients": lambda: backward.plan(graph, target),
    }
    found = list[str]()
    for phase, planned in plans.items():
        try:
            planned()
        except PlanError:
            continue
        found.append(phase)
    return tuple(found)


def _layers(spec: Spec, target: Target) -> Layers | None:
    """Each kind of layer of a spec whose layers differ, attending as if it had no loss, or each branch of one
    whose branches are apart; None of any other.
    """
    apart = spec.combine is not None and spec.combine.streams is not None
    if not spec.reuse and spec.route is None and not apart:
        return None
    alone = spec.model_copy(update={"loss": None})
    steps = any(reuse.over == "steps" for reuse in spec.reuse)
    if apart:
        made = (spec.stream(branch.name) for branch in spec.attend)
    else:
        made = (_steps if steps else _of_layers)(alone)
    kinds = {each.digest: each for each in made}
    if len(kinds) < 2:  # what it goes by is no layer, and no step
        return None
    plans, phases = list[Plan](), list[set[str]]()
    for each in kinds.values():
        try:
            graph = passes.run(planner.plan(each))
            plan = schedule.schedule(graph, target)
        except PlanError:
            phases.append(set())
            continue
        plans.append(plan)
        chosen = set(plan.selection.values()) - plan.brought.keys()
        phases.append({"prefill", *(("select",) if chosen else ()), *_more(graph, target)})
    common = set[str].intersection(*phases)
    common |= {"select"} & set[str].union(*phases) if apart else set()  # those that choose do
    ordered = tuple(x for x in ("prefill", "select", "decode", "gradients") if x in common)
    what = "branch" if apart else "step" if steps else "layer"
    return Layers(kinds=len(kinds), plans=tuple(plans), phases=ordered, what=what)


def _of_layers(spec: Spec) -> list[Spec]:
    return [spec.bind(layer=layer) for layer in range(LAYERS)]


def _steps(spec: Spec) -> list[Spec]:
    """The steps at which something begins, and those behind."""
    begins = {0, *(each.dense for each in spec.reuse), *(x.dense + x.lead for x in spec.reuse)}
    return [
        spec.bind(step=step) for first in sorted(begins) for step in range(first, first + LAYERS)
    ]


def tier(name: str) -> str | None:
    """The tier of a spec: that of the system whose name is its own, or the longest beginning of it."""
    words = name.split("_")
    for end in range(len(words), 0, -1):
        system = "_".join(words[:end])
        for letter, systems in TIERS.items():
            if system in systems.split():
                return letter
    return None


def _one_line(error: HsgenError) -> str:
    where = f"line {error.span.line}: " if error.span else ""
    return where + " ".join(error.message.split())


def essence(text: str) -> str:
    """What a spec is about: the first sentence of the comment at its top."""
    lines = [
        line for line in text.removeprefix("\ufeff").splitlines() if not line.startswith(MODELINE)
    ]
    said = [line.removeprefix("#").strip() for line in takewhile(_is_comment, lines)]
    sentence = _SENTENCE.match("\n".join(said))
    return " ".join(sentence[0].split()) if sentence else ""


def _is_comment(line: str) -> bool:
    return line.startswith("#")


# --- a spec in the words of its language


def operators(spec: Spec) -> Mapping[str, str]:
    """Operator -> what the spec says of it, in the spec's own words; `index` and the like as well.

    What a level says besides its operators (`within`, `kv`) stands with its partition.
    """
    tree, _ = syntax.read(dump(spec), spec.name)
    assert tree is not None
    top = {key.text: node for key, node in tree.items}
    levels = [_level(node) for node in _listed(top.get("levels"))]
    said = {
        operator: "; ".join(
            f"{name} {level[operator]}" for name, level in levels if operator in level
        )
        for operator in OPERATORS
    }
    said |= {key: _words(node) for key, node in top.items() if key not in ABOUT}
    order = [*(key for key in said if key not in OPERATORS), *OPERATORS]
    return {key: said[key] for key in order if said[key]}


def _listed(node: Tree | None) -> Sequence[Keys]:
    items = node.items if isinstance(node, Items) else ()
    return [one for one in items if isinstance(one, Keys)]


def _level(node: Keys) -> tuple[str, Mapping[str, str]]:
    """Name, and operator -> words."""
    keys = {key.text: _words(value) for key, value in node.items}
    name = keys.pop("name")
    extra = [f"{key} {words}" for key, words in keys.items() if key not in OPERATORS]
    said = {key: words for key, words in keys.items() if key in OPERATORS}
    return name, said | {"partition": ", ".join([said["partition"], *extra])}


def _words(node: Tree) -> str:
    """YAML without its brackets, where they can be spared."""
    match node:
        case Word():
            return node.text
        case Items():
            return "; ".join(map(_words, node.items))
        case Keys():
            return ", ".join(_pair(key.text, value) for key, value in node.items)
        case _:
            raise AssertionError("a spec that was dumped can be read")


def _pair(key: str, node: Tree) -> str:
    words = _words(node)
    if key == "name":
        return words
    return f"{key} ({words})" if isinstance(node, Keys | Items) else f"{key} {words}"


# --- text


def _cells(entry: Entry) -> tuple[str, ...]:
    return (
        entry.spec.name,
        entry.tier or "-",
        entry.spec.source or "-",
        ", ".join(level.name for level in entry.spec.levels) or "-",
        entry.causality or "-",
        ", ".join(entry.phases) or "-",
        _of_dense(entry) or "-",
        str(len(entry.plan.kernels)) if entry.plan else _by_layer(entry) or "none",
    )


def _below(entry: Entry) -> list[str]:
    why = "" if entry.plan or _by_layer(entry) else entry.status.removeprefix("none: ")
    lines = (entry.essence, f"FLOPs {_flops(entry)}" if entry.flops else "", why)
    return [f"  {line}" for line in lines if line]


def _by_layer(entry: Entry) -> str:
    """How many kernels each kind of layer has, where all have some."""
    layers = entry.layers
    return (
        " + ".join(str(len(x.kernels)) for x in layers.plans) if layers and layers.complete else ""
    )


def _flops(entry: Entry) -> str:
    return f"{entry.flops}{f' ({entry.calls})' if entry.calls else ''}"


def _of_dense(entry: Entry) -> str:
    if entry.of_dense is None:
        return ""
    return f"{'≤ ' * entry.at_most}{100 * entry.of_dense:.3g} %"


_PAGE = """\
# Systems

Every spec in `specs/`, with what hsgen derives from it.  This page is what `hsgen specs --page` prints.

**Tier**: how far hsgen means to go, which is not yet how far it is: *A* fast, trained and decoded; *B* right
and compiled, fast where its operators are those of an A; *C* spec and reference, compiled where the kernels
of others reach it.  **Causality**: what row t depends on; `token` means tokens up to t.  **Phases**:
*prefill* is a whole call, *select* the choice alone, *decode* a step behind a cache, *gradients* those of a
call.
**FLOPs**: those of the graph's operators, as a polynomial in T at batch 1 and S = T; **of dense** compares
them at {tokens} tokens with dense attention of the same heads, *≤* where a pattern or a rule leaves an
unknown part of it.  Where calls take over what others chose, both are the mean over the spec's pattern of
calls, or of a call that chooses where it has none.  A spec that leaves heads open is counted at {heads}.
**Kernels**: how many the plan for {target}, bf16, has; *none* comes with the reason.

| system | essence | tier | source | levels | causality | phases | FLOPs | of dense | kernels |
| --- | --- | --- | --- | --- | --- | --- | --- | ---: | --- |
{table}

{served}

## In ten operators

Each line is the spec's own words, defaults left out, level by level.
{unused}

{lines}
"""


def _row(entry: Entry) -> str:
    cells = (
        f"[{entry.spec.name}](../specs/{entry.spec.name}.yaml)",
        entry.essence,
        entry.tier or "–",
        entry.spec.source or "–",
        ", ".join(level.name for level in entry.spec.levels) or "–",
        entry.causality or "–",
        ", ".join(entry.phases) or "–",
        _flops(entry).replace("^2", "²") if entry.flops else "–",
        _of_dense(entry) or "–",
        str(len(entry.plan.kernels)) if entry.plan else entry.status,
    )
    shown = " | ".join(cell.replace("|", r"\|") for cell in cells)
    return f"| {shown} |"


def _line(entry: Entry) -> str:
    said = [f"*{operator}* {words}" for operator, words in operators(entry.spec).items()]
    return f"- **{entry.spec.name}**: {' · '.join(said)}"


def _unused(entries: Iterable[Entry]) -> str:
    used = {operator for entry in entries for operator in operators(entry.spec)}
    idle = [f"`{operator}`" for operator in OPERATORS if operator not in used]
    return f"No shipped spec has {', '.join(idle)} yet." if idle else "All ten are in use."


def _served(planned: Sequence[Entry], entries: Sequence[Entry], target: Target) -> str:
    """How many skeletons and pieces the kernels of how many specs are made of."""
    skeletons, used = Counter[str](), set[str]()
    for one in planned:
        assert one.plan is not None
        skeletons.update({kernel.skeleton for kernel in one.plan.kernels})
        for kernel in one.plan.kernels:
            used |= _pieces(emit.render_kernel(kernel, pipeline.provenance(one.spec, target)))
    counts = ", ".join(f"`{name}` in {count}" for name, count in sorted(skeletons.items()))
    return (
        f"{len(skeletons)} skeletons ({counts}) and {len(used)} pieces make the kernels of "
        f"{len(planned)} of the {len(entries)} systems."
    )


def _pieces(source: str) -> set[str]:
    """The pieces in one kernel's module."""
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    return defined & set(emit.library())
