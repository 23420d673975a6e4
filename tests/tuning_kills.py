"""Kill a search and its measuring processes at random moments, and look whether a finished result is lost.

    python tests/tuning_kills.py --kills 50

Every result that was said to be kept must be in the journal that is opened afterwards, with the same
times; the journal must open each time; at the end the search finishes, and nothing was measured twice.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tuning_runs import MORE, small_space

from hsgen.tune.journal import Journal
from hsgen.tune.storages import storage_at

RUNS = Path(__file__).with_name("tuning_runs.py")
SECONDS = 0.02  # of a measurement
LATE = 180.0


def children(pid):
    """Processes that a process started, by its threads' lists."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= set(map(int, task.read_text().split()))
        except OSError:
            continue
    return found


def start(plan):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(RUNS), json.dumps(plan)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_work(process, log, before):
    """Until a result more is kept than before, or the search is over."""
    end = time.monotonic() + LATE
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.stat().st_size > before:
            return
        time.sleep(0.005)
    assert process.poll() is not None, "the search does not begin"


def kept(journal):
    """What the journal holds, read by a process that has nothing to do with the search."""
    read = Journal(storage_at(journal), "small", small_space(MORE))
    return {key: result.record() for key, result in read.results.items()}


def run(folder, kills, seed, trials=2000, tell=print):
    """Kill a search `kills` times, parent and child in turn.  -> how many results there are at the end"""
    generator = random.Random(seed)
    journal, log = folder / "a.journal", folder / "log"
    plan = {
        "journal": str(journal),
        "log": str(log),
        "trials": trials,
        "lanes": 2,
        "kernels": MORE,
        "child": {"bad": {}, "seconds": SECONDS},
    }
    known, died = {}, 0
    process = start(plan)
    for number in range(kills):
        size = log.stat().st_size if log.exists() else 0
        wait_for_work(process, log, size)
        if process.poll() is not None:
            break
        time.sleep(generator.random() * 0.4)
        parent = number % 2 == 0
        victims = [process.pid] if parent else sorted(children(process.pid))
        for pid in victims[:1]:
            try:
                os.kill(pid, signal.SIGKILL)
                died += 1
            except ProcessLookupError:
                continue
        if parent:
            process.communicate(timeout=LATE)
            known = check(journal, log, known)
            process = start(plan)
    out, err = process.communicate(timeout=LATE)
    assert process.returncode == 0, err.decode()[-2000:]
    known = check(journal, log, known)
    tell(f"{died} kills; at the end {len(known)} results, none lost; {out.decode().strip()}")
    return len(known)


def check(journal, log, known):
    """Nothing that was kept is lost, changed, or measured again."""
    said = log.read_text().split("\n")
    said = said[:-1]  # a killed process may leave half a line
    now = kept(journal)
    lost = [key for key in said if key not in now]
    assert not lost, f"lost: {lost}"
    assert len(said) == len(set(said)), "something was measured twice"
    changed = [key for key in known if now.get(key) != known[key]]
    assert not changed, f"changed: {changed}"
    return now


def main():
    parser = argparse.ArgumentParser(prog="python tests/tuning_kills.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), args.kills, args.seed)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
