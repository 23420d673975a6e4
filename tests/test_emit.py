"""Emitted text: golden, formatted, readable, and decided by nothing but the graph."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import emitted
import plan_cases
import pytest
import torch
from conformance import systems
from plan_cases import GATES, OWN_WINDOW, POOLED, SELECTED, Attend, compressed, mapped, top

from hsgen import allowlist, emit, schedule
from hsgen.errors import PlanError
from hsgen.graph import Node
from hsgen.plan import Cached
from hsgen.reference import reference
from hsgen.spec import HeadDim, dump, load, parse
from hsgen.target import A100, H100, MI300X
from hsgen.trees import TreesContext

CACHED = ("nsa", "quest", "hisa", "minimax_m3", "glm_kpool", "deepseek_hca")
RUFF = [sys.executable, "-m", "ruff"]
ISOLATED = ("--isolated", "--no-cache", "--line-length=100", "--target-version=py311")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))


# --- text


@pytest.mark.parametrize("name", [*systems.STRUCTURES, "sparse_mla"])
def test_sources_are_golden(name, golden):
    for file, text in emitted.sources(emitted.shipped_plan(name)).items():
        golden(f"{name}/{file}", text)


@pytest.mark.parametrize("name", systems.FILES)
def test_no_golden_file_is_left_over(name):
    folder = Path(__file__).parent / "golden" / name
    kept = set(emitted.sources(emitted.shipped_plan(name))) if name in systems.STRUCTURES else set()
    assert {path.name for path in folder.glob("*.py")} == kept


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_an_amd_card_gets_the_same_text_in_its_own_precision(name):
    """Its compiler knows no three passes of TF32, and its dots of float32 need none."""
    graph = emitted.graph(systems.load(name))
    ours = emitted.sources(schedule.schedule(graph, emitted.SIXTEEN, "bf16"))
    plan = schedule.schedule(graph, MI300X, "bf16")
    theirs = emitted.sources(plan)
    assert any('input_precision="ieee"' in text for text in theirs.values())
    for file, text in ours.items():
        if file != "driver.py":  # it has the tiles that each kernel starts from
            assert text.replace("tf32x3", "ieee").replace("sm_90", "gfx942") == theirs[file]
    assert all(kernel.config.num_warps <= MI300X.max_warps_per_block for kernel in plan.kernels)


def plans():
    """Plans of the shipped specs and of every small case that has one, bf16 and fp32; some behind caches."""
    for name in emitted.SHIPPED:
        yield f"shipped_{name}", emitted.shipped_plan(name)
    for name in CACHED:
        graph = emitted.graph(systems.load(name))
        for cached in (
            Cached(rows="few"),
            Cached(rows="few", page=16),
            Cached(rows="many", page=64),
        ):
            plan = schedule.schedule(graph, H100, "bf16", None, cached)
            yield f"{name}_{cached.rows}_{cached.page}", plan
    for case in plan_cases.CASES:
        for qk, v in ((16, 16), (80, 96)):
            wide = case.model_copy(update={"head_dim": HeadDim(qk=qk, v=v)})
            if wide.index:
                index = wide.index.model_copy(update={"dim": 16})
                wide = wide.model_copy(update={"index": index})
            try:
                yield f"{case.name}_{qk}", schedule.schedule(emitted.graph(wide), H100, "fp32")
            except PlanError:
                continue


def test_everything_emitted_is_formatted_and_defined(tmp_path):
    count = 0
    for name, plan in plans():
        for file, text in emitted.sources(plan).items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
            count += 1
    assert count > 100
    for command in (["format", "--check"], ["check", "--select=F"]):
        done = subprocess.run(
            [*RUFF, *command, *ISOLATED, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_every_file_is_allowed_to_be_imported(name):
    allowlist.check(emitted.sources(emitted.shipped_plan(name)))


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_header_has_four_lines_and_nothing_of_here_and_now(name):
    for file, text in emitted.sources(emitted.shipped_plan(name)).items():
        if file == "__init__.py":
            continue
        lines = text.splitlines()
        assert [line.split()[1] for line in lines[:4]] == [
            "Generated",
            "spec",
            "template",
            "target",
        ]
        assert lines[4].startswith('"""')
        assert not re.search(r"20\d\d-\d\d|/home|/root|/work|/tmp", text)


def test_no_control_line_or_expression_survives():
    for _, plan in plans():
        for text in emitted.sources(plan).values():
            assert not re.search(r"\{\{|\}\}|\{%|#%|\bUndefined\b", text)


# --- what the text depends on


def spec_text(name):
    return dump(load(name))


def test_comments_and_spaces_in_the_spec_change_nothing():
    text = spec_text("nsa")
    noisy = "# a comment\n" + text.replace("\n", "   # and another\n\n")
    plain, other = parse(text), parse(noisy)
    assert plain.digest == other.digest
    assert emitted.sources(schedule.schedule(emitted.graph(plain), H100), plain.digest) == (
        emitted.sources(schedule.schedule(emitted.graph(other), H100), other.digest)
    )


def test_a_name_is_in_headers_and_docstrings_only():
    spec = load("nsa")
    other = spec.model_copy(update={"name": "another"})
    ours = emitted.sources(emitted.shipped_plan("nsa"))
    theirs = emitted.sources(schedule.schedule(emitted.graph(other), H100))
    for file, text in ours.items():
        if file not in ("driver.py", "__init__.py"):
            assert emitted.body(text) == emitted.body(theirs[file])
    assert ours["driver.py"].replace("nsa", "another") == theirs["driver.py"]


def test_source_of_a_spec_reaches_no_code():
    hostile = 'x"""; import os  #\n{{ 7 * 7 }} {% raw %}'
    spec = load("moba").model_copy(update={"source": hostile})
    plan = schedule.schedule(emitted.graph(spec), H100)
    assert emitted.sources(plan) == emitted.sources(emitted.shipped_plan("moba"))


@pytest.mark.parametrize("name", ["nsa; import os", "../up", 'a"', "class", "é́\u202e", ""])
def test_only_identifiers_are_names(name):
    text = spec_text("moba").replace("name: moba", f"name: {name!r}", 1)
    with pytest.raises(Exception, match="name"):
        parse(text)


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_tuning_and_target_change_no_kernel(name):
    """But for units of e4m3, which A100 has not, and sums of heads, which may be beyond fp16."""
    graph = emitted.graph(systems.load(name))
    ours = emitted.sources(schedule.schedule(graph, emitted.SIXTEEN, "bf16"))
    plan = schedule.schedule(graph, A100, "fp16")
    theirs = emitted.sources(plan)
    for kernel in plan.kernels:
        file = f"{kernel.name}.py"
        sums = isinstance(kernel.context, TreesContext) and kernel.context.how == "sift"
        assert (emitted.body(ours[file]) == emitted.body(theirs[file])) != sums


@pytest.mark.parametrize("name", emitted.SHIPPED)
def test_pieces_are_those_that_are_called(name):
    for file, text in emitted.sources(emitted.shipped_plan(name)).items():
        defined = re.findall(r"^def (\w+)\(", text, re.M)
        assert len(defined) == len(set(defined)), file
        for piece in set(defined) & set(emit.library()):
            assert len(re.findall(rf"\b{piece}\b", text)) > 1, f"{file}: {piece} is not called"


# --- the graph is what is compiled


def nsa(levels, attend):
    """A small NSA."""
    sizes = {"head_dim": HeadDim(qk=16, v=16), "combine": GATES}
    return plan_cases.spec("small", levels, attend, **sizes)


BRANCHES = [POOLED, SELECTED, OWN_WINDOW]
BLOCKS = mapped("overlap_sum", k=4)
BEFORE = nsa([compressed(4, 2), BLOCKS], BRANCHES)
FORCED = BLOCKS.model_copy(update={"select": top(4, last=1)})
WIDER = Attend(name="window", window=9, kv="window")
EDITS = {
    "select": (nsa([compressed(4, 2), mapped("overlap_sum", k=5)], BRANCHES), "block.selection"),
    "force": (nsa([compressed(4, 2), FORCED], BRANCHES), "block.selection"),
    "map": (nsa([compressed(4, 2), mapped("sum", k=4)], BRANCHES), "block.mapped"),
    "window": (nsa([compressed(4, 2), BLOCKS], [*BRANCHES[:2], WIDER]), "window.o"),
}
CHANGED = {
    "select": {"rank_block.py", "index_selected.py", "attend_selected.py", "driver.py"},
    "force": {"rank_block.py"},
    "map": {"score_block.py", "rank_block.py", "driver.py"},
    "window": {"attend_window.py"},
}


def edited(edit) -> tuple:
    """The graph of BEFORE with one node exchanged by hand, and a spec that means the same."""
    spec, name = EDITS[edit]
    ours = emitted.graph(BEFORE)
    node: Node = ours[name]
    assert node.op != emitted.graph(spec)[name].op
    return ours.replacing(replace(node, op=emitted.graph(spec)[name].op)), spec


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_graph_changes_the_kernels_concerned(edit):
    graph, _ = edited(edit)
    ours = emitted.sources(schedule.schedule(emitted.graph(BEFORE), H100))
    theirs = emitted.sources(schedule.schedule(graph, H100))
    assert {file for file in ours if ours[file] != theirs[file]} == CHANGED[edit]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_graph_computes_what_it_says(edit):
    """The spec that is passed along stays the old one: only the graph is compiled."""
    graph, spec = edited(edit)
    given = emitted.tensors(BEFORE, 44)
    o, _, selection = emitted.run(emitted.compiled(graph, BEFORE), given)
    expected, before = reference(spec, given), reference(BEFORE, given)
    assert torch.equal(selection["block"], expected.selection["block"].indices)
    torch.testing.assert_close(o.double(), expected.o, rtol=1e-4, atol=1e-5)
    assert (o.double() - before.o).abs().amax() > 0.01
