"""The scripts that measure a space in full and judge a search by it, without a GPU."""

import json
from collections import Counter

import pytest
from synthetic_tables import table
from test_space import space_of

from benchmarks import regret, spaces
from hsgen.measurer import Failure, Replay, read_table
from hsgen.target import H100


@pytest.fixture(scope="module")
def merge():
    found = space_of("moba").only(["merge_selected"])
    return found, table(found.variants[0], found.variants[0].parts[0])


class Judge:
    """Compilers that refuse one warp, and wait for nobody."""

    def ahead(self, point):
        pass

    def failure(self, point):
        bad = point.config("merge_selected").num_warps == 1
        return Failure(kind="SPILL", message="spills") if bad else None


def test_a_space_is_measured_in_full_and_pruning_judged(merge, tmp_path):
    found, made = merge
    variant, part = spaces.chosen(found, "merge_selected", None)
    points = list(part.points(variant.start))
    records = list(spaces.measure(points, Replay(made), Judge(), float("inf")))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(each) + "\n" for each in records) + '{"key": "half')
    known = spaces.kept(lines)
    assert len(known) == len(points) == 32
    result = spaces.tabled(points, known, made)
    assert result["pruned_share"] == 0.25
    assert Counter(row[-1] for row in result["pruned"]) == {"SPILL": 8}
    file = tmp_path / "table.json"
    file.write_text(json.dumps(result))
    assert read_table(file) == made
    assert not list(spaces.measure(points, Replay(made), Judge(), 0.0))


def test_another_order_is_chosen_by_name():
    variant, part = spaces.chosen(space_of("moba"), "index_selected", "selected=rows")
    assert variant.name == "selected_rows"
    assert part.name == "attend_selected"


def test_regret_is_printed_with_its_source(merge, tmp_path, capsys):
    file = tmp_path / "space_moba.json"
    file.write_text(json.dumps(merge[1].record()))
    regret.main([str(file), "--seeds", "1", "-o", str(tmp_path / "regret.json")])
    out = capsys.readouterr().out
    assert out.startswith("SYNTHETIC: merge_selected by a formula, not by a card: 32 points")
    assert "100 trials: mean 1.00" in out
    written = json.loads((tmp_path / "regret.json").read_text())
    assert written["space_moba"]["synthetic"]
    assert regret.space_of(merge[1], H100) == merge[0]
