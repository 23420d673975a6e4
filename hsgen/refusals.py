"""What no kernel does yet, of everything that a graph can say: one place, which names operator and line.

A size or a combination that a loop cannot have is refused where that loop is planned, by `schedule`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Literal

from hsgen import (
    axes,
    clusters,
    estimates,
    foretold,
    keeping,
    maps,
    patterns,
    runs,
    slashes,
    sorting,
    stripes,
    takes,
    walks,
)
from hsgen.errors import PlanError
from hsgen.graph import (
    Assign,
    Attend,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Graph,
    Halves,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
    OutputGate,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    ReduceRows,
    Rotate,
    Round,
    Route,
    Runs,
    Score,
    Select,
    SelectSet,
    Union,
    Unlike,
    block_of,
    coincide,
    left_to_window,
)
from hsgen.kernels import POOLS, ROUNDED, UNFINISHED
from hsgen.trees import tree_of


def refuse(graph: Graph) -> None:
    """Nothing, where kernels reach all operators.

    Raises:
        PlanError: one that they do not; routes first, since a bound layer may have none of the rest.
    """
    graph, _ = patterns.routed(graph)
    graph, _ = slashes.joined(graph)
    graph, _ = foretold.joined(graph)
    graph, _ = takes.joined(graph)
    for node in sorted(graph.nodes(), key=lambda node: not isinstance(node.op, Route)):
        if isinstance(node.op, Entropies):
            continue  # a call of its own, which says so: no output depends on it
        if words := lacking(graph, node):
            by_layer = isinstance(node.op, Route) and node.op.by == "layer"
            help = "give `layer` to load_kernel, or `--layer`" if by_layer else None
            if node.name in graph.outputs.streams.values():
                help = "load_kernel(spec).stream(NAME) is the kernel of one"
            if isinstance(node.op, Recall) and _taken_whole(node.op):
                over = node.op.turns.over
                what = over.removesuffix("s")
                help = f"each of the {over} has kernels: give `{what}` to load_kernel"
                help += ", or `--layer`" if over == "layers" else ""
                if any(isinstance(other.op, Divergence) for other in graph.nodes()):
                    help = f"{over} that take over have kernels where the spec has no `loss`"
            raise PlanError(words, span=node.span, help=help)


def _taken_whole(op: Recall) -> bool:
    """Whether some calls only attend what another one chose."""
    return op.width is None and op.takes[-1] == "kept"


def lacking(graph: Graph, node: Node) -> str | None:
    """What of one operator no kernel does yet; None where some kernel does it."""
    if _whole(graph, node):
        return None
    if node.name in graph.outputs.streams.values():
        return (
            "branches apart have kernels one by one, not together: `combine: {streams: branches}`"
        )
    match node.op:
        case Route(by=by):
            return f"no kernel takes a route by {by} yet: `route`"
        case Attend():
            words = _of_pooled_query(graph, node) or _of_attend(graph, node, node.op)
            return words and f"branch {node.op.branch}: no kernel {words} yet"
        case Union():
            words = _of_union(graph, node)
            return words and f"{words}: `combine: {{softmax: union}}`"
        case Round():
            words = _of_stored(graph, node, node.op)
            return words and f"%{node.name}: no kernel {words} yet"
        case Delta():
            return "no kernel reads keys from their changes yet"
        case Divergence() | Distance() | Entropies() as op:
            words = _of_loss(graph, node, op)
            return (
                None if words is None else f"no kernel computes the loss {_loss(node)}{words} yet"
            )
        case Pool() | PoolRows() | PoolHeads() | Norm() | Rotate() as op:
            words = _of_entries(graph, node, op)
            return words and f"level {op.level}: no kernel {words} yet"
        case Normalise() | ReduceRows() as op:
            words = _of_scores(graph, node, op)
            return words and f"level {op.level}: no kernel {words} yet"
        case Cluster() | Permute() | Assign() | Runs() | Unlike() | Recall() | Carry() as op:
            words = _of_keys(graph, node, op)
            return words and f"level {op.level}: no kernel {words} yet"
        case Score() | Map() | Select() | SelectSet() as op:
            words = _of_level(graph, node, op)
            return words and f"level {op.level}: no kernel {words} yet"
        case _:
            return None


def _whole(graph: Graph, node: Node) -> bool:
    """Whether it is part of what kernels do as a whole: clusters, a learned tree, a map of blocks, columns
    and diagonals, what heads keep, runs, estimates, or heads that choose in one of two ways.
    """
    clustering = clusters.clustering_of(graph)
    if clustering is not None and node.name in clustering.names:
        return True
    taking = takes.taking_of(graph)
    if taking is not None and node.name in taking.names:
        return True
    if not isinstance(node.op, SelectSet) and maps.way_to(graph, node.name):
        return True
    kept = keeping.way_to(graph, node.name) or runs.way_to(graph, node.name)
    kept = kept or estimates.way_to(graph, node.name)
    if tree_of(graph, node) is not None or kept is not None:
        return True
    return slashes.reached(graph, node) or foretold.reached(graph, node)


def _loss(node: Node) -> str:
    return node.name.removeprefix("loss.")


def _of_loss(graph: Graph, node: Node, op: Divergence | Distance | Entropies) -> str | None:
    """What of a loss no kernel computes: behind its name; None where one does."""
    match op:
        case Divergence():
            return _of_divergence(graph, node)
        case Entropies():
            return _of_entropies(graph, node)
        case Distance():  # of branches under gates, each of which has kernels of its own
            bound = (OutputGate, Recall, Route, Union)
            mixed = any(isinstance(x.op, bound) for x in graph.nodes())
            return " of branches that are bound together" if mixed else None


def _of_divergence(graph: Graph, node: Node) -> str | None:
    """Of which levels it is one that no kernel has: behind the name of the loss; None where one has it."""
    if (gate := gate_of(graph, node)) is not None:
        return _of_gate(graph, node, gate)
    score = graph[node.inputs[0]]
    if not isinstance(score.op, Score):
        return " of scores that are mapped, normalised or carried"
    chosen = [graph[name] for name in node.inputs[3:]]
    chosen += [x for x in graph.operands(score) if isinstance(x.op, Select | SelectSet | Recall)]
    lacks = (
        (score.op.form not in ("relu_weighted", "relu_sum"), f" of scores of form {score.op.form}"),
        (score.op.size != 1 or score.op.stride != 1, " of entries of several tokens"),
        (score.type.dims[1] != "T", " of rows that choose together"),
        (score.type.dims[2] != "1", " of heads that choose apart"),
        (not all(_plain(x) for x in chosen), " over a selection that is no list of each row"),
        (
            any(not _given(graph, x) for x in graph.operands(score)[:2]),
            " of an index that is pooled, normed or rotated",
        ),
        (
            any(not isinstance(graph[name].op, Input) for name in node.inputs[1:3]),
            " of keys that are made",
        ),
    )
    return next((words for lacking, words in lacks if lacking), None)


def gate_of(graph: Graph, node: Node) -> Node | None:
    """The scores of pooled entries that a KL teaches, as they are or as a softmax; None of any others."""
    score = graph[node.inputs[0]]
    if isinstance(score.op, Normalise) and score.op.by is None:
        own = graph.operands(score)[1].inputs == (score.inputs[0],)
        score = graph[score.inputs[0]] if own else score
    if not isinstance(score.op, Score) or len(score.inputs) != 2:
        return None
    op = score.op
    said = {"level": op.level, "scale": op.scale, "size": op.size, "stride": op.stride}
    plain = Score(form="dot", within=None, **said)
    pooled = isinstance(graph[score.inputs[1]].op, Pool | Norm | Rotate)
    return score if op == plain and pooled else None


def _of_gate(graph: Graph, node: Node, score: Node) -> str | None:
    """Of which gates it is one that no kernel has, likewise."""
    op = node.op
    assert isinstance(op, Divergence)
    queries, keys = graph.operands(score)
    turns = tuple(x for x in (queries, keys) if isinstance(x.op, Rotate))
    if queries in turns:
        queries = graph.operands(queries)[0]
    if keys in turns:
        keys = graph.operands(keys)[0]
    if isinstance(keys.op, Norm):
        keys = graph.operands(keys)[0]
    rows = queries.op if isinstance(queries.op, PoolRows) else None
    if rows is not None:
        queries = graph.operands(queries)[0]
    lacks = (
        (op.over != "all", " of a gate over what was chosen"),
        (op.size != op.stride, " of entries that overlap"),
        (rows is not None and (_of_rows(rows) is not None or bool(rows.tiles)), " of such rows"),
        (rows is not None and rows.how != "mean", " of rows pooled by their greatest"),
        (
            rows is not None and rows.block not in (2, 4, 8, 16, 32, 64, 128, 256),
            " of blocks of rows that are no power of two, or too large",
        ),
        ((rows is None) != (op.rows is None), " of rows that score apart or learn apart"),
        (
            score.type.dims[2] != "Hq" and op.heads != op.tokens,
            " of which heads and tokens are taken differently",
        ),  # a sum of the greatest is no greatest of sums
        (not _derived(graph, keys), " of keys that are not pooled by max_min_mean or mean"),
        (any(not isinstance(x.op, Input) for x in (queries,)), " of queries that are made"),
        (
            any(not isinstance(graph[name].op, Input) for name in node.inputs[1:3]),
            " of keys that are made",
        ),
        (
            any(len(graph[name].type.dims) != 4 for name in node.inputs[1:3]),
            " of keys without heads",
        ),
    )
    return next((words for lacking, words in lacks if lacking), None)


def _derived(graph: Graph, node: Node) -> bool:
    """Whether a pool of the caller's tokens has a gradient that a gate learns by."""
    op = node.op
    if not isinstance(op, Pool) or len(node.type.dims) != 4:
        return False
    plain = Pool(level=op.level, how=op.how, size=op.size, stride=op.stride, position=op.position)
    of_input = isinstance(graph.operands(node)[0].op, Input)
    return op.how in ("max_min_mean", "mean") and op == plain and not op.position and of_input


def _of_entropies(graph: Graph, node: Node) -> str | None:
    """Of which trees: behind the name of the loss; None where kernels go down it."""
    queries, keys = node.inputs[::3], node.inputs[1::3]
    lacks = (
        (len({*queries}) > 1 or len({*keys}) > 1, " of levels with vectors of their own"),
        (
            any(not isinstance(x.op, Input) for x in graph.operands(node)),
            " of vectors that are made",
        ),
    )
    return next((words for lacking, words in lacks if lacking), None)


def _plain(selection: Node) -> bool:
    """Whether every row has a list of its own, of entries side by side."""
    op, dims = selection.op, selection.type.dims
    return isinstance(op, Select) and dims[1:3] == ("T", "1") and op.size == op.stride


def _given(graph: Graph, node: Node) -> bool:
    """Whether vectors are the caller's, or these in fewer bits."""
    if isinstance(node.op, Round):
        return node.op.dtype in ROUNDED and isinstance(graph[node.inputs[0]].op, Input)
    return isinstance(node.op, Input)


def _of_stored(graph: Graph, node: Node, op: Round) -> str | None:
    if op.dtype not in ROUNDED:
        return f"scores vectors kept in {op.dtype}"
    made = graph[node.inputs[0]]
    return None if isinstance(made.op, Input) else _of_pooled(graph, made, op)


def _of_pooled(graph: Graph, made: Node, op: Round) -> str | None:
    """Entries of an index are rounded where they are pooled, if nothing reads them as they were."""
    if not isinstance(made.op, Pool | Norm | Rotate) or made.type.dims[2:] != ("Di",):
        return "rounds pooled keys but of an index"
    if op.dtype == "fp8":
        return "rounds pooled keys to fp8, with a scale for each"
    if isinstance(made.op, Pool) and made.op.how in UNFINISHED:
        return f"rounds keys pooled by {made.op.how}"
    return None if len(graph.users(made.name)) == 1 else "rounds some of the pooled keys"


def _of_attend(graph: Graph, node: Node, op: Attend) -> str | None:
    if op.pattern and (words := patterns.lacking(op.pattern, causal=graph.meta.causal)):
        return words
    chosen = any(isinstance(x.op, Select | SelectSet | Recall) for x in graph.operands(node))
    lacks = (
        (
            bool(op.latent and op.pattern and op.pattern.axes),
            "attends latents in windows along axes",
        ),
        (op.cut in ("nodes", "runs"), f"attends {op.cut}"),
        (
            op.over == "pooled" and chosen and not _by_row(graph, node, op),
            "attends pooled entries but of a list of each row",
        ),
        (
            bool(op.before) and op.over != "pooled",
            "attends tokens of entries that begin before their place",
        ),
        (op.biased and not _adds_bias(graph, node, op), "adds a learned bias to logits"),
        (op.over == "tiers" and bool(op.latent), "attends latents in tiers"),
        (op.over == "tiers" and op.cut is not None, "attends tiers of another order of keys"),
        (op.over != "tiers" and op.counted, "weighs pooled keys by their tokens"),
        (op.rows is not None and not keeping.attended(graph, node), "leaves out rows"),
        (
            op.spans is not None and not stripes.attended(graph, node),
            "attends spans before anchors in such a way",
        ),
        (op.softmax is not None, "has a softmax for every entry"),
    )
    return next((words for lacking, words in lacks if lacking), None)


def _by_row(graph: Graph, node: Node, op: Attend) -> bool:
    """Whether every row attends the entries of a list that it has for itself."""
    chosen = graph.operands(node)[3]
    return isinstance(chosen.op, Select) and chosen.type.dims[1] == "T" and op.which is None


def _adds_bias(graph: Graph, node: Node, op: Attend) -> bool:
    """Whether logits are those of keys that each row chose for itself, which have a bias each."""
    if op.over not in ("tokens", "blocks") or op.latent or not op.scale:
        return False
    selection = graph[node.inputs[3]]
    return isinstance(selection.op, Select) and selection.type.dims[1] == "T"


def by_bias(graph: Graph, node: Node) -> Literal["tokens", "entries"] | None:
    """Whether each row keeps the tokens of greatest bias up to its own, and perhaps the first and its last;
    or the entries of greatest mean bias, their own or one they overlap, and perhaps those of another choice.
    """
    op, first = node.op, graph[node.inputs[0]]
    if not isinstance(op, Select) or not isinstance(first.op, Score | Map):
        return None
    score = score_of(graph, node)
    if not isinstance(score.op, Score) or score.op.form != "bias":
        return None
    size, stride = score.op.size, score.op.stride
    plain = Score(
        level=score.op.level, form="bias", scale=1.0, size=size, stride=stride, within=None
    )
    kept = Select(
        level=op.level,
        size=op.size,
        stride=op.stride,
        k=op.k,
        width=op.width,
        first=op.first,
        last=op.last,
        counted=op.counted,
        final=op.final,
        within=None,
        joined=op.joined,
    )
    if score.op != plain or op != kept:
        return None
    if op.size == op.stride == size == stride == 1 and isinstance(first.op, Score):
        enough = op.k > op.first if op.counted else op.k > 0
        # a last token that is counted, or not causal, is no token that is ranked once and for all
        last = not op.last or (graph.meta.causal and not op.counted)
        return "tokens" if enough and last and not op.joined else None
    pooled = graph[score.inputs[0]].op
    means = Pool(level=score.op.level, how="mean", size=size, stride=stride, position=False)
    greatest = isinstance(first.op, Score) or (
        first.op.how == "max" and first.op.before is None and first.op.cut is None
    )
    return "entries" if pooled == means and greatest and _joins(graph, node) else None


def _ranked_by_bias(graph: Graph, node: Node) -> bool:
    """Whether all that is made of an operator is a choice by biases."""
    if isinstance(node.op, Select):
        return by_bias(graph, node) is not None
    users = graph.users(node.name)
    return bool(users) and all(
        isinstance(user.op, Map | Select) and _ranked_by_bias(graph, user) for user in users
    )


def score_of(graph: Graph, selection: Node) -> Node:
    """What is scored of a level that chooses, or of the level whose scores it takes."""
    first = graph[selection.inputs[0]]
    return graph[first.inputs[0]] if isinstance(first.op, Map) else first


def _joins(graph: Graph, node: Node) -> bool:
    """Whether another choice that is forced is a list of each row, of entries alike."""
    op = node.op
    assert isinstance(op, Select)
    if not op.joined:
        return True
    other = graph[node.inputs[1]]
    alike = isinstance(other.op, Select) and (other.op.size, other.op.stride) == (
        op.size,
        op.stride,
    )
    heads = {*other.type.dims[2:3]} <= {node.type.dims[2], "1"}
    return alike and heads and other.type.dims[1] == node.type.dims[1] == "T" and not op.tail


def of_biases(graph: Graph, node: Node) -> bool:
    """Whether a pool is of biases, which what ranks them makes."""
    source = graph.operands(node)[0].op
    return isinstance(source, Input) and source.role == "bias"


def _of_union(graph: Graph, node: Node) -> str | None:
    """A branch goes on from what those before have left, which knows no keys: none may be seen twice.

    What is chosen leaves a window beside it the tokens that it has.
    """
    branches = [(x, x.op) for x in graph.operands(node) if isinstance(x.op, Attend)]
    if pyramid := next((op.branch for _, op in branches if op.over == "tiers"), None):
        return f"no kernel counts tokens of branch {pyramid} once with others yet"
    for (a, one), (b, other) in combinations(branches, 2):
        apart = walks.beside(graph, a, b) or estimates.beside(graph, a, b)
        if coincide(graph, a, b) and not apart:
            what = "entries" if one.over == "pooled" else "tokens"
            names = f"{what} of branches {one.branch} and {other.branch}"
            return f"{names} may coincide, and no kernel counts them once yet"
    for branch, op in branches:
        left = left_to_window(graph, branch) > 0
        if left and isinstance(graph[branch.inputs[3]].op, SelectSet):
            return f"no kernel leaves a window what branch {op.branch} chose by a rule yet"
        told = walks.sums_of_walks(graph, branch) or estimates.sums_of_estimates(graph, branch)
        if len(graph.users(branch.name)) > 1 and not told:
            return f"no kernel tells the log-sum-exp of branch {op.branch} in a union yet"
    return None


def _of_entries(
    graph: Graph, node: Node, op: Pool | PoolRows | PoolHeads | Norm | Rotate
) -> str | None:
    match op:
        case Pool(how=how) if how not in POOLS:
            return f"pools by {how}"
        case PoolRows():
            return _of_rows(op)
        case PoolHeads():
            return "pools heads"
        case Pool(how=how, before=int()) if how != "gated":
            return f"pools by {how} entries that begin before their place"
        case Pool(how=how, series=int()) if how != "gated":
            return f"pools several series by {how}"
        case Pool():
            return None
        case Rotate(rows=int()):
            pooled = isinstance(graph.operands(node)[0].op, PoolHeads)
            return "rotates queries of heads together" if pooled else None
        case Rotate(at="token"):
            return "rotates keys before it pools them"
        case Norm() | Rotate():
            words = "norms" if isinstance(op, Norm) else "rotates"
            match graph.operands(node)[0].op:
                case Pool(how=how) if how in UNFINISHED:
                    return f"{words} keys pooled by {how}"
                case _:
                    return None


def _of_rows(op: PoolRows) -> str | None:
    if op.clusters is not None:
        return "chooses for clusters of rows"
    if op.last is not None:
        return "chooses by the last rows for all"
    return None if op.how in ("mean", "max") else f"pools rows by {op.how}"


def _of_scores(graph: Graph, node: Node, op: Normalise | ReduceRows) -> str | None:
    if isinstance(op, ReduceRows):
        return "reduces the scores of rows together"
    if held_masses(graph, node):
        return None
    if _in_blocks(graph, node):
        return "normalises scores of blocks of rows"
    return "normalises by the greatest score" if op.by == "max" else None


def held_masses(graph: Graph, node: Node) -> bool:
    """Whether scores of blocks of rows are softmaxed to be held against a threshold, added up until they
    reach a part of all, or ranked with those of all rows, and for nothing else: what ranks them makes them.
    """
    if not isinstance(node.op, Normalise) or node.op.by is not None or not _in_blocks(graph, node):
        return False
    score, total = graph.operands(node)
    held = [x.op for x in graph.users(node.name) if not isinstance(x.op, Divergence)]  # a loss
    tiled = axes.tiling_of(graph) is not None
    rules = all(
        isinstance(op, SelectSet)
        and (of_pairs(op) or (op.rule in ("threshold", "top_p") and not tiled))
        for op in held
    )
    return rules and isinstance(score.op, Score) and total.inputs == (score.name,)


def of_pairs(op: SelectSet) -> bool:
    """Whether a head keeps a part of its pairs, or of what they weigh, of which blocks of rows have as many
    as there are.
    """
    return op.rule in ("fraction", "top_p") and op.scope == "head"


def _in_blocks(graph: Graph, node: Node) -> bool:
    """Whether rows of scores, or of a choice, are those of blocks."""
    first = graph.operands(node)[0]
    return isinstance(first.op, PoolRows) or block_of(first.type.dims[1]) is not None


def _of_level(graph: Graph, node: Node, op: Score | Map | Select | SelectSet) -> str | None:
    """Of a level whose rows choose together, what that is in the way of; of any, what its operators are."""
    if isinstance(op, Score) and op.anchors is not None:
        known = stripes.scored(graph, node)
        return None if known else "scores anchors behind each row in such a way"
    in_blocks = _in_blocks(graph, node)
    way = maps.way_to(graph, node.inputs[0]) if isinstance(op, Select | SelectSet) else None
    if way is not None and way.last and not _says_how_many(graph, node):
        return "chooses by the last rows for all"
    if isinstance(op, Select | SelectSet) and keeping.way_to(graph, node.inputs[0]):
        known = keeping.says(graph, node) or keeping.keeps(graph, node)
        return None if known else "keeps tokens by the masses of last rows in such a way"
    if isinstance(op, SelectSet):
        if walks.walked(graph, node):
            return None
        if held_masses(graph, graph.operands(node)[0]):
            if of_pairs(op) and op.rule == "top_p":
                return _of_masses_of_pairs(graph, node, op)
            if of_pairs(op):
                return _of_set(replace(op, scope=None), in_blocks=True, weighed=False)
            if sorting.order_of(graph, node) is not None:
                op = replace(op, sink=None, cut=None)
            return _of_threshold(op) if op.rule == "threshold" else _of_masses(op)
        if op.rule == "budget_from":
            return _of_budget(graph, node, op)
        return _of_set(op, in_blocks=in_blocks, weighed=_weighed(graph, node))
    if isinstance(op, Score | Map | Select) and _ranked_by_bias(graph, node):
        return None
    if isinstance(op, Select) and in_blocks and sorting.order_of(graph, node) is not None:
        op = replace(op, sink=None, cut=None)
    return (_of_blocks(op) if in_blocks else None) or _of_choice(op)


def _of_blocks(op: Score | Map | Select) -> str | None:
    match op:
        case Score(form=form) if form not in ("dot", "bound"):
            return f"scores blocks of rows by {form}"
        case Score(within=str()):
            return "chooses for blocks of rows inside a beam"
        case Map():
            return "maps scores of blocks of rows"
        case Select(tail=True):
            return "forces the tails of blocks of rows"
        case _:
            return None


def _of_threshold(op: SelectSet) -> str | None:
    """Masses above a threshold, and forced entries; no more is said of the rule."""
    plain = SelectSet(
        level=op.level,
        size=op.size,
        stride=op.stride,
        rule="threshold",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
    )
    return None if op == plain else "holds masses against a threshold, and more"


def _of_masses(op: SelectSet) -> str | None:
    """The best entries of each row until their masses reach a part of all, or of what is not forced."""
    plain = SelectSet(
        level=op.level,
        size=op.size,
        stride=op.stride,
        rule="top_p",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        boundary=op.boundary,
        scope="row",
        least=op.least,
        of="rest" if op.of == "rest" else None,
        where=op.where,
    )
    return None if op == plain else "selects by top_p, and more"


def _of_masses_of_pairs(graph: Graph, node: Node, op: SelectSet) -> str | None:
    """The same of all pairs of a head, beside which entries are forced; of heads on a way, if foretold."""
    found = foretold.foretold(graph)
    if op.when and found is not None and found.blocks.name == node.name:
        op = replace(op, when=None)
    beside = not op.counted or not (op.first or op.last)
    if op.least or op.where or op.of or not beside or axes.tiling_of(graph) is not None:
        return "selects by top_p, and more"
    return _of_masses(replace(op, scope="row"))


def _compared(graph: Graph, node: Node, op: Unlike) -> str | None:
    """Tokens are compared block by block, as the caller's, for a choice by masses that are made beside it."""
    users = graph.users(node.name)
    by_masses = all(held_masses(graph, graph.operands(user)[0]) for user in users)
    given = all(isinstance(x.op, Input) for x in graph.operands(node))
    whole = op.size == op.stride > 0
    alone = all(user.type.dims[1:3] == node.type.dims[1:3] for user in users)
    return None if by_masses and given and whole and alone else "compares the tokens of an entry"


def _weighed(graph: Graph, node: Node) -> bool:
    """Whether the scores of a selection are sums of masses."""
    return maps.way_to(graph, node.inputs[0]) is not None


def _of_set(op: SelectSet, *, in_blocks: bool, weighed: bool) -> str | None:
    """A part of the entries, or of masses, is kept where rows choose together: lists may then be long."""
    by_mass = SelectSet(
        level=op.level,
        size=op.size,
        stride=op.stride,
        rule="top_p",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        boundary="keep",
        scope="row",
        least=op.least,
    )
    if weighed and op == by_mass:
        return None
    plain = SelectSet(
        level=op.level,
        size=op.size,
        stride=op.stride,
        rule="fraction",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        of="all" if op.of == "all" else None,
    )
    if op.apart and weighed and not (op.first or op.last):
        plain = replace(plain, apart=op.apart)
    tiers = op.tiers
    if tiers is not None and in_blocks and (weighed or tiers.by == "fraction"):
        by_tier = replace(plain, rule="quota", tiers=tiers, of=None)
        return None if op == by_tier else "selects by a quota, and more"
    return None if in_blocks and op == plain else f"selects by {op.rule}"


def _says_how_many(graph: Graph, node: Node) -> bool:
    """Whether a choice is made by masses, and only of how many entries anything else reads."""
    users = [user.op for user in graph.users(node.name)]
    told = all(isinstance(x, SelectSet) and x.rule == "budget_from" for x in users)
    return told and isinstance(node.op, SelectSet) and node.op.rule == "top_p"


def _of_budget(graph: Graph, node: Node, op: SelectSet) -> str | None:
    """The part of the entries that the last rows of a sequence keep of theirs, head by head."""
    plain = SelectSet(
        level=op.level,
        size=op.size,
        stride=op.stride,
        rule="budget_from",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        least=op.least,
        budget_from=op.budget_from,
    )
    source, way = graph[node.inputs[1]], maps.way_to(graph, node.inputs[0])
    of_last = maps.way_to(graph, source.inputs[0])
    alike = source.type.dims[2] == node.type.dims[2] and of_last is not None and of_last.last > 0
    goes = way is not None and not way.last and _in_blocks(graph, node)
    return None if op == plain and alike and goes else "selects by budget_from"


def _of_pooled_query(graph: Graph, node: Node) -> str | None:
    """Tiles of axes have one output, which gates of channels give to their rows."""
    query, op = graph.operands(node)[0].op, node.op
    if not isinstance(query, PoolRows):
        return None
    assert isinstance(op, Attend)
    users = [x.op for x in graph.users(node.name) if not isinstance(x.op, LogSumExp)]
    gated = all(isinstance(x, Gate) and x.each == "channel" for x in users)
    if query.tiles and gated and len(node.inputs) == 3 and op.softcap is None:
        return None
    return "attends by the query of rows together"


def _of_brought(graph: Graph, node: Node) -> str | None:
    """A selection that is brought is there to be attended, and is all there is."""
    users = [user.op for user in graph.users(node.name)]
    if any(isinstance(op, Score | Select | SelectSet) for op in users):
        return "expands a selection that is taken over"
    if any(isinstance(other.op, Select | SelectSet) for other in graph.nodes()):
        return "takes over one selection and makes another"
    attends = [op for op in users if isinstance(op, Attend)]
    if any(op.diagonal or op.parts or op.before or op.cut for op in attends):
        return "takes over a selection of entries that are no blocks in place"
    return None


def _of_keys(
    graph: Graph, node: Node, op: Cluster | Permute | Assign | Runs | Unlike | Recall | Carry
) -> str | None:
    match op:
        case Recall(width=int()):
            return _of_brought(graph, node)
        case Cluster(tiles=None):
            return clusters.lacking(graph, node)
        case Cluster():
            return axes.lacking(graph)
        case Permute():
            return sorting.lacking(graph, node)
        case Assign():
            return "assigns keys to nodes of a tree"
        case Runs():
            return "cuts keys into runs"
        case Unlike():
            return _compared(graph, node, op)
        case Recall() | Carry():
            return "takes over a selection"


def _of_choice(op: Score | Map | Select) -> str | None:
    match op:
        case Map(before=int(), how=how, ratio=ratio, taps=taps) if (ratio, taps) != (1, ((0, 1),)):
            return f"maps scores by {how} to entries that begin before their place"
        case Map(how="mean" | "upsample" as how):
            return f"maps scores by {'avg_pool' if how == 'mean' else how}"
        case Score(halves=found) if found:
            return _of_halves(found) or _of_score(op)
        case Score():
            return _of_score(op)
        case Select(diagonal=True):
            return "chooses diagonals"
        case Select(sink=int()):
            return "forces the entries of first tokens"
        case Select(joined=str()):
            return "forces another selection"
        case _:
            return None


def _of_halves(halves: Halves) -> str | None:
    together = halves.rows
    if together is None or together.block is None:
        return "searches halved intervals but for blocks of rows"
    return None if together.how == "max" else f"searches by the {together.how} of rows"


def _of_score(op: Score) -> str | None:
    match op:
        case Score(diagonal=True):
            return "scores along diagonals"
        case Score(form="cosine"):
            return "scores by cosines"
        case Score(form="given"):
            return "takes scores as they are given"
        case Score(form="code_match"):
            return "compares codes"
        case Score(form="bias") | Score(biased=True):
            return "scores by a learned bias"
        case Score(form="pooling_error"):
            return "scores by what pooling gets wrong"
        case Score(counted=True):
            return "adds the logarithm of counts to scores"
        case _:
            return None
