"""Plans: golden text, launches in an order that works, and configurations that fit their GPU."""

import functools
import itertools
import math
import re
from dataclasses import replace

import emitted
import plan_cases
import pytest
import torch
import triton
from conformance import systems
from shares import covering

from hsgen import (
    axes,
    backward,
    catalogue,
    configs,
    dryrun,
    passes,
    pipeline,
    report,
    resources,
    schedule,
    standins,
)
from hsgen.errors import PlanError
from hsgen.graph import AxisTile, Entropies, Input
from hsgen.rows import next_power
from hsgen.spec import Attend, Combine, HeadDim, Heads, load, parse, verify
from hsgen.target import A100, B200, H100, MI300X, RTX4090

TARGETS = (H100, A100, RTX4090, B200, MI300X)
DIMS = ((32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
HEADS = ((32, 32), (6, 2), (28, 4), (64, 4))  # groups of 1, 3, 7, 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_plan_is_golden(name, golden):
    golden(f"{name}/plan.txt", str(emitted.shipped_plan(name)))


# --- structure


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_every_operator_has_a_kernel_and_every_value_is_made_before_it_is_read(name):
    plan = emitted.shipped_plan(name)
    graph = passes.without_losses(emitted.graph(systems.load(name)))
    done = {operator for kernel in plan.kernels for operator in kernel.operators}
    apart = (Input, Entropies)  # the loss of a tree is no call's
    assert done == {node.name for node in graph.nodes() if not isinstance(node.op, apart)}
    known = {name for name, _ in plan.inputs}
    for step in plan.steps:
        assert set(step.needs) <= known, step.title
        known |= set(step.makes)
    assert {*plan.lse, *plan.selection} <= {node.partition(".")[0] for node in known}


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_a_launch_has_an_argument_for_each_parameter(name):
    plan = emitted.shipped_plan(name)
    usual = [launch.kernel for step in plan.usual for launch in step.launches]
    launched = {launch.kernel for step in plan.steps for launch in step.launches}
    assert len(usual) == len(set(usual))
    assert launched == {kernel.name for kernel in plan.kernels}
    for launch in (launch for step in plan.steps for launch in step.launches):
        given = [p for p in plan.kernel(launch.kernel).params if p.kind != "constexpr"]
        assert len(launch.arguments) == len(given)


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_every_tunable_has_a_value_of_its_own_or_of_the_kernel_it_follows(name):
    plan = emitted.shipped_plan(name)
    for kernel in plan.kernels:
        own = dict(kernel.config.constexprs)
        lent = dict(plan.kernel(kernel.follows).config.constexprs) if kernel.follows else {}
        tunables = {p.name for p in kernel.params if p.kind == "constexpr"}
        assert set(own) <= tunables <= {*own, *lent}


REFUSED = {
    "nsa_union": "no kernel tells the log-sum-exp of branch compressed in a union yet",
    "overlapping": "overlapping blocks",
}


@pytest.mark.parametrize("case", plan_cases.CASES, ids=lambda case: case.name)
def test_what_no_kernel_does_is_refused_by_name(case):
    wide = case.model_copy(update={"head_dim": HeadDim(qk=32, v=16)})
    if wide.index:
        wide = wide.model_copy(update={"index": wide.index.model_copy(update={"dim": 16})})
    graph = emitted.graph(wide)
    if case.name in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[case.name]):
            schedule.schedule(graph, H100)
    else:
        assert schedule.schedule(graph, H100).kernels


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": None}, "Hq is not known: give `heads`"),
        ({"head_dim": None}, "Dqk is not known"),
        ({"head_dim": HeadDim(qk=24, v=16)}, "head dim Dqk: expected a multiple of 16 .* got 24"),
        ({"head_dim": HeadDim(qk=16, v=512)}, "head dim Dv: .* got 512"),
    ],
)
def test_sizes_no_kernel_holds_are_refused(change, words):
    spec = load("moba").model_copy(update=change)
    with pytest.raises(PlanError, match=words):
        schedule.schedule(emitted.graph(spec), H100)


BY_RULE = """
hsgen: 1
name: by_rule
heads: {query: 4, kv: 2}
head_dim: 32
causal: true
levels:
  - name: block
    partition: {blocks: 16}
    pool: {keys: mean}
    query: {block: 24, pool: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {fraction: 0.4, force: {last: 1}}
attend: [{name: selected, over: block}, {name: window, window: 20}]
combine: {softmax: union}
"""


def test_what_a_rule_chose_leaves_no_window_anything():
    message = "no kernel leaves a window what branch selected chose by a rule yet"
    with pytest.raises(PlanError, match=message):
        schedule.schedule(emitted.graph(parse(BY_RULE, "by_rule")), H100)


def test_entries_that_two_branches_of_a_union_reach_are_refused():
    spec = load("deepseek_hca")
    pooled, window = spec.attend
    again = pooled.model_copy(update={"name": "again"})
    spec = verify(spec.model_copy(update={"attend": (pooled, window, again)}))
    with pytest.raises(PlanError, match="entries of branches compressed and again may coincide"):
        schedule.schedule(emitted.graph(spec), H100)


# --- a call on paper


@pytest.mark.parametrize("name", ["moba", "hisa", "nsa"])
def test_buffers_on_paper_are_those_that_the_driver_allocates(name, monkeypatch):
    case = next(case for case in plan_cases.CASES if case.name == name)
    changes = {"head_dim": HeadDim(qk=16, v=16)}
    if case.index:
        changes["index"] = case.index.model_copy(update={"dim": 16})
    spec = case.model_copy(update=changes)
    artifact = emitted.compiled(emitted.graph(spec), spec)
    plan = configs.for_interpreter(artifact.plan)
    found = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **k: found.append(shape) or empty(shape, **k))
    emitted.run(artifact, emitted.tensors(spec, 16))
    on_paper = dryrun.run(plan, tokens=16)
    assert sorted(found) == sorted(array.shape for _, array in on_paper.buffers)


@pytest.mark.parametrize(
    ("name", "branch", "part"),
    [
        ("moba", "selected", "part_o_selected"),
        ("hisa", "selected", "marks_selected"),
    ],
)
def test_lists_of_a_turn_are_bounded_whatever_the_length(name, branch, part):
    """Or by what one head's rows, or one tile's, need."""
    plan = emitted.shipped_plan(name)
    one = {"moba": 1, "hisa": plan.kernel(f"attend_{branch}").config["BLOCK_T"]}[name]
    most = set()
    for tokens in (1 << 10, 1 << 13, 1 << 17, 1 << 20):
        arrays = {buffer.name: array for buffer, array in dryrun.run(plan, tokens=tokens).buffers}
        most.add(arrays[part].shape[0])
        assert arrays[part].bytes <= schedule.SCRATCH_BYTES or arrays[part].shape[0] == one
    assert len(most) > 1


def test_an_order_that_a_branch_does_not_have_is_refused():
    graph = emitted.graph(systems.load("nsa"))
    with pytest.raises(PlanError, match="branch selected: rows come to blocks only where"):
        schedule.schedule(graph, H100, orders={"selected": "keys"})
    with pytest.raises(PlanError, match="no branch over blocks is called window") as caught:
        schedule.schedule(graph, H100, orders={"window": "keys"})
    assert "branches over blocks: selected" in str(caught.value)


@pytest.mark.parametrize(
    ("order", "kernel"), [("rows", "index_selected"), ("keys", "merge_selected")]
)
def test_long_blocks_have_two_orders(order, kernel):
    plan = schedule.schedule(emitted.graph(systems.load("moba")), H100, orders={"selected": order})
    assert kernel in {each.name for each in plan.kernels}


def windowed(name, *windows):
    """A shipped spec with windows beside its branches, and gates."""
    spec = systems.load(name)
    others = tuple(Attend(name=window, window=512) for window in windows)
    changes = {"attend": (*spec.attend, *others), "combine": Combine(gates="input")}
    return verify(spec.model_copy(update=changes))


@pytest.mark.parametrize(
    ("spec", "turns"),
    [
        (lambda: load("nsa"), ["compressed", "selected", "window"]),
        (lambda: windowed("moba", "window", "near"), ["near", "selected", "window"]),
        (lambda: windowed("hisa", "near"), ["near", "selected"]),
        (lambda: windowed("block_lists", "near"), ["selected", "near"]),
    ],
    ids=["before a choice", "two windows", "two kernels a branch", "blocks of rows"],
)
def test_branches_add_to_one_output_in_turn(spec, turns):
    """The first stores, the others add; the driver launches them in the plan's order."""
    plan = schedule.schedule(emitted.graph(spec()), H100)
    buffers = [buffer for step in plan.usual for buffer in step.buffers]
    outputs = [b.name for b in buffers if b.role == "output" and b.dtype == "input"]
    assert outputs == [plan.output]
    gates = {
        kernel.name.partition("_")[2]: kernel.context.gate
        for kernel in plan.kernels
        if getattr(kernel.context, "gate", None)
    }
    assert {branch for branch, gate in gates.items() if gate.first} == {turns[0]}
    assert [gates[branch.name].column for branch in spec().attend] == list(range(len(turns)))
    forward, _, _ = emitted.sources(plan)["driver.py"].partition("def select")
    launched = re.findall(r"^ +(?:attend|gather|merge)_(\w+)\[grid\]", forward, re.MULTILINE)
    assert list(dict.fromkeys(launched)) == turns


# Of tier A those that have kernels, and what they are measured beside; of open heads those of `catalogue`.
MEASURED = (
    "dsa",
    "hip",
    "hirouter",
    "hisa",
    "infllm_v2",
    "minimax_m3",
    "moba",
    "nsa",
    "psa",
    "quest",
    "seer_attention",
    "vsa",
    "dsa_gqa",
    "glm_kpool",
    "xattention",
)


@functools.cache
def measured_graph(name):
    spec = load(name)
    spec = spec.bind(layer=15) if name == "token_sparse" else spec  # of those that drop tokens
    if spec.heads is None:
        query, kv = catalogue.HEADS
        spec = standins.bind(spec, query=query, kv=kv, dim=catalogue.HEAD_DIM)
    return emitted.graph(spec)


def test_what_is_measured_has_all_of_tier_a_that_has_kernels():
    for name in catalogue.TIERS["A"].split():
        try:
            schedule.schedule(measured_graph(name), H100)
        except PlanError:
            assert name not in MEASURED
        else:
            assert name in MEASURED


@pytest.mark.parametrize("name", [*MEASURED, "deepseek_csa", "step_csa"])
def test_a_call_holds_little_beside_inputs_outputs_and_selection(name):
    plan = schedule.schedule(measured_graph(name), replace(H100, streams=True))
    for tokens in (4096, 8192, 32768, 131072):
        run = dryrun.run(plan, tokens=tokens)
        given = run.given + run.of("output", "selection")
        assert run.given + run.peak <= 1.2 * given, tokens


@pytest.mark.parametrize("apart", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("name", MEASURED)
def test_gradients_hold_little_beside_what_is_saved_lists_and_themselves(name, apart):
    graph, target = measured_graph(name), replace(H100, streams=True)
    forward = schedule.schedule(graph, target)
    plan = backward.plan(graph, target, apart=apart)
    for tokens in (4096, 8192, 32768, 131072):
        run = dryrun.gradients(plan, forward, tokens=tokens)
        assert run.given + run.peak <= 1.3 * (run.given + run.of("output", "list")), tokens


@pytest.mark.parametrize("name", ["s2o", "token_sparse"])
def test_gradients_hold_little_where_lists_would_be_as_long_as_keys(name):
    """No list is counted as given: a row's would be of 4 bytes a token and head."""
    graph, target = measured_graph(name), replace(H100, streams=True)
    forward, plan = schedule.schedule(graph, target), backward.plan(graph, target)
    for tokens in (4096, 8192, 32768, 131072):
        run = dryrun.gradients(plan, forward, tokens=tokens)
        assert run.given + run.peak <= 1.3 * (run.given + run.of("output")), tokens


@pytest.mark.parametrize("apart", [False, True], ids=["again", "kept"])
def test_tiles_of_axes_hold_little_beside_what_a_caller_has(apart):
    """No list of a row, no output of a branch and no list of a turn is counted as given."""
    graph, target = measured_graph("vsa"), replace(H100, streams=True)
    forward = schedule.schedule(graph, target)
    plan = backward.plan(graph, target, apart=apart)
    given = {forward.output, *forward.lse.values()}
    for tokens in (4096, 8192, 32760, 131072):
        run = dryrun.run(forward, tokens=tokens)
        had = run.given + sum(x.bytes for buffer, x in run.buffers if buffer.name in given)
        assert run.given + run.peak - run.of("selection") <= 1.2 * had, tokens
        run = dryrun.gradients(plan, forward, tokens=tokens)
        assert run.given + run.peak <= 1.3 * (run.given + run.of("output")), tokens


@pytest.mark.parametrize(
    "axes_",
    [
        ((21, 4), (30, 4), (52, 4)),
        ((3, 1), (3, 2), (5, 2)),
        ((4, 2), (1, 4), (7, 3)),
        ((5, 2), (7, 4)),
        ((9, 4),),
        ((2, 1), (5, 3), (1, 2)),
    ],
)
def test_there_is_room_for_all_tiles_that_have_a_token(axes_):
    tiling = axes.Tiling(axes=tuple(AxisTile(length=n, tile=t) for n, t in axes_))
    begun = [tiling.begun(n) for n in range(min(tiling.places, 7000) + 1)]
    assert all(tiling.room(n) >= tiles for n, tiles in enumerate(begun))
    documents = [n for n in (1, 2, 5, tiling.places // 3, 1, tiling.places) if n]
    total = sum(map(tiling.begun, documents))
    assert total <= tiling.room(sum(documents), len(documents))
    names: dict[str, object] = {}
    for name, text in tiling.rooms("all", str(sum(documents)), str(len(documents))):
        names[name] = dryrun.evaluate(text, names)
    assert names["all_tiles"] == tiling.room(sum(documents), len(documents))


def test_tiles_of_short_documents_have_no_whole_slabs():
    """A document of two lines of a frame has the tiles of one strip, and launches are one a tile."""
    graph = measured_graph("vsa")
    tiling = axes.tiling_of(graph)
    assert tiling is not None
    for tokens in (52, 208, 260, 1560, 6240, 32760):
        assert tiling.room(tokens) == tiling.begun(tokens), tokens
    for tokens in (1, 53, 209, 6241):
        assert tiling.room(tokens) >= tiling.begun(tokens), tokens
    plan = schedule.schedule(graph, H100)
    run = dryrun.run(plan, tokens=104, batch=1000, packed=True)
    arrays = {buffer.name: array for buffer, array in run.buffers}
    (tiles,) = arrays["made_tokens"].shape
    assert 1000 * 13 <= tiles <= 1000 * 20  # where whole slabs were 1000 * 104
    assert arrays["made_order"].shape == (tiles * tiling.slots,)
    for kernel in ("order_tiles", "tiles_of_q", "tiles_of_k", "slots_of_v"):
        assert math.prod(run.launch(kernel).grid) <= 2 * tiles * 12, kernel


@pytest.mark.parametrize(
    "name",
    [
        *(
            "dhsa_released",
            "draft_attention",
            "draft_attention_head",
            "hip",
            "psa",
            "seer_attention",
        ),
        *("proxy_attn", "sparge", "vsa", "xattention"),
        *("dhsa", "s2o", "token_sparse"),
    ],
)
def test_where_rows_choose_together_no_row_has_a_list_unless_a_caller_asks(name):
    """Beside inputs and outputs alone; lists of rows were up to 34 GB, ten times as much."""
    plan = schedule.schedule(measured_graph(name), replace(H100, streams=True))
    asked = {buffer.name for step in plan.steps if step.of == "rows" for buffer in step.buffers}
    assert asked
    others = [step for step in plan.steps if step.of not in ("rows", "given")]
    assert asked.isdisjoint(name for step in others for name in step.reads)
    for tokens in (4096, 8192, 32768, 131072):
        run = dryrun.run(plan, tokens=tokens)
        given = run.given + run.of("output")
        assert run.given + run.peak - run.of("selection") <= 1.2 * given, tokens


@pytest.mark.parametrize("name", ["svg2", "svg_ear"])
def test_clusters_hold_a_fifth_of_a_call_at_most(name):
    """Centroids do not grow with a call: of 8,192 tokens, eight a cluster, svg_ear holds 1.22 times that."""
    plan = emitted.shipped_plan(name)
    for tokens in (16384, 32768, 131072):
        run = dryrun.run(plan, tokens=tokens)
        given = 4 * tokens * plan.sizes["Hq"] * plan.sizes["Dqk"] * 2
        assert run.given + run.peak - run.of("selection") <= 1.2 * given, tokens


def test_what_no_later_step_reads_passes():
    """Scores behind a choice, lists and parts behind what walks them; never what a call gives or needs."""
    plan = schedule.schedule(emitted.graph(systems.load("moba")), H100)
    passing = {name for step in plan.steps for name in plan.passing(step)}
    assert {"scores_chunk", "part_o_selected", "list_selected"} <= passing
    assert passing.isdisjoint({plan.output, *plan.lse.values(), *plan.selection.values()})
    read = {name for step in plan.steps for name in step.reads}
    assert passing.isdisjoint(read)
    plan = backward.plan(emitted.graph(systems.load("moba")), H100)
    passing = {name for step in plan.steps for name in plan.passing(step)}
    assert passing
    assert passing.isdisjoint({*plan.gradients.values(), f"delta_{[*plan.lse.values()][0]}"})


def test_heads_have_turns_alike():
    """As few as a scratch allows; in short calls less is held, in at most eight turns."""
    plan = emitted.shipped_plan("moba")
    heads = plan.sizes["Hq"]
    for tokens, turn in ((1 << 10, heads), (1 << 13, 8), (1 << 15, 5), (1 << 17, 1)):
        arrays = {buffer.name: array for buffer, array in dryrun.run(plan, tokens=tokens).buffers}
        assert arrays["part_o_selected"].shape[0] == turn


def test_scratch_is_bounded_whatever_the_length():
    """Or by what one tile of rows needs."""
    for name, tokens in itertools.product(emitted.SHIPPED, (1 << 13, 1 << 17, 1 << 20)):
        plan = emitted.shipped_plan(name)
        by_level = {}
        for buffer, array in dryrun.run(plan, tokens=tokens).buffers:
            if buffer.name.startswith("sums_"):  # of pieces of keys, beside scores
                assert array.bytes <= schedule.SCRATCH_BYTES // 16
            elif buffer.role == "scratch":
                by_level.setdefault(buffer.name.partition("_")[2], []).append(array)
        scored = {kernel.name for kernel in plan.kernels}
        for level, arrays in by_level.items():
            held = sum(array.bytes for array in arrays)
            if f"score_{level}" not in scored:  # of trees, whose programs are a few a processor
                given = 4 * tokens * plan.sizes["Hq"] * plan.sizes["Dqk"]  # queries and outputs
                assert held <= max(schedule.SCRATCH_BYTES, given) // 4
                continue
            if f"edge_{level}" in scored:  # all pairs of a head are ranked together
                assert held <= 4 * tokens * plan.sizes["Hq"] * plan.sizes["Dqk"] * 3 // 5
                continue
            one = plan.kernel(f"score_{level}").config["BLOCK_T"]
            assert {array.shape[0] for array in arrays} == {arrays[0].shape[0]}
            assert held <= schedule.SCRATCH_BYTES or arrays[0].shape[0] == one


@pytest.mark.parametrize(
    "text", ["__import__('os')", "q.__class__", "[1]", "f(x=1)", "1 if a < b else 2", "2 ** 9"]
)
def test_only_plain_arithmetic_is_worked_out(text):
    with pytest.raises((ValueError, KeyError)):
        dryrun.evaluate(text, {"q": 1, "a": 1, "b": 2, "f": 3})


# --- configurations


def resized(spec, heads, dims):
    changes = {
        "heads": Heads(query=heads[0], kv=heads[1]),
        "head_dim": HeadDim(qk=dims[0], v=dims[1]),
    }
    if spec.index_per_key_head:
        changes["index"] = spec.index.model_copy(
            update={"heads": heads[1]}
        )  # one for each key head
    elif spec.index and any(x.score.sums_index and x.score.share == "group" for x in spec.levels):
        several = max(spec.index.heads, heads[1])
        changes["index"] = spec.index.model_copy(
            update={"heads": several}
        )  # each group sums its own
    changes["levels"] = systems.turned_less(spec, dims[0])
    changes["attend"] = tuple(systems.of_heads(branch, heads[0]) for branch in spec.attend)
    return spec.model_copy(update=changes)


@pytest.mark.parametrize(("name", "half"), covering(emitted.SHIPPED, [0, 1]))
def test_there_is_a_configuration_for_every_size_and_target(name, half):
    for heads, dims in [*itertools.product(HEADS, DIMS)][half::2]:
        if name.startswith("biformer") and heads[1] * dims[0] >= 512:
            continue  # one dot has the channels of all heads: its own are 64
        graph = emitted.graph(resized(systems.load(name), heads, dims))
        for target, dtype in itertools.product(TARGETS, ("bf16", "fp32")):
            if (name, dtype, dims[0]) == ("quest", "fp32", 256) and target in (RTX4090, MI300X):
                with pytest.raises(PlanError, match="score_page cannot run"):
                    schedule.schedule(graph, target, dtype)  # keys twice as wide
                continue
            for kernel in schedule.schedule(graph, target, dtype).kernels:
                check_tile(kernel)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("dims", [(576, 512), (512, 512)])
def test_a_latent_is_loaded_once_and_its_heads_are_shared_out(dims, target):
    """64 rows of 512 sums are half of a processor's registers; the second half of 128 heads is another's."""
    spec = systems.load("sparse_mla").model_copy(
        update={"head_dim": HeadDim(qk=dims[0], v=dims[1])}
    )
    for heads in (64, 128):
        plan = schedule.schedule(emitted.graph(resized(spec, (heads, 1), dims)), target, "bf16")
        kernel = plan.kernel("attend_selected")
        check_tile(kernel)
        assert "V" not in [p.name for p in kernel.params]
        config, least = kernel.config, 16 if target is MI300X else 64
        assert least <= config["BLOCK_H"] <= config["BLOCK_M"] <= 64
        grid = dryrun.run(plan, tokens=100).launch("attend_selected").grid
        assert grid == (101 * heads // config["BLOCK_H"], 1)


def check_tile(kernel):
    """Tiles are powers of two, and hold what they must."""
    config = dict(kernel.config.constexprs)
    assert all(value == next_power(value) for value in config.values()), kernel.name
    if kernel.skeleton == "rows" and "BLOCK_M" in config:  # else it has the tiles of another
        heads = config.get("BLOCK_H", kernel.context.pitch)
        assert config["BLOCK_M"] >= max(16, config.get("BLOCK_T", 1) * heads)
        assert config["BLOCK_N"] >= 16


def test_what_cannot_fit_is_refused_with_need_and_limit():
    tiny = replace(RTX4090, smem_per_block=8192)
    with pytest.raises(PlanError) as caught:
        schedule.schedule(emitted.graph(load("moba")), tiny)
    message = caught.value.message
    assert "kernel score_chunk cannot run on rtx 4090 (sm_89)" in message
    assert "bytes of shared memory a block, the limit is 8,192" in message


# Of each kind of kernel the one that fits worst: dtype, target, spec, kernel.
COVERING = (
    ("bf16", RTX4090, "nsa", "attend_compressed"),
    ("bf16", H100, "nsa", "score_block"),
    ("fp32", H100, "nsa", "pool_compressed_keys"),
    ("fp32", A100, "nsa", "attend_window"),
    ("bf16", H100, "nsa", "attend_window"),
    ("bf16", A100, "moba", "attend_selected"),
    ("fp32", RTX4090, "moba", "attend_selected"),
    ("fp16", B200, "moba", "score_chunk"),
    ("fp32", RTX4090, "hisa", "score_token"),
    ("bf16", A100, "hisa", "score_block"),
    ("bf16", H100, "sparse_mla", "attend_selected"),
    ("bf16", B200, "sparse_mla", "attend_selected"),
)
NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
SPILLS = 64 if NEW else 512  # bytes of stack a thread; the ptxas of older Triton spills more
MORE_SPILLS = {("fp32", RTX4090, "moba", "attend_selected"): 96}


@pytest.mark.slow
def test_default_configurations_fit_and_hardly_spill():
    """By the compiler's own word, on a covering set of specs, dtypes and targets."""
    jobs = []
    for dtype, target, name, kernel in COVERING:
        artifact = pipeline.compile_spec(systems.load(name), target, dtype)
        (job,) = [job for job in report.jobs(artifact) if job.signature.function == kernel]
        jobs.append(job)
    outcomes = resources.measure(jobs, timeout=240)
    for key, job, outcome in zip(COVERING, jobs, outcomes, strict=True):
        name = f"{job.signature.function} for {job.target.name}: {outcome}"
        assert isinstance(outcome, resources.Resources), name
        assert outcome.blocks_per_sm > 0, name
        assert outcome.cost.spill_bytes <= max(SPILLS, MORE_SPILLS.get(key, 0)), name


def test_the_interpreter_gets_the_same_text():
    plan = emitted.shipped_plan("nsa")
    ours, theirs = emitted.sources(plan), emitted.sources(configs.for_interpreter(plan))
    assert {f: t for f, t in ours.items() if f != "driver.py"} == {
        f: t for f, t in theirs.items() if f != "driver.py"
    }
