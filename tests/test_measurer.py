"""What measuring says: results, shapes, times that cannot be, and tables that are replayed."""

import json
import math

import pytest
from synthetic_tables import table
from test_space import space_of

from hsgen.errors import ArgumentError, HsgenError
from hsgen.measurer import (
    Failure,
    Replay,
    Result,
    read_table,
    result_of,
    shape_of,
    trusted,
    wobbles,
)
from hsgen.tuned import Time


def timed(**shapes: float) -> Result:
    return Result(times={n: Time(median_us=t, iqr_us=1.0, runs=9) for n, t in shapes.items()})


def test_score_is_the_geometric_mean_of_shapes():
    assert timed(a=100.0, b=400.0).score == pytest.approx(200.0)
    assert Result(failure=Failure(kind="HANG", message="late")).score == math.inf


def test_a_result_is_a_record():
    for result in (timed(a=3.5), Result(failure=Failure(kind="NAN", message="o", kernel="k"))):
        assert result_of(json.loads(json.dumps(result.record()))) == result
    with pytest.raises(ArgumentError):
        result_of({"times": {}})


@pytest.mark.parametrize("median", [-1.0, 0.0, math.nan, math.inf])
def test_impossible_times_are_not_trusted(median):
    found = trusted(timed(a=100.0, b=median), {})
    assert found.failure is not None
    assert found.failure.kind == "TIMING_UNTRUSTED"
    assert "b: a time of" in found.failure.message


def test_times_below_the_peak_of_the_card_are_not_trusted():
    assert trusted(timed(a=100.0), {"a": 90.0}).failure is None
    found = trusted(timed(a=100.0), {"a": 120.0})
    assert "needs at least 120" in str(found.failure)


def test_unsteady_times_are_looked_at_again():
    assert wobbles(timed(a=4.0))
    assert not wobbles(timed(a=6.0))


@pytest.mark.parametrize(
    ("text", "numbers", "name"),
    [
        ("8K", (8192, 8192, 1), "8K"),
        ("1/32K", (1, 32768, 1), "1/32K"),
        ("4*1000", (1000, 1000, 4), "4*1000"),
        ("2*1/4096", (1, 4096, 2), "2*1/4K"),
    ],
)
def test_shapes_are_words(text, numbers, name):
    shape = shape_of(text)
    assert (shape.queries, shape.keys, shape.sequences) == numbers
    assert shape.name == name
    assert shape_of(shape.name) == shape


def test_a_shape_has_a_bucket():
    bucket = shape_of("4*3000").bucket
    assert (bucket.queries, bucket.keys, bucket.sequences) == (16384, 4096, 4)


@pytest.mark.parametrize("text", ["", "8M", "-1", "8K/1K", "0", "1/"])
def test_wrong_shapes_are_refused(text):
    with pytest.raises(ArgumentError):
        shape_of(text)


@pytest.fixture(scope="module")
def small():
    found = space_of("moba").only(["merge_selected"])
    return found, table(found.variants[0], found.variants[0].parts[0])


def test_a_synthetic_table_says_so(small):
    assert small[1].synthetic
    assert small[1].about.startswith("SYNTHETIC")
    assert small[1].made == {}


def test_a_table_is_a_file(small, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(small[1].record()))
    assert read_table(file) == small[1]
    file.write_text('{"entries": 3}')
    with pytest.raises(HsgenError, match="not a table"):
        read_table(file)


def test_replay_says_what_the_table_holds(small):
    found, made = small
    exact, noisy = Replay(made), Replay(made, noise=0.05, seed=1)
    for point in found.variants[0].parts[0].points(found.start):
        entry = made.entries[made.values(point)]
        result, late = exact.measure(point), noisy.measure(point)
        if isinstance(entry, str):
            assert result.failure is not None and result.failure.kind == entry
        else:
            assert result.times["32K"].median_us == entry <= late.times["32K"].median_us
    assert exact.asked == len(made.entries)
