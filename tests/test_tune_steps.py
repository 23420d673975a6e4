"""Steps behind a cache, tuned: their space, who measures them, their records, and which a step gets."""

import dataclasses
import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuned_records import record

from hsgen import passes, paths, pipeline, planner, resources, runtime, tuned
from hsgen.cli import main
from hsgen.configs import Sizes, for_steps
from hsgen.errors import ArgumentError, PlanError
from hsgen.lanes import Lanes
from hsgen.measurer import result_of, shape_of
from hsgen.plan import Cached
from hsgen.reference import reference, tensor_shapes
from hsgen.space import space
from hsgen.spec import dump, load, parse
from hsgen.target import H100, Target
from hsgen.tune import Options, attempt, tune_each
from hsgen.tune.search import Limits
from hsgen.tuned import files, ladder
from hsgen.tuning import Child

CHILD = str(Path(__file__).with_name("tuning_child.py"))
SMALL = parse("""
hsgen: 1
name: small_steps
heads: {query: 2, kv: 1}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend:
  - {name: selected, over: block}
""")
LAYOUTS = [pytest.param(0, id="contiguous"), pytest.param(8, id="pages")]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache, and a committed folder with nothing but the GPUs."""
    committed = tmp_path / "tuned"
    committed.mkdir()
    shutil.copy(paths.data_dir("tuned") / "gpus.yaml", committed)
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    for module in (files, tuned):
        monkeypatch.setattr(module, "committed", lambda: committed)
    monkeypatch.setattr(ladder, "_told", set())
    return committed


def space_of(spec, sizes, dtype="bf16"):
    graph = passes.run(planner.plan(planner.without_losses(spec)))
    return space(graph, H100, dtype, "decode", sizes)


# --- the space


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize(
    "name",
    [*("nsa", "moba", "quest", "seer_attention_r", "hisa", "minimax_m3", "infllm_v2", "dsa_gqa")],
)
def test_a_step_starts_in_its_space(name, page):
    """With what its launches take from the configuration, and nothing that follows from its rows."""
    spec, sizes = load(name), Sizes(tokens=2, keys=8192, sequences=4, page=page)
    found = space_of(spec, sizes)
    (variant,) = found.variants
    assert found.contains(found.start)
    fixed = {"BLOCK_T", "BLOCK_M", "BLOCK_V", "BLOCK_R", "BLOCK_H"}
    for part in variant.parts:
        assert not any(k.name in fixed or k.name.startswith("BLOCK_P") for k in part.knobs)
    moved = [p.changes(found.start) for p in found.neighbours(found.start)]
    for kernel in ("store", "attend_", "rank_", "merge_"):
        assert any(word.startswith(kernel) for word in moved), kernel
    others = (space_of(spec, replace(sizes, **x)) for x in ({"keys": 65536}, {"page": 32}))
    assert len({found.digest, *(other.digest for other in others)}) == 3


def test_what_follows_from_rows_is_no_choice():
    found = space_of(SMALL, Sizes(tokens=2, keys=64, sequences=1))
    configs = found.start.keywords()
    for kernel, name in (("attend_selected", "BLOCK_T"), ("store", "BLOCK_V")):
        wrong = {**configs, kernel: configs[kernel] | {name: 1}}
        with pytest.raises(
            ArgumentError, match=f"{kernel}: expected {name}=2 in such a step, got 1"
        ):
            found.point({}, wrong)


def test_parts_are_compiled_for_as_many_as_a_launch_has():
    """What is pruned is what a step launches: constants of its sizes, not of a configuration."""
    sizes = Sizes(tokens=1, keys=65536, sequences=64)
    made = pipeline.compile_work(load("moba"), H100, "bf16", "decode", sizes=sizes)
    jobs = {job.signature.function: job for job in pipeline.call_jobs(made, sizes)}
    assert jobs["merge_attend_selected"].constants["BLOCK_P"] == 1
    one = replace(sizes, sequences=1)
    jobs = {job.signature.function: job for job in pipeline.call_jobs(made, one)}
    assert jobs["merge_attend_selected"].constants["BLOCK_P"] == 8


# --- who measures


def steady(call, device, count):
    """A clock that calls once, and says 100 us."""
    call(0)
    return [100.0] * count


def asked(point, page=0, do="measure", shape="2*1/24"):
    problem = {
        "spec": dump(SMALL),
        "dtype": "fp32",
        "target": json.dumps(dataclasses.asdict(H100)),
        "shapes": [shape],
        "work": "decode",
        "page": page,
    }
    return {"do": do, "limit": {}, "problem": problem, "shape": shape, **point.record()}


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("page", LAYOUTS)
def test_a_step_is_verified_timed_and_proven(page):
    child, shape = Child(steady), "2*1/24"
    found = space_of(SMALL, shape_of(shape).step_bucket.sizes(page), "fp32")
    moved = found.parse("score_block.BLOCK_N=16,rank_block.num_warps=4")
    for point in (found.start, moved):
        result = result_of(child.answer(asked(point, page)))
        assert result.failure is None, result.failure
        # of the caches of a size there is one, and of a replay one step
        assert result.times[shape].median_us == 100.0
        assert result.check == {"trials": 2, "steps": True}
        proven = result_of(child.answer(asked(point, page, "prove", shape=shape)))
        assert proven.failure is None, proven.failure
        assert proven.check["error_at_length"] < 1e-5
    lengths = child._of(asked(moved, page))._of_size.caches[0].lengths
    assert lengths.tolist() == [24] * 2  # room for so many was there


def test_wrong_steps_are_not_timed(monkeypatch):
    """Outputs that are off, tokens that are put elsewhere, entries that are not pooled."""
    found = space_of(SMALL, shape_of("2*1/24").step_bucket.sizes(), "fp32")
    child = Child(steady)
    bench = child._of(asked(found.start))
    driver = bench._programs_of_steps.few.driver
    forward, append = driver.forward, driver.append

    def off(*arguments, **named):
        o, lse, chosen = forward(*arguments, **named)
        return o * 1.01, lse, chosen

    def misplaced(tensors, kept, lengths, *others):
        append({**tensors, "v": tensors["v"].flip(0)}, kept, lengths, *others)

    def forgotten(tensors, kept, lengths, *others):
        append(tensors, kept, lengths, *others)
        kept["block.keys"].zero_()

    for name, how in (("forward", off), ("append", misplaced), ("append", forgotten)):
        with monkeypatch.context() as patch:
            patch.setattr(driver, name, how)
            result = result_of(child.answer(asked(found.start)))
        assert result.failure is not None, how.__name__
        assert result.failure.kind == "WRONG_NUMERIC"
        assert "steps where blocks end" in result.failure.message
    assert result_of(child.answer(asked(found.start))).failure is None


def test_a_step_unlike_the_start_s_is_seen_at_length(monkeypatch):
    shape = "2*1/24"
    found = space_of(SMALL, shape_of(shape).step_bucket.sizes(), "fp32")
    child = Child(steady)
    moved = found.parse("attend_selected.num_warps=2")
    bench = child._of(asked(found.start))
    driver = bench._programs_of_steps.few.driver
    forward = driver.forward

    def spoiled(how):
        def call(tensors, where, configs, *others, **named):
            o, lse, chosen = forward(tensors, where, configs, *others, **named)
            return (o, lse, chosen) if configs == bench._start else how(o, lse, chosen)

        return call

    def worse(o, lse, chosen):
        return o * 1.02, lse, chosen

    def other(o, lse, chosen):
        return o, lse, {"block": chosen["block"].flip(-1).clamp(max=1)}

    for how, words in ((worse, "of 2.1/24"), (other, "of what the start chooses")):
        monkeypatch.setattr(driver, "forward", spoiled(how))
        failure = result_of(child.answer(asked(moved, do="prove", shape=shape))).failure
        assert failure is not None
        assert failure.kind == "WRONG_NUMERIC"
        assert re.search(words, failure.message)


# --- the whole


def options(**more):
    return Options(
        work="decode",
        shapes=(shape_of("64*1/8K"), shape_of("1/64K")),
        limits=Limits(trials=12),
        gpus=("interpreter",),
        only=("attend_selected",),
        command=("hsgen", "tune", "moba", "--shapes", "64*1/8K,1/64K", "--work", "decode"),
        child=(CHILD, json.dumps({"bad": {"attend_selected.num_warps=8": "wrong"}})),
        rounds=5,
        **more,
    )


def test_each_size_has_a_search_and_a_record():
    """From searches to what steps of these sizes get; the same command goes on where it was."""
    reports = list(tune_each(load("moba"), options()))
    assert [each.shape for report in reports for each in report.finals] == ["64*1/8K", "1/64K"]
    assert len({report.study for report in reports}) == 2
    assert all(0 < report.measured <= 6 for report in reports)
    environment = tuned.environment(H100, interpreted=True)
    for report, shape in zip(reports, options().shapes, strict=True):
        (kept,) = report.records
        assert kept.problem == tuned.Problem.of(load("moba"), "bf16", "decode")
        assert kept.bucket == shape.step_bucket
        words = f"hsgen tune moba --shapes '?{re.escape(shape.name)}'? --work decode"
        assert re.fullmatch(words, kept.provenance.command)
        assert any(f"{shape.name}" in line and "--try" in line for line in report.failed)
        candidates = tuned.ranked(kept.problem, shape.step_bucket, environment)
        assert candidates[0].rung == "exact"
        assert candidates[0].kept.record == kept
    again = list(tune_each(load("moba"), options()))
    assert all(x.measured <= y.measured <= 6 for x, y in zip(reports, again, strict=True))
    assert not any(report.records for report in again)  # what is used is the best still


def test_one_point_is_of_one_size():
    alone = replace(options(), shapes=(shape_of("64*1/8K"),))
    result = attempt(load("moba"), alone, "attend_selected.BLOCK_N=32")
    assert result.times["64*1/8K"].median_us > 0
    with pytest.raises(ArgumentError, match="expected one beside a point, got 2"):
        attempt(load("moba"), options(), "attend_selected.BLOCK_N=32")


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("vsa", {}, PlanError, "vsa: no cache, as causality is none"),
        ("nosa", {}, PlanError, "level importance: no kernel chooses by a learned bias in a cache"),
        ("moba", {"shapes": (shape_of("9/8K"),)}, ArgumentError, "at most 8 new tokens, got 9"),
        (
            "moba",
            {"work": "forward", "page": 16},
            ArgumentError,
            "expected none of forward, got 16",
        ),
    ],
)
def test_what_has_no_steps_is_refused(name, changes, error, words):
    with pytest.raises(error, match=words):
        next(tune_each(load(name), replace(options(), **changes)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "4"], "--batch is of --work decode, got forward"),
        (["--page", "16", "--work", "gradients"], "--page is of --work decode, got gradients"),
        (["--page", "24", "--work", "decode"], "expected a power of two up to 1024, got 24"),
        (["--batch", "0", "--work", "decode"], "expected at least 1 sequence"),
        (["--batch", "4", "--work", "decode", "--shapes", "2*8K"], r"expected none beside 2\*8K"),
    ],
)
def test_wrong_usage_is_said(capsys, words, message):
    assert main(["tune", "moba", *words, "--dry-run"]) == 2
    said = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert re.search(message, said), said


# --- records


def start_of(spec, sizes, interpret=True):
    """A program of steps in the interpreter, and its plan at some sizes."""
    cached = Cached(rows="few", page=sizes.page)
    program = runtime.compile_program(spec, H100, torch.float32, interpret=interpret, cached=cached)
    return program, for_steps(program.plan, sizes)


def step_record(spec, sizes, **changes):
    """A record of steps in the interpreter, changed by kernel."""
    program, plan = start_of(spec, sizes)
    kernels = {
        kernel.name: tuned.KernelChoice(
            text=program.texts[kernel.name],
            config=kernel.config.keywords() | changes.get(kernel.name, {}),
            shared=0,
            registers=0,
        )
        for kernel in plan.kernels
    }
    return record(
        problem=tuned.Problem.of(spec, "fp32", "decode", sizes.page),
        environment=tuned.environment(H100, interpreted=True),
        bucket=tuned.Bucket.of_steps(sizes),
        kernels=kernels,
        alternates=(),
    )


def test_lines_say_steps_and_their_pages():
    sizes = Sizes(tokens=1, keys=32, sequences=2)
    plain, paged = (step_record(SMALL, replace(sizes, page=page)) for page in (0, 8))
    assert (
        len({plain.key, paged.key, replace(plain, bucket=tuned.Bucket.of(4, 32, 2, False)).key})
        == 3
    )
    for each, page in ((plain, 0), (paged, 8)):
        line = tuned.dump(each)
        assert tuned.read(line) == each
        assert '"work": "decode"' in line
        assert ('"page": 8' in line) == bool(page)
    assert str(paged.problem).endswith("decode, pages of 8")
    with pytest.raises(tuned.RecordError, match="problem.page: expected a power of two, got 24"):
        tuned.read(tuned.dump(paged).replace('"page": 8', '"page": 24'))


@pytest.mark.parametrize("tokens", range(1, 9))
def test_a_bucket_of_steps_says_their_sizes(tokens):
    for sequences in (1, 3, 5, 64):
        sizes = Sizes(tokens=tokens, keys=5000, sequences=sequences)
        rounded = tuned.Bucket.of_steps(sizes).sizes(16)
        assert rounded.tokens in range(tokens, 2 * tokens)
        assert rounded == Sizes(
            tokens=rounded.tokens, keys=8192, sequences=rounded.sequences, page=16
        )
        assert tuned.Bucket.of_steps(rounded) == tuned.Bucket.of_steps(sizes)


def named(name):
    return SMALL.model_copy(update={"name": name})


def stepping(spec, kernel, capacity=32, batch=2, tokens=1, page=None):
    """What a step behind 9 tokens says, held against the reference."""
    x = {name: torch.randn(shape) for name, shape in tensor_shapes(spec, batch, 16, 16).items()}
    cache = kernel.new_cache(batch, capacity, page=page)
    cache.append(x["k"][:, :9], x["v"][:, :9])
    new = {name: y[:, 9 : 9 + tokens] for name, y in x.items()}
    o = kernel.decode(new["q"], new["k"], new["v"], cache)
    whole = {name: y[:, : 9 + tokens] for name, y in x.items()}
    expected = reference(spec, whole, dtype=torch.float64).o[:, 9:]
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
    (ready,) = [
        r
        for k, r in kernel._decoding.ready.items()
        if k[2:] == (page or 0, "few", tokens, capacity, batch)
    ]
    return ready


@pytest.mark.parametrize("page", LAYOUTS)
def test_a_record_changes_what_a_step_runs(page):
    """Of its own size, and as far as they start alike of the nearest; calls have nothing of it."""
    spec = named(f"small_stepped_{page}")
    sizes = Sizes(tokens=1, keys=32, sequences=2, page=page)
    tuned.publish(
        step_record(spec, sizes, attend_selected={"num_warps": 8}, rank_block={"num_warps": 2})
    )
    kernel = runtime.load_kernel(spec, interpret=True)
    ready = stepping(spec, kernel, page=page or None)
    assert ready.config["attend_selected"]["num_warps"] == 8
    assert ready.config["rank_block"]["num_warps"] == 2
    words = rf"step.attend_selected: .*num_warps=8.*\(tuned; cache small_stepped_{page}-\w+\.json\)"
    assert re.search(words, kernel.explain())
    near = stepping(spec, kernel, capacity=16, batch=1, tokens=2, page=page or None)
    _, plan = start_of(spec, Sizes(tokens=2, keys=16, sequences=1, page=page))
    assert near.config["attend_selected"] == plan.kernel("attend_selected").config.keywords() | {
        "num_warps": 8
    }
    assert "tuned, nearest bucket: 2 queries, 32 keys, 2 sequences" in kernel.explain()
    other = stepping(spec, kernel, page=None if page else 8)  # kernels of another text
    assert set(other.origin.values()) == {"for the interpreter"}
    x = {name: torch.randn(shape) for name, shape in tensor_shapes(spec, 1, 9, 9).items()}
    kernel(**x)
    (choice,) = kernel._execution.choices.values()
    assert set(choice.origin.values()) == {"for the interpreter"}


def test_what_starts_otherwise_at_a_size_starts_so():
    """Scores of a row that a program holds are as many as its cache has entries, whatever was tuned."""
    spec = named("small_longer")
    sizes = Sizes(tokens=1, keys=32, sequences=2)
    tuned.publish(step_record(spec, sizes, rank_block={"BLOCK_N": 128, "num_warps": 2}))
    kernel = runtime.load_kernel(spec, interpret=True)
    assert stepping(spec, kernel).config["rank_block"]["BLOCK_N"] == 128
    long = stepping(spec, kernel, capacity=1024)
    start = start_of(spec, Sizes(tokens=1, keys=1024, sequences=2))[1].kernel("rank_block").config
    assert start["BLOCK_N"] == 512
    assert long.config["rank_block"] == start.keywords() | {"num_warps": 2}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"BLOCK_T": 2}, "expected BLOCK_T=1"),
        ({"BLOCK_M": 64}, "expected BLOCK_M=16"),
        ({"BLOCK_N": 256}, "expected one of BLOCK_N"),
        ({"num_warps": 16}, "expected one of num_warps"),
    ],
)
def test_a_poisoned_record_is_passed_by(values, why):
    """Values with which a kernel would say something else: it starts, and explaining says why."""
    spec = named(f"small_poisoned_{next(iter(values)).lower()}")
    tuned.publish(
        step_record(
            spec,
            Sizes(tokens=1, keys=32, sequences=2),
            attend_selected=values,
            rank_block={"num_warps": 2},
        )
    )
    kernel = runtime.load_kernel(spec, interpret=True)
    ready = stepping(spec, kernel)
    _, plan = start_of(spec, Sizes(tokens=1, keys=32, sequences=2))
    assert ready.config["attend_selected"] == plan.kernel("attend_selected").config.keywords()
    assert why in ready.origin["attend_selected"]
    assert ready.config["rank_block"]["num_warps"] == 2  # others hold


def test_a_caller_s_configuration_comes_before_a_record():
    spec = named("small_given_steps")
    sizes = Sizes(tokens=1, keys=32, sequences=2)
    tuned.publish(step_record(spec, sizes, attend_selected={"num_warps": 8, "num_stages": 4}))
    given = {"step.attend_selected": {"num_warps": 2}}
    ready = stepping(spec, runtime.load_kernel(spec, interpret=True, config=given))
    assert ready.config["attend_selected"]["num_warps"] == 2
    assert ready.config["attend_selected"]["num_stages"] == 4
    assert ready.origin["attend_selected"] == "caller"
    assert ready.origin["store"].startswith("tuned; cache")


def test_an_untuned_step_may_be_an_error(monkeypatch):
    monkeypatch.setenv("HSGEN_REQUIRE_TUNED", "1")
    spec = named("small_required_steps")
    kernel = runtime.load_kernel(spec, interpret=True)
    with pytest.raises(tuned.UntunedError, match="this step is not tuned") as caught:
        stepping(spec, kernel)
    assert "--work decode --shapes 32 --batch 2" in str(caught.value)
    tuned.publish(step_record(spec, Sizes(tokens=1, keys=32, sequences=2)))
    stepping(spec, kernel)


# --- what is shipped


def shipped(**changes):
    """A record of steps of moba on an H100, as they start and compile, and another one of them."""
    spec, sizes = load("moba"), Sizes(tokens=1, keys=8192, sequences=64)
    kernels = dict(_compiled("moba", sizes))
    for name, values in changes.items():
        kernels[name] = replace(kernels[name], config={**kernels[name].config, **values})
    return record(
        problem=tuned.Problem.of(spec, "bf16", "decode"),
        environment=tuned.environment(H100),
        bucket=tuned.Bucket.of_steps(sizes),
        kernels=kernels,
        alternates=(),
    )


@functools.cache
def _compiled(name, sizes):
    made = pipeline.compile_work(load(name), H100, "bf16", "decode", sizes=sizes)
    outcomes = resources.measure(pipeline.call_jobs(made, sizes))
    found = {}
    for kernel, outcome in zip(made.plan.kernels, outcomes, strict=True):
        assert isinstance(outcome, resources.Resources), outcome
        found[kernel.name] = tuned.KernelChoice(
            text=made.module.texts[kernel.name],
            config=kernel.config.keywords(),
            shared=outcome.cost.shared_bytes,
            registers=outcome.cost.registers,
            spills=outcome.cost.spill_bytes,
        )
    return found


def test_steps_are_audited_listed_and_explained(folders, capsys):
    good = shipped()
    tuned.write(folders, [good])
    found = tuned.check(tuned.read_folder(folders))
    assert found.passed, str(found)
    assert [entry.status for entry in found.entries] == ["ok"]
    assert found.kernels == len(good.kernels)
    tuned.write(folders, [shipped(attend_selected={"BLOCK_T": 2, "BLOCK_M": 32})])
    found = tuned.check(tuned.read_folder(folders))
    assert [entry.status for entry in found.entries] == ["broken"]
    assert "attend_selected: expected BLOCK_T=1" in str(found)
    tuned.write(folders, [good])
    assert main(["tuned", "list", "moba"]) == 0
    assert "decode" in capsys.readouterr().out
    words = ["tuned", "explain", "moba", "--work", "decode", "--batch", "64", "--tokens", "8K,16K"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "it gets: exact" in said
    assert "it gets: nearest bucket" in said
    assert main([*words, "--page", "16"]) == 0
    assert "it gets: start" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nsa", "quest"])
def test_steps_are_right_and_timed_on_a_gpu(name):
    """All of the process on a card: the start, and what is beside it, as graphs that are replayed."""
    spec, shape = load(name), "4*1/8K"
    problem = {"spec": dump(spec), "dtype": "bf16", "target": "", "shapes": [shape]}
    with Lanes(problem | {"work": "decode", "page": 0}, ["0"]) as lanes:
        target = Target(**lanes.describe()["target"])
        graph = passes.run(planner.plan(planner.without_losses(spec)))
        found = space(graph, target, "bf16", "decode", shape_of(shape).step_bucket.sizes())
        assert sum(lanes.shares(found.start).values()) == pytest.approx(1.0)
        result = lanes.measure(found.start)
        assert result.failure is None, result.failure
        assert 3 < result.times[shape].median_us < 1000
        assert lanes.prove(found.start, shape).failure is None
        points = [found.start, found.parse("store.num_warps=2")]
        assert [len(each) for each in lanes.compare(points, shape, 4)] == [4, 4]
