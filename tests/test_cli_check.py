"""`hsgen check`: exit status, what goes where, and how quickly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paces import assert_takes

from hsgen.cli import main

ROOT = Path(__file__).resolve().parent.parent
NSA = str(ROOT / "specs" / "nsa.yaml")
BAD = str(ROOT / "tests" / "errors" / "HS011_duplicate_key.yaml")


def hsgen(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsgen", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_right_spec_is_said_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", NSA]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{NSA}: ok (nsa, 64/4 heads, 2 levels, 3 branches, digest ")
    assert not err


def test_mistakes_go_to_stderr_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", BAD, NSA]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(NSA)
    assert f"{BAD}:9:5: error[HS011]: duplicate key 'partition'" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("name", ["nothing.yaml", "nsaa", "."])
def test_unreadable_file_is_status_1(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name]) == 1
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["check"], ["chek", NSA], ["check", "--jsn", NSA]])
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Usage:" in err


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", NSA, BAD, "nsaa"]) == 2
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert not err
    assert result["schema_version"] == 1
    good, bad, missing = result["specs"]
    assert (good["ok"], good["name"], len(good["digest"])) == (True, "nsa", 64)
    assert [(d["line"], d["column"], d["code"]) for d in bad["diagnostics"]] == [
        (9, 5, "HS011"),
        (11, 24, "HS011"),
    ]
    assert "no shipped spec" in missing["error"]


def test_shipped_name_works_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "from hsgen.cli import main; sys.exit(main(['check', 'nsa']))",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_check_takes_half_a_second() -> None:
    assert_takes(0.5, lambda: hsgen("check", "nsa").check_returncode())


def test_check_loads_nothing_heavy() -> None:
    code = (
        "import sys; from hsgen.cli import main; status = main(['check', 'nsa']);"
        "heavy = {'torch', 'triton', 'numpy', 'networkx', 'jinja2', 'optuna'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_hsgen_loads_no_torch() -> None:
    code = "import sys, hsgen; hsgen.Spec; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
