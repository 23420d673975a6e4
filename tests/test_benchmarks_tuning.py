"""The scripts that measure a space in full and judge a search by it, without a GPU."""

import functools
import json
import re
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tuning_runs
from synthetic_tables import table
from test_space import space_of

from benchmarks import common, regret, spaces
from hsgen.errors import HsgenError
from hsgen.measurer import Failure, Replay, Result, read_table
from hsgen.target import H100

CHILD = str(Path(tuning_runs.__file__).with_name("tuning_child.py"))


def space_and_table(name, part, variant):
    """A space of one part, and a synthetic table of it."""
    found = space_of(name)
    found = replace(found, variants=(found.variants[variant],)).only([part])
    return found, table(found.variants[0], found.variants[0].parts[0])


@pytest.fixture(scope="module")
def merge():
    return space_and_table("moba", "merge_selected", 0)


class Judge:
    """Compilers that refuse one warp, are soon done but with the first point, and wait for nobody."""

    early = 4

    def __init__(self):
        self.begun, self.slow = [], None

    def ahead(self, point):
        self.begun.append(point.key)
        self.slow = self.slow or point.key

    def ready(self, point):
        return point.key != self.slow or len(set(self.begun)) == 32

    def failure(self, point):
        match point.config("merge_selected").num_warps:
            case 1:
                return Failure(kind="SPILL", message="spills")
            case 2:
                return Failure(kind="COMPILE_ERROR", message="no")
        return None


class Drifting(Replay):
    """A card that gets slower with every call, and a table that does not."""

    def measure(self, point, limit=None):
        result = super().measure(point, limit)
        factor = 1 + 0.02 * (self.asked // 10)
        return Result(
            times={k: replace(t, median_us=t.median_us * factor) for k, t in result.times.items()},
            failure=result.failure,
        )


def test_a_space_is_measured_in_full_and_pruning_judged(merge, tmp_path, monkeypatch):
    found, made = merge
    monkeypatch.setattr(spaces, "EVERY", 3)
    variant, part = spaces.chosen(found, "merge_selected", None)
    points, start, judge = list(part.points(variant.start)), variant.start, Judge()
    records = list(spaces.measure(points, start, Drifting(made), judge, float("inf")))
    order = [record["key"] for record in records]
    assert order.index(points[0].key) > 12  # nobody waited for a compiler that is slow
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(each) + "\n" for each in records[9:]) + '{"key": "half')
    early = tmp_path / "early.jsonl"
    early.write_text("".join(json.dumps(each) + "\n" for each in records[:9]))
    known = spaces.kept(early, lines)
    assert len(known) == len(points) == 32
    result = spaces.tabled(points, known, made, 40)
    assert result["pruned_share"] == 1 - 16 / 40
    assert Counter(row[-1] for row in result["pruned"]) == {"SPILL": 8, "COMPILE_ERROR": 8}
    assert result["start_us"]["most"] > 1.05 * result["start_us"]["least"]
    file = tmp_path / "table.json"
    file.write_text(json.dumps(result))
    read = read_table(file)
    compiled = [values for values in made.entries if values[1] != 2]
    ratios = [
        read.entries[v] / made.entries[v] for v in compiled if read.entries[v] != "WRONG_NUMERIC"
    ]
    assert len(ratios) > 20
    assert max(ratios) < 1.021 * min(
        ratios
    )  # of a drift of 6 % what is left is that of a few points
    assert all(read.entries[values] == "COMPILE_ERROR" for values in read.entries if values[1] == 2)
    assert not list(spaces.measure(points, start, Replay(made), judge, 0.0))


def test_a_space_goes_on_where_it_was_stopped(tmp_path, capsys):
    """Of the whole script, with a child that says what a formula says."""
    bad = {"merge_selected.BLOCK_R=128": "abort", "merge_selected.BLOCK_R=64": "wrong"}
    child = (CHILD, json.dumps({"bad": bad, "seconds": 0.05}))
    words = ["--spec", "moba", "--part", "merge_selected", "--shape", "8K", "--gpu", "interpreter"]
    first, second = tmp_path / "first", tmp_path / "second"
    spaces.main([*words, "--budget", "0.8", "-o", str(first)], child)
    said = re.match(r"(\d+) of 32 points are measured", capsys.readouterr().out)
    (left,) = first.iterdir()
    lines = left.read_text().splitlines()
    assert 0 < int(said[1]) == len(lines) < 32
    spaces.main([*words, "--from", str(left), "-o", str(second)], child)
    assert "32 of 32 points are measured" in capsys.readouterr().out
    (file,) = second.iterdir()
    made = read_table(file)
    assert Counter(e for e in made.entries.values() if isinstance(e, str)) == {
        "WORKER_DIED": 4,
        "WRONG_NUMERIC": 4,
    }
    assert made.made["command"] == f"python -m benchmarks.spaces {' '.join(words[:6])}"
    assert len(made.entries) == 32


def test_a_start_that_does_not_run_is_said(merge):
    found, made = merge
    broken = replace(made, entries={})
    with pytest.raises(HsgenError, match="the start does not run: STATIC_INVALID"):
        list(spaces.measure([found.start], found.start, Replay(broken), Judge(), float("inf")))


def test_another_order_is_chosen_by_name_and_knobs_are_held():
    found = space_of("moba")
    variant, part = spaces.chosen(found, "index_selected", "selected=rows")
    assert variant.name == "selected_rows"
    assert part.name == "attend_selected"
    words = ["--spec", "moba", "--part", "attend_selected", "--order", "selected=rows"]
    words += ["--hold", "index_selected.num_warps", "--hold", "attend_selected.num_stages=2..4"]
    args = spaces.parser().parse_args(words)
    _, held = spaces.chosen(found, args.part, args.order, args.hold)
    names = [knob.name for knob in held.knobs]
    assert names == ["BLOCK_T", "BLOCK_N", "num_warps", "num_stages"]
    assert held.size == part.size // 5 * 3 // 5
    with pytest.raises(HsgenError, match="no knob num_stages"):
        spaces.chosen(found, "attend_selected", None, ["num_stages"])
    with pytest.raises(HsgenError, match="expected some of num_stages 1 2 3 4 5"):
        spaces.chosen(
            found, "attend_selected", "selected=rows", ["attend_selected.num_stages=5..5"]
        )
    # a table of it is found again, between the values that it has
    made = table(variant, held)
    assert regret.space_of(made, H100) == replace(
        found, variants=(replace(variant, parts=(held,)),)
    )
    with pytest.raises(SystemExit, match="the space has changed since, measure it again"):
        regret.space_of(replace(made, names=tuple(f"{n}X" for n in made.names)), H100)


def test_regret_is_printed_with_its_source_and_drawn(merge, tmp_path, capsys, monkeypatch):
    file = tmp_path / "space_moba.json"
    file.write_text(json.dumps(merge[1].record()))
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    regret.main([str(file), "--seeds", "1", "-o", str(tmp_path / "regret.json"), "--page"])
    out = capsys.readouterr().out
    assert out.startswith("SYNTHETIC: merge_selected by a formula, not by a card: 32 points")
    assert "100 trials: mean 1.00" in out
    written = common.read_json(tmp_path / "regret.json")
    assert written["space_moba"]["synthetic"]
    assert "SYNTHETIC: merge_selected by a formula" in (tmp_path / "docs/regret.md").read_text()
    assert "32 points" in (tmp_path / "docs/regret.svg").read_text()
    assert regret.space_of(merge[1], H100) == merge[0]


def test_pages_say_what_was_measured():
    for file in common.RESULTS.glob("regret*.json"):
        found = common.read_json(file)
        assert (common.ROOT / "docs/regret.md").read_text() == regret.page(found)
        assert (common.ROOT / "docs/regret.svg").read_text() == regret.plot(found)


# --- quality: on tables that a card made, and until there are two, on such as a formula made


def judges(folder):
    """What a search is judged by, by name, and of how many seeds."""
    files = sorted(folder.glob("space_*.json"))
    if len(files) >= 2:
        return {file.stem: (functools.partial(read_table, file), 20) for file in files}
    cases = {"nsa": 0, "moba": 1}
    return {
        f"synthetic_{name}": (lambda n=name, v=v: space_and_table(n, "attend_selected", v)[1], 3)
        for name, v in cases.items()
    }


JUDGES = judges(common.RESULTS)


@pytest.mark.parametrize("name", JUDGES)
def test_sixty_trials_come_within_three_percent(name):
    read, seeds = JUDGES[name]
    made = read()
    assert made.synthetic == name.startswith("synthetic")
    assert len(made.entries) > 500
    found = regret.space_of(made, H100)
    each = [regret.regret(made, found, 60, seed) for seed in range(seeds)]
    assert statistics.fmean(each) < 1.03
    start = made.entries[made.values(found.start)]
    assert statistics.fmean(each) * made.best < start
    chance = statistics.fmean(regret.drawn(made, 60, seed) for seed in range(seeds))
    assert statistics.fmean(each) < chance


def test_two_measured_tables_are_the_judges(tmp_path, merge):
    for name in ("a", "b"):
        assert all(name.startswith("synthetic") for name in judges(tmp_path))
        (tmp_path / f"space_{name}.json").write_text(json.dumps(merge[1].record()))
    found = judges(tmp_path)
    assert list(found) == ["space_a", "space_b"]
    assert found["space_a"][0]() == merge[1]
    assert found["space_a"][1] == 20


def test_what_pruning_drops_is_not_among_the_best():
    """Of tables that a card made: a quarter of the combinations, and none of the best twentieth."""
    for file in common.RESULTS.glob("space_*.json"):
        found = common.read_json(file)
        assert found["pruned_share"] >= 0.25, file.stem
        assert found["pruned_of_the_top_twentieth"] == 0, file.stem
