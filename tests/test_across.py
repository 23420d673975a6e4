"""Scores of all heads as one: a program has the key heads one by one, each with its group's queries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsgen import load_kernel
from hsgen.reference import reference, tensor_shapes
from hsgen.spec import parse

TEXT = """
hsgen: 1
name: across
heads: {{query: {query}, kv: {kv}}}
head_dim: {dim}
levels:
  - name: block
    partition: {{blocks: 8}}
    pool: {{keys: {pool}}}
    score: {{form: {form}, share: all, reduce: {reduce}}}
    select: {{top_k: 3, force: {{last: 1}}}}
attend:
  - {{name: selected, over: block}}
"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("query", "kv", "dim", "pool", "form", "reduce"),
    [
        (4, 2, 16, "mean", "dot", "sum"),
        (6, 2, 16, "mean", "dot", "max"),  # a group's rows are padded, and pads are no maximum
        (3, 3, 96, "minmax", "bound", "mean"),
        (4, 1, 64, "mean", "dot", "max"),
    ],
)
@pytest.mark.usefixtures("sanitized")
def test_heads_choose_together(
    query: int, kv: int, dim: int, pool: str, form: str, reduce: str
) -> None:
    """Of calls, and of steps behind a cache."""
    text = TEXT.format(query=query, kv=kv, dim=dim, pool=pool, form=form, reduce=reduce)
    spec, rows = parse(text), 45
    kernel = load_kernel(spec, interpret=True)
    generator = torch.Generator().manual_seed(query)
    shapes = tensor_shapes(spec, 2, rows, rows)
    x = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    meant = reference(spec, x)
    o, chosen = kernel(**x, return_selection=True)
    assert torch.equal(chosen["block"].indices, meant.selection["block"].indices)
    torch.testing.assert_close(o, meant.o.float(), rtol=1e-4, atol=1e-5)
    cache = kernel.new_cache(2, 64, dtype=torch.float32, device="cpu")
    kernel.extend(**{name: y[:, :43] for name, y in x.items()}, cache=cache)
    new = {name: y[:, 43:] for name, y in x.items()}
    o, chosen = kernel.decode(**new, cache=cache, return_selection=True)
    assert torch.equal(chosen["block"].indices, meant.selection["block"].indices[:, 43:])
    torch.testing.assert_close(o, meant.o[:, 43:].float(), rtol=1e-4, atol=1e-5)
