"""Tokens that heads keep by the masses of a sequence's last rows, of other sizes."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.spec import Force

LANES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(*, last=8, width=7, mass=0.6, least=2, rest="rest", force=None, causal=True, **shape):
    """The shipped spec with other numbers."""
    spec = systems.small("token_sparse", causal=causal, **({"group": 2, "kv": 1} | shape))
    changed = []
    for level in spec.levels:
        if level.query:
            query = level.query.model_copy(update={"last": last})
            level = level.model_copy(update={"query": query})
        else:
            select = level.select.model_copy(update={"force": force or level.select.force})
            if select.top_p:
                more = {"mass": mass, "min": least, "of": rest}
                select = select.model_copy(update={"top_p": select.top_p.model_copy(update=more)})
            score = level.score.model_copy(update={"width": width})
            level = level.model_copy(update={"select": select, "score": score})
        changed.append(level)
    return language.verify(spec.model_copy(update={"levels": tuple(changed)}))


OTHERS = {
    "few rows": lambda: other(last=3, width=1, rest=None, dims=(32, 16)),
    "forced on top": lambda: other(
        force=Force(first=3, last=1, counted=False), group=3, dims=(16, 48)
    ),
    "both sides": lambda: other(causal=False, last=40, width=9, dims=(16, 16), force=Force()),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_are_right(name, lane, seed):
    """Documents of more keys than rows, of fewer, or with no row at all; then what a caller brings."""
    lengths, keys = [1, 0, 37, 5, 9], [30, 9, 55, 2, 9]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    generator = torch.Generator().manual_seed(seed)
    shape = (*outcome.selection["token"].shape[:-1], 40)
    picks = torch.randint(-3, 57, shape, generator=generator).clamp(min=-1).to(torch.int32)
    given = {"all": outcome.selection["all"], "token": picks.to(lane)}
    call = call.with_options(selection=given)
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_a_part_of_the_rows_is_as_the_whole_has_it(lane, seed):
    """Of a call with the last rows alone, tokens before them are kept as keys and are no rows."""
    call = calls.make(other(dims=(16, 16)), B=2, T=41, device=lane, seed=seed)
    whole, part = RUN[lane](call), RUN[lane](call.rows(19, 41))
    check(call.rows(19, 41), part)
    assert (whole.selection["token"][:, 19:] == part.selection["token"]).all()
    assert torch.allclose(whole.o[:, 19:].float(), part.o.float(), atol=1e-5)
    dropped = (whole.lse["kept"] == -torch.inf).transpose(1, 2)
    assert dropped.any()
    assert (whole.o[dropped] == 0).all()


def test_what_no_kernel_does_is_refused():
    spec = other()
    select = spec.levels[-1].select
    select = select.model_copy(
        update={"force": Force(last=5)}
    )  # of more than the other level keeps
    levels = (*spec.levels[:-1], spec.levels[-1].model_copy(update={"select": select}))
    spec = language.verify(spec.model_copy(update={"levels": levels}))
    with pytest.raises(
        PlanError, match="level token: no kernel keeps tokens by the masses of last"
    ):
        backends.compiled(spec, torch.float32)
