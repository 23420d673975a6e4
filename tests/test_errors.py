"""Each diagnostic has one fixture, a golden text, and is shown in one form."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from hsgen.errors import ArgumentError, Diagnostic, HsgenError, Span, SpecError, nearest, render
from hsgen.spec import parse

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = sorted((ROOT / "tests" / "errors").glob("HS*.yaml"))
CODE = re.compile(r'"(HS[0-9]{3})"')


def diagnose(path: Path) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse(path.read_bytes(), path.relative_to(ROOT).as_posix())
    return caught.value


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture_gives_its_golden_text(path: Path, request: pytest.FixtureRequest) -> None:
    shown = f"{diagnose(path)}\n"
    golden = path.with_suffix(".txt")
    if request.config.getoption("--update-golden", default=False):
        golden.write_text(shown, encoding="utf-8")
    assert shown == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture_shows_its_own_code(path: Path) -> None:
    error = diagnose(path)
    assert path.name[:5] in {diagnostic.code for diagnostic in error.diagnostics}
    assert all(diagnostic.span and diagnostic.help for diagnostic in error.diagnostics)


def test_codes_and_fixtures_are_the_same_set() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hsgen" / "spec").rglob("*.py")]
    in_code = {code for text in sources for code in CODE.findall(text)}
    assert in_code == {path.name[:5] for path in FIXTURES}
    assert len(FIXTURES) == len(in_code)


def test_goldens_have_their_yaml() -> None:
    texts = (ROOT / "tests" / "errors").glob("HS*.txt")
    assert {path.stem for path in texts} == {path.stem for path in FIXTURES}


def test_caret_stands_under_the_mistake() -> None:
    span = Span(file="a.yaml", line=12, column=3, length=4, text="  beem: 4")
    shown = render("unknown key 'beem'", code="HS012", span=span, help="did you mean 'beam'?")
    assert shown == (
        "a.yaml:12:3: error[HS012]: unknown key 'beem'\n"
        "   |\n"
        "12 |   beem: 4\n"
        "   |   ^^^^\n"
        "   = help: did you mean 'beam'?"
    )


@pytest.mark.parametrize(
    ("text", "column", "shown"),
    [
        ("\tx: 1", 2, "1 |  x: 1\n  |  ^"),
        ("名: x", 4, "1 | 名: x\n  |     ^"),
        ("\x1b[31mx", 6, "1 | \ufffd[31mx\n  |      ^"),
    ],
)
def test_excerpt_keeps_columns(text: str, column: int, shown: str) -> None:
    assert shown in render("wrong", span=Span(file="a", line=1, column=column, text=text))


def test_long_line_is_cut_around_the_mistake() -> None:
    span = Span(file="a", line=1, column=5001, length=3, text="x" * 5000 + "bad" + "y" * 5000)
    lines = render("wrong", span=span).splitlines()
    assert max(map(len, lines)) < 140
    start = lines[3].index("^")
    assert lines[2][start : start + 3] == "bad"


def test_diagnostics_are_sorted_by_place() -> None:
    spans = [Span(file="a", line=line, column=1) for line in (3, 1, 2)]
    error = SpecError([Diagnostic(code="HS000", message="m", span=span) for span in spans])
    assert [d.span.line for d in error.diagnostics if d.span] == [1, 2, 3]


def test_errors_survive_pickling() -> None:
    error = HsgenError("wrong", span=Span(file="a", line=1, column=1), help="do that")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    spec_error = diagnose(FIXTURES[10])
    assert str(pickle.loads(pickle.dumps(spec_error))) == str(spec_error)


def test_argument_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="expected"):
        raise ArgumentError("k: expected a tensor, got None")


def test_nearest_finds_slips_and_nothing_far() -> None:
    assert nearest("beem", ["beam", "top_k", "force"]) == "beam"
    assert nearest("fisrt", ["first", "last"]) == "first"
    assert nearest("dropout", ["beam", "top_k"]) is None
