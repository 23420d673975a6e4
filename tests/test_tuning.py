"""The measuring process, in Triton's interpreter: right before timed, failures by class."""

import dataclasses
import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from hsgen import checking, gradients, passes, planner, trials, tuning
from hsgen.lanes import Lanes, Patience
from hsgen.measurer import result_of
from hsgen.reference import reference, tensor_shapes
from hsgen.selection import ListSelection
from hsgen.space import space
from hsgen.spec import HeadDim, Heads, dump, load, verify
from hsgen.target import H100, Target
from hsgen.tuning import Child, failure_of


@pytest.fixture(scope="module")
def spec():
    return trials.shrink(load("sqa"))


@pytest.fixture(scope="module")
def small(spec):
    return space(passes.run(planner.plan(spec)), H100, "fp32")


def steady(call, device, count):
    """A clock that calls once, and says 100 us."""
    call(0)
    return [100.0] * count


def request(spec, point, do="measure", **more):
    problem = {
        "spec": dump(spec),
        "dtype": "fp32",
        "target": json.dumps(dataclasses.asdict(H100)),
        "shapes": ["24", "5/24"],
    }
    return {"do": do, "limit": {}, "problem": problem, **point.record(), **more}


@pytest.fixture(scope="module")
def child():
    return Child(steady)


@pytest.mark.usefixtures("sanitized")
def test_a_point_is_verified_and_timed(child, spec, small):
    for point in (small.start, next(small.neighbours(small.start))):
        result = result_of(child.answer(request(spec, point)))
        assert result.failure is None
        assert result.times["24"].median_us == result.times["5/24"].median_us == 100.0
        assert result.check["trials"] == 2


def test_wrong_kernels_are_not_timed(child, spec, small, monkeypatch):
    """A driver whose outputs are off, not finite, or of other rows."""
    bench = child._of(request(spec, small.start))
    program = bench._program({})
    forward = program.driver.forward

    def spoiled(how):
        def call(*arguments):
            o, lse, chosen = forward(*arguments)
            return how(o), lse, chosen

        return call

    for how, kind in (
        (lambda o: o * 1.01, "WRONG_NUMERIC"),
        (lambda o: o.masked_fill(o == o.flatten()[-1], float("nan")), "NAN"),
    ):
        monkeypatch.setattr(program.driver, "forward", spoiled(how))
        result = result_of(child.answer(request(spec, small.start)))
        assert result.failure is not None
        assert result.failure.kind == kind
        assert not result.times


@pytest.mark.usefixtures("sanitized")
def test_a_slow_point_is_given_up_early(spec, small):
    counts = []

    def slow(call, device, count):
        counts.append(count)
        return [900.0] * count

    child = Child(slow)
    limit = {"24": 200.0, "5/24": 800.0}
    asked = request(spec, small.start) | {"limit": limit}
    only = {**asked, "problem": {**asked["problem"], "shapes": ["24"]}}
    assert result_of(child.answer(only)).times["24"].runs == tuning.FEW
    result = result_of(child.answer(asked | {"limit": {"24": 400.0, "5/24": 800.0}}))
    assert result.times["5/24"].runs == tuning.MOST
    assert max(counts) <= tuning.MOST


@pytest.mark.usefixtures("sanitized")
def test_a_point_that_is_slow_in_short_calls_is_not_asked_of_long_ones(spec, small):
    """One whose call of 128K would take half a minute shows that at 8K."""
    asked = []

    def slow(call, device, count):
        asked.append(count)
        return [900.0] * count

    limit = {"24": 2000.0, "5/24": 200.0}
    result = result_of(Child(slow).answer(request(spec, small.start) | {"limit": limit}))
    assert result.failure is not None
    assert result.failure.kind == "TOO_SLOW"
    assert "5/24: 900 us, the best has 200" in result.failure.message
    assert asked == [1, tuning.FEW]


@pytest.mark.usefixtures("sanitized")
def test_of_calls_that_take_long_few_are_timed(spec, small):
    """A call of 80 ms is not made for seconds: the first samples are its time."""
    counts = []

    def slow(call, device, count):
        counts.append(count)
        return [80_000.0] * count

    result = result_of(Child(slow).answer(request(spec, small.start)))
    assert result.times["24"].runs == tuning.FEWEST
    assert counts == [1, tuning.FEW] * 2


@pytest.mark.usefixtures("sanitized")
def test_rows_are_proven_at_full_length(child, spec, small):
    result = result_of(child.answer(request(spec, small.start, "prove", shape="24")))
    assert result.failure is None
    assert 0 < result.check["error_at_length"] < 1e-4


@pytest.mark.usefixtures("sanitized")
def test_rows_that_choose_together_far_apart_are_held_against_the_start(monkeypatch):
    """No run of rows has all of a tile of a video, so that the reference of one says nothing."""
    heads, dims, axes = Heads(query=1, kv=1), HeadDim(qk=16, v=16), (2, 3, 4)
    changes = {"heads": heads, "head_dim": dims, "axes": axes}
    video = verify(load("vsa").model_copy(update=changes))
    found, fresh = space(passes.run(planner.plan(video)), H100, "fp32"), Child()
    asked = request(video, next(found.neighbours(found.start)), "prove", shape="24")
    result = result_of(fresh.answer(asked))
    assert result.failure is None
    assert 0 <= result.check["error_at_length"] < 1e-6
    program = fresh._of(asked)._program({})
    forward = program.driver.forward

    def spoiled(tensors, where, configs, given):
        o, lse, chosen = forward(tensors, where, configs, given)
        return (o if configs is program.config else o * 1.02), lse, chosen

    monkeypatch.setattr(program.driver, "forward", spoiled)
    failure = result_of(fresh.answer(asked)).failure
    assert failure is not None
    assert failure.kind == "WRONG_NUMERIC"
    assert "of 24" in failure.message


@pytest.mark.parametrize(
    ("name", "tell"),
    [("moba", True), ("seer_attention", True), ("vsa", False), ("pbs_attn", False)],
)
def test_what_a_run_of_rows_tells(name, tell):
    assert checking.runs_tell(load(name)) is tell


@pytest.mark.usefixtures("sanitized")
def test_a_reference_that_does_not_fit_beside_kernels_is_asked_head_by_head(
    spec, small, monkeypatch
):
    asked, heads = [], spec.heads.kv

    def full_at_first(*arguments, **keywords):
        asked.append(arguments[0].heads.kv)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reference(*arguments, **keywords)

    monkeypatch.setattr(checking, "reference", full_at_first)
    result = result_of(Child().answer(request(spec, small.start, "prove", shape="24")))
    assert result.failure is None
    assert 0 < result.check["error_at_length"] < 1e-4
    # two runs, each on the choice and on its own; the first one of all heads, then of each
    assert asked == [heads] + [1] * heads + [heads] * 3


@pytest.mark.parametrize("name", ["moba", "nsa", "psa_mass", "seer_attention", "dsa_gqa", "hip"])
def test_a_reference_in_parts_says_what_it_says_whole(name, monkeypatch):
    """Also of hip, whose heads choose together: that is asked whole, elsewhere."""
    spec = trials.shrink(load(name))
    torch.manual_seed(3)
    tensors = {name: torch.randn(shape) for name, shape in tensor_shapes(spec, 1, 100, 100).items()}
    whole = checking.Reference(spec, tensors)
    runs = checking.sampled(spec, 100)
    given = {
        level: ListSelection(level=level, indices=chosen)
        for level, chosen in whole(*runs[0]).chosen.items()
    }
    asked = []

    def full_at_first(*arguments, **keywords):
        asked.append(arguments[0].heads.kv)
        if asked[-1] == spec.heads.kv and asked.count(spec.heads.kv) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reference(*arguments, **keywords)

    monkeypatch.setattr(checking, "reference", full_at_first)
    for a, b, choice in ((*runs[0], given), (*runs[1], None)):
        expected = whole(a, b, choice)
        asked.clear()
        found = checking.Reference(spec, tensors)(a, b, choice)
        assert asked[1:] == ([spec.heads.kv] if name == "hip" else [1] * spec.heads.kv)
        torch.testing.assert_close(found.o, expected.o)
        assert found.chosen.keys() == expected.chosen.keys()
        for level, chosen in found.chosen.items():
            assert torch.equal(chosen, expected.chosen[level]), level


@pytest.mark.usefixtures("sanitized")
def test_the_reference_is_asked_once_of_points_that_choose_alike(spec, small, monkeypatch):
    asked = []

    def counting(*arguments, **keywords):
        asked.append(keywords["q_offset"])
        return reference(*arguments, **keywords)

    monkeypatch.setattr(checking, "reference", counting)
    fresh = Child()
    first = fresh.answer(request(spec, small.start, "prove", shape="24"))
    once = len(asked)
    assert fresh.answer(request(spec, small.start, "prove", shape="24")) == first
    assert once > 0
    assert len(asked) == once


@pytest.mark.usefixtures("sanitized")
def test_points_are_compared_in_turn(spec, small):
    calls = []

    def noting(call, device, count):
        calls.append(call)
        return [float(len(calls))] * count

    points = [p.record() for p in (small.start, next(small.neighbours(small.start)))]
    more = {"points": points, "shape": "24", "rounds": 6, "seed": 3}
    answer = Child(noting).answer(request(spec, small.start, "compare") | more)
    assert [len(each) for each in answer["samples"]] == [6, 6]
    rounds = list(zip(*answer["samples"], strict=True))
    assert all(abs(a - b) == 1.0 for a, b in rounds)
    assert len({a < b for a, b in rounds}) == 2  # not always in the same order


@pytest.fixture(scope="module")
def differentiable():
    """A spec whose gates weigh branches, which then keep their outputs."""
    return trials.shrink(load("nsa"))


@pytest.fixture(scope="module")
def of_gradients(differentiable):
    return space(passes.run(planner.plan(differentiable)), H100, "fp32", "gradients")


def asked(spec, point, do="measure", **more):
    made = request(spec, point, do, **more)
    return {**made, "problem": {**made["problem"], "work": "gradients", "shapes": ["24"]}}


def test_gradients_have_a_space_of_their_own(of_gradients, differentiable):
    kernels = {name for part in of_gradients.variants[0].parts for name in part.kernels}
    assert {"dq_selected", "dkv_selected", "unmap_compressed_keys"} <= kernels
    calls = space(passes.run(planner.plan(differentiable)), H100, "fp32")
    assert of_gradients.digest != calls.digest
    assert str(of_gradients).startswith("space of nsa's gradients")


@pytest.mark.usefixtures("sanitized")
def test_gradients_are_verified_timed_and_proven(child, differentiable, of_gradients):
    start = of_gradients.start
    moved = next(
        point
        for point in of_gradients.neighbours(start)
        if "dkv_window.BLOCK" in point.changes(start)
    )
    for point in (start, moved):
        result = result_of(child.answer(asked(differentiable, point)))
        assert result.failure is None, result.failure
        assert result.times["24"].median_us == 100.0
        assert result.check == {"trials": 2, "gradients": True}
        proven = result_of(child.answer(asked(differentiable, point, "prove", shape="24")))
        assert proven.failure is None
        assert proven.check["error_at_length"] < 1e-4
    assert proven.check["error_at_length"] > 0


def test_wrong_gradients_are_not_timed(child, differentiable, of_gradients, monkeypatch):
    """A driver whose gradients are off, or not finite, or of which one is forgotten."""
    bench = child._of(asked(differentiable, of_gradients.start))
    driver = bench._programs_of_gradients.backward.driver
    backward = driver.backward
    for name, how, kind in (
        ("v", lambda x: x * 1.001, "WRONG_NUMERIC"),
        ("gates", lambda x: x.masked_fill(x == x.flatten()[-1], float("nan")), "NAN"),
        ("compressed_key_weight", torch.zeros_like, "WRONG_NUMERIC"),
    ):

        def spoiled(*arguments, name=name, how=how, **named):
            found = backward(*arguments, **named)
            return {**found, name: how(found[name])}

        monkeypatch.setattr(driver, "backward", spoiled)
        result = result_of(child.answer(asked(differentiable, of_gradients.start)))
        assert result.failure is not None, name
        assert result.failure.kind == kind
        assert f"gradient of {name}" in result.failure.message
        assert not result.times


def test_one_wrong_row_of_many_is_seen_at_length():
    start = {"q": torch.randn(1, 32768, 2, 4), "w": torch.randn(8, 8)}
    rounded = {name: x + x.abs() * 2.0**-9 for name, x in start.items()}
    assert all(apart < gradients.AT_LENGTH for _, apart in gradients.differences(rounded, start))
    wrong = {**rounded, "q": rounded["q"].clone()}
    wrong["q"][0, 777] = -wrong["q"][0, 777]
    found = dict(gradients.differences(wrong, start))
    assert found["q"] > gradients.AT_LENGTH > found["w"]
    nothing = dict.fromkeys(start, torch.zeros(3))
    assert all(apart == 0 for _, apart in gradients.differences(nothing, nothing))


def test_what_is_asked_wrongly_is_said(child, spec, small):
    assert "unknown request" in child.answer(request(spec, small.start, "dance"))["error"]
    assert child.answer(request(spec, small.start, "shares")) == {"ms": {}}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "OVER_SMEM"),
        (OutOfResources(1025, 1024, "threads"), "OVER_LIMIT"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "ILLEGAL_ACCESS"),
        (RuntimeError("CUDA error: misaligned address"), "ILLEGAL_ACCESS"),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), "LAUNCH_ERROR"),
        (ValueError("anything else"), "LAUNCH_ERROR"),
    ],
)
def test_failures_have_classes(error, kind):
    assert failure_of(error).kind == kind


def test_the_process_answers(spec, small):
    """The real one, which loads torch and runs kernels in the interpreter."""
    problem = request(spec, small.start)["problem"] | {"shapes": ["24"]}
    with Lanes(problem, ["interpreter"], patience=Patience(first=120, later=120)) as lanes:
        assert lanes.describe()["made"]["card"] == "cpu"
        assert lanes.shares(small.start) == {}
        result = lanes.measure(small.start)
        assert result.failure is None
        assert result.times["24"].runs >= tuning.FEWEST


@pytest.mark.gpu
def test_the_start_is_right_and_timed_on_a_gpu(tmp_path, monkeypatch):
    """All of the process on a card: the start of nsa, and what is beside it."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    nsa = load("nsa")
    problem = {"spec": dump(nsa), "dtype": "bf16", "target": "", "shapes": ["8K", "1/8K"]}
    with Lanes(problem, ["0"]) as lanes:
        target = Target(**lanes.describe()["target"])
        found = space(passes.run(planner.plan(nsa)), target)
        result = lanes.measure(found.start)
        assert result.failure is None, result.failure
        assert result.times["8K"].median_us > 100
        assert lanes.prove(found.start, "8K").failure is None
        assert sum(lanes.shares(found.start).values()) == pytest.approx(1.0)
        points = [found.start, found.parse("attend_window.num_warps=4")]
        assert [len(each) for each in lanes.compare(points, "8K", 4)] == [4, 4]
