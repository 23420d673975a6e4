"""Where records are kept, how two become one, and which one a call gets."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuned_records import KERNEL, RECORD, record

from hsgen import paths, pipeline, runtime, store, tuned
from hsgen.errors import HsgenError
from hsgen.reference import tensor_shapes
from hsgen.spec import Spec, parse
from hsgen.target import H100, TARGETS, Target
from hsgen.tuned import files, ladder

SMALL = parse("""
hsgen: 1
name: small
heads: {query: 2, kv: 2}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
""")
ONE_KERNEL = parse("""
hsgen: 1
name: one_kernel
heads: {query: 1, kv: 1}
head_dim: 16
attend:
  - {name: near, window: 4}
""")
ENVIRONMENT = tuned.Environment(
    gpu="h100", sm="sm_90", processors=132, shared_memory=232448, triton="3.6"
)
BUCKET = tuned.Bucket.of(4096, 4096, 1, False)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache, and a committed folder with nothing but the GPUs."""
    shipped = paths.data_dir("tuned")
    committed = tmp_path / "tuned"
    committed.mkdir()
    shutil.copy(shipped / "gpus.yaml", committed)
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "committed", lambda: committed)
    monkeypatch.setattr(ladder, "_told", set())
    return committed


# --- where records are


def test_a_published_record_is_found():
    path = tuned.publish(RECORD)
    assert path is not None
    assert path.name == f"nsa-{RECORD.key}.json"
    (kept,) = tuned.entries("h100", "nsa")
    assert (kept.record, kept.committed, kept.where) == (RECORD, False, f"cache {path.name}")
    assert tuned.gpus() == ("h100",)
    assert not tuned.entries("h100", "ns")


def test_a_record_replaces_that_of_its_key():
    tuned.publish(RECORD)
    tuned.publish(record(time__median_us=50.0))
    (kept,) = tuned.entries("h100", "nsa")
    assert kept.record.time.median_us == 50.0


def test_the_committed_layout_is_sorted_and_stable(folders: Path):
    records = [
        record(bucket__keys=1 << n, problem__dtype=dtype)
        for n, dtype in itertools.product((13, 11, 15), ("fp16", "bf16"))
    ]
    (path,) = tuned.write(folders, records)
    assert path == folders / "h100" / "nsa.jsonl"
    text = path.read_text()
    assert tuned.write(folders, records[::-1]) == ()
    assert path.read_text() == text
    held = [kept.record for kept in tuned.read_folder(folders).kept]
    assert held == sorted(records, key=lambda each: each.place)
    kept = tuned.entries("h100", "nsa")
    assert [each.where for each in kept] == [f"tuned/h100/nsa.jsonl:{n}" for n in range(1, 7)]


def test_files_are_read_once(folders: Path, monkeypatch: pytest.MonkeyPatch):
    tuned.write(folders, [RECORD])
    tuned.entries("h100", "nsa")
    monkeypatch.setattr(files, "read_file", lambda path: pytest.fail("read again"))
    tuned.entries("h100", "nsa")


def test_a_spec_reads_no_file_of_another(folders: Path):
    (folders / "h100").mkdir()
    (folders / "h100" / "moba.jsonl").write_text("nonsense\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.entries("h100", "nsa") == ()


def line(change: Callable[[dict], object]) -> str:
    data = json.loads(tuned.dump(RECORD))
    change(data)
    return json.dumps(data)


BAD_LINES = {
    "torn": (tuned.dump(RECORD)[:100], "not JSON"),
    "conflict": ("<<<<<<< main", "not JSON"),
    "future": (line(lambda d: d.update(schema=2)), "schema: expected 1, got 2"),
    "foreign GPU": (
        line(lambda d: d["environment"].update(gpu="a100")),
        "environment.gpu: expected 'h100'",
    ),
    "a name that moves the cursor": (
        line(lambda d: d.update({"\x1b[2J": 1})),
        "\N{REPLACEMENT CHARACTER}[2J: unexpected keyword",
    ),
    "another spec": (line(lambda d: d["problem"].update(spec="moba")), "problem.spec: expected"),
    "edited": (
        line(lambda d: d["kernels"]["attend"]["config"].update(num_warps=5)),
        "kernels.attend.config: num_warps: expected one of",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_told_and_the_others_are_read(folders: Path, name: str):
    text, message = BAD_LINES[name]
    path = folders / "h100" / "nsa.jsonl"
    path.parent.mkdir()
    other = record(bucket__keys=16)
    path.write_text(f"{tuned.dump(other)}\n{text}\n{text}\n")
    with pytest.warns(RuntimeWarning) as told:
        kept = tuned.entries("h100", "nsa")
    assert [each.record for each in kept] == [other]
    (warning,) = told
    assert str(warning.message).startswith(f"{path}:2: {message}")
    assert str(warning.message).endswith("(and 1 more lines); ignored")


def test_a_file_that_is_no_text_is_told(folders: Path):
    (folders / "h100").mkdir()
    (folders / "h100" / "nsa.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match=r"nsa.jsonl:1: "):
        assert tuned.entries("h100", "nsa") == ()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:50], "unreadable"),
        (lambda text: text.replace('"runs": 20', '"runs": 21'), "sha256: the value was edited"),
        (lambda text: "[]", "unreadable"),
    ],
)
def test_a_damaged_file_of_the_cache_is_told(damage: Callable[[str], str], message: str):
    path = tuned.publish(RECORD)
    assert path is not None
    path.write_text(damage(path.read_text()))
    tuned.forget()
    with pytest.warns(RuntimeWarning, match=re.escape(f"{path}:1: {message}")):
        assert tuned.entries("h100", "nsa") == ()


def test_a_file_of_the_cache_must_be_in_its_place():
    path = tuned.publish(RECORD)
    assert path is not None
    path.rename(path.with_name(f"nsa-{'0' * 24}.json"))
    tuned.forget()
    with pytest.warns(RuntimeWarning, match="expected the key"):
        assert tuned.entries("h100", "nsa") == ()


def test_a_cache_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "_private", {})
    (tmp_path / "cache").write_text("no folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.publish(RECORD)  # into this process's own folder
    (kept,) = tuned.entries("h100", "nsa")
    assert kept.record == RECORD


def _write_many(number: int, stop) -> None:
    for turn in itertools.count():
        tuned.publish(record(time__median_us=100.0 + number, time__runs=1 + turn))
        tuned.publish(record(bucket__keys=1 << (14 + number)))
        if stop.is_set():
            return


def _read_many(seen) -> None:
    """Eight readers."""
    warnings.simplefilter("error")

    def read() -> None:
        for _ in range(4):
            tuned.forget()
            kept = tuned.entries("h100", "nsa")
            assert {each.record.problem for each in kept} == {RECORD.problem}
            assert all(100 <= each.record.time.median_us < 104 for each in kept)
        with seen.get_lock():
            seen.value += 1

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_32_readers_and_4_writers_at_once():
    context = multiprocessing.get_context("fork")
    stop, seen = context.Event(), context.Value("i", 0)
    tuned.publish(RECORD)
    writers = [context.Process(target=_write_many, args=(n, stop)) for n in range(4)]
    readers = [context.Process(target=_read_many, args=(seen,)) for _ in range(4)]
    for process in [*writers, *readers]:
        process.start()
    for process in readers:
        process.join(60)
    stop.set()
    for process in writers:
        process.join(60)
    assert seen.value == 32
    assert [process.exitcode for process in writers] == [0] * 4
    tuned.forget()
    assert len(tuned.entries("h100", "nsa")) == 5


# --- GPUs


def test_gpus_go_by_what_drivers_call_them():
    assert tuned.gpu_id("NVIDIA H100 80GB HBM3") == "h100"
    assert tuned.gpu_id("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert tuned.gpu_id("NVIDIA H100 80GB HBM3 MIG 3g.40gb") == "h100-80gb-hbm3-mig-3g-40gb"
    assert tuned.gpu_id("NVIDIA A10") == "a10"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_gpus_agree_with_the_targets(target: Target):
    gpu = tuned.known_gpus()[tuned.gpu_id(target.name)]
    assert gpu.card == (gpu.id, target.label, target.sms, target.smem_per_block)
    assert tuned.environment(target).card == gpu.card


def test_gpus_that_cannot_be_read_are_told(folders: Path):
    (folders / "gpus.yaml").write_text("h100: [")
    tuned.forget()
    with pytest.warns(RuntimeWarning, match="gpus.yaml"):
        assert tuned.gpu_id("NVIDIA H100 PCIe") == "h100-pcie"


def test_the_interpreter_is_a_gpu_of_its_own():
    environment = tuned.environment(H100, interpreted=True)
    assert (environment.gpu, environment.sm) == ("interpreter", "interpreter")


# --- two records of one key


def config(**values: int) -> dict[str, tuned.KernelChoice]:
    return {"attend": replace(KERNEL, config=dict(KERNEL.config) | values)}


def test_the_faster_wins_beyond_the_noise():
    slow = record(kernels=config(num_warps=8), time__median_us=110.0, alternates=())
    fast = record(kernels=config(num_warps=4), provenance__date="2026-01-01", alternates=())
    (merged,) = tuned.merge([slow, fast])
    assert merged.time == fast.time
    (alternate,) = merged.alternates
    assert (alternate.ratio, alternate.kernels) == (pytest.approx(1.1), slow.configs)


def test_within_the_noise_the_newer_wins():
    old = record(kernels=config(num_warps=8), time__median_us=99.5)
    new = record(kernels=config(num_warps=4), provenance__date="2026-11-27")
    (merged,) = tuned.merge([old, new])
    assert merged.provenance == new.provenance
    assert merged.alternates[0].ratio == pytest.approx(0.995)


def test_times_of_other_versions_do_not_count():
    old = record(kernels=config(num_warps=8), time__median_us=50.0)
    new = record(provenance__driver="580.1", provenance__date="2026-11-27", kernels=config())
    assert tuned.merge([old, new])[0].time == new.time


def test_configurations_of_other_texts_are_dropped():
    old = record(kernels={"attend": replace(KERNEL, text="01" * 12)}, time__median_us=10.0)
    new = record(kernels=config(), provenance__date="2026-11-27", alternates=())
    assert tuned.merge([old, new]) == (new,)


def test_merging_is_of_sets():
    records = [
        record(
            kernels=config(num_warps=warps),
            time__median_us=100.0 + us,
            provenance__date=f"2026-11-{day}",
        )
        for warps, us, day in ((1, 0, 20), (2, 0.5, 21), (4, 30, 22), (8, 31, 23), (16, 90, 24))
    ]
    (merged,) = tuned.merge(records)
    assert tuned.merge([merged]) == (merged,)
    assert tuned.merge([merged, records[0]]) == (merged,)
    assert len(merged.alternates) <= 5
    for order in itertools.permutations(records):
        assert tuned.merge(order) == (merged,)


# --- the ladder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuned.Compiled:
    artifact = pipeline.compile_spec(SMALL, H100)
    return tuned.Compiled(plan=artifact.plan, target=H100, texts=artifact.module.texts)


def of(made: tuned.Compiled, **changes) -> tuned.Tuned:
    """A record of SMALL whose kernels have eight warps."""
    kernels = {
        kernel.name: tuned.KernelChoice(
            text=made.texts[kernel.name],
            config=kernel.config.keywords() | {"num_warps": 8},
            shared=1024,
            registers=64,
        )
        for kernel in made.plan.kernels
    }
    return (
        record(
            problem=tuned.Problem.of(SMALL, "bf16"),
            environment=ENVIRONMENT,
            bucket=BUCKET,
            kernels=kernels,
            alternates=(),
        )
        if not changes
        else apply(of(made), changes)
    )


def apply(made: tuned.Tuned, changes: Mapping) -> tuned.Tuned:
    for name, value in changes.items():
        part, _, inner = name.partition("__")
        value = replace(getattr(made, part), **{inner: value}) if inner else value
        made = replace(made, **{part: value})
    return made


def look_up(small: tuned.Compiled, bucket: tuned.Bucket = BUCKET, **environment) -> tuned.Found:
    return tuned.look_up(
        tuned.Problem.of(SMALL, "bf16"),
        bucket,
        replace(ENVIRONMENT, **environment),
        lambda orders: small,
    )


def starts(made: tuned.Compiled) -> dict[str, dict[str, int]]:
    return {kernel.name: kernel.config.keywords() for kernel in made.plan.kernels}


def test_without_records_kernels_start(small: tuned.Compiled):
    found = look_up(small)
    assert (found.rung, found.record, found.configs) == ("start", None, starts(small))
    assert set(found.origins.values()) == {"default"}
    assert found.note == (
        "small on h100, Triton 3.6, 4K queries, 4K keys, 1 sequences: no tuned configuration, so "
        "kernels start with tiles that are known to fit; hsgen tune small --shapes 4K"
    )


def test_the_exact_record_comes_first(small: tuned.Compiled):
    tuned.publish(of(small))
    tuned.publish(of(small, bucket__keys=8192))
    found = look_up(small)
    assert (found.rung, found.tuned, found.note) == ("exact", True, "")
    assert all(config["num_warps"] == 8 for config in found.configs.values())
    assert {origin.split(";")[0] for origin in found.origins.values()} == {"tuned"}


def test_then_the_nearest_bucket(small: tuned.Compiled):
    for keys in (1024, 8192, 65536):
        tuned.publish(of(small, bucket__keys=keys))
    found = look_up(small)
    assert (found.rung, found.record.bucket.keys) == ("nearest bucket", 8192)
    assert found.tuned


def test_then_another_triton_newest_first(small: tuned.Compiled):
    for version in ("3.4", "3.10", "3.5"):
        tuned.publish(of(small, environment__triton=version))
    found = look_up(small)
    assert (found.rung, found.record.environment.triton) == ("other Triton", "3.10")
    assert not found.tuned
    assert "tuned on h100 with Triton 3.10 only" in found.note


def test_then_another_gpu_of_the_architecture(small: tuned.Compiled):
    tuned.publish(of(small, environment__gpu="h100-pcie", environment__processors=114))
    tuned.publish(of(small, environment__gpu="h200"))
    tuned.publish(of(small, environment__gpu="a100", environment__sm="sm_80"))
    found = look_up(small)
    assert (found.rung, found.record.environment.gpu) == ("other GPU", "h200")


def test_a_slice_of_a_gpu_is_another_gpu(small: tuned.Compiled):
    tuned.publish(of(small))
    assert look_up(small, processors=66).rung == "other GPU"


def test_other_problems_never_serve(small: tuned.Compiled):
    tuned.publish(of(small, problem__dtype="fp16"))
    tuned.publish(of(small, problem__digest="ab" * 32))
    tuned.publish(of(small, problem__heads=(8, 2)))
    assert look_up(small).rung == "start"


def test_how_calls_were_timed_breaks_ties(small: tuned.Compiled):
    tuned.publish(of(small, environment__policy="graph", provenance__date="2026-12-01"))
    tuned.publish(of(small))
    assert look_up(small).record.environment.policy == "eager"
    assert look_up(small, policy="graph").record.environment.policy == "graph"


@pytest.mark.parametrize(("committed", "cached"), [("25", "26"), ("26", "26"), ("27", "26")])
def test_of_cache_and_committed_the_newer_serves(
    small: tuned.Compiled, folders: Path, committed: str, cached: str
):
    tuned.write(folders, [of(small, provenance__date=f"2026-11-{committed}")])
    tuned.publish(of(small, provenance__date=f"2026-11-{cached}"))
    shipped = {origin.endswith("small.jsonl:1") for origin in look_up(small).origins.values()}
    assert shipped == {committed > cached}


def test_a_kernel_whose_text_changed_starts(small: tuned.Compiled):
    name = small.plan.kernels[0].name
    tuned.publish(of(small))
    found = look_up(replace(small, texts={**small.texts, name: "00" * 12}))
    changed = [kernel for kernel, origin in found.origins.items() if origin.startswith("default")]
    assert name in changed
    assert found.configs[name] == starts(small)[name]
    assert found.origins[name] == f"default: {name} has another text since it was tuned"
    assert any(config["num_warps"] == 8 for config in found.configs.values())
    assert not found.tuned
    assert "changed since it was tuned" in found.note


def test_kernels_that_share_tiles_start_together(small: tuned.Compiled):
    pair = next(kernel for kernel in small.plan.kernels if kernel.follows)
    tuned.publish(of(small))
    found = look_up(replace(small, texts={**small.texts, pair.follows: "00" * 12}))
    assert found.configs[pair.name] == starts(small)[pair.name]
    assert "shares tiles with" in found.origins[pair.name]


def changed_kernels(made: tuned.Tuned, **changes) -> tuned.Tuned:
    kernels = {name: replace(choice, **changes) for name, choice in made.kernels.items()}
    return replace(made, kernels=kernels)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shared": 300_000}, "bytes of shared memory, the limit is 232,448"),
        ({"config": {"BLOCK_Q": 16, "num_warps": 4, "num_stages": 1}}, "has other parameters"),
        ({"text": "00" * 12}, "has another text"),
    ],
)
def test_a_record_that_holds_nowhere_is_passed_by(small: tuned.Compiled, changes, why: str):
    tuned.publish(changed_kernels(of(small), **changes))
    tuned.publish(of(small, bucket__keys=8192))
    found = look_up(small)
    assert found.rung == "nearest bucket"
    assert any(why in reason for reason in found.refused)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"BLOCK_N": 48}, "expected one of BLOCK_N 16"),
        ({"BLOCK_N": 512}, "expected one of BLOCK_N 16"),
        ({"BLOCK_T": 32}, "expected BLOCK_M=32, as other values say, got 64"),
        ({"num_stages": 9}, "expected one of num_stages 1 2 3 4 5, got 9"),
        ({"BLOCK_T": 128, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 1}, "accumulators a thread"),
    ],
)
def test_values_that_a_kernel_cannot_have_are_refused(small: tuned.Compiled, values, why: str):
    good = of(small)
    name = next(k.name for k in small.plan.kernels if k.name == "score_block")
    choice = replace(good.kernels[name], config={**good.kernels[name].config, **values})
    made = replace(good, kernels={**good.kernels, name: choice})
    refused = tuned.unusable(made, small, ENVIRONMENT)
    assert why in str(refused[name])
    assert not refused[name].changed


def test_orders_decide_the_plan(small: tuned.Compiled):
    asked = []

    def compiled(orders):
        asked.append(dict(orders))
        if "elsewhere" in orders:
            raise HsgenError("orders: no branch is called elsewhere")
        return small

    tuned.publish(of(small, orders={"selected": "keys"}, bucket__keys=8192))
    tuned.publish(of(small, orders={"elsewhere": "keys"}))
    found = tuned.look_up(tuned.Problem.of(SMALL, "bf16"), BUCKET, ENVIRONMENT, compiled)
    assert asked == [{"elsewhere": "keys"}, {"selected": "keys"}]
    assert (found.orders, found.rung) == ({"selected": "keys"}, "nearest bucket")


def test_a_miss_is_told_once(small: tuned.Compiled, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="hsgen"):
        for tokens in (1024, 2048):
            look_up(small, tuned.Bucket.of(tokens, tokens, 1, False)).tell()
        assert len(caplog.records) == 1
        tuned.publish(of(small))
        look_up(small).tell()
    assert len(caplog.records) == 1


def test_requiring_shows_what_the_nearest_record_has(small: tuned.Compiled):
    with pytest.raises(tuned.UntunedError, match="no record of small anywhere"):
        look_up(small).require()
    tuned.publish(of(small, environment__triton="3.5"))
    with pytest.raises(tuned.UntunedError) as error:
        look_up(small).require()
    assert "environment.triton: expected '3.6', nearest record has '3.5'" in str(error.value)
    assert "hsgen tune small --shapes 4K" in str(error.value)
    tuned.publish(of(small))
    look_up(small).require()


def test_requiring_names_the_kernels_that_changed(small: tuned.Compiled):
    name = small.plan.kernels[0].name
    tuned.publish(of(small))
    changed = replace(small, texts={**small.texts, name: "00" * 12})
    with pytest.raises(tuned.UntunedError, match=f"{name} has another text"):
        look_up(changed).require()


def test_a_warm_look_up_is_quick(small: tuned.Compiled):
    for keys, queries in itertools.product(range(10, 17), range(10, 17)):
        tuned.publish(of(small, bucket__keys=1 << keys, bucket__queries=1 << queries))
    problem = tuned.Problem.of(SMALL, "bf16")
    took = []
    for _ in range(50):
        start = time.process_time()
        for _ in range(20):
            tuned.look_up(problem, BUCKET, ENVIRONMENT, lambda orders: small)
        took.append((time.process_time() - start) / 20)
    assert min(took) < 50e-6


# --- calls


def inputs(spec: Spec, tokens: int) -> dict[str, torch.Tensor]:
    return {n: torch.randn(shape) for n, shape in tensor_shapes(spec, 1, tokens, tokens).items()}


def interpreted(spec: Spec, orders: Mapping[str, str] | None = None, **changes) -> tuned.Tuned:
    """A record of calls with up to 8 tokens in the interpreter."""
    program = runtime.compile_program(spec, H100, torch.float32, interpret=True, orders=orders)
    kernels = {
        kernel.name: tuned.KernelChoice(
            text=program.texts[kernel.name],
            config=kernel.config.keywords() | changes.get(kernel.name, {}),
            shared=0,
            registers=0,
        )
        for kernel in program.plan.kernels
    }
    return record(
        problem=tuned.Problem.of(spec, "fp32"),
        environment=tuned.environment(H100, interpreted=True),
        bucket=tuned.Bucket.of(8, 8, 1, False),
        kernels=kernels,
        orders=orders or {},
        alternates=(),
    )


def named(name: str, spec: Spec = ONE_KERNEL) -> Spec:
    """A spec under another name, since equal requests share a kernel."""
    return spec.model_copy(update={"name": name})


def test_a_record_changes_what_a_call_runs():
    spec = named("small_tuned")
    before = runtime.load_kernel(spec, interpret=True, check=True)
    x = inputs(spec, 7)
    o = before(**x)
    assert "(for the interpreter)" in before.explain()
    start = next(iter(before._execution.choices.values())).config["attend_near"]
    tile = {"BLOCK_T": start["BLOCK_T"] // 2, "BLOCK_M": start["BLOCK_M"] // 2}
    tuned.publish(interpreted(spec, attend_near=tile))

    kernel = runtime.load_kernel(spec, interpret=True)
    assert kernel is not before
    torch.testing.assert_close(kernel(**x), kernel.reference(**x).float())
    torch.testing.assert_close(kernel(**x), o)
    (choice,) = kernel._execution.choices.values()
    assert choice.config["attend_near"] == dict(start) | tile
    assert re.search(r"attend_near: .*\(tuned; cache small_tuned-\w+\.json\)", kernel.explain())
    assert kernel.stats().compiles == 1


def test_a_spec_with_a_loss_gets_what_is_tuned():
    """Calls compute no loss: records are of what they compute, with one or without."""
    taught = parse("""
hsgen: 1
name: small_taught
heads: {query: 2, kv: 1}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend:
  - {name: selected, over: block}
loss: {kl: {level: block}}
""")
    alone = taught.model_copy(update={"loss": None})
    assert taught.digest != alone.digest
    assert tuned.Problem.of(taught, "fp32") == tuned.Problem.of(alone, "fp32")
    tuned.publish(interpreted(alone))
    kernel = runtime.load_kernel(taught, interpret=True)
    kernel(**inputs(alone, 7))
    (choice,) = kernel._execution.choices.values()
    assert all(origin.startswith("tuned; cache") for origin in choice.origin.values())
    ladder = tuned.explain(taught, H100, "fp32", tuned.Bucket.of(8, 8, 1, packed=False))
    assert ladder.found.problem == tuned.Problem.of(alone, "fp32")


def test_a_record_of_gradients_changes_what_gradients_run():
    """And a call's own record says nothing of them."""
    spec = named("small_gradients")
    program = runtime.compile_program(spec, H100, torch.float32, interpret=True, backward=True)
    start = program.config["dkv_near"]
    tile = {"num_warps": 2 * start["num_warps"]}
    kernels = {
        kernel.name: tuned.KernelChoice(
            text=program.texts[kernel.name],
            config=kernel.config.keywords() | (tile if kernel.name == "dkv_near" else {}),
            shared=0,
            registers=0,
        )
        for kernel in program.plan.kernels
    }
    own = interpreted(spec)
    of_gradients = replace(
        own, problem=tuned.Problem.of(spec, "fp32", "gradients"), kernels=kernels
    )
    assert of_gradients.key != own.key
    assert tuned.read(tuned.dump(of_gradients)) == of_gradients
    assert '"work": "gradients"' in tuned.dump(of_gradients)
    assert "work" not in tuned.dump(own)
    tuned.publish(of_gradients)
    kernel = runtime.load_kernel(spec, interpret=True)
    for tokens, expected in ((7, start | tile), (6, start | tile)):
        x = {name: t.requires_grad_() for name, t in inputs(spec, tokens).items()}
        kernel(**x).sum().backward()
        assert all(
            found.config["dkv_near"] == expected for found in kernel._execution.gradients.values()
        )
    (choice,) = kernel._execution.choices.values()
    assert choice.origin == dict.fromkeys(choice.origin, "for the interpreter")
    assert re.search(r"dkv_near: .*\(tuned; cache small_gradients-\w+\.json\)", kernel.explain())
    x = {name: t.requires_grad_() for name, t in inputs(spec, 20).items()}
    kernel(**x).sum().backward()
    assert "gradients of calls of 32 queries" in kernel.explain()
    assert "tuned, nearest bucket: 8 queries" in kernel.explain()


def test_a_caller_s_configuration_comes_before_a_record():
    spec = named("small_given")
    tuned.publish(interpreted(spec, attend_near={"num_warps": 8, "num_stages": 4}))
    kernel = runtime.load_kernel(spec, interpret=True, config={"attend_near": {"num_warps": 2}})
    kernel(**inputs(spec, 5))
    (choice,) = kernel._execution.choices.values()
    assert choice.config["attend_near"]["num_warps"] == 2
    assert choice.config["attend_near"]["num_stages"] == 4
    assert choice.origin["attend_near"] == "caller"


@pytest.mark.usefixtures("sanitized")
def test_a_record_s_orders_decide_the_program():
    spec = named("small_ordered", SMALL)
    tuned.publish(interpreted(spec, {"selected": "keys"}))
    kernel = runtime.load_kernel(spec, interpret=True)
    x = inputs(spec, 5)
    torch.testing.assert_close(kernel(**x), kernel.reference(**x).float())
    (binding,) = kernel._execution.programs
    assert binding.orders == (("selected", "keys"),)
    assert "selected: keys stay" in kernel.explain()


@pytest.mark.usefixtures("sanitized")
def test_calls_of_a_bucket_are_looked_up_once(monkeypatch: pytest.MonkeyPatch):
    spec = named("small_counted")
    kernel = runtime.load_kernel(spec, interpret=True)
    asked = []
    look_up = tuned.look_up
    monkeypatch.setattr(tuned, "look_up", lambda *a: asked.append(a[1]) or look_up(*a))
    for tokens in (3, 4, 5):
        kernel(**inputs(spec, tokens))
    assert asked == [tuned.Bucket.of(4, 4, 1, False), tuned.Bucket.of(8, 8, 1, False)]


def test_untuned_gradients_may_be_an_error(monkeypatch: pytest.MonkeyPatch):
    spec = named("small_required_gradients")
    tuned.publish(interpreted(spec))
    monkeypatch.setenv("HSGEN_REQUIRE_TUNED", "1")
    x = {name: t.requires_grad_() for name, t in inputs(spec, 5).items()}
    o = runtime.load_kernel(spec, interpret=True)(**x)
    words = "these gradients are not tuned\n.*problem.work: expected 'gradients'"
    with pytest.raises(tuned.UntunedError, match=words) as caught:
        o.sum().backward()
    assert "--work gradients" in str(caught.value)


def test_an_untuned_call_may_be_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HSGEN_REQUIRE_TUNED", "1")
    spec = named("small_required")
    kernel = runtime.load_kernel(spec, interpret=True)
    with pytest.raises(tuned.UntunedError, match="this call is not tuned"):
        kernel(**inputs(spec, 5))
    tuned.publish(interpreted(spec))
    kernel(**inputs(spec, 5))
