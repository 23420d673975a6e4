"""The measurements measure what they say: baselines by brute force, failures kept, pages made."""

import dataclasses
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import (
    authors,
    authors_report,
    backward,
    beam_structures,
    beams,
    block_gradients,
    block_lists,
    common,
    decode,
    front,
    groups,
    headline,
    independent,
    independent_blocks,
    independent_odd,
    independent_pooled,
    independent_trained,
    limits,
    peer_kernels,
    peers,
    peers_report,
    peers_speed,
    perplexity,
    profiles,
    quality,
    sanitizer,
    smollm2,
    speed,
    speed_report,
    starts,
    streams,
    tilelang_peers,
    tilelang_report,
    token_lists,
    training_run,
    video,
)
from hsgen import baselines, captures, checking, load_kernel, metrics, plots, samples, standins
from hsgen.errors import HsgenError
from hsgen.reference import reference, tensor_shapes
from hsgen.reference.rounding import stored
from hsgen.spec import load, parse, verify
from hsgen.target import H100

TINY = ["--device", "cpu", "--heads", "4", "2", "--dim", "16", "--seconds", "0.001"]


@pytest.fixture(scope="module")
def group():
    (group,) = captures.load(common.SHIPPED_CAPTURE)
    return group


# The shipped capture --------------------------------------------------------------------------------


def test_shipped_capture_is_small_and_says_where_it_is_from():
    assert common.SHIPPED_CAPTURE.stat().st_size < 1_500_000
    with safe_open(common.SHIPPED_CAPTURE, framework="pt") as file:
        said = " ".join(file.metadata().values())
    assert "Apache-2.0" in said
    assert "PSF-2.0" in said
    assert "capture_smollm2" in said


def test_rows_of_a_video_are_checked_before_they_are_timed():
    spec = verify(load("vsa").model_copy(update={"axes": (4, 5, 8)}))
    x = video.tensors(spec, "cpu")
    attend = load_kernel(spec)
    o, chosen = attend(**x), attend.select(q=x["q"], k=x["k"])["tile"].indices
    assert video.check_rows(spec, x, o, chosen)["tiles"] == 4
    with pytest.raises(checking.CheckError, match="relative error"):
        video.check_rows(spec, x, -o, chosen)
    with pytest.raises(checking.CheckError, match="not among the best"):
        video.check_rows(spec, x, o, (chosen + 1) % 4)


def test_repeated_choices_are_sets_of_what_rows_see():
    period, tokens, kept = 256, 1024, 3
    once = torch.full((1, period, 1, kept), -1, dtype=torch.int32)
    for row in range(period):  # the first block and the two before the row's end, ascending
        blocks = sorted({0, max(0, row // 64 - 1), row // 64})
        once[0, row, 0, : len(blocks)] = torch.tensor(blocks)
    found = token_lists.repeated(once, tokens)
    assert torch.equal(found[:, :period], once)
    for row in range(period, tokens):
        blocks = found[0, row, 0].tolist()
        assert len(set(blocks)) == kept, blocks
        assert blocks[0] == 0, blocks
        assert all(0 <= block <= row // 64 for block in blocks), blocks
        assert row // 64 in blocks
    assert found[0, period, 0].tolist() == [
        0,
        3,
        4,
    ]  # own block 4, and the one before the repetition
    assert found[0, period + 255, 0].tolist() == [0, 6, 7]


def test_shipped_capture_loads(group):
    assert (group.layer, group.kv_head, group.query_head(2)) == (5, 1, 5)
    shapes = [list(x.shape) for x in (group.q, group.k, group.v)]
    assert shapes == [[2048, 3, 64], [2048, 64], [2048, 64]]
    for x in (group.q, group.k, group.v):
        assert x.dtype == torch.bfloat16
        assert x.isfinite().all()
        assert x.float().std() > 0.1


# Quality --------------------------------------------------------------------------------------------


def test_measured_rows_are_runs_of_the_second_half():
    rows = quality.measured_rows(2048, 256)
    assert len(rows) == 256
    assert (rows.min(), rows.max()) == (1024, 2047)
    assert (rows.split(quality.RUN)[1].diff() == 1).all()


@pytest.mark.parametrize("system", quality.SYSTEMS)
def test_quality_of_a_prefix_of_the_capture(group, system):
    prefix = captures.Group(layer=5, kv_head=1, q=group.q[:512], k=group.k[:512], v=group.v[:512])
    position = quality.measured_rows(512, 64)
    dense = metrics.dense(prefix.q[position], prefix.k, prefix.v, position)
    (case,) = (c for c in quality.cases(3, 64, 512, [16], [0.2]) if c.system == system)
    records = quality.measure(case, prefix, dense, quality.choose_by_reference)
    assert [r["head"] for r in records] == [3, 4, 5]
    for r in records:
        assert r["output_difference"] < 1e-4  # the reference attends to what it says it chose
        assert 0.1 < r["density"] < 0.4
        assert r["selected"]["worst_mass_row"] in position
    mean = {way: sum(r[way]["mass"] for r in records) for way in quality.WAYS}
    assert mean["oracle"] == max(mean.values())


def test_both_backends_choose_alike_on_cpu(group):
    q, k, v = group.q[None, :256], group.k[None, :256, None], group.v[None, :256, None]
    (case, *_) = quality.cases(3, 64, 256, [16], [0.2])
    x, position = quality.tensors(case, q, k, v), quality.measured_rows(256, 64)
    by_reference, by_kernel = (
        choose(case, x, position)
        for choose in (quality.choose_by_reference, quality.choose_by_kernel)
    )
    assert torch.equal(by_reference[0], by_kernel[0])
    torch.testing.assert_close(by_reference[1], by_kernel[1], atol=2e-2, rtol=2e-2)


# Inputs and baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("system", speed.SYSTEMS)
def test_inputs_are_what_the_spec_reads(group, system, kind):
    spec = standins.bind(load(system), query=6, kv=2, dim=96)
    tensors = samples.make(spec, kind, 40, "cpu", 0, [group])
    assert {name: tuple(t.shape) for name, t in tensors.items()} == tensor_shapes(spec, 1, 40, 40)
    for t in tensors.values():
        assert t.dtype == torch.bfloat16
        assert t.isfinite().all()


def test_real_inputs_repeat_with_other_noise(group):
    spec = standins.bind(load("moba"), query=2, kv=2, dim=64)
    q = samples.make(spec, "real", 2048 + 8, "cpu", 0, [group])["q"].float()
    first, again = q[0, :8], q[0, 2048:]
    assert not torch.equal(first, again)
    assert (first - again).std() < 0.2 * first.std()


@pytest.mark.parametrize(("tokens", "size"), [(256, 64), (256, 256), (300, 1)])
def test_flex_mask_is_the_selection(tokens, size):
    entries = -(-tokens // size)
    indices = torch.randint(-1, entries, (tokens, 2, 3), dtype=torch.int32)
    own = torch.arange(tokens)[:, None, None] // size
    indices = torch.where(indices > own, -1, indices)
    indices[:128, 1, 0] = 0  # so that there is a block that needs no mask
    mask = baselines.flex_mask(indices, size, 4)
    q, k, v = (torch.randn(1, tokens, h, 16) for h in (4, 2, 2))
    member = metrics.members(indices, entries).repeat_interleave(size, -1)[..., :tokens]
    member = member & torch.ones(tokens, tokens).tril().bool()
    found = flex_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True
    )
    heads = member.repeat_interleave(2, 0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=heads, enable_gqa=True
    )
    rows = heads.any(-1)[None]
    torch.testing.assert_close(found[rows], expected[rows], atol=1e-5, rtol=1e-5)
    _check_blocks(mask, heads)


def _check_blocks(mask, heads):
    """Visited blocks hold something, unmasked ones everything, and nothing is left out."""
    tall, wide = mask.BLOCK_SIZE
    tokens = heads.shape[-1]
    some, every = torch.zeros(2, *heads.shape, dtype=torch.bool)
    lists = (
        (mask.kv_num_blocks, mask.kv_indices, some),
        (
            mask.full_kv_num_blocks,
            mask.full_kv_indices,
            every,
        ),
    )
    for counts, indices, blocks in lists:
        for h, tile in torch.cartesian_prod(torch.arange(4), torch.arange(-(-tokens // tall))):
            for column in indices[0, h, tile, : counts[0, h, tile]].tolist():
                rows = slice(tile * tall, (tile + 1) * tall)
                blocks[h, rows, column * wide : (column + 1) * wide] = True
    assert not (some & every).any()
    assert (heads | ~every).all()
    assert (some | every | ~heads).all()


def test_selected_branch_alone_is_the_branch():
    case = speed.Case(system="nsa", tokens=200, kind="random", heads=(4, 2), dim=16)
    whole, alone = case.spec, baselines.selected_only(case.spec, case.level)
    x = samples.make(whole, "random", 200, "cpu", 0, [])
    x["gates"] = torch.tensor([0.0, 1.0, 0.0]).expand_as(x["gates"])
    result = reference(whole, x)
    again = reference(alone, x, selection=result.selection)
    torch.testing.assert_close(again.o, result.o)


def test_last_row_agrees_with_dense_attention():
    q, k, v = (torch.randn(1, 40, h, 16) for h in (4, 2, 2))
    variant = baselines.Variant(name="torch", backend=None, expand=True, pad=False)
    o = baselines.dense(variant, q, k, v)(0)
    torch.testing.assert_close(o[:, -1], baselines.last_row(q, k, v))


def test_longer_inputs_are_timed_by_the_fastest_of_each_backend(tmp_path):
    journal = speed.Journal(path=tmp_path / "r.json", deadline=float("inf"))
    case = speed.Case(system="nsa", tokens=32, kind="random")
    every = baselines.variants(case.spec, "cuda")
    assert speed.contenders(journal, case, every) == every
    steps = {
        "dense cuDNN": {"status": "ok", "ms": {"median": 2.0}},
        "dense cuDNN, heads expanded": {"status": "ok", "ms": {"median": 1.0}},
        "dense flash": {"status": "failed", "reason": "no"},
    }
    journal.case("nsa/16/random", {"system": "nsa", "tokens": 16})["steps"] = steps
    kept = [variant.name for variant in speed.contenders(journal, case, every)]
    flash = [variant.name for variant in every if variant.name.startswith("flash")]
    assert kept == ["cuDNN, heads expanded", *flash]


def test_provenance_names_no_folder_of_this_machine():
    made = common.provenance("benchmarks.speed", ["--budget", "9", "-o", "/somewhere"], "cpu")
    assert made["command"] == "python -m benchmarks.speed --budget 9"


# The journal of a speed run ---------------------------------------------------------------------------


def test_failures_and_lack_of_time_are_written_down(tmp_path):
    journal = speed.Journal(path=tmp_path / "r.json", deadline=float("inf"))
    journal.data["runs"].append({})
    journal.case("a", {})
    assert journal.run("a", "good", lambda: {"ms": 1.0})
    assert not journal.run("a", "bad", lambda: warnings.warn("why", stacklevel=1) or 1 / 0)
    journal.deadline = 0.0
    assert not journal.run("a", "late", dict)
    assert journal.run("a", "good", lambda: pytest.fail("done before"))
    steps = json.loads((tmp_path / "r.json").read_text())["cases"]["a"]["steps"]
    assert steps["good"]["ms"] == 1.0
    assert steps["bad"]["reason"] == "ZeroDivisionError: division by zero / why"
    assert steps["late"]["status"] == "skipped"


def test_speed_script_runs_through_on_cpu(tmp_path, capsys):
    argv = [*TINY, "--tokens", "70", "--systems", "nsa", "--inputs", "real", "-o", str(tmp_path)]
    assert speed.main(argv) == 0
    (path,) = tmp_path.glob("speed_cpu_*.json")
    result = common.read_json(path)
    (case,) = result["cases"].values()
    done = {step for step, entry in case["steps"].items() if entry["status"] == "ok"}
    assert {"check small", "check", "total", "select", "attend", "attend selected"} <= done
    assert case["steps"]["flex"]["reason"] == "there is no mask"
    page = speed_report.page([result])
    assert "70, nsa, real" in page
    assert "FlexAttention is timed on GPUs only" in page
    assert "dense / whole" in capsys.readouterr().out


# The pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "page", "more"),
    [
        ("beams", beams.page, []),
        ("perplexity", perplexity.page, []),
        ("quality", quality.report, []),
        ("smollm2", smollm2.page, []),
        ("speed", speed_report.page, []),
        ("block_lists", block_lists.page, []),
        ("block_gradients", block_gradients.page, []),
        ("decode", decode.page, []),
        ("groups", groups.page, []),
        ("token_lists", token_lists.page, []),
        ("video", video.page, []),
        ("profiles", profiles.page, []),
        ("training_run", training_run.page, []),
        ("independent", independent.page, ["odd", "trained", "blocks", "pooled", "transformers"]),
    ],
)
def test_page_is_made_of_the_kept_results(kind, page, more):
    paths = [path for each in (kind, *more) for path in common.found([], each)]
    assert len(paths) > len(more), f"benchmarks/results keeps no {kind} results"
    written = (common.ROOT / "docs" / f"{kind}.md").read_text()
    assert written == page([common.read_json(path) for path in paths]), (
        f"run python -m benchmarks.{kind} --report"
    )


@pytest.mark.parametrize("made", [block_lists, block_gradients])
@pytest.mark.parametrize("size", block_lists.SIZES)
def test_lists_of_blocks_hold_as_many_keys_whatever_the_block(made, size):
    spec = made.of_size(size)
    (level,) = spec.levels
    assert (spec.causal, level.query.block) == (False, size)
    assert level.select.budget * level.partition.size == 4096


DETAILS = """
  attend_one (8, 4, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us       212.32
    Compute (SM) Throughput           %        30.76
    Registers Per Thread     register/thread     1,68
    INF   Tensor is the highest-utilized pipeline (27.9%) based on elapsed cycles
  attend_one (8, 4, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         ms         1.50
    Compute (SM) Throughput           %        40.00
  rank_two (8, 4, 1)x(32, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us         7.00
"""


def test_profiles_keep_the_longest_launch_of_a_kernel():
    found = profiles.parsed(DETAILS)
    assert found == {
        "attend_one": {"warps": 8, "ms": 1.5, "SM %": 40.0},
        "rank_two": {"warps": 1, "ms": 0.007},
    }
    (first,) = profiles.parsed(DETAILS[: DETAILS.index("  attend_one", 10)]).values()
    assert first["registers"] == 168.0
    assert first["busiest pipe"] == {"name": "Tensor", "%": 27.9}


@pytest.mark.parametrize(
    ("said", "status", "clean"),
    [
        ("right\n========= ERROR SUMMARY: 0 errors\n", 0, True),
        ("right\n========= ERROR SUMMARY: 3 errors\n", 9, False),
        ("one ['o: row is off']\n========= ERROR SUMMARY: 0 errors\n", 1, False),
        ("Traceback\n", 1, False),
    ],
)
def test_only_what_the_sanitizer_finds_clean_is_clean(said, status, clean, monkeypatch):
    done = SimpleNamespace(stdout=said, stderr="", returncode=status)
    monkeypatch.setattr(sanitizer.subprocess, "run", lambda *_, **__: done)
    assert sanitizer.examine("nsa", "memcheck", 1.0)["clean"] is clean


def test_what_runs_under_the_sanitizer_runs():
    assert sanitizer.child("moba", device="cpu") == 0


# no card has run them under memcheck, but hirouter, of whose trials one was wrong in itself
AWAITED = {
    *("hirouter", "psa_mass", "hydra", "biformer", "draft_attention", "deepseek_hca"),
    *("qwen_qsa", "kinetics", "small_thinker", "sqa"),
}


def test_kept_runs_of_the_sanitizer_are_clean():
    runs = [common.read_json(path) for path in common.RESULTS.glob("sanitizer_memcheck_*.json")]
    kept = [pair for run in runs for pair in run["specs"].items() if pair[0] not in AWAITED]
    assert {name for name, _ in kept} == set(sanitizer.SPECS) - AWAITED
    assert all(entry["clean"] and entry["trials"] >= 3 for _, entry in kept)


def test_picture_of_beams_is_made_of_the_kept_results():
    (path,) = common.found([], "beams")
    written = (common.ROOT / "docs" / "beams.svg").read_text()
    assert written == beams.drawing(common.read_json(path))


def test_limits_are_made_of_the_kept_results(tmp_path):
    assert limits.main(["-o", str(tmp_path)]) == 0
    for made in tmp_path.iterdir():
        written = (common.ROOT / "docs" / made.name).read_text()
        assert made.read_text() == written, "run python -m benchmarks.limits"


def test_limits_want_the_times_of_the_kernels_that_there_are(tmp_path):
    path = next(path for path in common.found([], "speed") if "h100" in path.name)
    result = common.read_json(path)
    for case in result["cases"].values():
        case["steps"]["kernels"]["ms"].pop("attend_selected")
    common.write_json(tmp_path / "old.json", result)
    with pytest.raises(HsgenError, match="no time of `attend_selected`"):
        limits.main([str(tmp_path / "old.json"), "-o", str(tmp_path)])


def test_kernels_of_one_operator_are_one_line():
    path = next(path for path in common.found([], "speed") if "h100" in path.name)
    case = common.read_json(path)["cases"]["hisa/32768/real"]
    found = {each.title: each for each in limits.operators(case, H100)}
    attend, times = found["attend_selected"], case["steps"]["kernels"]["ms"]
    assert attend.kernels == ("index_selected", "attend_selected", "gather_selected")
    assert attend.ms == sum(times[name] for name in attend.kernels)
    pairs = 2048 * 2049 // 2 + (32768 - 2048) * 2048  # causal, until 2,048 tokens are kept
    assert attend.flops == pairs * 2 * 32 * (128 + 128)
    assert attend.bound == "compute"
    assert attend.least == attend.flops / H100.peak_bf16


def test_curves_lie_where_the_numbers_say():
    line = plots.Line(name="a", points=((1024.0, 1.0), (4096.0, 100.0)))
    marks = {"b": [plots.Mark(x=2048.0, y=10.0, size=1.0)]}
    panel = plots.Panel(title="t", lines=(line,), marks=marks)
    drawn = plots.draw("title", ("about",), ("across", "up"), [panel])
    assert f"M0 {plots.HIGH:g}L{plots.WIDE:g} 0" in drawn
    assert f'cx="{plots.WIDE / 2:g}" cy="{plots.HIGH / 2:g}" r="3.5"' in drawn
    for word in ("1K", "4K", "title", "about", "across", "up", ">a<", ">b<"):
        assert word in drawn


# Claims of authors ----------------------------------------------------------------------------------


def test_claims_stand_beside_the_kept_results():
    written = (common.ROOT / "docs" / "headline.md").read_text()
    assert written == headline.page(headline.kept()), "run python -m benchmarks.headline"
    readme = (common.ROOT / "README.md").read_text()
    assert readme == front.written(readme, headline.kept()), "run python -m benchmarks.headline"
    assert sum(f"| {name} |" in readme for name in (*front.SYSTEMS, *front.BESIDE_AUTHORS)) == 10


def test_the_front_takes_the_fastest_other_of_the_same_heads():
    run = {"card": "X", "date": "2026-01-01"}

    def ok(ms):
        return {"status": "ok", "ms": {"median": ms}}

    def case(system, heads, **steps):
        facts = {
            "system": system,
            "tokens": 8,
            "inputs": "real",
            "heads": heads,
            "head_dim": [4, 4],
        }
        return {**facts, "steps": {name.replace("_", " "): entry for name, entry in steps.items()}}

    ours = case("moba", [4, 4], total=ok(2.0)) | {"head_dim": 4}
    others = {
        "a": case("hisa", [4, 4], dense_cuDNN=ok(6.0), dense_flash={"status": "failed"}),
        "b": case("hisa", [4, 2], dense_cuDNN=ok(1.0)),  # other heads
    }
    theirs = case("nsa_fla", [4, 2], hsgen_whole=ok(0.5), fla_whole=ok(0.8))
    results = {
        "speed_ten_x": {"runs": [run], "cases": {"c": ours}},
        "speed_x": {"runs": [run], "cases": others},
        "speed_y": {"runs": [run | {"date": "2025-01-01"}], "cases": {"d": case("hisa", [4, 4])}},
        "backward_x": {"runs": [run], "cases": {"f": case("moba", [4, 4], dense_fused=ok(5.0))}},
        "peers_x": {"runs": [run], "cases": {"e": theirs}},
    }
    said = front.table(results)
    assert "| moba | arXiv:2502.13189 | 4/4 of 4 | 2 (3.00× cuDNN) |" in said
    assert "0.5 (1.60× fla)" in said
    results["speed_x"]["cases"].clear()
    assert "| 2 (–) |" in front.table(results)
    again = case("moba", [4, 4], total=ok(1.5)), case("hip", [4, 4], total=ok(7.0))
    results["speed_others_x"] = {"runs": [run], "cases": dict(enumerate(again))}
    said = front.table(results)
    assert "4/4 of 4 | 1.5 (–) |" in said
    assert "| hip | arXiv:2502.08910 | 4/4 of 4 | 7 (–) |" in said


def _timed(**steps):
    return {name: {"status": "ok", "ms": {"median": ms}} for name, ms in steps.items()}


def _bench(spec, date, **steps):
    limits = {"attend_selected": {"flops": 4e12}}
    made = {"spec": spec, "card": "NVIDIA X", "date": date, "inputs": "real"}
    made |= {"heads": [4, 2], "head_dim": [64, 32]}
    off = {"dense off": {"status": "failed", "reason": "no"}}
    case = {"tokens": 32768, "steps": _timed(**steps) | off, "limits": limits}
    return made | {"cases": [case]}


def test_the_newest_time_stands_beside_its_claim():
    dense = {"dense a": 40.0, "dense b": 30.0}
    results = {
        "bench_hisa_y": _bench("hisa", "2026-02-01", total=20.0, select=4.0, attend=16.0, **dense),
        "bench_hisa_x": _bench("hisa", "2026-02-02", total=10.0, select=4.0, attend=6.0, **dense),
        "bench_dsa_gqa_x": _bench("dsa_gqa", "2026-02-02", total=60.0, select=10.0),
        "bench_dsa_x": _bench("dsa", "2026-02-02", total=60.0, attend=10.0),
        "profiles_x": {"cases": "of no interest"},
    }
    page = headline.page(results)
    place = "4/2 heads of 64/32, X, 2026-02-02:<br>32,768:"
    choosing = "choosing 4 (2.50× dsa_gqa)"
    (row,) = (line for line in page.splitlines() if line.startswith("| hisa |"))
    assert f"| {place} 10 (3.00× b), {choosing} | – | – |" in row
    assert "over the flat index" in row
    assert f"{place} 60 (no dense ran), attending 10, 400 TFLOP/s |" in page
    assert "bench_hisa_x.json" in page
    assert "bench_hisa_y" not in page
    for missing in ("- nsa: forward\n", "- nsa: a step of decoding\n", "- quest: forward\n"):
        assert missing in page


def test_a_day_s_later_step_counts_and_others_heads_only_where_there_is_nothing_else():
    run = {"card": "NVIDIA X", "date": "2026-02-02"}
    step = {"system": "quest", "batch": 64, "context": 8192, "page": None, "status": "ok"}

    def decoded(us):
        slow = {"status": "ok", "us": {"median": 3 * us}}
        of = step | {"us": {"step": {"median": us}}, "dense": {"cuDNN": slow}}
        return {"runs": [run], "cases": {"a": of}}

    def grouped(spec):
        cases = {}
        for query in (8, 4):
            report = _bench(spec, "2026-02-03", total=float(query)) | {"heads": [query, 2]}
            cases[f"{spec}/{query}"] = {"status": "ok", "report": report}
        return {"runs": [run], "cases": cases}

    results = {"decode_later_x": decoded(100.0), "decode_x": decoded(120.0)}
    results |= {"groups_a": grouped("moba"), "groups_b": grouped("infllm_v2")}
    results["bench_moba_x"] = _bench("moba", "2026-02-01", total=5.0)
    page = headline.page(results)
    assert "32/8 heads of 128, X, 2026-02-02:<br>64 × 8,192: 100 (3.00× cuDNN) |" in page
    assert "| 4/2 heads of 64/32, X, 2026-02-01:<br>32,768: 5 (no dense ran) |" in page
    assert "| 8/2 heads of 64/32, X, 2026-02-03:<br>32,768: 8 (no dense ran) |" in page
    assert "groups_a" not in page


def test_the_fastest_kernel_of_others_stands_beside_ours():
    run = {"card": "NVIDIA X", "date": "2026-02-02"}
    steps = _timed(**{"hsgen whole": 2.0, "xunhao whole": 9.0, "fla whole": 5.0})
    case = {"system": "nsa_fla", "inputs": "real", "heads": [64, 4], "steps": steps}
    cases = {str(tokens): case | {"tokens": tokens} for tokens in (8192, 16384)}
    off = case | {"tokens": 32768, "inputs": "random"}
    results = {"peers_x": {"runs": [run], "cases": cases | {"off": off}}}
    said = headline.independent(results, "peers")
    assert said == "nsa_fla, 16,384, X, 2026-02-02: fla 5, ours 2 (2.50×)"
    assert headline.independent(results, "token_lists") == common.MISSING


def test_the_fastest_kernel_of_tilelang_stands_beside_ours():
    run = {"card": "NVIDIA X", "date": "2026-02-02"}
    slow = _timed(hsgen=2.0, sparse_mla_fwd=9.0, sparse_mla_fwd_pipelined=5.0)
    case = {"part": "attend", "tokens": 8192, "inputs": "real", "steps": slow}
    other = case | {"part": "filter", "tokens": 32768, "steps": _timed(hsgen=2.0, theirs=3.0)}
    off = {"random": case | {"tokens": 32768, "inputs": "random"}}
    off["alone"] = case | {"tokens": 65536, "steps": _timed(hsgen=2.0)}
    results = {"tilelang_peers_x": {"runs": [run], "cases": {"a": case, "b": other} | off}}
    said = headline.tilelang(results, "dsa")
    assert said == ["attending, 8,192, X, 2026-02-02: TileLang 5, ours 2 (2.50×)"]
    said = headline.tilelang(results, "hisa")
    assert said == ["choosing, 32,768, X, 2026-02-02: TileLang 3, ours 2 (1.50×)"]


def test_the_kernels_of_authors_stand_beside_ours():
    run = {"card": "NVIDIA X", "date": "2026-02-02"}
    whole = {"author": "moa", "tokens": 8192, "steps": _timed(hsgen=2.0, whole=5.0, dense=9.0)}
    short = whole | {"tokens": 4096, "steps": _timed(hsgen=2.0, whole=1.0)}
    parts = {"author": "xattention", "tokens": 8192, "steps": _timed(hsgen=2.0, choose=5.0)}
    parts["steps"]["hsgen"]["kernels"] = {"score_block": 0.5, "attend_selected": 1.5}
    parts["steps"]["choose"]["device_ms"] = 4.0
    results = {"authors_x": {"runs": [run], "cases": {"a": whole, "b": short, "c": parts}}}
    said = headline.authored(results, "moa")
    assert said == ["MoA, 8,192, X, 2026-02-02: 5, ours 2 (2.50×)"]
    said = headline.authored(results, "xattention")
    assert said == ["XAttention, choosing, 8,192, X, 2026-02-02: 4, ours 0.5 (8.00×)"]
    assert headline.authored(results, "hip") == []


# From group to group --------------------------------------------------------------------------------


def test_groups_are_timed_one_by_one_and_written_up(tmp_path, monkeypatch):
    asked = []

    def timed(spec, **options):
        asked.append((spec.name, spec.heads.query, spec.heads.kv, spec.head_dim.qk))
        if spec.heads.query == 14:
            raise HsgenError("no such tile")
        ok = {"status": "ok", "ms": {"median": 2.0 * spec.heads.query}}
        off = {"status": "failed", "reason": "not near"}
        dense = {"status": "ok", "ms": {"median": 84.0}}
        steps = {"total": ok, "select": ok, "attend": off, "dense a": dense}
        cases = [{"tokens": options["tokens"][0], "steps": steps}]
        heads = [spec.heads.query, spec.heads.kv]
        return SimpleNamespace(record=lambda: {"heads": heads, "cases": cases})

    monkeypatch.setattr(groups.bench, "bench", timed)
    argv = ["--device", "cpu", "--kv-heads", "2", "--dim", "64", "--systems", "moba"]
    assert groups.main([*argv, "--groups", "3", "7", "-o", str(tmp_path)]) == 0
    assert asked == [("moba", 6, 2, 64), ("moba", 14, 2, 64)]
    (path,) = tmp_path.glob("groups_*.json")
    assert groups.main(["--report", str(path), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "groups.md").read_text()
    assert "| cpu, moba, 3 | 12 | 12 | – | 2 | 84 | 7.00× |" in text
    assert "| cpu, moba, 7 | – | – | – | – | – | – |" in text
    assert "- moba, group 3, attend: not near" in text
    assert "- moba, group 7, failed: " in text
    assert "no such tile" in text
    assert "the best dense" in (tmp_path / "groups.svg").read_text()


BEAMS = {
    "blocks": beam_structures.chain(64, 16, 1, look="below 64 > 16"),
    "hip": beam_structures.hip(),
    "hirouter": beam_structures.hirouter("k-means", "k-means", beam_structures.means_tree),
}


@pytest.mark.parametrize("name", BEAMS)
def test_beams_of_the_shipped_capture(group, name):
    """A beam as wide as the input loses nothing, a narrow one something."""
    position = quality.measured_rows(2048, 64)
    records = beams.measure(group, position, BEAMS[name], 102, [2.0, 32.0])
    assert len(records) == 2 * 3
    assert all(r["recall"] == 1.0 and r["mass"] == r["mass_exhaustive"] for r in records[3:])
    assert all(0 < r["recall"] < 1 for r in records[:3])
    assert all((r["recall_exact"] is None) == (name != "hip") for r in records)


def test_steps_on_the_loss_lower_it(group, monkeypatch):
    monkeypatch.setattr(beam_structures, "BATCH", 128)
    monkeypatch.setattr(beam_structures, "STEPS", 10)
    x = {name: y[None, :256, None] for name, y in (("k", group.k), ("v", group.v))}
    x["q"] = group.q[None, :256]
    spec = standins.bind(load("hirouter"), query=3, kv=1, dim=(64, 64))
    before, after = (
        reference(spec, {**x, **tree(group.prefix(256))}, dtype=torch.float32).loss["dual_entropy"]
        for tree in (beam_structures.means_tree, beam_structures.trained_tree)
    )
    assert after < before


# Independent implementations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("independent", independent.COMPARISONS),
        ("odd", independent_odd.COMPARISONS),
        ("trained", independent_trained.COMPARISONS),
    ],
)
def test_every_comparison_is_kept_and_agrees(kind, made):
    (path,) = common.found([], kind)
    kept = common.read_json(path)["comparisons"]
    assert set(kept) == set(made)
    for name, figures in kept.items():
        assert figures["worst"] < independent.TOLERANCE, name
        assert figures.get("scores", 0.0) < independent.TOLERANCE, name
        assert figures.get("same_rows") == figures.get("rows"), name


@pytest.mark.parametrize(
    ("kind", "made"),
    [("blocks", independent_blocks.COMPARISONS), ("pooled", independent_pooled.COMPARISONS)],
)
def test_peers_that_choose_blocks_choose_the_same(kind, made):
    (path,) = common.found([], kind)
    kept = common.read_json(path)["comparisons"]
    assert set(kept) == set(made)
    for name, figures in kept.items():
        for figure in ("scores", "outputs"):
            assert figures.get(figure, 0.0) < independent.TOLERANCE, name
        assert figures["same_rows"] == figures["rows"] > 0, name


def test_transformers_choose_alike_and_say_the_same():
    (path,) = common.found([], "transformers")
    for name, figures in common.read_json(path)["comparisons"].items():
        assert figures["worst"] < independent.TOLERANCE, name
        assert figures.get("scores", 0.0) < independent.TOLERANCE, (
            name
        )  # sets differ where these tie


def test_selections_are_compared_as_sets():
    left = torch.tensor([[3, -1, 0], [1, 2, -1], [-1, -1, -1]])
    right = torch.tensor([[0, 3], [1, 3], [-1, -1]])
    assert independent.same_rows(left, right).tolist() == [True, False, True]


def test_a_peer_is_read_without_its_asserts(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(
        "from fla.ops.utils.pooling import mean_pooling\nassert False\nx = mean_pooling\n"
    )
    made = peers.modules(tmp_path, [path.name], independent.FLA)["theirs"]
    x = torch.arange(5.0).reshape(1, 5, 1, 1)
    assert made.x(x, 2, None).flatten().tolist() == [0.5, 2.5, 4.0]
    assert "fla" not in sys.modules


def test_files_of_a_peer_import_those_before_them(tmp_path):
    (tmp_path / "src" / "theirs").mkdir(parents=True)
    files = {
        "src/theirs/first.py": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Size:\n    n: int\n",
        "src/theirs/second.py": "import torch\nfrom theirs.first import Size\n"
        "from absent import kernel\nsize = Size(3)\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    made = peers.modules(tmp_path, list(files), {"absent": ("kernel",)})
    assert made["second"].size == made["theirs.first"].Size(3)
    assert not {"theirs", "theirs.first", "absent"} & set(sys.modules)


def test_a_package_is_known_by_its_version(tmp_path):
    folder = tmp_path / "theirs-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    known = {"package": "theirs", "version": "1.2"}
    assert peers.origin("", "theirs", tmp_path) == (tmp_path, known)


def test_runs_have_means_that_differ():
    x = {name: torch.randn(1, 256, 2, 16) for name in "qkv"}
    made = independent_pooled.in_runs(x, q=64, k=32)
    for name, size in (("q", 64), ("k", 32)):
        lengths = [y[name].unflatten(1, (-1, size)).mean(2).norm(dim=-1).mean() for y in (x, made)]
        assert lengths[1] > 2 * lengths[0]
        torch.testing.assert_close(made[name].std(), x[name].std(), rtol=0.2, atol=0)
    assert made["v"] is x["v"]


def test_tiers_of_lists_are_read_up_to_what_is_skipped():
    """Block 3 as it is, 0 and 2 by 2, none by 4, 1 by 8; block 4 is not read."""
    lists = torch.tensor([[[3, -1, 0, 2, -1, -1, 1, -1, 4, -1]]])
    assert independent_pooled.tiers(lists, 5).tolist() == [[[True, True, True, True, False]]]


# Starting tiles -------------------------------------------------------------------------------------


def test_variants_of_a_start_change_one_value_and_what_follows_from_it():
    start = {"BLOCK_T": 4, "BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}
    changed = {key: list(starts.variants(start, key)) for key in start}
    assert changed["BLOCK_M"] == []
    assert {"BLOCK_T": 2, "BLOCK_M": 32} in changed["BLOCK_T"]
    assert changed["BLOCK_N"] == [{"BLOCK_N": 32}, {"BLOCK_N": 64}]  # no dot has fewer than 16
    assert {"num_warps": 4} not in changed["num_warps"]
    assert {"num_stages": 1} in changed["num_stages"]


def test_the_best_of_the_kept_starts_was_tried_and_right():
    for path in common.found([], "starts"):
        for name, kernel in common.read_json(path)["kernels"].items():
            if name.endswith("/skipped"):
                continue
            times = [(t["ms"], t["status"]) for t in kernel["tried"] if t["ms"] is not None]
            assert {status for _, status in times} == {"ok"}, name
            assert kernel["best_ms"] in [kernel["start_ms"], *(ms for ms, _ in times)], name


# Kernels of peers -----------------------------------------------------------------------------------

THEIRS = """
import torch

def topk_sparse_attention(q, k, v, chosen, size, cu, scale):
    T, group = len(q), q.shape[1] // k.shape[1]
    assert (chosen.diff(dim=-1)[chosen[..., 1:] >= 0] > 0).all() and cu.tolist() == [0, T]
    seen = torch.zeros(*chosen.shape[:2], -(-T // size) + 1, dtype=torch.bool)
    seen = seen.scatter(-1, chosen.long() + 1, True)[..., 1:].repeat_interleave(size, -1)[..., :T]
    seen = (seen & torch.ones(T, T, dtype=torch.bool).tril()).repeat_interleave(group, 0)
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1).float() for x in (k, v))
    logits = q.transpose(0, 1).float() @ k.mT * q.shape[-1] ** -0.5
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (p @ v).transpose(0, 1).to(q.dtype)

def linear_compress(*_):
    raise RuntimeError("it has none")

def FSA_topk_sparse_attention(q, k, v, chosen, size, cu):
    return 1.1 * topk_sparse_attention(q, k, v, chosen, size, cu, None)
"""
PEERS_TINY = ["--device", "cpu", "--tokens", "200", "--heads", "4", "2", "--dim", "16"]
PEERS_TINY += ["--seconds", "0.001", "--inputs", "real", "--systems", "nsa_xunhao"]


@pytest.fixture
def their_checkouts(tmp_path, monkeypatch):
    """Two peers that run on a CPU, of which one is wrong, and one that is not there."""
    for name in ("xunhao", "fsa"):
        peer = peer_kernels.PEERS[name]
        checkout = tmp_path / peer.repository.split("/")[1]
        package = checkout / peer.module.replace(".", "/")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(THEIRS)
        (checkout / "COMMIT").write_text(f"{name}0123456789\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("native_sparse_attention", "fla", "fsa"):
            del sys.modules[name]


@pytest.mark.usefixtures("sanitized")
def test_peers_are_timed_once_they_agree(their_checkouts, tmp_path):
    out = tmp_path / "out"
    argv = ["--sources", str(their_checkouts), *PEERS_TINY, "-o", str(out)]
    assert peers_speed.main(argv) == 0
    (path,) = out.glob("peers_cpu_*.json")
    result = common.read_json(path)
    (case,) = result["cases"].values()
    steps = case["steps"]
    done = {step for step, entry in steps.items() if entry["status"] == "ok"}
    assert done >= {"hsgen whole", "hsgen choose", "hsgen attend", "xunhao attend", "dense torch"}
    assert steps["xunhao attend"]["error"] < peers_speed.TOLERANCE
    assert "RuntimeError: it has none" in steps["xunhao whole"]["reason"]
    assert "off by 0.1" in steps["fsa attend"]["reason"]
    assert "ms" not in steps["fsa attend"]
    assert steps["fla attend"]["status"] == "failed"
    assert str(tmp_path) not in path.read_text()
    page = peers_report.page([result])
    assert "at xunhao0123" in page
    assert "off by 0.1" in page
    argv += ["--resume", str(path), "--budget", "0"]
    assert peers_speed.main(argv) == 0
    assert common.read_json(path)["cases"]["nsa_xunhao/200/real"]["steps"].keys() == steps.keys()


def test_everything_of_peers_is_compiled_ahead():
    args = peers_speed.arguments(["--sources", "DIR"])
    jobs = peers_speed._jobs(args)
    assert {(name, way) for _, name, way in jobs if name != "hsgen"} >= {
        (name, "attend") for name in peer_kernels.PEERS
    }
    assert ("nsa_fla", "fla", "choose") in jobs
    assert ("nsa", "hsgen", "") in jobs


def test_a_selection_survives_the_forms_of_peers():
    indices = torch.tensor(
        [[[[3, -1, 0], [1, 2, -1]], [[-1, -1, 4], [0, 1, 2]]]], dtype=torch.int32
    )
    theirs = peer_kernels.by_head(indices)
    assert theirs.shape == (2, 2, 3)
    assert theirs.tolist() == [[[0, 3, -1], [4, -1, -1]], [[1, 2, -1], [0, 1, 2]]]
    again = peer_kernels.by_token(theirs)
    assert independent.same_rows(again, indices).all()
    assert peers_speed.overlap(again[0], indices[0]) == 1.0


def test_page_of_peers_divides_by_ours():
    case = {"system": "nsa_fla", "tokens": 8192, "inputs": "real"}
    steps = {"hsgen whole": 2.0, "fla whole": 5.0, "dense cuDNN": 4.0, "dense flash": 8.0}
    steps |= {"hsgen choose": 1.0, "fla choose": 3.0, "fla compress and choose": 2.0}
    steps |= {"hsgen attend": 1.0, "xunhao attend": 4.0, "fla attend": 3.0}
    case["steps"] = {
        step: {"status": "ok", "ms": {"median": ms}, "tflops": 1.0} for step, ms in steps.items()
    }
    case["steps"]["fsa attend"] = {"status": "failed", "reason": "no"}
    made = dict.fromkeys(("torch", "triton", "cuda", "cudnn", "driver", "date", "command"), "1")
    made |= {"card": "NVIDIA X", "peers": {"fla": {"repository": "a/b", "commit": "c" * 40}}}
    page = peers_report.page([{"runs": [made], "cases": {"a": case}}])
    assert "| X, 8,192, nsa_fla, real | 2 | fla | 5 | 2.50× | 4 | cuDNN | 2.00× |" in page
    assert "| X, 8,192, nsa_fla, real | 1 | fla | 3 | 2 | 2.00× |" in page
    assert "| X, 8,192, nsa_fla, real | 1 | 4 | 3 | – | 3.00× |" in page
    assert "- fsa attend: failed: no" in page


def test_page_of_peers_is_made_of_the_kept_results():
    paths = common.found([], "peers")
    if paths:
        written = (common.ROOT / "docs" / "peers.md").read_text()
        page = peers_report.page([common.read_json(path) for path in paths])
        assert written == page, "run python -m benchmarks.peers_speed --report"


# TileLang's kernels ---------------------------------------------------------------------------------

TILELANG = {
    "deepseek_v32/fp8_lighting_indexer.py": """
import torch

def mqa_attn_return_logits(q, k, k_scale, weights, starts, ends):
    q = q.float().unflatten(0, weights.shape)
    scores = (q @ k.float().mT).relu() * weights[..., None]
    return scores.sum(1) * k_scale

def clean_logits_(scores, starts, ends):
    scores[torch.arange(scores.shape[1]) >= ends[:, None]] = -torch.inf
""",
    "deepseek_v32/topk_selector.py": """
import torch

def tl_topk(scores, starts, ends, topk):
    seen = scores.masked_fill(torch.arange(scores.shape[1]) >= ends[:, None], -torch.inf)
    chosen = seen.topk(topk, dim=-1).indices.flip(0).int()
    return chosen.flip(0).masked_fill(torch.arange(topk) >= ends[:, None], 0)
""",
    "deepseek_v32/sparse_mla_fwd.py": """
import torch

def sparse_mla_fwd_interface(q, kv, indices, sm_scale):
    T, width = q.shape[1], kv.shape[-1] - 8
    seen = torch.zeros(T, T + 1, dtype=torch.bool).scatter(1, indices[0, :, 0].long(), True)[:, :T]
    logits = torch.einsum("thd,sd->ths", q[0].float(), kv[0, :, 0].float()) * sm_scale
    logits = logits.masked_fill(~(seen & seen.new_ones(T, T).tril())[:, None], -torch.inf)
    o = torch.einsum("ths,sd->thd", logits.softmax(-1), kv[0, :, 0, :width].float())
    return o[None].to(q.dtype), logits.logsumexp(-1)
""",
    "deepseek_v32/sparse_mla_fwd_pipelined.py": """
from sparse_mla_fwd import sparse_mla_fwd_interface as plain

def sparse_mla_fwd_interface(q, kv, indices, q_start, kv_stride, sm_scale):
    return 1.1 * plain(q, kv, indices, sm_scale)[0], None
""",
    "deepseek_v32/sparse_mla_fwd_seesaw.py": """
from sparse_mla_fwd import sparse_mla_fwd_interface as plain

def sparse_mla_fwd_interface(q, kv, indices, q_start, kv_stride, sm_scale):
    o = plain(q, kv, indices, sm_scale)[0]
    o[:, :3] = float("nan")
    return o, None
""",
    "deepseek_v32/sparse_mla_bwd.py": """
import torch
from sparse_mla_fwd import sparse_mla_fwd_interface

def sparse_mla_bwd(q, kv, o, do, indices, lse, sm_scale):
    with torch.enable_grad():
        q, kv = (x.detach().float().requires_grad_() for x in (q, kv))
        out = sparse_mla_fwd_interface(q, kv, indices, sm_scale)[0]
        return torch.autograd.grad(out, (q, kv), do.float())
""",
    "dsa_hisa/hisa.py": """
def hisa_indexer(q, k, k_scale, weights, starts, ends, *, k_block_size, block_topk, topk_tokens):
    raise RuntimeError(f"no GPU for {k_block_size} {block_topk} {topk_tokens}")
""",
}
TINY_DSA = """
hsgen: 1
name: tiny_dsa
heads: {query: 16, kv: 1}
head_dim: {qk: 24, v: 16}
causal: true
index: {heads: 4, dim: 32, dtype: fp8, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 8}
attend: [{name: selected, over: token, storage: latent, scale: 0.2}]
"""
TINY_HISA = """
hsgen: 1
name: tiny_hisa
heads: {query: 4, kv: 2}
head_dim: 16
causal: true
index: {heads: 4, dim: 32, keys: shared}
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: relu_weighted, share: all}
    select: {beam: 3, force: {first: 1, last: 1}}
  - name: token
    within: block
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 8}
attend: [{name: selected, over: token}]
"""


@pytest.fixture
def tilelang(tmp_path, monkeypatch):
    """TileLang's examples as far as the CPU goes, one of them wrong, on small specs."""
    checkout = tmp_path / "tilelang"
    for name, text in TILELANG.items():
        path = checkout / "examples" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (checkout / "COMMIT").write_text("tl0123456789\n")
    specs = {"dsa": parse(TINY_DSA), "hisa": parse(TINY_HISA)}
    monkeypatch.setattr(tilelang_peers, "load", lambda name: verify(specs[name]))
    yield tmp_path
    for name in TILELANG:
        sys.modules.pop(name.split("/")[1].removesuffix(".py"), None)


@pytest.fixture
def beside_tilelang(tilelang, tmp_path):
    argv = ["--sources", str(tilelang), "--device", "cpu", "--tokens", "200", "--seconds", "0"]
    argv += ["--inputs", "random", "-o", str(tmp_path / "out")]
    assert tilelang_peers.main(argv) == 0
    (path,) = (tmp_path / "out").glob("tilelang_peers_cpu_*.json")
    assert str(tmp_path) not in path.read_text()
    return common.read_json(path)


def test_tilelang_is_timed_once_it_agrees(beside_tilelang):
    cases = {case["part"]: case["steps"] for case in beside_tilelang["cases"].values()}
    assert cases.keys() == set(tilelang_peers.CASES)
    for part, name in (
        ("choose", "theirs"),
        ("choose", "theirs, torch.topk"),
        ("attend", "sparse_mla_fwd"),
    ):
        assert cases[part][name]["status"] == "ok", cases[part][name]
        assert cases[part][name]["ms"]["median"] > 0
    assert cases["choose"]["theirs"]["as_ours"] > 0.97  # some rows choose among zeros
    assert cases["choose"]["theirs"]["of_flat"] == 1.0
    assert abs(cases["choose"]["hsgen"]["short"]) < 0.1
    assert cases["attend"]["sparse_mla_fwd"]["error"] < tilelang_peers.ALIKE
    assert "relative error 0.1" in cases["attend"]["sparse_mla_fwd_pipelined"]["reason"]
    assert "ms" not in cases["attend"]["sparse_mla_fwd_pipelined"]
    assert "short_rows" not in cases["attend"]["sparse_mla_fwd"]
    assert cases["attend"]["sparse_mla_fwd_seesaw"]["short_rows"] == "relative error nan"
    assert cases["attend"]["sparse_mla_fwd_seesaw"]["ms"]["median"] > 0
    assert "no GPU for 8 3 8" in cases["filter"]["theirs"]["reason"]
    assert cases["gradients"]["theirs"]["error"] < tilelang_peers.ALIKE


def test_a_measurement_of_tilelang_goes_on(beside_tilelang, tilelang, tmp_path):
    kept = {**beside_tilelang, "cases": {}}
    case = beside_tilelang["cases"]["attend/200/random"] | {"tokens": "kept"}
    kept["cases"]["attend/200/random"] = case
    common.write_json(tmp_path / "kept.json", kept)
    argv = ["--sources", str(tilelang), "--device", "cpu", "--tokens", "200", "--seconds", "0"]
    argv += ["--inputs", "random", "--parts", "attend", "filter", "-o", str(tmp_path / "out")]
    assert tilelang_peers.main([*argv, "--resume", str(tmp_path / "kept.json")]) == 0
    (path,) = (tmp_path / "out").glob("tilelang_peers_cpu_*.json")
    found = common.read_json(path)
    assert found["cases"].keys() == {"attend/200/random", "filter/200/random"}
    assert found["cases"]["attend/200/random"]["tokens"] == "kept"
    assert len(found["runs"]) == 2


def test_page_of_tilelang_says_what_failed(beside_tilelang):
    page = tilelang_report.page([beside_tilelang])
    assert "tile-ai/tilelang at tl01234567" in page
    assert "filter, theirs: RuntimeError: no GPU for 8 3 8" in page
    assert "sparse_mla_fwd_seesaw: relative error nan of rows that see fewer tokens" in page


def test_page_of_tilelang_divides_by_ours():
    steps = {"hsgen": 2.0, "sparse_mla_fwd": 5.0, "sparse_mla_fwd_pipelined": 3.0}
    case = {"part": "attend", "tokens": 8192, "inputs": "real", "status": "ok"}
    case["steps"] = {n: {"status": "ok", "ms": {"median": ms}} for n, ms in steps.items()}
    took = {"void at::(anonymous namespace)::a<int>(x)": 1.0, "b": 1.5, "void at::a<float>(x)": 1.0}
    case["steps"]["hsgen"]["kernels"] = tilelang_peers.by_name(took)
    made = {"card": "NVIDIA X", **dict.fromkeys(("torch", "triton", "date", "command"), "1")}
    made["peer"] = {"repository": "a/b", "commit": "c" * 40, "version": "1"}
    page = tilelang_report.page([{"runs": [made], "cases": {"a": case}}])
    assert "| X, 8,192, real | 2 | 5 | 3 | – | 1.50× |" in page
    assert "| X, 8,192, real, attend, hsgen | `at::a` 2; `b` 1.5 |" in page


def test_an_index_in_eight_bits_is_that_of_the_reference():
    x = torch.randn(50, 32, dtype=torch.bfloat16) * torch.logspace(-3, 3, 50)[:, None].bfloat16()
    x[7], x[8, :] = 0, 448 * 2.0**-5
    kept, scale = tilelang_peers.eight(x)
    assert torch.equal(kept.double() * scale[:, None].double(), stored(x.double(), "fp8"))


def test_scores_beside_the_last_one_chosen_are_counted():
    ends = torch.tensor([8, 3, 8], dtype=torch.int32)
    scores = torch.tensor([[9.0, 8, 1.2, 1.1, 1.0, 0.2, -1, -2]] * 3)
    scores[2] = torch.tensor([-1.0, -1.1, -1.3, -2, -8, -9, -10, -11])
    # 1.2, 1.1 and 1.0 share two bits after the first; -1.0, -1.1 do, -1.3 does not
    assert tilelang_peers.fullest(scores[:1], ends[:1], 3) == 3
    assert tilelang_peers.fullest(scores[:1], ends[:1], 6) == 1
    assert tilelang_peers.fullest(scores[1:2], ends[1:2], 4) == 0  # all are chosen
    assert tilelang_peers.fullest(scores[2:], ends[2:], 2) == 2


def test_a_choice_is_judged_by_what_the_reference_chooses(tilelang):
    spec = tilelang_peers.load("dsa")
    x = tilelang_peers.inputs(spec, "random", 100, "cpu", ())
    ours = tilelang_peers.own_choice(spec, x)[0]
    assert tilelang_peers.judged(spec, x, ours)["same_choice"] == 1.0
    tilelang_peers.require_distinct(ours)
    with pytest.raises(checking.CheckError, match="twice"):
        tilelang_peers.require_distinct(ours[:, [0, 0]])
    worse = torch.arange(8, dtype=torch.int32).expand(100, 8)
    with pytest.raises(checking.CheckError, match="of the reference's choice"):
        tilelang_peers.judged(spec, x, worse)


def test_page_of_tilelang_is_made_of_the_kept_results():
    paths = common.found([], "tilelang_peers")
    if paths:
        written = (common.ROOT / "docs" / "tilelang_peers.md").read_text()
        page = tilelang_report.page([common.read_json(path) for path in paths])
        assert written == page, "run python -m benchmarks.tilelang_peers --report"


# Authors' kernels -------------------------------------------------------------------------------------

MINFERENCE = {
    "block_sparse_flash_attention": """
import torch

def _build_block_index(q, k, top_k, rows, size):
    means = [x.float().unflatten(2, (-1, size)).mean(3) for x in (q, k)]
    scores = means[0] @ means[1].mT
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.where(seen, -torch.inf).topk(top_k).indices.int().sort(-1).values

def _triton_block_sparse_attention(q, k, v, lengths, lists, scale, rows, size):
    T = q.shape[2]
    blocks = torch.zeros(*lists.shape[:3], T // size, dtype=torch.bool)
    blocks = blocks.scatter(-1, lists.long(), True)
    seen = blocks.repeat_interleave(rows, 2).repeat_interleave(size, 3).tril()
    logits = (q.float() @ k.float().mT * scale).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v.float()).to(q.dtype)
""",
    "streaming_kernel": """
def a_shape_kernel(q, k, v, config):
    assert config == {"attn_forward_config": {"n_init": 128, "n_local": 3968}}
    return v
""",
}


@pytest.fixture
def beside_authors(tmp_path, monkeypatch):
    """Two of MInference's kernels as far as the CPU goes, one of them wrong; MoA's are not there."""
    checkout = tmp_path / "MInference"
    (checkout / "minference" / "ops").mkdir(parents=True)
    for name, text in MINFERENCE.items():
        (checkout / "minference" / "ops" / f"{name}.py").write_text(text)
    (checkout / "COMMIT").write_text("mi0123456789\n")
    small = standins.bind(load("minference"), query=2, kv=1, dim=16)
    monkeypatch.setattr(authors, "load", lambda _: verify(common.with_budget(small, "block", 2)))
    argv = ["--sources", str(tmp_path), "--device", "cpu", "--tokens", "256", "--seconds", "0"]
    argv += ["--inputs", "random", "-o", str(tmp_path / "out")]
    argv += ["--authors", "minference_blocks", "minference_a_shape", "moa"]
    assert authors.main(argv) == 0
    (path,) = (tmp_path / "out").glob("authors_cpu_*.json")
    yield common.read_json(path)
    for name in [each for each in sys.modules if each.partition(".")[0] == "minference"]:
        del sys.modules[name]


def test_authors_kernels_are_timed_once_they_agree(beside_authors):
    cases = {case["author"]: case for case in beside_authors["cases"].values()}
    steps = cases["minference_blocks"]["steps"]
    for name in ("hsgen", "choose", "attend", "whole", "dense"):
        assert steps[name]["status"] == "ok", steps[name]
        assert steps[name]["ms"]["median"] > 0
    assert steps["choose"]["as_ours"] == steps["choose"]["more"] == 1.0
    assert steps["choose"]["same_choice"] == 1.0
    assert 0 < steps["attend"]["error"] < 1e-2
    assert 0 < steps["whole"]["error"] < 1e-2
    wrong = cases["minference_a_shape"]["steps"]["whole"]
    assert "relative error" in wrong["reason"]
    assert "ms" not in wrong


def test_authors_that_are_not_there_are_named_with_what_to_fetch(beside_authors):
    missing = beside_authors["cases"]["moa/256/random"]
    assert missing["status"] == "failed"
    assert "git clone https://github.com/thu-nics/MoA" in missing["reason"]
    page = authors_report.page([beside_authors])
    assert "https://github.com/microsoft/MInference) at mi01234567" in page
    assert "- MInference, A shape, cpu, 256, whole: CheckError: relative error" in page


def test_a_choice_of_authors_that_differs_is_told(beside_authors):
    del beside_authors
    spec = verify(common.with_budget(authors.load("minference"), "block", 2))
    x = samples.make(spec, "random", 256, "cpu", 0, [])
    x["route"] = torch.ones(2, dtype=torch.int32)
    ours = authors.Ours.made(spec, x, "block")
    mask = ours.mask("block", 4)
    assert mask.sum(-1).tolist() == [[1, 2, 2, 2]] * 2
    mask[0, 3] = ~mask[0, 3]
    found = authors.judged(ours, "block", mask)
    assert found["as_ours"] == pytest.approx(12 / 14)
    assert found["more"] == 1.0
    assert found["same_choice"] == 0.5  # of the last block of rows, head 0 has none, head 1 both
    back = authors.rows_of("block", mask, ours.of)
    assert back.indices.shape == (1, 256, 2, 2)
    assert (dataclasses.replace(ours, chosen={"block": back}).mask("block", 4) == mask).all()


def test_page_of_authors_divides_by_ours():
    case = {"author": "xattention", "tokens": 8192, "inputs": "real", "status": "ok"}
    steps = {"hsgen": 2.0, "choose": 5.0, "dense": 3.0}
    case["steps"] = {n: {"status": "ok", "ms": {"median": ms}} for n, ms in steps.items()}
    case["steps"]["hsgen"]["kernels"] = {"score_block": 0.5, "rank_block": 0.5, "attend_a": 0.8}
    case["steps"]["choose"] |= {"device_ms": 4.0, "as_ours": 0.5, "kept": [0.9, 0.95]}
    made = {"card": "NVIDIA X", **dict.fromkeys(("torch", "triton", "date", "command"), "1")}
    made["peers"] = {"xattention": {"repository": "a/b", "commit": "c" * 40}}
    page = authors_report.page([{"runs": [made], "cases": {"a": case}}])
    assert "| XAttention, X, 8,192 | 2 | – | – | 3 | 1.50× |" in page
    assert "| XAttention, X, 8,192 | 1 | 4 | 4.00× |" in page
    assert "| XAttention, X, 8,192, choose | – | 50.00 % | – | – | 0.900, 0.950 |" in page


def test_page_of_authors_is_made_of_the_kept_results():
    paths = common.found([], "authors")
    if paths:
        written = (common.ROOT / "docs" / "authors.md").read_text()
        page = authors_report.page([common.read_json(path) for path in paths])
        assert written == page, "run python -m benchmarks.authors --report"


# Decoding ---------------------------------------------------------------------------------------------


def test_steps_of_decoding_are_checked_and_written_up(tmp_path):
    few = ["--systems", "quest", "--batches", "2", "--contexts", "40"]
    assert decode.main(["--device", "cpu", *few, "-o", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("decode_cpu_*.json")
    result = common.read_json(path)
    case = result["cases"]["quest/2/40"]
    assert (case["status"], case["layers"]) == ("ok", 1)
    assert case["error"] < 1e-5
    # of 41 tokens all are chosen; the reference keeps no entries: keys and values, 2 heads of 16
    assert case["bytes_read"] == 2 * 48 * (16 + 16) * 2 * 4
    written = decode.page([result])
    assert "| cpu, quest | 2 | 40 |" in written
    assert "Nothing." in written


@pytest.mark.parametrize("case", [(64, 262144), (256, 65536)])
def test_what_of_long_contexts_fits_a_card_of_80_gb(case):
    """As the script says: nsa keeps the keys and values of three branches."""
    fits = {x: decode.needed_bytes(decode.spec_of(x), *case, 1) < 80e9 for x in decode.SYSTEMS}
    assert fits == {"quest": True, "moba": True, "nsa": False}
    assert decode.needed_bytes(decode.spec_of("nsa"), 64, 131072, 1) < 80e9


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.full
def test_gradients_are_checked_before_they_are_timed(tmp_path, capsys):
    argv = [*TINY, "--systems", "moba", "--tokens", "130", "-o", str(tmp_path)]
    assert backward.main(argv) == 0
    (path,) = tmp_path.glob("backward_*.json")
    steps = common.read_json(path)["cases"]["moba/130/real"]["steps"]
    wanted = ["check small", "check", "forward", "both", "forward of dense torch", "dense torch"]
    assert [steps[name]["status"] for name in wanted] == ["ok"] * len(wanted)
    assert "moba, 130" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    spec = standins.bind(load("moba"), query=2, kv=2, dim=16)
    x = samples.make(spec, "random", 70, "cpu", 0, [])
    right = backward.gradients

    def wrong(*arguments):
        return right(*arguments) | {"v": torch.ones_like(x["v"])}

    monkeypatch.setattr(backward, "gradients", wrong)
    with pytest.raises(checking.CheckError, match="relative errors of gradients"):
        backward.check(spec, x, [(0, 70)])


# --- streams beside rows


def test_outputs_that_differ_are_not_timed(monkeypatch):
    """Of two programs of one spec."""
    spec = load("moba")
    timed = []

    class Fake:
        def __init__(self, sign):
            self.sign = sign

        def __call__(self, **x):
            return self.sign * x["q"]

        def select(self, **_):
            return {}

    made = {False: Fake(1.0), True: Fake(1.1)}
    x = {"q": torch.randn(1, 4, 2, 8)}
    monkeypatch.setattr(streams.hsgen, "load_kernel", lambda _, target=None: made[target is None])
    monkeypatch.setattr(streams.samples, "make", lambda *_: x)
    monkeypatch.setattr(streams.checking, "compare", lambda *_: {})
    monkeypatch.setattr(streams.timing, "time_calls", lambda *_: timed.append(0))
    with pytest.raises(checking.CheckError, match="beside `rows`"):
        streams.case(spec, 4, "random", (), H100)
    assert not timed
