"""Kernels whose keys one warp streams: which do, their text, their binary; on a card, beside `rows`."""

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import emitted
import pytest
import torch
from conformance import systems

from hsgen import (
    allowlist,
    dryrun,
    knobs,
    load_kernel,
    pipeline,
    resources,
    samples,
    schedule,
    space,
)
from hsgen.errors import ArgumentError, BuildError
from hsgen.execution import Options, Program, _aligned
from hsgen.measurer import Shape
from hsgen.plan import STREAMED as SKELETONS
from hsgen.reference import tensor_shapes
from hsgen.runtime import Kernel
from hsgen.spec import load
from hsgen.streams import StreamsContext
from hsgen.target import A100, B200, H100, with_streams

STREAMING = replace(H100, streams=True)
EXAMPLE = "examples/block_lists.yaml"
STREAMED = {
    "nsa": {"attend_compressed", "score_block", "attend_selected", "attend_window"},
    "infllm_v2": {"score_block", "attend_selected"},
    "dsa_gqa": {"score_token", "attend_selected"},  # tokens that rows picked
    "hisa": {"score_token", "attend_selected"},
    "moba": set(),  # rows come to blocks
    "vsa": {"attend_fine"},  # a stream for each of two tiles
    "sparse_mla": {"score_token", "attend_selected"},  # its latents are gathered
}
since_3_6 = pytest.mark.skipif(
    not with_streams(H100).streams, reason="the installed Triton has no Gluon for Hopper"
)
ROOT = Path(__file__).parents[1]


def spec_of(name):
    return load(str(ROOT / name)) if "/" in name else systems.load(name)


def plan_of(name, target=STREAMING, dtype="bf16"):
    return schedule.schedule(emitted.graph(spec_of(name)), target, dtype)


def streamed(plan):
    return {kernel.name for kernel in plan.kernels if kernel.skeleton in SKELETONS}


# --- which


@pytest.mark.parametrize(
    ("target", "triton", "streams"),
    [
        (H100, "3.6.0", True),
        (H100, "3.8.0+git", True),
        (H100, "3.9.0", False),
        (H100, "3.10.1", False),
        (H100, "3.5.1", False),
        (A100, "3.6.0", False),
        (B200, "3.6.0", False),
    ],
)
def test_streams_are_for_hopper_and_a_triton_that_writes_them(target, triton, streams):
    assert with_streams(target, triton).streams is streams


@pytest.mark.parametrize("name", STREAMED)
def test_kernels_that_stream(name):
    assert streamed(plan_of(name)) == STREAMED[name]


@pytest.mark.parametrize("name", ["nsa", "infllm_v2"])
def test_no_kernel_of_float32_or_of_another_card_streams(name):
    assert not streamed(plan_of(name, dtype="fp32"))
    assert not streamed(plan_of(name, H100))


def test_tiles_need_rows_that_begin_at_16_bytes():
    x = torch.zeros(2, 8, 3, 64, dtype=torch.bfloat16)
    assert _aligned(x)
    assert _aligned(x[:, 1:, ::2])
    assert _aligned(x[:1].expand(1, 8, 3, 64))
    assert not _aligned(x[:, :, :1].expand(2, 8, 3, 64))  # broadcast
    assert not _aligned(torch.zeros(2, 8, 3, 68, dtype=torch.bfloat16)[..., :64])


def test_no_group_is_without_a_token():
    found = space.space(emitted.graph(spec_of("dsa_gqa")), STREAMING)
    (knob,) = (
        each
        for part in found.variants[0].parts
        for each in part.knobs
        if each.label == "score_token.BLOCK_T"
    )
    assert [knob.value(code) for code in knob.codes] == [2, 4]  # of 64 heads, for two groups


# --- what a caller may say


@pytest.mark.parametrize(
    ("name", "kernel", "given", "message"),
    [
        ("nsa", "attend_window", {"BLOCK_N": 64, "STAGES": 3}, ""),
        ("nsa", "attend_window", {"BLOCK_T": 8, "num_warps": 4}, ""),
        ("nsa", "attend_window", {"BLOCK_N": 48}, "expected one of BLOCK_N 32 64 128, got 48"),
        ("nsa", "attend_selected", {"BLOCK_N": 128}, "expected one of BLOCK_N 32 64, got 128"),
        ("nsa", "attend_window", {"BLOCK_T": 4}, "expected BLOCK_T=8, got 4"),
        ("nsa", "attend_window", {"BLOCK_M": 64}, "expected BLOCK_M=128, got 64"),
        ("nsa", "attend_window", {"num_warps": 8}, "expected num_warps=4, got 8"),
        ("nsa", "attend_window", {"STAGES": 1}, "expected one of STAGES 2 3 4 5 6 7 8, got 1"),
        (
            "nsa",
            "attend_window",
            {"STAGES": 8},
            "STAGES=8 needs 704,512 bytes of shared memory, h100 has 232,448 a block",
        ),
        ("nsa", "score_block", {"BLOCK_T": 8, "BLOCK_M": 128, "STAGES": 6}, ""),
        ("nsa", "score_block", {"BLOCK_T": 8}, "expected BLOCK_M=128 beside BLOCK_T=8, got 256"),
        ("nsa", "score_block", {"BLOCK_T": 32}, "expected one of BLOCK_T 4 8 16, got 32"),
        ("nsa", "score_block", {"BLOCK_N": 32}, "expected BLOCK_N=64, got 32"),
        ("hisa", "attend_selected", {"BLOCK_N": 32}, ""),
        ("sparse_mla", "attend_selected", {"BLOCK_N": 32, "STAGES": 4}, ""),
        ("sparse_mla", "attend_selected", {"BLOCK_H": 32}, "expected BLOCK_H=64, got 32"),
        (
            "nsa",
            "rank_block",
            {"BLOCKS": 2},
            "expected some of BLOCK_R, BLOCK_N, num_warps, num_stages, got 'BLOCKS'",
        ),
    ],
)
def test_values_that_a_stream_cannot_have_are_told(name, kernel, given, message):
    plan = plan_of(name)
    made = plan.kernel(kernel)
    found = knobs.refused(made, given, made.config.keywords() | given, plan, STREAMING)
    assert found.split("; ")[0] == message


@since_3_6
def test_values_that_are_accepted_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    artifact = pipeline.compile_spec(spec_of("nsa"), STREAMING)
    jobs = resources.plan_jobs(artifact.plan, artifact.module, STREAMING)
    by_name = {job.signature.function: job for job in jobs}
    tried = [
        replace(by_name[kernel], constants={**by_name[kernel].constants, **values})
        for kernel, values in (
            ("attend_selected", {"BLOCK_N": 32, "STAGES": 2}),
            ("score_block", {"BLOCK_T": 4, "BLOCK_M": 64, "STAGES": 2}),
        )
    ]
    for found in resources.measure(tried):
        assert isinstance(found, resources.Resources), found
        assert found.blocks_per_sm == 1


def test_a_call_with_such_values_is_refused_before_anything_compiles():
    """By the plan of a card that streams, of which a CPU has no call of its own."""
    spec = small("nsa")
    plan = plan_of("nsa")

    def compiler(spec, target, dtype, **options):
        config = {each.name: each.config.keywords() for each in plan.kernels}
        origin = dict.fromkeys(config, "default")
        return Program(driver=None, plan=plan, config=config, origin=origin, launches=1)

    options = Options(interpret=True, config={"attend_window": {"BLOCK_N": 48}})
    kernel = Kernel(spec, options, key="streams refused", compiler=compiler)
    x = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec, 1, 4, 4).items()}
    match = "config: attend_window: expected one of BLOCK_N 32 64 128, got 48"
    with pytest.raises(ArgumentError, match=match):
        kernel(**x)


# --- text


@pytest.mark.parametrize("name", ["nsa", EXAMPLE, "sparse_mla", "hisa"])
def test_sources_are_golden(name, golden):
    plan = plan_of(name)
    sources = emitted.sources(plan)
    for file in (*(f"{kernel}.py" for kernel in sorted(streamed(plan))), "driver.py"):
        golden(f"streams/{spec_of(name).name}/{file}", sources[file])


def test_everything_emitted_is_formatted_and_allowed(tmp_path):
    for name in (*STREAMED, EXAMPLE):
        sources = emitted.sources(plan_of(name))
        allowlist.check(sources)
        folder = tmp_path / spec_of(name).name
        folder.mkdir()
        for file, text in sources.items():
            (folder / file).write_text(text)
    command = (sys.executable, "-m", "ruff", "format", "--check", "--isolated", "--no-cache")
    style = ("--line-length=100", "--target-version=py311")
    done = subprocess.run([*command, *style, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "from triton.experimental.gluon.language.nvidia.hopper import cluster",
        "from triton.experimental import proton",
        "from triton.runtime import driver",
    ],
)
def test_nothing_else_of_triton_is_imported(line):
    with pytest.raises(BuildError, match="import"):
        allowlist.check({"kernel.py": f"{line}\n"})


def test_launches_bring_what_kernels_take():
    plan = plan_of("nsa")
    run = dryrun.run(plan, tokens=1024)
    for kernel in plan.kernels:
        if isinstance(kernel.context, StreamsContext):
            launched = run.launch(kernel.name)
            assert launched.grid == (132,)
            heads = launched.arguments["items"] // launched.arguments["tiles"]
            assert heads == 4
            assert launched.arguments["tiles"] >= 1024 // kernel.config["BLOCK_T"]


@pytest.mark.parametrize("name", ["nsa", "sparse_mla"])
def test_scores_fill_rounds_of_processors_within_an_eighth(name):
    """Of the bytes of queries and outputs, which a call has anyway."""
    plan, tokens = plan_of(name), 131072
    run = dryrun.run(plan, tokens=tokens)
    sizes = plan.sizes
    held = tokens * sizes["Hq"] * (sizes["Dqk"] + sizes["Dv"]) * 2
    scratch = sum(array.bytes for buffer, array in run.buffers if buffer.role == "scratch")
    assert schedule.SCRATCH_BYTES < scratch <= held / 8
    (scorer,) = (kernel.name for kernel in plan.kernels if kernel.name.startswith("score_"))
    assert run.launch(scorer).arguments["items"] % dryrun.PROCESSORS == 0


@pytest.mark.parametrize("tokens", [65536, 131072, 524288])
def test_scores_of_long_rows_fill_a_round_of_processors(tokens):
    """Four times their scratch, or a quarter of the bytes of queries and outputs, has room for it."""
    plan = plan_of("dsa_gqa")
    run = dryrun.run(plan, tokens=tokens)
    assert run.launch("score_token").arguments["items"] == dryrun.PROCESSORS
    held = tokens * plan.sizes["Hq"] * (plan.sizes["Dqk"] + plan.sizes["Dv"]) * 2
    scratch = sum(array.bytes for buffer, array in run.buffers if buffer.role == "scratch")
    assert scratch <= max(4 * schedule.SCRATCH_BYTES, held / 4)


# --- binary


@since_3_6
@pytest.mark.parametrize(
    ("name", "function"),
    [
        (EXAMPLE, "attend_selected"),
        ("hisa", "attend_selected"),  # tokens that four warps gather
        ("hisa", "score_token"),  # children of lists that are merged
    ],
)
def test_it_compiles_and_hardly_spills(tmp_path, monkeypatch, name, function):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    artifact = pipeline.compile_spec(spec_of(name), STREAMING)
    jobs = resources.plan_jobs(artifact.plan, artifact.module, STREAMING)
    (job,) = (job for job in jobs if job.signature.function == function)
    (found,) = resources.measure((job,))
    assert isinstance(found, resources.Resources), found
    assert found.cost.spill_bytes <= 32
    assert (
        found.cost.warps == 12
    )  # two groups, and four that gather, or one that streams and counts as four
    assert found.cost.shared_bytes <= H100.smem_per_block
    assert found.blocks_per_sm == 1
    if function.startswith("attend"):
        assert widths_of_stores(found.cost.binary) == {128, 32}  # outputs, and log-sum-exps


def widths_of_stores(binary):
    """Bits a thread of what a cubin writes."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(found or 32) for found in re.findall(r"\bSTG\.E(?:\.(\d+))?\b", text)}


# --- on a card


def small(name):
    """Fewer heads, and head dims that tiles have."""
    heads = {"nsa": (32, 2), "infllm_v2": (14, 2)}.get(name)  # a group of 16, and one of 7
    spec = spec_of(name)
    if heads is None:
        return spec
    changed = spec.heads.model_copy(update={"query": heads[0], "kv": heads[1]})
    return spec.model_copy(update={"heads": changed})


@pytest.fixture
def pair():
    """Of a spec: a kernel as it comes, and one whose loops are all Triton's own."""

    def make(spec):
        if not with_streams(H100).streams or torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("nothing streams here")
        plain = replace(_target(), streams=False)
        return load_kernel(spec), load_kernel(spec, target=plain)

    return make


def _target():
    return type(H100).current()


def inputs(spec, queries, keys, sequences=1, seed=0):
    shape = Shape(queries=queries, keys=keys, sequences=sequences)
    return samples.for_shape(spec, shape, (), device="cuda", seed=seed)


def close(x, y):
    """Of outputs that were rounded once more or less."""
    error = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-6)
    assert error < 5e-3, error
    assert torch.isfinite(x).all()


def same_on_a_choice(pair, spec, x, **options):
    """Outputs over the choice that Triton's own loops made, and how often the choices are the same."""
    streams, plain = pair(spec)
    chosen = plain.select(**{name: x[name] for name in plain._choosing.names}, **options)
    found, lse = streams(**x, selection=chosen, return_lse=True, **options)
    expected, expected_lse = plain(**x, selection=chosen, return_lse=True, **options)
    close(found, expected)
    again = streams(**x, selection=chosen, **options)
    assert torch.equal(again, found)
    for branch, value in _by_branch(lse).items():
        torch.testing.assert_close(value, _by_branch(expected_lse)[branch], atol=2e-2, rtol=1e-3)
    own = streams.select(**{name: x[name] for name in plain._choosing.names}, **options)
    for level, selection in own.items():
        alike = (selection.indices == chosen[level].indices).float().mean()
        assert alike > 0.98, (level, alike)
    program = [p for binding, p in streams._execution.programs.items() if binding.aligned]
    assert any("STAGES" in values for p in program for values in p.config.values())


def _by_branch(lse):
    return lse if isinstance(lse, dict) else {"": lse}


CASES = ["nsa", "infllm_v2", EXAMPLE, "sparse_mla", "dsa_gqa", "hisa"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("queries", "keys"), [(1333, 1333), (64, 777), (5, 2048), (2048, 2048)])
def test_lengths(pair, name, queries, keys):
    spec = small(name)
    same_on_a_choice(pair, spec, inputs(spec, queries, keys, sequences=2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_keys_beyond_the_end_are_never_seen(pair, name):
    spec = small(name)
    x = inputs(spec, 300, 1100, sequences=2)
    lens = torch.tensor([1001, 345], device="cuda", dtype=torch.int32)
    for key, value in x.items():
        if value.ndim == 4 and value.shape[1] == 1100:
            for z, n in enumerate(lens.tolist()):
                value[z, n:] = float("nan")
    same_on_a_choice(pair, spec, x, kv_lens=lens)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_documents(pair, name):
    spec = small(name)
    x = inputs(spec, 1500, 1500)
    packed = {
        key: value[0] if value.ndim > 2 and value.shape[:2] == (1, 1500) else value
        for key, value in x.items()
    }
    cu = torch.tensor([0, 700, 707, 1500], device="cuda", dtype=torch.int32)
    same_on_a_choice(pair, spec, packed, cu_seqlens_q=cu)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_groups_that_need_several_member_words(pair, group):
    """Tiles of up to 128 tokens, each half of which looks at the words of its own."""
    spec = spec_of("nsa")
    heads = spec.heads.model_copy(update={"query": 2 * group, "kv": 2})
    spec = spec.model_copy(update={"heads": heads})
    same_on_a_choice(pair, spec, inputs(spec, 1333, 1333, sequences=2))


@pytest.mark.gpu
def test_tiles_that_are_gathered_are_left_out(pair):
    """Rows that choose nothing alike: their unions are dear, and another kernel attends."""
    spec = spec_of("dsa_gqa")
    x = inputs(spec, 3000, 3000)
    for key in x:
        if key.startswith("index"):
            x[key] = torch.randn_like(x[key])
    same_on_a_choice(pair, spec, x)


@pytest.mark.gpu
def test_rows_that_begin_elsewhere_go_without(pair):
    spec = small("nsa")
    x = inputs(spec, 500, 500)
    streams, plain = pair(spec)
    expected = plain(**x)
    wide = torch.zeros(*x["k"].shape[:-1], x["k"].shape[-1] + 1, device="cuda", dtype=x["k"].dtype)
    wide[..., 1:] = x["k"]
    found = streams(**(x | {"k": wide[..., 1:]}))
    close(found, expected)
    assert any(not binding.aligned for binding in streams._execution.programs)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tokens"), [("dsa_gqa", 900), ("hisa", 9000)])
def test_exact_scores_choose_alike(pair, name, tokens):
    """Small whole numbers: every sum is exact, in whatever order."""
    spec = systems.load(name)
    x = inputs(spec, tokens, tokens)
    for key in x:
        if key.startswith("index"):
            x[key] = torch.randint(-2, 3, x[key].shape, device="cuda").to(x[key].dtype)
    streams, plain = pair(spec)
    names = plain._choosing.names
    own = streams.select(**{name: x[name] for name in names})
    for level, other in plain.select(**{name: x[name] for name in names}).items():
        assert torch.equal(own[level].indices, other.indices)
