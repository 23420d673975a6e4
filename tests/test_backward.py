"""Gradients of emitted kernels against float64, on the choice that the kernels made."""

import os
import subprocess
import sys
from dataclasses import replace

import emitted
import pytest
import sanitizer
import torch
from conformance import (
    systems,
    test_clusters,
    test_entries,
    test_estimates,
    test_foretold,
    test_slashes,
)
from reference_driver import compiler
from shares import covering
from template_lint import lint
from torch.nn import functional as F

from hsgen import (
    allowlist,
    backward,
    execution,
    knobs,
    load_kernel,
    operators,
    pipeline,
    resources,
    schedule,
    space,
)
from hsgen.cols_streams import ColsStreamsContext
from hsgen.errors import ArgumentError, PlanError
from hsgen.execution import Options
from hsgen.reference import tensor_kinds, tensor_shapes
from hsgen.runtime import Kernel
from hsgen.spec import Combine, Static, load, parse
from hsgen.streams import StreamsContext
from hsgen.target import H100, Target, with_streams

GPU = os.environ["HSGEN_TEST_LANE"] == "gpu"  # tests below are of one lane
# of dots of float32 in three passes of TF32, and of plain ones
UNIT = {
    torch.float32: 2.0**-21 if GPU else 2.0**-23,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
GOLDEN = (
    *("moba", "nsa", "dsa_gqa", "dsa", "flex_prefill", "seer_attention", "hip", "pbs_attn", "psa"),
    *("s2o", "deepseek_hca", "deepseek_csa"),
)
STREAMING = replace(H100, streams=True)
BRANCHES = ("compressed", "selected", "window")  # of nsa
STREAMED = {  # of each spec, what dk and dv come from by a stream of rows
    "nsa": {f"dkv_{branch}" for branch in BRANCHES},
    "minimax_m3": {"dkv_selected"},
    "moba": set(),  # each query head chooses: a tile would have a row of a token
    "infllm_v2": {"dkv_selected"},
    "nsa_fla": set(),  # head dim 32
    "dsa": set(),  # no rows are walked again
}
DERIVED = {  # and dq by one of keys
    "nsa": {f"{made}_{branch}" for made in ("delta", "dq") for branch in BRANCHES},
    "minimax_m3": {"dq_selected"},
    "moba": {"dq_selected"},
    "infllm_v2": {"dq_selected"},
    "nsa_fla": set(),
    "dsa": {"dq_selected"},
}

CHOSEN = """
hsgen: 1
name: chosen
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
levels:
  - name: block
    partition: {{blocks: {size}}}
    pool: {{keys: mean}}
    score: {{form: dot, {share}}}
    select: {{top_k: {top}, force: {{last: 1}}}}
attend:
  - {{name: selected, over: block}}
"""
GATED = (
    CHOSEN
    + """  - {{name: near, window: {window}, kv: near}}
  - {{name: far, window: {window}}}
combine: {{gates: input}}
"""
)
UNITED = (
    CHOSEN
    + """  - {{name: near, window: {window}, kv: near}}
combine: {{softmax: union}}
"""
)
SHARED = """
hsgen: 1
name: shared
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
levels:
  - name: block
    partition: {{blocks: {size}}}
    pool: {{keys: mean}}
    query: {{block: {rows}, pool: mean}}
    score: {{form: dot, {share}}}
    select: {{top_k: {top}, force: {{last: 1}}}}
attend:
  - {{name: selected, over: block}}
"""
SORTED = """
hsgen: 1
name: sorted
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
levels:
  - name: block
    permute: {{keys: {{sort_in_segment: {segment}, {by}}}}}
    partition: {{blocks: {size}}}
    pool: {{keys: mean}}
    query: {{block: {rows}, pool: mean}}
    score: {{form: dot, normalise: softmax}}
    select: {{top_p: {{mass: 0.6}}, force: {{sink: 3, last: 1, counted: false}}}}
attend:
  - {{name: selected, over: block}}
"""
WALKED = """
hsgen: 1
name: walked
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
levels:
  - name: token
    permute: {{keys: {{sort_in_segment: {segment}, by: mean}}}}
    partition: {{blocks: 1}}
    pool: {{keys: mean}}
    query: {{block: {rows}, pool: mean}}
    score: {{form: dot}}
    select: {{early_stop: {{gain: {gain}, entries: {step}, after: segment}}}}
attend:
  - {{name: segment, static: {{blocks: {size}, window: 1}}}}
  - {{name: walk, over: token}}
combine: {{softmax: union}}
"""
KEPT = """
hsgen: 1
name: kept
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
levels:
  - name: all_mass
    partition: tokens
    query: {{last: 8, reduce: mean}}
    score: {{form: dot, normalise: softmax, share: all, reduce: mean}}
  - name: all
    partition: tokens
    score: {{from: all_mass, map: around, width: 3}}
    select: {{top_p: {{mass: 0.5, boundary: drop, min: 2, of: rest}}, force: {{last: 2}}}}
  - name: mass
    partition: tokens
    query: {{last: 8, reduce: mean}}
    score: {{form: dot, normalise: softmax}}
  - name: token
    partition: tokens
    score: {{from: mass, map: around, width: 3}}
    select: {{budget_from: all, force: {{last: 2}}}}
attend:
  - {{name: kept, over: token, rows: chosen}}
"""
BESIDE = """  - {{name: near, window: {window}}}
combine: {{{combine}}}
"""
POOLED = """
hsgen: 1
name: pooled
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
levels:
  - name: entry
    partition: {{blocks: {size}, stride: {stride}}}
    pool: {{{pool}}}
    score: {{form: dot}}
attend:
  - {{name: entry, over: entry, values: pooled}}
  - {{name: near, window: {window}}}
combine: {{gates: input}}
"""
WINDOW = """
hsgen: 1
name: windowed
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
attend:
  - {{name: near, window: {window}}}
"""
TOKENS = """
hsgen: 1
name: tokens
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
levels:
  - name: token
    partition: tokens
    score: {{form: dot, {share}}}
    select: {{top_k: {top}, force: {{first: 1, last: 2}}}}
attend:
  - {{name: selected, over: token}}
"""
GATED_TOKENS = (
    TOKENS
    + """  - {{name: near, window: {window}}}
combine: {{gates: input}}
"""
)
UNITED_SINK = UNITED.replace("softmax: union", "softmax: union, sink: learned")
SINK = """
hsgen: 1
name: sunk
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
attend:
  - {{name: near, window: {window}, sink: learned}}
"""
OUTPUT_GATED = (
    CHOSEN
    + """  - {{name: near, window: {window}}}
combine: {{{combine}}}
"""
)
LATENT = """
hsgen: 1
name: latent
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
levels:
  - name: entry
    partition: {partition}
    {pool}
    score: {{form: dot, {share}}}
    select: {{top_k: {top}, force: {{last: 1}}}}
attend:
  - {{name: selected, over: entry, storage: latent}}
"""
TWO_LATENTS = (
    LATENT
    + """  - {{name: near, window: {window}, storage: latent}}
combine: {{gates: input}}
"""
)
POOLED_LATENTS = """
hsgen: 1
name: pooled_latents
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
levels:
  - name: entry
    partition: {{blocks: {size}, stride: {stride}}}
    {kv_of}
    pool: {{keys: gated, softmax: {softmax}{then}}}
    score: {{form: dot}}
attend:
  - {{name: compressed, over: entry, values: pooled, storage: latent}}
  - {{name: near, window: {window}, storage: latent}}
combine: {{softmax: union, sink: learned}}
"""
CHOSEN_LATENTS = """
hsgen: 1
name: chosen_latents
heads: {{query: {query}, kv: 1}}
head_dim: {{qk: {qk}, v: {qk}}}
causal: {causal}
index: {{heads: 2, dim: 16, keys: shared}}
levels:
  - name: index
    partition: {{blocks: 8, stride: 4, before: 4}}
    pool: {{keys: gated, softmax: channel, series: 2, then: norm}}
    score: {{form: relu_weighted, share: all}}
  - name: entry
    partition: {{blocks: 8, stride: 4, before: 4}}
    kv: entry
    pool: {{keys: gated, softmax: channel, position: learned, series: 2, then: norm}}
    score: {{from: index, map: max}}
    select: {{top_k: {top}}}
attend:
  - {{name: selected, over: entry, values: pooled, storage: latent}}
  - {{name: near, window: {window}, storage: latent}}
combine: {{softmax: union, sink: learned}}
"""
OWN = {"kv_of": "kv: entry", "softmax": "channel"}
NEIGHBOURS = OWN | {
    "stride": 8,
    "then": ", position: learned, then: norm, "
    "rotate: {at: first, dims: 16, channels: last, pairs: neighbours}",
}
# entries overlap, of tokens that the window attends too
HALVES = OWN | {
    "stride": 3,
    "kv_of": "",
    "causal": "false",
    "then": ", then: norm, rotate: {at: first, dims: 24, channels: first, pairs: halves}",
}
BY_BASE = OWN | {"then": ", position: learned, rotate: {at: centre, dims: 16, base: 100.0}"}
OF_TOKENS = {"partition": "tokens", "pool": ""}
OF_BLOCKS = {"partition": "{blocks: 8}", "pool": "pool: {keys: mean}"}
GROUP = "share: group, reduce: sum"
MAPPED = "keys: linear, values: linear, position: learned"
SMALL = {
    "stride": 4,
    "pool": MAPPED,
    "size": 8,
    "top": 3,
    "window": 7,
    "qk": 48,
    "v": 32,
    "share": GROUP,
    "causal": "true",
    "rows": 12,
    "combine": "softmax: union",
    "segment": 16,
    "by": "by: mass, last: 5",
    "gain": 0.1,
    "step": 5,
}


def spec(text, **numbers):
    return parse(text.format(**(SMALL | numbers)))


def with_caps(spec):
    capped = [x.model_copy(update={"softcap": 1.5, "scale": 0.5}) for x in spec.attend]
    return spec.model_copy(update={"attend": tuple(capped)})


def tensors(spec, B, T, S, dtype, *, packed=False):
    """Random tensors that require grad; learned maps keep the size of what they map."""
    kinds, found = tensor_kinds(spec), {}
    for name, shape in tensor_shapes(spec, B, T, S).items():
        x = torch.randn(shape, device="cuda" if GPU else "cpu")
        if name == "route":  # the second way
            found[name] = torch.ones_like(x, dtype=torch.int32)
            continue
        if name.endswith("_split"):  # half of the text is the prompt
            found[name] = torch.full_like(x, S // 2, dtype=torch.int32)
            continue
        if name.endswith("_weight"):
            x *= (shape[1] * shape[2]) ** -0.5
        lower = packed and kinds[name] != "parameter"
        found[name] = (x[0] if lower else x).to(dtype).requires_grad_()
    return found


def gradients(run, x, grads):
    """Of all outputs with these gradients, by tensor; of a tensor that has none 0."""
    real = {name: t for name, t in x.items() if t.is_floating_point()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in real.items()}
    o, lse = run(**{**x, **leaves}, return_lse=True)
    lse = list(lse.values()) if isinstance(lse, dict) else [lse]
    outputs = [o, *(torch.where(each.isinf(), 0.0, each) for each in lse)]
    grads = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(
        outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def check(
    spec, *, B=1, T, S=None, dtype=torch.float32, lse=True, config=None, kept=True, **options
):
    """Rows of each gradient are as near to float64 as rounding lets them be; two runs have equal bits.

    kept: Branches under gates keep their outputs.
    """
    packed = "cu_seqlens_q" in options
    options = {name: y.cuda() if GPU else y for name, y in options.items()}
    x = tensors(spec, B, T, S or T, dtype, packed=packed)
    attn = load_kernel(spec, interpret=not GPU, config=config)
    with torch.no_grad():
        o, sums = attn(**x, **options, return_lse=True)
        chosen = attn.select(**x, **options) if spec.levels else None
    sums = list(sums.values()) if isinstance(sums, dict) else [sums]
    of_lse = [torch.randn_like(each) * lse for each in sums]
    grads = [torch.randn(o.shape, device=o.device), *of_lse]

    def reference(dtype):
        wide = {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in x.items()}
        run = lambda **y: attn.reference(**y, **options, selection=chosen, dtype=dtype)  # noqa: E731
        return gradients(run, wide, grads)

    found = gradients(lambda **y: attn(**y, **options), x, grads)
    again = gradients(lambda **y: attn(**y, **options), x, grads)
    exact = reference(torch.float64)
    plain = reference(dtype) if dtype == torch.bfloat16 else exact
    for name, y in exact.items():
        assert torch.equal(found[name], again[name]), name
        weight = name.replace("position", "weight")
        if name.endswith("_key_position") and weight in exact and not lse:
            size = exact[weight].abs().max()  # a position shifts all logits of a row alike
            assert y.abs().max() < 1e-9
            assert found[name].abs().max() < 64 * UNIT[dtype] * size
            continue
        assert_near(name, found[name].double(), y, plain[name].double(), UNIT[dtype])
    return found


def assert_near(name, found, exact, plain, unit):
    """The largest error beside the largest number, and all of it, beside what plain PyTorch gets wrong."""
    assert found.isfinite().all(), name
    error, size = (found - exact).abs(), exact.abs().max().clamp(min=1e-30)
    of_plain = (plain - exact).abs().max()
    single = unit < 1e-6  # its own rounding of log-sum-exps and delta counts, which 16 bits hide
    assert error.max() <= (16 if single else 4) * unit * size + 3 * of_plain, (
        name,
        error.max() / size,
        of_plain / size,
    )
    whole = error.norm() / exact.norm().clamp(min=1e-30)
    own = (plain - exact).norm() / exact.norm().clamp(min=1e-30)
    units = 16 if single else 1
    assert whole <= units * unit + 3 * own, (name, whole, own)


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# --- in the interpreter, small


def test_documents_and_long_lists_have_gradients(seed):
    """A group of 3 that chooses by head, lists in chunks, documents of 1, of 0 and of odd tokens."""
    chosen = spec(CHOSEN, query=3, kv=1, share="share: head", qk=32, v=16)
    with sanitizer.enabled(seed=seed):
        check(
            chosen,
            T=29,
            cu_seqlens_q=i32(0, 11, 11, 12, 29),
            config={"dkv_selected": {"BLOCK_C": 4, "BLOCK_T": 4, "BLOCK_M": 16, "BLOCK_N": 16}},
        )


def test_gated_branches_have_gradients_and_empty_rows_none(seed):
    """Two branches share keys, one has its own; a group of 4; the first rows lie before all keys."""
    gated = spec(GATED, query=4, kv=1, qk=16, v=32)
    with sanitizer.enabled(seed=seed):
        found = check(gated, B=2, T=19, S=23, dtype=torch.float16, q_offset=i32(3, -2))
    assert not found["q"][1, :2].any()
    assert not found["gates"][1, :2].any()


def test_warmup_prepares_what_autograd_records():
    """Another forward where branches are gated, or a capture would compile."""
    kernel = load_kernel(spec(GATED, query=2, kv=2, qk=16, v=16), interpret=True)
    x = {name: torch.randn(shape) for name, shape in tensor_shapes(kernel.spec, 1, 20, 20).items()}
    with torch.no_grad():
        kernel.warmup(**x)
    assert [binding.apart for binding in kernel._execution.programs] == [False]
    kernel.warmup(**x | {"gates": x["gates"].requires_grad_()})
    assert [binding.apart for binding in kernel._execution.programs] == [False, True]


def test_what_autograd_records_is_configured_and_explained():
    """Kernels that no other call has: what weighs branches, and delta of gates."""
    gated = spec(GATED, query=2, kv=2, qk=16, v=16)
    given = {
        "weigh_branches": {"BLOCK_R": 4},
        "delta_far": {"BLOCK_R": 16},
        "dq_near": {"BLOCK_N": 16},
    }
    kernel = load_kernel(gated, interpret=True, config=given)
    x = {name: torch.randn(shape) for name, shape in tensor_shapes(gated, 1, 20, 20).items()}
    kernel(**x)
    assert "autograd records" not in kernel.explain()
    o = kernel(**x | {"gates": x["gates"].requires_grad_()})
    o.sum().backward()
    text = kernel.explain()
    plain, recorded = text.split(" that autograd records\n")
    assert "calls of" in plain
    assert "weigh_branches: BLOCK_R=4" in recorded
    told = recorded.split("gradients compiled for heads 2/2, head dim 16/16, fp32, cpu")[1]
    assert "branches apart" in told.splitlines()[0]
    for name in given:
        (line,) = (x for x in recorded.splitlines() if x.startswith(f"  {name}: "))
        assert line.endswith("  (caller)"), line
    unknown = load_kernel(gated, interpret=True, config={"weigh": {"BLOCK_R": 4}})
    match = "config: expected one of .*attend_near.*, delta_far.*, weigh_branches, .*, got 'weigh'"
    with pytest.raises(ArgumentError, match=match):
        unknown(**x)


def test_gates_have_gradients_where_outputs_of_branches_were_not_kept(monkeypatch):
    """As under torch.compile, whose operators give a call's outputs and nothing beside them."""
    gated = spec(GATED, query=2, kv=1, qk=16, v=16)
    check(gated, T=21)
    kept = load_kernel(gated, interpret=True)._execution.programs
    assert any(binding.apart for binding in kept)
    monkeypatch.setattr(operators, "is_watched", lambda call: True)
    check(gated, T=21, kept=False)
    check(gated, T=21, dtype=torch.float16, kept=False)
    again = load_kernel(gated, interpret=True)._execution._gradients
    assert any(not binding.apart for binding, _ in again)


def test_a_caller_may_ask_that_nothing_of_branches_is_kept():
    gated = spec(GATED, query=2, kv=1, qk=16, v=16)
    kernel, x = (
        load_kernel(gated, interpret=True, recompute=True),
        tensors(gated, 1, 9, 9, torch.float32),
    )
    again = gradients(kernel, x, [torch.ones(1, 9, 2, 16), *[torch.zeros(1, 2, 9)] * 3])
    assert not any(binding.apart for binding in kernel._execution.programs)
    kept = load_kernel(gated, interpret=True)
    assert kept is not kernel
    expected = gradients(kept, x, [torch.ones(1, 9, 2, 16), *[torch.zeros(1, 2, 9)] * 3])
    for name, grad in again.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_are_of_what_hooks_give_back_however_it_lies():
    """Of saved tensors whose last stride is not 1, which kernels do not read."""
    gated = spec(GATED, query=2, kv=1, qk=16, v=32)
    kernel = load_kernel(gated, interpret=True)
    x = {n: torch.randn(shape) for n, shape in tensor_shapes(gated, 1, 11, 11).items()}
    leaves = {n: y.requires_grad_() for n, y in x.items()}
    of_o = torch.randn(1, 11, 2, 32)

    def run():
        o = kernel(**leaves)
        return torch.autograd.grad(o, [*leaves.values()], of_o)

    def swapped(y):
        return y.transpose(-1, -2).contiguous().transpose(-1, -2) if y.ndim > 2 else y

    expected = run()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: y, swapped):
        found = run()
    for name, one, other in zip(leaves, found, expected, strict=True):
        assert torch.equal(one, other), name


def test_gradients_are_by_the_program_for_tensors_that_lie_as_those_that_come_back():
    """Broadcast keys cannot come in a stream, their copies on the host can, and others cannot again."""
    window, made = spec(WINDOW, query=4, kv=2, causal="true", qk=16, v=16), []
    key = "a backward of moved tensors"
    kernel = Kernel(window, Options(interpret=True), key=key, compiler=compiler(made))
    q, k, v = (torch.randn(shape) for shape in ((1, 9, 4, 16), (1, 9, 1, 16), (1, 9, 2, 16)))
    leaves = {"q": q, "k": k.expand(1, 9, 2, 16), "v": v}
    leaves = {n: y.detach().requires_grad_() for n, y in leaves.items()}

    def run():
        o = kernel(**leaves)
        return torch.autograd.grad(o, [*leaves.values()], torch.ones_like(o))

    def drivers():
        """By whether it is for tensors that a stream can bring, how often each one ran."""
        programs = kernel._execution.gradients
        return {bound.aligned: len(x.driver.calls) for (bound, _), x in programs.items()}

    def uneven(y):
        """Rows that begin at no multiple of 16 bytes."""
        return F.pad(y, (0, 1))[..., :-1] if y.ndim == 4 else y

    expected = run()
    assert drivers() == {False: 1}
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda y: y):
        found = run()
    assert drivers() == {False: 1, True: 1}
    with torch.autograd.graph.saved_tensors_hooks(lambda y: y, uneven):
        again = run()
    run()
    assert drivers() == {False: 3, True: 1}
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.full)])
def test_tiles_of_axes_have_gradients(kept, monkeypatch, seed):
    """Tiles that are cut off, rows that end in one; outputs of both branches kept, or made again."""
    tiled = systems.small("vsa", group=3, kv=1, dims=(32, 16))
    if not kept:
        monkeypatch.setattr(operators, "is_watched", lambda call: True)
    with sanitizer.enabled(seed=seed):
        check(tiled, T=37, dtype=torch.float32 if kept else torch.float16, kept=kept)


def test_documents_of_tiles_have_gradients(seed):
    tiled = systems.small("vsa", group=2, kv=1, dims=(32, 32))
    with sanitizer.enabled(seed=seed):
        check(tiled, T=24, cu_seqlens_q=i32(0, 9, 9, 10, 24))


@pytest.mark.full
def test_branches_under_one_softmax_have_gradients():
    check(spec(UNITED, query=3, kv=1, qk=16, v=16), T=19)


@pytest.mark.parametrize("causal", ["true", pytest.param("false", marks=pytest.mark.full)])
def test_windows_have_gradients(causal):
    windowed = spec(WINDOW, query=2, kv=2, causal=causal)
    check(windowed, B=2, T=21, S=29, kv_lens=i32(29, 17))


@pytest.mark.parametrize("pool", [MAPPED, "keys: mean, values: mean"], ids=["mapped", "mean"])
def test_gradients_go_back_through_pools(pool, seed):
    """Of overlapping entries, to tokens and to what maps them; a mean's tokens are attended too."""
    pooled = spec(POOLED, query=2, kv=1, qk=16, v=32, pool=pool)
    with sanitizer.enabled(seed=seed):
        if pool == MAPPED:
            check(pooled, B=2, T=19, S=23, kv_lens=i32(23, 14))
        else:
            check(pooled, T=31, cu_seqlens_q=i32(0, 7, 30, 31), dtype=torch.float16)


def test_gradients_go_back_through_what_gates_weigh(seed):
    """To tokens, gates, positions, the norm and the angles, of documents."""
    latent = spec(POOLED_LATENTS, **SMALL | NEIGHBOURS, query=6, kv=1)
    with sanitizer.enabled(seed=seed):
        check(latent, T=47, cu_seqlens_q=i32(0, 11, 42, 47), dtype=torch.bfloat16)
    check(latent, T=5)  # none is complete


@pytest.mark.parametrize(
    "numbers", [HALVES, pytest.param(BY_BASE, marks=pytest.mark.full)], ids=["tables", "base"]
)
def test_gradients_go_back_through_entries_that_overlap(numbers, seed):
    """Of two heads, which the same angles turn."""
    latent = spec(POOLED_LATENTS, **SMALL | numbers, query=4, kv=2)
    with sanitizer.enabled(seed=seed):
        check(latent, B=2, T=19, S=23, kv_lens=i32(23, 14))


@pytest.mark.parametrize(
    "query",
    [
        pytest.param(3, id="rows by entry", marks=pytest.mark.full),
        pytest.param(64, id="entries by row"),
    ],
)
def test_pooled_latents_that_rows_chose_have_gradients(query, seed, monkeypatch):
    """Of documents: more than a block of 64 entries has, or each tile of rows in its turn."""
    chosen, few = spec(CHOSEN_LATENTS, **SMALL, query=query), query < 64
    if not few:
        monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    lengths, dtype = (i32(0, 3, 267), torch.float32) if few else (i32(0, 3, 29), torch.bfloat16)
    with sanitizer.enabled(seed=seed):
        check(chosen, T=int(lengths[-1]), dtype=dtype, cu_seqlens_q=lengths)


@pytest.mark.parametrize(
    ("way", "causal"), [("keys and values", True), ("early series", False)], ids=lambda x: str(x)
)
def test_entries_that_rows_chose_have_gradients(way, causal, seed):
    """Means of keys and of values, by heads that share a list; latents where nothing is causal."""
    chosen = test_entries.spec_of(way, causal=causal)
    with sanitizer.enabled(seed=seed):
        check(chosen, B=2, T=7, S=19, kv_lens=i32(19, 12))


def test_a_pooled_latent_that_a_caller_lists_twice_is_given_once():
    """And entries that are not complete, or not there, to none."""
    latent = spec(CHOSEN_LATENTS, **SMALL, query=4)
    x = tensors(latent, 1, 13, 13, torch.float32)
    attn = load_kernel(latent, interpret=True)
    clean = torch.full((1, 13, 1, 3), -1, dtype=torch.int32)
    noisy = torch.full((1, 13, 1, 3), 7, dtype=torch.int32)
    for t in range(3, 13):
        clean[0, t, 0, 0] = (t + 1) // 4 - 1
        noisy[0, t, 0] = torch.tensor([(t + 1) // 4, (t + 1) // 4 - 1, (t + 1) // 4 - 1])
    o = [attn(**x, selection={"entry": each}) for each in (clean, noisy)]
    grads = [torch.autograd.grad(y.square().sum(), list(x.values()), allow_unused=True) for y in o]
    for a, b in zip(*grads, strict=True):
        assert (a is None) is (b is None)
        assert a is None or torch.equal(a, b)


def test_entries_that_gates_weigh_in_other_ways_have_no_gradient():
    words = (
        "branch compressed: no kernel has the gradient of entries whose tokens have one gate each"
    )
    by_token = spec(POOLED_LATENTS, **SMALL | NEIGHBOURS | {"softmax": "token"}, query=4, kv=2)
    with pytest.raises(PlanError, match=words):
        backward.plan(emitted.graph(by_token), H100)


def test_tokens_that_rows_chose_have_gradients(seed, monkeypatch):
    """A group of 3, documents of 1, of 0 and of odd tokens, each in several turns of tiles and of blocks."""
    monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    chosen = spec(TOKENS, query=3, kv=1, qk=32, v=16, top=9)
    config = {
        "dq_selected": {"BLOCK_T": 4, "BLOCK_M": 16},
        "dkv_selected": {"BLOCK_T": 4, "BLOCK_M": 16, "BLOCK_N": 32},
        "mark_rows_selected": {"BLOCK_T": 8, "BLOCK_K": 4},
        "front_rows_selected": {"BLOCK_N": 16},
    }
    with sanitizer.enabled(seed=seed):
        check(chosen, T=150, cu_seqlens_q=i32(0, 70, 70, 71, 150), config=config)


def test_blocks_of_rows_have_gradients(seed):
    """That chose blocks of keys for a group of 3; documents of 1, of 0 and of odd tokens, rows in parts."""
    shared = spec(SHARED, query=3, kv=1, qk=32, v=16, size=16, top=2)
    config = {"dq_selected": {"BLOCK_T": 4, "BLOCK_M": 16}, "takers_selected": {"BLOCK_N": 2}}
    with sanitizer.enabled(seed=seed):
        check(shared, T=50, cu_seqlens_q=i32(0, 11, 11, 12, 50), config=config)


@pytest.mark.parametrize("causal", ["true", pytest.param("false", marks=pytest.mark.full)])
def test_blocks_of_rows_of_which_heads_chose_have_gradients(seed, causal):
    """Each query head for itself: keys are walked by the lists of all heads that share them."""
    numbers = {"share": "share: head", "rows": 40, "top": 6, "causal": causal}
    shared = spec(SHARED, **numbers, query=4, kv=2)
    with sanitizer.enabled(seed=seed):
        check(shared, B=2, T=50, S=61, kv_lens=i32(61, 33))


@pytest.mark.parametrize(
    "numbers",
    [
        {"size": 4, "segment": 12, "query": 3, "kv": 1},
        pytest.param({"by": "by: mean", "rows": 40, "causal": "false"}, marks=pytest.mark.full),
    ],
    ids=["by mass", "by the mean, not causal"],
)
def test_keys_in_another_order_have_gradients(seed, numbers):
    """Neither blocks of rows nor segments divide the other; documents of 1, of 0 and of odd tokens."""
    sorted_ = spec(SORTED, **{"qk": 32, "v": 16, "query": 2, "kv": 2} | numbers)
    config = {"dq_selected": {"BLOCK_T": 4, "BLOCK_M": 16}, "takers_selected": {"BLOCK_N": 2}}
    with sanitizer.enabled(seed=seed):
        check(sorted_, T=50, cu_seqlens_q=i32(0, 11, 11, 12, 50), config=config)


def test_an_order_is_made_again_by_the_values_that_the_call_had():
    """Else slots might be other tokens where weights are nearly equal."""
    config = {"totals_block": {"BLOCK_T": 16, "BLOCK_N": 16}, "weigh_block": {"BLOCK_N": 32}}
    kernel = load_kernel(spec(SORTED, query=2, kv=1), interpret=True, config=config)
    x = tensors(kernel.spec, 1, 40, 40, torch.float32)
    kernel(**x).sum().backward()
    (call,) = kernel._execution.choices.values()
    (made,) = kernel._execution.gradients.values()
    assert made.plan.again == ("totals_block", "weigh_block", "sort_block")
    for name in made.plan.again:
        assert made.config[name] == call.config[name]
        assert made.texts[name] == call.program.texts[name]
    for part in space.space(kernel.graph, H100, work="gradients").variants[0].parts:
        assert not {*part.kernels} & {*made.plan.again}


@pytest.mark.parametrize(
    "numbers",
    [
        {"rows": 24, "segment": 12, "size": 6, "query": 2, "kv": 1},
        pytest.param({"gain": "0.000001", "segment": 8, "rows": 8}, marks=pytest.mark.full),
    ],
    ids=["several segments a block", "to the end"],
)
def test_walks_have_gradients(seed, numbers):
    """Of the tokens that blocks of rows took, and of their own segments beside them."""
    walked = spec(WALKED, **{"qk": 16, "v": 32, "query": 2, "kv": 2} | numbers)
    with sanitizer.enabled(seed=seed):
        check(walked, T=70, cu_seqlens_q=i32(0, 11, 11, 12, 70))


@pytest.mark.parametrize("text", [WALKED, KEPT], ids=["walked", "kept"])
def test_lists_as_long_as_keys_are_made_again(text):
    """By the forward's kernels, as it had them; neither a call nor one that is compiled makes any of rows."""
    kernel = load_kernel(spec(text, query=2, kv=1, qk=16, v=16, rows=16), interpret=True)
    x = tensors(kernel.spec, 1, 40, 40, torch.float32)
    x = {name: y.requires_grad_() for name, y in x.items()}
    found = torch.autograd.grad(kernel(**x).sum(), list(x.values()))
    (call,) = kernel._execution.choices.values()
    (made,) = kernel._execution.gradients.values()
    assert made.plan.again
    for name in made.plan.again:
        assert made.config[name] == call.config[name]
        assert made.texts[name] == call.program.texts[name]
    saved = []
    torch.compiler.reset()
    compiled = torch.compile(lambda **y: kernel(**y), fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        o = compiled(**x)
    again = torch.autograd.grad(o.sum(), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert saved
    assert all(y.dtype.is_floating_point for y in saved)


@pytest.mark.parametrize("causal", ["true", pytest.param("false", marks=pytest.mark.full)])
def test_tokens_that_heads_keep_have_gradients_and_rows_that_they_drop_none(seed, causal):
    kept = spec(KEPT, qk=32, v=16, query=2, kv=1, causal=causal)
    with sanitizer.enabled(seed=seed):
        found = check(kept, T=90, cu_seqlens_q=i32(0, 11, 11, 12, 90))
    dropped = ~found["q"].any(-1)
    assert dropped.any()
    assert not dropped.all()


@pytest.mark.parametrize("text", [SORTED, WALKED, KEPT], ids=["sorted", "walked", "kept"])
def test_rows_of_a_block_may_be_told_sorted_or_kept_tokens_of_their_own(text):
    """A caller's differ from row to row, repeat, and have -1 anywhere and tokens that no row sees."""
    made = spec(text, query=2, kv=1, qk=16, v=16, rows=16)
    x = tensors(made, 1, 40, 40, torch.float32)
    attn = load_kernel(made, interpret=True)
    level = made.levels[-1].name
    last = 4 if level == "block" else 39
    own = torch.stack([torch.tensor([t * last // 39, -1, 0, t % 4, last]) for t in range(40)])
    own = own.int()[None, :, None].repeat(1, 1, 2, 1)
    own[:, 5::3, 1, :3], own[:, 3::7, :, 3] = -1, own[:, 3::7, :, 0]
    wide = {"selection": {level: own}, "dtype": torch.float64}
    exact = attn.reference(**{n: y.double() for n, y in x.items()}, **wide)
    exact = torch.autograd.grad(exact.square().sum(), list(x.values()))
    found = torch.autograd.grad(attn(**x, selection={level: own}).square().sum(), [*x.values()])
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("combine", ["softmax: union", "gates: input"])
def test_blocks_of_rows_beside_a_window_have_gradients_and_empty_rows_none(seed, combine):
    """One softmax leaves a window what it has, gates do not; the first rows lie before all keys."""
    shared = spec(SHARED + BESIDE, window=9, qk=16, v=16, query=2, kv=1, combine=combine)
    with sanitizer.enabled(seed=seed):
        found = check(shared, B=2, T=30, S=35, q_offset=i32(5, -2), dtype=torch.float16)
    assert not found["q"][1, :2].any()


def test_what_a_window_leaves_of_blocks_that_rows_chose_has_gradients(seed):
    united = spec(CHOSEN + BESIDE, window=9, top=4, query=3, kv=1)
    with sanitizer.enabled(seed=seed):
        check(united, T=45)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_rows_of_a_block_may_be_told_lists_of_their_own(apart):
    """A caller's repeat, have -1 anywhere and blocks that no row sees, and differ by row or by block."""
    shared = spec(SHARED, query=2, kv=1, qk=16, v=16, size=8, top=4)
    x = tensors(shared, 1, 40, 40, torch.float32)
    attn = load_kernel(shared, interpret=True)
    of = [t // 12 if apart else t // 24 for t in range(40)]
    clean = torch.stack([torch.tensor([0, i, t // 8, -1]) for t, i in enumerate(of)])
    noisy = torch.stack([torch.tensor([i, t // 8, 0, i]) for t, i in enumerate(of)])
    if apart:
        clean[::3, 0], noisy[::3, 2] = -1, -1
    wide = {"selection": {"block": clean.int()[None, :, None]}, "dtype": torch.float64}
    exact = attn.reference(**{n: y.double() for n, y in x.items()}, **wide)
    exact = torch.autograd.grad(exact.square().sum(), list(x.values()))
    for lists in (clean, noisy):
        o = attn(**x, selection={"block": lists.int()[None, :, None]})
        found = torch.autograd.grad(o.square().sum(), list(x.values()))
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.full)])
def test_tokens_that_blocks_of_rows_chose_have_gradients(seed, causal, monkeypatch):
    """Of runs of keys; documents of 1, of 0 and of odd tokens, in several turns of tiles and of blocks."""
    monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    small = systems.small("dhsa", group=3, kv=1, dims=(32, 16), causal=causal)
    chunk, token = small.levels
    cut = chunk.partition.model_copy(update={"span": 3})
    changes = {"partition": cut, "query": chunk.query.model_copy(update={"block": 12})}
    select = token.select.model_copy(update={"top_k": 15})
    levels = (chunk.model_copy(update=changes), token.model_copy(update={"select": select}))
    shared = small.model_copy(update={"levels": levels})
    config = {"dq_selected": {"BLOCK_T": 8, "BLOCK_M": 16}}
    with sanitizer.enabled(seed=seed):
        check(shared, T=90, cu_seqlens_q=i32(0, 31, 31, 32, 90), config=config)


def test_rows_of_a_block_may_be_told_tokens_of_their_own():
    """A caller's differ from row to row, repeat, and have -1 anywhere and tokens that no row sees."""
    small = systems.small("dhsa", group=2, kv=1, dims=(16, 16))
    x = tensors(small, 1, 70, 70, torch.float32)
    attn = load_kernel(small, interpret=True)
    own = torch.stack([torch.tensor([t, -1, 0, t, t // 2, 69]) for t in range(70)])
    own = own.int()[None, :, None].repeat(1, 1, 2, 1)
    own[:, 5::3, 1, :3] = -1
    wide = {"selection": {"token": own}, "dtype": torch.float64}
    exact = attn.reference(**{n: y.double() for n, y in x.items()}, **wide)
    exact = torch.autograd.grad(exact.square().sum(), list(x.values()))
    found = torch.autograd.grad(
        attn(**x, selection={"token": own}).square().sum(), list(x.values())
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


CLUSTERED = {
    **test_clusters.OTHERS,
    "clusters alone": {"name": "svg2", "keys": 5, "rows": 4, "group": 2},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == test_clusters.NEVER_LEFT_OUT else pytest.mark.full)
        for name in CLUSTERED
    ],
)
def test_rows_that_attend_by_clusters_have_gradients(name, seed):
    """Documents with fewer tokens than clusters, and without rows; in the end rows that a caller tells."""
    clustered = test_clusters.other(dims=(32, 16), **{"group": 1, "kv": 1} | CLUSTERED[name])
    with sanitizer.enabled(seed=seed):
        check(clustered, T=39, cu_seqlens_q=i32(0, 1, 1, 34, 39))


@pytest.mark.parametrize("name", ["svg2", "svg_ear"])
def test_rows_of_a_cluster_may_be_told_clusters_of_their_own(name):
    """A caller's repeat, and have -1 anywhere; a call's own choice, given back, has the same bits."""
    clustered = test_clusters.other(name=name, keys=6, rows=3, dims=(16, 16), group=1, kv=1)
    x = tensors(clustered, 1, 30, 30, torch.float32)
    attn = load_kernel(clustered, interpret=True)
    o, chosen = attn(**x, return_selection=True)
    assert not any(
        y is not None and y.dtype == torch.int32 for y in attn(**x).grad_fn.saved_tensors
    )
    found = torch.autograd.grad(o.square().sum(), list(x.values()))
    own = torch.autograd.grad(attn(**x).square().sum(), list(x.values()))
    assert all(map(torch.equal, found, own))
    level = list(chosen)[-1]
    lists = torch.stack([torch.tensor([t % 6, -1, t // 7, t % 6]) for t in range(30)])
    given = {"selection": {level: lists.int()[None, :, None]}}
    exact = attn.reference(**{n: y.double() for n, y in x.items()}, **given, dtype=torch.float64)
    exact = torch.autograd.grad(exact.square().sum(), list(x.values()))
    found = torch.autograd.grad(attn(**x, **given).square().sum(), list(x.values()))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def ways_of_heads(monkeypatch):
    """One head after the other takes the next way, or after the last one none."""
    usual = tensors

    def other(spec, *sizes, **options):
        x = usual(spec, *sizes, **options)
        if spec.route:
            heads = torch.arange(spec.heads.query, device=x["q"].device)
            x["route"] = (heads % (len(spec.route.input) + 1)).to(torch.int32)
        return x

    monkeypatch.setattr(sys.modules[__name__], "tensors", other)


ESTIMATED = {
    "blocks side by side": lambda: test_estimates.other(dims=(32, 16), kv=2),
    "blocks of a tile": lambda: test_estimates.other(
        rows=32, size=16, dims=(16, 16), local=Static(blocks=16, window=1, sink=1)
    ),
    **test_estimates.OTHERS,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "blocks side by side" else pytest.mark.full)
        for name in ESTIMATED
    ],
)
def test_what_a_pattern_leaves_of_blocks_that_estimates_chose_has_gradients(name, seed):
    """Documents of 1, of 0, of few rows, and of more than a tile has."""
    with sanitizer.enabled(seed=seed):
        check(ESTIMATED[name](), T=75, cu_seqlens_q=i32(0, 1, 1, 71, 75))


def test_estimates_of_fewer_rows_than_keys_have_gradients(seed):
    """Rows lie at the end of more keys, or before all of them."""
    with sanitizer.enabled(seed=seed):
        found = check(test_estimates.other(dims=(16, 16)), B=2, T=35, S=61, q_offset=i32(26, -2))
    assert not found["q"][1, :2].any()


def test_rows_of_a_block_that_chose_by_estimates_may_be_told_others(monkeypatch):
    """A caller's repeat, and have -1 anywhere; a call's own choice, given back, has the same bits."""
    estimated = test_estimates.other(rows=10, dims=(16, 16))
    x = tensors(estimated, 1, 50, 50, torch.float32)
    attn = load_kernel(estimated, interpret=True, config={"choose_block": {"BLOCK_N": 32}})
    o, chosen = attn(**x, return_selection=True)
    assert not any(
        y is not None and y.dtype == torch.int32 for y in attn(**x).grad_fn.saved_tensors
    )
    found = torch.autograd.grad(o.square().sum(), list(x.values()))
    own = torch.autograd.grad(attn(**x).square().sum(), list(x.values()))
    assert all(map(torch.equal, found, own))
    (made,) = attn._execution.gradients.values()
    assert made.config["choose_block"]["BLOCK_N"] == 32
    shape = (*chosen["block"].indices.shape[:-1], 5)
    given = {"selection": {"block": torch.randint(-2, 9, shape).clamp(min=-1).to(torch.int32)}}
    exact = attn.reference(**{n: y.double() for n, y in x.items()}, **given, dtype=torch.float64)
    exact = torch.autograd.grad(exact.square().sum(), list(x.values()))
    found = torch.autograd.grad(attn(**x, **given).square().sum(), list(x.values()))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


FORETOLD = {"both ways": lambda: test_foretold.other(dims=(32, 16)), **test_foretold.OTHERS}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "both ways" else pytest.mark.full)
        for name in FORETOLD
    ],
)
def test_heads_that_choose_in_one_of_two_ways_have_gradients(name, seed):
    """Documents of 1, of 0, of few rows, and of more than a tile has."""
    with sanitizer.enabled(seed=seed):
        check(FORETOLD[name](), T=75, cu_seqlens_q=i32(0, 1, 1, 71, 75))


def test_heads_of_fewer_rows_than_keys_that_choose_have_gradients(seed):
    """Rows lie at the end of more keys, or before all of them."""
    with sanitizer.enabled(seed=seed):
        found = check(test_foretold.other(), B=2, T=35, S=61, q_offset=i32(26, -2))
    assert not found["q"][1, :2].any()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "columns and windows" else pytest.mark.full)
        for name in test_slashes.OTHERS
    ],
)
def test_columns_and_diagonals_have_gradients(name, seed, monkeypatch):
    """Documents of 1, of 0, of few rows, and of more than a tile has."""
    ways_of_heads(monkeypatch)
    with sanitizer.enabled(seed=seed):
        check(test_slashes.OTHERS[name](), T=75, cu_seqlens_q=i32(0, 1, 1, 71, 75))


def test_columns_and_diagonals_of_fewer_rows_than_keys_have_gradients(seed, monkeypatch):
    """Rows lie at the end of more keys, or before all of them."""
    ways_of_heads(monkeypatch)
    with sanitizer.enabled(seed=seed):
        found = check(test_slashes.other(ways=1), B=2, T=35, S=61, q_offset=i32(26, -2))
    assert not found["q"][1, :2].any()


def test_what_all_rows_have_one_list_of_is_chosen_again(monkeypatch):
    """By the forward's configuration; a call keeps no list of a row, but gives those that are asked for."""
    spec = test_slashes.other(ways=1)
    x = tensors(spec, 1, 20, 20, torch.float32)
    attn = load_kernel(spec, interpret=True, config={"weigh_slash": {"BLOCK_N": 64}})
    o = attn(**x)
    assert not any(y is not None and y.dtype == torch.int32 for y in o.grad_fn.saved_tensors)
    found = torch.autograd.grad(o.square().sum(), list(x.values()))
    (made,) = attn._execution.gradients.values()
    (choice,) = attn._execution.choices.values()
    assert made.plan.again
    assert all(made.config[name] == choice.config[name] for name in made.plan.again)
    o, chosen = attn(**x, return_selection=True)
    for level, lists in attn.select(**x).items():
        assert torch.equal(chosen[level].indices, lists.indices)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "is_watched", lambda call: True)
        for other in (o, attn(**x)):
            again = torch.autograd.grad(other.square().sum(), list(x.values()))
            assert all(map(torch.equal, found, again))
    shifted = torch.zeros(*x["q"].shape[:-1], x["q"].shape[-1] + 1)[..., 1:]
    y = x | {"q": shifted.copy_(x["q"].detach()).requires_grad_()}
    again = torch.autograd.grad(attn(**y).square().sum(), list(y.values()))
    assert all(
        map(torch.equal, found, again)
    )  # by kernels that are the call's, which asks less of queries


def test_choices_of_other_knobs_are_none_of_the_call():
    """That a kernel of a call is another than what chooses again in its gradients is a mistake of ours."""
    spec = test_slashes.other(ways=1)
    x = tensors(spec, 1, 20, 20, torch.float32)
    attn = load_kernel(spec, interpret=True)
    torch.autograd.grad(attn(**x).sum(), list(x.values()))
    *_, made = attn._execution.gradients.values()
    *_, choice = attn._execution.choices.values()
    for others in ({"num_warps": 4}, None):
        config = {name: y for name, y in choice.config.items() if name != "rank_column"}
        config |= {"rank_column": others} if others else {}
        with pytest.raises(AssertionError, match="rank_column chooses again: expected the knobs"):
            execution._choosing_as(made, replace(choice, config=config), made.plan.again)


@pytest.mark.parametrize(
    ("causal", "kv"), [("true", 1), pytest.param("false", 2, marks=pytest.mark.full)]
)
def test_tokens_that_heads_chose_have_gradients(seed, causal, kv):
    """Each query head of a group for itself: rows of one list have a word a head."""
    heads = {"query": 3 * kv, "kv": kv}
    chosen = spec(TOKENS, **heads, qk=16, v=32, top=7, share="share: head", causal=causal)
    with sanitizer.enabled(seed=seed):
        check(chosen, B=2, T=17, S=73, kv_lens=i32(73, 66))


def test_chosen_tokens_under_a_gate_have_gradients_and_empty_rows_none(seed, monkeypatch):
    """With outputs of branches and without; the first rows lie before all keys."""
    gated = spec(GATED_TOKENS, query=4, kv=2, qk=16, v=32, top=9)
    with sanitizer.enabled(seed=seed):
        found = check(gated, B=2, T=19, S=83, dtype=torch.float16, q_offset=i32(64, -2))
    assert not found["q"][1, :2].any()
    monkeypatch.setattr(operators, "is_watched", lambda call: True)
    check(gated, T=21, kept=False)


def test_a_callers_tokens_may_repeat():
    """And has -1 anywhere, tokens that no row sees, and any strides."""
    chosen = spec(TOKENS, query=2, kv=1, qk=16, v=16, top=5)
    x = tensors(chosen, 1, 70, 70, torch.float32)
    attn = load_kernel(chosen, interpret=True)
    clean = torch.stack([torch.tensor([0, t // 2, t, -1, -1]) for t in range(70)])
    noisy = torch.stack([torch.tensor([t, -1, 0, t, t // 2]) for t in range(70)])
    noisy[:60, 1] = 69
    clean, noisy = (each.int()[None, :, None] for each in (clean, noisy))
    noisy = noisy.transpose(1, 3).contiguous().transpose(1, 3)
    o = [attn(**x, selection={"token": each}) for each in (clean, noisy)]
    grads = [torch.autograd.grad(each.square().sum(), list(x.values())) for each in o]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("combine", "kept"),
    [
        ("softmax: union, output_gate: channel", True),
        ("gates: input, output_gate: head", True),
        ("gates: input, output_gate: channel", False),
    ],
    ids=["one softmax", "gates, kept", "gates, again"],
)
def test_an_outputs_gate_has_a_gradient_and_so_has_what_is_behind_it(
    combine, kept, seed, monkeypatch
):
    gated = spec(OUTPUT_GATED, combine=combine, query=6, kv=2, qk=16)
    if kept:
        check(gated, B=2, T=5, S=13)
    else:
        monkeypatch.setattr(operators, "is_watched", lambda call: True)
        check(gated, T=18, cu_seqlens_q=i32(0, 5, 5, 18))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (UNITED, {"v": 16}),
        pytest.param(TWO_LATENTS, OF_TOKENS | {"v": 16}, marks=pytest.mark.full),
    ],
    ids=["blocks and a window", "latents"],
)
def test_capped_logits_have_gradients(text, numbers, seed):
    """Whose dots are larger than the cap."""
    check(with_caps(spec(text, **numbers | {"qk": 16 + numbers["v"]}, query=4, kv=2)), T=11)


@pytest.mark.parametrize(
    "sunk",
    [
        spec(UNITED_SINK, query=6, kv=2),
        spec(SINK, query=2, kv=1),
    ],
    ids=["of all branches", "of one"],
)
def test_sinks_have_gradients(sunk, seed):
    """Rows that see nothing among them."""
    check(sunk, B=2, T=9, S=5)


def test_sinks_may_be_all_that_counts_or_nothing(seed):
    """Of a log-sum-exp, which has no sink, gradients are the same beside each."""
    sunk = spec(SINK, query=4, kv=1)
    x = tensors(sunk, 1, 9, 9, torch.float32)
    x["near_sink"] = torch.tensor([300.0, 20.0, 0.0, -300.0])
    attn = load_kernel(sunk, interpret=True)
    grads = [torch.randn(1, 9, 4, 32), torch.randn(1, 4, 9)]
    found = gradients(attn, x, grads)
    wide = {name: y.detach().double() for name, y in x.items()}
    for name, exact in gradients(attn.reference, wide, grads).items():
        assert_near(name, found[name].double(), exact, exact, UNIT[torch.float32])


@pytest.mark.parametrize("of", [OF_TOKENS, OF_BLOCKS], ids=["tokens", "blocks"])
def test_latents_have_gradients(seed, of):
    """Of keys and of values in one: a group of 3 in a tile, whose window goes on from what was chosen."""
    latent = spec(TWO_LATENTS, **SMALL | of | {"top": 5}, query=6, kv=2)
    with sanitizer.enabled(seed=seed):
        check(latent, T=75, cu_seqlens_q=i32(0, 11, 75))


@pytest.mark.parametrize("of", [OF_TOKENS, OF_BLOCKS], ids=["tokens", "blocks"])
def test_latents_of_many_heads_have_gradients(seed, of):
    """A token's heads are those of several steps, and of several programs."""
    latent = spec(LATENT, **SMALL | of | {"top": 4}, query=40, kv=1)
    with sanitizer.enabled(seed=seed):
        check(latent, T=21, config={"dkv_selected": {"BLOCK_H": 16, "BLOCK_M": 16}})


def test_latents_of_heads_that_fill_a_tile_have_gradients(seed, monkeypatch):
    """Rows leave what they give each key, in turns of a row; of documents, and of more than two programs."""
    monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    latent = spec(LATENT, **SMALL | OF_TOKENS | {"top": 3}, query=65, kv=1)
    tiles = {"dq_selected": {"BLOCK_H": 32, "BLOCK_M": 32}}
    options = {"dtype": torch.float16, "config": tiles, "cu_seqlens_q": i32(0, 2, 8)}
    with sanitizer.enabled(seed=seed):
        check(latent, T=8, **options)


def test_a_latent_that_a_caller_lists_twice_is_given_once():
    latent = spec(LATENT, **SMALL | OF_TOKENS | {"top": 4}, query=64, kv=1)
    x = tensors(latent, 1, 5, 5, torch.float16)
    attn = load_kernel(latent, interpret=True)
    clean = [[0, -1, -1, -1], [0, 1, -1, -1], [1, 2, -1, -1], [0, 3, -1, -1], [2, 4, -1, -1]]
    noisy = [[-1, 0, 4, 0], [1, 0, 1, 0], [2, 2, 1, 3], [3, -1, 3, 0], [4, 2, 2, 4]]
    lists = (torch.tensor(each, dtype=torch.int32)[None, :, None] for each in (clean, noisy))
    o = [attn(**x, selection={"entry": each}) for each in lists]
    grads = [torch.autograd.grad(each.square().sum(), list(x.values())) for each in o]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.full
def test_a_callers_selection_may_repeat_blocks():
    """And has -1 anywhere, and blocks that no row sees."""
    chosen = spec(CHOSEN, query=3, kv=1, qk=16, v=16)
    x = tensors(chosen, 1, 19, 19, torch.float32)
    attn = load_kernel(chosen, interpret=True)
    clean = torch.stack([torch.tensor([0, t // 8, -1]) for t in range(19)])
    noisy = torch.stack([torch.tensor([t // 8, t // 8, 0]) for t in range(19)])
    o = [attn(**x, selection={"block": s.int()[None, :, None]}) for s in (clean, noisy)]
    grads = [torch.autograd.grad(each.square().sum(), list(x.values())) for each in o]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- what is emitted


@pytest.mark.parametrize("name", GOLDEN)
def test_sources_of_gradients_are_golden(name, golden):
    plan = backward.plan(emitted.graph(systems.load(name)), H100)
    golden(f"backward/{name}/plan.txt", str(plan))
    for file, text in emitted.sources(plan).items():
        as_forwards = file.removesuffix(".py") in plan.again
        if not as_forwards and not file.startswith(("index_", "pool_", "__init__")):
            golden(f"backward/{name}/{file}", text)


def test_sources_of_branches_apart_are_golden(golden):
    graph = emitted.graph(systems.load("nsa"))
    forward = schedule.schedule(graph, H100, apart=True)
    sources = emitted.sources(forward)
    golden("backward/apart/forward/plan.txt", str(forward))
    golden("backward/apart/forward/weigh_branches.py", sources["weigh_branches.py"])
    made = backward.plan(graph, H100, apart=True)
    sources = emitted.sources(made)
    golden("backward/apart/plan.txt", str(made))
    for file in ("delta_selected.py", "driver.py"):
        golden(f"backward/apart/{file}", sources[file])
    assert list(forward.apart.items()) == sorted(made.apart.items())
    allowlist.check(emitted.sources(forward))


def test_sources_of_gradients_are_formatted_and_obey_the_rules(tmp_path):
    wide = SMALL | {"qk": 192, "v": 80, "size": 12}
    for case in (
        spec(GATED, **wide, query=16, kv=1),
        spec(GATED, **wide | {"share": "share: head"}, query=6, kv=2),
        spec(POOLED, **wide, query=6, kv=2),
        spec(POOLED, **wide | {"pool": "keys: mean, values: mean"}, query=2, kv=2),
        spec(WINDOW, **wide | {"causal": "false"}, query=2, kv=2),
        spec(GATED_TOKENS, **wide, query=6, kv=2),
        spec(TOKENS, **wide | {"share": "share: head", "causal": "false"}, query=6, kv=2),
        spec(TWO_LATENTS, **wide | OF_TOKENS | {"qk": 176}, query=6, kv=2),
        spec(LATENT, **wide | OF_BLOCKS | {"share": "share: head"}, query=40, kv=1),
        spec(SHARED, **wide | {"causal": "false"}, query=6, kv=2),
        spec(SORTED, **wide | {"segment": 48}, query=6, kv=2),
        spec(KEPT, **wide, query=6, kv=2),
        spec(SHARED, **wide | {"share": "share: head", "rows": 128, "top": 12}, query=6, kv=2),
        spec(SHARED + BESIDE, **wide, query=6, kv=2),
        spec(CHOSEN + BESIDE, **wide, query=6, kv=2),
        spec(
            OUTPUT_GATED,
            **wide | {"combine": "softmax: union, output_gate: channel"},
            query=6,
            kv=2,
        ),
        spec(OUTPUT_GATED, **wide | {"combine": "gates: input, output_gate: head"}, query=6, kv=2),
        spec(UNITED_SINK, **wide, query=6, kv=2),
        with_caps(spec(UNITED, **wide, query=6, kv=2)),
    ):
        apart = case.combine is not None and case.name == "pooled"
        plan = backward.plan(emitted.graph(case), H100, "fp32", apart=apart)
        sources = emitted.sources(plan)
        allowlist.check(sources)
        for file, text in sources.items():
            assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file
            (tmp_path / file).write_text(text)
        for command in (["format", "--check"], ["check", "--select=F"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache"]
            where = ["--line-length=100", "--target-version=py311", str(tmp_path)]
            done = subprocess.run([*ruff, *where], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


# --- rows, or keys, in a stream


@pytest.mark.parametrize("name", STREAMED)
def test_rows_stream_where_a_tokens_heads_fill_tiles_and_keys_where_head_dims_do(name):
    def streamed(target, dtype="bf16"):
        plan = backward.plan(emitted.graph(systems.load(name)), target, dtype)
        by_rows = {k.name for k in plan.kernels if isinstance(k.context, ColsStreamsContext)}
        by_keys = {k.name for k in plan.kernels if isinstance(k.context, StreamsContext)}
        return by_rows, by_keys

    assert streamed(STREAMING) == (STREAMED[name], DERIVED[name])
    assert streamed(H100) == (set(), set())
    assert streamed(STREAMING, "fp32") == (set(), set())


def test_sources_of_streams_are_golden(golden):
    plan = backward.plan(emitted.graph(systems.load("nsa")), STREAMING)
    sources = emitted.sources(plan)
    shown = DERIVED["nsa"] - {"delta_compressed", "delta_window"}
    for name in sorted(STREAMED["nsa"] | shown):
        golden(f"backward/streams/{name}.py", sources[f"{name}.py"])
    golden("backward/streams/driver.py", sources["driver.py"])


def test_sources_of_streams_are_formatted_and_obey_the_rules(tmp_path):
    wide = SMALL | {"qk": 192, "v": 128, "size": 64, "stride": 32, "window": 200}
    for case in (
        spec(GATED, **wide, query=16, kv=1),
        spec(UNITED, **wide | {"qk": 64, "v": 192}, query=16, kv=2),
        spec(POOLED, **wide, query=64, kv=2),
        spec(WINDOW, **wide | {"causal": "false"}, query=16, kv=2),
        spec(SHARED + BESIDE, **wide, query=16, kv=2),
    ):
        plan = backward.plan(emitted.graph(case), STREAMING)
        for made in (ColsStreamsContext, StreamsContext):
            assert any(isinstance(kernel.context, made) for kernel in plan.kernels)
        sources = emitted.sources(plan)
        allowlist.check(sources)
        for file, text in sources.items():
            assert lint(text, driver=file in ("driver.py", "__init__.py")) == [], file
            (tmp_path / file).write_text(text)
        ruff = [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "--no-cache"]
        where = ["--line-length=100", "--target-version=py311", str(tmp_path)]
        done = subprocess.run([*ruff, *where], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_launches_bring_what_streams_take():
    plan = backward.plan(emitted.graph(systems.load("nsa")), STREAMING)
    launches = {launch.kernel: launch for step in plan.steps for launch in step.launches}
    for name in STREAMED["nsa"]:
        kernel = plan.kernel(name)
        taken = [p.name for p in kernel.params if p.kind != "constexpr"]
        given = dict(zip(taken, launches[name].arguments, strict=True))
        assert given["Q"] == "batch.tile_of(in_q, 1, 64, 16)"
        assert given["DO"] == "batch.tile_of(grad_o, 1, 64, 16)"
        assert given["whose"] == "0 if batch.packed else 1"
        assert kernel.config["BLOCK_T"] * 16 == kernel.config["BLOCK_M"] == 64
    for name in DERIVED["nsa"]:
        leader = name.replace("delta", "dq")
        taken = [p.name for p in plan.kernel(name).params if p.kind != "constexpr"]
        given = dict(zip(taken, launches[name].arguments, strict=True))
        keys = "made_compressed_keys" if "compressed" in name else "in_k"
        keys += "_window" if "window" in name else ""
        assert given["K1"] == f'batch.tile_of({keys}, config["{leader}"]["BLOCK_N"], 64)'
        assert given["items"] == f"({given['tiles']}) * 4"
        assert launches[name].grid == ("batch.processors",)
        assert plan.kernel(leader).config["BLOCK_T"] * 16 == 128


def test_steps_of_dq_leave_room_for_its_registers():
    """Wider keys have shorter steps: the gradient, scores and what they change by share a thread."""
    widths = {
        dims: backward.plan(emitted.graph(made), STREAMING).kernel("dq_near").config["BLOCK_N"]
        for dims in ((64, 64), (128, 128), (192, 64))
        for made in (spec(WINDOW, query=16, kv=2, causal="true", qk=dims[0], v=dims[1]),)
    }
    assert widths == {(64, 64): 128, (128, 128): 64, (192, 64): 64}


NO_ROOM = "STAGES=5 needs 234,240 bytes of shared memory, h100 has 232,448 a block"


@pytest.mark.parametrize(
    ("kernel", "given", "message"),
    [
        ("dkv_selected", {"BLOCK_C": 256, "STAGES": 2}, ""),
        ("dkv_window", {"BLOCK_T": 4, "BLOCK_M": 64, "BLOCK_N": 64}, ""),
        ("dkv_window", {"BLOCK_T": 8}, "expected BLOCK_T=4, got 8"),
        ("dkv_window", {"BLOCK_M": 128}, "expected BLOCK_M=64, got 128"),
        ("dkv_window", {"BLOCK_N": 32}, "expected BLOCK_N=64, got 32"),
        ("dkv_window", {"STAGES": 1}, "expected one of STAGES 2 3 4 5 6 7 8, got 1"),
        ("dkv_window", {"STAGES": 5}, NO_ROOM),
        ("dkv_window", {"num_warps": 8}, "expected num_warps=4, got 8"),
        ("index_selected", {"num_warps": 3}, "expected num_warps to be a power of two, got 3"),
        ("index_selected", {"num_stages": 0}, "expected num_stages of at least 1, got 0"),
        ("dq_selected", {"BLOCK_N": 32, "STAGES": 4}, ""),
        ("dq_selected", {"BLOCK_N": 128}, "expected one of BLOCK_N 32 64, got 128"),
        ("dq_selected", {"BLOCK_T": 4, "BLOCK_M": 64}, "expected BLOCK_T=8, got 4"),
        (
            "delta_selected",
            {"BLOCK_N": 32},
            "expected some of num_warps, num_stages, got 'BLOCK_N'; others are those of dq_selected",
        ),
    ],
)  # fmt: skip
def test_values_that_a_gradient_in_a_stream_cannot_have_are_told(kernel, given, message):
    plan = backward.plan(emitted.graph(systems.load("nsa")), STREAMING)
    made = plan.kernel(kernel)
    values = made.config.keywords() | given
    assert knobs.refused(made, given, values, plan, STREAMING) == message


def test_rows_of_a_tile_that_picks_tokens_have_a_bit_each():
    """Loops take as many rows as a word has bits; more would have gradients that are silently wrong."""
    one = {"causal": "true", "share": "share: head", "qk": 64, "v": 64}
    plan = backward.plan(emitted.graph(spec(TOKENS, query=2, kv=2, **one)), H100)
    dq = plan.kernel("dq_selected")
    assert max(k.value(k.codes[-1]) for k in knobs.knobs_of(dq, plan) if k.name == "BLOCK_T") == 32
    for tokens, message in (
        (32, ""),
        (64, "expected BLOCK_T of at most 32, the bits of a word, got 64"),
    ):
        given = {"BLOCK_T": tokens}
        values = dq.config.keywords() | given
        knobs.derive(dq, values, plan)
        assert knobs.refused(dq, given, values, plan, H100) == message
        assert (message in knobs.broken(dq, values, H100, plan)) == bool(message)


def test_a_gradient_of_more_rows_than_bits_is_refused():
    chosen = spec(TOKENS, query=2, kv=2, causal="true", share="share: head", qk=16, v=16)
    config = {"dq_selected": {"BLOCK_T": 64, "BLOCK_M": 64}}
    attn = load_kernel(chosen, interpret=True, config=config)
    o = attn(**tensors(chosen, 1, 5, 5, torch.float32))
    with pytest.raises(ArgumentError, match="config: dq_selected: expected BLOCK_T of at most 32"):
        o.sum().backward()


def test_a_backward_with_such_values_is_refused():
    """By the plan of a card that streams, of which a CPU has no call of its own."""
    window = spec(WINDOW, query=16, kv=2, causal="true", qk=64, v=64)
    plan = backward.plan(emitted.graph(window), STREAMING)
    emitted_ones = compiler()

    def streaming(bound, target, dtype, *, backward=False, **options):
        made = emitted_ones(bound, target, dtype, backward=backward, **options)
        config = {each.name: each.config.keywords() for each in plan.kernels}
        if not backward:
            return made
        return replace(made, plan=plan, config=config, origin=dict.fromkeys(config, "default"))

    options = Options(interpret=True, config={"dkv_near": {"BLOCK_N": 128}})
    kernel = Kernel(window, options, key="a stream's gradient refused", compiler=streaming)
    shapes = tensor_shapes(window, 1, 5, 5)
    o = kernel(**{name: torch.randn(x, requires_grad=True) for name, x in shapes.items()})
    with pytest.raises(ArgumentError, match="config: dkv_near: expected BLOCK_N=64, got 128"):
        o.sum().backward()


@pytest.mark.skipif(
    not with_streams(H100).streams, reason="the installed Triton has no Gluon for Hopper"
)
@pytest.mark.parametrize(("made", "branch"), covering(["delta", "dkv", "dq"], BRANCHES, every=3))
def test_streams_compile_and_spill_no_number_of_a_loop(tmp_path, monkeypatch, made, branch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    artifact = pipeline.compile_backward(systems.load("nsa"), STREAMING)
    jobs = resources.plan_jobs(artifact.plan, artifact.module, STREAMING)
    assert f"{made}_{branch}" in STREAMED["nsa"] | DERIVED["nsa"]
    (job,) = (job for job in jobs if job.signature.function == f"{made}_{branch}")
    (found,) = resources.measure([job])
    assert isinstance(found, resources.Resources), found
    # of rows by keys arguments, outside of all loops
    assert found.cost.spill_bytes <= (0 if made == "dkv" else 80)
    assert found.cost.warps == 12  # two groups, and what streams, which counts as four
    assert found.blocks_per_sm == 1


def test_sources_of_streams_of_blocks_of_rows_are_golden(golden):
    artifact = pipeline.compile_backward(systems.load("xattention"), STREAMING)
    golden("backward/xattention/plan.txt", str(artifact.plan))
    golden("backward/xattention/dkv_selected.py", emitted.sources(artifact.plan)["dkv_selected.py"])
    jobs = resources.plan_jobs(artifact.plan, artifact.module, STREAMING)
    (job,) = (job for job in jobs if job.signature.function == "dkv_selected")
    (found,) = resources.measure([job])
    assert isinstance(found, resources.Resources), found
    assert (found.cost.spill_bytes, found.cost.warps, found.blocks_per_sm) == (0, 12, 1)


def test_sources_of_streams_of_latents_are_golden(golden):
    artifact = pipeline.compile_backward(systems.load("dsa"), STREAMING)
    golden("backward/latents/plan.txt", str(artifact.plan))
    golden("backward/latents/dq_selected.py", emitted.sources(artifact.plan)["dq_selected.py"])
    jobs = resources.plan_jobs(artifact.plan, artifact.module, STREAMING)
    (job,) = (job for job in jobs if job.signature.function == "dq_selected")
    (found,) = resources.measure([job])
    assert isinstance(found, resources.Resources), found
    assert found.cost.spill_bytes <= 192  # of what is known of a token, not of a step's tiles
    assert found.cost.warps == 12
    assert found.blocks_per_sm == 1


def test_tiles_of_streams_of_latents_are_not_a_callers_to_choose():
    plan = backward.plan(emitted.graph(systems.load("dsa")), STREAMING)
    kernel = plan.kernel("dq_selected")
    said = knobs.refused(
        kernel, {"BLOCK_N": 32}, kernel.config.keywords() | {"BLOCK_N": 32}, plan, H100
    )
    assert said == "expected BLOCK_N=64, got 32"
    assert list(knobs.knobs_of(kernel, plan)) == []


@pytest.mark.parametrize(
    ("query", "numbers", "dtype", "made"),
    [
        (128, {}, "bf16", {"dk_selected"}),
        (64, {}, "fp16", {"dk_selected"}),
        (63, {}, "bf16", {"dkv_selected"}),  # a token's heads leave a tile half empty
        (128, {}, "fp32", {"dkv_selected"}),
        (128, OF_BLOCKS, "bf16", {"dkv_selected", "sum_selected"}),
    ],
)
def test_keys_are_given_by_rows_whose_heads_fill_a_tile(query, numbers, dtype, made):
    latent = spec(LATENT, **SMALL | OF_TOKENS | numbers, query=query, kv=1)
    plan = backward.plan(emitted.graph(latent), H100, dtype)
    names = {"dk_selected", "dkv_selected", "sum_selected"}
    assert names & {kernel.name for kernel in plan.kernels} == made


@pytest.mark.parametrize(
    ("numbers", "query", "kv", "streams"),
    [
        ({"qk": 576, "v": 512}, 128, 1, True),
        ({"qk": 512, "v": 512}, 160, 2, True),
        ({"qk": 640, "v": 512}, 128, 1, False),  # registers hold nine tiles of columns
        ({"qk": 576, "v": 480}, 128, 1, False),
        ({"qk": 576, "v": 512}, 32, 1, False),
    ],
)
def test_which_gradients_of_latents_stream(numbers, query, kv, streams):
    latent = spec(LATENT, **SMALL | OF_TOKENS | numbers, query=query, kv=kv)
    plan = backward.plan(emitted.graph(latent), STREAMING)
    assert (plan.kernel("dq_selected").skeleton == "latents_gradient") is streams


TRAINED = (
    *("moba", "flash_moba", "nsa", "nsa_fla", "nsa_xunhao", "fsa"),
    *("infllm_v2", "minimax_m3", "quest", "kinetics", "small_thinker", "sqa", "ssa"),
    *("delta", "flux_attention", "gna", "hylra", "moa", "power_attention", "s2_attention"),
    *("dsa", "dsa_gqa", "glm_kpool", "hirouter", "hisa", "seer_attention_r", "vsa"),
    *("draft_attention", "draft_attention_head", "biformer", "biformer_released"),
    *("dhsa_released", "hip", "hydra", "proxy_attn", "seer_attention", "sparge", "sparse_d"),
    *("deepseek_csa", "deepseek_hca", "dhsa", "dma"),
    *("flex_prefill", "minference", "nosa", "pbs_attn", "psa", "psa_mass"),
    *("qwen_qsa", "s2o", "sale", "step_csa", "svg2", "svg_ear", "token_sparse", "xattention"),
)
CHOSEN_AGAIN = (
    *("flex_prefill", "minference", "pbs_attn", "psa", "psa_mass", "s2o", "sale", "svg2"),
    "svg_ear",
)
REFUSED = {
    "routing_transformer": "branch buckets: no kernel has the gradient of a softmax for every entry yet",
    "superlinear": "branch spans: no kernel has the gradient of attention over spans yet",
}


def test_every_spec_with_kernels_has_gradients_or_says_what_is_missing():
    assert {*TRAINED, *REFUSED} == set(systems.KERNELS)
    for name in TRAINED:
        graph = emitted.graph(systems.load(name))
        assert not any(backward.lacking(graph, node) for node in graph.nodes()), name


@pytest.mark.parametrize("name", CHOSEN_AGAIN)
def test_choices_that_are_made_again_are_made_by_the_kernels_of_the_call(name):
    """By the same text, of which nothing is to be chosen but what the call's has."""
    target = with_streams(H100)
    made = pipeline.compile_backward(systems.load(name), target)
    called = pipeline.compile_spec(systems.load(name), target)
    assert made.plan.again
    for kernel in made.plan.again:
        text = f"{kernel}.py"
        assert made.sources[text].split("\n", 4)[4] == called.sources[text].split("\n", 4)[4]
        assert made.plan.kernel(kernel).config == called.plan.kernel(kernel).config


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_says_so(name):
    with pytest.raises(PlanError, match=REFUSED[name]):
        backward.plan(emitted.graph(systems.load(name)), H100)


def test_an_outputs_gate_behind_tiles_has_no_gradient():
    tiled = load("draft_attention")
    gated = tiled.model_copy(update={"combine": Combine(output_gate="head")})
    with pytest.raises(PlanError, match="the gradient of an output's gate behind tiles yet"):
        backward.plan(emitted.graph(gated), H100)


def test_latents_of_which_heads_chose_tokens_apart_have_no_gradient():
    apart = spec(LATENT, **SMALL | OF_TOKENS | {"share": "share: head"}, query=6, kv=2)
    match = (
        "branch selected: no kernel has the gradient of latents of which heads chose tokens apart"
    )
    with pytest.raises(PlanError, match=match):
        backward.plan(emitted.graph(apart), H100)


# --- on a GPU, large


def few_heads(name):
    """Blocks, budgets, head dims and group of the file, one or two key heads."""
    shipped = systems.load(name)
    kv = 1 if shipped.heads.group >= 8 else 2
    heads = shipped.heads.model_copy(update={"query": shipped.heads.group * kv, "kv": kv})
    changes = {"heads": heads}
    changes["attend"] = tuple(systems.of_heads(branch, heads.query) for branch in shipped.attend)
    if shipped.index_per_key_head:
        changes["index"] = shipped.index.model_copy(update={"heads": kv})
    return shipped.model_copy(update=changes)


LARGE = {"size": 64, "stride": 32, "top": 8, "window": 200, "qk": 192, "v": 128}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("share", ["share: head", GROUP])
def test_large_gradients_are_right(heads, share, dtype):
    gated = spec(GATED, **LARGE | {"share": share}, query=heads[0], kv=heads[1])
    check(gated, T=1500, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        *(((2, 2), torch.bfloat16), ((8, 2), torch.bfloat16), ((16, 1), torch.bfloat16)),
        *(((3, 1), torch.bfloat16), ((3, 1), torch.float16), ((3, 1), torch.float32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", ["share: head", GROUP])
def test_large_gradients_of_tokens_are_right(heads, share, dtype):
    gated = spec(GATED_TOKENS, **LARGE | {"share": share, "top": 300}, query=heads[0], kv=heads[1])
    check(gated, T=1500, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        *(((2, 2), torch.bfloat16), ((6, 2), torch.bfloat16), ((16, 1), torch.bfloat16)),
        *(((6, 2), torch.float16), ((6, 2), torch.float32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", ["share: head", GROUP])
@pytest.mark.parametrize("size", [8, 64, 128])
def test_large_gradients_of_blocks_of_rows_are_right(heads, share, size, dtype):
    numbers = {"share": share, "size": size, "rows": 64 if size == 8 else 128}
    shared = spec(SHARED + BESIDE, **LARGE | numbers, query=heads[0], kv=heads[1])
    check(shared, T=1500, dtype=dtype, cu_seqlens_q=i32(0, 500, 501, 501, 1500))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(6, 2), (16, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("of", [OF_TOKENS, OF_BLOCKS], ids=["tokens", "blocks"])
def test_large_latents_have_gradients(heads, of):
    wide = LARGE | of | {"qk": 576, "v": 512, "top": 100 if of == OF_TOKENS else 8}
    latent = spec(TWO_LATENTS, **wide, query=heads[0], kv=heads[1])
    check(latent, T=600, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "qk", "turns"), [((128, 1), 576, False), ((160, 2), 576, True), ((96, 1), 512, True)]
)
def test_large_latents_whose_heads_fill_tiles_have_gradients(heads, qk, turns, dtype, monkeypatch):
    if turns:
        monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    numbers = LARGE | OF_TOKENS | {"qk": qk, "v": 512, "top": 100}
    latent = spec(LATENT, **numbers, query=heads[0], kv=heads[1])
    check(latent, T=300, dtype=dtype, cu_seqlens_q=i32(0, 70, 71, 300))


@pytest.mark.gpu
def test_large_documents_of_tokens_have_gradients(monkeypatch):
    """In turns."""
    monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    chosen = spec(TOKENS, **LARGE | {"top": 100, "qk": 128}, query=8, kv=2)
    check(chosen, T=3000, dtype=torch.bfloat16, cu_seqlens_q=i32(0, 700, 701, 701, 2001, 3000))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "text",
    [UNITED, POOLED, UNITED_SINK, OUTPUT_GATED],
    ids=["one softmax", "pooled", "a sink", "gates, and one of the output"],
)
def test_large_branches_together_have_gradients(text):
    both = "gates: input, output_gate: channel"
    check(spec(text, **LARGE, query=8, kv=2, combine=both), T=1500, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRAINED)
def test_shipped_gradients_are_right(name):
    small = few_heads(name)
    tokens = 2500 if small.heads.query <= 32 else 900
    check(small, T=tokens, dtype=torch.bfloat16, lse=False)


ALIKE = {
    "blocks": (GATED, {}, {}),
    "one softmax": (UNITED, {"qk": 128}, {}),
    "pooled": (POOLED, {}, {}),
    "seen from both sides": (WINDOW, {"causal": "false"}, {"kv_lens": i32(1411, 333)}),
    "documents": (GATED, {"qk": 128}, {"cu_seqlens_q": i32(0, 700, 701, 701, 1500)}),
    "blocks of rows": (SHARED + BESIDE, {"qk": 128, "rows": 128}, {}),
    "blocks of rows of heads": (SHARED, {"qk": 128, "rows": 64, "share": "share: head"}, {}),
    "documents of blocks of rows": (
        SHARED,
        {"qk": 128, "rows": 64, "causal": "false"},
        {"cu_seqlens_q": i32(0, 700, 701, 701, 1500)},
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (16, 2), (16, 1), (64, 1)], ids=str)
def test_streams_and_loops_have_the_same_gradients(case, heads):
    same_gradients(case, heads)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(6, 2), (16, 1)], ids=str)
def test_streams_make_delta_again(monkeypatch, heads):
    monkeypatch.setattr(operators, "is_watched", lambda call: True)
    same_gradients("blocks", heads)


def same_gradients(case, heads):
    """Of streams and of loops, on one choice; of streams twice, bit by bit."""
    if not with_streams(Target.current()).streams:
        pytest.skip("nothing streams here")
    text, numbers, options = ALIKE[case]
    made = spec(text, **LARGE | numbers, query=heads[0], kv=heads[1])
    options = {name: x.cuda() for name, x in options.items()}
    packed = "cu_seqlens_q" in options
    x = tensors(made, 1 if packed else 2, 1500, 1500, torch.bfloat16, packed=packed)
    loops = load_kernel(made, target=replace(Target.current(), streams=False))
    with torch.no_grad():
        chosen = loops.select(**x, **options) if made.levels else None
        o, sums = loops(**x, **options, selection=chosen, return_lse=True)
    sums = list(sums.values()) if isinstance(sums, dict) else [sums]
    grads = [torch.randn_like(each) for each in (o, *sums)]
    expected, found, again = (
        gradients(lambda **y: attn(**y, **options, selection=chosen), x, grads)  # noqa: B023
        for attn in (loops, load_kernel(made), load_kernel(made))
    )
    for name, y in expected.items():
        assert torch.equal(found[name], again[name]), name
        if not name.endswith("_key_position"):
            error = (found[name].double() - y.double()).norm() / y.double().norm()
            assert error < 1e-2, (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("share", ["share: head", GROUP])
def test_documents_beside_one_of_no_numbers_have_gradients(share):
    """Tiles of rows reach over into the next document."""
    made = spec(SHARED, **LARGE | {"qk": 128, "rows": 64, "share": share}, query=4, kv=2)
    x = tensors(made, 1, 1500, 1500, torch.bfloat16, packed=True)
    attn, options = load_kernel(made), {"cu_seqlens_q": i32(0, 700, 707, 1500).cuda()}
    grad = torch.randn(1500, 4, 128, device="cuda", dtype=torch.bfloat16)
    expected = torch.autograd.grad(attn(**x, **options), list(x.values()), grad)
    with torch.no_grad():
        for t in (*x.values(), grad):
            t[700:707] = float("nan")
    found = torch.autograd.grad(attn(**x, **options), list(x.values()), grad)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[:700], b[:700])
        assert torch.equal(a[707:], b[707:])


@pytest.mark.gpu
def test_gradients_of_unaligned_tensors_are_right():
    """Queries and an output's gradient that begin where nothing can be brought from."""
    made = spec(WINDOW, **LARGE, query=16, kv=2)
    x = tensors(made, 1, 500, 500, torch.bfloat16)
    attn = load_kernel(made)
    o = attn(**x)
    wide = torch.randn(*o.shape[:-1], o.shape[-1] + 1, device="cuda", dtype=o.dtype)[..., 1:]
    expected = torch.autograd.grad(o, list(x.values()), wide.contiguous())
    again = torch.autograd.grad(attn(**x), list(x.values()), wide)
    shifted = torch.zeros(*x["q"].shape[:-1], 193, device="cuda", dtype=o.dtype)[..., 1:]
    shifted.copy_(x["q"].detach())
    other = x | {"q": shifted.requires_grad_()}
    found = torch.autograd.grad(attn(**other), list(other.values()), wide)
    for a, b, c in zip(expected, again, found, strict=True):
        assert torch.equal(a, b)
        assert (c.double() - a.double()).norm() < 1e-2 * a.double().norm()


@pytest.mark.gpu
def test_large_documents_have_gradients():
    chosen = spec(CHOSEN, **LARGE, query=8, kv=2)
    check(chosen, T=3000, dtype=torch.bfloat16, cu_seqlens_q=i32(0, 700, 701, 701, 2001, 3000))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", ["true", "false"])
def test_large_windows_have_gradients(causal):
    windowed = spec(WINDOW, **LARGE, query=8, kv=2, causal=causal)
    check(windowed, B=2, T=1000, S=1500, dtype=torch.bfloat16, kv_lens=i32(1500, 777))
