"""Kernel sources obey the rules that only a GPU or another Triton would enforce."""

from pathlib import Path

import pytest
from conformance import systems
from template_lint import lint

from hsgen import emit, passes, planner, schedule, target

ROOT = Path(__file__).parent.parent
PIECES = sorted((ROOT / "templates" / "pieces").glob("*.py"))
GOLDEN = sorted((ROOT / "tests" / "golden").rglob("*.py"))


@pytest.mark.parametrize("path", PIECES + GOLDEN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_source_obeys_the_rules(path):
    text = path.read_text(encoding="utf-8")
    assert lint(text, driver=path.name in ("driver.py", "__init__.py")) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", systems.KERNELS)
def test_emitted_modules_obey_the_rules(name, dtype):
    spec = systems.load(name)
    plan = schedule.schedule(passes.run(planner.plan(spec)), target.H100, dtype)
    provenance = emit.Provenance(version="0", spec=name, digest=spec.digest, target="sm_90")
    for file, text in emit.render(plan, provenance).items():
        assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file


def test_pieces_are_found():
    assert PIECES


BROKEN = {
    "tl.load with a mask needs other=": "x = tl.load(X + n, mask=n < 3)",
    "tl.dot needs input_precision=": "x = tl.dot(a, b)",
    "tl.atomic_add depends on": "tl.atomic_add(X, 1.0)",
    "tl.multiple_of is a promise": "n = tl.multiple_of(n, 16)",
    "row * x_t is not computed in int64": "row = tl.program_id(0) * 4\nx = tl.load(X + row * x_t)",
    "slot * s_s is not computed in int64": "slot = tl.arange(0, 4)\nx = tl.load(X + slot * s_s)",
    "x_b * z is not computed in int64": "z = tl.program_id(0)\nx = tl.load(X + x_b * z)",
    "mixes a scalar and a block mask": "z = tl.program_id(0)\nn = tl.arange(0, 4)\nm = (z < 3) & (n < 2)",
    "import not allowed: import os": "import os",
    "import not allowed: from hsgen import paths": "from hsgen import paths",
}


@pytest.mark.parametrize("message", BROKEN)
def test_planted_violation_is_found(message):
    body = "\n    ".join(BROKEN[message].splitlines())
    found = lint(f"def kernel(X, a, b, n, x_t, x_b):\n    {body}\n")
    assert len(found) == 1 and message in found[0]


CLEAN = (
    "x = tl.load(X + n)",
    "x = tl.load(X + n, mask=n < 3, other=0.0)",
    "row = tl.program_id(0).to(tl.int64)\nx = tl.load(X + row * x_t + 2 * x_b)",
    "rows = tl.arange(0, 4)\nx = tl.load(X + rows.to(tl.int64)[:, None] * x_t)",
    "z = tl.program_id(0)\nn = tl.arange(0, 4)\nm = (n + z < 3) & (n < 2)",
    "n = tl.arange(0, 4)\nm = (tl.max(n, 0) < 3) & (n < 2)",
    "tl.atomic_or(X, 1)",
    "tl.atomic_add(counts, 1)",
)


@pytest.mark.parametrize("body", CLEAN)
def test_clean_source_raises_no_alarm(body):
    text = "\n    ".join(body.splitlines())
    assert lint(f"def kernel(X, n, x_t, x_b):\n    {text}\n") == []


def test_driver_may_import_torch_and_its_kernels():
    text = "import torch\nfrom .nsa_attend import nsa_attend\n"
    assert lint(text, driver=True) == [] and len(lint(text)) == 2
