"""Verification: the judge finds planted mistakes and passes right kernels; the child is bounded."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conformance import systems
from reference_driver import compiler

from hsgen import trials, verify
from hsgen.errors import HsgenError
from hsgen.selection import ListSelection
from hsgen.spec import load, parse
from hsgen.target import H100
from hsgen.verify import Case, Report
from hsgen.workers import WorkerError

TINY = """
hsgen: 1
name: tiny
heads: {query: 4, kv: 2}
head_dim: {qk: 32, v: 16}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 4, force: {last: 1}}
attend:
  - {name: selected, over: block}
"""
SPECS = [parse(TINY), *(load(name) for name in ("moba", "nsa", "hisa"))]


@pytest.fixture
def broken(monkeypatch):
    """broken(change): kernels are the reference, and `change` spoils what they return."""

    def install(change=lambda o, lse, chosen: None, dtype=torch.float32):
        make = compiler(dtype=dtype)

        def program(spec, target, element):
            made = make(spec, target, element, interpret=True)
            right = made.driver.forward

            def forward(*arguments):
                outputs = right(*arguments)
                change(*outputs)
                return outputs

            made.driver.forward = forward
            return made

        monkeypatch.setattr(trials, "_program", program)

    return install


def small(name, spec=SPECS[0]):
    return next(trial for trial in trials.trials(spec) if trial.name == name)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_right_kernels_pass_every_trial(broken, spec):
    broken()
    for trial in trials.trials(spec):
        assert trials.judge(trial, H100) == [], trial.name


def test_what_goes_down_a_tree_is_no_exact_choice():
    """Centroids are of unit length, so that scores are rounded; whole ones would be alike besides."""
    trial = small("shrunk, integers", load("hirouter"))
    assert trial.numbers == "integers"
    assert not trial.exact
    made = trials.tensors_of(trial, "cpu").driver
    whole = {name: bool(torch.equal(x, x.round())) for name, x in made.items()}
    assert {name for name, same in whole.items() if not same} == {
        "branch_centroids",
        "leaf_centroids",
    }


def zero_a_row(o, lse, chosen):
    o[..., 3, 1, :] = 0


def scale(o, lse, chosen):
    o *= 1.004


def lose_nothing_but_a_number(o, lse, chosen):
    o[..., 5, 0, 2] = torch.nan


def shift_the_lse(o, lse, chosen):
    lse["selected"][..., 1, 4] += 1e-3


def forget_the_own_block(o, lse, chosen):
    chosen["block"][..., 9, 0, :] = torch.tensor([0, 1, -1])


def prefer_the_worst(o, lse, chosen):
    """Keep the own block, 13, and two that the right choice leaves out."""
    row = chosen["block"][0, 52, 0]
    others = [e for e in range(13) if e not in row.tolist()]
    row[:] = torch.tensor([others[0], others[1], 13])


def repeat_an_entry(o, lse, chosen):
    chosen["block"][..., 9, 0, :] = torch.tensor([1, 1, 2])


def see_the_future(o, lse, chosen):
    chosen["block"][..., 9, 0, :] = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (zero_a_row, "o: row"),
        (scale, "too large"),
        (lose_nothing_but_a_number, "is not finite"),
        (shift_the_lse, "lse of selected: row"),
        (forget_the_own_block, "lacks a forced entry"),
        (prefer_the_worst, "block: row"),
        (repeat_an_entry, "not ascending, or not a set"),
        (see_the_future, "selects what is no candidate"),
    ],
)
def test_planted_mistakes_are_found(broken, change, finding):
    broken(change)
    problems = trials.judge(small("shrunk, integers"), H100)
    assert any(finding in problem for problem in problems), problems


def test_ties_must_go_to_the_lower_position(broken):
    def take_the_higher(o, lse, chosen):
        chosen["block"][0, 20, 0, :] = torch.tensor([3, 4, 5])

    broken(take_the_higher)
    problems = trials.judge(small("shrunk, all scores alike"), H100)
    assert "block: row [0, 20, 0] (of 1 in 74) is not the exact choice" in problems


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_shrunk_copies_keep_the_structure(spec):
    copy = trials.shrink(spec)
    assert [(x.name, x.within, x.pool, x.score) for x in copy.levels] == [
        (x.name, x.within, x.pool, x.score) for x in spec.levels
    ]
    assert [replace_window(x) for x in copy.attend] == [replace_window(x) for x in spec.attend]
    assert max(x.partition.size for x in copy.levels) <= trials.BLOCK
    sizes = {
        (x.partition.size / y.partition.size)
        for x, y in zip(spec.levels, copy.levels)
        if y.partition.size > 1
    }
    assert len(sizes) == 1  # partitions nest and overlap as before
    assert copy.heads.group == 1 or spec.heads.group > 1


def replace_window(branch):
    return branch.model_copy(update={"window": None})


def test_budgets_of_shrunk_copies_bite():
    for spec in SPECS:
        for level in trials.shrink(spec).levels:
            if level.select:
                entries = 53 // level.partition.stride
                assert level.select.budget < entries, (spec.name, level.name)


@pytest.mark.parametrize("name", systems.KERNELS)
def test_every_spec_with_kernels_shrinks(name):
    """Whatever rule it chooses by."""
    copy = trials.shrink(systems.load(name))
    assert max((x.partition.size for x in copy.levels), default=1) <= 2 * trials.BLOCK


def test_differences_are_stated():
    assert trials.differences(load("moba")) == (
        "chunk 512/512 top 3 -> 8/8 top 3, heads 2/2, head dim 16/16"
    )
    assert "block 64/64 masses above 0.0005 -> 8/8 masses above 0.1" in trials.differences(
        load("seer_attention")
    )


def test_only_exact_arithmetic_is_judged_exactly():
    assert small("shrunk, integers").exact
    assert not small("shrunk, integers", load("nsa")).exact  # softmax rounds
    assert small("shrunk, all scores alike", load("nsa")).exact
    assert not small("shrunk, documents").exact


def test_mistakes_of_kernels_are_findings_not_crashes(monkeypatch):
    def program(*arguments):
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr(trials, "_program", program)
    found = trials.answer({"spec": TINY, "target": "h100", "trial": 0})
    assert "ZeroDivisionError: in a kernel" in found["problems"][0]


# --- the child


class Stub:
    """A worker that answers by a script."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.closed = False

    def ask(self, request, timeout):
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        self.closed = True


def scripted(monkeypatch, *answers):
    stub = Stub(answers)
    monkeypatch.setattr(verify, "Worker", lambda *_: stub)
    return stub


LISTED = {"trials": ["one", "two"], "shrunk": "all"}


def test_findings_fail_the_report(monkeypatch):
    stub = scripted(monkeypatch, LISTED, {"problems": []}, {"problems": ["o: wrong"]})
    seen = []
    report = verify.verify(SPECS[0], progress=seen.append)
    assert not report.passed
    assert [case.outcome for case in report.cases] == ["passed", "failed"]
    assert tuple(seen) == report.cases
    assert stub.closed
    assert "verified tiny: 1 of 2 calls right" in str(report)
    assert "o: wrong" in str(report)
    assert report.record()["cases"][1]["problems"] == ["o: wrong"]


def test_what_takes_too_long_is_skipped(monkeypatch):
    scripted(monkeypatch, LISTED, {"problems": []}, WorkerError("timeout", "late"))
    report = verify.verify(SPECS[0])
    assert report.passed
    assert [case.outcome for case in report.cases] == ["passed", "skipped"]


def test_nothing_runs_without_time(monkeypatch):
    scripted(monkeypatch, LISTED)
    report = verify.verify(SPECS[0], budget=0.0)
    assert [case.outcome for case in report.cases] == ["skipped", "skipped"]
    assert not report.passed


def test_a_crash_is_a_failure(monkeypatch):
    scripted(monkeypatch, LISTED, WorkerError("crash", "killed by SIGSEGV"), {"problems": []})
    report = verify.verify(SPECS[0])
    assert report.cases[0].problems == ("the process died: killed by SIGSEGV",)
    assert not report.passed


def test_a_child_that_cannot_start_is_an_error(monkeypatch):
    stub = scripted(monkeypatch, WorkerError("crash", "no torch"))
    with pytest.raises(HsgenError, match="cannot verify: the interpreter does not start"):
        verify.verify(SPECS[0])
    assert stub.closed


def test_reports_are_values():
    case = Case(name="one", outcome="passed")
    report = Report(spec="tiny", shrunk="", cases=(case,), seconds=1.0)
    assert report.passed
    assert not replace(report, cases=(replace(case, outcome="failed"), case)).passed


@pytest.mark.slow
@pytest.mark.full  # the README's first command is of a shipped spec
def test_emitted_kernels_are_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    report = verify.verify(SPECS[0], budget=400.0)
    assert report.passed, str(report)
    assert all(case.outcome == "passed" for case in report.cases), str(report)


def test_sets_are_compared_whatever_room_their_lists_have():
    """A kernel's list may have room for more; the reference's is as long as its largest set."""

    def chosen(*rows):
        return {"tile": ListSelection(level="tile", indices=torch.tensor([[rows]]))}

    wanted = SimpleNamespace(selection=chosen((0, 2), (1, -1)))
    assert not [*trials._other_sets(wanted, chosen((0, 2, -1), (1, -1, -1)))]
    assert [*trials._other_sets(wanted, chosen((0, 2, -1), (1, 2, -1)))]
    assert [*trials._other_sets(wanted, chosen((0,), (1,)))]


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_whose_parts_are_chosen_apart_are_split_in_half(packed):
    """As numbers, one a sequence: of another kind a kernel would read what they are not."""
    spec = load("sparse_d").bind(step=205)
    trial = trials.Trial(
        name="split",
        spec=spec,
        dtype=torch.bfloat16,
        queries=(9, 4),
        keys=(9, 4),
        packed=packed,
        numbers="real",
    )
    made = trials.tensors_of(trial, "cpu")
    for tensors in (made.driver, made.reference):
        assert tensors["block_split"].tolist() == [4, 2]
        assert tensors["block_split"].dtype == torch.int32


def test_parts_that_are_chosen_apart_are_judged_apart():
    """Kernels' own choices, dense and packed."""
    for trial in trials.trials(load("sparse_d").bind(step=205))[1:3]:
        assert trials.judge(trial, H100) == [], trial.name
