"""The space of tuning: knobs of a plan, rules, parts, orders, and points as text."""

import itertools
import math
from dataclasses import replace

import pytest

from hsgen import knobs, passes, paths, planner
from hsgen.errors import ArgumentError, PlanError
from hsgen.kernels import IndexContext
from hsgen.rows import RowsContext, next_power
from hsgen.schedule import SORT_LIMIT
from hsgen.space import Point, Space, space
from hsgen.spec import load
from hsgen.target import A100, B200, H100, RTX4090

SPECS = ("nsa", "moba", "hisa", "dsa", "dsa_gqa", "kinetics", "minimax_m3")


def space_of(name, target=H100, dtype="bf16") -> Space:
    spec = load(name)
    heads = None if spec.heads else (32, 4)
    dims = None if spec.head_dim else (128, 128)
    return space(passes.run(planner.plan(spec.bind(heads=heads, head_dim=dims))), target, dtype)


@pytest.fixture(scope="module")
def nsa():
    return space_of("nsa")


OF_A_WORD = "expected BLOCK_T of 16 to 32, the bits of a word, got 64"
OF_A_BLOCK = "expected BLOCK_N of at most 64, keys of a block, got 128"


def plan_of(name):
    return space_of(name).variants[0].plan


@pytest.mark.parametrize(
    ("name", "kernel", "given", "message"),
    [
        ("hirouter", "keep_token", {"BLOCK_T": 16}, ""),
        ("hirouter", "keep_token", {"BLOCK_T": 64}, OF_A_WORD),
        ("hirouter", "keep_token", {"BLOCK_K": 16}, "expected BLOCK_N of at most 16, got 64"),
        ("hirouter", "sift_token", {"BLOCK_N": 128}, ""),
        ("hirouter", "sift_token", {"BLOCK_N": 256}, "expected BLOCK_N of at most 128, got 256"),
        ("psa", "attend_pyramid", {"BLOCK_N": 32}, ""),
        ("psa", "attend_pyramid", {"BLOCK_N": 128}, OF_A_BLOCK),
        ("infllm_v2", "attend_selected", {"BLOCK_N": 128}, OF_A_BLOCK),
    ],
)  # fmt: skip
def test_a_caller_s_values_that_would_compute_something_else_are_refused(
    name, kernel, given, message
):
    plan = plan_of(name)
    made = plan.kernel(kernel)
    assert knobs.refused(made, given, made.config.keywords() | given, plan, H100) == message


def test_what_is_shipped_is_what_a_caller_may_say():
    for path in sorted(paths.data_dir("specs").glob("*.yaml")):
        try:
            plan = plan_of(path.stem)
        except PlanError:
            continue
        for kernel in plan.kernels:
            start = kernel.config.keywords()
            assert not knobs.refused(kernel, start, start, plan, H100), (path.stem, kernel.name)


def part_of(found: Space, name: str):
    return next(part for part in found.variants[0].parts if part.name == name)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("target", "dtype"), [(H100, "bf16"), (A100, "fp32"), (RTX4090, "fp16"), (B200, "bf16")]
)
def test_start_is_in_the_space(name, target, dtype):
    found = space_of(name, target, dtype)
    for variant in found.variants:
        assert not variant.problem(variant.start)


def test_every_shipped_spec_starts_in_its_space():
    """Ranges and rules know every kernel that there is."""
    planned = 0
    for path in sorted(paths.data_dir("specs").glob("*.yaml")):
        try:
            found = space_of(path.stem)
        except PlanError:
            continue
        planned += 1
        for variant in found.variants:
            assert not variant.problem(variant.start), path.stem
            moved = {name for part in variant.parts for name in part.kernels}
            assert moved == {kernel.name for kernel in variant.plan.kernels}, path.stem
    assert planned > 10


@pytest.mark.parametrize("name", SPECS)
def test_neighbours_are_in_the_space_and_differ(name):
    found = space_of(name)
    near = list(found.neighbours(found.start))
    assert len(near) > 10
    assert all(found.contains(point) and point != found.start for point in near)
    assert len({point.key for point in near}) == len(near)


def test_points_are_lazy_distinct_and_keep_the_rules(nsa):
    part = part_of(nsa, "attend_selected")
    points = list(part.points(nsa.start))
    assert nsa.start in points
    assert len({point.key for point in points}) == len(points) < part.size
    assert all(nsa.contains(point) for point in points[::29])
    few = itertools.islice(
        part_of(space_of("hisa"), "attend_selected").points(space_of("hisa").start), 3
    )
    assert len(list(few)) == 3  # of 37 million


def test_parts_follow_from_shared_tiles(nsa):
    parts = {part.name: part.kernels for part in nsa.variants[0].parts}
    assert parts["score_block"] == ("score_block", "rank_block")
    assert parts["attend_selected"] == ("attend_selected", "index_selected")
    assert parts["attend_window"] == ("attend_window",)


def test_rows_of_a_tile_are_derived(nsa):
    for point in nsa.neighbours(nsa.start):
        for kernel in nsa.variants[0].plan.kernels:
            if isinstance(kernel.context, RowsContext):
                config = point.config(kernel.name)
                assert config["BLOCK_M"] == max(
                    16, next_power(config["BLOCK_T"] * kernel.context.pitch)
                )


def test_maps_of_what_sums_up_an_entry_move_in_tiles_that_dots_take():
    found = part_of(space_of("seer_attention_r"), "pool_block_keys")
    ranges = {knob.name: [knob.value(code) for code in knob.codes] for knob in found.knobs}
    assert {min(ranges[name]) for name in ("BLOCK_E", "BLOCK_D")} == {16}
    assert max(ranges["BLOCK_J"]) == 64


def test_orders_are_an_outer_choice():
    found = space_of("moba")
    assert [variant.name for variant in found.variants] == ["own", "selected_rows"]
    other = found.variants[1]
    assert any(isinstance(kernel.context, IndexContext) for kernel in other.plan.kernels)
    assert found.contains(other.start)
    assert other.start.orders == (("selected", "rows"),)


def changed(point: Point, kernel: str, **values: int) -> Point:
    config = point.config(kernel)
    constexprs = tuple((n, values.get(n, v)) for n, v in config.constexprs)
    config = replace(
        config,
        constexprs=constexprs,
        num_warps=values.get("num_warps", config.num_warps),
        num_stages=values.get("num_stages", config.num_stages),
    )
    return replace(
        point, configs=tuple((n, config if n == kernel else c) for n, c in point.configs)
    )


@pytest.mark.parametrize(
    ("kernel", "values", "said"),
    [
        ("score_block", {"BLOCK_T": 4}, "BLOCK_M is not what the other values make it"),
        ("score_block", {"BLOCK_N": 48}, "expected one of BLOCK_N 16 32 64 128, got 48"),
        ("rank_block", {"BLOCK_R": 16}, "BLOCK_R 16 must divide BLOCK_T 8"),
        ("attend_selected", {"BLOCK_N": 128}, "expected one of BLOCK_N 16 32 64, got 128"),
        ("attend_window", {"num_warps": 1}, "accumulators a thread, at most 192"),
        ("attend_window", {"num_stages": 0}, ""),
    ],
)
def test_rules_say_what_they_break(nsa, kernel, values, said):
    assert said in nsa.problem(changed(nsa.start, kernel, **values))


def test_lists_that_no_program_sorts_are_refused():
    found = space_of("kinetics")
    part = part_of(found, "attend_selected")
    index = part.plan.kernel("index_selected").context
    for point in part.points(found.start):
        pairs = point.config("attend_selected")["BLOCK_T"] * next_power(index.width)
        assert pairs <= max(SORT_LIMIT, next_power(index.width))


@pytest.mark.parametrize("name", ["seer_attention", "dhsa"])
def test_no_warp_of_hopper_has_fewer_rows_than_a_dot_of_float32_gives_it(name):
    """Eight warps beside 64 rows read past the last chunk of heads of 80: a fault of Triton 3.6."""
    found = space_of(name)
    (scorer,) = (n for n, _ in found.start.configs if n.startswith("score_"))
    assert found.start.config(scorer)["BLOCK_M"] == 64
    assert not found.problem(found.start)
    eight = changed(found.start, scorer, num_warps=8)
    assert (
        found.problem(eight)
        == f"{scorer}: 8 warps, at most 4 for 64 rows whose dots are of float32"
    )


def test_accumulators_have_their_own_memory_on_blackwell():
    one = {"num_warps": 1}
    assert space_of("nsa").problem(changed(space_of("nsa").start, "attend_window", **one))
    found = space_of("nsa", B200)
    assert "accumulators" not in found.problem(changed(found.start, "attend_window", **one))


def test_a_point_is_text_and_a_record(nsa):
    for point in itertools.islice(nsa.neighbours(nsa.start), 5):
        assert nsa.parse(point.changes(nsa.start)) == point
        assert nsa.point(**point.record()) == point
    moba = space_of("moba")
    other = moba.variants[1].start
    assert moba.parse(other.changes(other)) == other
    assert nsa.start.changes(nsa.start) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank_block.BLOCK_Q=8", "no value is called rank_block.BLOCK_Q"),
        ("rank_block.BLOCK_R=three", "expected a number"),
        ("order.window=keys", "no variant of nsa has the orders"),
        ("rank_block.BLOCK_R=4096", "expected one of BLOCK_R 1 2 4"),
    ],
)
def test_wrong_points_are_refused(nsa, text, said):
    with pytest.raises(ArgumentError, match=said):
        nsa.parse(text)


def test_a_record_of_other_kernels_is_refused(nsa):
    record = nsa.start.record()
    del record["configs"]["attend_window"]
    with pytest.raises(ArgumentError, match="expected the kernels"):
        nsa.point(**record)


def test_only_some_kernels_may_move(nsa):
    small = nsa.only(["rank_block"])
    assert [part.name for part in small.variants[0].parts] == ["score_block"]
    assert small.digest != nsa.digest
    with pytest.raises(ArgumentError, match="rank_blocks"):
        nsa.only(["rank_blocks"])


def test_a_space_prints(nsa):
    text = str(nsa)
    assert text.startswith("space of nsa on h100 (sm_90), bf16: ")
    assert "  rank_block: BLOCK_R 1 2 4 8 16 32; BLOCK_N 64 128" in text
    assert "(follows score_block)" in text
    assert math.prod(part.size for part in nsa.variants[0].parts) == nsa.variants[0].size


def test_what_has_no_plan_has_no_space():
    with pytest.raises(PlanError):
        space_of("spt")
