"""A study as a person looks at it: Optuna's pictures as files, and optuna-dashboard."""

import builtins
import io
import json
import sys
from wsgiref.util import setup_testing_defaults
from xml.etree import ElementTree

import pytest
from test_space import space_of

from hsgen import tune
from hsgen.cli import searching
from hsgen.errors import HsgenError
from hsgen.measurer import Failure, Result
from hsgen.tune.journal import ORDERS, Journal
from hsgen.tune.search import Limits, Search
from hsgen.tune.storages import storage_at
from hsgen.tuned import Time


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The journal of a search among two orders, in which warps decide most, and some points fail."""
    found = space_of("moba")

    class Warps:
        lanes, shapes = 1, ("8K",)

        def measure(self, point, limit=None):
            config = point.keywords()["attend_selected"]
            if config["num_stages"] == 4:
                return Result(failure=Failure(kind="HANG", message="late"))
            median = 100.0 + 50 * config["num_warps"] + config["BLOCK_N"] / 100
            return Result(times={"8K": Time(median_us=median, iqr_us=0.1, runs=9)})

        def compare(self, points, shape, rounds):
            return []

    file = tmp_path_factory.mktemp("studies") / "moba.journal"
    journal = Journal(storage_at(file), "moba", found)
    search = Search(space=found, measurer=Warps(), journal=journal, limits=Limits(trials=40))
    search.run()
    return file, journal


def test_a_study_is_drawn(study, tmp_path):
    from hsgen.tune.pictures import pictures

    made = pictures(study[0], "moba", tmp_path / "new")
    names = ["moba-history.svg", "moba-parallel.svg", "moba-importances.svg"]
    assert [file.name for file in made] == names
    texts = [file.read_text() for file in made]
    assert all(ElementTree.fromstring(text).tag.endswith("svg") for text in texts)
    assert "microseconds" in texts[0]
    assert all("attend_selected.num_warps" in text for text in texts[1:])


def test_what_cannot_be_drawn_is_said(study, tmp_path):
    from hsgen.tune.pictures import pictures

    with pytest.raises(HsgenError, match="there is no study other"):
        pictures(study[0], "other", tmp_path)
    Journal(storage_at(study[0]), "empty", space_of("moba"))
    with pytest.raises(HsgenError, match="0 points have a time"):
        pictures(study[0], "empty", tmp_path)


def test_a_missing_matplotlib_is_said(monkeypatch):
    load = builtins.__import__

    def without(name, *arguments):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module", name="matplotlib")
        return load(name, *arguments)

    monkeypatch.delitem(sys.modules, "hsgen.tune.pictures", raising=False)
    monkeypatch.delattr(tune, "pictures", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(HsgenError, match="needs the package matplotlib") as error:
        searching.drawing()
    assert "hsgen[plots]" in str(error.value)


def test_a_trial_says_what_it_is(study):
    """Values as they are typed, by name of a knob, for whatever looks at studies."""
    trials = study[1]._storage.get_all_trials(study[1]._id)
    assert {trial.state.name for trial in trials} == {"COMPLETE", "FAIL"}
    start = study[1].space.start
    first = next(t for t in trials if t.user_attrs["point"] == start.key)
    assert first.params[ORDERS] == "own"
    warps = start.keywords()["attend_selected"]["num_warps"]
    assert first.params["attend_selected.num_warps"] == warps
    assert first.value == study[1].results[start.key].score


def test_the_dashboard_opens_a_study(study):
    """As `optuna-dashboard FILE` does, which takes the file for a journal by itself."""
    from optuna_dashboard import wsgi
    from optuna_dashboard._storage_url import get_storage

    app = wsgi(get_storage(str(study[0])))

    def get(path):
        environment, said = {"PATH_INFO": path}, []
        setup_testing_defaults(environment)
        environment["wsgi.errors"] = io.StringIO()
        body = b"".join(app(environment, lambda status, *_: said.append(status)))
        assert said == ["200 OK"], body
        return json.loads(body)

    listed = {each["study_name"]: each for each in get("/api/studies")["study_summaries"]}
    trials = get(f"/api/studies/{listed['moba']['study_id']}")["trials"]
    assert len(trials) >= 40
    done = [trial for trial in trials if trial["state"] == "Complete"]
    names = {each["name"] for each in done[0]["params"]}
    assert "attend_selected.num_warps" in names
    least = min(result.score for result in study[1].results.values())
    assert min(trial["values"][0] for trial in done) == pytest.approx(least)
