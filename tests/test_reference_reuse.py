"""Calls that take over what earlier ones chose, and losses: by hand, by naive loops, by laws."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import (
    APART_GATED,
    MEAN,
    SELECTED,
    SMALL_INDEX,
    blocks,
    cascade,
    hisa,
    moba,
    pages,
    random_tensors,
    spec,
    top,
)
from torch import Tensor

from hsgen.errors import ArgumentError
from hsgen.reference import Kept, Result, reference
from hsgen.selection import ListSelection
from hsgen.spec import (
    Attend,
    Distill,
    Index,
    Kl,
    Level,
    Loss,
    Reuse,
    Score,
    Select,
    Spec,
    Tokens,
    load,
)


def dsa(**more: object) -> Spec:
    score = Score(form="relu_weighted", share="all")
    token = Level(name="token", partition=Tokens(), score=score, select=top(4))
    return spec("dsa", [token], [Attend(name="selected", over="token")], index=SMALL_INDEX, **more)


def reused(role: str = "final", **more: object) -> tuple[Reuse, ...]:
    return (Reuse(level="token", over="layers", role=role, **more),)


def play(made: Spec, calls: int, *, rows: int = 9, keys: int = 9) -> list[Result]:
    """Calls with tensors of their own, each with the state of the one before."""
    found: list[Result] = []
    for call in range(calls):
        x = random_tensors(made, rows, keys, batch=2, seed=call)
        found.append(reference(made, x, state=found[-1].state if found else None))
    return found


def tokens_of(result: Result, level: str = "token") -> Tensor:
    return result.selection[level].indices


# --- which call chooses


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
def test_layers_of_index_cache_are_those_of_the_authors(every: int) -> None:
    """Off by one in prime-rl#2541 and vllm-ascend#9390: a layer shares if max(l - 1, 0) % f is not 0."""
    (reuse,) = reused(every=every, lead=1)
    for layer in range(61):
        shares = max(layer - 1, 0) % every != 0
        assert reuse.turn(layer) == ("shared" if shares else "fresh")


def test_patterns_are_read_letter_by_letter() -> None:
    (reuse,) = reused(pattern="FSFSS", dense=2, lead=1)
    letters = "".join(reuse.turn(call)[0] for call in range(13))
    assert letters == "ddf" + "fsfss" * 2


def test_one_fresh_call_serves_all_where_nothing_else_is_said() -> None:
    (reuse,) = reused(dense=2)
    assert [reuse.turn(call)[0] for call in range(6)] == list("ddfsss")


def test_a_call_that_shares_needs_something_to_share() -> None:
    """vllm#49085: the first layer of a pipeline's second stage has no layer before it to share with."""
    made = dsa(reuse=reused(every=2))
    with pytest.raises(ArgumentError, match="call 3 of layers shares the selection"):
        reference(made, random_tensors(made, 5, 5), state={"token": Kept(calls=3)})


# --- what a call takes over


def test_a_shared_call_is_a_call_with_that_selection() -> None:
    made = dsa(reuse=reused(every=2))
    first, second = play(made, 2)
    x = random_tensors(made, 9, 9, batch=2, seed=1)
    alone = made.model_copy(update={"reuse": ()})
    expected = reference(alone, x, selection=first.selection)
    assert torch.equal(second.o, expected.o)
    assert torch.equal(tokens_of(second), tokens_of(first))
    assert not torch.equal(reference(alone, x).o, expected.o)


def test_a_shared_call_reads_no_index() -> None:
    made = dsa(reuse=reused(every=2))
    first, second = play(made, 2)
    x = random_tensors(made, 9, 9, batch=2, seed=1)
    less = {name: y for name, y in x.items() if "index" not in name}
    assert torch.equal(reference(made, less, state=first.state).o, second.o)
    with pytest.raises(KeyError):
        reference(made, less)


def test_reuse_of_every_call_is_none() -> None:
    made = dsa(reuse=reused(every=1))
    alone = made.model_copy(update={"reuse": ()})
    for call, result in enumerate(play(made, 3)):
        expected = reference(alone, random_tensors(made, 9, 9, batch=2, seed=call))
        assert torch.equal(result.o, expected.o)


def test_levels_above_a_shared_one_are_not_run() -> None:
    made = spec(
        "hisa",
        hisa(1),
        [SELECTED],
        index=SMALL_INDEX,
        reuse=(Reuse(level="block", over="layers", role="final", every=2),),
    )
    first, second = play(made, 2)
    assert set(first.selection) == {"coarse", "block"} and set(second.selection) == {"block"}


def test_a_kept_beam_is_expanded_by_fresh_scores() -> None:
    """HiP and V4.1: the coarse choice is kept, the fine one is made anew inside of it."""
    made = spec(
        "beam",
        hisa(1),
        [SELECTED],
        index=SMALL_INDEX,
        reuse=(Reuse(level="coarse", over="steps", role="final", every=2),),
    )
    first, second = play(made, 2, rows=3, keys=40)
    assert torch.equal(tokens_of(first, "coarse"), tokens_of(second, "coarse"))
    assert not torch.equal(tokens_of(first, "block"), tokens_of(second, "block"))
    parents = tokens_of(second, "coarse").long()
    for t in range(3):
        chosen = tokens_of(second, "block")[0, t, 0]
        assert {int(e) // 8 for e in chosen if e >= 0} <= set(parents[0, t, 0].tolist())


def test_kept_tokens_that_a_row_cannot_see_are_dropped() -> None:
    made = dsa(reuse=reused(every=2))
    kept = ListSelection(level="token", indices=torch.full((1, 3, 1, 4), 7))
    state = {"token": Kept(calls=1, selection=kept)}
    result = reference(made, random_tensors(made, 3, 3), state=state)
    assert torch.equal(result.o, torch.zeros_like(result.o))
    assert torch.isneginf(result.lse["selected"]).all()


def test_packed_calls_equal_their_documents() -> None:
    made = dsa(reuse=reused(every=2), loss=Loss(kl=Kl(level="token")))
    cu, state, apart = torch.tensor([0, 5, 12]), None, [None, None]
    for call in range(3):
        x = {n: y[0] for n, y in random_tensors(made, 12, 12, seed=call).items()}
        packed = reference(made, x, cu_seqlens_q=cu, state=state)
        state, losses = packed.state, []
        for z, (a, b) in enumerate(((0, 5), (5, 12))):
            one = reference(made, {n: y[None, a:b] for n, y in x.items()}, state=apart[z])
            apart[z] = one.state
            torch.testing.assert_close(packed.o[a:b], one.o[0])
            losses.append(one.loss["kl"] * (b - a))
        torch.testing.assert_close(packed.loss["kl"], sum(losses) / 12)


def test_state_does_not_depend_on_what_else_is_kept() -> None:
    made = dsa(reuse=reused(every=2), loss=Loss(kl=Kl(level="token")))
    x = random_tensors(made, 6, 6)
    full, lean = reference(made, x), reference(made, x, keep_scores=False)
    assert not lean.scores and not lean.candidates
    assert torch.equal(full.state["token"].scores, lean.state["token"].scores)


# --- DELTA


def test_delta_is_what_its_card_says() -> None:
    """Greatest mass of all heads, summed by page, the last pages taken; then layers share."""
    made = spec(
        "delta",
        pages(),
        [SELECTED],
        reuse=(Reuse(level="block", over="layers", role="final", every=3, attend="given"),),
    )
    results = play(made, 3, rows=1, keys=22)
    x = random_tensors(made, 1, 22, batch=2)
    for b in range(2):
        k = x["k"][b].repeat_interleave(2, 1)
        mass = torch.stack([(k[:, h] @ x["q"][b, 0, h] * 6**-0.5).softmax(0) for h in range(4)])
        token = mass.amax(0)
        page = [float(token[e * 4 : e * 4 + 4].sum()) for e in range(5)]
        best = max(range(4), key=lambda e: page[e])  # 4 and the own page, 5, are taken
        assert tokens_of(results[0], "block")[b, 0, 0].tolist() == [best, 4, 5]
        v = x["v"][b].repeat_interleave(2, 1)
        dense = torch.stack([mass[h] @ v[:, h] for h in range(4)])
        torch.testing.assert_close(results[0].o[b, 0], dense)
    assert torch.equal(tokens_of(results[2], "block"), tokens_of(results[0], "block"))
    assert not torch.allclose(results[2].o, results[0].o)


def test_equal_pages_go_to_the_lower_and_near_ties_to_the_greater() -> None:
    """DELTA's bias of -1e-7 a page vanishes in float32 from 2 on, and decides near-ties below."""
    q = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    made = spec("delta", pages(), [SELECTED])
    x = random_tensors(made, 1, 24) | {"q": q}
    assert tokens_of(reference(made, x), "block")[0, 0, 0].tolist() == [0, 4, 5]
    q[..., 0] = 1e-7
    keys = torch.zeros_like(x["k"])
    keys[:, 9, :, 0] = 1.0  # page 2, ahead by about 1e-8
    chosen = reference(made, x | {"q": q, "k": keys}).selection["block"].indices
    assert chosen[0, 0, 0].tolist() == [2, 4, 5]


# --- dense calls, cascades


def test_dense_calls_attend_everything_and_keep_nothing() -> None:
    made = spec(
        "d", pages(), [SELECTED], reuse=(Reuse(level="block", over="steps", role="final", dense=1),)
    )
    dense = spec("all", [], [Attend(name="selected", window="all")])
    first, second, third = play(made, 3)
    expected = reference(dense, random_tensors(made, 9, 9, batch=2))
    assert torch.equal(first.o, expected.o)
    assert not first.selection and first.state["block"].selection is None
    assert torch.equal(tokens_of(second, "block"), tokens_of(third, "block"))


def test_what_a_cascade_drops_stays_dropped() -> None:
    """SpAtten, by a naive loop: masses of what is left, added up over layers, the best part kept."""
    how = Select(fraction=0.6)
    made = spec(
        "spatten",
        cascade(how),
        [SELECTED],
        kv=1,
        reuse=(
            Reuse(level="block", over="layers", role="candidates", accumulate=True, attend="given"),
        ),
    )
    results = play(made, 4)
    for b, t in ((0, 8), (1, 5)):
        alive, total = list(range(t + 1)), dict.fromkeys(range(t + 1), 0.0)
        for call, result in enumerate(results):
            x = random_tensors(made, 9, 9, batch=2, seed=call)
            mass = torch.zeros(len(alive), dtype=torch.float64)
            for h in range(4):
                row = (x["k"][b, alive, 0] @ x["q"][b, t, h] * 6**-0.5).softmax(0)
                torch.testing.assert_close(result.o[b, t, h], row @ x["v"][b, alive, 0])
                mass += row
            for e, m in zip(alive, mass.tolist(), strict=True):
                total[e] += m
            alive = sorted(sorted(alive, key=lambda e: -total[e])[: math.ceil(0.6 * len(alive))])
            chosen = tokens_of(result, "block")[b, t, 0]
            assert [int(e) for e in chosen if e >= 0] == alive
    assert len(alive) < 3


def test_a_fresh_call_ends_a_cascade() -> None:
    made = spec(
        "c",
        cascade(top(3)),
        [SELECTED],
        reuse=(Reuse(level="block", over="layers", role="candidates", every=2),),
    )
    alone = made.model_copy(update={"reuse": ()})
    results = play(made, 3)
    assert torch.equal(tokens_of(results[1], "block"), tokens_of(results[0], "block"))
    expected = reference(alone, random_tensors(made, 9, 9, batch=2, seed=2))
    assert torch.equal(tokens_of(results[2], "block"), tokens_of(expected, "block"))


# --- losses


def kl(over: str = "all", **more: object) -> Loss:
    return Loss(kl=Kl(level="token", over=over, **more))


def test_divergence_by_hand() -> None:
    """Two tokens, one head: attention 1/4 and 3/4 against index scores 0 and 0."""
    made = dsa(loss=kl()).model_copy(update={"index": Index(heads=1, dim=4)})
    x = {name: torch.zeros_like(y) for name, y in random_tensors(made, 1, 2).items()}
    x["q"][..., 0], x["k"][:, 1, :, 0] = 6**0.5, math.log(3)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(reference(made, x).loss["kl"]) == pytest.approx(expected)


@pytest.mark.parametrize("over", ["all", "selected"])
def test_gradient_of_the_divergence_is_share_minus_target(over: str) -> None:
    """dI = softmax(I) - p over the set, by row; it reaches the index and nothing else."""
    made = dsa(loss=kl(over))
    x = {n: y.requires_grad_() for n, y in random_tensors(made, 7, 7).items()}
    result = reference(made, x)
    dots = torch.einsum("thd,sd->ths", x["q_index"][0], x["k_index"][0]).relu()
    index = torch.einsum("th,ths->ts", x["w_index"][0], dots)
    k, wanted = x["k"].detach()[0].repeat_interleave(2, 1), torch.zeros(7, 7, dtype=torch.float64)
    for t in range(7):
        chosen = set(tokens_of(result)[0, t, 0].tolist()) - {-1}
        inside = sorted(chosen) if over == "selected" else list(range(t + 1))
        heads = [(k[: t + 1, h] @ x["q"][0, t, h] * 6**-0.5).softmax(0) for h in range(4)]
        p = sum(heads).detach()[inside]
        wanted[t, inside] = (index[t, inside].softmax(0).detach() - p / p.sum()) / 7
    learns = ("q_index", "k_index", "w_index")
    expected = torch.autograd.grad(index, [x[name] for name in learns], wanted)
    grads = torch.autograd.grad(result.loss["kl"], list(x.values()), allow_unused=True)
    found = dict(zip(x, grads, strict=True))
    for name, grad in zip(learns, expected, strict=True):
        torch.testing.assert_close(found.pop(name), grad)
    assert not any(grad is not None and grad.any() for grad in found.values())


def test_a_group_of_layers_teaches_the_mean_of_its_attention() -> None:
    """IndexCache: mean of KL(p_l || I) has the gradient of KL(mean p_l || I)."""
    made = dsa(reuse=reused(every=3), loss=kl())
    first = random_tensors(made, 6, 6)
    index = first["q_index"].requires_grad_()
    state, losses, targets = None, [], []
    for call in range(3):
        x = first if call == 0 else random_tensors(made, 6, 6, seed=call)
        result = reference(made, x, state=state)
        state, losses = result.state, [*losses, result.loss["kl"]]
        targets.append(reference(_with_masses(made), x).scores["token"].detach().clamp(min=0))
    (found,) = torch.autograd.grad(sum(losses) / 3, index, retain_graph=True)
    p = sum(targets) / 3
    share = state["token"].scores.masked_fill(p == 0, -torch.inf).log_softmax(-1)
    mean = -(p * share.masked_fill(p == 0, 0.0)).sum(-1).mean()
    torch.testing.assert_close(found, torch.autograd.grad(mean, index)[0])


def _with_masses(made: Spec) -> Spec:
    """Scores that are the attention of all heads together."""
    score = Score(form="dot", normalise="softmax", share="all", reduce="mean")
    level = made.levels[0].model_copy(update={"score": score})
    return made.model_copy(update={"levels": (level,), "reuse": (), "loss": None, "index": None})


def test_masses_that_are_attention_itself_have_no_divergence() -> None:
    made = _with_masses(dsa()).model_copy(update={"loss": kl()})
    assert float(reference(made, random_tensors(made, 8, 8)).loss["kl"]) == pytest.approx(
        0.0, abs=1e-12
    )


def test_block_gate_target_is_the_greatest_probability() -> None:
    """SeerAttention-R: column-block maximum by row, maximum of the group, renormalised."""
    gate = Level(
        name="token",
        partition=blocks(4),
        pool=MEAN,
        score=Score(form="dot", share="group", reduce="mean"),
    )
    attend = [Attend(name="all", window="all")]
    made = spec("gate", [gate], attend, loss=kl(heads="max", tokens="max"))
    x = random_tensors(made, 1, 10)
    result = reference(made, x)
    total = 0.0
    for group in range(2):
        heads = x["q"][0, 0, group * 2 : group * 2 + 2]
        p = (heads @ x["k"][0, :, group].T * 6**-0.5).softmax(-1).amax(0)
        target = torch.stack((p[:4].amax(), p[4:8].amax()))
        target = target / target.sum()
        share = result.scores["token"][0, 0, group, :2].softmax(0)
        total += float((target * (target / share).log()).sum())
    assert float(result.loss["kl"]) == pytest.approx(total / 2)


def test_rows_that_see_nothing_teach_nothing() -> None:
    made = dsa(loss=kl("selected"))
    x = {n: y.requires_grad_() for n, y in random_tensors(made, 5, 3).items()}
    some = reference(made, x).loss["kl"]  # rows 0 and 1 stand before the first key
    grads = torch.autograd.grad(some, [x["q_index"], x["k_index"], x["w_index"]])
    assert some.isfinite() and all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :2].any()
    none = reference(
        made, {n: y[:, :2] if y.shape[1] == 5 else y for n, y in x.items()}, q_offset=-2
    )
    assert float(none.loss["kl"].detach()) == 0.0


def ssa(toward: str, form: str = "smooth_l1") -> Spec:
    distill = Distill(student="sparse", teacher="full", form=form, toward=toward)
    attend = [Attend(name="full", window="all"), Attend(name="sparse", over="block")]
    return spec("ssa", moba(), attend, combine=APART_GATED, loss=Loss(distill=distill))


def test_streams_are_both_there_and_pull_each_other() -> None:
    """SSA: SmoothL1(full, sparse held still) + SmoothL1(full held still, sparse), each with its gate."""
    made = ssa("both")
    x = random_tensors(made, 40, 40)
    result = reference(made, x)
    assert torch.equal(result.o, result.streams["full"])
    assert not torch.allclose(result.streams["full"], result.streams["sparse"])
    far = torch.nn.functional.smooth_l1_loss(result.streams["full"], result.streams["sparse"])
    torch.testing.assert_close(result.loss["distill"], 2 * far)
    dense = spec("dense", [], [Attend(name="full", window="all")])
    plain = reference(dense, {n: x[n] for n in ("q", "k", "v")}).o
    torch.testing.assert_close(result.o, plain * x["gates"][..., :1])


@pytest.mark.parametrize(("toward", "moved"), [("teacher", [1]), ("both", [0, 1])])
@pytest.mark.parametrize("form", ["mse", "smooth_l1"])
def test_a_teacher_is_held_still(toward: str, moved: list[int], form: str) -> None:
    made = ssa(toward, form)
    x = random_tensors(made, 40, 40)
    gates = x["gates"].requires_grad_()
    (found,) = torch.autograd.grad(reference(made, x).loss["distill"], gates)
    assert [c for c in range(2) if found[..., c].any()] == moved


# --- shipped


def test_shipped_specs_of_this_family() -> None:
    index = load("index_cache").reuse[0]
    assert "".join(index.turn(layer)[0] for layer in range(10)) == "ffsssfsssf"
    assert load("ssa").loss.distill.toward == "both"
    assert load("delta").level("page").select.force.last == 8
