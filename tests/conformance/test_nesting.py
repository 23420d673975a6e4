"""Three levels of blocks, each inside the beam of the one above, on the emitted kernels."""

import pytest
import torch

from conformance import backends, cases, laws, probes, systems
from conformance.lab import Lab
from conformance.oracles import check

NAME = "three_levels"
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
LAWS = (
    laws.endless_beam_is_exhaustive,
    laws.everything_selected_is_dense_attention,
    pytest.param(laws.decode_steps_are_rows_of_prefill, marks=pytest.mark.full),  # as of hisa
    pytest.param(laws.packed_documents_are_separate, marks=pytest.mark.full),
)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", cases.FEW, ids=cases.case_id)
def test_outputs_and_selections_are_right(case, lane, seed):
    call = cases.build(NAME, case, device=lane, seed=seed)
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("claim", [*LAWS, *probes.CHECKS[:2]], ids=lambda claim: claim.name)
def test_claim(claim, lane):
    assert claim.applies(systems.small(NAME))
    claim(Lab(run=RUN[lane], again=RUN[lane], name=NAME, dtype=torch.float32, device=lane, group=2))
