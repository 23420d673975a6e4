"""Fixtures for all tests, and the choice between the CPU lane (Triton's interpreter) and the GPU."""

import os
import re
import sys


def _asks_for_gpu(arguments):
    """Whether the command line selects tests with `-m`, and those of the GPU lane."""
    text = " ".join(arguments)
    expression = re.search(r"(?:^| )-m[ =]?(.*?)(?= -|$)", text)
    chosen = expression.group(1) if expression else ""
    return bool(re.search(r"\bgpu\b", chosen)) and not re.search(r"\bnot gpu\b", chosen)


# pytest-xdist's workers do not get the command line, but they do get the environment
LANE = os.environ.setdefault(
    "HSGEN_TEST_LANE",
    "gpu"
    if _asks_for_gpu([*os.environ.get("PYTEST_ADDOPTS", "").split(), *sys.argv[1:]])
    else "cpu",
)
GPU_LANE = LANE == "gpu"
# Many small calls, and pytest-xdist has a process a core: threads would only wait for one another.
# Read where torch and numpy are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it where a kernel is decorated, so it must be set before any module with kernels.
if not GPU_LANE:
    os.environ["TRITON_INTERPRET"] = "1"

import zlib  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import sanitizer  # noqa: E402
import torch  # noqa: E402

if not GPU_LANE:
    sanitizer.fast.install()  # of all kernels, those without a sanitizer too
# the sanitizer is of the interpreter, which the GPU lane does not load
collect_ignore = ["test_sanitizer.py", "test_mutation.py"] if GPU_LANE else []
GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    """`--update-golden` rewrites golden files instead of comparing."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` run in the GPU lane only; those marked `slow` first: a worker would wait for one."""
    if GPU_LANE:
        return
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    skip = pytest.mark.skip(reason="GPU lane: pytest -m gpu")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed(request):
    """A number that depends on the test's name alone; torch's generator starts from it."""
    number = zlib.crc32(request.node.nodeid.encode()) & 0x7FFFFFFF
    # without a GPU, torch.manual_seed would note the whole stack for the day that there is one
    (torch if GPU_LANE else torch.default_generator).manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def poison():
    """Nothing in a test gets zeros from torch.empty by luck."""
    with sanitizer.poisoned_empty("nan"):
        yield


@pytest.fixture
def sanitized(seed):
    """Run the test's kernels under the sanitizer; gives its session."""
    with sanitizer.enabled(seed=seed) as session:
        yield session


@pytest.fixture
def golden(request):
    """golden("dir/file", text): compare with the committed file; a missing one is a failure."""

    def check(name, text):
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} is missing: pytest --update-golden writes it"
        assert text == path.read_text(encoding="utf-8"), f"{name} differs: pytest --update-golden"

    return check
