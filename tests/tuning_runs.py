"""A search in a process of its own, which tests kill: python tuning_runs.py PLAN.

PLAN is JSON: `journal` (or a URL), `log` (a line a result that is kept), `child` (arguments of
`tuning_child`), `trials`, `lanes`, `together` (a folder in which several wait for each other).  The
space is small, so a search that is not killed ends by itself.
"""

import json
import os
import sys
import time
from pathlib import Path

from hsgen import passes, planner
from hsgen.lanes import Lanes, Patience
from hsgen.space import space
from hsgen.spec import load
from hsgen.target import H100
from hsgen.tune.journal import Journal
from hsgen.tune.search import Limits, Search
from hsgen.tune.storages import storage_at

CHILD = str(Path(__file__).with_name("tuning_child.py"))
KERNELS = ("round_k_index", "attend_selected")


MORE = (*KERNELS, "round_q_index", "score_token")


def small_space(kernels=KERNELS):
    """Two parts of dsa: one is measured whole, one is sampled."""
    return space(passes.run(planner.plan(load("dsa"))), H100).only(kernels)


def run(plan):
    found = small_space(plan.get("kernels", KERNELS))
    problem = {"spec": "", "dtype": "bf16", "target": "", "shapes": ["8K"]}
    command = (CHILD, json.dumps(plan["child"]))
    patience = Patience(first=plan.get("patience", 20.0), later=plan.get("patience", 20.0))
    log = Path(plan["log"]).open("a")

    class Noting(Journal):
        """Says of each result that it is kept, once it is; not of those that it finds."""

        open = False

        def _note(self, point, result):
            super()._note(point, result)
            if self.open:
                log.write(point.key + "\n")
                log.flush()

    with Lanes(
        problem, ["interpreter"] * plan.get("lanes", 1), command=command, patience=patience
    ) as lanes:
        journal = Noting(storage_at(plan["journal"]), "small", found)
        journal.open = True
        search = Search(
            space=found, measurer=lanes, journal=journal, limits=Limits(trials=plan["trials"])
        )
        if "together" in plan:
            wait_for_others(Path(plan["together"]))
        search.run()
    return search


def wait_for_others(folder):
    """Say that this process could begin; begin when somebody says so."""
    (folder / f"ready.{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)


if __name__ == "__main__":
    done = run(json.loads(sys.argv[1]))
    print(done.measured, done.best.key if done.best else None)
