"""The last rows of a sequence say which part of the entries all blocks of rows keep, of other sizes."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from conformance.test_likeness import always
from hsgen import knobs
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.pipeline import compile_spec
from hsgen.spec import Force, Select, TopP
from hsgen.target import H100

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(*, last=8, least=2, force=None, causal=True, map_how="max", **shape):
    """The shipped spec with more or fewer last rows, other forced entries and sums in place of peaks."""
    spec = systems.small("proxy_attn", **({"group": 2, "dims": (32, 32)} | shape))
    mass, budget, proxy, block = spec.levels
    select = block.select.model_copy(update={"min": least, "force": force or block.select.force})
    query = block.query.model_copy(update={"reduce": map_how})
    score = block.score.model_copy(update={"map": map_how})
    levels = (
        mass.model_copy(update={"query": mass.query.model_copy(update={"last": last})}),
        budget,
        proxy,
        block.model_copy(update={"select": select, "query": query, "score": score}),
    )
    return language.verify(spec.model_copy(update={"levels": levels, "causal": causal}))


OTHERS = {
    "more rows than a dot has": lambda: other(last=32, group=3),
    "one row, forced on top": lambda: other(
        last=1, force=Force(first=2, counted=False), group=1, least=1
    ),
    "without causality": lambda: other(causal=False, force=Force()),
    "sums of masses": lambda: other(map_how="sum", dims=(96, 64)),
}


@pytest.mark.parametrize(("name", "lane"), always(OTHERS, 1))
def test_other_sizes_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than one, or have no row at all."""
    lengths, keys = [1, 0, 37, 5], [30, 9, 55, 2]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


def test_a_sequence_has_one_set_of_last_rows():
    plan = compile_spec(other(), H100).plan
    kernel = plan.kernel("score_budget")
    start = kernel.config.keywords()
    words = knobs.refused(kernel, {"BLOCK_T": 2}, start | {"BLOCK_T": 2}, plan, H100)
    assert "expected BLOCK_T=1" in words


@pytest.mark.parametrize("select", [Select(top_k=3), Select(top_p=TopP(mass=0.5))], ids=str)
def test_what_last_rows_choose_is_not_attended(select):
    spec = other()
    mass, budget, *_ = spec.levels
    levels = (mass, budget.model_copy(update={"select": select}))
    (branch,) = spec.attend
    changes = {"levels": levels, "attend": (branch.model_copy(update={"over": "budget"}),)}
    spec = language.verify(spec.model_copy(update=changes))
    with pytest.raises(PlanError, match="level budget: no kernel chooses by the last rows for all"):
        backends.compiled(spec, torch.float32)


def test_what_no_kernel_does_is_refused():
    spec = other()
    mass, *rest = spec.levels
    query = mass.query.model_copy(update={"reduce": "max"})
    levels = (mass.model_copy(update={"query": query}), *rest)
    spec = language.verify(spec.model_copy(update={"levels": levels}))
    with pytest.raises(PlanError, match="no kernel reduces the scores of rows together yet"):
        backends.compiled(spec, torch.float32)
