"""Branches that attend by position alone: right at every edge, nothing else is read, and what is refused."""

import emitted
import pytest
import torch
from conformance import systems

from hsgen import backward, patterns, schedule, splits
from hsgen.errors import ArgumentError, PlanError
from hsgen.reference import reference, tensor_shapes
from hsgen.runtime import load_kernel
from hsgen.spec import parse
from hsgen.target import H100

TEXT = """
hsgen: 1
name: pattern
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: 32, v: 16}}
causal: {causal}
attend:
  - {{name: far, static: {{{static}}}}}
"""
WAYS = """
hsgen: 1
name: ways
heads: {query: 4, kv: 2}
head_dim: {qk: 32, v: 16}
causal: %s
route: {by: sample, input: [dense, sparse]}
attend:
  - {name: dense, window: all, when: dense}
  - {name: streaming, static: {window: 5, sink: 3}, when: sparse}
"""


def made(static, *, query=4, kv=2, causal=True):
    text = TEXT.format(static=static, query=query, kv=kv, causal=str(causal).lower())
    return parse(text)


def planned(spec):
    return schedule.schedule(emitted.graph(spec), H100)


def drawn(spec, T, S, B=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, B, T, S)
    x = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items() if n != "route"}
    if "route" in shapes:
        x["route"] = torch.arange(B, dtype=torch.int32) % 2
    return x


def right(spec, x, config=None, **options):
    attn = load_kernel(spec, interpret=True, config=config)
    with torch.no_grad():
        o, lse = attn(**x, **options, return_lse=True)
    exact = reference(spec, x, **options, dtype=torch.float64)
    torch.testing.assert_close(o.double(), exact.o, rtol=1e-5, atol=1e-5)
    ours = lse if isinstance(lse, dict) else {name: lse for name in exact.lse}
    for name, sums in exact.lse.items():
        torch.testing.assert_close(ours[name].double(), sums, rtol=1e-5, atol=1e-5)


OFF = {"q_offset": torch.tensor([-3, 31], dtype=torch.int32)}
PATTERNS = {
    "sink": ("blocks: 1, window: 5, sink: 3", {}),
    "units": ("blocks: 3, window: 2, sink: 1", {}),
    "grown heads": (
        "blocks: 2, per_head: [{window: 1, grow: 0.5, sink: 1}, {window: 3, grow: 0.25}]",
        {},
    ),
    "steps by head": ("blocks: 2, window: 2, stride: 3, shift: 2", {}),
    "steps alone": ("blocks: 16, sink: 1, stride: 2", {"query": 2}),
    "powers": ("blocks: 2, window: 1, sink: 1, power_of_two: true", {}),
    "powers of units": ("blocks: 16, power_of_two: true", {"query": 3, "kv": 1}),
    "both ways": ("blocks: 2, window: 3, sink: 2", {"causal": False}),
}


OFTEN = ("grown heads", "steps by head", "powers of units", "both ways")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.full) for n in PATTERNS]
)
def test_outputs_are_right_wherever_rows_lie(name):
    """Rows before the first key and behind the last, and tiles that begin anywhere in a unit."""
    static, shape = PATTERNS[name]
    spec = made(static, **shape)
    config = {"attend_far": {"BLOCK_N": 16}}
    right(spec, drawn(spec, 41, 41), config)
    right(spec, drawn(spec, 21, 45, B=2), config, **OFF)


GROWN = "blocks: 2, per_head: [{window: 1, sink: 1}, {window: 3, grow: 0.25}]"


@pytest.mark.parametrize(
    ("static", "shape"),
    [
        (GROWN, {}),
        pytest.param("blocks: 2, window: 2, sink: 2", {"causal": False}, marks=pytest.mark.full),
        ("blocks: 2, window: 2, sink: 1, stride: 4, shift: 1", {"kv": 1, "query": 3}),
        ("blocks: 2, window: 1, sink: 1, power_of_two: true", {}),
    ],
)
def test_gradients_are_right(static, shape):
    spec = made(static, **shape)
    gradients_are_right(spec, drawn(spec, 35, 40), q_offset=4)


def gradients_are_right(spec, x, **options):
    attn, names = load_kernel(spec, interpret=True), [name for name in x if name != "route"]

    def found(call, x):
        leaves = {name: x[name].clone().requires_grad_() for name in names}
        o, lse = call({**x, **leaves})
        generator = torch.Generator().manual_seed(1)
        sums = torch.where(lse.isinf(), 0.0, lse)
        grads = [torch.randn(y.shape, generator=generator).to(y) for y in (o, sums)]
        return torch.autograd.grad([o, sums], [*leaves.values()], grads)

    def exact(x):
        result = reference(spec, x, **options, dtype=torch.float64)
        return result.o, next(iter(result.lse.values()))

    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    ours = found(lambda x: attn(**x, **options, return_lse=True), x)
    for name, got, y in zip(names, ours, found(exact, wide), strict=True):
        torch.testing.assert_close(got.double(), y, rtol=1e-4, atol=1e-5, msg=f"of {name}")


# --- windows along axes


ALONG = """
hsgen: 1
name: along
heads: {{query: {query}, kv: 2}}
head_dim: {{qk: 32, v: 16}}
causal: false
axes: {axes}
attend:
  - {{name: near, static: {{grid: {{window: {window}, stride: {stride}, causal: {causal}}}}}}}
"""
GRIDS = {
    "whole": ("[6, 4, 8]", "[4, 2, 6]", "[2, 2, 4]", "[false, false, false]", 2),
    "cut": ("[any, 3, 5]", "[3, 3, 3]", "[2, 1, 3]", "[true, false, false]", 4),
    "plane": ("[9, 7]", "[5, 3]", "[1, 1]", "[false, true]", 2),
    "line": ("[any]", "[7]", "[4]", "[false]", 2),
}


def along(name):
    axes, window, stride, causal, query = GRIDS[name]
    return parse(ALONG.format(axes=axes, window=window, stride=stride, causal=causal, query=query))


@pytest.mark.parametrize("name", GRIDS)
def test_windows_along_axes_are_right(name):
    """Of all tokens, of some, and of rows and keys that are not alike."""
    spec = along(name)
    config = {"attend_near": {"BLOCK_N": 32, "BLOCK_T": 32, "BLOCK_M": 64}}
    right(spec, drawn(spec, 63, 63, seed=1))
    right(spec, drawn(spec, 50, 50, seed=2), config)
    right(spec, drawn(spec, 17, 45, B=2), q_offset=torch.tensor([0, 19], dtype=torch.int32))


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_along_axes_are_right(name):
    spec = along(name)
    gradients_are_right(spec, drawn(spec, 50, 50), q_offset=-7)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("causal: false\n", "causal: true\n", "attends windows along axes of a causal order"),
        ("grid: {", "window: 3, grid: {", "attends windows along axes beside units"),
        ("stride: [4]", "dilation: [2]", "attends windows along axes with gaps"),
    ],
)
def test_windows_along_axes_that_no_kernel_has_are_refused(old, new, words):
    axes, window, stride, causal, query = GRIDS["line"]
    text = ALONG.format(axes=axes, window=window, stride=stride, causal=causal, query=query)
    assert old in text
    with pytest.raises(PlanError, match=f"branch near: no kernel {words} yet"):
        planned(parse(text.replace(old, new, 1)))


# --- nothing beside the pattern


def test_keys_that_no_row_sees_are_not_read():
    """Of the last rows a few of many units are seen: the others may be anything."""
    for static in ("blocks: 16, window: 1, stride: 5", "blocks: 16, sink: 1, power_of_two: true"):
        spec = made(static)
        x = drawn(spec, 16, 176)
        attn = load_kernel(spec, interpret=True, config={"attend_far": {"BLOCK_N": 16}})
        probe = {**x, "q": torch.zeros_like(x["q"]), "v": torch.zeros_like(x["v"])}
        unit, seen = torch.arange(176) // 16, set()
        for e in range(11):
            probe["v"] = (unit == e).float()[None, :, None, None].expand(x["v"].shape).contiguous()
            seen |= {e} if bool((reference(spec, probe).o > 0).any()) else set()
        assert 1 < len(seen) < 8
        hidden = torch.tensor([e not in seen for e in unit.tolist()])
        poisoned = {name: x[name].clone() for name in ("k", "v")}
        for t in poisoned.values():
            t[:, hidden] = torch.nan
        with torch.no_grad():
            assert torch.equal(attn(**x), attn(**{**x, **poisoned}))


def test_a_call_takes_no_memory_beside_its_outputs():
    for name in ("moa", "s2_attention", "power_attention", "flux_attention", "gna"):
        plan = planned(systems.load(name))
        assert {buffer.role for step in plan.steps for buffer in step.buffers} == {"output"}
        assert [len(step.launches) for step in plan.steps] == [1]


# --- steps


@pytest.mark.parametrize(
    ("static", "page"),
    [
        ("blocks: 2, window: 2, sink: 1, stride: 3, shift: 1", 8),
        ("blocks: 8, power_of_two: true", None),
    ],
)
def test_steps_are_rows_of_prefill(static, page, monkeypatch):
    monkeypatch.setattr(splits, "SHARE_KEYS", 4)
    spec, B, T = made(static), 2, 45
    x = drawn(spec, T, T, B)
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(B, 48, page=page)
    cache.append(x["k"][:, :40], x["v"][:, :40])
    o = [attn.decode(*(x[n][:, a:b] for n in "qkv"), cache) for a, b in ((40, 41), (41, T))]
    expected = reference(spec, x, dtype=torch.float64).o[:, 40:]
    torch.testing.assert_close(torch.cat(o, 1).double(), expected, rtol=1e-4, atol=1e-5)


# --- ways of sequences


@pytest.mark.parametrize("causal", ["true", "false"])
def test_sequences_take_their_ways(causal):
    """Of a way that is none a row sees nothing."""
    spec = parse(WAYS % causal)
    x = drawn(spec, 37, 37, B=3)
    x["route"] = torch.tensor([1, 0, 2], dtype=torch.int32)
    right(spec, x)
    with torch.no_grad():
        assert not load_kernel(spec, interpret=True)(**x)[2].any()


def test_gradients_of_ways_are_right():
    spec = parse(WAYS % "true")
    gradients_are_right(spec, drawn(spec, 35, 35, B=2))


def test_a_step_takes_the_way_it_is_told(monkeypatch):
    monkeypatch.setattr(splits, "SHARE_KEYS", 4)
    spec = parse(WAYS % "true")
    x = drawn(spec, 30, 30, B=2)
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(2, 32)
    cache.append(x["k"][:, :28], x["v"][:, :28])
    o = attn.decode(*(x[n][:, 28:] for n in "qkv"), cache, route=x["route"])
    expected = reference(spec, x, dtype=torch.float64).o[:, 28:]
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)


def test_ways_of_other_branches_are_left_as_they_are():
    capped = (WAYS % "true").replace("window: all, when", "window: all, softcap: 3.0, when", 1)
    sunk = (WAYS % "true").replace(", when", ", sink: learned, when")
    for text in (capped, sunk):
        with pytest.raises(PlanError, match="no kernel takes a route by sample yet"):
            planned(parse(text))


def test_latents_attend_what_a_pattern_shows_and_have_no_gradient():
    text = TEXT.replace("name: far, ", "name: far, storage: latent, ").replace("qk: 32", "qk: 48")
    spec = parse(
        text.format(static="blocks: 4, window: 2, sink: 1, stride: 3", query=4, kv=1, causal="true")
    )
    right(spec, drawn(spec, 21, 21))
    with pytest.raises(PlanError, match="the gradient of latents that a pattern shows yet"):
        backward.plan(emitted.graph(spec), H100)


# --- refused


@pytest.mark.parametrize(
    ("static", "causal", "words"),
    [
        ("window: 4, dilation: 2", True, "attends a window with gaps"),
        ("blocks: 4, stride: 3", False, "attends units at distances both ways"),
        (
            "blocks: 4, stride: 3, power_of_two: true",
            True,
            "attends every so many units beside those at powers of two",
        ),
    ],
)
def test_patterns_that_no_kernel_has_are_refused_by_name(static, causal, words):
    with pytest.raises(PlanError, match=f"branch far: no kernel {words} yet"):
        planned(made(static, causal=causal))


def test_steps_in_units_of_few_tokens_are_refused_by_name():
    words = "no kernel decodes distances in units of fewer than 8 tokens yet"
    with pytest.raises(PlanError, match=f"branch far: {words}"):
        load_kernel(made("blocks: 2, power_of_two: true"), interpret=True).new_cache(1, 16)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"BLOCK_T": 32, "BLOCK_M": 64}, "expected BLOCK_T of at most 16, the tokens of a unit"),
        ({"BLOCK_N": 32}, "expected BLOCK_N of at most 16, keys of a block"),
    ],
)
def test_tiles_that_leave_a_unit_are_refused(values, words):
    spec = made("blocks: 16, power_of_two: true")
    attn = load_kernel(spec, interpret=True, config={"attend_far": values})
    with pytest.raises(ArgumentError, match=words):
        attn(**drawn(spec, 16, 16))


def test_rules_say_what_heads_have_in_common():
    alike = planned(made("window: 3"))  # two heads of queries a head of keys
    assert alike.kernel("attend_far").context.heads == 2
    apart = planned(made("blocks: 2, stride: 3, shift: 1"))
    assert apart.kernel("attend_far").context.heads == 1
    assert patterns.Rule(size=2, spans=((1, 0, 0),), stride=3).apart is False
