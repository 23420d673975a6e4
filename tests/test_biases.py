"""A learned bias of every key: what rows keep by it, what logits have of it, and its gradient."""

import os
import subprocess
import sys

import emitted
import pytest
import sanitizer
import torch
from conformance import backends, calls, systems
from conformance.oracles import check
from template_lint import lint
from test_backward import check as check_gradients
from test_backward import i32

from hsgen import allowlist, backward, dryrun, load_kernel, schedule
from hsgen.errors import PlanError
from hsgen.running import TILE_ROWS
from hsgen.spec import parse, verify
from hsgen.target import H100

GPU = os.environ["HSGEN_TEST_LANE"] == "gpu"  # tests below are of one lane
LOGITS = """
hsgen: 1
name: logits
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: 32, v: 16}}
levels:
  - name: entry
    partition: {partition}
    {pool}
    score: {{form: dot, {share}}}
    select: {{top_k: {top}, force: {{last: 1}}}}
attend:
  - {{name: selected, over: entry, bias: learned{more}}}
"""
OF_BLOCKS = {"partition": "{blocks: 8}", "pool": "pool: {keys: mean}", "top": 3}
OF_TOKENS = {"partition": "tokens", "pool": "", "top": 6}
GROUP, HEAD = "share: group, reduce: sum", "share: head"


def running(k, *, first=0, last=0, counted=True, causal=True, **shape):
    """`dma` with other budgets."""
    spec = systems.small("dma", causal=causal, **shape)
    (level,) = spec.levels
    force = level.select.force.model_copy(update={"first": first, "last": last, "counted": counted})
    select = level.select.model_copy(update={"top_k": k, "force": force})
    return verify(
        spec.model_copy(update={"levels": (level.model_copy(update={"select": select}),)})
    )


def chosen(spec, **options):
    """What kernels keep of a call, which must be what the reference keeps."""
    made = {name: options.pop(name) for name in ("B", "T", "S", "integers") if name in options}
    dtype = torch.float16 if made.get("integers") else torch.float32
    call = calls.make(spec, dtype=dtype, **made).with_options(**options)
    found = backends.interpreter(call)
    check(call, found)
    assert torch.equal(found.selection["token"], call.reference().selection["token"].indices)
    return found.selection["token"]


@pytest.mark.parametrize(
    ("k", "force"),
    [
        (3, {}),
        pytest.param(17, {"first": 2, "counted": True}, marks=pytest.mark.full),
        (5, {"first": 2, "last": 3, "counted": False}),
    ],
)
def test_rows_keep_the_tokens_of_greatest_bias(k, force):
    """Of integers, so of many equal ones; several points and tiles, rows in the middle of both."""
    spec = running(k, **force, group=1)
    assert chosen(spec, T=75, S=230, integers=True).shape[-1] == k + sum(
        force.get(x, 0) * (not force.get("counted", True)) for x in ("first", "last")
    )


def test_rows_before_and_behind_all_keys_keep_what_there_is():
    lengths = {"kv_lens": i32(40, 0, 23), "q_offset": i32(-3, 0, 30)}
    found = chosen(running(4, group=1), B=3, T=12, S=40, **lengths)
    assert (found[0, :3] == -1).all()
    assert (found[1] == -1).all()
    assert torch.equal(found[2, 0], found[2, -1])


@pytest.mark.full
def test_all_rows_keep_the_same_where_none_is_before_another():
    found = chosen(running(5, causal=False, group=1), T=20, S=200)
    assert (found == found[:, :1]).all()


def test_what_is_no_number_is_kept_last():
    """Infinite ones are numbers; -0 and what is subnormal are 0, of which the earlier are kept."""
    call = calls.make(running(4, group=1), T=9)
    bias = torch.tensor([torch.nan, -1.0, 0.0, -0.0, 1e-42, -torch.inf, 2.0, torch.nan, 1.0])
    call = call.with_tensors(bias=bias[None, :, None].expand(1, 9, 2).contiguous())
    found = backends.interpreter(call).selection["token"]
    wanted = call.reference(dtype=torch.float32).selection["token"].indices
    assert torch.equal(found, wanted)
    assert found[0, -1, 0].tolist() == [2, 3, 6, 8]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_biases_that_choose_have_gradients(seed, dtype, monkeypatch):
    """Of documents of 1, of 0 and of odd tokens; those that no row keeps have none."""
    monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    with sanitizer.enabled(seed=seed):
        found = check_gradients(
            running(5, group=3, kv=1, dims=(32, 16)),
            T=75,
            dtype=dtype,
            cu_seqlens_q=i32(0, 70, 70, 71, 75),
        )
    assert found["bias"].any()


@pytest.mark.full
@pytest.mark.parametrize("share", [GROUP, HEAD])
def test_biases_of_blocks_have_gradients(seed, share):
    spec = parse(LOGITS.format(query=4, kv=2, share=share, more="", **OF_BLOCKS))
    with sanitizer.enabled(seed=seed):
        check_gradients(spec, B=2, T=30, S=35, q_offset=i32(5, -2))


@pytest.mark.parametrize(
    ("of", "share"), [(OF_TOKENS, HEAD), (OF_BLOCKS, GROUP)], ids=["tokens", "blocks"]
)
def test_biases_have_gradients(of, share):
    check_gradients(parse(LOGITS.format(query=2, kv=1, share=share, more="", **of)), T=13)


@pytest.mark.full
@pytest.mark.parametrize("of", [OF_BLOCKS, OF_TOKENS], ids=["blocks", "tokens"])
def test_a_bias_is_added_behind_a_cap(of):
    spec = parse(LOGITS.format(query=4, kv=2, share=GROUP, more=", softcap: 2.0", **of))
    call = calls.make(spec, T=40)
    call = call.with_tensors(q=4 * call.tensors["q"])
    check(call, backends.interpreter(call))


def test_a_tile_ends_within_the_room_of_its_point():
    """Whatever is forced, and however many rows it has."""
    for k, last in ((1, 0), (128, 0), (129, 70), (2048, 0), (64, 1000)):
        plan = _plan(running(k, last=last, counted=False))
        (context,) = (x.context for x in plan.kernels if x.name == "rank_token")
        assert context.span >= 1
        assert context.room >= context.ranked
        assert context.span + last + TILE_ROWS <= context.room


@pytest.mark.parametrize(
    ("force", "words"),
    [
        ({"last": 2}, "scores by a learned bias"),
        ({"first": 4}, "scores by a learned bias"),
        ({"last": 2, "counted": False, "causal": False}, "scores by a learned bias"),
    ],
)
def test_what_no_kernel_ranks_row_after_row_is_refused(force, words):
    with pytest.raises(PlanError, match=f"level token: no kernel {words} yet"):
        _plan(running(4, **force))


def test_no_cache_has_biases_yet():
    kernel = load_kernel(systems.small("dma"), interpret=True)
    with pytest.raises(PlanError, match="no kernel .* in a cache yet"):
        cache = kernel.new_cache(1, 32)
        kernel.decode(**calls.make(kernel.spec, T=1).tensors, cache=cache)


@pytest.mark.full
def test_sources_of_biases_are_formatted_and_obey_the_rules(tmp_path):
    """Beside those of the specs that are shipped."""
    specs = [
        running(5, first=2, last=3, counted=False),
        running(5, causal=False),
        *(
            parse(LOGITS.format(query=4, kv=2, share=share, more=", softcap: 2.0", **of))
            for share in (GROUP, HEAD)
            for of in (OF_BLOCKS, OF_TOKENS)
        ),
    ]
    graphs = [emitted.graph(each) for each in specs]
    plans = [schedule.schedule(each, H100) for each in graphs]
    plans += [backward.plan(emitted.graph(running(5)), H100)]
    uncapped = (LOGITS.format(query=4, kv=2, share=x, more="", **OF_BLOCKS) for x in (GROUP, HEAD))
    plans += [backward.plan(emitted.graph(parse(each)), H100) for each in uncapped]
    for number, plan in enumerate(plans):
        sources = emitted.sources(plan)
        allowlist.check(sources)
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, text in sources.items():
            assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file
            (folder / file).write_text(text)
    for command in (["format", "--check", "--diff"], ["check", "--select=F"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache"]
        where = ["--line-length=100", "--target-version=py311", str(tmp_path)]
        done = subprocess.run([*ruff, *where], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_calls_hold_little_beside_what_they_are_given_and_give():
    """Of selections too, of which each row has a list."""
    for name in ("dma", "nosa"):
        plan = emitted.shipped_plan(name)
        for tokens in (4096, 8192, 32768, 131072):
            run = dryrun.run(plan, tokens=tokens)
            given = run.given + run.of("output") + run.of("selection")
            assert run.given + run.peak <= 1.25 * given, (
                name,
                tokens,
                (run.given + run.peak) / given,
            )


def _plan(spec):
    return schedule.schedule(emitted.graph(spec), H100)
