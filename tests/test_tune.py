"""The search: regret on tables, journals that survive, processes that misbehave, the whole of `tune`."""

import contextlib
import functools
import json
import math
import shlex
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tuning_kills
import tuning_runs
from synthetic_tables import table
from test_space import space_of

from hsgen import lanes as lanes_module
from hsgen import passes, planner, tuned
from hsgen import tune as tuning
from hsgen.cli import main
from hsgen.errors import HsgenError, TuneError
from hsgen.lanes import Lanes, Patience
from hsgen.measurer import Failure, Replay, Result, shape_of
from hsgen.pruning import Compiler
from hsgen.resources import Compilers, Resources
from hsgen.space import space
from hsgen.spec import dump, load, parse
from hsgen.target import H100, with_streams
from hsgen.tune import Options, attempt, least_us, tune
from hsgen.tune.journal import Journal
from hsgen.tune.search import Limits, Search
from hsgen.tune.storages import mend, storage_at
from hsgen.tuned import Time
from hsgen.workers import Worker

CHILD = str(Path(tuning_runs.__file__).with_name("tuning_child.py"))


@functools.cache
def tabled(name, part, variant):
    """A space of one part, and a synthetic table of it."""
    found = space_of(name)
    found = replace(found, variants=(found.variants[variant],)).only([part])
    return found, table(found.variants[0], found.variants[0].parts[0])


def searched(found, measurer, *, place=None, seed=0, warm=(), **limits):
    journal = Journal(storage_at(place), "test", found)
    search = Search(
        space=found, measurer=measurer, journal=journal, seed=seed, limits=Limits(**limits)
    )
    search.run(warm)
    return search


# --- quality, on tables that a formula made


def test_small_parts_are_measured_whole():
    found, made = tabled("moba", "merge_selected", 0)
    replay = Replay(made)
    search = searched(found, replay, trials=100)
    assert replay.asked == len(made.entries) == search.measured
    assert search.best is not None
    assert made.entries[made.values(search.best)] == made.best


def test_nothing_is_measured_twice():
    found, made = tabled("nsa", "attend_selected", 0)
    seen = []

    class Counting(Replay):
        def measure(self, point, limit=None):
            seen.append(point.key)
            return super().measure(point, limit)

    searched(found, Counting(made), trials=60)
    assert len(seen) == len(set(seen))


def test_the_same_seed_finds_the_same():
    found, made = tabled("nsa", "attend_selected", 0)
    runs = [searched(found, Replay(made, seed=3), seed=3, trials=30) for _ in range(2)]
    assert list(runs[0].journal.results) == list(runs[1].journal.results)


def test_warm_points_come_first_if_they_are_in_the_space():
    found, made = tabled("nsa", "attend_selected", 0)
    part = found.variants[0].parts[0]
    best = next(p for p in part.points(found.start) if made.entries[made.values(p)] == made.best)
    other = space_of("nsa").only(["attend_window"]).variants[0].parts[0]
    outside = part.moved(found.start, [99] * len(part.knobs))
    search = searched(found, Replay(made), warm=[outside, best], trials=2)
    assert search.best == best
    assert len(search.journal.results) == 2
    assert other.name == "attend_window"


def test_orders_are_searched_where_they_may_win():
    found = space_of("moba")
    slow = {"own": 300.0, "selected_rows": 100.0}
    asked = {name: 0 for name in slow}

    class Flat:
        lanes, shapes = 1, ("8K",)

        def measure(self, point, limit=None):
            name = found.variant(point).name
            asked[name] += 1
            return Result(
                times={"8K": Time(median_us=slow[name] + asked[name], iqr_us=0.1, runs=9)}
            )

        def compare(self, points, shape, rounds):
            return []

    search = searched(found, Flat(), trials=30)
    assert search.best.orders == (("selected", "rows"),)
    assert asked["own"] == 1 < asked["selected_rows"]


def test_time_ends_a_search():
    found, made = tabled("nsa", "attend_selected", 0)
    now = [0.0]

    class Slow(Replay):
        def measure(self, point, limit=None):
            now[0] += 10.0
            return super().measure(point, limit)

    search = Search(
        space=found,
        measurer=Slow(made),
        journal=Journal(storage_at(None), "test", found),
        limits=Limits(seconds=200.0),
        clock=lambda: now[0],
    )
    told = []
    search.tell = told.append
    search.run()
    assert 200.0 <= now[0] <= 220.0
    assert "s left" in str(told[-1]) and "x the start" in str(told[-1])


def test_progress_says_trials_best_failures_and_what_is_left():
    found, made = tabled("moba", "merge_selected", 0)
    entries = {
        values: "NAN" if n % 3 == 1 else entry  # which kills no process
        for n, (values, entry) in enumerate(made.entries.items())
    }
    entries[made.values(found.start)] = made.entries[made.values(found.start)]
    told = []
    search = Search(
        space=found,
        measurer=Replay(replace(made, entries=entries)),
        journal=Journal(storage_at(None), "test", found),
        limits=Limits(trials=1000, seconds=1000.0),
        tell=told.append,
    )
    search.run()
    failures = Counter(entry for entry in entries.values() if isinstance(entry, str))
    assert failures["NAN"] > 5
    last = told[-1]
    assert (last.measured, last.failures) == (len(entries), dict(failures))
    assert last.trials_left == 1000 - len(entries)
    best = min(entry for entry in entries.values() if not isinstance(entry, str))
    assert f"{len(entries)} measured; best {best:.4g} us" in str(last)
    assert f"; NAN {failures['NAN']}" in str(last)
    assert str(last).endswith(f" s left; {1000 - len(entries)} trials left")


def test_nothing_that_can_run_is_an_error_with_the_limit():
    found, made = tabled("moba", "merge_selected", 0)
    bare = replace(made, entries=dict.fromkeys(made.entries, "LAUNCH_ERROR"))

    class Judge:
        def ahead(self, point):
            pass

        def failure(self, point):
            return Failure(
                kind="OVER_SMEM", message="too large", limit="merge_selected needs 300,000 bytes"
            )

    search = Search(
        space=found,
        measurer=Replay(bare),
        journal=Journal(storage_at(None), "t", found),
        judge=Judge(),
    )
    with pytest.raises(TuneError, match="nothing can run") as error:
        search.run()
    assert "OVER_SMEM 1: merge_selected needs 300,000 bytes" in str(error.value)


def test_no_lane_waits_for_a_slow_compiler():
    """Points are judged while others are measured, and those that are judged come first."""
    found, made = tabled("nsa", "attend_selected", 0)
    begun, asked = [], []

    class Slow:
        early = 4

        def ahead(self, point):
            begun.append(point.key)

        def ready(self, point):
            return begun.index(point.key) % 5 or len(begun) > 40

        def failure(self, point):
            if point.key in begun:
                asked.append((begun.index(point.key), len(begun)))

    search = Search(
        space=found,
        measurer=Replay(made),
        journal=Journal(storage_at(None), "t", found),
        judge=Slow(),
        limits=Limits(trials=30),
    )
    search.run()
    sampled = [pair for pair in asked if pair[0]][:12]
    assert all(behind - place >= 1 for place, behind in sampled)
    assert max(behind - place for place, behind in sampled) >= Slow.early
    assert not any(place % 5 == 0 for place, _ in sampled), "a slow one was waited for"


def test_a_part_that_is_measured_whole_waits_for_none_either():
    found, made = tabled("moba", "merge_selected", 0)
    order, slow = [], []

    class Slow:
        early = 4

        def ahead(self, point):
            if point.key != found.start.key and not slow:
                slow.append(point.key)

        def ready(self, point):
            return point.key not in slow or len(order) > 20

        def failure(self, point):
            order.append(point.key)

    Search(
        space=found,
        measurer=Replay(made),
        journal=Journal(storage_at(None), "t", found),
        judge=Slow(),
    ).run()
    assert len(order) == len(made.entries)
    assert order.index(slow[0]) > 20


# --- journals


def test_a_search_goes_on_where_it_was(tmp_path):
    found, made = tabled("nsa", "attend_selected", 0)
    first = searched(found, Replay(made), place=tmp_path / "a.journal", trials=25)
    replay = Replay(made)
    second = searched(found, replay, place=tmp_path / "a.journal", trials=40)
    assert replay.asked == second.measured - first.measured > 0
    assert first.journal.results.items() <= second.journal.results.items()


def test_a_torn_line_is_cut_off(tmp_path):
    file = tmp_path / "a.journal"
    found, made = tabled("moba", "merge_selected", 0)
    before = searched(found, Replay(made), place=file, trials=12).journal.results
    whole = file.read_bytes()
    for cut in (1, 7, 40):
        file.write_bytes(whole + whole[-90:-cut])
        mend(file)
        assert file.read_bytes() == whole
    file.write_bytes(whole + b'{"op_code": 5, "wor')
    assert Journal(storage_at(file), "test", found).results == before
    assert (
        searched(found, Replay(made), place=file, trials=14).journal.results.items()
        >= before.items()
    )
    file.write_bytes(b'{"op')
    mend(file)
    assert file.read_bytes() == b""


def test_an_unusable_storage_is_said(tmp_path):
    (tmp_path / "a.journal").mkdir()
    with pytest.raises(HsgenError, match="cannot open the studies"):
        storage_at(tmp_path / "a.journal")


# --- processes that misbehave

BAD = {
    "round_k_index.BLOCK_V=64": "illegal",
    "round_k_index.BLOCK_V=8": "abort",
    "round_k_index.BLOCK_V=4": "segfault",
    "round_k_index.BLOCK_V=16": "hang",
    "round_k_index.BLOCK_V=128": "timer",
    "attend_selected.num_stages=5": "resources",
    "attend_selected.BLOCK_N=16": "wrong",
}


def test_planted_failures_are_survived(tmp_path):
    """An illegal access, a hang, aborts, no resources, wrong results, a timer that says -1."""
    plan = {
        "journal": str(tmp_path / "a.journal"),
        "log": str(tmp_path / "log"),
        "child": {"bad": BAD},
        "trials": 36,
        "patience": 0.4,
    }
    search = tuning_runs.run(plan)
    for key, result in search.journal.results.items():
        point = search.journal.points[key]
        how = {
            how
            for value, how in BAD.items()
            if value
            in [f"{k}.{n}={v}" for k, values in point.keywords().items() for n, v in values.items()]
        }
        kind = result.failure.kind if result.failure else None
        allowed = {
            "illegal": "ILLEGAL_ACCESS",
            "abort": "WORKER_DIED",
            "segfault": "WORKER_DIED",
            "hang": "HANG",
            "timer": "TIMING_UNTRUSTED",
            "resources": "OVER_SMEM",
            "wrong": "WRONG_NUMERIC",
        }
        assert kind in {allowed[each] for each in how} | ({None} if not how else set())
    kinds = {r.failure.kind: r.failure for r in search.journal.results.values() if r.failure}
    assert len(kinds) >= 5
    assert (
        "assertion failed in the compiler" in kinds["WORKER_DIED"].message
        or "SIGSEGV" in kinds["WORKER_DIED"].message
    )
    assert "compiling forever" in kinds["HANG"].message
    assert not search.journal.results[search.best.key].failure


def test_a_machine_that_kills_everything_is_said(tmp_path):
    found = tuning_runs.small_space()
    plan = {"bad": {f"round_k_index.num_warps={n}": "abort" for n in (1, 2, 4, 8)}}
    with Lanes(
        problem(), ["interpreter"], command=(CHILD, json.dumps(plan)), patience=Patience()
    ) as lanes:
        search = Search(space=found, measurer=lanes, journal=Journal(storage_at(None), "t", found))
        with pytest.raises(TuneError):
            search.run()
        good = {"bad": {}}
        lanes._all[0].worker._command = (
            *lanes._all[0].worker._command[:1],
            CHILD,
            json.dumps(good),
        )
        assert lanes.measure(found.start).failure is None


def problem():
    return {"spec": "", "dtype": "bf16", "target": "", "shapes": ["8K"]}


def test_the_point_that_spoils_the_finals_is_found():
    found = tuning_runs.small_space()
    points = list(found.variants[0].parts[-1].points(found.start))[:3]

    class Picky(Lanes):
        """One point cannot be compared."""

        def _ask(self, request):
            if request["do"] == "compare" and points[1].record() in request["points"]:
                return Failure(kind="HANG", message="late")
            return super()._ask(request)

    with Picky(problem(), ["interpreter"], command=(CHILD, json.dumps({"bad": {}}))) as lanes:
        samples = lanes.compare(points, "8K", 4)
    assert isinstance(samples[1], Failure)
    assert [len(samples[n]) for n in (0, 2)] == [4, 4]


def test_kills_of_parent_and_child_lose_nothing(tmp_path):
    said = []
    assert tuning_kills.run(tmp_path, 3, seed=1, trials=60, tell=said.append) >= 60
    assert "none lost" in said[0]


def test_who_tunes_on_one_gpu_takes_turns(tmp_path, monkeypatch):
    """While one process measures the other waits, whatever its cache; a hang is no wait's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    point = tuning_runs.small_space().start
    slow = (CHILD, json.dumps({"bad": {}, "seconds": 0.6}))
    took: list[tuple[float, float]] = []

    class Watched(Worker):
        def ask(self, request, timeout):
            began = time.monotonic()
            answer = super().ask(request, timeout)
            took.append((began, time.monotonic()))
            return answer

    monkeypatch.setattr(lanes_module, "Worker", Watched)
    with contextlib.ExitStack() as stack:
        tuners = []
        for n in range(2):
            monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / str(n)))
            lanes = Lanes(problem(), ["7"], command=slow, patience=Patience(later=1.0))
            tuners.append(stack.enter_context(lanes))
        for each in tuners:
            each.describe()
        took.clear()
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(lambda each: each.measure(point), tuners))
    assert [result.failure for result in results] == [None, None]
    (_, first_ends), (second_begins, second_ends) = sorted(took)
    assert first_ends <= second_begins
    assert second_ends - second_begins >= 0.6


# --- the whole


def options(**more):
    return Options(
        shapes=(shape_of("8K"),),
        limits=Limits(trials=60),
        gpus=("interpreter",),
        only=("merge_selected",),
        command=("hsgen", "tune", "moba", "--shapes", "8K"),
        rounds=5,
        **more,
    )


def test_tune_keeps_what_won(tmp_path, monkeypatch):
    """From a search to what the next call of this size gets."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    child = (CHILD, json.dumps({"bad": {"merge_selected.BLOCK_R=128": "wrong"}}))
    told = []
    found = tune(load("moba"), options(child=child), tell=told.append)
    (record,) = found.records
    assert record.time.median_us < record.default.median_us
    assert record.alternates
    assert record.provenance.command == "hsgen tune moba --shapes 8K"
    assert "times as fast as before" in str(found)
    assert "--try merge_selected.BLOCK_R=128" in str(found)
    assert json.dumps(found.record())
    assert record.time.median_us <= 1.01 * told[-1].best  # of ties the smallest
    environment = tuned.environment(H100, interpreted=True)
    candidates = tuned.ranked(record.problem, shape_of("8K").bucket, environment)
    assert [each.rung for each in candidates] == ["exact"]
    assert candidates[0].kept.record == record
    again = tune(load("moba"), options(child=child))
    assert again.measured == found.measured
    assert not again.records  # what is used is the best still
    assert "nothing is surely faster" in str(again)


# milliseconds of 32K on an H100 or H200: choices that rules leave to numbers, and intervals that are halved
MEASURED = {"seer_attention": 4.4, "xattention": 4.6, "hirouter": 31.0, "hip": 16.9, "hisa": 16.3}


@pytest.mark.parametrize("name", MEASURED)
def test_no_time_is_below_what_the_card_needs(name):
    """A floor above what was measured would refuse every point."""
    graph = passes.run(planner.plan(load(name)))
    (floor,) = least_us(graph, space(graph, H100, "bf16"), (shape_of("32K"),)).values()
    assert 0 < floor < 1000 * MEASURED[name]


@pytest.mark.parametrize("name", ["nsa", "moba", "hisa", "dsa"])
def test_gradients_need_no_longer_than_their_calls(name):
    """What the card needs at least is arithmetic that gradients really have."""
    graph, target = passes.run(planner.plan(load(name))), with_streams(H100)
    calls, gradients = (
        least_us(graph, space(graph, target, "bf16", work), (shape_of("8K"),))["8K"]
        for work in ("forward", "gradients")
    )
    assert 0 < gradients <= calls


def test_winners_before_a_crash_in_the_finals_are_kept(tmp_path, monkeypatch):
    """The finals of a long call take a minute; those of a short one are done by then."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    child = (CHILD, json.dumps({"bad": {}}))
    told, real = [], tuning._Tuning._entrants

    def entrants(self, points, shape, incumbent):
        if shape.name == "32K":
            raise KeyboardInterrupt
        return real(self, points, shape, incumbent)

    monkeypatch.setattr(tuning._Tuning, "_entrants", entrants)
    asked = replace(options(child=child), shapes=(shape_of("8K"), shape_of("32K")))
    with pytest.raises(KeyboardInterrupt):
        tune(load("moba"), asked, tell=told.append)
    assert [each.doing for each in told[-2:]] == ["finals of 8K", "finals of 32K"]
    environment = tuned.environment(H100, interpreted=True)
    problem = tuned.Problem.of(load("moba"), "bf16")
    (kept,) = [
        each.kept.record for each in tuned.ranked(problem, shape_of("8K").bucket, environment)
    ]
    assert kept.bucket == shape_of("8K").bucket
    assert kept.time.median_us < kept.default.median_us


def test_one_point_is_tried_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    child = (CHILD, json.dumps({"bad": {"merge_selected.BLOCK_R=128": "abort"}}))
    good = attempt(load("moba"), options(child=child), "merge_selected.BLOCK_R=64")
    assert good.times["8K"].median_us > 0
    bad = attempt(load("moba"), options(child=child), "merge_selected.BLOCK_R=128")
    assert bad.failure.kind == "WORKER_DIED"
    assert "assertion failed in the compiler" in str(bad)


def test_what_is_said_of_a_failure_does_it_again(tmp_path, monkeypatch, capsys):
    """The command of the report, typed, asks for the very point and has its class."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    child = (CHILD, json.dumps({"bad": {"merge_selected.BLOCK_R=128": "wrong"}}))
    (said,) = tune(load("moba"), options(child=child)).failed
    failure, _, command = said.partition("\n")
    assert failure.startswith("WRONG_NUMERIC: one sequence: o: row [0, 1] is off")
    real = tuning.attempt

    def here(spec, asked, text):
        assert asked.shapes == (shape_of("8K"),)
        return real(spec, options(child=child), text)

    monkeypatch.setattr(tuning, "attempt", here)
    words = shlex.split(command)
    assert words[:2] == ["hsgen", "tune"]
    assert main(words[1:]) == 1
    assert "WRONG_NUMERIC: one sequence" in capsys.readouterr().out


def test_the_first_interrupt_ends_the_search_after_what_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    child = (CHILD, json.dumps({"bad": {}}))

    def interrupt(status):
        if status.measured == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    found = tune(load("moba"), options(child=child), tell=interrupt)
    assert found.stopped
    assert found.measured == 5
    assert "the same command goes on" in str(found)
    assert signal.getsignal(signal.SIGINT) is before
    assert tune(load("moba"), options(child=child)).measured > 5


# --- compilers


GATED = """\
hsgen: 1
name: gated
heads: {query: 4, kv: 2}
head_dim: 16
causal: true
attend:
  - {name: near, window: 32}
  - {name: far, window: 128}
combine: {gates: input}  # whose strides are no multiples of 16
"""


def test_the_gpu_process_finds_what_pruning_compiled(tmp_path, monkeypatch):
    """A launch asks Triton's cache for the same key; a point that nobody compiled is compiled."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    spec, cache = parse(GATED), tmp_path / "triton"
    found = space(passes.run(planner.plan(spec)), H100, "bf16")
    other = next(found.neighbours(found.start))
    with Compilers(2, cache=cache) as compilers:
        outcomes = Compiler(spec, found, compilers).outcomes(found.start)
        assert all(isinstance(each, Resources) for each in outcomes.values()), outcomes
    problem = {
        "spec": dump(spec),
        "dtype": "bf16",
        "target": json.dumps(asdict(H100)),
        "shapes": ["512"],
    }
    launching = (CHILD.replace("tuning_child", "launching_child"),)
    with Lanes(problem, ["0"], command=launching, cache=cache) as lanes:
        told = [lanes._ask({"do": "measure", **point.record()}) for point in (found.start, other)]
    assert told[0]["found"] == dict.fromkeys(outcomes, True)
    assert False in told[1]["found"].values()


def test_compilers_and_gpu_processes_of_a_run_have_one_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    with tuning._Tuning(load("moba"), options(child=(CHILD, json.dumps({"bad": {}})))) as work:
        workers = work._compilers._workers[0], work.lanes._all[0].worker
        folders = {each._environment(Path("own"))["TRITON_CACHE_DIR"] for each in workers}
        assert len(folders) == 1
        assert Path(*folders).is_dir()
    assert not Path(*folders).exists()


# --- the command


def test_tune_without_a_gpu_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["tune", "nsa", "--shapes", "8M"]) == 1
    assert "expected a shape" in capsys.readouterr().err


def test_infinite_limits_are_no_limits():
    assert Limits().trials == math.inf
