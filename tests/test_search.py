"""Variants of a spec, and those on the front of time against error."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pytest

from benchmarks import common
from hsgen import passes, planner, search, tiles, variants
from hsgen.checking import CheckError
from hsgen.cli import main
from hsgen.errors import HsgenError, PlanError, SpecError
from hsgen.measurer import Failure
from hsgen.search import Least, Point
from hsgen.space import space
from hsgen.spec import load, parse
from hsgen.target import H100
from hsgen.tune.presence import machine

CAPTURE = common.SHIPPED_CAPTURE
TINY = """\
hsgen: 1
name: tiny
heads: {query: 4, kv: 2}
head_dim: 64
causal: true
levels:
  - name: block
    partition: {blocks: 512}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
"""


@dataclass(frozen=True)
class Fixed:
    """As many milliseconds as a spec keeps thousands of tokens, and a note of who asked."""

    asked: list = field(default_factory=list)
    source: str = "measured"
    about: str = "time of a fixed clock"
    turns_tiles: bool = False

    def configs(self, spec, choice):
        return tiles.configs(spec, H100, "bf16", choice)

    def milliseconds(self, spec, config):
        self.asked.append(spec.digest)
        level = spec.levels[-1]
        if level.pool.keys == "sum_rsqrt":
            raise PlanError("no kernel likes that pool")
        return level.select.budget * level.partition.size / 1000


class Never(Fixed):
    """Of a card that none of the kernels runs on."""

    def milliseconds(self, spec, config):
        raise PlanError("no kernel does it")


def knobs(name):
    return {knob.name: knob for knob in variants.variants(load(name)).knobs}


def run(spec, clock, more=(), **options):
    found = variants.variants(spec, more)
    return search.search(found, CAPTURE, clock, tokens=1024, rows=64, **options)


# --- variants


def test_sizes_and_budgets_are_in_tokens():
    found = variants.variants(load("moba"))
    assert found.own == {
        "chunk.size": 512,
        "chunk.pool": "mean",
        "chunk.tokens": 1536,
        "chunk.first": 0,
        "chunk.last": 1,
    }
    made = found.make(found.own | {"chunk.size": 128}).levels[0]
    assert (made.partition.size, made.partition.stride, made.select.top_k) == (128, 128, 12)
    made = found.make(found.own | {"chunk.tokens": 3072, "chunk.first": 2}).levels[0]
    assert (made.select.top_k, made.select.force.first, made.select.force.last) == (6, 2, 1)


def test_spec_itself_is_the_first_choice():
    found = variants.variants(parse(TINY))
    choices = list(found.choices())
    assert choices[0] == found.own
    assert len(choices) == len(found) == len({str(choice) for choice in choices})
    assert found.make(found.own) is found.spec
    assert found.changed(found.own) == "as it is"


@pytest.mark.parametrize(
    ("name", "turned", "kept"),
    [
        ("nsa", {"block.size", "block.tokens", "window.window"}, {"compressed.size"}),
        ("seer_attention", {"block.first", "block.last"}, {"block.size", "block.pool"}),
        ("quest", {"page.size", "page.tokens"}, {"page.pool"}),
        ("xattention", {"block.mass"}, set()),
        ("infllm_v2", {"coarse.size", "compressed.size", "block.tokens"}, set()),
    ],
)
def test_nothing_learned_changes_its_shape(name, turned, kept):
    assert turned <= knobs(name).keys()
    assert not kept & knobs(name).keys()


def test_strides_follow_sizes():
    found = variants.variants(load("infllm_v2"))
    before = load("infllm_v2").level("compressed").partition
    size = {"compressed.size": before.size // 2, "coarse.size": 64}
    after = variants._level(load("infllm_v2").level("compressed"), found.own | size).partition
    assert (after.size, after.stride) == (before.size // 2, before.stride // 2)


def test_what_does_not_fit_is_refused_by_the_rules():
    found = variants.variants(load("moba"))
    with pytest.raises(SpecError, match="at most top_k = 3 forced entries"):
        found.make(found.own | {"chunk.last": 4})


def test_variants_print():
    text = str(variants.variants(parse(TINY)))
    assert "tiny: " in text
    assert "  block.size: 128 256 [512] 1024\n" in text
    assert "  block.pool: [mean] max sum_rsqrt\n" in text


# --- the search


def test_few_variants_are_all_tried(monkeypatch):
    monkeypatch.setattr(variants, "FACTORS", (0.5, 1.0))
    monkeypatch.setattr(variants, "FORCED", (0, 1))
    clock = Fixed()
    spec = parse(TINY)
    found = run(spec, clock, trials=10_000)
    made = {}
    for choice in found.variants.choices():
        try:
            made.setdefault(found.variants.make(choice).digest, choice)
        except SpecError:
            continue
    assert set(clock.asked) == set(made)
    assert len(clock.asked) == len(made), "none twice"
    assert {p.spec.digest for p in found.points} < set(made)
    assert sum(found.refused.values()) == len(found.variants) - len(found.points) - _twice(found)
    assert "no kernel likes that pool" in found.refused
    assert found.own
    assert found.own.spec == spec
    for point in found.points:
        better = [p for p in found.points if p.ms < point.ms and p.error <= point.error]
        better += [p for p in found.points if p.ms <= point.ms and p.error < point.error]
        same = [p for p in found.front if (p.ms, p.error) == (point.ms, point.error)]
        assert bool(better) != bool(same)


def _twice(found):
    """Choices that make a spec which another choice makes too."""
    made = []
    for choice in found.variants.choices():
        try:
            made.append(found.variants.make(choice).digest)
        except SpecError:
            continue
    return len(made) - len(set(made))


def test_errors_are_those_of_quality():
    found = run(parse(TINY), Fixed(), trials=1)
    (point,) = found.points
    quality_of = search.quality.measure(
        parse(TINY), search.captures.load(CAPTURE)[0].prefix(1024), 64
    )
    own = [each for each in quality_of if each.subject == "level block"]
    errors = [each.ways["selected"]["error"] for each in own]
    assert point.error == pytest.approx(sum(errors) / len(errors))
    assert point.density == pytest.approx(own[0].density)
    assert point.changed == "as it is"


def test_many_variants_are_searched_and_the_search_goes_on(tmp_path):
    place, first = tmp_path / "journal", Fixed()
    before = run(parse(TINY), first, trials=5, storage=place)
    assert before.points[0].spec == parse(TINY), "the spec itself is tried first"
    assert len(before.points) == 5
    again = Fixed()
    after = run(parse(TINY), again, trials=8, storage=place)
    assert {p.spec.digest for p in before.points} <= {p.spec.digest for p in after.points}
    assert not {p.spec.digest for p in before.points} & set(again.asked), "none is tried again"
    assert [p.error for p in after.points[:5]] == [p.error for p in before.points]
    other = Fixed(about="time of another card")
    run(parse(TINY), other, trials=1, storage=place)
    assert other.asked, "times of another clock are not taken over"


class Tiled(Fixed):
    """Of kernels that like wide tiles, and of a card on which few warps are no use."""

    def milliseconds(self, spec, config):
        attend = config.get("attend_selected", {})
        if attend.get("num_warps") == 1:
            raise HsgenError("kernels do not run")
        wide = attend.get("BLOCK_N", 64) / 64
        return super().milliseconds(spec, config) / wide


def test_tiles_are_turned_with_the_spec(tmp_path):
    """One study of both; what a choice loses is measured once, whatever the tiles."""
    measured = []
    clock, errors = Tiled(), search.quality.measure

    def counted(spec, group, rows):
        measured.append(spec.digest)
        return errors(spec, group, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.quality, "measure", counted)
        found = run(parse(TINY), clock, tiles.knobs(), trials=12, storage=tmp_path / "journal")
    assert len(found.points) == 12
    groups = len(search.captures.load(CAPTURE))
    assert len(measured) == groups * len(set(measured)), "an error is of a spec"
    turned = [point for point in found.points if point.config]
    assert turned
    for point in turned:
        steps = tiles.steps_of(point.choice)
        assert steps
        assert point.config == tiles.configs(point.spec, H100, "bf16", point.choice)
        assert point.record()["config"] == point.config
    of_own = [point for point in found.points if point.spec == parse(TINY)]
    assert of_own[0].config == {}, "the spec itself, where it starts, is tried first"
    texts = search.texts(found)
    for point, text in zip(found.front, texts.values(), strict=True):
        assert ("# load_kernel(..., config=" in text) == bool(point.config)
        assert parse(text).digest
    again = run(parse(TINY), Never(), tiles.knobs(), trials=12, storage=tmp_path / "journal")
    assert [p.record() for p in again.points] == [p.record() for p in found.points]


def test_steps_of_tiles_end_where_their_range_does():
    spec = load("moba")
    start = space(passes.run(planner.plan(spec)), H100).start.keywords()
    wide = {f"tiles.attending.{name}": 1 for name in ("BLOCK_N", "num_warps", "num_stages")}
    found = tiles.configs(spec, H100, "bf16", wide | {"chunk.size": 512})
    assert set(found) == {"attend_selected"}
    before, after = start["attend_selected"], found["attend_selected"]
    assert after["num_stages"] == before["num_stages"] + 1
    assert all(after[n] in (before[n], 2 * before[n]) for n in ("BLOCK_N", "num_warps"))
    assert tiles.configs(spec, H100, "bf16", {"tiles.choosing.BLOCK_T": 0}) == {}
    with pytest.raises(HsgenError, match="tiles that do not go together: .* accumulators a thread"):
        tiles.configs(spec, H100, "bf16", {f"tiles.attending.{n}": s for n, s in WIDEST.items()})


WIDEST = {"BLOCK_T": 1, "BLOCK_N": 1, "num_warps": -1}


def test_what_compilers_refuse_is_not_timed(monkeypatch):
    asked, refused = [], Failure(kind="OVER_SMEM", message="needs more than there is")

    class Compiler:
        def __init__(self, spec, space, compilers):
            assert space.contains(space.start)

        def failure(self, point):
            asked.append(point.config("attend_selected").num_stages)
            return refused if asked[-1] == 3 else None

    monkeypatch.setattr(search, "Compiler", Compiler)
    monkeypatch.setattr(search.Target, "current", lambda *_: H100)
    setting = search.Setting(device="cpu", kind="random", groups=[], seconds=0.0)
    clock, spec = search.Measured(setting=setting, tokens=64), load("nsa")
    assert clock.configs(spec, {}) == {}
    with pytest.raises(HsgenError, match="OVER_SMEM: needs more"):
        clock.configs(spec, {"tiles.attending.num_stages": 1})
    assert asked == [2, 3]


def test_variants_are_not_said_to_be_untuned(monkeypatch, caplog):
    def says(*_):
        logging.getLogger("hsgen").warning("no tuned configuration; hsgen tune nsa --shapes 4K")
        logging.getLogger("hsgen").warning("something else")
        raise CheckError("wrong")

    monkeypatch.setattr(search.measure, "check_all", says)
    setting = search.Setting(device="cpu", kind="random", groups=[], seconds=0.0)
    with pytest.raises(HsgenError, match="wrong"):
        search.Measured(setting=setting, tokens=64).milliseconds(load("nsa"), {})
    assert caplog.messages == ["something else"]


class Interrupted(Fixed):
    """The user has seen enough at the third variant."""

    def milliseconds(self, spec, config):
        if len(self.asked) == 2:
            raise KeyboardInterrupt
        return super().milliseconds(spec, config)


def test_a_search_is_shared_and_what_ends_processes_is_left(tmp_path):
    """On a database: who comes later takes over what was found; an interrupted process leaves nothing
    behind; what one died of is tried once more, and what two died of is not.
    """
    place = f"sqlite:///{tmp_path}/studies.db"
    with pytest.raises(KeyboardInterrupt):
        run(parse(TINY), Interrupted(), trials=20, storage=place)
    (name,) = optuna.get_all_study_names(place)
    study = optuna.load_study(study_name=name, storage=place)
    states = [trial.state.name for trial in study.trials]
    assert len(states) == 3
    assert (states[0], states[-1]) == ("COMPLETE", "FAIL")
    found = variants.variants(parse(TINY))
    deaths = {128: 2, 256: 1}
    dead = {"id": "dead", "host": machine(), "pid": 1 << 30, "started": 1}
    for size, count in deaths.items():
        for _ in range(count):
            study.enqueue_trial(search._params(found, found.own | {"block.size": size}))
            study.ask(search._spaces(found)).set_user_attr("worker", dead)
    clock = Fixed()
    after = run(parse(TINY), clock, trials=8, storage=place)
    assert after.refused["processes ended while they were at it"] == 1
    assert len(after.points) == 8
    assert parse(TINY).digest not in clock.asked, "the first process has tried it"
    ended = [t.params["block.size"] for t in study.trials if t.user_attrs.get("worker") == dead]
    assert Counter(ended) == {0: 2, 1: 1}
    assert not any(trial.state.name == "RUNNING" for trial in study.trials)
    never = found.make(found.own | {"block.size": 128}).digest
    assert never not in clock.asked


def test_nothing_to_turn_and_nothing_that_runs():
    plain = "hsgen: 1\nname: w\nattend: [{name: near, window: all}]\n"
    with pytest.raises(HsgenError, match="nothing in it can be turned"):
        run(parse(plain), Fixed())
    with pytest.raises(HsgenError, match="no variant could be tried: .*no kernel does it"):
        run(parse(TINY), Never())
    with pytest.raises(HsgenError, match="no time left"):
        run(parse(TINY), Fixed(), budget=-1.0)


def test_least_time_is_that_of_all_kernels():
    spec = parse(TINY)
    short, long = (Least(target=H100, tokens=T).milliseconds(spec, {}) for T in (4096, 65536))
    assert 0 < 10 * short < long
    with pytest.raises(PlanError):
        Least(target=H100, tokens=64).milliseconds(load("sea"), {})


def _point(ms, error):
    spec = parse(TINY)
    figures = {"ms": ms, "error": error, "mass": 1.0, "density": 1.0}
    return Point(choice={}, spec=spec, config={}, changed="", **figures)


def test_a_point_beats_what_is_worse_in_one_thing():
    assert _point(1.0, 0.1).beats(_point(1.0, 0.2))
    assert _point(1.0, 0.1).beats(_point(2.0, 0.1))
    assert not _point(1.0, 0.1).beats(_point(1.0, 0.1))
    assert not _point(1.0, 0.3).beats(_point(2.0, 0.1))


# --- the command


def test_command_writes_the_front(tmp_path, capsys):
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "found"
    spec.write_text(TINY)
    folder.mkdir()
    (folder / "tiny_9.yaml").write_text("# tiny with something: an earlier front")
    (folder / "tiny_mine.yaml").write_text("# mine")
    argv = ["search", str(spec), "--qkv", str(CAPTURE), "--least", "--rows", "64", "--trials", "4"]
    assert main([*argv, "-o", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "least time on h100 by its roofline, 2,048 tokens" in out
    kept = json.loads((folder / "front.json").read_text())
    assert len(kept["points"]) == 4
    assert kept["source"] == "least"
    for i, point in enumerate(kept["front"], 1):
        made = load(folder / f"tiny_{i}.yaml")
        assert made.model_copy(update={"name": "tiny"}).digest == point["digest"]
    assert not (folder / "tiny_9.yaml").exists()
    assert (folder / "tiny_mine.yaml").exists()
    svg = (folder / "front.svg").read_text()
    assert "the spec as it is" in svg
    assert "the front" in svg


def test_command_wants_a_gpu_or_says_what_else(tmp_path, capsys):
    argv = ["search", "moba", "--qkv", str(CAPTURE), "-o", str(tmp_path)]
    assert main(argv) == 1
    assert "--least takes the least time" in capsys.readouterr().err
    assert main([*argv, "--tokens", "8K,16K"]) == 2
    assert main([*argv, "--least", "-o", str(Path(__file__) / "x")]) == 1
    assert "cannot write" in capsys.readouterr().err
