"""`hsgen tuned`: what records say, whether they hold, and how folders of them become one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from shares import covering
from tuned_records import RECORD, record

from hsgen import paths, pipeline, report, resources, tuned
from hsgen.cli import main
from hsgen.spec import load
from hsgen.target import H100
from hsgen.tuned import files

MOBA = load("moba")
POOL = "pool_chunk_keys"  # a small kernel


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a committed folder with nothing but the GPUs."""
    committed = tmp_path / "tuned"
    committed.mkdir()
    shutil.copy(paths.data_dir("tuned") / "gpus.yaml", committed)
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    for module in (files, tuned):
        monkeypatch.setattr(module, "committed", lambda: committed)
    return committed


def moba() -> tuned.Tuned:
    """A record of one kernel, as it starts and as it compiles."""
    artifact = pipeline.compile_spec(MOBA, H100)
    jobs = resources.call_jobs(artifact.plan, artifact.module, H100)
    names = [kernel.name for kernel in artifact.plan.kernels]
    (outcome,) = resources.measure([jobs[names.index(POOL)]])
    assert isinstance(outcome, resources.Resources), outcome
    choice = tuned.KernelChoice(
        text=artifact.module.texts[POOL],
        config=artifact.plan.kernel(POOL).config.keywords(),
        shared=outcome.cost.shared_bytes,
        registers=outcome.cost.registers,
        spills=outcome.cost.spill_bytes,
    )
    return record(
        problem=tuned.Problem.of(MOBA, "bf16"),
        environment=tuned.environment(H100),
        kernels={POOL: choice},
        alternates=(),
    )


def changed(made: tuned.Tuned, **changes: object) -> tuned.Tuned:
    return replace(made, kernels={POOL: replace(made.kernels[POOL], **changes)})


def checked(folder: Path) -> dict[str, object]:
    """What `check --json` says of a folder, beside its status."""
    found = tuned.check(tuned.read_folder(folder))
    return {
        "passed": found.passed,
        "statuses": [e.status for e in found.entries],
        "text": str(found),
    }


def test_what_a_search_compiles_is_what_a_check_compiles(folders: Path):
    """Of every kernel: a call's strides tell the compiler more than a plan does."""
    artifact = pipeline.compile_spec(MOBA, H100)
    outcomes = resources.measure(report.jobs(artifact))
    choices = {
        kernel.name: tuned.KernelChoice(
            text=artifact.module.texts[kernel.name],
            config=kernel.config.keywords(),
            shared=outcome.cost.shared_bytes,
            registers=outcome.cost.registers,
            spills=outcome.cost.spill_bytes,
        )
        for kernel, outcome in zip(artifact.plan.kernels, outcomes, strict=True)
        if isinstance(outcome, resources.Resources)
    }
    assert len(choices) == len(artifact.plan.kernels)
    tuned.write(folders, [replace(moba(), kernels=choices)])
    (entry,) = tuned.check(tuned.read_folder(folders)).entries
    assert entry.status == "ok", str(entry)


def test_a_record_that_compiles_as_it_says_is_stale_in_other_kernels_only(folders: Path):
    good = moba()
    bucket = [tuned.Bucket.of(1 << n, 1 << n, 1, False) for n in (10, 11, 12)]
    tuned.write(
        folders,
        [
            replace(good, bucket=bucket[0]),
            changed(replace(good, bucket=bucket[1]), shared=1 << 17),
            changed(replace(good, bucket=bucket[2]), text="00" * 12),
        ],
    )
    found = tuned.check(tuned.read_folder(folders))
    assert [entry.status for entry in found.entries] == ["stale", "broken", "stale"]
    assert not found.passed
    assert found.kernels == 2
    (broken,) = found.entries[1].broken
    assert broken.startswith(f"kernels.{POOL}.shared: expected ")
    assert f"{POOL} has another text since it was tuned" in found.entries[2].stale
    assert "3 records: 0 ok, 2 stale, 1 broken; 2 kernels compiled" in str(found)


COST = resources.Cost(
    registers=64,
    spill_bytes=0,
    shared_bytes=300_000,
    tensor_columns=0,
    warps=4,
    seconds=0,
    binary=b"",
)
OUTCOMES = {
    "does not compile: crash: it died": resources.CompileFailure(kind="crash", message="it died\n"),
    "cannot run: shared memory, 300,000 bytes shared": resources.Resources(
        cost=COST, blocks_per_sm=0, occupancy=0.0, limited_by="shared memory", cached=False
    ),
}


@pytest.mark.parametrize("words", OUTCOMES)
def test_what_the_compiler_refuses_is_broken(
    folders: Path, monkeypatch: pytest.MonkeyPatch, words: str
):
    artifact = pipeline.compile_spec(MOBA, H100)
    choice = tuned.KernelChoice(
        text=artifact.module.texts[POOL],
        config=artifact.plan.kernel(POOL).config.keywords(),
        shared=0,
        registers=64,
    )
    kept = record(
        problem=tuned.Problem.of(MOBA, "bf16"),
        environment=tuned.environment(H100),
        kernels={POOL: choice},
    )
    tuned.write(folders, [kept])
    monkeypatch.setattr(
        resources, "measure", lambda jobs, progress: [OUTCOMES[words] for _ in jobs]
    )
    (entry,) = tuned.check(tuned.read_folder(folders)).entries
    assert entry.broken == (f"{POOL} {words}",)


def test_values_that_a_kernel_cannot_have_are_broken(folders: Path):
    artifact = pipeline.compile_spec(MOBA, H100)
    choice = tuned.KernelChoice(
        text=artifact.module.texts[POOL],
        config={**artifact.plan.kernel(POOL).config.keywords(), "BLOCK_E": 1 << 20},
        shared=0,
        registers=64,
    )
    problem = tuned.Problem.of(MOBA, "bf16")
    tuned.write(folders, [record(problem=problem, kernels={POOL: choice})])
    found = tuned.check(tuned.read_folder(folders))
    assert found.kernels == 0
    assert found.entries[0].broken[0].startswith(f"{POOL}: expected one of BLOCK_E")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"problem__digest": "ab" * 32}, "stale", "no shipped nsa means the same"),
        ({"problem__spec": "no_such"}, "stale", "no shipped no_such means the same"),
        ({"environment__processors": 7}, "broken", "environment: gpus.yaml has"),
        ({"environment__gpu": "h900", "environment__sm": "sm_900"}, "stale", "means the same"),
    ],
)
def test_what_needs_no_compiler_is_judged_without_one(folders: Path, changes, status, words):
    tuned.write(folders, [record(**changes)])
    found = checked(folders)
    assert found["statuses"] == [status]
    assert words in str(found["text"])


def test_lines_must_be_sorted_and_of_one_key_each(folders: Path):
    (path,) = tuned.write(folders, [RECORD, record(bucket__keys=16)])
    first, second = path.read_text().splitlines()
    path.write_text(f"{second}\n{first}\n{first}\nnonsense\n")
    found = checked(folders)
    assert found["statuses"] == ["stale", "broken", "broken"]
    text = str(found["text"])
    assert "belongs before the line above it" in text
    assert "nsa.jsonl:4: not JSON" in text


SHIPPED = tuned.read_folder(paths.data_dir("tuned"))
FILES = sorted({f"{each.file.parent.name}/{each.file.stem}" for each in SHIPPED.kept})


def test_what_is_shipped_can_be_read():
    assert not SHIPPED.flaws
    names = "dsa dsa_gqa hisa moba nsa"
    assert {"h100/moba", *(f"h200/{name}" for name in names.split())} <= {*FILES}


@pytest.mark.parametrize("name", covering(FILES, every=3))
def test_what_is_shipped_holds(name: str):
    """The committed records: in their places, and every kernel compiles and fits its GPU."""
    kept = [x for x in SHIPPED.kept if f"{x.file.parent.name}/{x.file.stem}" == name]
    found = tuned.check(replace(SHIPPED, kept=tuple(kept)))
    assert len(found.entries) == len(kept) > 0
    assert found.passed, str(found)


# --- commands


def run(*words: str) -> int:
    return main(["tuned", *words])


def test_check_of_nothing_passes(folders: Path, capsys: pytest.CaptureFixture[str]):
    assert run("check") == 0
    assert capsys.readouterr().out == "0 records: 0 ok, 0 stale, 0 broken; 0 kernels compiled\n"


def test_check_fails_for_a_broken_line(folders: Path, capsys: pytest.CaptureFixture[str]):
    (folders / "h100").mkdir()
    (folders / "h100" / "nsa.jsonl").write_text("nonsense\n")
    assert run("check", str(folders), "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_list_shows_what_is_shipped_and_cached(folders: Path, capsys: pytest.CaptureFixture[str]):
    tuned.publish(RECORD)
    tuned.write(folders, [record(bucket__keys=16), record(environment__gpu="a100")])
    assert run("list", "nsa", "--gpu", "h100") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["gpu", "triton", "problem", "bucket", "time", "start", "gain", "where"]
    assert [row.split()[-1] for row in rows] == [
        "tuned/h100/nsa.jsonl:1",
        f"nsa-{RECORD.key}.json",
    ]
    assert run("list", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["records"]) == 3


def test_export_then_merge_gives_one_record_a_key(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tuned.publish(RECORD)
    tuned.publish(record(bucket__keys=16, environment__gpu="interpreter"))
    there = tmp_path / "other" / "tuned"
    assert run("export", str(there), "--gpu", "h100") == 0
    assert capsys.readouterr().out == f"{there / 'h100' / 'nsa.jsonl'}\n"
    faster = record(time__median_us=50.0, alternates=())
    tuned.write(folders, [faster])
    assert run("merge", str(folders), str(there)) == 0
    capsys.readouterr()
    (kept,) = tuned.read_folder(folders).kept
    assert kept.record.time == faster.time
    assert run("merge", str(folders), str(there), "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == []


def test_merge_loses_no_line(folders: Path, capsys: pytest.CaptureFixture[str]):
    tuned.write(folders, [RECORD])
    path = folders / "h100" / "nsa.jsonl"
    path.write_text(path.read_text() + "nonsense\n")
    assert run("merge", str(folders), str(folders)) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert path.read_text().endswith("nonsense\n")


def test_explain_shows_the_ladder(folders: Path, capsys: pytest.CaptureFixture[str]):
    artifact = pipeline.compile_spec(MOBA, H100)
    kernels = {
        kernel.name: tuned.KernelChoice(
            text=artifact.module.texts[kernel.name],
            config=kernel.config.keywords() | {"num_warps": 8},
            shared=1024,
            registers=64,
        )
        for kernel in artifact.plan.kernels
    }
    kept = record(
        problem=tuned.Problem.of(MOBA, "bf16"), environment=tuned.environment(H100), kernels=kernels
    )
    tuned.write(folders, [kept])
    tuned.publish(replace(kept, environment=replace(kept.environment, triton="3.1")))
    assert run("explain", "moba", "--tokens", "8K,16K") == 0
    text = capsys.readouterr().out
    assert "  exact          tuned/h100/moba.jsonl:1  8K queries" in text
    assert "  other Triton   cache moba-" in text
    assert "  other GPU      none" in text
    assert "(tuned; tuned/h100/moba.jsonl:1)" in text
    assert "it gets: nearest bucket" in text
    assert run("explain", "moba", "--json") == 0
    assert json.loads(capsys.readouterr().out)["calls"][0]["rung"] == "exact"
