"""Pruning without a GPU: classes of failures, points by their kernels, compilers that are remembered."""

import json
import textwrap
from concurrent.futures import Future
from dataclasses import replace

import pytest
from test_space import space_of

from hsgen import report, resources
from hsgen.cli import main
from hsgen.errors import HsgenError
from hsgen.pruning import Compiler, DryRun, binding, failure_of, least_registers
from hsgen.resources import CompileFailure, Compilers, Cost, Resources
from hsgen.spec import load
from hsgen.target import H100


def cost(**changes):
    known = {
        "registers": 64,
        "spill_bytes": 0,
        "shared_bytes": 1000,
        "tensor_columns": 0,
        "warps": 4,
    }
    return Cost(**{**known, **changes}, seconds=0.1, binary=b"x")


def outcome(**changes):
    made = cost(**changes)
    blocks, limit = resources.occupancy(
        registers=made.registers,
        shared_bytes=made.shared_bytes,
        tensor_columns=made.tensor_columns,
        warps=made.warps,
        target=H100,
    )
    return Resources(cost=made, blocks_per_sm=blocks, occupancy=0.5, limited_by=limit, cached=False)


class FakeCompilers:
    """Compiles by a formula: large merges spill, wide poolings do not fit, two warps never end."""

    def __init__(self):
        self.jobs = []

    def submit(self, job):
        self.jobs.append(
            (job.signature.function, dict(job.constants), job.num_warps, job.num_stages)
        )
        made = outcome()
        if job.signature.function == "merge_selected" and job.constants["BLOCK_R"] >= 64:
            made = outcome(spill_bytes=512)
        if job.constants.get("BLOCK_E") == 128:
            made = outcome(shared_bytes=300_000)
        if job.constants.get("BLOCK_D") == 16:
            made = CompileFailure(kind="error", message="CompilationError: at 3:4")
        if job.num_warps == 2:
            made = CompileFailure(kind="timeout", message="no answer in time")
        done = Future()
        done.set_result(made)
        return done


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    return Compiler(load("nsa"), space_of("nsa"), FakeCompilers())


@pytest.fixture
def merging(tmp_path, monkeypatch):
    """Of a spec with a part of few points."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    return Compiler(load("moba"), space_of("moba"), FakeCompilers())


def part_of(compiler, name):
    variant = compiler.space.variants[0]
    return variant, next(part for part in variant.parts if part.name == name)


@pytest.mark.parametrize(
    ("made", "kind", "said"),
    [
        (
            outcome(shared_bytes=300_000),
            "OVER_SMEM",
            "needs at least 300,000 bytes of shared memory",
        ),
        (outcome(warps=64), "OVER_LIMIT", "64 warps a block, the limit is 32"),
        (outcome(spill_bytes=1024), "SPILL", "spills 1,024 bytes a thread"),
        (CompileFailure(kind="timeout", message="late"), "COMPILE_TIMEOUT", "late"),
        (CompileFailure(kind="crash", message="killed by SIGSEGV"), "COMPILE_ERROR", "SIGSEGV"),
    ],
)
def test_classes_say_the_limit_that_binds(made, kind, said):
    found = failure_of("merge", made, H100)
    assert found is not None
    assert found.kind == kind
    assert said in found.message
    assert found.kernel == "merge"


def test_what_fits_has_no_failure():
    assert failure_of("merge", outcome(spill_bytes=16), H100) is None


def test_a_part_is_pruned_kernel_by_kernel(merging):
    variant, part = part_of(merging, "merge_selected")
    pruned = merging.prune(variant, part, budget=60)
    jobs = [job for job in merging.compilers.jobs if job[0] == "merge_selected"]
    assert len(jobs) == len(merging.compilers.jobs) == part.size == 32
    assert (pruned.kept, pruned.dropped, pruned.left) == (18, 14, 0)
    assert pruned.share == pytest.approx(14 / 32)
    assert pruned.record()["failures"] == {"COMPILE_TIMEOUT": 8, "SPILL": 6}
    assert "merge_selected: 18 points may run; rules drop 0, compilers 14 (44%)" in str(pruned)


def test_a_kernel_is_compiled_once_for_all_points(compiler):
    variant, part = part_of(compiler, "attend_selected")
    pruned = compiler.prune(variant, part, budget=60)
    jobs = [json.dumps(job) for job in compiler.compilers.jobs]
    assert len(jobs) == len(set(jobs)) < len(list(part.points(variant.start)))
    assert pruned.rules == part.size - len(list(part.points(variant.start)))
    index = [job for job in compiler.compilers.jobs if job[0] == "index_selected"]
    assert {job[1]["BLOCK_T"] for job in index} == {1, 2, 4, 8, 16}


def test_time_that_is_over_leaves_points(merging):
    variant, part = part_of(merging, "merge_selected")
    pruned = merging.prune(variant, part, budget=-1.0)
    assert (pruned.kept, pruned.dropped, pruned.left) == (0, 0, 32)
    assert "not looked at" in str(pruned)


def test_a_point_fails_with_its_kernels(compiler):
    space = compiler.space
    assert compiler.failure(space.start) is None
    assert compiler.failure(space.parse("rank_block.num_warps=2")).kind == "COMPILE_TIMEOUT"
    found = compiler.failure(space.parse("pool_compressed_keys.BLOCK_E=128"))
    assert found.kind == "OVER_SMEM"
    assert found.limit.startswith("pool_compressed_keys needs at least 300,000")
    assert least_registers(compiler.outcomes(space.start)) == 64 * len(space.start.configs)


def test_the_start_may_spill(compiler):
    class Spilling(FakeCompilers):
        def submit(self, job):
            done = Future()
            done.set_result(outcome(spill_bytes=4096))
            return done

    spilling = Compiler(load("nsa"), compiler.space, Spilling())
    assert spilling.failure(compiler.space.start) is None
    assert spilling.failure(next(compiler.space.neighbours(compiler.space.start))).kind == "SPILL"


def test_what_nothing_survives_says_what_binds():
    made = [failure_of("a", outcome(shared_bytes=n), H100) for n in (400_000, 300_000, 500_000)]
    assert binding(made) == [
        "OVER_SMEM 3: a needs at least 300,000 bytes of shared memory a block, the limit is 232,448"
    ]


FAKE = """
import base64, json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    open(LOG, "a").write("asked\\n")
    stages = request["options"]["num_stages"]
    if stages == 2:
        answer = {"error": "CompilationError: no"}
    elif stages == 3:
        time.sleep(60)
    elif stages == 4:
        sys.exit(3)
    else:
        answer = {"registers": 1, "scalar_registers": 0, "spill_bytes": 0, "shared_bytes": 0,
                  "tensor_columns": 0, "warps": 4, "seconds": 0.1,
                  "binary": base64.b64encode(b"x").decode()}
    print(json.dumps(answer), flush=True)
"""


def test_compilers_remember_what_failed(tmp_path, monkeypatch):
    """A refusal and a late compiler are not asked again; a dead one is, as the machine may be why."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(textwrap.dedent(FAKE).replace("LOG", repr(str(log))))
    monkeypatch.setattr(resources, "WORKER", (str(script),))
    made = Compiler(load("nsa"), space_of("nsa"), FakeCompilers())
    job = report.jobs(made.artifact(()))[-1]
    for turn, asked in ((1, 4), (2, 5)):
        with Compilers(2, timeout=1.0) as compilers:
            jobs = [replace(job, num_stages=n) for n in (1, 2, 3, 4)]
            found = [compilers.submit(each).result() for each in jobs]
        assert isinstance(found[0], Resources)
        assert [each.kind for each in found[1:]] == ["error", "timeout", "crash"], turn
        assert len(log.read_text().split()) == asked
    with Compilers(1, timeout=1.5) as compilers:  # more time than before
        assert compilers.submit(replace(job, num_stages=3)).result().kind == "timeout"
    assert len(log.read_text().split()) == 6


def test_a_dry_run_needs_no_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    command = ["tune", "moba", "--dry-run", "--only", "merge_selected", "--budget", "0"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("space of moba on h100 (sm_90), bf16: ")
    assert "merge_selected: BLOCK_R 1 2 4 8 16 32 64 128; num_warps 1 2 4 8" in out
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parts"][0]["part"] == "merge_selected"
    assert main(["tune", "moba", "--dry-run", "--only", "merges"]) == 1


def test_a_dry_run_prints():
    found = DryRun(space=space_of("moba").only(["merge_selected"]), parts=(), seconds=1.0)
    assert str(found).endswith("pruned without a GPU, in 1 s\n")


def test_wrong_budgets_are_refused(capsys):
    assert main(["tune", "nsa", "--budget", "soon"]) == 2
    assert "expected seconds" in capsys.readouterr().err


def test_unknown_kernels_are_refused():
    with pytest.raises(HsgenError, match="no kernel 'attend'"):
        space_of("nsa").only(["attend"])
