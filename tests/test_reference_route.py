"""Routes: which way a layer, a head or a sequence takes, held against masks that are written out."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import ROUTES, random_tensors

from hsgen import load_kernel, passes, schedule
from hsgen.errors import ArgumentError, PlanError
from hsgen.planner import plan
from hsgen.reference import reference, tensor_kinds, tensor_shapes
from hsgen.spec import Spec, dump, load, parse
from hsgen.target import H100

HEAD = """\
hsgen: 1
name: routed
heads: {query: 4, kv: 2}
head_dim: {qk: 6, v: 5}
"""
TWO_WAYS = """\
attend:
  - {name: full, window: all, when: far}
  - {name: sliding, window: 3, when: near}
"""


def spec_of(route: str, rest: str = TWO_WAYS) -> Spec:
    return parse(f"{HEAD}route: {route}\n{rest}")


def masked(x: dict[str, torch.Tensor], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention of one batch under bool[B, T, Hq, S]; a row that sees nothing is 0."""
    group = x["q"].shape[2] // x["k"].shape[2]
    k, v = (x[name].repeat_interleave(group, 2) for name in ("k", "v"))
    logits = torch.einsum("bthd,bshd->bths", x["q"], k) / math.sqrt(k.shape[-1])
    logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return torch.einsum("bths,bshd->bthd", weights, v), lse.transpose(1, 2)


def mask_of(heads_far: list[list[bool]], T: int, near: int = 3) -> torch.Tensor:
    """Every token up to the row's own for heads that are far, the last ones for the others."""
    mask = torch.zeros(len(heads_far), T, len(heads_far[0]), T, dtype=torch.bool)
    for b, heads in enumerate(heads_far):
        for h, far in enumerate(heads):
            for t in range(T):
                mask[b, t, h, max(0, 0 if far else t - near + 1) : t + 1] = True
    return mask


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("layer", range(5))
def test_layers_take_turns(layer: int) -> None:
    """One number of the call, or bound beforehand: the same attention, and no state of anyone's."""
    spec = spec_of("{by: layer, table: [far, near, near]}")
    x = random_tensors(spec, 9, 9, batch=2)
    expected, lse = masked(x, mask_of([[layer % 3 == 0] * 4] * 2, 9))
    called = reference(spec, x | {"layer": numbers(layer)})
    bound = spec.bind(layer=layer)
    for result in (called, reference(bound, x)):
        torch.testing.assert_close(result.o, expected)
        torch.testing.assert_close(next(iter(result.lse.values())), lse)
    assert bound.route is None and len(bound.attend) == 1
    assert "layer" not in tensor_kinds(bound)


def test_heads_take_turns() -> None:
    spec = spec_of("{by: head, table: [far, near]}")
    x = random_tensors(spec, 9, 9)
    expected, _ = masked(x, mask_of([[True, False, True, False]], 9))
    torch.testing.assert_close(reference(spec, x).o, expected)


@pytest.mark.parametrize(
    ("by", "route", "far"),
    [
        ("layer", numbers(1), [[False] * 4] * 2),
        ("head", numbers(0, 1, 1, 0), [[True, False, False, True]] * 2),
        ("sample", numbers(1, 0), [[False] * 4, [True] * 4]),
        ("sample_head", numbers(0, 0, 1, 1, 1, 0, 1, 0).view(2, 4), [[1, 1, 0, 0], [0, 1, 0, 1]]),
    ],
)
def test_ways_are_given(by: str, route: torch.Tensor, far: list[list[bool]]) -> None:
    spec = spec_of(f"{{by: {by}, input: [far, near]}}")
    x = random_tensors(spec, 9, 9, batch=2) | {"route": route}
    assert tensor_shapes(spec, 2, 9, 9)["route"] == tuple(route.shape)
    expected, lse = masked(x, mask_of(far, 9))
    result = reference(spec, x)
    torch.testing.assert_close(result.o, expected)
    torch.testing.assert_close(result.lse["o"], lse)


def test_a_number_of_no_way_leaves_rows_empty() -> None:
    """Out of range is masked: output 0 and log-sum-exp -inf, not the first or the last way."""
    spec = spec_of("{by: sample, input: [far, near]}")
    for wrong in (-1, 2, 1 << 20):
        x = random_tensors(spec, 5, 5) | {"route": numbers(wrong)}
        result = reference(spec, {n: t.double().requires_grad_() for n, t in x.items()})
        assert (result.o == 0).all()
        assert (result.lse["o"] == -math.inf).all()


def test_no_gradient_of_a_head_reaches_another_way() -> None:
    """Of a window, tokens before it: their gradients are 0 and never NaN."""
    spec = spec_of("{by: head, table: [near, near, far, far]}")
    x = {n: t.requires_grad_() for n, t in random_tensors(spec, 9, 9).items()}
    reference(spec, x).o[0, -1].sum().backward()
    grad = x["v"].grad
    assert grad is not None
    assert (grad[0, :6, 0] == 0).all() and (grad[0, :, 1] != 0).all()


def test_packed_documents_take_ways_of_their_own() -> None:
    spec = spec_of("{by: sample_head, input: [far, near]}")
    ends = [0, 5, 5, 12]
    x = random_tensors(spec, 12, 12)
    packed = {n: t[0] for n, t in x.items() if n != "route"}
    packed["route"] = torch.randint(0, 2, (3, 4), dtype=torch.int32)
    cu = numbers(*ends)
    together = reference(spec, packed, cu_seqlens_q=cu)
    for z, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        one = {n: t[z : z + 1] if n == "route" else t[None, a:b] for n, t in packed.items()}
        if a < b:
            apart = reference(spec, one)
            torch.testing.assert_close(together.o[a:b], apart.o[0])
            torch.testing.assert_close(together.lse["o"][:, a:b], apart.lse["o"][0])


def test_a_selection_is_empty_off_its_way() -> None:
    spec = next(case for case in ROUTES if case.name == "route_of_heads")
    chosen = reference(spec, random_tensors(spec, 30, 30)).selection["block"].indices
    assert (chosen[:, :, 0::2] == -1).all()  # heads 0 and 2 are near
    assert (chosen[:, :, 1::2, 0] >= 0).all()


def test_branches_of_one_way_share_a_softmax_and_a_token_counts_once() -> None:
    """hydra: what chunks and the window both reach is one key (a peer's bug counts it twice)."""
    spec = load("hydra")
    spec = spec.model_copy(
        update={
            "heads": spec.heads.model_copy(update={"query": 4, "kv": 2}),
            "head_dim": spec.head_dim.model_copy(update={"qk": 6, "v": 5}),
        }
    )
    x = random_tensors(spec, 300, 300)
    result = reference(spec, x, keep_seen=True)
    seen = result.seen["selected"] | result.seen["window"]
    both = result.seen["selected"] & result.seen["window"]
    assert both.any()
    expected, lse = masked(x, seen)
    torch.testing.assert_close(result.o, expected)
    torch.testing.assert_close(result.lse["o"], lse)


# --- the shipped ones


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4, 51])
def test_every_fourth_layer_of_small_thinker_sees_everything(layer: int) -> None:
    spec = load("small_thinker").bind(layer=layer)
    assert [branch.window for branch in spec.attend] == ["all" if layer % 4 == 0 else 4096]
    assert schedule.schedule(passes.run(plan(spec)), H100).kernels


def test_thirteen_of_52_layers_are_full() -> None:
    route = load("small_thinker").route
    assert route is not None
    assert sum(route.table[i % len(route.table)] == "everything" for i in range(52)) == 13


def test_dense_layers_are_those_whose_number_from_one_is_even() -> None:
    """Phi-3-small: layer i is dense where 2 divides i + 1."""
    spec = load("s2_attention")
    dense = [spec.bind(layer=i).attend[0].window == "all" for i in range(6)]
    assert dense == [(i + 1) % 2 == 0 for i in range(6)]


def test_flux_is_a_sink_and_a_window_in_tokens() -> None:
    spec = load("flux_attention")
    streaming = spec.attend[1].static
    assert streaming is not None
    small = streaming.model_copy(update={"window": 4, "sink": 2})
    attend = (spec.attend[0], spec.attend[1].model_copy(update={"static": small}))
    spec = parse(dump(spec.model_copy(update={"attend": attend})).replace("query: 32", "query: 8"))
    x = random_tensors(spec, 11, 11, batch=2) | {"route": numbers(1, 0)}
    mask = torch.zeros(2, 11, 8, 11, dtype=torch.bool)
    for t in range(11):
        mask[1, t, :, : t + 1] = True
        for s in range(t + 1):
            mask[0, t, :, s] = t - s < 4 or s < 2
    torch.testing.assert_close(reference(spec, x).o, masked(x, mask)[0])


# --- the language


@pytest.mark.parametrize("case", ROUTES, ids=lambda case: case.name)
def test_text_round_trips(case: Spec) -> None:
    assert parse(dump(case)) == case


def test_a_layer_changes_nothing_where_layers_are_alike() -> None:
    spec = load("moba")
    assert spec.bind(layer=7) == spec
    for wrong in (-1, True):
        with pytest.raises(ArgumentError, match="layer: expected a whole number of at least 0"):
            spec.bind(layer=wrong)


def test_places_in_the_text_survive_a_bound_layer() -> None:
    spec = spec_of("{by: layer, table: [far, near]}").bind(layer=1)
    span = spec.span("attend", 0, "window")
    assert span is not None
    assert (span.line, span.column) == (8, 29)


def test_only_the_layer_of_a_route_is_left_of_levels() -> None:
    case = next(case for case in ROUTES if case.name == "route_of_layers")
    far, near = case.bind(layer=0), case.bind(layer=1)
    assert [level.name for level in far.levels] == ["block"] and not near.levels
    assert far.combine is None and parse(dump(far)) == far


def test_what_kernels_do_not_do_is_said_with_what_helps() -> None:
    graph = passes.run(plan(load("small_thinker")))
    with pytest.raises(PlanError, match="no kernel takes a route by layer") as caught:
        schedule.schedule(graph, H100)
    assert caught.value.help is not None and "load_kernel" in caught.value.help


# --- a kernel on the CPU, where the reference runs


def test_a_kernel_takes_a_layer_when_it_is_loaded_or_called() -> None:
    spec = spec_of("{by: layer, table: [far, near]}")
    x = {n: t.float() for n, t in random_tensors(spec, 9, 9).items() if n != "layer"}
    called = load_kernel(spec)(**x, layer=numbers(3))
    bound = load_kernel(spec, layer=3)(**x)
    torch.testing.assert_close(called, bound)
    assert load_kernel(spec, layer=3) is load_kernel(spec, layer=1)


def test_a_kernel_is_differentiable_beside_its_route() -> None:
    spec = spec_of("{by: sample, input: [far, near]}")
    x = {n: t.float().requires_grad_() for n, t in random_tensors(spec, 5, 5, batch=2).items()}
    x["route"] = numbers(0, 1)
    load_kernel(spec)(**x).sum().backward()
    assert x["v"].grad is not None and x["v"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (torch.zeros(2), r"route: expected \[Z\] = \[2\] int32 cpu, got \[2\] fp32 cpu"),
        (numbers(0), "route: expected one for each of 2 sequences, got 1"),
        (numbers(0, 1, 2), "route: expected one for each of 2 sequences, got 3"),
    ],
)
def test_wrong_routes_are_refused(route: torch.Tensor, words: str) -> None:
    spec = spec_of("{by: sample, input: [far, near]}")
    x = {n: t.float() for n, t in random_tensors(spec, 5, 5, batch=2).items()} | {"route": route}
    with pytest.raises(ArgumentError, match=words):
        load_kernel(spec)(**x)


def test_a_layer_keeps_of_reuse_and_losses_what_it_has() -> None:
    rest = """levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, normalise: softmax}
    select: {top_k: 2, force: {last: 1}}
    when: near
attend:
  - {name: full, window: all, when: far}
  - {name: selected, over: block, when: near}
reuse: [{level: block, over: layers, as: final, every: 2}]
loss: {kl: {level: block}}
"""
    spec = spec_of("{by: layer, table: [far, near]}", rest)
    far, near = spec.bind(layer=0), spec.bind(layer=1)
    assert (far.levels, far.reuse, far.loss) == ((), (), None)
    assert [each.level for each in near.reuse] == ["block"]
    assert near.loss == spec.loss
    for bound in (far, near):
        assert parse(dump(bound)) == bound
        assert reference(bound, random_tensors(bound, 9, 9)).o.isfinite().all()
