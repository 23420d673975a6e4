"""`hsgen gate`: where lines of times cross, what is timed and checked, and what is written."""

import itertools
import json

import pytest
import torch
from test_gates import FLAT, NESTED, folders, record  # noqa: F401  a fixture

from hsgen import crossover, machine, tuned
from hsgen.cli import main
from hsgen.crossover import Point, crossings
from hsgen.gates import Gate
from hsgen.measure import Setting
from hsgen.reference import reference
from hsgen.spec import load
from hsgen.target import Target

LENGTHS = tuple(1 << n for n in range(10, 18))


def point(tokens, wobble=0.0, **ms):
    """Times of 8 rounds that differ by `wobble`, the same for no two forms."""
    rounds = [1, -1, 1, -1, 1, -1, 1, -1]
    turn = itertools.count(1)
    return Point(
        tokens=tokens,
        samples={f: [t * (1 + wobble * r / next(turn)) for r in rounds] for f, t in ms.items()},
    )


def ladder(wobble=0.0, lengths=LENGTHS, **forms):
    """Points of forms whose times are functions of the length."""
    return [point(n, wobble, **{f: time(n) for f, time in forms.items()}) for n in lengths]


def square(at):
    """Milliseconds of something that takes 1 where `line` does."""
    return lambda n: (n / at) ** 2


def line(at):
    return lambda n: n / at


# --- where lines cross


def test_lines_cross_where_they_do():
    """Powers of the length are lines in logarithms, so that between two lengths nothing is lost."""
    dense, flat = crossings(ladder(dense=square(9000), own=line(9000)))
    assert dense == tuned.Crossing(below=9000, least=9000, most=9000)
    assert flat is None


def test_three_forms_cross_twice():
    points = ladder(
        dense=square(5000), flat=lambda n: (n / 5000) ** 1.5, own=lambda n: 3 * n / 5000
    )
    dense, flat = crossings(points)
    assert (dense.below, flat.below) == (5000, 45000)


def test_dense_is_held_against_the_faster_of_the_others():
    slow = {"own": lambda n: 10 * n / 5000}
    dense, _ = crossings(ladder(dense=square(5000), flat=line(5000), **slow))
    assert dense.below == 5000
    alone, _ = crossings(ladder(dense=square(5000), **slow))
    assert alone.below == 50000


def test_a_tie_is_not_won():
    points = ladder(dense=lambda n: 1.0 if n > 4096 else 0.5, own=lambda n: 1.0)
    dense, _ = crossings(points)
    assert dense.below == 4097
    within_noise = ladder(0.2, dense=lambda n: 0.97, own=lambda n: 1.0)
    assert crossings(within_noise) == (None, None)
    assert crossings(ladder(dense=lambda n: 0.97, own=lambda n: 1.0))[0] is not None
    assert crossings(ladder(dense=lambda n: 0.995, own=lambda n: 1.0)) == (None, None)


def test_a_loss_ends_what_was_won_before():
    times = {1024: 0.5, 2048: 0.5, 4096: 2.0, 8192: 0.5, 16384: 0.5}
    points = ladder(lengths=times, dense=times.__getitem__, own=lambda n: 1.0)
    assert crossings(points)[0].below == 2896  # the middle of 2048 and 4096, in logarithms


def test_a_loss_at_the_shortest_length_wins_nothing():
    assert crossings(ladder(dense=lambda n: 2.0, own=lambda n: 1.0)) == (None, None)


def test_no_more_is_claimed_than_was_timed():
    dense, flat = crossings(ladder(dense=lambda n: 0.5, flat=lambda n: 0.7, own=lambda n: 1.0))
    assert (dense.below, flat) == (LENGTHS[-1] + 1, None)


def test_a_form_may_be_timed_at_short_lengths_only():
    points = [
        point(1024, dense=0.5, own=1.0),
        point(2048, dense=4.0, own=1.0),
        point(4096, own=1.0),
    ]
    assert crossings(points)[0].below == 1290
    points = [point(1024, dense=0.5, own=1.0), point(2048, own=1.0)]
    assert crossings(points)[0].below == 1025


def test_flat_counts_from_where_dense_ends():
    """It is slower than the spec at 1,024, where calls are dense anyway."""
    flat = {1024: 1.5, 2048: 0.9, 4096: 0.5, 8192: 0.7, 16384: 2.0}
    dense = {1024: 0.1, 2048: 0.5, 4096: 1.0, 8192: 4.0, 16384: 9.0}
    points = ladder(lengths=flat, dense=dense.get, flat=flat.get, own=lambda n: 1.0)
    found = crossings(points)
    assert 2048 < found[0].below < 4096
    assert 8192 < found[1].below < 16384


def test_noise_is_stated():
    (dense, _), (exact, _) = (
        crossings(ladder(wobble, dense=square(9000), own=line(9000))) for wobble in (0.1, 0.0)
    )
    assert dense.least < dense.below < dense.most
    assert abs(dense.below / exact.below - 1) < 0.1
    assert 8192 < dense.least
    assert dense.most <= 16384


# --- measuring


class Clock:
    """Runs each call once, and says the times that it is told."""

    def __init__(self, forms, **ms):
        self.forms, self.ms, self.asked = forms, ms, []

    def __call__(self, calls, device, seconds):
        outputs = [call(0) for call in calls]
        T = outputs[0].shape[1]
        forms = self.forms if len(calls) == len(self.forms) else self.forms[1:]
        self.asked.append((T, forms, outputs))
        return [[self.ms[form](T)] * 5 for form in forms]


def setting(dtype=torch.float32):
    return Setting(device="cpu", kind="random", groups=[], seconds=0.0, dtype=dtype)


def test_every_form_is_timed_as_a_call_computes_it():
    clock = Clock(
        ("flat", "dense", "own"), flat=lambda n: n, dense=lambda n: n * n / 24, own=lambda n: 2 * n
    )
    points, failures = crossover.take(NESTED, setting(), (16, 32), clock=clock)
    assert not failures
    assert [sorted(each.samples) for each in points] == [["dense", "flat", "own"]] * 2
    assert crossings(points)[0].below == 24
    for T, forms, outputs in clock.asked:
        x = setting().make(NESTED, T, 0)
        made = {**crossover.gates.forms(NESTED, "measured"), "own": NESTED}
        for form, o in zip(forms, outputs, strict=True):
            read = {name: x[name] for name in crossover.tensor_shapes(made[form], 1, 1, 1)}
            torch.testing.assert_close(o, reference(made[form], read).o.float())


def test_what_is_hopeless_is_timed_no_longer():
    clock = Clock(("dense", "own"), dense=lambda n: n * n / 16, own=lambda n: n)
    points, _ = crossover.take(FLAT, setting(), (8, 16, 64, 128), clock=clock)
    assert [sorted(each.samples) for each in points] == [["dense", "own"]] * 3 + [["own"]]


def test_what_is_wrong_is_not_timed(monkeypatch):
    kernel = crossover._kernel

    def wrong(setting, spec, form, length):
        made = kernel(setting, spec, form, length)
        return made if form == "own" else lambda **x: made(**x) * 1.05

    monkeypatch.setattr(crossover, "_kernel", wrong)
    clock = Clock(("dense", "own"), own=lambda n: n)
    points, failures = crossover.take(FLAT, setting(), (16,), clock=clock)
    assert [sorted(each.samples) for each in points] == [["own"]]
    assert failures == (
        "16 tokens, dense failed, so nothing is claimed: CheckError: relative error 0.05 of the "
        "output, expected below 0.01",
    )


def test_calls_are_timed_in_turn():
    order = []
    calls = [lambda n: order.append(("a", n)), lambda n: order.append(("b", n))]
    found = crossover.timing.in_turn(calls, "cpu", 0.0)
    assert [len(each) for each in found] == [5, 5]
    assert order[-4:] == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]


# --- the command


@pytest.fixture
def card(folders, monkeypatch):  # noqa: F811
    """An H100 that is not there, on which times are what a test says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Target, "current", lambda index=None: Target.named("h100"))
    provenance = {
        "card": "H100",
        "driver": "570",
        "cuda": "12.8",
        "torch": "2.11",
        "date": "2026-11-26",
    }

    def made(command, device):
        return {**provenance, "command": " ".join(command)}

    def take(spec, setting, lengths, progress):
        asked.append((spec, setting, lengths))
        return tuple(ladder(lengths=lengths, dense=square(6000), own=line(6000))), tuple(failures)

    asked, failures = [], []
    monkeypatch.setattr(machine, "provenance", made)
    monkeypatch.setattr(crossover, "take", take)
    return asked, failures


def test_the_command_says_keeps_and_writes(card, tmp_path, capsys):
    out = tmp_path / "mine"
    assert main(["gate", "moba", "--tokens", "2K,4K,8K", "--export", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "moba on H100, inputs random, 2026-11-26; ms, median of calls in turn"
    assert [line.split() for line in shown[2:6]] == [
        ["tokens", "dense", "moba"],
        ["2048", "0.1165", "*", "0.3413"],
        ["4096", "0.466", "*", "0.6827"],
        ["8192", "1.864", "1.365", "*"],
    ]
    assert "dense is faster below 6,000 keys (6,000 to 6,000 by noise)" in shown
    assert shown[-1] == "gate: dense below 6,000 keys"
    ((spec, setting, lengths),) = card[0]
    assert (spec.name, setting.device, lengths) == ("moba", "cuda", [2048, 4096, 8192])
    (kept,) = tuned.read_gates_folder(out).kept
    assert kept.where == "mine/h100/_gates.jsonl:1"
    assert kept.record.provenance.command == "hsgen gate moba --tokens 2K,4K,8K"
    assert [each.tokens for each in kept.record.lengths] == [2048, 4096, 8192]
    problem = tuned.Problem.of(load("moba"), "bf16")
    environment = tuned.environment(Target.named("h100"))
    assert tuned.crossovers(problem, environment).gate == Gate(dense_below=6000)
    assert main(["gate", "moba", "--export", str(out)]) == 0
    assert len(tuned.read_gates_folder(out).kept) == 1


def test_a_failure_keeps_nothing(card, tmp_path, capsys):
    card[1].append("2048 tokens, dense failed, so nothing is claimed: it was wrong")
    assert main(["gate", "moba", "--export", str(tmp_path / "mine"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["dense_below"], len(found["failures"])) == (False, None, 1)
    assert not (tmp_path / "mine").exists()
    assert tuned.cached_gates() == tuned.GatesContent()


def test_a_card_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gate", "moba"]) == 1
    assert "no GPU is present, and crossovers are of one" in capsys.readouterr().err
    assert main(["gate", "nsa"]) == 1
    assert "nsa: cannot be gated dense" in capsys.readouterr().err


def test_the_tuned_commands_know_gates(card, folders, tmp_path, capsys):  # noqa: F811
    main(["gate", "moba", "--tokens", "2K,4K,8K"])
    capsys.readouterr()
    assert main(["tuned", "list", "moba"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == "gates"
    assert ": dense below 6,000 keys  (cache moba-" in shown[-1]
    assert main(["tuned", "list", "nsa"]) == 0
    assert "gates" not in capsys.readouterr().out
    assert main(["tuned", "explain", "moba"]) == 0
    assert 'gate="measured": dense below 6,000 keys  (measured; cache' in capsys.readouterr().out
    assert main(["tuned", "export", str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/all/h100/_gates.jsonl\n"
    assert main(["tuned", "check", str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out == "1 records: 1 ok, 0 stale, 0 broken; 0 kernels compiled\n"
    other = tmp_path / "other"
    tuned.write_gates(other, [record()])
    assert main(["tuned", "merge", str(tmp_path / "all"), str(other)]) == 0
    path = tmp_path / "all" / "h100" / "_gates.jsonl"
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text().replace('"below": 6000', '"below": -1'))
    assert main(["tuned", "merge", str(tmp_path / "all"), str(other)]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert main(["tuned", "check", str(path)]) == 1
    assert "_gates.jsonl:1: dense.below: input should be greater" in capsys.readouterr().out
