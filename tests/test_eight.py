"""An index in e4m3 on units that multiply it: which plans, the bytes, and how far their sums may be off."""

import math
from dataclasses import replace

import emitted
import pytest
import torch
from conformance import systems
from tolerances import STEP_OF_EIGHT, in_eight

from hsgen import batch, build, resources, runtime, schedule, trials
from hsgen.kernels import RoundContext
from hsgen.reference.rounding import stored
from hsgen.report import math_type
from hsgen.spec import parse
from hsgen.target import A100, B200, H100, MI300X, RTX4090, Target, with_streams

SPEC = """\
hsgen: 1
name: eight
heads: {query: 4, kv: 2}
head_dim: 16
causal: true
index: {heads: HEADS, dim: DIM, dtype: DTYPE, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: FORM, share: all}
    select: {top_k: 8}
attend:
  - {name: selected, over: token}
"""
DTYPES = ("fp8", "fp8_unscaled")
KINDS = ("normal", "outlier", "common", "positive", "weighed", "integers")


def of(dtype="fp8", *, heads=4, dim=64, form="relu_weighted"):
    text = SPEC.replace("HEADS", str(heads)).replace("DIM", str(dim))
    return parse(text.replace("DTYPE", dtype).replace("FORM", form))


def plan_of(spec, target=H100, dtype="bf16"):
    return schedule.schedule(emitted.graph(spec), target, dtype)


def in_bytes(plan):
    """Kernels whose vectors are bytes: what makes them, and what reads them."""
    rounds = {k.name for k in plan.kernels if getattr(k.context, "as_bytes", False)}
    contexts = {k.name: getattr(k.context, "rows", k.context) for k in plan.kernels}
    return rounds | {name for name, c in contexts.items() if getattr(c, "eight", False)}


ALL = {"round_q_index", "round_k_index", "score_token"}


# --- which


@pytest.mark.parametrize(
    ("target", "eight"),
    [(H100, True), (B200, True), (RTX4090, True), (A100, False), (MI300X, False)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_that_take_bytes_get_them(target, eight, dtype):
    assert in_bytes(plan_of(of(dtype), target)) == (ALL if eight else set())


@pytest.mark.parametrize(
    ("changes", "dtype", "eight"),
    [
        ({}, "fp16", True),
        ({}, "fp32", False),
        ({"form": "relu_sum"}, "bf16", True),
        ({"dim": 96}, "bf16", True),
        ({"dim": 48}, "bf16", False),  # dots take 32 numbers at a time
        ({"dtype": "bf16"}, "bf16", False),
    ],
)
def test_scores_that_sum_heads_of_whole_steps(changes, dtype, eight):
    assert in_bytes(plan_of(of(**changes), H100, dtype)) == (ALL if eight else set())


def test_dsa_streams_bytes():
    plan = plan_of(systems.load("dsa"), replace(H100, streams=True))
    kernel = plan.kernel("score_token")
    assert (kernel.skeleton, in_bytes(plan)) == ("streams", ALL)
    sixteen = plan_of(systems.load("dsa"), replace(emitted.SIXTEEN, streams=True)).kernel(
        "score_token"
    )
    assert [math_type(each, "bf16") for each in (kernel, sixteen)] == ["fp8", "bf16"]


def test_powers_of_two_are_kept_where_there_are_any():
    for dtype, kept in (("fp8", True), ("fp8_unscaled", False)):
        plan = plan_of(of(dtype))
        rounds = [k.context for k in plan.kernels if isinstance(k.context, RoundContext)]
        assert [context.scaled for context in rounds] == [kept, kept]
        names = {p.name for p in plan.kernel("score_token").context.params}
        assert ({"Q_POWER", "K_POWER"} <= names) is kept


# --- the binary


@pytest.mark.skipif(not with_streams(H100).streams, reason="no Gluon for Hopper in this Triton")
def test_scores_compile_to_dots_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    plan = plan_of(systems.load("dsa"), replace(H100, streams=True))
    module = build.build("eight", emitted.sources(plan), {"test": "dsa"})
    jobs = resources.plan_jobs(plan, module, H100)
    (job,) = (job for job in jobs if job.signature.function == "score_token")
    (found,) = resources.measure((job,))
    assert isinstance(found, resources.Resources), found
    assert found.cost.spill_bytes <= 40  # outside of loops over keys
    assert found.blocks_per_sm == 1


# --- in the interpreter


def rounded(dtype, x):
    """x [B, T, 4, 64] as bytes, and the power of two of each vector, by the kernel."""
    module = build.load(build.build("eight", emitted.sources(plan_of(of(dtype))), {"test": dtype}))
    made = torch.full(x.shape, 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)
    powers = torch.full(x.shape[:-1], math.nan)
    scale = (powers,) if dtype == "fp8" else ()
    vectors, block = x.shape[:3].numel(), 512
    kernel = module.round_q_index.round_q_index
    grid = (-(-vectors // block), 1)
    kernel[grid](x, *x.stride()[:3], made, *scale, x.shape[1], vectors, BLOCK_V=block)
    return made.double() * (powers[..., None].double() if scale else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_every_bf16_number(dtype):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = numbers.view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()].float()
    spread = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))]
    for x in (spread, numbers):
        x = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(1, -1, 4, 64)
        assert torch.equal(rounded(dtype, x), stored(x.double(), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_between(dtype):
    """Ties go to the even one, what is too great becomes the greatest, no number stays none."""
    x = torch.zeros(1, 1, 4, 64)
    x[0, 0, 0, :8] = torch.tensor([1.0625, 1.1875, -1.0625, 447.0, 448.0, 460.0, 464.0, 500.0])
    x[0, 0, 1, :6] = torch.tensor([2.0**-9, 2.0**-10, 3 * 2.0**-10, -(2.0**-10), 2.0**-6, 2.0**-7])
    x[0, 0, 2, :2] = torch.tensor([math.nan, 1.0])
    kept, expected = rounded(dtype, x)[0, 0], stored(x.double(), dtype)[0, 0]
    assert torch.equal(kept[:2], expected[:2])
    assert torch.equal(kept[3], expected[3])
    assert kept[2, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("numbers", "queries", "keys", "packed"),
    [
        ("real", (41,), (41,), False),
        ("integers", (53,), (53,), False),
        ("plateau", (37,), (37,), False),
        ("real", (1, 0, 17), (1, 0, 29), True),
        ("integers", (5, 5), (29, 11), False),
    ],
)
@pytest.mark.usefixtures("sanitized")
def test_choices_of_bytes(dtype, numbers, queries, keys, packed):
    """The interpreter adds in float32, so they are held to its bound, and on integers to every tie."""
    trial = trials.Trial(
        name="bytes",
        spec=of(dtype),
        dtype=torch.float16,
        queries=queries,
        keys=keys,
        packed=packed,
        numbers=numbers,
    )
    assert trials.judge(trial, H100) == []


@pytest.mark.parametrize("form", ["relu_weighted", "relu_sum"])
@pytest.mark.usefixtures("sanitized")
def test_bytes_choose_as_what_they_are_in_sixteen_bits(form):
    spec = of(form=form)
    x = emitted.tensors(spec, 61, torch.float16)
    chosen = []
    for target in (H100, emitted.SIXTEEN):
        program = runtime.compile_program(spec, target, torch.float16, interpret=True)
        where = batch.dense(1, 61, 61, x["q"].device)
        chosen.append(program.driver.select(x, where, program.config)["token"])
    assert torch.equal(*chosen)


# --- the bound


def numbers_of(kind, rows, keys, heads, dim, seed=0, device="cpu"):
    """Queries [R, H, D], keys [N, D] and weights [R, H] of an index, in bf16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    q, k, w = draw(rows, heads, dim), draw(keys, dim), draw(rows, heads)
    match kind:
        case "outlier":  # one channel
            q[..., 5] *= 50
            k[..., 5] *= 50
        case "common":
            k += 3 * draw(dim)
            q += 2 * draw(heads, dim)
        case "positive":
            q, k = q.abs(), k.abs()
        case "weighed":  # so that errors of heads add up
            q, k, w = q.abs(), k.abs(), w.abs()
        case "integers":
            q, k, w = ((x * 1.2).round().clamp(-2, 2) for x in (q, k, w))
    return tuple(x.to(device) for x in (q, k, w))


def as_units_add(products):
    """A dot [..., D] of e4m3 numbers as Hopper's units add it, by what was measured of them.

    A step has 32 products and the sum before them: all are cut below 2^-13 of the greatest's power of two.
    """
    total = torch.zeros(products.shape[:-1], dtype=torch.float64)
    for step in products.split(STEP_OF_EIGHT, -1):
        terms = torch.cat([step, total.unsqueeze(-1)], -1)
        unit = 2.0 ** (terms.abs().amax(-1).clamp(min=1e-300).log2().floor() - 13)
        total = (terms / unit.unsqueeze(-1)).trunc().sum(-1) * unit
    return total


def off(kind, rows, keys, heads, dim):
    """Errors of scores as units add them, and the sums of |q| |k| |w|.  [R, N], twice"""
    q, k, w = numbers_of(kind, rows, keys, heads, dim)
    q, k, w = stored(q.double(), "fp8"), stored(k.double(), "fp8"), w.double()
    products = q[:, None] * k[None, :, None]  # [R, N, H, D]
    exact, found = products.sum(-1), as_units_add(products)
    error = ((found.clamp(min=0) - exact.clamp(min=0)) * w[:, None]).sum(-1)
    return error, (products.abs().sum(-1) * w.abs()[:, None]).sum(-1)


@pytest.mark.parametrize("dim", [32, 128, 256])
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_units_stay_within_the_bound(kind, heads, dim):
    error, size = off(kind, 8, 64, heads, dim)
    used = (error.abs() / size.clamp(min=1e-300)).max() / in_eight(dim)
    assert used <= 1.0, used
    if kind == "integers":
        assert not error.any()
    elif kind == "weighed" and dim > STEP_OF_EIGHT:
        assert used > 0.1  # so that the bound says something


@pytest.mark.parametrize(
    ("kind", "measured"), [("normal", 1.91e-6), ("outlier", 5.66e-5), ("positive", 1.00e-4)]
)
def test_units_are_modelled_as_a_card_showed_them(kind, measured):
    """Root mean square of scores of dsa's 64 heads of 128 on an H200, as a part of the sum of their sizes."""
    error, size = off(kind, 8, 64, 64, 128)
    assert float((error / size).square().mean().sqrt()) == pytest.approx(measured, rel=0.2)


# --- on a card


class Noting:
    """torch as a driver uses it; what it makes stays, and one chunk of scores has all rows."""

    def __init__(self):
        self.made = []

    def empty(self, *size, **options):
        self.made.append(torch.empty(*size, **options))
        return self.made[-1]

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def choose(monkeypatch):
    """A call's scores [T, N], choice [T, K] and all that its driver made."""
    if not Target.current().dots_of_e4m3:
        pytest.skip("no units for e4m3 here")

    def run(spec, q, k, w, *, streams):
        target = Target.current()
        target = replace(target, streams=target.streams and streams)
        program = runtime.compile_program(spec, target, torch.bfloat16, interpret=False)
        rows, keys = len(q), len(k)
        one = torch.empty(1, dtype=torch.bfloat16, device="cuda")
        attended = {
            name: one.expand(1, n, heads, spec.head_dim.qk)
            for name, n, heads in (("q", rows, spec.heads.query), ("k", keys, spec.heads.kv))
        }
        x = attended | {"q_index": q[None], "k_index": k[None], "w_index": w[None]}
        noting = Noting()
        monkeypatch.setattr(program.driver, "torch", noting)
        monkeypatch.setattr(program.driver, "SCRATCH_BYTES", 1 << 33)
        where = batch.dense(1, rows, keys, q.device)
        chosen = program.driver.select(x, where, program.config)["token"][0, :, 0]
        (scores,) = (
            t
            for t in noting.made
            if t.dtype == torch.float32 and t.ndim == 3 and t.shape[1] == 1 and len(t) >= rows
        )
        assert any(t.dtype == torch.float8_e4m3fn for t in noting.made)
        return scores[:rows, 0, :keys], chosen, noting.made

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_choices(choose, kind, streams):
    spec = systems.load("dsa")
    heads, dim, kept = spec.index.heads, spec.index.dim, spec.level("token").select.top_k
    T = 4099
    q, k, w = numbers_of(kind, T, T, heads, dim, device="cuda")
    scores, chosen, _ = choose(spec, q, k, w, streams=streams)
    rows = torch.tensor([0, 1, 63, 64, 2047, 2048, 3001, 4097, T - 1], device="cuda")
    keys = stored(k.double(), "fp8")
    for row in rows.tolist():
        n = row + 1
        own = stored(q[row].double(), "fp8")
        exact = ((own @ keys[:n].T).clamp(min=0) * w[row].double()[:, None]).sum(0)
        size = ((own.abs() @ keys[:n].abs().T) * w[row].double().abs()[:, None]).sum(0)
        bound = (in_eight(dim) + (dim + heads + 16) * 2.0**-24) * size
        found = scores[row, :n].double()
        used = ((found - exact).abs() / bound.clamp(min=1e-300)).max()
        assert used <= 1.0, (row, used)
        mine = chosen[row][chosen[row] >= 0].long()
        assert len(mine.unique()) == min(n, kept)
        assert bool((mine < n).all())
        if kind == "integers":
            assert torch.equal(found, exact)
            best = torch.sort(exact, descending=True, stable=True).indices[:kept]
            assert torch.equal(mine, best.sort().values)
        elif n > kept:
            out = torch.ones(n, dtype=torch.bool, device="cuda")
            out[mine] = False
            assert (exact + bound)[mine].min() >= (exact - bound)[out].max()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "outlier"])
def test_bytes_on_a_card(choose, kind):
    spec = systems.load("dsa")
    q, k, w = numbers_of(kind, 333, 333, spec.index.heads, spec.index.dim, device="cuda")
    *_, made = choose(spec, q, k, w, streams=True)
    for x in (q, k):
        (kept,) = (t for t in made if t.dtype == torch.float8_e4m3fn and t.shape[1:] == x.shape)
        (power,) = (t for t in made if t.dtype == torch.float32 and t.shape == kept.shape[:-1])
        assert torch.equal(
            kept[0].double() * power[0].double()[..., None], stored(x.double(), "fp8")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", ["real", "integers"])
def test_a_search_holds_them_to_their_own_bound(numbers):
    spec = of(heads=16, dim=128)
    rows = (300,)
    trial = trials.Trial(
        name="bytes", spec=spec, dtype=torch.bfloat16, queries=rows, keys=rows, numbers=numbers
    )
    program = runtime.compile_program(spec, Target.current(), torch.bfloat16, interpret=False)
    assert trials.Examination(trial, "cuda").problems(program, program.config) == []


@pytest.mark.parametrize(
    ("changes", "target", "dtype", "bound"),
    [
        ({}, H100, "bf16", trials.EIGHT_BOUND),
        ({}, with_streams(H100, "3.6"), "bf16", trials.EIGHT_BOUND),
        ({"dim": 48}, H100, "bf16", trials.SCORE_BOUND),
        ({"dtype": "bf16"}, H100, "bf16", trials.SCORE_BOUND),
        ({}, A100, "bf16", trials.SCORE_BOUND),
        ({}, H100, "fp32", trials.SCORE_BOUND),
    ],
)
def test_a_search_asks_the_plan_for_the_bound(changes, target, dtype, bound):
    """A card's units add e4m3 products only where a score kernel has any."""
    spec = of(**changes)
    trial = trials.trials(spec)[0]
    (level,) = spec.levels
    plan = plan_of(spec, target, dtype)
    examination = trials.Examination(trial)
    assert examination._apart(level, plan) == trials.SCORE_BOUND  # the interpreter adds in float32
    examination._on_card = True
    assert examination._apart(level, plan) == bound


@pytest.mark.gpu
def test_calls_that_are_repeated_have_the_same_bits():
    """The third one is a list of launches, among whose buffers are bytes."""
    spec = systems.load("dsa")
    x = {n: t.cuda() for n, t in emitted.tensors(spec, 2500, torch.bfloat16).items()}
    attn = runtime.load_kernel(spec)
    with torch.no_grad():
        first, *others = (attn(**x) for _ in range(4))
    assert first.isfinite().all()
    for other in others:
        assert torch.equal(first, other)
