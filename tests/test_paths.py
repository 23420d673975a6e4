"""Where data and cache are, in a checkout and in a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsgen import paths

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", ["templates", "specs", "tuned"])
def test_checkout_has_its_data(kind: paths.DataKind) -> None:
    assert paths.data_dir(kind) == ROOT / kind


def test_wheel_finds_what_it_holds(tmp_path: Path) -> None:
    """A wheel has the folders inside the package, and nothing beside it."""
    package = tmp_path / "hsgen"
    package.mkdir()
    for name in ("__init__.py", "paths.py"):
        shutil.copy(ROOT / "hsgen" / name, package)
    (package / "_data" / "specs").mkdir(parents=True)
    code = "from hsgen import paths; print(paths.data_dir('specs')); paths.data_dir('tuned')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(package / "_data" / "specs")
    assert "without its 'tuned' folder" in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HSGEN_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"HSGEN_CACHE_DIR": "~/b"}, "/home/me/b"),
        ({"HSGEN_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, "/x/hsgen"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/hsgen"),
        ({}, "/home/me/.cache/hsgen"),
    ],
)
def test_cache_follows_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HSGEN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert paths.cache_dir() == Path(expected)


def test_relative_cache_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSGEN_CACHE_DIR", "here")
    assert paths.cache_dir() == Path.cwd() / "here"
