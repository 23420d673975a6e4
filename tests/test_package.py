"""What is installed: hsgen and its data, from a checkout and from a wheel, in any folder."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import hsgen
from hsgen.cli import main

ROOT = Path(__file__).resolve().parent.parent
DATA = ("templates", "specs", "tuned")
FIND = "from hsgen import paths; print(*(paths.data_dir(kind) for kind in ('templates', 'specs', 'tuned')))"


def python(*arguments: str, cwd: Path) -> str:
    """Run Python without this checkout on its path, except through what is installed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built by what the test extra has installed: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet")
    python("-m", "pip", "wheel", *flags, "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def committed(kind: str) -> set[str]:
    """Files of a data folder, by their path in a checkout."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / kind).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_works_from_a_foreign_folder(wheel: Path, tmp_path: Path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ("--no-deps", "--no-compile", "--quiet", "--target", str(target))
    python("-m", "pip", "install", *flags, str(wheel), cwd=elsewhere)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); "
    assert python("-c", code + FIND, cwd=elsewhere).split() == [
        str(target / "hsgen" / "_data" / kind) for kind in DATA
    ]
    check = "import runpy; sys.argv[1:] = ['check', 'nsa']; runpy.run_module('hsgen', run_name='__main__')"
    assert python("-c", code + check, cwd=elsewhere).startswith("nsa: ok (nsa, ")


def test_wheel_holds_all_data_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    held = {
        name.removeprefix("hsgen/_data/")
        for name in names
        if name.startswith("hsgen/_data/") and "__pycache__" not in name
    }
    assert held == set().union(*(committed(kind) for kind in DATA))
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hsgen"}


def test_wheel_has_the_command_and_the_licence(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "hsgen = hsgen.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_checkout_works_from_a_foreign_folder(tmp_path: Path):
    found = python("-c", FIND, cwd=tmp_path).split()
    assert found == [str(ROOT / kind) for kind in DATA]
    assert python("-m", "hsgen", "check", "nsa", cwd=tmp_path).startswith("nsa: ok (nsa, ")


def test_command_is_installed():
    (entry,) = metadata.entry_points(group="console_scripts", name="hsgen")
    assert entry.load() is main


def test_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert hsgen.__version__ == project["version"]
    assert metadata.version("hsgen") == project["version"]


def test_torch_that_is_installed_stays():
    """What would make pip exchange it: an upper bound, or a triton that an old torch does not allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {one.split(";")[0].strip() for one in project["dependencies"]}
    assert {"torch>=2.6", "triton"} <= required
    assert not [one for one in required if any(sign in one for sign in ("==", "<", "~", "!"))]
