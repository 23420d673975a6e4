"""rank: exactly the contract's order, whatever scratch holds where nobody wrote."""

import random

import pytest
import torch
from shares import covering
from skeletons import PROVENANCE, Sequences, complete, forced, kernel

from hsgen import build, emit, resources
from hsgen.kernels import RankContext
from hsgen.plan import Config, Kernel, Plan
from hsgen.target import H100

INF, NAN = float("inf"), float("nan")
POISON = (INF, NAN)  # it would win, or fill an empty slot
SPECIAL = [INF, -INF, NAN, -NAN, 0.0, -0.0, 1e-40, -1e-40, 1.1754944e-38, -1.1754944e-38, 1.0, -1.0]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run; on the CPU under the sanitizer."""
    if request.param == "cpu":
        request.getfixturevalue("sanitized")
    return request.param


def context(**changes):
    fields = dict(
        name="rank_test", heads=1, k=4, width=4, size=4, stride=4, causal=True, first=0, last=0,
        counted=True,
    )  # fmt: skip
    return RankContext(**(fields | changes))


def value(score):
    """A score as the order sees it: NaN below everything, subnormals and -0 are 0."""
    if score != score:
        return (-1, 0.0)
    return (0, 0.0 if abs(score) < 1.1754943508222875e-38 else score)


def expected(c, candidates, must, width):
    """candidates: entry -> score.  Forced first, then the score, then the lower position."""
    extra = 0 if c.counted else len(must)
    order = sorted(
        candidates, key=lambda e: (e not in must, *(-x for x in value(candidates[e])), e)
    )
    best = sorted(order[: c.k + extra])
    return best + [-1] * (width - len(best))


def draw(kind, shape, generator):
    if kind == "real":
        return torch.randn(shape, generator=generator)
    if kind == "alike":
        return torch.ones(shape)
    if kind == "plateau":
        return torch.randint(0, 3, shape, generator=generator).float()
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    if kind == "two":
        return (torch.rand(shape, generator=generator) < 0.03).float()
    if kind == "outlier":
        few = torch.randn(shape, generator=generator) * 1e-30
        few[..., 7::97] = 3e38
        return few
    if kind == "denormals":
        return torch.randn(shape, generator=generator) * 1e-38
    if kind == "least":
        return torch.where(torch.rand(shape, generator=generator) < 0.05, 1.0, -INF)
    if kind == "nan":
        return torch.where(torch.rand(shape, generator=generator) < 0.05, 1.0, NAN)
    if kind == "rising":
        return torch.arange(shape[-1]).float().expand(shape)
    if kind == "period":
        even = torch.randn(shape, generator=generator) * 0.1
        even[..., ::8] += 5
        return even
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator)  # any bits at all
    return bits.to(torch.int32).view(torch.float32)


def check(
    tmp_path, device, seed, c, sequences, kind, *, block_t=4, block_r=4, block_n=16, chunk=None
):
    """Rank every row of every chunk against the oracle, among poison where nobody wrote."""
    rank = kernel("rank", c, tmp_path)
    generator = torch.Generator().manual_seed(seed)
    parents = parent_lists(c, sequences, generator) if c.children else None
    capacity = c.slots or (max(sequences.k_lens) // c.stride + 5) // 4 * 4
    if c.chunked:
        capacity = (max(sequences.k_lens) // c.stride + 33) // 32 * 36
    tiles = len(sequences) if c.alike else sequences.tiles(block_t)
    chunk = chunk or tiles
    scores = draw(kind, (tiles * block_t, c.heads, capacity), generator)
    out = torch.full((sequences.rows, c.heads, c.width), 7, dtype=torch.int32, device=device)
    seen = 0
    for tile_first in range(0, tiles, chunk):
        rows = min(chunk, tiles - tile_first) * block_t
        part = scores[tile_first * block_t :][:rows].clone()
        expect = hide(c, sequences, parents, part, tile_first, block_t)
        kept = torch.full((rows, c.heads, 2, block_n), 9, dtype=torch.int32, device=device)
        rank[(rows // block_r, c.heads)](
            part.to(device), out,
            *((parents.to(device),) if c.children else ()),
            *((kept,) if c.sampled else ()),
            sequences.table.to(device), len(sequences), tile_first, capacity,
            BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_N=block_n,
        )  # fmt: skip
        for (row, h), wanted in expect.items():
            assert out[row, h].tolist() == wanted, (row, h)
        seen += len(expect)
    assert seen == sum(sequences.q_lens) * c.heads


def hide(c, sequences, parents, part, tile_first, block_t):
    """Poison what a score kernel would not have written; what each row should select."""
    expect = {}
    for i in range(len(part)):
        found = sequences.tile(tile_first + i // block_t, block_t)
        t = found[1] + i % block_t if found else 0
        if found is None or t >= sequences.q_lens[found[0]]:
            part[i] = POISON[0]
            continue
        q_start, _, _, q_offset, _, k_len = sequences.table[found[0]].tolist()
        p, row = q_offset + t, q_start + t
        limit = complete(p, k_len, size=c.size, stride=c.stride, causal=c.causal, short=c.short)
        must = forced(p, k_len, stride=c.stride, first=c.first, last=c.last, causal=c.causal)
        for h in range(c.heads):
            if c.children:
                parent = parents[row, h // c.parent_group].tolist()
                entry = [
                    x * c.children + y if x >= 0 else -1 for x in parent for y in range(c.children)
                ]
            else:
                entry = list(range(part.shape[2]))
            candidates = {e: part[i, h, s].item() for s, e in enumerate(entry) if 0 <= e < limit}
            for slot, e in enumerate(entry):
                if not 0 <= e < limit:
                    part[i, h, slot] = POISON[slot % 2]
            inside = [e for e in must if not c.children or e in entry]
            candidates |= dict.fromkeys(inside, 0.0)
            expect[row, h] = expected(c, candidates, inside, c.width)
    return expect


def parent_lists(c, sequences, generator):
    """Ascending parents of each row, -1 at the end."""
    lists = torch.full((sequences.rows, c.parent_heads, c.parent_width), -1, dtype=torch.int32)
    chance = random.Random(int(torch.randint(1 << 30, (), generator=generator)))
    span = c.stride * c.children
    for q_start, _, q_len, q_offset, _, k_len in sequences.table.tolist():
        for t in range(q_len):
            limit = -(-k_len // span)
            if c.causal:
                limit = max(0, min(limit, (q_offset + t) // span + 1))
            for h in range(c.parent_heads):
                some = sorted(
                    chance.sample(range(limit), min(limit, chance.randint(0, c.parent_width)))
                )
                lists[q_start + t, h, : len(some)] = torch.tensor(some, dtype=torch.int32)
    return lists


DENSE = Sequences(q_lens=(5, 5), k_lens=(46, 37))
ONE = Sequences(q_lens=(4,), k_lens=(38,))
PACKED = Sequences(q_lens=(5, 1, 0, 7), k_lens=(33, 64, 3, 7), packed=True)
AHEAD = Sequences(q_lens=(8,), k_lens=(5,))  # rows before the first key
EMPTY = Sequences(q_lens=(3,), k_lens=(0,))
SHIFTED = Sequences(q_lens=(6,), k_lens=(40,), offsets=(3,))


@pytest.mark.parametrize("kind", ["real", "plateau", "special", "bits"])
@pytest.mark.parametrize(("block_n", "block_r"), [(16, 1), (16, 4), (4, 4)])
def test_order(tmp_path, device, seed, kind, block_n, block_r):
    c = context(heads=2 if block_n > 4 else 1)
    check(
        tmp_path,
        device,
        seed,
        c,
        ONE if block_n == 4 else DENSE,
        kind,
        block_n=block_n,
        block_r=block_r,
    )


@pytest.mark.parametrize("sequences", [DENSE, PACKED, AHEAD, EMPTY, SHIFTED])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_forced(tmp_path, device, seed, sequences, causal, counted):
    c = context(
        causal=causal, short=True, first=1, last=2, counted=counted, k=4, width=4 if counted else 7
    )
    check(tmp_path, device, seed, c, sequences, "plateau")


def test_rows_before_the_first_key(tmp_path, device, seed):
    """Position -1 is in no entry, and not in entry 0."""
    c = context(causal=False, short=True, last=1, k=1, width=1)
    check(tmp_path, device, seed, c, AHEAD, "real")


@pytest.mark.parametrize("causal", [True, False])
def test_overlap(tmp_path, device, seed, causal):
    c = context(size=8, stride=4, causal=causal, first=1, last=1)
    check(tmp_path, device, seed, c, ONE, "special", block_n=8)


def test_more_forced_than_candidates(tmp_path, device, seed):
    c = context(first=3, last=3, k=6, width=6)
    check(tmp_path, device, seed, c, Sequences(q_lens=(9,), k_lens=(9,)), "real")


def test_forced_fill_the_budget(tmp_path, device, seed):
    check(tmp_path, device, seed, context(first=1, last=3), ONE, "bits", block_n=8)


def test_one_entry(tmp_path, device, seed):
    check(tmp_path, device, seed, context(k=1, width=1, last=1), PACKED, "real")


def test_all_fit(tmp_path, device, seed):
    check(tmp_path, device, seed, context(k=40, width=40), DENSE, "special", block_n=8)


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_rows(tmp_path, device, seed, chunk):
    check(tmp_path, device, seed, context(last=1), PACKED, "real", chunk=chunk)


@pytest.mark.parametrize("block_n", [8, 16])
@pytest.mark.parametrize("kind", ["plateau", "special"])
@pytest.mark.parametrize(("heads", "parent_heads"), [(2, 1), (2, 2)])
def test_children(tmp_path, device, seed, block_n, kind, heads, parent_heads):
    c = context(
        heads=heads, k=5, width=7, counted=False, first=1, last=1, size=2, stride=2, children=4,
        parent_width=3, parent_heads=parent_heads, parent_group=heads // parent_heads,
    )  # fmt: skip
    sequences = PACKED if block_n == 16 else ONE
    check(tmp_path, device, seed, c, sequences, kind, block_n=block_n)


@pytest.mark.parametrize("causal", [True, False])
def test_children_that_are_tokens(tmp_path, device, seed, causal):
    c = context(
        heads=1,
        k=6,
        width=6,
        size=1,
        stride=1,
        children=3,
        parent_width=4,
        causal=causal,
        short=True,
    )
    check(tmp_path, device, seed, c, DENSE, "real", block_n=16, block_t=1, block_r=1)


@pytest.mark.parametrize("kind", ["real", "alike", "plateau", "special", "bits"])
@pytest.mark.parametrize(("parent_width", "block_n"), [(20, 4096), (16, 4096), (17, 2048)])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 2)])
def test_many_children(tmp_path, device, seed, kind, parent_width, block_n, first, last):
    """As many as fit in registers, fewer, and more."""
    c = context(
        k=300, width=300, size=1, stride=1, first=first, last=last, children=128,
        parent_width=parent_width,
    )  # fmt: skip
    sequences = Sequences(q_lens=(2, 1), k_lens=(3001, 130))
    check(tmp_path, device, seed, c, sequences, kind, block_t=2, block_r=2, block_n=block_n)


@pytest.mark.parametrize("block_n", [4096, 1024])
def test_long_rows(tmp_path, device, seed, block_n):
    sequences = Sequences(q_lens=(2,), k_lens=(4096,))
    c = context(k=2048, width=2048, size=1, stride=1, last=1)
    check(tmp_path, device, seed, c, sequences, "real", block_t=2, block_r=2, block_n=block_n)


@pytest.mark.parametrize("kind", ["real", "plateau", "special", "bits"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_groups(tmp_path, device, seed, kind, causal, first, last):
    """Rows so long beside what they keep that groups of entries are ranked first."""
    c = context(k=3, width=3, causal=causal, short=True, first=first, last=last)
    assert c.group and c.grouped_from == 1024
    sequences = Sequences(q_lens=(3, 2), k_lens=(2404, 4093), offsets=(2390, 1500))
    check(tmp_path, device, seed, c, sequences, kind, block_n=1024)


MANY_KINDS = ["real", "plateau", "special", "bits", "alike", "nan"]


@pytest.mark.parametrize(
    ("kind", "heads", "k", "first", "last", "block_n"),
    covering(MANY_KINDS, [(1, 3, 0, 0), (2, 9, 1, 2)], [1024, 2048]),
)
def test_groups_of_a_step(tmp_path, device, seed, kind, heads, k, first, last, block_n):
    """The greatest of groups by way of memory, over one chunk and several, and the ends of either."""
    c = context(heads=heads, k=k, width=k, short=True, first=first, last=last, alike=True)
    assert c.chunked
    lengths = (4 * block_n, 4 * block_n - 31) if k == 3 else (4097 + block_n, 4096)
    sequences = Sequences(q_lens=(2, 2), k_lens=lengths)
    check(tmp_path, device, seed, c, sequences, kind, block_t=4, block_r=1, block_n=block_n)


@pytest.mark.parametrize(
    ("kind", "first", "last", "fours", "stride"),
    covering(MANY_KINDS, [(0, 1, True), (1, 2, False)], [16, 32]),
)
def test_steps_that_keep_many(tmp_path, device, seed, kind, first, last, fours, stride):
    """Keys are read again to be placed: of every width in registers, in one step and in more, and beyond,
    where keys are few enough to look at all, and where a sample tells about them.
    """
    c = context(
        heads=2, k=80, width=80, size=stride, stride=stride, first=first, last=last, alike=True, fours=fours
    )  # fmt: skip
    assert c.reread
    assert c.sampled == (stride == 16)
    entries = (70, 127, 129, 512, 1021, 2050)
    lengths = tuple(n * stride - 3 * (n % 2) for n in entries)
    sequences = Sequences(q_lens=(2,) * len(lengths), k_lens=lengths)
    # of so many rows that tiles are numbered by sequences in either way
    check(tmp_path, device, seed, c, sequences, kind, block_t=16, block_r=1, block_n=1024)


def test_groups_that_are_alike(tmp_path, device, seed):
    """As many groups as wanted hold the greatest key, and more."""
    c = context(k=3, width=3, causal=False, short=True)
    check(tmp_path, device, seed, c, Sequences(q_lens=(2,), k_lens=(4096,)), "alike", block_n=1024)


@pytest.mark.parametrize("length", [1, 9, 40])
def test_fewer_groups_than_wanted(tmp_path, device, seed, length):
    c = context(k=8, width=8, causal=False, short=True, first=1, last=1)
    check(tmp_path, device, seed, c, Sequences(q_lens=(2,), k_lens=(length,)), "bits", block_n=8192)


KINDS = [
    "real", "alike", "plateau", "special", "bits", "two", "outlier", "denormals", "least", "nan",
    "rising", "period",
]  # fmt: skip
EDGES = (1, 63, 64, 65, 95, 96, 97, 127, 128, 129, 1023, 1024, 1025, 1300)


@pytest.mark.parametrize(("kind", "block_r"), covering(KINDS, [1, 2]))
def test_sampled(tmp_path, device, seed, kind, block_r):
    """Rows that do not fit and keep many: whatever the sample says, the choice is exact."""
    c = context(k=96, width=96, size=1, stride=1, first=1, last=2)
    assert c.sampled
    sequences = Sequences(q_lens=(2, 2), k_lens=(700, 1300))
    check(tmp_path, device, seed, c, sequences, kind, block_t=2, block_r=block_r, block_n=128)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_by_many_warps(tmp_path, device, seed, kind):
    """The same where passes have half of what a program holds at once, and copies are pairs."""
    c = context(heads=2, k=96, width=96, size=1, stride=1, wide=True)
    assert c.sampled
    sequences = Sequences(q_lens=(2, 1), k_lens=(700, 301))
    check(tmp_path, device, seed, c, sequences, kind, block_t=2, block_r=1, block_n=128)


@pytest.mark.parametrize("kind", ["real", "plateau", "special", "bits"])
def test_few_entries(tmp_path, device, seed, kind):
    """Rows of a video's tiles: their keys are read again to be placed, and longer rows in steps."""
    c = context(k=6, width=6, size=1, stride=1, causal=False, short=True, few=True)
    assert c.narrowed
    sequences = Sequences(q_lens=(3, 2), k_lens=(61, 150))
    check(tmp_path, device, seed, c, sequences, kind, block_t=1, block_r=1, block_n=64)


@pytest.mark.parametrize(("kind", "wide"), covering(["real", "alike", "two"], [False, True]))
def test_sampled_around_edges(tmp_path, device, seed, kind, *, wide):
    """Lengths around the widths in registers, the steps, the room and what is kept."""
    c = context(k=96, width=96, size=1, stride=1, wide=wide)
    sequences = Sequences(q_lens=(1,) * len(EDGES), k_lens=EDGES, packed=True)
    check(tmp_path, device, seed, c, sequences, kind, block_t=1, block_r=1, block_n=128)


@pytest.mark.parametrize("kind", ["real", "plateau", "special"])
def test_sampled_without_room(tmp_path, device, seed, kind):
    """So many are wanted that none are copied: the row is read in every pass."""
    c = context(k=100, width=100, size=1, stride=1, last=1)
    sequences = Sequences(q_lens=(2,), k_lens=(500,))
    check(tmp_path, device, seed, c, sequences, kind, block_t=2, block_r=2, block_n=128)


@pytest.mark.parametrize("kind", ["real", "bits"])
def test_sampled_entries_that_are_not_tokens(tmp_path, device, seed, kind):
    c = context(k=70, width=70, size=8, stride=4, first=1, last=1)
    assert c.sampled
    sequences = Sequences(q_lens=(2,), k_lens=(1401,))
    check(tmp_path, device, seed, c, sequences, kind, block_t=2, block_r=2, block_n=128)


@pytest.mark.parametrize(
    ("k", "last", "block_n", "wide"),
    [
        *covering([(96, 2, 128, False), (100, 1, 128, False), (2048, 1, 1024, False)]),
        *covering([(96, 2, 128, True), (2048, 1, 4096, False), (100, 1, 128, True)]),
    ],
)
def test_sampled_compiles_with_room_and_without(tmp_path, monkeypatch, k, last, block_n, *, wide):
    """Triton compiles no branch that it knows not to be taken, which the interpreter does not see."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    c = context(k=k, width=k, size=1, stride=1, last=last, wide=wide)
    assert c.sampled
    constexprs = (("BLOCK_T", 2), ("BLOCK_R", 2), ("BLOCK_N", block_n))
    config = Config(constexprs=constexprs, num_warps=4, num_stages=3)
    rank = Kernel(name=c.name, skeleton="rank", context=c, config=config, operators=())
    plan = Plan(
        name="rank", target=H100.name, dtype="bf16", inputs=(), kernels=(rank,), steps=(),
        scratch_bytes=0, output="", lse={}, selection={},
    )  # fmt: skip
    text = emit.render_kernel(rank, PROVENANCE)
    module = build.build("rank", {f"{c.name}.py": text}, {"test": text})
    (found,) = resources.measure(resources.plan_jobs(plan, module, H100))
    assert isinstance(found, resources.Resources), found
