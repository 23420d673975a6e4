"""Caches, and rows behind them: as rows of prefill, on kernels in the interpreter and by the reference."""

import re

import emitted
import pytest
import torch
from conformance import systems

from hsgen import alike, schedule, splits
from hsgen.cache import Cache
from hsgen.errors import ArgumentError, HsgenError, PlanError
from hsgen.gates import Gate, GateError
from hsgen.plan import Cached
from hsgen.reference import reference, tensor_shapes
from hsgen.runtime import load_kernel
from hsgen.spec import parse
from hsgen.target import H100

NAMES = ("nsa", "moba", "quest", "infllm_v2")
SHARED = """
hsgen: 1
name: shared_keys
heads: {query: 2, kv: 1}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend:
  - {name: selected, over: block}
"""


@pytest.fixture
def shares(monkeypatch):
    """As many shares of a row's keys as lengths of a test allow."""
    monkeypatch.setattr(splits, "SHARE_KEYS", 4)
    monkeypatch.setattr(splits, "MOST", 2)


def made(spec, B, T, **options):
    """Tensors of whole sequences, and which of them have a row a token."""
    shapes = tensor_shapes(spec, B, T, T)
    x = {name: torch.randn(shape, **options) for name, shape in shapes.items()}
    return x, {name for name, shape in shapes.items() if shape[:2] == (B, T)}


def cut(x, rows, begin, end):
    """q, k and v of some tokens, and everything else of theirs."""
    some = {name: y[:, begin:end] if name in rows else y for name, y in x.items()}
    return (some.pop("q"), some.pop("k"), some.pop("v", None)), some


def append(attn, cache, x, rows, begin, end):
    """Tokens that nothing attends with."""
    (_, k, v), others = cut(x, rows, begin, end)
    kept = {stream.name for stream in cache.storage.streams} | attn._decoding._pooling
    cache.append(k, v, **{name: y for name, y in others.items() if name in kept})


# --- the law: step t is row t of prefill


FULL = (
    "fsa",
    "moba",
    "infllm_v2",
    "hisa",
    "dsa_gqa",
    "minimax_m3",
    "deepseek_csa",
    "deepseek_hca",
    "glm_kpool",
    "qwen_qsa",
    "seer_attention_r",
)
PAGED = (
    *("nsa", "moba", "hisa", "minimax_m3", "deepseek_hca", "glm_kpool", "qwen_qsa"),
    "deepseek_csa",
    "seer_attention_r",
)


@pytest.mark.parametrize(
    "name",
    ["nsa", "nsa_fla", "quest", *(pytest.param(name, marks=pytest.mark.full) for name in FULL)],
)
def test_steps_are_rows_of_prefill(name, shares):
    """Choices are the same sets, outputs of either are those of the reference; pages change nothing."""
    kv = 2 if name == "minimax_m3" else 1  # whose index has one all the same
    group = 3 if name == "fsa" else 2
    spec = systems.small(name, group=group, kv=kv, dims=(32, 16))
    B, T = 2, 18
    x, rows = made(spec, B, T)
    if name in (
        "nsa",
        "nsa_fla",
        "fsa",
    ):  # 512 weights a channel: of a size as if they were learned
        x = {n: y * 0.05 if n.endswith("weight") else y for n, y in x.items()}
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(B, 24, page=8 if name in PAGED else None)
    append(attn, cache, x, rows, 0, 13)
    calls = [(attn.decode, 13, 14), (attn.decode, 14, 16)]
    if name == "quest":
        calls.append((attn.extend, 16, T))
    found = []
    for call, begin, end in calls:
        qkv, others = cut(x, rows, begin, end)
        found.append(call(*qkv, cache, return_lse=True, return_selection=True, **others))
    assert cache.lengths.tolist() == [end, end]
    expected, seen = reference(spec, x, dtype=torch.float64), slice(13, end)
    for level, chosen in expected.selection.items():
        ours = torch.cat([call[-1][level].indices for call in found], 1)
        assert torch.equal(ours, chosen.indices[:, seen]), level
    o = torch.cat([call[0] for call in found], 1)
    torch.testing.assert_close(o.double(), expected.o[:, seen], rtol=1e-4, atol=1e-5)
    for branch, lse in expected.lse.items():
        ours = [call[1] if torch.is_tensor(call[1]) else call[1][branch] for call in found]
        torch.testing.assert_close(
            torch.cat(ours, 2).double(), lse[..., seen], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["nsa", "nsa_fla", pytest.param("fsa", marks=pytest.mark.full)])
def test_steps_choose_by_what_an_attend_leaves(name, shares):
    """As the reference chooses, some of many: of entries mapped and not, groups padded, over two shares."""
    spec = systems.small(name, group=3 if name == "fsa" else 2, kv=2, dims=(16, 16))
    spec = systems.with_budgets(spec, lambda _: 6)
    B, T = 2, 131
    x, rows = made(spec, B, T)
    x = {n: y * 0.05 if n.endswith("weight") else y for n, y in x.items()}
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(B, T + 1)
    append(attn, cache, x, rows, 0, T - 4)
    found = []
    for begin, end in ((T - 4, T - 3), (T - 3, T)):
        qkv, others = cut(x, rows, begin, end)
        found.append(attn.decode(*qkv, cache, return_selection=True, **others)[1])
    (program,) = {ready.program for key, ready in attn._decoding.ready.items() if "few" in key}
    assert "score_block" not in {kernel.name for kernel in program.plan.kernels}
    expected = reference(spec, x, dtype=torch.float64)
    for level, chosen in expected.selection.items():
        ours = torch.cat([each[level].indices for each in found], 1)
        assert torch.equal(ours, chosen.indices[:, T - 4 :]), level


def shared():
    return parse(SHARED)


def whole(spec, x, length):
    """What the reference says of the first so many tokens."""
    some = {name: y[:, :length] for name, y in x.items()}
    return reference(spec, some, dtype=torch.float64).o


@pytest.mark.parametrize("interpret", [True, False], ids=["kernels", "reference"])
def test_lengths_differ_and_tokens_are_taken_back(interpret, shares):
    """Sequences get as many tokens as `new_lens` says; what is cut off is as if it had never been."""
    spec = shared()
    x, rows = made(spec, 2, 12)
    wrong, _ = made(spec, 2, 12)
    attn = load_kernel(spec, interpret=interpret)
    cache = attn.new_cache(2, 12)
    append(attn, cache, {n: torch.cat([x[n][:, :5], wrong[n][:, :4]], 1) for n in x}, rows, 0, 9)
    cache.truncate(torch.tensor([5, 4], dtype=torch.int32))
    assert cache.lengths.tolist() == [5, 4]
    late = {n: torch.stack([y[0, 5:7], y[1, 4:6]]) for n, y in x.items()}
    (q, k, v), _ = cut(late, rows, 0, 2)
    new_lens = torch.tensor([2, 1], dtype=torch.int32)
    how = {"return_lse": True, "return_selection": True}
    o, lse, chosen = attn.decode(q, k, v, cache, new_lens=new_lens, **how)
    assert cache.lengths.tolist() == [7, 5]
    expected = whole(spec, x, 7)
    torch.testing.assert_close(o[0].double(), expected[0, 5:7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(o[1, :1].double(), expected[1, 4:5], rtol=1e-4, atol=1e-5)
    assert (o[1, 1] == 0).all()
    assert (lse[1, :, 1] == float("-inf")).all()
    assert (chosen["block"].indices[1, 1] == -1).all()  # no kernel writes it
    assert (chosen["block"].indices[1, 0] >= 0).any()
    forked = cache.fork(torch.tensor([1, 1, 0]))
    assert forked.lengths.tolist() == [5, 5, 7]
    again = {n: y[[[1], [1], [0]], [[5], [5], [7]]] for n, y in x.items()}
    (q, k, v), _ = cut(again, rows, 0, 1)
    o = attn.decode(q, k, v, forked, layout="bthd")
    expected = whole(spec, x, 8)
    torch.testing.assert_close(o[1, 0].double(), expected[1, 5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(o[2, 0].double(), expected[0, 7], rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [7, 5]


def test_a_full_cache_says_so_and_nothing_is_written_beyond_it(shares):
    spec = shared()
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(1, 6)
    x, rows = made(spec, 1, 8)
    append(attn, cache, x, rows, 0, 5)
    (q, k, v), _ = cut(x, rows, 5, 7)
    with pytest.raises(ArgumentError, match="no room for 2 more tokens, as a sequence has 5 of 6"):
        attn.decode(q, k, v, cache)
    cache._most = -10  # as after a graph has been replayed, which the host does not count
    o = attn.decode(q, k, v, cache)
    assert cache.lengths.tolist() == [6]
    assert o.isfinite().all()


def test_a_caller_s_pages_are_shared_by_forks(shares, sanitized):
    """Keys and values of a page side by side, as some servers keep them, and pages in any order."""
    spec = shared()
    x, rows = made(spec, 1, 13)
    attn = load_kernel(spec, interpret=True)
    pool = torch.full((9, 2, 4, 1, 16), float("nan"))
    table = torch.tensor([[7, 2, 5, -1]], dtype=torch.int32)
    pages = {"k": pool[:, 0], "v": pool[:, 1]}
    cache = attn.new_cache(1, 16, page=4, pages=pages, block_table=table)
    (q, k, v), _ = cut(x, rows, 0, 9)
    o = attn.extend(q, k, v, cache)
    torch.testing.assert_close(o.double(), whole(spec, x, 9), rtol=1e-4, atol=1e-5)
    assert pool[[0, 1, 3, 4, 6, 8]].isnan().all()
    assert torch.equal(pool[2, 0], x["k"][0, 4:8])
    pool[8, :, 0] = pool[5, :, 0]  # the page that both would write to, as far as it is full
    own = torch.tensor([[7, 2, 5, 0], [7, 2, 8, 1]], dtype=torch.int32)
    forked = cache.fork(torch.tensor([0, 0]), own)
    mine = {n: torch.cat([y[:, 9:13], y[:, 3:7]]) for n, y in x.items()}
    (q, k, v), _ = cut(mine, rows, 0, 4)
    o = attn.decode(q, k, v, forked)
    torch.testing.assert_close(o[0].double(), whole(spec, x, 13)[0, 9:], rtol=1e-4, atol=1e-5)
    other = {n: torch.cat([y[:, :9], y[:, 3:7]], 1) for n, y in x.items()}
    torch.testing.assert_close(o[1].double(), whole(spec, other, 13)[0, 9:], rtol=1e-4, atol=1e-5)


def test_a_page_that_is_none_is_an_error_or_not_written_to(shares, sanitized):
    x, rows = made(shared(), 1, 6)
    (q, k, v), _ = cut(x, rows, 0, 6)
    pages = {"k": torch.zeros(3, 4, 1, 16), "v": torch.zeros(3, 4, 1, 16)}
    table = torch.tensor([[1, 3]], dtype=torch.int32)
    kept = {"page": 4, "pages": pages, "block_table": table}
    cache = load_kernel(shared(), interpret=True).new_cache(1, 8, **kept)
    cache.append(k, v)
    assert torch.equal(pages["k"][1], k[0, :4])
    assert (pages["k"][[0, 2]] == 0).all()
    attn = load_kernel(shared(), check=True)
    cache = attn.new_cache(1, 8, **kept)
    cache.append(k[:, :4], v[:, :4])
    with pytest.raises(ArgumentError, match=r"block_table\[0, 1\]: expected one of 3 pages, got 3"):
        attn.decode(q[:, 4:], k[:, 4:], v[:, 4:], cache)


def test_layouts_and_a_caller_s_choice(shares):
    spec = shared()
    x, rows = made(spec, 1, 9)
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(1, 9)
    append(attn, cache, x, rows, 0, 8)
    (q, k, v), _ = cut(x, rows, 8, 9)
    given = {"block": torch.tensor([[[[1, -1, 0]]]], dtype=torch.int32)}
    turned = [y.transpose(1, 2) for y in (q, k, v)]
    o = attn.decode(*turned, cache, layout="bhtd", selection=given)
    expected = attn.reference(q, x["k"], x["v"], selection=given, q_offset=8, dtype=torch.float64)
    torch.testing.assert_close(o.transpose(1, 2).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_whose_tensors_changed_is_noticed(shares):
    """Given others, or laid out anew in place: kernels get the strides that are there."""
    spec = shared()
    x, rows = made(spec, 2, 12)
    attn = load_kernel(spec, interpret=True)
    cache = attn.new_cache(2, 12)
    append(attn, cache, x, rows, 0, 8)

    def padded(y):
        wide = torch.full((*y.shape[:-1], y.shape[-1] + 16), float("nan"))
        wide[..., : y.shape[-1]] = y
        return wide[..., : y.shape[-1]]

    before = len(attn._decoding._known)  # of other tests: a kernel is loaded once
    for t in range(8, 12):
        (q, k, v), _ = cut(x, rows, t, t + 1)
        if t == 10:
            cache.tensors["k"] = padded(cache.tensors["k"])
        if t == 11:
            cache.tensors["v"].data = padded(cache.tensors["v"])
        o = attn.decode(q, k, v, cache)
        expected = whole(spec, x, t + 1)[:, t:]
        torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
    assert len(attn._decoding._known) == before + 3


# --- configurations


def test_steps_in_another_mode_are_told_apart_once():
    """PyTorch compares what its modes see of a tensor: the first step in one is looked up, not the next."""
    spec = systems.small("moba", group=2, kv=1, dims=(16, 16))
    attn = load_kernel(spec)
    cache = attn.new_cache(2, 16)
    seen = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                x, _ = made(spec, 2, 1)
                attn.decode(**x, cache=cache)
                seen.append(attn._decoding._last.like)
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[1] is not seen[2]


def test_a_caller_s_configuration_reaches_steps(shares):
    """By the plain name, and by that of steps alone instead where it is there; explaining says it."""
    spec = shared()
    x, rows = made(spec, 1, 9)
    plain = {"attend_selected": {"num_warps": 2}, "score_block": {"num_warps": 1}}
    config = {**plain, "step.attend_selected": {"num_stages": 2}, "store": {"num_warps": 8}}
    attn = load_kernel(spec, interpret=True, config=config)
    cache = attn.new_cache(1, 9)
    append(attn, cache, x, rows, 0, 7)
    (q, k, v), _ = cut(x, rows, 7, 8)
    o = attn.decode(q, k, v, cache)
    torch.testing.assert_close(o.double(), whole(spec, x, 8)[:, 7:], rtol=1e-4, atol=1e-5)
    (q, k, v), _ = cut(x, rows, 8, 9)
    attn.extend(q, k, v, cache)
    few, many = (
        next(ready.config for key, ready in attn._decoding.ready.items() if key[3:5] == said)
        for said in (("few", 1), ("many", 0))
    )
    start = load_kernel(spec, interpret=True)
    start.new_cache(1, 9)
    warps = start._decoding.programs[torch.float32, q.device, 0, "few"].config["attend_selected"]
    assert few["attend_selected"] == {**warps, "BLOCK_T": 1, "BLOCK_M": 16, "num_stages": 2}
    assert many["attend_selected"]["num_warps"] == 2
    assert (few["score_block"]["num_warps"], many["score_block"]["num_warps"]) == (1, 1)
    assert (few["store"]["num_warps"], many["store"]["num_warps"]) == (8, 8)
    told = attn.explain()
    assert "steps of up to 1 tokens, 1 x 9\n" in told
    of_steps, of_chunks = told.split("\nchunks of prefill\n")
    line = next(x for x in of_steps.splitlines() if x.startswith("  step.attend_selected: "))
    assert line.endswith("num_stages=2  (caller)")
    assert "  step.rank_block: " in of_steps
    assert "  attend_selected: " in of_chunks
    assert of_chunks.count("(caller)") == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"atend": {}}, r"config: expected one of store, .*step\.store, .*, got 'atend'"),
        ({"step.atend": {}}, r"config: expected one of .*, got 'step\.atend'"),
        ({"step.index_selected": {}}, r"config: expected one of .*, got 'step\.index_selected'"),
        ({"rank_block": {"BLOCK_X": 2}}, "config: rank_block: expected some of .*, got 'BLOCK_X'"),
        (
            {"attend_selected": {"BLOCK_T": 64}},
            "config: attend_selected: expected BLOCK_T=1 in a step, got 64",
        ),
        (
            {"step.merge_attend_selected": {"BLOCK_P": 2}},
            r"config: step\.merge_attend_selected: expected BLOCK_P=64 in a step, got 2",
        ),
    ],
)
def test_configurations_of_steps_are_refused_by_name(config, words):
    attn = load_kernel(shared(), interpret=True, config=config)
    x, rows = made(shared(), 1, 1)
    with pytest.raises(ArgumentError, match=words) as told:
        attn.decode(*cut(x, rows, 0, 1)[0], attn.new_cache(1, 9))
    if "attend_selected" in config:
        assert "'step.attend_selected' beside it is of steps alone" in str(told.value)


def test_names_of_steps_and_gradients_are_known_to_every_call():
    """A configuration is of all calls of a kernel, whichever comes first."""
    config = {"step.store": {}, "merge_attend_selected": {}, "index_selected": {}, "advance": {}}
    for gradient in ({}, {"dq_selected": {}}):
        attn = load_kernel(shared(), interpret=True, config={**config, **gradient})
        x, rows = made(shared(), 1, 9)
        attn(**x)
        (q, k, v), _ = cut(x, rows, 0, 1)
        attn.decode(q, k, v, attn.new_cache(1, 9))


# --- what is refused


def test_caches_say_what_they_cannot_keep():
    for name, words in (
        ("dhsa_released", "no cache, as causality is prompt"),
        ("dsa", "no cache keeps keys rounded to fp8 yet"),
    ):
        with pytest.raises(PlanError, match=words):
            load_kernel(name).new_cache(1, 64)
    with pytest.raises(GateError, match="a kernel with a gate has no cache"):
        load_kernel("moba", gate=Gate(dense_below=8)).new_cache(1, 64)
    with pytest.raises(PlanError, match="Hq is not known"):
        load_kernel(parse(SHARED.replace("heads: {query: 2, kv: 1}\n", ""))).new_cache(1, 64)


def test_wrong_calls_are_answered_by_name():
    spec = shared()
    attn = load_kernel(spec)
    cache = attn.new_cache(2, 16)
    x, rows = made(spec, 2, 9)
    (q, k, v), _ = cut(x, rows, 0, 1)
    other = load_kernel(parse(SHARED.replace("top_k: 3", "top_k: 2")))
    few, wide = torch.ones(1, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32)[:, 0]
    pool, uneven = torch.zeros(3, 8, 1, 16), torch.zeros(3, 9, 1, 16)[:, :8]
    table = torch.zeros(1, 2, dtype=torch.int32)

    def paged(pages, table=table):
        return attn.new_cache(1, 16, page=8, pages=pages, block_table=table)

    for call, words in (
        (
            lambda: other.decode(q, k, v, cache),
            "cache: expected one of spec 'shared_keys', got one",
        ),
        (lambda: attn.decode(q, k, v, x), "cache: expected what new_cache made, got dict"),
        (lambda: attn.decode(q[:1], k[:1], v[:1], cache), r"k: expected \[2, 1, 1, 16\] fp32 cpu"),
        (lambda: attn.decode(q.half(), k.half(), v.half(), cache), "as the cache has, got .* fp16"),
        (lambda: attn.decode(x["q"], x["k"], x["v"], cache), "at most 8 new tokens of a sequence"),
        (lambda: attn.decode(q, x["k"], x["v"], cache), "k: expected the 1 new tokens that q has"),
        (lambda: attn.decode(q, k, v, cache, new_lens=few), r"new_lens: expected \[2\] int32 cpu"),
        (lambda: attn.decode(q, k, v, cache, new_lens=[1, 1]), "new_lens: expected a tensor"),
        (lambda: attn.decode(q, k, v, cache, new_lens=wide), "new_lens: expected stride 1, got 2"),
        (lambda: attn.decode(q, k, None, cache), "v: expected a tensor"),
        (lambda: cache.append(k), "v: expected a tensor, got NoneType"),
        (lambda: cache.append(k, v, gates=q), "gates: no cache of spec 'shared_keys' keeps such"),
        (lambda: cache.truncate(-1), "lengths: expected an int of at least 0"),
        (lambda: attn.new_cache(0, 16), "batch: expected an int of at least 1, got 0"),
        (
            lambda: attn.new_cache(1, 16, page=12),
            "page: expected a power of two up to 1024, got 12",
        ),
        (lambda: attn.new_cache(1, 16, pages={"k": k}), "pages: expected `page` and `block_table`"),
        (lambda: paged({"k": pool}), "pages: expected those of k, v, got k"),
        (lambda: paged({"k": pool, "v": pool[..., :8]}), r"pages\['v'\]: expected \[3, 8, 1, 16\]"),
        (lambda: paged({"k": pool, "v": uneven}), r"pages\['v'\]: .* as many rows from one page"),
        (lambda: paged({"k": pool, "v": pool}, table.long()), r"block_table: expected \[1, 2\]"),
        (lambda: paged({"k": pool, "v": pool}).fork(few.long() * 0), "block_table: expected where"),
        (lambda: attn.new_cache(1, 16, torch.int8), "dtype: expected one of fp16, bf16, fp32"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
    with pytest.raises(HsgenError, match="calls with a cache have no derivative"):
        attn.decode(q.requires_grad_(), k, v, cache)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("first", ["plain", "wanted"])
@pytest.mark.parametrize("public", [False, True], ids=["as PyTorch compares", "by parts"])
def test_a_step_that_requires_grad_is_told_from_one_that_does_not(public, first, monkeypatch):
    """Whichever was first; each case has a kernel of its own, which remembers no step of another."""
    if public:
        monkeypatch.setattr(alike, "_guards", lambda: None)
    spec = parse(SHARED.replace("shared_keys", f"grad_{first}_{public}".lower()))
    attn = load_kernel(spec)
    cache = attn.new_cache(2, 16)
    x, rows = made(spec, 2, 9)
    (plain, k, v), _ = cut(x, rows, 0, 1)
    plain = plain.clone()
    wanted = plain.clone().requires_grad_()  # which lies alike
    with torch.no_grad():
        for _ in range(2):  # the first one of a cache also makes room
            attn.decode(wanted if first == "wanted" else plain, k, v, cache)
    attn.decode(plain, k, v, cache)
    with pytest.raises(HsgenError, match="calls with a cache have no derivative"):
        attn.decode(wanted, k, v, cache)
    with torch.no_grad():
        attn.decode(wanted, k, v, cache)
    attn.decode(plain, k, v, cache)
    assert cache.lengths.tolist() == [5, 5]


def test_a_cache_says_what_a_token_takes():
    cache = load_kernel(systems.small("quest", group=2, kv=1, dims=(32, 16))).new_cache(1, 64)
    assert isinstance(cache, Cache)
    assert cache.bytes_per_token == {"k": 128, "v": 64}  # of the reference, which pools again
    kernels = load_kernel(systems.small("quest", group=2, kv=1, dims=(32, 16)), interpret=True)
    cache = kernels.new_cache(1, 64, torch.float16)
    assert cache.bytes_per_token == {"k": 64, "v": 32, "page.keys": 16}
    assert "1 sequences of 64 tokens, fp16" in repr(cache)
    assert "steps behind a cache, fp16, cpu\nplan quest for sm_90, fp16" in kernels.explain()


def test_pages_of_a_cache_have_as_many_rows_in_every_tensor():
    """An index has no heads, and is found by the rows of keys."""
    cache = load_kernel(systems.small("hisa", group=2, kv=2)).new_cache(2, 20, page=8)
    kept = [cache.tensors[stream.name] for stream in cache.storage.streams]
    assert {x.ndim for x in kept} == {3, 4}
    assert {(x.shape[0], x.stride(0) // x.stride(1)) for x in kept} == {(6, 8)}


# --- plans and text


@pytest.mark.parametrize("name", NAMES)
def test_plans_and_sources_are_golden(name, golden):
    plan = schedule.schedule(
        emitted.graph(systems.load(name)), H100, "bf16", None, Cached(rows="few")
    )
    golden(f"decode/{name}/plan.txt", str(plan))
    if name == "nsa":
        for file, text in emitted.sources(plan).items():
            golden(f"decode/{name}/{file}", text)


def test_sizes_of_a_step_keep_what_they_were_set_to():
    """A driver's sizes are plain variables: a name is one expression, where heads of a token are cut too."""
    cut_heads = 0
    for name in (*NAMES, "glm_kpool", "deepseek_hca"):
        plan = schedule.schedule(
            emitted.graph(systems.load(name)), H100, "bf16", None, Cached(rows="few")
        )
        sizes = [size for step in (*plan.appends, *plan.steps) for size in step.sizes]
        assert len({variable for variable, _ in sizes}) == len(set(sizes)), name
        cut_heads += any(variable.startswith("heads_attend_") for variable, _ in sizes)
    assert cut_heads


def test_programs_of_a_step_are_a_few_times_the_processors():
    """Parts of a row fill the card where rows are few, and a row of many rows is in one piece."""

    def found(there, keys):
        values = {"rows": there, "SHARE_KEYS": splits.SHARE_KEYS, "LONG_SHARE": splits.LONG_SHARE}
        for variable, text in splits.shares("x", sms=132, rows_of="rows", heads=4, keys=str(keys)):
            values[variable] = eval(text, {"min": min, "max": max}, values)
        return values["splits_x"]

    assert [found(1, keys) for keys in (64, 512, 8192, 1 << 20)] == [1, 4, 64, 64]
    assert [found(rows, 1024) for rows in (16, 24, 40, 64, 512)] == [4, 3, 2, 1, 1]
    assert found(64, 65536) == 8  # turns enough that none waits long for the last
    assert all(1.3 * 132 <= 4 * rows * found(rows, 8192) for rows in range(1, 200))


def test_chunks_of_prefill_have_the_kernels_of_prefill():
    """But for pools: what a cache keeps is not pooled again."""
    spec = systems.load("infllm_v2")
    chunks = schedule.schedule(emitted.graph(spec), H100, "bf16", None, Cached(rows="many"))
    theirs, ours = emitted.sources(chunks), emitted.sources(emitted.shipped_plan("infllm_v2"))
    new = {"driver.py", "advance.py", "store.py", "pool_coarse_keys.py", "pool_compressed_keys.py"}
    assert {name for name in theirs if theirs[name] != ours.get(name)} == new


@pytest.mark.parametrize("name", ["seer_attention_r", "hisa"])
def test_what_few_heads_store_has_names_of_its_own(name):
    """A name keeps its shape in a branch, and streams have rows of any width: compilers refuse others."""
    chunks = schedule.schedule(
        emitted.graph(systems.load(name)), H100, "bf16", None, Cached(rows="many")
    )
    every, *few = emitted.sources(chunks)["store.py"].split("    if head < ")
    assert few
    loaded = [re.findall(r"(\w+) = load_tile_masked", text) for text in (every, *few)]
    names = [made for some in loaded[1:] for made in some]
    assert len(names) == len(set(names)) >= len(few)
    assert not set(names) & set(loaded[0])


# --- on a card, at real head dims


ALIKE = 0.97  # of rows; near scores are told apart otherwise by other tiles


def on_card(name, B, T):
    spec = systems.load(name)
    x, rows = made(spec, B, T, device="cuda", dtype=torch.bfloat16)
    return spec, {n: y * 0.02 if n.endswith("weight") else y for n, y in x.items()}, rows


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 64], ids=["whole", "pages"])
@pytest.mark.parametrize("name", [*NAMES, "hisa"])
def test_steps_are_rows_of_prefill_on_a_card(name, page):
    """L2: steps choose what prefill does; L4: outputs are the reference's, of what was chosen."""
    B, T = 3, 2100
    spec, x, rows = on_card(name, B, T)
    attn = load_kernel(spec)
    cache = attn.new_cache(B, 2304, page=page)
    first = cut(x, rows, 0, T - 13)
    attn.extend(*first[0], cache, **first[1])
    end = T - 13
    for tokens in (1, 1, 3, 8):
        begin, end = end, end + tokens
        qkv, others = cut(x, rows, begin, end)
        o, chosen = attn.decode(*qkv, cache, return_selection=True, **others)
        whole = {n: y[:, :end] if n in rows and n[0] in "kv" else y for n, y in x.items()}
        whole |= {n: y for n, y in cut(x, rows, begin, end)[1].items() if n[0] not in "kv"}
        q, k, v = qkv[0], whole.pop("k"), whole.pop("v")
        whole.pop("q", None)
        theirs = attn.select(q, k, v, **whole)
        for level, mine in chosen.items():
            same = (mine.indices == theirs[level].indices).all(-1).float().mean().item()
            assert same >= ALIKE, (level, tokens, same)
        expected = attn.reference(q, k, v, selection=chosen, dtype=torch.float32, **whole)
        error = (o.float() - expected).norm() / expected.norm()
        assert error < 1e-2, (tokens, error)
    assert cache.lengths.tolist() == [T] * B


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nsa", "quest"])
def test_a_captured_step_is_replayed_as_lengths_grow(name):
    """The same bits as steps without a graph, over ends of pages and of compressed entries."""
    B, T = 2, 600
    spec, x, rows = on_card(name, B, T + 40)
    attn = load_kernel(spec)
    caches = [attn.new_cache(B, 704) for _ in range(2)]
    for cache in caches:
        first = cut(x, rows, 0, T)
        attn.extend(*first[0], cache, **first[1])
        qkv, others = cut(x, rows, T, T + 1)
        attn.decode(*qkv, cache, **others)
    still, those = cut(x, rows, T, T + 1)
    still = [y.clone() for y in still]
    those = {n: y.clone() for n, y in those.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attn.decode(*still, caches[0], **those)
    for t in range(T + 1, T + 40):
        qkv, others = cut(x, rows, t, t + 1)
        for to, source in zip(still, qkv, strict=True):
            to.copy_(source)
        for n, y in others.items():
            those[n].copy_(y)
        graph.replay()
        assert torch.equal(o, attn.decode(*qkv, caches[1], **others)), t
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [T + 40] * B


@pytest.mark.gpu
def test_a_step_that_never_ran_is_not_captured():
    spec, x, rows = on_card("quest", 1, 2)
    attn = load_kernel(spec)
    cache = attn.new_cache(1, 64)
    qkv, _ = cut(x, rows, 0, 2)
    with (
        pytest.raises(HsgenError, match="have never run"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attn.decode(*qkv, cache)
