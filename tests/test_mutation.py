"""The safety net is tested itself: every planted bug must be found, by the sanitizer or an oracle."""

import importlib
import importlib.util
import itertools
import sys

import pytest
import sanitizer
import torch
from conformance import calls, oracles, systems
from conformance.backends import NAMES
from conformance.test_logits import with_logits
from conformance.test_pools import spec_of
from conformance.test_union import spec_of as union_of
from mutants import MUTANTS

from hsgen import batch, emit, passes, planner, schedule, target
from hsgen.reference import tensor_kinds

SPECS = {
    "moba": lambda: systems.small("moba", group=3, dims=(32, 32)),
    "moba_keys": lambda: systems.small("moba", group=3, dims=(32, 32)),
    "moba_full": lambda: systems.small("moba", group=1, dims=(32, 32), causal=False),
    "nsa": lambda: systems.small("nsa", group=2, dims=(48, 32)),
    "hisa": lambda: systems.small("hisa", group=2, dims=(32, 32)),
    "logits": lambda: with_logits(systems.small("nsa", group=2, dims=(48, 32))),
    "logits_keys": lambda: with_logits(systems.small("moba", group=3, dims=(32, 32))),
    "union": lambda: union_of("pooled", ("window",)),
    "pools": lambda: spec_of("gates_finished"),
    "sparse_mla": lambda: systems.small("sparse_mla", group=65, dims=(64, 32)),
    "dhsa_released": lambda: systems.small("dhsa_released", group=1, block=16, dims=(32, 32)),
    "xattention": lambda: systems.small("xattention", group=1, dims=(16, 16)),
}
ORDERS = {name: {"selected": "keys"} for name in ("moba_keys", "logits_keys")}
TILE = 16
FAR = 1 << 30  # elements between batches: the third one lies beyond int32


@pytest.fixture(scope="module")
def sources():
    """The emitted modules of every small spec, as text."""
    return {name: _emit(make(), ORDERS.get(name)) for name, make in SPECS.items()}


def _emit(spec, orders):
    graph = passes.run(planner.plan(spec))
    plan = schedule.schedule(graph, target.H100, NAMES[torch.float32], orders)
    provenance = emit.Provenance(version="0", spec=spec.name, digest=spec.digest, target="sm_90")
    return emit.render(plan, provenance)


@pytest.fixture
def load(tmp_path):
    """load(sources) -> the driver of a package with these modules."""
    numbers = itertools.count()
    names = []

    def write(texts):
        package = f"mutant_{tmp_path.name}_{next(numbers)}"
        folder = tmp_path / package
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        place = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(place)
        names.append(package)
        return importlib.import_module(f"{package}.driver")

    yield write
    for name in [m for m in sys.modules if m.partition(".")[0] in names]:
        del sys.modules[name]


# cases: each gives what is wrong with a driver, "" if nothing


def choose(spec, driver):
    """Choices on random numbers, judged by their certified bounds."""
    call = calls.make(spec, T=_rows(spec), S=_keys(spec), seed=1)
    return _judge_choice(call, _select(driver, call))


def early(spec, driver):
    """Rows at the start have fewer entries than the budget; the rest of their slots is -1."""
    call = calls.make(spec, T=20, seed=7)
    return _judge_choice(call, _select(driver, call))


def plateau(spec, driver):
    """All scores equal: ties go to the lower positions."""
    call = calls.make(spec, T=_rows(spec), S=_keys(spec), seed=2)
    query = "q_index" if "q_index" in call.tensors else "q"
    call = call.with_tensors(**{query: torch.zeros_like(call.tensors[query])})
    return _same_choice(call, _select(driver, call))


def nan(spec, driver):
    """An early block has no score that is a number."""
    call = calls.make(spec, T=24, S=_keys(spec), seed=3)
    call.tensors["k"][:, 18] = float("nan")
    return _same_choice(call, _select(driver, call))


def subnormal(spec, driver):
    """Scores below 2^-126 count as 0, so the lower position wins."""
    call = calls.make(spec, T=24, S=_keys(spec), seed=4)
    q, k = torch.zeros_like(call.tensors["q"]), torch.zeros_like(call.tensors["k"])
    q[..., 0], k[..., 0] = 2.0**-70, 2.0**-70 * torch.arange(k.shape[1])[None, :, None]
    call = call.with_tensors(q=q, k=k)
    return _same_choice(call, _select(driver, call), dtype=torch.float32)


def given(spec, driver):
    """Outputs on a selection that a caller brings, with holes, duplicates and an empty row."""
    call = calls.make(spec, T=24, S=_keys(spec), seed=5)
    return _judge_output(call, _forward(driver, call, _untidy(spec, call)))


def union(spec, driver):
    """As `given`, where every tile walks the union of its rows' blocks."""
    call = calls.make(spec, T=24, S=_keys(spec), seed=5)
    forced = {"index_selected": {"DEAR": 0}}
    return _judge_output(call, _forward(driver, call, _untidy(spec, call), forced))


def own_block(spec, driver):
    """All rows choose the block that they lie in themselves, of which each sees another part."""
    call = calls.make(spec, T=8, S=_keys(spec), seed=8)
    return _judge_output(call, _forward(driver, call, _untidy(spec, call, holes=False)))


def own(spec, driver):
    """Outputs on what blocks of rows chose, in tiles of a part of a block; a document has no row."""
    call, _ = calls.pack(spec, [31, 0, 20], key_lengths=[38, 13, 41], dtype=torch.float32)
    o, lse, chosen = driver.forward(_lifted(call), _batch(call), _config(driver))
    o, lse, chosen = o[0], {n: t[0] for n, t in lse.items()}, {n: s[0] for n, s in chosen.items()}
    return _judge_output(call, calls.Outcome(o=o, lse=lse, selection=chosen))


def documents(spec, driver):
    """Three documents, the first of one row less than two tiles."""
    call, _ = calls.pack(spec, [31, 5, 20], key_lengths=[33, 5, 41], dtype=torch.float32)
    return _judge_output(call, _forward(driver, call, _untidy(spec, call)))


def far(spec, driver):
    """Queries so far apart that their offsets need 64 bits; only a few pages are touched."""
    call = calls.make(spec, B=3, T=3, S=20, seed=6)
    q = call.tensors["q"]
    wide = torch.empty_strided(q.shape, (FAR, *q.stride()[1:]), dtype=torch.float16)
    tensors = {name: t.half() for name, t in call.tensors.items()} | {"q": wide.copy_(q)}
    call = call.with_tensors(**tensors)
    return _judge_output(call, _forward(driver, call, _untidy(spec, call)))


CASES = {
    f.__name__: f
    for f in (choose, early, plateau, nan, subnormal, given, union, own_block, own, documents, far)
}


def _keys(spec):
    """Enough blocks for the budgets to bite, the last one short."""
    return 75 if spec.heads.group == 1 else 121


def _rows(spec):
    """Rows to choose for; levels inside levels cost a program a row."""
    return 5 if any(level.within for level in spec.levels) else 24


def _select(driver, call):
    return driver.select(call.tensors, _batch(call), _config(driver))


def _lifted(call):
    """Packed tensors with a batch dimension, as a driver takes them."""
    kinds = tensor_kinds(call.spec)
    return {n: t if kinds[n] == "parameter" else t[None] for n, t in call.tensors.items()}


def _forward(driver, call, selection, forced=None):
    tensors = _lifted(call) if call.packed else call.tensors
    handed = {name: s[None] if call.packed else s for name, s in selection.items()}
    o, lse, _ = driver.forward(tensors, _batch(call), _config(driver, forced), handed)
    if call.packed:
        o, lse = o[0], {name: t[0] for name, t in lse.items()}
    return calls.Outcome(o=o, lse=lse, selection=selection)


def _batch(call):
    kinds = tensor_kinds(call.spec)
    q, k = call.tensors["q"], next(t for n, t in call.tensors.items() if kinds[n] == "key")
    if call.packed:
        ends = (call.options["cu_seqlens_q"], call.options["cu_seqlens_k"])
        return batch.packed(*ends, q.shape[0], k.shape[0])
    return batch.dense(q.shape[0], q.shape[1], k.shape[1], q.device)


def _config(driver, forced=None):
    """The default configuration with tiles and steps so short that there are several of each."""
    config = {name: dict(values) for name, values in driver.CONFIG.items()}
    for values in config.values():
        if "BLOCK_N" in values:
            values["BLOCK_N"] = 16
        if "BLOCK_J" in values:
            values["BLOCK_J"] = min(values["BLOCK_J"], 4)
        if values.get("BLOCK_T", 0) > TILE:
            if "BLOCK_M" in values:
                values["BLOCK_M"] = values["BLOCK_M"] * TILE // values["BLOCK_T"]
            values["BLOCK_T"] = TILE
    for name, values in config.items():
        if "BLOCK_R" in values and name.startswith("rank"):
            values["BLOCK_R"] = config[name.replace("rank", "score")]["BLOCK_T"]
    return {name: values | (forced or {}).get(name, {}) for name, values in config.items()}


def _untidy(spec, call, *, holes=True):
    """The reference's choice, in the attended levels made awkward; a gathered list stays tidy."""
    chosen = {name: s.indices.clone() for name, s in call.reference().selection.items()}
    if not holes:
        return chosen
    attended = {branch.over for branch in spec.attend}
    for level in systems.selecting(spec):
        indices = chosen[level.name]
        if level.name not in attended or level.within:
            continue
        indices[..., 0::5, :, :] = indices[..., 0::5, :, :].flip(-1)
        indices[..., 1::5, :, 0] = indices[..., 1::5, :, 1]
        indices[..., 2::5, :, 1] = 1000
        indices[..., 3:4, :, :] = -1
    return chosen


# verdicts


def _judge_choice(call, chosen):
    exact = call.reference(selection=chosen)
    outcome = calls.Outcome(o=None, lse={}, selection=chosen)
    return "\n".join(map(str, oracles.selection_findings(call, outcome, exact)))


def _same_choice(call, chosen, dtype=torch.float64):
    expected = call.reference(dtype).selection
    wrong = [n for n, s in chosen.items() if not torch.equal(s, expected[n].indices.to(s.dtype))]
    return f"another choice than the reference in {wrong}" if wrong else ""


def _judge_output(call, outcome):
    call = call.with_options(selection=outcome.selection)
    return "\n".join(map(str, oracles.findings(call, outcome)))


def _verdict(spec, driver, case):
    """What is wrong, by the sanitizer or the case's oracle; "" if nothing."""
    try:
        with sanitizer.enabled(seed=3):
            return CASES[case](SPECS[spec](), driver)
    except sanitizer.Fault as fault:
        return str(fault)


@pytest.mark.parametrize(("spec", "case"), sorted({(m.spec, m.case) for m in MUTANTS}))
def test_kernels_as_emitted_raise_no_alarm(sources, load, spec, case):
    assert _verdict(spec, load(sources[spec]), case) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_planted_bug_is_found(sources, load, mutant):
    assert _verdict(mutant.spec, load(mutant.apply(sources[mutant.spec])), mutant.case) != ""


def test_edit_that_no_longer_applies_is_an_error(sources):
    with pytest.raises(LookupError, match="occurs 0 times"):
        MUTANTS[0].apply(sources["nsa"] | {"attend_selected.py": "nothing"})
