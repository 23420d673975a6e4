"""`hsgen new`: a spec that starts from another, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shares import third

from hsgen.cli import main
from hsgen.errors import ArgumentError, HsgenError
from hsgen.spec import drafts, files, load, parse

SHIPPED = files.shipped()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("preset", third(SHIPPED, turn=1))
def test_only_the_name_changes(preset: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["new", "mine", "--from", preset]) == 0
    assert capsys.readouterr().out == f"mine.yaml: mine, which is {preset} until you change it\n"
    old, new = SHIPPED[preset].read_bytes(), (here / "mine.yaml").read_bytes()
    changed = [
        (one, other)
        for one, other in zip(old.split(b"\n"), new.split(b"\n"), strict=True)
        if one != other
    ]
    assert changed == [(f"name: {preset}".encode(), b"name: mine")]
    assert load("mine.yaml") == load(preset).model_copy(update={"name": "mine"})
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]


def test_only_the_name_changes_whatever_the_layout():
    Path("old.yaml").write_bytes(
        b'\xef\xbb\xbf# name: old\r\n{hsgen: 1, "name": "old", # name: old\r\n'
        b" attend: [{name: old, window: 4}]}"
    )
    assert drafts.draft("new", "old.yaml") == (
        '# name: old\r\n{hsgen: 1, "name": new, # name: old\r\n attend: [{name: old, window: 4}]}'
    )


def test_editors_are_told_of_a_schema(here: Path):
    (here / "specs").mkdir()
    assert main(["schema", "-o", "hsgen.schema.json"]) == 0
    given = ["--schema", "hsgen.schema.json", "-o", "specs/mine.yaml"]
    assert main(["new", "mine", "--from", "nsa", *given]) == 0
    first, *rest = (here / "specs" / "mine.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=../hsgen.schema.json"
    assert rest[0] == SHIPPED["nsa"].read_text().splitlines()[0]
    assert load("specs/mine.yaml").name == "mine"


def test_schema_that_is_not_there_or_cannot_be_said(capsys: pytest.CaptureFixture[str]):
    assert main(["new", "mine", "--from", "nsa", "--schema", "none.json"]) == 2
    assert "hsgen schema -o none.json" in " ".join(capsys.readouterr().err.split())
    Path("a b.json").write_text("{}")
    assert main(["new", "mine", "--from", "nsa", "--schema", "a b.json"]) == 1
    assert "without blanks" in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_what_is_there_stays(capsys: pytest.CaptureFixture[str]):
    Path("mine.yaml").write_text("mine")
    assert main(["new", "mine", "--from", "nsa"]) == 1
    assert "mine.yaml: expected no such file, got one" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"
    os.symlink("nowhere", "other.yaml")
    assert main(["new", "mine", "--from", "nsa", "-o", "other.yaml"]) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml", "other.yaml"]


@pytest.mark.parametrize("name", ["Mine", "class", "1st", "a-b", "", "x" * 49, 'a"b', "a\nb"])
def test_name_must_be_one(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["new", name, "--from", "nsa"]) == 2
    out, err = capsys.readouterr()
    assert "expected a name (a-z first" in " ".join(err.replace("│", " ").split())
    assert not out
    assert not list(Path().iterdir())
    with pytest.raises(ArgumentError):
        drafts.named(name)


def test_unknown_preset_gives_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["new", "mine", "--from", "nsaa"]) == 1
    assert "did you mean 'nsa'?" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_json_names_the_file(capsys: pytest.CaptureFixture[str]):
    assert main(["new", "mine", "--from", "moba", "--json"]) == 0
    shown = {"schema_version": 1, "file": "mine.yaml", "name": "mine", "from": "moba"}
    assert json.loads(capsys.readouterr().out) == shown


def test_half_a_file_is_never_seen(here: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever stops the writer, there is no file; and nothing else is left."""

    def full(*_: object, **__: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(HsgenError, match="cannot write: No space left"):
        drafts.write(here / "a.json", "text", over=True)
    assert not list(here.iterdir())
    with pytest.raises(HsgenError, match="cannot write"):
        drafts.write(here / "a.json", "x\ud800")  # no UTF-8 has it
    assert not list(here.iterdir())


def test_file_systems_without_links(here: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(*_: object):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    drafts.write(here / "a", "text")
    with pytest.raises(HsgenError, match="got one"):
        drafts.write(here / "a", "other")
    assert (here / "a").read_text() == "text"
    assert [path.name for path in here.iterdir()] == ["a"]


def test_preset_with_mistakes_is_refused(capsys: pytest.CaptureFixture[str]):
    Path("bad.yaml").write_text("hsgen: 1\nname: bad\n")
    assert main(["new", "mine", "--from", "bad.yaml"]) == 2
    assert "HS030" in capsys.readouterr().err
    assert parse("hsgen: 1\nname: ok\nattend: [{name: a, window: 1}]\n").name == "ok"
    assert not Path("mine.yaml").exists()
