"""Mixed batches on a server's pages: a small scheduler hands them out, shares and reuses them, and every row
is what prefill says of its sequence alone.
"""

import pytest
import torch

from hsgen.errors import ArgumentError
from hsgen.reference import reference
from hsgen.runtime import load_kernel
from hsgen.serving import PagedLayer, Rows
from hsgen.spec import parse

BLOCKS = """
hsgen: 1
name: blocks
heads: {query: 2, kv: 1}
head_dim: 16
levels:
  - name: block
    partition: {blocks: SIZE}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 2, force: {last: 1}}
attend: [{name: selected, over: block}]
"""
PAGE = 4
NAMES = {"q": 2, "k": 1, "v": 1}


def spec(size):
    return parse(BLOCKS.replace("SIZE", str(size)), "blocks.yaml")


class Server:
    """Pages in an order of their own, K and V of one side by side as vLLM has them."""

    def __init__(self, kernel, page=PAGE, device="cpu", pages=24):
        self.page, self.device = page, device
        pool = torch.full((pages, 1, page, 32), 1e4, device=device)
        k, v = pool.transpose(1, 2).split(16, -1)
        self.layer = PagedLayer(kernel, k, v)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        self.tokens, self.tables = {}, {}

    def step(self, new):
        """Rows of sequences; {name: tensors [T, H, D] of its new tokens} -> {name: o}"""
        for name, x in new.items():
            old = self.tokens.get(name)
            self.tokens[name] = x if old is None else {n: torch.cat([old[n], x[n]]) for n in x}
            table = self.tables.setdefault(name, [])
            while len(table) * self.page < len(self.tokens[name]["k"]):
                table.append(self.free.pop())
        counts = [len(x["k"]) for x in new.values()]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        lengths = [len(self.tokens[name]["k"]) for name in new]
        width = max(len(self.tables[name]) for name in new) + 1
        table = [self.tables[name] + [-1] * (width - len(self.tables[name])) for name in new]
        rows = Rows(
            starts=starts,
            lengths=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            block_table=torch.tensor(table, dtype=torch.int32, device=self.device),
            longest=max(lengths),
        )
        packed = {n: torch.cat([x[n] for x in new.values()]).to(self.device) for n in NAMES}
        o = self.layer.attend(*(packed[n] for n in ("q", "k", "v")), rows)
        return dict(zip(new, o.cpu().split(counts), strict=True))

    def share(self, name, of, pages):
        """A sequence whose first pages are another's."""
        self.tables[name] = self.tables[of][:pages]
        self.tokens[name] = {n: x[: pages * self.page] for n, x in self.tokens[of].items()}

    def end(self, name):
        table = self.tables.pop(name)
        held = {page for other in self.tables.values() for page in other}
        self.free += [page for page in table if page not in held]
        del self.tokens[name]


def drawn(count):
    return {n: torch.randn(count, heads, 16) for n, heads in NAMES.items()}


@pytest.mark.parametrize(
    ("size", "interpret"),
    [
        (2, True),
        *(pytest.param(size, True, marks=pytest.mark.full) for size in (4, 8)),
        (8, False),
    ],
)
def test_rows_of_a_mixed_batch_are_rows_of_prefill(size, interpret):
    """Blocks smaller than a page, a page, several pages.  Chunks of prefill beside steps, steps of several
    rows, a shared prefix, tokens that are taken back, and pages that are used again.
    """
    torch.manual_seed(0)
    own = spec(size)
    checked = 0
    server = Server(load_kernel(own, interpret=interpret))
    for o, expected in steps(own, server, short=interpret and size == 2):
        torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
        checked += len(o)
    assert checked == (24 if interpret and size == 2 else 50)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "page"), [(16, 32), (64, 16)])
def test_mixed_batches_on_a_card(size, page):
    torch.manual_seed(0)
    server = Server(load_kernel(spec(size)), page, "cuda")
    for o, expected in steps(spec(size), server, long=page):
        torch.testing.assert_close(o.double(), expected, rtol=1e-3, atol=1e-3)


def steps(own, server, *, short=False, long=PAGE):
    """What a server says of new rows, and the reference of their sequences alone."""

    def step(**counts):
        new = {name: drawn(count) for name, count in counts.items()}
        for name, o in server.step(new).items():
            x = {n: y[None] for n, y in server.tokens[name].items()}
            yield o, reference(own, x, dtype=torch.float64).o[0, -len(o) :]

    yield from step(a=2 * long + 1)
    yield from step(a=1, b=2 * long + 1)
    server.share("c", "a", 2)
    yield from step(a=1, b=3, c=1)
    if short:
        return  # the rest takes as long again
    server.tokens["a"] = {n: x[:-2] for n, x in server.tokens["a"].items()}  # rejected drafts
    yield from step(a=2, c=9)
    server.end("a")
    yield from step(d=3 * long + 1, b=1, c=1)


def test_pages_that_a_spec_does_not_fit():
    k, v = torch.zeros(2, 3, PAGE, 1, 16)
    with pytest.raises(
        ArgumentError, match=r"entries begin every 16 tokens, got 24|page: expected"
    ):
        PagedLayer(load_kernel(spec(16)), *torch.zeros(2, 3, 24, 1, 16))
    text = BLOCKS.replace("SIZE", "4").replace("pool: {keys: mean}", "pool: {keys: linear}")
    with pytest.raises(
        ArgumentError, match="which a server's models have, got one that needs block_key"
    ):
        PagedLayer(load_kernel(parse(text, "learned.yaml")), k, v)
