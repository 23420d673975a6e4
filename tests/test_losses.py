"""Losses of a spec as operators: their values, whom they teach, and what no kernel computes."""

import pytest
import torch

from hsgen import load_kernel, operators
from hsgen.errors import ArgumentError, PlanError
from hsgen.reference import tensor_shapes
from hsgen.spec import load, parse

INDEXED = """
hsgen: 1
name: indexed
heads: {{query: 4, kv: 2}}
head_dim: 16
index: {{heads: 2, dim: 16, keys: shared}}
levels:
  - name: token
    partition: tokens
    score: {{form: index_dot, share: group}}
  - name: block
    partition: {{blocks: 4}}
    score: {{from: token, map: max}}
    select: {{top_k: 2, force: {{last: 1}}}}
attend:
  - {{name: selected, over: block}}
loss: {{kl: {{level: block, over: {over}}}}}
"""
GATE = {"q_gate", "k_gate", "block_key_weight", "block_key_norm", "cos_block", "sin_block"}
ALL, SELECTED = (parse(INDEXED.format(over=over)) for over in ("all", "selected"))


def few(name):
    """A shipped spec, of few heads."""
    spec = load(name)
    heads = spec.heads.model_copy(update={"query": 2 * spec.heads.group, "kv": 2})
    return spec.model_copy(update={"heads": heads})


def small(name):
    """And of short ones; other sizes are left alone."""
    spec = few(name)
    dims = spec.head_dim.model_copy(update={"qk": 16, "v": 16})
    return spec.model_copy(update={"head_dim": dims})


def leaves(spec, B=1, T=19, dtype=torch.float32):
    shapes = tensor_shapes(spec, B, T, T)
    return {n: torch.randn(s, dtype=dtype, requires_grad=True) for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("spec", "T", "taught"),
    [
        (ALL, 19, {"q_index", "k_index"}),
        (SELECTED, 19, {"q_index", "k_index"}),
        (few("seer_attention_r"), 130, GATE),
        (small("hirouter"), 19, {"q", "k", "branch_centroids", "leaf_centroids"}),
        (small("ssa"), 19, {"q", "k", "v", "gates"}),
    ],
    ids=["kl", "kl of the selected", "gate", "dual entropy", "two-way distillation"],
)
def test_losses_teach_whom_they_should(spec, T, taught):
    """With the gradients of the reference in float64."""
    kernel, x = load_kernel(spec), leaves(spec, T=T, dtype=torch.float64)
    (name, exact), *_ = kernel.reference_losses(**x).items()
    expected = torch.autograd.grad(
        exact, list(x.values()), materialize_grads=True, allow_unused=True
    )
    found = kernel.losses(**x)
    assert list(found) == [name]
    torch.testing.assert_close(found[name].double(), exact)
    (2 * found[name]).backward()
    for (which, each), grad in zip(x.items(), expected, strict=True):
        assert each.grad.any() == (which in taught), which
        torch.testing.assert_close(each.grad, 2 * grad)


def test_losses_are_operators():
    kernel, x = load_kernel(SELECTED), leaves(SELECTED)
    call = kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)
    torch.library.opcheck(operators.losses, (kernel._key, *call))
    torch._dynamo.reset()

    def train(**y):
        return kernel(**y).square().mean() + 0.1 * kernel.losses(**y)["kl"]

    expected = torch.autograd.grad(train(**x), list(x.values()))
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(**x), list(x.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_learns_what_a_callers_selection_says():
    kernel, x = load_kernel(SELECTED), leaves(SELECTED)
    chosen = kernel.select(**x)
    assert torch.equal(kernel.losses(**x, selection=chosen)["kl"], kernel.losses(**x)["kl"])
    first = {"block": torch.zeros(1, 19, 2, 1, dtype=torch.int32)}  # of one entry, all is known
    assert kernel.losses(**x, selection=first)["kl"] == 0


@pytest.mark.usefixtures("sanitized")
def test_kernels_refuse_a_loss_by_name_and_attend_all_the_same():
    kernel, x = load_kernel(ALL, interpret=True), leaves(ALL)
    words = r"indexed: no kernel computes the loss kl yet\n(.*\n)*.*reference_losses"
    with pytest.raises(PlanError, match=words):
        kernel.losses(**x)
    with torch.no_grad():
        o = kernel(**x)
        torch.testing.assert_close(o.double(), kernel.reference(**x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="spec 'moba' has no loss"):
        load_kernel("moba").losses(x["q"], x["k"], x["v"])
