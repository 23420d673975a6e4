"""`hsgen compile`: modules, binaries, limits and verification, on a machine without a GPU."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from emitted import needs_amd
from paces import assert_takes

from hsgen import analysis, pipeline, report, resources, verify
from hsgen.cli import main
from hsgen.errors import PlanError
from hsgen.spec import load
from hsgen.target import H100, MI300X, RTX4090

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
FILES = {"pool_chunk_keys", "score_chunk", "rank_chunk", "index_selected", "attend_selected"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("compiled")
    (made / "tiny.yaml").write_text(TINY)
    return made


@pytest.fixture(scope="module")
def first(folder):
    """What the first compilation printed, as JSON; nothing is in the cache before."""
    argv = ("compile", "tiny.yaml", "--no-verify", "--json", "-o", folder)
    return json.loads(hsgen(folder, *argv).stdout)


@pytest.fixture
def tiny(folder, first):
    """The path of a small spec, which is compiled already."""
    return str(folder / "tiny.yaml")


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    """One cache for all these tests."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(folder / "cache"))


def hsgen(folder, *argv, status=0):
    """Run the command in a process of its own."""
    environment = os.environ | {"HSGEN_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hsgen", *map(str, argv)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done


def good(*_, **__):
    case = verify.Case(name="shrunk", outcome="passed", seconds=0.1)
    return verify.Report(spec="tiny", shrunk="heads 2/2", cases=(case,), seconds=0.1)


def wrong(*_, **__):
    case = verify.Case(name="shrunk", outcome="failed", problems=("o: row [0] is off by 1",))
    return verify.Report(spec="tiny", shrunk="heads 2/2", cases=(case,), seconds=0.1)


# --- what it says


def test_json_has_every_kernel(first, folder):
    assert (first["schema_version"], first["ok"], first["spec"]) == (1, True, "tiny")
    assert first["target"] == {"name": "h100", "arch": "sm_90"}
    assert first["directory"] == str(folder / "tiny")
    kernels = {kernel["name"]: kernel for kernel in first["kernels"]}
    assert set(kernels) == FILES
    for kernel in kernels.values():
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared_bytes"] <= H100.smem_per_block
        assert 0 < kernel["occupancy"] <= 1
        assert kernel["limit_seconds"] > 0
    assert kernels["rank_chunk"]["bound"] == "memory"
    assert first["verification"] is None


def test_table_on_stdout_and_nothing_on_stderr(first, folder):
    done = hsgen(folder, "compile", "tiny.yaml", "--no-verify")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny for h100 (sm_90), bf16: 5 kernels in ")
    directory = Path(lines[1].removeprefix("in "))
    assert (directory / "driver.py").exists()
    assert directory.is_relative_to(folder / "cache")
    assert [line.split()[0] for line in lines[4:9]] == [k["name"] for k in first["kernels"]]
    assert "not verified" in lines
    assert max(map(len, lines)) <= 110
    assert not done.stderr


def test_verified_cases_are_listed(tiny, monkeypatch, capsys):
    monkeypatch.setattr(verify, "verify", good)
    assert main(["compile", tiny]) == 0
    assert "verified tiny: 1 of 1 calls right" in capsys.readouterr().out


def test_wrong_kernels_are_status_1(tiny, monkeypatch, capsys):
    monkeypatch.setattr(verify, "verify", wrong)
    assert main(["compile", tiny]) == 1
    assert "o: row [0] is off by 1" in capsys.readouterr().out
    assert main(["compile", tiny, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert result["verification"]["cases"][0]["problems"] == ["o: row [0] is off by 1"]


def test_progress_is_told(tiny, monkeypatch):
    """Of what is not known already: here of one kernel, as if it were new."""
    told, asked, recall = [], [], resources._recall

    def forget_one(key):
        asked.append(key)
        return recall(key) if key != asked[0] else None

    monkeypatch.setattr(resources, "_recall", forget_one)
    report.report(load(tiny), H100, verified=False, progress=lambda *what: told.append(what))
    assert told == [("compiling", 1, 1)]
    assert len(asked) == 5


# --- files


def test_output_is_a_package_with_its_binaries(first, folder):
    names = {path.name for path in (folder / "tiny").iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "driver.py"} | {
        f"{name}.{suffix}" for name in FILES for suffix in ("py", "sm_90.cubin")
    }
    for kernel in first["kernels"]:
        assert Path(kernel["binary"]).read_bytes()[:4] == b"\x7fELF"


def test_output_runs_without_hsgen(first, folder):
    """An importer that knows nothing of hsgen, and a call of the driver in the interpreter."""
    code = """
import sys
sys.modules["hsgen"] = None
import torch
from types import SimpleNamespace
from tiny import driver
torch.manual_seed(0)
x = {name: torch.randn(1, 24, heads, 16) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
table = torch.tensor([[0, 0, 24, 0, 0, 24]], dtype=torch.int32)
batch = SimpleNamespace(table=table, sequences=1, rows=24, keys=24, packed=False)
o, lse, chosen = driver.forward(x, batch, driver.CONFIG)
assert set(lse) == {"selected"} and set(chosen) == {"chunk"}
every = [x[name].transpose(1, 2).expand(1, 2, 24, 16) for name in "qkv"]
dense = torch.nn.functional.scaled_dot_product_attention(*every, is_causal=True)
torch.testing.assert_close(o, dense.transpose(1, 2), rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_amd
def test_an_amd_card_gets_binaries_of_its_own(folder, tmp_path, monkeypatch, capsys):
    argv = ["compile", str(folder / "tiny.yaml"), "--target", "gfx942", "--no-verify"]
    assert main([*argv, "--json", "-o", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["target"] == {"name": "mi300x", "arch": "gfx942"}
    assert {kernel["name"] for kernel in said["kernels"]} == FILES
    for kernel in said["kernels"]:
        assert Path(kernel["binary"]).name == f"{kernel['name']}.gfx942.hsaco"
        assert b"amdgcn-amd-amdhsa--gfx942" in Path(kernel["binary"]).read_bytes()
        assert 0 < kernel["registers"] <= 512
        assert 0 < kernel["scalar_registers"] <= 112
        assert kernel["shared_bytes"] <= MI300X.smem_per_block
        assert 0 < kernel["occupancy"] <= 1
        assert kernel["limit_seconds"] > 0
    monkeypatch.syspath_prepend(tmp_path)
    assert set(importlib.import_module("tiny.driver").CONFIG) == FILES
    assert main(argv) == 0
    assert "tiny for mi300x (gfx942), bf16: 5 kernels in " in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_status_1(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compile", "moba", "--no-verify", "-o", str(tmp_path / "file")]) == 1
    assert (
        f"cannot write to {tmp_path / 'file' / 'moba'}: Not a directory" in capsys.readouterr().err
    )


def test_second_time_comes_from_the_cache(first, folder):
    assert_takes(1.5, lambda: hsgen(folder, "compile", "tiny.yaml", "--no-verify"))


# --- what does not fit


def test_wrong_usage_is_status_2(capsys):
    assert main(["compile", "moba", "--target", "1080ti"]) == 2
    assert "unknown target '1080ti'" in capsys.readouterr().err


def test_wrong_spec_is_status_2(capsys):
    bad = ROOT / "tests" / "errors" / "HS011_duplicate_key.yaml"
    assert main(["compile", str(bad)]) == 2
    assert "error[HS011]" in capsys.readouterr().err


def test_what_the_scheduler_cannot_fit_is_refused(monkeypatch, capsys):
    tiny = replace(RTX4090, smem_per_block=4096)
    with pytest.raises(PlanError, match="score_chunk cannot run .* the limit is 4,096"):
        report.report(load("moba"), tiny, verified=False)


def test_what_the_compiler_says_does_not_fit_is_refused(tiny):
    """The smallest tile is tried too: its need is the one that is named."""
    artifact = pipeline.compile_spec(load(tiny), H100)
    kernel = artifact.plan.kernel("score_chunk")
    (job,) = [job for job in report.jobs(artifact) if job.signature.function == "score_chunk"]
    (found,) = resources.measure([job])
    for limit, words in (
        (512, r"score_chunk \(for %chunk.score\) cannot run .* at least [\d,]+ bytes .* 512"),
        (found.cost.shared_bytes - 1, r"as configured"),
    ):
        target = replace(H100, smem_per_block=limit)
        (outcome,) = resources.measure([replace(job, target=target)])
        with pytest.raises(PlanError, match=words):
            report._fitting(kernel, replace(job, target=target), outcome)
    assert report._fitting(kernel, job, found) is found


# --- specialisation and limits


def test_strides_are_specialised_as_at_run_time():
    artifact = pipeline.compile_spec(load("nsa"), H100)
    jobs = {job.signature.function: job for job in report.jobs(artifact)}
    attend = {p.name: p for p in jobs["attend_selected"].signature.parameters}
    assert all(attend[name].divisible for name in ("Q", "q_t", "k_h", "v_t", "o_h"))
    assert (attend["g_t"].divisible, attend["g_h"].divisible) == (True, False)
    assert {name: jobs["attend_selected"].constants[name] for name in ("g_c", "lse_t")} == {
        "g_c": 1,
        "lse_t": 1,
    }


@pytest.mark.parametrize("name", ["moba", "nsa", "hisa"])
def test_work_of_kernels_adds_up_to_that_of_the_graph(name):
    """Each operator's arithmetic is in one kernel; fusion only saves bytes."""
    artifact = pipeline.compile_spec(load(name), H100)
    costs = analysis.costs(artifact.graph).values()
    kernels = [each for each in artifact.plan.kernels if each.skeleton != "index"]  # only sorts
    work = [report.work(artifact.graph, artifact.plan, each) for each in kernels]
    total = sum(cost.flops.evaluate(report.TOKENS) for cost in costs)
    assert sum(flops for flops, _ in work) == pytest.approx(total)
    alone = sum(cost.bytes.evaluate(report.TOKENS) for cost in costs)
    least = analysis.must_move(artifact.graph).evaluate(report.TOKENS)
    assert least <= sum(moved for _, moved in work) <= alone


def test_an_attend_moves_its_tensors_once():
    artifact = pipeline.compile_spec(load("moba"), H100)
    kernel = artifact.plan.kernel("attend_selected")
    tensor = report.TOKENS * 32 * 128 * 2
    small = report.TOKENS * 32 * 4 * (3 + 1)  # the selection and the log-sum-exp
    assert report.work(artifact.graph, artifact.plan, kernel)[1] == 4 * tensor + small


def test_units_are_those_of_the_dots():
    artifact = pipeline.compile_spec(load("nsa"), H100)
    units = {k.name: report.math_type(k, "bf16") for k in artifact.plan.kernels}
    wide = {k.name: report.math_type(k, "fp32") for k in artifact.plan.kernels}
    for name in ("attend_selected", "attend_compressed", "pool_compressed_keys", "score_block"):
        assert (units[name], wide[name]) == ("bf16", "tf32x3"), name
    assert units["rank_block"] == "fp32"
