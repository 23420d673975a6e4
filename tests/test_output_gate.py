"""An output times the sigmoid of its gate, behind all that branches made."""

import pytest
import torch

from hsgen import load_kernel, samples
from hsgen.reference import reference
from hsgen.spec import parse

HEAD = """
hsgen: 1
name: gated
heads: {query: 4, kv: 2}
head_dim: {qk: 32, v: 48}
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend:
"""
SELECTED = "  - {name: selected, over: block}\n"
WINDOW = "  - {name: near, window: 9}\n"
CASES = {
    "one branch, by channel": SELECTED + "combine: {output_gate: channel}\n",
    "one branch, by head": SELECTED + "combine: {output_gate: head}\n",
    "branches under gates": SELECTED + WINDOW + "combine: {gates: input, output_gate: channel}\n",
}


def made(case, tokens, **lengths):
    spec = parse(HEAD + CASES[case])
    x = samples.make(spec, "random", tokens, "cpu", 0, ())
    return spec, {name: each.float() for name, each in x.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_gate_meets_what_all_branches_made(case, sanitized):
    spec, x = made(case, 45)
    kernel = load_kernel(spec, interpret=True)
    o = kernel(**x)
    exact = reference(spec, {name: each.double() for name, each in x.items()}).o
    assert (o - exact).abs().max() < 1e-5 * exact.abs().max()
    closed = {**x, "output_gate": torch.full_like(x["output_gate"], -200.0)}
    assert not kernel(**closed).any()


def test_documents_keep_their_gates(sanitized):
    spec, x = made("one branch, by channel", 45)
    packed = {name: each[0] for name, each in x.items()}
    cut = torch.tensor([0, 20, 45], dtype=torch.int32)
    o = load_kernel(spec, interpret=True)(**packed, cu_seqlens_q=cut)
    for a, b in ((0, 20), (20, 45)):
        part = {name: each[:, a:b].double() for name, each in x.items()}
        exact = reference(spec, part).o[0]
        assert (o[a:b] - exact).abs().max() < 1e-5 * exact.abs().max()


def test_closed_gates_stop_gradients(sanitized):
    """Where a sigmoid is 0 nothing goes back, to the gate neither; where it is 1 the gate has none."""
    spec, x = made("one branch, by head", 20)
    kernel = load_kernel(spec, interpret=True)
    for value in (-200.0, 200.0):
        gate = torch.full_like(x["output_gate"], value).requires_grad_()
        v = x["v"].clone().requires_grad_()
        kernel(**{**x, "output_gate": gate, "v": v}).sum().backward()
        assert not gate.grad.any()
        assert v.grad.any() == (value > 0)
