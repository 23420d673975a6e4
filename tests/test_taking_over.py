"""Layers that take over what another one chose: what `bind` leaves, its graph, its kernels, its errors."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from graph_interpreter import evaluate
from plan_cases import random_tensors
from torch import Tensor

from hsgen import (
    backward,
    crossover,
    drawn,
    load_kernel,
    measure,
    passes,
    planner,
    schedule,
    trials,
)
from hsgen.cli import main
from hsgen.errors import ArgumentError, HsgenError, PlanError, SpecError
from hsgen.gates import GateError
from hsgen.graph import Recall
from hsgen.measurer import result_of
from hsgen.plan import Cached
from hsgen.reference import Kept, reference, tensor_shapes
from hsgen.runtime import Kernel
from hsgen.selection import ListSelection, to_list
from hsgen.space import space
from hsgen.spec import Blocks, Reuse, Spec, dump, files, load, parse, verify
from hsgen.target import Target
from hsgen.tuning import Child

H100 = Target.named("h100")
HEAD = """
hsgen: 1
name: taking
heads: {query: 4, kv: 2}
head_dim: 16
"""
TOKENS = """
index: {heads: 2, dim: 16, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 5}
attend:
  - {name: selected, over: token}
reuse:
  - {level: token, over: layers, as: final, every: 4, lead: 1}
"""
PER_GROUP = """
levels:
  - name: token
    partition: tokens
    score: {form: dot, normalise: softmax, share: group, reduce: sum}
    select: {top_k: 5}
attend:
  - {name: selected, over: token}
  - {name: near, window: 3}
combine: {gates: input}
reuse:
  - {level: token, over: layers, as: final, pattern: FFSSFSSS, attend: given}
"""
PAGES = """
levels:
  - name: token
    partition: tokens
    score: {form: dot, normalise: softmax, share: all, reduce: max}
  - name: page
    partition: {blocks: 4}
    score: {from: token, map: sum}
    select: {top_k: 3, force: {last: 2}}
attend:
  - {name: selected, over: page}
reuse:
  - {level: page, over: layers, as: final, every: 7, lead: 2, attend: given}
"""
PER_HEAD = """
levels:
  - name: block
    partition: {blocks: 64}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
reuse:
  - {level: block, over: layers, as: final}
"""
NESTED = """
index: {heads: 2, dim: 16, keys: shared}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: relu_weighted, share: all}
    select: {beam: 3, force: {last: 1}}
  - name: token
    within: block
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 5}
attend:
  - {name: selected, over: token}
reuse:
  - {level: token, over: layers, as: final, every: 2}
"""
STEPS = """
causal: false
levels:
  - name: mass
    partition: tokens
    query: {block: 16, reduce: mean}
    score: {form: dot, normalise: softmax}
  - name: block
    partition: {blocks: 16}
    score: {from: mass, map: sum}
    select: {fraction: 0.3, apart: input}
attend:
  - {name: selected, over: block}
reuse:
  - {level: block, over: steps, as: final, dense: 3, attend: given}
"""
SHARED_LAYER = 3  # of each of these
TEXTS = {
    "tokens": TOKENS,
    "per_group": PER_GROUP,
    "pages": PAGES,
    "per_head": PER_HEAD,
    "nested": NESTED,
}


def of(name: str) -> Spec:
    return parse(HEAD + TEXTS[name])


def taking(name: str) -> Spec:
    return of(name).bind(layer=SHARED_LAYER)


def level_of(spec: Spec) -> str:
    (level,) = spec.brought
    return level


def lists(spec: Spec, rows: int, keys: int, *, batch: int = 2) -> Tensor:
    """Lists in no order, with holes, with repeats, and with entries that a row cannot see."""
    level = spec.level(level_of(spec))
    graph = planner.plan(spec)
    heads = graph[f"{level.name}.taken"].type.dims[2]
    shape = (batch, rows, graph.sizes.get(heads, 1), spec.width(level))
    entries = -(-keys // level.partition.stride)
    made = torch.randint(-1, entries, shape, generator=torch.Generator().manual_seed(keys))
    return made.to(torch.int32)


# --- what is left of a spec


def test_a_layer_chooses_or_takes_over() -> None:
    spec = of("tokens")
    for layer in range(12):
        bound = spec.bind(layer=layer)
        shares = spec.reuse[0].turn(layer) == "shared"
        assert bound.brought == (("token",) if shares else ())
        assert shares == bool(bound.reuse)
        assert parse(dump(bound)) == bound == bound.bind(layer=layer)
    assert spec.bind() == spec and spec.brought == ()


def test_layers_of_shipped_specs() -> None:
    cache = load("index_cache").model_copy(update={"loss": None})
    assert [bool(cache.bind(layer=i).brought) for i in range(6)] == [
        False,
        False,
        *[True] * 3,
        False,
    ]
    assert not any(cache.bind(layer=i).reuse for i in (0, 1, 5))
    for name, layers in (("delta", (3, 8)), ("hylra", (2, 3, 5))):
        spec = load(name)
        assert all(spec.bind(layer=i).brought for i in layers)
        (left,) = spec.bind(layer=0).reuse  # which attends all, and chooses for others
        assert (left.pattern, left.attend, left.lead) == ("F", "given", 0)
        assert spec.bind(layer=1) == spec.bind(layer=0) == spec.bind(layer=0).bind(layer=7)


@pytest.mark.parametrize("name", ["index_cache", "spatten", "sparse_d"])
def test_what_is_no_whole_list_over_layers_stays(name: str) -> None:
    """A loss that reads kept scores, candidates, and layers where steps take over."""
    spec = load(name)
    assert all(spec.bind(layer=i) == spec for i in range(300))
    with pytest.raises(PlanError, match="no kernel takes over a selection yet"):
        schedule.schedule(passes.run(planner.plan(spec.bind(layer=2))), H100)


def test_places_in_the_text_are_kept() -> None:
    span = taking("tokens").span("reuse", 0, "level")
    assert span is not None and span == of("tokens").span("reuse", 0, "level")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("as: candidates, pattern: S", "has the call choose"),
        ("as: final, pattern: S, lead: 1", "before the pattern"),
        ("as: final, pattern: S, dense: 1", "before the pattern"),
        ("as: final, pattern: S, attend: given", "calls that choose"),
    ],
)
def test_where_no_call_chooses_nothing_is_said_of_choosing(more: str, why: str) -> None:
    start, _ = TOKENS.split("reuse:")
    with pytest.raises(SpecError, match=why):
        parse(f"{HEAD}{start}reuse:\n  - {{level: token, over: layers, {more}}}\n")


def test_a_pattern_that_shares_first_is_no_pattern() -> None:
    with pytest.raises(SpecError, match="or S alone"):
        parse(HEAD + TOKENS.replace("every: 4, lead: 1", "pattern: SF"))


# --- the meaning


@pytest.mark.parametrize("name", TEXTS)
def test_reference_takes_what_is_brought(name: str) -> None:
    """As a selection or as state: what the unbound spec's call with that state computes."""
    spec, bound = of(name), taking(name)
    level, x = level_of(bound), random_tensors(spec, 9, 70, batch=2)
    kept = ListSelection(level=level, indices=lists(bound, 9, 70))
    state = {level: Kept(calls=SHARED_LAYER, selection=kept)}
    expected = reference(spec, x, state=state)
    for result in (
        reference(bound, x, state=state),
        reference(bound, x, selection={level: kept}),
        reference(bound, x, selection={level: kept.indices}),
    ):
        assert torch.equal(result.o, expected.o)
    with pytest.raises(ArgumentError, match="expected it, got none"):
        reference(bound, x)


@pytest.mark.parametrize("name", TEXTS)
def test_graph_means_what_the_reference_says(name: str) -> None:
    bound = taking(name)
    level, x = level_of(bound), random_tensors(bound, 5, 22, batch=2)
    kept = lists(bound, 5, 22)
    expected = reference(bound, x, selection={level: kept})
    for graph in (planner.plan(bound), passes.run(planner.plan(bound))):
        actual = evaluate(graph, x | {f"{level}.kept": kept})
        torch.testing.assert_close(actual.o, expected.o)
        assert torch.equal(actual.selection[level], expected.selection[level].indices)


@pytest.mark.parametrize("name", files.shipped())
def test_a_brought_list_is_laid_out_as_the_own_choice(name: str) -> None:
    spec = load(name)
    spec = spec.bind(heads=None if spec.heads else (32, 8), head_dim=None if spec.head_dim else 128)
    try:
        own = planner.plan(spec)
    except HsgenError:
        return
    for level in spec.levels:
        reuse = Reuse(level=level.name, over="layers", role="final", pattern="S")
        try:
            made = verify(spec.model_copy(update={"loss": None, "reuse": (reuse,)}))
            graph = planner.plan(made)
        except HsgenError:
            continue
        for node in graph.nodes():
            if node.name == f"{level.name}.taken":
                assert isinstance(node.op, Recall)
                if node.op.block:  # of which every row brings its block's, of any length
                    continue
                assert node.type == own[f"{level.name}.selection"].type


# --- kernels


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_scored_or_ranked(name: str) -> None:
    plan = schedule.schedule(passes.run(planner.plan(taking(name))), H100)
    assert {kernel.skeleton for kernel in plan.kernels} <= {"index", "rows", "merge"}
    assert not [kernel.name for kernel in plan.kernels if kernel.name.startswith(("score", "rank"))]
    assert {name for name, _ in plan.inputs} <= {"q", "k", "v", "gates"}


def test_shipped_layers_have_kernels() -> None:
    for name, layer in (("delta", 3), ("hylra", 2)):
        plan = schedule.schedule(passes.run(planner.plan(load(name).bind(layer=layer))), H100)
        assert [kernel.name for kernel in plan.kernels][:2] == ["index_selected", "attend_selected"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))


def tensors(spec: Spec, rows: int, keys: int) -> dict[str, Tensor]:
    """What a layer that takes over reads."""
    generator = torch.Generator().manual_seed(1)
    shapes = tensor_shapes(spec, 2, rows, keys)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if name in ("q", "k", "v", "gates")
    }


def assert_means(kernel: Kernel, x: dict[str, Tensor], **more: object) -> None:
    """Output and log-sum-exps are those of the reference."""
    actual, lse = kernel(**x, **more, return_lse=True)  # type: ignore[arg-type]
    expected, expected_lse = kernel.reference(**x, **more, return_lse=True)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)
    by_branch = (each if isinstance(each, dict) else {"": each} for each in (lse, expected_lse))
    for mine, theirs in zip(*(each.values() for each in by_branch), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(("rows", "keys"), [(13, 13), (5, 140)])
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.usefixtures("sanitized")
def test_kernels_mean_what_the_reference_says(
    name: str, rows: int, keys: int, *, interpret: bool
) -> None:
    """Lists that are anyhow: without interpreting, the reference stands in, in another precision."""
    spec = taking(name)
    level, kernel = level_of(spec), load_kernel(spec, interpret=interpret)
    x, indices = tensors(spec, rows, keys), lists(spec, rows, keys)
    assert_means(kernel, x, selection={level: indices})
    if rows == keys:
        assert_means(kernel, x, selection={level: indices[..., :1]})
        assert_means(kernel, x, selection={level: torch.full_like(indices, -1)})
    lens = torch.tensor([keys - 3, keys], dtype=torch.int32)
    assert_means(kernel, x, selection={level: indices}, kv_lens=lens)


# --- layers that attend everything, and choose for others


@pytest.mark.parametrize("name", ["delta", "hylra"])
def test_what_is_chosen_for_others_is_asked_for(name: str) -> None:
    """The branch attends every token, whose sum is that of the masses: nothing is summed apart."""
    graph = passes.run(planner.plan(load(name).bind(layer=0)))
    plan = schedule.schedule(graph, H100)
    assert [kernel.name.split("_")[0] for kernel in plan.kernels] == ["attend", "score", "rank"]
    assert [step.of for step in plan.steps] == [None, "rows"]
    assert not planner.plan(load(name).bind(layer=0)).outputs.state


@pytest.mark.parametrize(
    ("name", "heads", "dim", "rows", "keys"),
    [
        ("pages", (4, 2), 16, 21, 21),
        ("pages", (6, 2), 16, 1, 37),
        ("pages", (3, 3), 96, 6, 18),
        ("pages", (2, 1), 64, 13, 13),
        ("per_group", (6, 2), 16, 9, 21),
        ("per_group", (2, 2), 16, 1, 1),
    ],
)
@pytest.mark.usefixtures("sanitized")
def test_a_layer_that_attends_everything_chooses_by_it(
    name: str, heads: tuple[int, int], dim: int, rows: int, keys: int
) -> None:
    spec = of(name).model_copy(update={"heads": None, "head_dim": None})
    bound = spec.bind(heads=heads, head_dim=dim, layer=0)
    kernel = load_kernel(bound, interpret=True)
    x = tensors(bound, rows, keys)
    assert_means(kernel, x)
    o, lse, chosen = kernel(**x, return_lse=True, return_selection=True)
    (level,) = chosen
    expected = reference(bound, {name: y.double() for name, y in x.items()})
    assert torch.equal(chosen[level].indices, expected.selection[level].indices)
    assert torch.equal(kernel.select(**x)[level].indices, chosen[level].indices)
    again, _ = kernel(**x, selection=chosen, return_lse=True)  # which nothing attends
    assert torch.equal(again, o)
    assert set(lse) <= {"selected", "near"} if isinstance(lse, dict) else True


@pytest.mark.usefixtures("sanitized")
def test_equal_masses_go_to_the_first_entries() -> None:
    """Forced ones beside them; of documents each for itself."""
    spec = of("pages").bind(layer=0)
    cu = torch.tensor([0, 0, 5, 22], dtype=torch.int32)
    x = {name: y[0] for name, y in tensors(spec, 22, 22).items()}
    x["q"] = torch.zeros_like(x["q"])
    kernel = load_kernel(spec, interpret=True)
    _, chosen = kernel(**x, return_selection=True, cu_seqlens_q=cu)
    # rows of a last page beside a first one, which is the fullest
    assert chosen["page"].indices[-1].tolist() == [[0, 3, 4]]
    expected = reference(spec, x, cu_seqlens_q=cu)
    assert torch.equal(chosen["page"].indices, expected.selection["page"].indices)
    assert_means(kernel, x, cu_seqlens_q=cu)


@pytest.mark.parametrize("name", ["pages", "per_group"])
@pytest.mark.usefixtures("sanitized")
def test_steps_hand_on_as_prefill_does(name: str) -> None:
    """What a step of the layer that chooses gives is what a step of the next one takes."""
    spec, tokens = of(name), 14
    first, second = (load_kernel(spec, layer=i, interpret=True) for i in (0, SHARED_LAYER))
    x = tensors(first.spec, tokens, tokens)
    whole, chosen = first(**x, return_selection=True)
    (level,) = chosen
    taken = second(**x, selection=chosen)
    caches = [each.new_cache(2, 32, dtype=torch.float32, device="cpu") for each in (first, second)]
    for start, end in ((0, 11), (11, 12), (12, 14)):
        new = {key: y[:, start:end] for key, y in x.items()}
        run = (each.extend if start == 0 else each.decode for each in (first, second))
        one, other = run
        o, found = one(**new, cache=caches[0], return_selection=True)
        assert torch.equal(found[level].indices, chosen[level].indices[:, start:end])
        torch.testing.assert_close(o, whole[:, start:end], rtol=1e-4, atol=1e-5)
        o = other(**new, cache=caches[1], selection=found)
        torch.testing.assert_close(o, taken[:, start:end], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("pages", 0), ("pages", 3), ("tokens", 3)])
def test_gradients_of_both(name: str, layer: int) -> None:
    spec = of(name).bind(layer=layer)
    kernel = load_kernel(spec, interpret=True)
    x = {key: y.requires_grad_() for key, y in tensors(spec, 11, 17).items()}
    more = {"selection": {level_of(spec): lists(spec, 11, 17)}} if spec.brought else {}
    made, meant = kernel(**x, **more), kernel.reference(**x, **more)  # type: ignore[arg-type]
    assert isinstance(made, Tensor) and isinstance(meant, Tensor)
    grad = torch.randn(made.shape, generator=generator())
    for mine, theirs in zip(
        torch.autograd.grad(made, [*x.values()], grad),
        torch.autograd.grad(meant.float(), [*x.values()], grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


# --- steps that take over


def test_steps_of_shipped_specs() -> None:
    """Dense ones have no level, one chooses for all that follow, which bring its choice."""
    spec = load("sparse_d")
    dense, first, later = (spec.bind(step=step) for step in (204, 205, 206))
    assert dense == spec.bind(step=0) and later == spec.bind(step=1023)
    assert not dense.levels and not dense.reuse and dense.attend[0].window == "all"
    assert first.reuse[0].pattern == "F" and later.brought == ("block",)
    for made in (dense, first, later):
        assert parse(dump(made)) == made == made.bind(step=7)
        assert schedule.schedule(passes.run(planner.plan(made)), H100).kernels
    for wrong in (-1, True):
        with pytest.raises(ArgumentError, match="step: expected a whole number of at least 0"):
            spec.bind(step=wrong)
    with pytest.raises(PlanError, match="give `step` to load_kernel"):
        schedule.schedule(passes.run(planner.plan(spec)), H100)


@pytest.mark.parametrize(
    ("rows", "keys", "splits"),
    [(37, 37, (21, 0)), (5, 50, (16, 33)), (1, 1, (0, 4)), (33, 33, (33, 90))],
)
@pytest.mark.usefixtures("sanitized")
def test_one_step_chooses_for_the_next(rows: int, keys: int, splits: tuple[int, int]) -> None:
    """A part of the blocks of the prompt and as large a part of the others, of which there may be none."""
    spec = parse(HEAD + STEPS)
    dense, first, later = (load_kernel(spec.bind(step=i), interpret=True) for i in (0, 3, 4))
    x = tensors(spec, rows, keys)
    split = torch.tensor(splits, dtype=torch.int32)
    o, chosen = first(**x, block_split=split, return_selection=True)
    meant = reference(first.spec, x | {"block_split": split})
    expected = to_list(meant.selection["block"], width=chosen["block"].indices.shape[-1])
    assert torch.equal(chosen["block"].indices, expected.indices)
    torch.testing.assert_close(o, meant.o.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(first(**x, block_split=split), o) and torch.equal(dense(**x), o)
    assert torch.equal(first.select(**x, block_split=split)["block"].indices, expected.indices)
    assert_means(later, x, selection=chosen)


@pytest.mark.usefixtures("sanitized")
def test_steps_of_documents_and_lists_of_any_kind() -> None:
    """Causal and of a group of one beside: lists with holes, that differ within a block."""
    spec = parse(HEAD.replace("kv: 2", "kv: 4") + STEPS.replace("causal: false", "causal: true"))
    first, later = (load_kernel(spec.bind(step=i), interpret=True) for i in (3, 4))
    cu = torch.tensor([0, 18, 18, 31], dtype=torch.int32)
    x = {name: y[0] for name, y in tensors(spec, 31, 31).items()}
    split = torch.tensor([7, 0, 16], dtype=torch.int32)
    _, chosen = first(**x, block_split=split, return_selection=True, cu_seqlens_q=cu)
    meant = reference(first.spec, x | {"block_split": split}, cu_seqlens_q=cu)
    expected = to_list(meant.selection["block"], width=chosen["block"].indices.shape[-1])
    assert torch.equal(chosen["block"].indices, expected.indices)
    any_lists = torch.randint(-1, 2, (31, 4, 2), generator=generator(), dtype=torch.int32)
    for selection in (chosen["block"].indices, any_lists):
        assert_means(later, x, selection={"block": selection}, cu_seqlens_q=cu)
    with pytest.raises(PlanError, match="no kernel (decodes|attends) what blocks of rows chose"):
        kept = Cached(rows="few")
        schedule.schedule(passes.run(planner.plan(later.spec)), H100, cached=kept)
    with pytest.raises(PlanError, match="gradient of lists that rows share"):
        backward.plan(passes.run(planner.plan(later.spec)), H100)


def test_no_program_reduces_what_it_cannot_hold() -> None:
    """Pages of other sizes, and products of an index with a key head each."""
    other = of("pages").bind(layer=0)
    levels = list(other.levels)
    levels[1] = levels[1].model_copy(update={"partition": Blocks(size=6, stride=6)})
    with pytest.raises(PlanError, match="maps scores of all heads but of 2, 4, 8 or 16 entries"):
        made = other.model_copy(update={"levels": tuple(levels)})
        schedule.schedule(passes.run(planner.plan(made)), H100)


def test_packed_documents_take_over() -> None:
    spec = taking("pages")
    kernel, cu = load_kernel(spec, interpret=True), torch.tensor([0, 5, 13], dtype=torch.int32)
    x = {name: y[0] for name, y in tensors(spec, 13, 13).items()}
    chosen = {"page": lists(spec, 13, 13)[0]}
    assert_means(kernel, x, selection=chosen, cu_seqlens_q=cu)


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.usefixtures("sanitized")
def test_one_layer_hands_on_to_the_next(*, interpret: bool) -> None:
    spec = of("tokens")
    first, second = (load_kernel(spec, layer=i, interpret=interpret) for i in (1, 2))
    shapes = tensor_shapes(spec, 2, 13, 13)
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    few = {name: x[name] for name in ("q", "k", "v")}
    chosen = first.select(**x)
    torch.testing.assert_close(second(**few, selection=chosen), first(**x))


# --- measuring: what another layer could have chosen is drawn


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", TEXTS)
def test_lists_are_drawn_as_an_earlier_layer_would_choose(name: str) -> None:
    """Sets in order of what a row sees, as full as they can be, forced entries among them; rows that follow
    one another choose alike.
    """
    spec = taking(name)
    level = spec.level(level_of(spec))
    (made,) = drawn.lists(spec, 2, 200, 230, generator()).values()
    assert made.shape == lists(spec, 200, 230).shape and made.dtype == torch.int32
    stride, width = level.partition.stride, made.shape[-1]
    own = (torch.arange(30, 230) // stride).view(1, -1, 1)
    assert torch.equal((made >= 0).sum(-1), (own + 1).clamp(max=width).expand(made.shape[:-1]))
    assert (made <= own[..., None]).all()
    ordered = torch.where(made < 0, 1 << 20, made)
    assert (ordered.diff(dim=-1)[made[..., 1:] >= 0] > 0).all()
    for back in range(level.select.force.last if level.select else 0):
        wanted = (own - back).clamp(min=0)[..., None]
        assert (made == wanted).any(-1).all()
    later, before = made[:, 1:, :, :, None], made[:, :-1, :, None, :]
    shared = ((later == before) & (later >= 0)).any(-1)[:, 100:].float().mean()
    chance = width * stride / 180
    assert shared > min(0.6, 4 * chance)


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("reduce", ["sum", "max", "mean"])
def test_scores_of_all_heads_are_made_one(reduce: str) -> None:
    """Key head by key head in one program, also where a tile ends behind what rows see."""
    spec = parse(f"""{HEAD}
causal: true
levels:
  - name: chunk
    partition: {{blocks: 8}}
    pool: {{keys: mean}}
    score: {{form: dot, share: all, reduce: {reduce}}}
    select: {{top_k: 3, force: {{last: 1}}}}
attend:
  - {{name: selected, over: chunk}}
""")
    for trial in trials.trials(spec)[:3]:
        assert trials.judge(trial, H100) == [], trial.name


@pytest.mark.usefixtures("sanitized")
def test_kernels_are_verified_with_lists_of_their_own() -> None:
    spec = taking("pages")
    for trial in trials.trials(spec)[:4]:
        assert trials.judge(trial, H100) == [], trial.name
    wrong = trials.Examination(trials.trials(spec)[0])
    program = trials._program(wrong.trial.spec, H100, wrong.trial.dtype)
    forward = program.driver.forward
    (given,) = wrong._tensors.brought.values()

    def attends_others(x, where, config, brought):
        return forward(x, where, config, {k: v.roll(1, 1) for k, v in brought.items()})

    others = replace(program, driver=SimpleNamespace(forward=attends_others))
    assert "is off by" in wrong.problems(others, program.config)[0]
    assert (given == -1).any()


@pytest.mark.usefixtures("sanitized")
def test_such_a_layer_is_benched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pages.yaml"
    file.write_text(HEAD + PAGES)
    words = ["--device", "cpu", "--tokens", "40", "--layer", "3", "--against", "dense"]
    assert main(["bench", str(file), *words, "--against", "flex", "-o", f"{tmp_path}/a.json"]) == 0
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    done = {name for name, entry in case["steps"].items() if entry["status"] == "ok"}
    assert {"check small", "total", "dense torch", "attend selected"} <= done
    assert not {"select", "attend"} & done  # it chooses nothing
    assert "choosing" not in capsys.readouterr().out


@pytest.mark.usefixtures("sanitized")
def test_such_a_layer_is_tuned() -> None:
    """By the process that measures points: verified, timed, proven."""
    spec = taking("pages")
    start = space(passes.run(planner.plan(spec)), H100, "fp32").start
    problem = {"spec": dump(spec), "dtype": "fp32", "target": json.dumps(asdict(H100))}
    asked = {"problem": problem | {"shapes": ["24"], "fewest": 5, "seconds": 0.0}, "limit": {}}
    child = Child()
    result = result_of(child.answer({"do": "measure", **asked, **start.record()}))
    assert result.failure is None, result.failure
    assert result.times["24"].median_us > 0
    proven = result_of(child.answer({"do": "prove", "shape": "24", **asked, **start.record()}))
    assert 0 < proven.check["error_at_length"] < 1e-4


def test_such_a_layer_is_never_gated() -> None:
    """Its calls bring a selection, which is what they attend."""
    setting = measure.Setting(device="cpu", kind="random", groups=[], seconds=0.0)
    with pytest.raises(GateError, match="level page takes over what other calls chose"):
        crossover.take(taking("pages"), setting, [20])


# --- errors


def call(selection: object) -> None:
    spec = taking("tokens")
    x = tensors(spec, 13, 13)
    load_kernel(spec)(**x, selection=selection)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (None, "selection: expected level 'token', got none"),
        ({}, "selection: expected level 'token', got none"),
        ({"page": torch.zeros(2, 13, 1, 5)}, "selection: expected level 'token', got page"),
        (
            {"token": torch.zeros(2, 12, 1, 5, dtype=torch.int32)},
            r"= \[2, 13, 1, 1 to 5\] int32 cpu",
        ),
        (
            {"token": torch.zeros(2, 13, 2, 5, dtype=torch.int32)},
            r"= \[2, 13, 1, 1 to 5\] int32 cpu",
        ),
        (
            {"token": torch.zeros(2, 13, 1, 6, dtype=torch.int32)},
            r"= \[2, 13, 1, 1 to 5\] int32 cpu",
        ),
        ({"token": torch.zeros(2, 13, 1, 5)}, r"got \[2, 13, 1, 5\] fp32 cpu"),
    ],
)
def test_a_selection_is_asked_for(selection: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(selection)


def test_what_takes_over_chooses_nothing() -> None:
    spec = taking("tokens")
    x = tensors(spec, 13, 13)
    with pytest.raises(ArgumentError, match="chooses nothing"):
        load_kernel(spec).select(**x)


def test_such_a_layer_compiles_unverified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "delta", "--layer", "3", "--no-verify", "--json"]) == 0
    assert "attend_selected" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("compile", "--no-verify"), ("tuned", "explain")])
def test_commands_leave_out_what_such_a_layer_learns(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss would need the index, which a layer that takes over has none of."""
    assert main([*command, "index_cache", "--layer", "2"]) == 0
    said = capsys.readouterr().out
    assert "attend_selected" in said
    assert "score_token" not in said


def test_refusals_name_what_they_lack() -> None:
    beam = HEAD + NESTED.replace("level: token, over", "level: block, over")
    two = beam + "  - {level: token, over: layers, as: final, every: 2}\n"
    with pytest.raises(PlanError, match="level block: no kernel expands a selection that is taken"):
        schedule.schedule(passes.run(planner.plan(parse(beam).bind(layer=1))), H100)
    assert parse(two).bind(layer=1).brought == ("block", "token")
    schedule.schedule(passes.run(planner.plan(parse(two).bind(layer=1))), H100)
    with pytest.raises(PlanError, match="no kernel takes over a selection yet") as caught:
        schedule.schedule(passes.run(planner.plan(of("tokens"))), H100)
    assert "give `layer` to load_kernel" in str(caught.value)
