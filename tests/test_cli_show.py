"""`hsgen show`: the graph, the plan, and both for machines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conformance import systems
from shares import third

from hsgen.cli import main

ROOT = Path(__file__).resolve().parent.parent
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
OPEN = """\
hsgen: 1
name: open
causal: true
levels:
  - name: chunk
    partition: {blocks: 64}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 3, force: {last: 1}}
attend:
  - {name: selected, over: chunk}
"""


def shown(capsys, *argv):
    assert main(["show", *argv]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


@pytest.fixture
def open_spec(tmp_path):
    """A spec that leaves heads and head dims to the caller."""
    path = tmp_path / "open.yaml"
    path.write_text(OPEN)
    return str(path)


@pytest.mark.parametrize("path", third(SPECS), ids=lambda path: path.stem)
def test_text_is_graph_then_plan_then_memory(path, capsys):
    out = shown(capsys, str(path))
    graph = (ROOT / "tests" / "golden" / path.stem / "graph.txt").read_text()
    if path.stem in systems.REFUSED | systems.LAYERS | systems.STREAMS | systems.STEPS:
        assert out.startswith(f"{graph}\nno plan: ")
        assert f"({path}:" in out
        return
    plan = (ROOT / "tests" / "golden" / path.stem / "plan.txt").read_text()
    assert out.startswith(f"{graph}\n{plan}\nbytes that one call allocates, batch 1, S = T\n")
    assert max(map(len, plan.splitlines())) <= 120


def test_target_and_dtype_change_the_plan_only(capsys):
    ours = shown(capsys, "moba")
    theirs = shown(capsys, "moba", "--target", "4090", "--dtype", "fp32")
    graph, _, plan = theirs.partition("\nplan moba for sm_89, fp32: 8 launches\n")
    assert ours.startswith(f"{graph}\nplan moba for sm_90, bf16: 8 launches\n")
    assert "BLOCK_N=32" in plan


def test_json_has_graph_and_plan(capsys):
    result = json.loads(shown(capsys, "nsa", "--json"))
    assert result["schema_version"] == 1
    assert result["problem"] is None
    graph, plan = result["graph"], result["plan"]
    assert graph["causality"] == "token"
    assert [each["name"] for each in graph["inputs"]][:3] == ["q", "k", "v"]
    nodes = {node["name"]: node for node in graph["nodes"]}
    assert nodes["block.selection"]["attributes"]["k"] == 16
    assert nodes["block.selection"]["operands"] == ["block.mapped"]
    assert nodes["window.o"]["flops"][-1]["t1"] > 0
    launched = [launch["kernel"] for step in plan["steps"] for launch in step["launches"]]
    assert sorted(launched) == sorted(kernel["name"] for kernel in plan["kernels"])
    follows = {kernel["name"]: kernel["follows"] for kernel in plan["kernels"]}
    assert follows["rank_block"] == "score_block"


def test_open_heads_are_said_and_may_be_given(open_spec, capsys):
    out = shown(capsys, open_spec)
    assert "costs: known once Hq, Hkv" in out
    assert "no plan: Hq is not known: give `heads`" in out
    assert json.loads(shown(capsys, open_spec, "--json"))["plan"] is None
    bound = shown(capsys, open_spec, "--heads", "8/2", "--head-dim", "64")
    assert "buffer made_selected_o = input[B, T, 8, 64]" in bound


def test_what_no_kernel_does_is_said_below_the_graph(tmp_path, capsys):
    text = OPEN.replace("{form: dot}", "{form: dot, share: all, reduce: max}")
    text = text.replace("    pool:", "    query: {block: 64, pool: mean}\n    pool:")
    (tmp_path / "all.yaml").write_text(text)
    out = shown(capsys, str(tmp_path / "all.yaml"), "--heads", "8/2", "--head-dim", "64")
    assert "%chunk.selection" in out
    assert (
        "no plan: level chunk: no kernel reduces scores of blocks of rows over all heads yet" in out
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nsa", "--target", "h1000"], "did you mean 'h100'?"),
        (["nsa", "--dtype", "fp8"], "fp8"),
        (["moba", "--heads", "8x2"], "expected one or two numbers"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_is_status_2(argv, words, capsys):
    assert main(["show", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert words in " ".join(err.replace("│", " ").split())


def test_heads_that_contradict_the_spec_are_refused(capsys):
    assert main(["show", "moba", "--heads", "8/2"]) == 1
    assert "heads" in capsys.readouterr().err


def test_wrong_spec_is_status_2(capsys):
    bad = ROOT / "tests" / "errors" / "HS011_duplicate_key.yaml"
    assert main(["show", str(bad)]) == 2
    assert "error[HS011]" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_triton_and_no_cache(tmp_path):
    code = (
        "import sys; from hsgen.cli import main; status = main(['show', 'nsa']);"
        "heavy = {'torch', 'triton', 'optuna'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy or status else 0)"
    )
    environment = {"HSGEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()
