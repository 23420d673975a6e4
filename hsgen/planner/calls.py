"""What a level takes over from earlier calls, and losses."""

from __future__ import annotations

from typing import Literal

from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.graph import Carry, Distance, Divergence, Entropies, Node, Recall, Turns, Which
from hsgen.planner.builder import Builder
from hsgen.planner.orders import centroids

Takes = tuple[Which, Which, Which]  # of dense, fresh and shared calls


def plan_reuse(builder: Builder, level: language.Level, own: Node) -> None:
    """What a reused level hands on, and what its branches attend."""
    reuse = builder.spec.reuse_of(level.name)
    if reuse is None or reuse.fresh:  # whose choice is its own, and serves other calls
        return
    final = reuse.role == "final"
    before: Which = "all" if reuse.attend == "given" else "own"
    shared: Which = "kept" if final or reuse.attend == "given" else "own"
    taken = _recall(builder, level, own, "taken", ("kept", "own", "kept" if final else "own"))
    attended = _recall(builder, level, own, "attended", ("all", before, shared))
    builder.selections[level.name] = taken
    builder.attended[level.name] = attended
    builder.state[level.name] = taken


def brought(builder: Builder, level: language.Level) -> bool:
    """Plan a level that no call scores: its selection is the caller's.  -> whether it is one

    Raises:
        PlanError: the graph has no such selection of varying counts, or of rows of tiles and clusters.
    """
    reuse = builder.spec.reuse_of(level.name)
    if reuse is None or not reuse.brought:
        return False
    assert level.select is not None, "what is reused selects"
    at = builder.spec.span("reuse", builder.spec.reuse.index(reuse), "level")
    together, varies = builder.spec.rows_of(level), level.select.counts_vary
    ordered = builder.spec.axes is not None or level.permute is not None
    block = together.block if together is not None else None
    if (together is not None and (block is None or ordered)) or (varies and block is None):
        what = "whose counts vary" if together is None else "of rows that are no blocks"
        message = f"level {level.name}: no kernel takes over a selection {what} yet"
        raise PlanError(message, span=at)
    op = Recall(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        turns=_turns(reuse),
        takes=("kept", "kept", "kept"),
        width=0 if varies else builder.spec.width(level),
        block=block,
        part=level.select.fraction if varies else None,
    )
    source = level
    while source.score.source:
        source = builder.spec.level(source.score.source)
    dims = "B", "T", _heads(source), f"K_{level.name}"
    kept = builder.input(f"{level.name}.kept", "state", *dims, dtype="i32")
    builder.selections[level.name] = builder.add(f"{level.name}.taken", op, kept, at=at)
    return True


def narrowed(builder: Builder, level: language.Level) -> Node | None:
    """The entries that a call scores, where it chooses among kept ones."""
    reuse = builder.spec.reuse_of(level.name)
    if reuse is None or reuse.role != "candidates":
        return None
    return _recall(builder, level, None, "among", ("all", "all", "kept"))


def carried(builder: Builder, level: language.Level, score: Node) -> Node:
    """Scores with those of earlier calls, where the spec adds them up."""
    reuse = builder.spec.reuse_of(level.name)
    if reuse is None or not reuse.accumulate:
        return score
    return _carry(builder, level, score, reuse, "sum")


def plan_losses(builder: Builder, outputs: dict[str, Node]) -> dict[str, Node]:
    """Every loss of the spec.  outputs: of branches, after their gates."""
    loss = builder.spec.loss
    found: dict[str, Node] = {}
    if loss and loss.kl:
        found["kl"] = _plan_kl(builder, loss.kl)
    if loss and loss.distill:
        distill = loss.distill
        op = Distance(form=distill.form, toward=distill.toward)
        at = builder.spec.span("loss", "distill")
        operands = outputs[distill.student], outputs[distill.teacher]
        found["distill"] = builder.add("loss.distill", op, *operands, at=at)
    if loss and loss.dual_entropy:
        found["dual_entropy"] = _plan_dual_entropy(builder, loss.dual_entropy)
    return found


def _plan_dual_entropy(builder: Builder, dual: language.DualEntropy) -> Node:
    levels = builder.spec.tree(dual.tree)
    trees = [level.partition for level in levels]
    op = Entropies(
        levels=tuple(level.name for level in levels),
        branching=tuple(x.branching for x in trees if isinstance(x, language.LearnedTree)),
        temperature=dual.temperature,
        balance=dual.balance,
    )
    operands = [
        node
        for level in levels
        for node in (builder.query(level.q), builder.keys(level.kv), centroids(builder, level))
    ]
    at = builder.spec.span("loss", "dual_entropy")
    return builder.add("loss.dual_entropy", op, *operands, at=at)


def _plan_kl(builder: Builder, kl: language.Kl) -> Node:
    level = builder.spec.level(kl.level)
    score, reuse = builder.scores[kl.level], builder.spec.reuse_of(kl.level)
    if reuse is not None and reuse.role == "final":
        score = _carry(builder, level, score, reuse, "keep")
    source, branch = level, builder.spec.learned_from
    while source.score.source:
        source = builder.spec.level(source.score.source)
    op = Divergence(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        over=kl.over,
        heads=kl.heads,
        tokens=kl.tokens,
        masses=source.score.normalise is not None,
        scale=builder.attention_scale() if not branch or branch.scale is None else branch.scale,
        rows=kl.rows,
    )
    operands = [score, builder.query(), builder.keys(branch and branch.kv)]
    if kl.over == "selected":
        operands.append(builder.selections[kl.level])
    return builder.add("loss.kl", op, *operands, at=builder.spec.span("loss", "kl"))


def _recall(
    builder: Builder, level: language.Level, own: Node | None, name: str, takes: Takes
) -> Node:
    """The set that a call takes, by its turn; no node where that is always each row's own choice."""
    reuse = builder.spec.reuse_of(level.name)
    assert reuse is not None
    if reuse.dense == 0:  # there is no such call: say nothing of it
        takes = (takes[1], *takes[1:])
    if own is not None and set(takes) == {"own"} and own.type.dims[1] == "T":
        return own
    known = builder.recalled.get((level.name, takes))
    if known is not None:
        return known
    op = Recall(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        turns=_turns(reuse),
        takes=takes,
    )
    operands = [own] if own is not None and "own" in takes else []
    if "kept" in takes:
        operands.append(_kept(builder, level, own))
    calls = builder.input(f"{level.name}.calls", "state", "1", dtype="i32")
    at = builder.spec.span("reuse", builder.spec.reuse.index(reuse), "level")
    made = builder.add(f"{level.name}.{name}", op, *operands, calls, at=at)
    return builder.recalled.setdefault((level.name, takes), made)


def _kept(builder: Builder, level: language.Level, own: Node | None) -> Node:
    """The kept selection, as the level's own choice is laid out."""
    assert level.select is not None
    last = f"W_{level.name}" if level.select.counts_vary else f"K_{level.name}"
    heads = own.type.dims[2] if own else _heads(level)
    return builder.input(f"{level.name}.kept", "state", "B", "T", heads, last, dtype="i32")


def _heads(level: language.Level) -> str:
    """Heads that choose for themselves, of a level with scores of its own."""
    return {"head": "Hq", "group": "Hkv", "all": "1"}[level.score.share]


def _carry(
    builder: Builder,
    level: language.Level,
    score: Node,
    reuse: language.Reuse,
    how: Literal["sum", "keep"],
) -> Node:
    op = Carry(level=level.name, turns=_turns(reuse), how=how)
    kept = builder.input(f"{level.name}.kept_scores", "state", *score.type.dims, dtype="f32")
    calls = builder.input(f"{level.name}.calls", "state", "1", dtype="i32")
    at = builder.spec.span("reuse", builder.spec.reuse.index(reuse), "level")
    made = builder.add(f"{level.name}.carried", op, score, kept, calls, at=at)
    builder.state[f"{level.name}.scores"] = made
    return made


def _turns(reuse: language.Reuse) -> Turns:
    return Turns(
        over=reuse.over,
        dense=reuse.dense,
        lead=reuse.lead,
        every=reuse.every,
        pattern=reuse.pattern,
    )
