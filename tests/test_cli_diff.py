"""`hsgen diff`: what two specs mean, how they would run, and the code of both, side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hsgen import compare
from hsgen.cli import main
from hsgen.spec import load, parse
from hsgen.target import H100, MI300X

ROOT = Path(__file__).resolve().parent.parent
TINY = """\
hsgen: 1
name: tiny
heads: {query: 2, kv: 1}
head_dim: 16
causal: true
levels:
  - name: chunk
    partition: {blocks: 16}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: chunk}
"""
GATED = (
    TINY.replace("top_k: 2", "top_k: 4")
    + "  - {name: local, window: 32}\ncombine: {gates: input}\n"
)
POOLED = TINY.replace("keys: mean", "keys: max").replace("last: 1", "last: 2")
REWORDED = """\
# the same in other words
name: reworded   # a name
hsgen: 1
source: nobody, 2026
head_dim: {qk: 16, v: 16}
heads: {kv: 1, group_size: 2}
attend:
  - over: chunk
    name: selected
levels:
  - {name: chunk, partition: {blocks: 16}, pool: {keys: mean}, score: {form: dot},
     select: {force: {last: 1}, top_k: 2}}
"""


@pytest.fixture
def write(tmp_path):
    """The path of a spec with this text."""

    def make(text, name="other"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    return make


def compared(a, b, target=H100):
    return compare.compare(parse(a, "a"), parse(b, "b"), target)


def ran(capsys, *argv, status):
    assert main(["diff", *argv]) == status
    return capsys.readouterr()


# --- what it says


def test_text_is_golden(write, capsys, golden):
    out, err = ran(capsys, write(TINY, "a"), write(POOLED, "b"), status=1)
    golden("diff/pooled.txt", out)
    assert not err
    out, _ = ran(capsys, write(TINY, "a"), write(GATED, "b"), status=1)
    values, code = out.split("\ncode\n")
    golden("diff/gated.txt", values)
    assert code.startswith(
        "+ attend_local.py\n--- a/attend_selected.py\n+++ b/attend_selected.py\n@@"
    )


def test_words_make_no_difference(write, capsys):
    out, _ = ran(capsys, write(TINY, "a"), write(REWORDED, "b"), status=0)
    assert out.splitlines()[1:] == ["they mean the same"]
    assert out.startswith("tiny (")
    found = compared(TINY, REWORDED)
    assert (found.graph, found.plan, found.code) == ((), (), ())
    assert found.a.sources == found.b.sources


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("top_k: 2", "top_k: 4", "~ %chunk.selection: k 2 -> 4, width 2 -> 4"),
        ("last: 1", "last: 2", "~ %chunk.selection: last 1 -> 2"),
        ("causal: true", "causal: false", "~ causal: True -> False"),
        ("keys: mean", "keys: max", "~ %chunk.keys: how mean -> max"),
        ("query: 2", "query: 4", "~ size Hq: 2 -> 4"),
        ("chunk", "part", "- output selection chunk: %chunk.selection"),
        ("selected", "chosen", "+ output lse chosen: %chosen.lse"),
    ],
)
def test_every_meaning_is_seen(before, after, change):
    found = compared(TINY, TINY.replace(before, after))
    assert change in map(str, found.graph)
    assert not found.same


def test_the_other_way_round_additions_are_removals():
    there, back = compared(TINY, GATED), compared(GATED, TINY)
    turned = {"added": "removed", "removed": "added", "changed": "changed"}
    for name in ("graph", "plan"):
        ours, theirs = (getattr(side, name) for side in (there, back))
        assert {(c.name, turned[c.how]) for c in ours} == {(c.name, c.how) for c in theirs}
    assert {(c.file, turned[c.how]) for c in there.code} == {(c.file, c.how) for c in back.code}


def test_diffs_are_of_the_files():
    found = compared(TINY, GATED)
    assert {"changed", "added"} == {change.how for change in found.code}
    for change in found.code:
        lines = change.diff.splitlines()[2:]
        assert {line[1:] for line in lines if line[0] in "- "} <= {
            *found.a.sources.get(change.file, "").splitlines()
        }
        assert {line[1:] for line in lines if line[0] in "+ "} <= {
            *found.b.sources.get(change.file, "").splitlines()
        }


def test_json_has_graph_plan_and_code(write, capsys):
    argv = [write(TINY, "a"), write(GATED, "b"), "--json", "--target", "gfx942"]
    said = json.loads(ran(capsys, *argv, status=1).out)
    assert (said["schema_version"], said["same"]) == (1, False)
    assert said["target"] == {"name": "mi300x", "arch": "gfx942"}
    assert said["a"] == {"name": "tiny", "digest": parse(TINY, "a").digest, "problem": None}
    graph = {change["name"]: change for change in said["graph"]}
    assert graph["%chunk.selection"]["fields"]["k"] == ["2", "4"]
    assert graph["%local.o"]["how"] == "added"
    plan = {change["name"]: change for change in said["plan"]}
    assert plan["launch attend_local"]["how"] == "added"
    assert plan["buffer made_chunk_selection"]["fields"]["value"] == [
        "i32[B, T, 2, 2]",
        "i32[B, T, 2, 4]",
    ]
    code = {change["file"]: change for change in said["code"]}
    assert code["attend_local.py"] == {"file": "attend_local.py", "how": "added", "diff": ""}
    diff = code["rank_chunk.py"]["diff"]
    assert diff.startswith("--- a/rank_chunk.py\n+++ b/rank_chunk.py\n@@")
    assert "-    wanted = 2\n+    wanted = 4\n" in diff


def test_a_target_changes_the_plans_not_the_meaning():
    ours, theirs = (compared(TINY, GATED, target) for target in (H100, MI300X))
    assert ours.graph == theirs.graph
    assert "for mi300x (gfx942), bf16" in str(theirs)


def test_open_heads_may_be_given(write, capsys):
    text = TINY.replace("heads: {query: 2, kv: 1}\nhead_dim: 16\n", "")
    more = text.replace("top_k: 2", "top_k: 4")
    files = [write(text, "a"), write(more, "b")]
    assert "no plan for a: Hq is not known" in ran(capsys, *files, status=1).out
    out = ran(capsys, *files, "--heads", "4/2", "--head-dim", "16", status=1).out
    assert "no plan" not in out
    assert "made_chunk_selection: i32[B, T, 4, 2] -> i32[B, T, 4, 4]" in out


def test_what_no_kernel_does_is_said_and_graphs_are_compared(write, capsys):
    text = TINY.replace("{form: dot}", "{form: dot, share: all, reduce: max}")
    text = text.replace("    pool:", "    query: {block: 16, pool: mean}\n    pool:")
    out, _ = ran(capsys, write(TINY, "a"), write(text, "b"), status=1)
    assert "+ %chunk.reduced: reduce(share=all, how=max)" in out
    message = (
        "no plan for b: level chunk: no kernel reduces scores of blocks of rows over all heads yet"
    )
    assert message in out
    assert "no plan for a" not in out
    assert "@@" not in out
    ran(capsys, write(text, "a"), write(text, "b"), status=0)


# --- status 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["moba", "mobba"], "did you mean 'moba'?"),
        (["moba", str(ROOT / "tests" / "errors" / "HS011_duplicate_key.yaml")], "error[HS011]"),
        (["moba", "nsa", "--heads", "8/2"], "heads: expected"),
        (["moba", "nsa", "--target", "h1000"], "did you mean 'h100'?"),
        (["moba"], "Missing argument"),
    ],
)
def test_errors_are_status_2(argv, words, capsys):
    out, err = ran(capsys, *argv, status=2)
    assert not out
    assert words in " ".join(err.replace("│", " ").split())


# --- where it runs


def test_colours_are_for_terminals(write, capsys, monkeypatch):
    files = [write(TINY, "a"), write(GATED, "b")]
    plain = ran(capsys, *files, status=1).out
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = ran(capsys, *files, status=1).out
    assert "\x1b[33m~ %chunk.selection: k 2 -> 4" in shown
    assert "\x1b[31m-" in shown
    assert "\x1b[32m+" in shown
    text = "".join(part.partition("m")[2] for part in f"\x1b[m{shown}".split("\x1b["))
    assert text == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert ran(capsys, *files, status=1).out == plain


def test_it_needs_neither_torch_nor_triton_and_no_cache(tmp_path):
    code = (
        "import sys; from hsgen.cli import main; status = main(['diff', 'nsa', 'moba']);"
        "heavy = {'torch', 'triton', 'optuna'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy or status != 1 else 0)"
    )
    environment = {"HSGEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["hisa", "moba", "nsa"])
def test_a_spec_is_equal_to_itself(name):
    assert compare.compare(load(name), load(name), H100).same
