"""Spans before anchors, of other powers, windows and numbers than the shipped spec has."""

import emitted
import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import schedule
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.plan import Cached
from hsgen.spec import Attend, Combine, Select, Spans, Stripes
from hsgen.target import H100

LANES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(
    *, power=2, first=4, k=3, factor=2.0, root=0.5, window=15, branch=(), select=None, **shape
):
    """The shipped spec with other numbers; `branch`: what its branch has beside."""
    spec = systems.small("superlinear", **({"group": 2, "kv": 1, "dims": (16, 16)} | shape))
    (level,) = spec.levels
    stripes = Stripes(power=power, first=first)
    level = level.model_copy(update={"partition": stripes, "select": select or Select(top_k=k)})
    spans = Spans(factor=factor, power=root, window=window)
    attend = spec.attend[0].model_copy(update={"spans": spans, **dict(branch)})
    return spec.model_copy(update={"levels": (level,), "attend": (attend,)})


OTHERS = {
    # spans that overlap each other and the window, so that a key is in several
    "all of a row": lambda: other(first=1, k=20, factor=1.3, root=0.6, window=4, group=3),
    "nothing near": lambda: other(first=2, k=2, window=0, dims=(32, 48)),
    "cubes": lambda: other(power=3, first=1, k=2, factor=0.7, window=2, group=5),
    "one that is capped": lambda: other(
        first=1, k=1, window=1, group=1, kv=3, branch={"softcap": 2.0, "scale": 0.5}.items()
    ),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_numbers_are_right(name, lane, seed):
    """Documents of more keys than rows, of fewer, or with no row at all; then what a caller brings."""
    lengths, keys = [1, 0, 67, 5, 9], [130, 9, 85, 2, 9]
    spec = language.verify(OTHERS[name]())
    call, _ = calls.pack(
        spec, lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(-2, 12, outcome.selection["anchor"].shape, generator=generator)
    given = {"anchor": picks.clamp(min=-1).to(torch.int32).to(lane)}
    call = call.with_options(selection=given)
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_a_key_counts_once_whatever_has_it(lane):
    """Queries of zeros: the log-sum-exp counts the keys of all spans and of the window."""
    spec = language.verify(other(first=1, k=4, factor=1.5, window=3))
    call = calls.make(spec, T=90, device=lane)
    call = call.with_tensors(q=torch.zeros_like(call.tensors["q"]))
    outcome = RUN[lane](call)
    seen = call.reference(selection=outcome.selection, keep_seen=True).seen["spans"]
    assert torch.allclose(outcome.lse["spans"].exp().transpose(1, 2), seen.sum(-1).float())


REFUSED = {
    "a sink": (
        lambda: other(branch={"sink": "learned"}.items()),
        "branch spans: no kernel attends spans before anchors in such a way yet",
    ),
    "two branches": (
        lambda: other().model_copy(
            update={
                "attend": (*other().attend, Attend(name="near", window=4)),
                "combine": Combine(gates="input"),
            }
        ),
        "branch spans: no kernel attends spans before anchors in such a way yet",
    ),
    "a part of the anchors": (
        lambda: other(select=Select(fraction=0.5)),
        "level anchor: no kernel scores anchors behind each row in such a way yet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_does_is_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(PlanError, match=words):
        backends.compiled(language.verify(make()), torch.float32)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_keys_in_a_cache_are_refused(rows):
    with pytest.raises(PlanError, match="branch spans: no kernel attends spans of keys in a cache"):
        graph = emitted.graph(systems.load("superlinear"))
        schedule.schedule(graph, H100, cached=Cached(rows=rows))
