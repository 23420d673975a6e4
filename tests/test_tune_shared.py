"""One search by many processes, on every kind of storage: nothing twice, nobody waits for the dead."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import postgres
import pytest
import tuning_kills
import tuning_runs

from hsgen.errors import HsgenError
from hsgen.measurer import Result
from hsgen.tune.journal import Journal
from hsgen.tune.presence import GONE, Presence, whoami
from hsgen.tune.storages import reached, shown, storage_at
from hsgen.tuned import Time

SPACE = tuning_runs.small_space()
START = SPACE.start
NEAR = list(itertools.islice(SPACE.neighbours(START), 5))
RESULT = Result(times={"8K": Time(median_us=7.0, iqr_us=0.1, runs=9)})


def journal(place):
    return Journal(storage_at(place), "small", SPACE)


def gets(mine, point):
    """Whether a process may measure a point, as things are now."""
    mine.refresh()
    return mine.claim([point], 1) == [point]


def states(place):
    """Of the trials of every study, how many there are in each state."""
    studies = optuna.study.get_all_study_names(storage := storage_at(place))
    ids = [storage.get_study_id_from_name(name) for name in studies]
    return Counter(t.state.name for each in ids for t in storage.get_all_trials(each))


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "a.journal")


@pytest.fixture(params=["journal", "sqlite"])
def place(request, tmp_path, file):
    return file if request.param == "journal" else f"sqlite:///{tmp_path}/a"


# --- claims


def test_a_point_is_claimed_by_one(place):
    """Some at once want the same points; none is given twice."""
    journals = [journal(place) for _ in range(4)]
    claimed, gate = [], threading.Barrier(4)

    def want(mine):
        gate.wait()
        while some := mine.claim(NEAR, 1):
            claimed.extend(some)
            time.sleep(0.001)

    threads = [threading.Thread(target=want, args=(each,)) for each in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed))
    left = journal(place)
    assert {p for p in NEAR if left.free(p)} == set(NEAR) - set(claimed)


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_claims_the_first_counts(file, first, monkeypatch):
    """Neither saw the other when it looked."""
    pair = journal(file), journal(file)
    monkeypatch.setattr(pair[0], "free", lambda point: True)
    monkeypatch.setattr(pair[1], "free", lambda point: True)
    for each in (pair[first], pair[1 - first]):
        each._mine[START.key] = each._create(each._trial(START, ""))
    for each in pair:
        each.refresh()
    assert [each._late(START.key) for each in pair] == [first == 1, first == 0]


def test_what_another_found_is_known(file):
    one, two = journal(file), journal(file)
    assert one.claim([START, *NEAR], 2) == [START, NEAR[0]]
    assert two.claim([START, *NEAR], 1) == [NEAR[1]]
    assert (one.others, two.others) == (0, 1)
    one.keep(START, RESULT)
    assert two.claim([START], 1) == []
    assert two.results == {START.key: RESULT}
    one.release(NEAR[0])
    assert two.claim(NEAR[:2], 1) == [NEAR[0]]


def test_a_result_of_one_that_was_given_up_is_kept(file):
    """It was only slow."""
    one, two = journal(file), journal(file)
    assert one.claim([START], 1) == [START]
    two._storage.set_trial_state_values(one._mine[START.key], optuna.trial.TrialState.FAIL)
    one.keep(START, RESULT)
    two.refresh()
    assert two.results == {START.key: RESULT}


# --- signs of life


def test_a_process_of_another_machine_is_given_up_when_it_is_silent(file):
    here, there = journal(file), journal(file)
    there.presence.me["host"] = "elsewhere"
    now = [0.0]
    here.presence.clock = lambda: now[0]
    there.presence._say(time.time())
    assert gets(there, START)
    assert not gets(here, START)
    for _ in range(5):
        now[0] += 50.0
        there.presence._say(time.time())
        assert not gets(here, START)
    now[0] += 61.0
    assert gets(here, START)
    assert states(file) == {"FAIL": 1, "RUNNING": 1}


def test_the_last_word_of_a_process_counts_at_once(file):
    here, there = journal(file), journal(file)
    there.presence.me["host"] = "elsewhere"
    there.presence._say(time.time())
    there.claim([START], 1)
    assert not gets(here, START)
    there.presence._say(GONE)
    assert gets(here, START)


def test_signs_of_life_go_on_while_a_search_waits(file):
    here, there = journal(file), journal(file)
    there.presence.beat, there.presence.me["host"] = 0.02, "elsewhere"
    here.presence.silent = 0.5
    with there.working():
        there.claim([START], 1)
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            assert not gets(here, START)
            time.sleep(0.05)
    assert gets(here, START)


def test_a_number_that_another_process_has_now_is_not_the_same_process(file):
    here, there = journal(file), journal(file)
    there.presence.me["started"] += 1
    there.claim([START], 1)
    assert gets(here, START)
    assert Presence(here._storage, here._id, me=whoami()).alive(here.presence.me, None)


# --- processes


def run(place, folder, name, **plan):
    """A search in a process of its own."""
    plan = {
        "journal": place,
        "log": str(folder / f"{name}.log"),
        "child": {"bad": {}, "seconds": 0.1, "log": str(folder / "asked")},
        **plan,
    }
    return tuning_kills.start(plan)


def finished(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()[-3000:]
    return out.decode()


def ended(processes):
    """What processes that should still run said; the others are killed then."""
    early = [each for each in processes if each.poll() is not None]
    for each in processes if early else ():
        each.kill()
    return [each.communicate() for each in early]


def shared(places, folder, trials):
    """Searches side by side on one study; the first is killed in the middle."""
    processes = [
        run(place, folder, n, trials=trials, together=str(folder)) for n, place in enumerate(places)
    ]
    logs = [folder / f"{n}.log" for n in range(len(places))]
    end = time.monotonic() + 60
    while len(list(folder.glob("ready.*"))) < len(places):
        assert time.monotonic() < end
        assert not (early := ended(processes)), early
        time.sleep(0.02)
    (folder / "go").touch()
    while not all(log.exists() and len(log.read_text().split()) >= 2 for log in logs):
        assert time.monotonic() < end
        assert not (early := ended(processes)), early
        time.sleep(0.02)
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].communicate(timeout=10)
    said = {finished(each) for each in processes[1:]}
    found = journal(places[1]).results
    asked = (folder / "asked").read_text().split("\n")[:-1]
    twice = {line for line, count in Counter(asked).items() if count > 1}
    assert len(twice) <= 1, twice  # what the first was at when it died
    best = min(found, key=lambda key: (found[key].score, key))
    assert best in " ".join(said)
    assert trials <= len(found) <= len(set(asked)) <= len(found) + 1
    assert "RUNNING" not in states(places[1])


def test_processes_share_a_journal(tmp_path):
    shared([str(tmp_path / "a.journal")] * 3, tmp_path, 24)


def listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def proxy(url):
    """Optuna's, in front of a database."""
    port = 13000 + os.getpid() % 20000
    text = (
        "import sys, optuna; from optuna.storages import get_storage, run_grpc_proxy_server\n"
        f"run_grpc_proxy_server(get_storage({url!r}), host='localhost', port={port})"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", text])
    end = time.monotonic() + 60
    try:
        while not listening(port):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"grpc://localhost:{port}"
    finally:
        process.kill()
        process.wait()


def test_processes_share_a_database_some_by_a_proxy(tmp_path):
    """PostgreSQL itself, and Optuna's gRPC server in front of it."""
    with postgres.server() as url, proxy(url) as before:
        shared([url, url, before], tmp_path, 24)


# --- what is not there


def test_a_storage_that_is_not_there_is_said(tmp_path):
    with pytest.raises(HsgenError, match="cannot open the studies at postgresql://me:\\*\\*\\*@"):
        storage_at(f"postgresql://me:secret@/x?host={tmp_path}")
    with pytest.raises(HsgenError, match="cannot open the studies at nowhere://"):
        storage_at("nowhere://x")
    assert shown(Path("/a/b.journal")) == "/a/b.journal"


def test_a_storage_that_went_away_is_said(tmp_path):
    url = f"sqlite:///{tmp_path}/a"
    mine = journal(url)
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(HsgenError, match="cannot be reached any more") as error, reached(url):
        mine._storage.remove_session()
        mine._storage._backend.engine.dispose()
        mine.refresh()
    assert "run the same command" in str(error.value)
