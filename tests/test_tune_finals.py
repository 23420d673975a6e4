"""Who wins the finals: noise is no gain, ties go to the smaller, the incumbent stays if in doubt."""

import random

import pytest
from test_space import space_of

from hsgen.measurer import Failure
from hsgen.tune.finals import Entrant, confirmed, contenders, decide


@pytest.fixture(scope="module")
def points():
    found = space_of("moba").only(["merge_selected"])
    return list(found.variants[0].parts[0].points(found.start))


def entrant(point, mean, noise=0.002, seed=0, registers=0, rounds=15):
    """Samples of rounds that share their disturbances, as those of one pass do."""
    shared, own = random.Random(5), random.Random(seed)
    samples = tuple(
        mean * (1 + 0.2 * shared.random()) * (1 + own.gauss(0, noise)) for _ in range(rounds)
    )
    return Entrant(point=point, samples=samples, registers=registers)


def test_a_clear_gain_is_adopted(points):
    before, faster = entrant(points[0], 100.0, seed=1), entrant(points[1], 90.0, seed=2)
    verdict = decide([before, faster], points[0])
    assert verdict.adopted
    assert verdict.winner is faster
    assert verdict.ratio == pytest.approx(0.9, abs=0.01)
    assert "times as fast as before" in str(verdict)


def test_a_gain_below_one_percent_is_none(points):
    before, faster = entrant(points[0], 100.0, noise=0), entrant(points[1], 99.5, noise=0)
    verdict = decide([before, faster], points[0])
    assert not verdict.adopted
    assert "nothing is surely faster" in str(verdict)


def test_noise_is_no_gain(points):
    """Of equal ones, however many and however noisy, none replaces what is used."""
    adopted = 0
    for seed in range(40):
        equal = [
            entrant(p, 100.0, noise=0.05, seed=50 * seed + n) for n, p in enumerate(points[:9])
        ]
        verdict = decide(equal, points[0])
        again = [
            entrant(each.point, 100.0, noise=0.05, seed=5000 + 50 * seed + n)
            for n, each in enumerate((verdict.winner, verdict.incumbent))
        ]
        adopted += verdict.adopted and confirmed(verdict, again).adopted
    assert adopted <= 1


def test_a_confirmed_gain_is_that_of_the_second_pass(points):
    first = decide([entrant(points[0], 100.0, seed=1), entrant(points[1], 80.0, seed=2)], points[0])
    again = [entrant(points[1], 90.0, seed=3), entrant(points[0], 100.0, seed=4)]
    verdict = confirmed(first, again)
    assert verdict.adopted
    assert verdict.ratio == pytest.approx(0.9, abs=0.01)
    assert verdict.ties == first.ties
    lost = [entrant(points[1], 101.0, seed=3), entrant(points[0], 100.0, seed=4)]
    assert not confirmed(first, lost).adopted


def test_ties_go_to_fewer_registers_then_to_smaller_values(points):
    before = entrant(points[0], 100.0, seed=1)
    wide = entrant(points[1], 80.0, seed=2, registers=200)
    lean = entrant(points[2], 80.2, seed=3, registers=100)
    assert decide([before, wide, lean], points[0]).winner is lean
    a, b = entrant(points[3], 80.0, noise=0), entrant(points[9], 80.0, noise=0)
    smaller = min((a, b), key=lambda each: each.order)
    assert decide([before, a, b], points[0]).winner is smaller
    assert decide([before, b, a], points[0]).winner is smaller


def test_tuning_again_keeps_the_winner(points):
    """The winner of one run, as the incumbent of the next, stays."""
    for seed in range(20):
        first = [
            entrant(p, 100.0 - n, noise=0.01, seed=9 * seed + n) for n, p in enumerate(points[:8])
        ]
        winner = decide(first, points[0]).winner.point
        again = [
            entrant(p, 100.0 - n, noise=0.01, seed=1000 + 9 * seed + n)
            for n, p in enumerate(points[:8])
        ]
        verdict = decide(again, winner)
        assert not verdict.adopted or verdict.ratio > 0.97


def test_a_broken_incumbent_is_replaced(points):
    bad = Entrant(point=points[0], samples=(), failure=Failure(kind="HANG", message="late"))
    good = entrant(points[1], 100.0)
    assert decide([bad, good], points[0]).winner is good
    assert decide([bad], points[0]) is None


def test_times_that_cannot_be_do_not_win(points):
    before = entrant(points[0], 100.0)
    odd = Entrant(point=points[1], samples=(-1.0,) * 15)
    assert decide([before, odd], points[0]).winner is before


def test_alternates_come_with_their_ratio(points):
    made = [entrant(p, 100.0 + 10 * n, noise=0) for n, p in enumerate(points[:4])]
    verdict = decide(made, points[0])
    assert [round(ratio, 2) for _, ratio in verdict.ties] == [1.1, 1.2, 1.3]


def test_who_is_surely_slower_leaves_early(points):
    """The one that is used now stays, and so do those that a few rounds do not tell apart."""
    before, same = entrant(points[0], 100.0, rounds=5), entrant(points[1], 100.3, seed=1, rounds=5)
    faster = entrant(points[2], 97.0, seed=2, rounds=5)
    slower = entrant(points[3], 110.0, seed=3, rounds=5)
    failed = Entrant(point=points[4], samples=(), failure=Failure(kind="HANG", message="late"))
    assert contenders([before, same, slower, failed], points[0]) == [before, same]
    assert contenders([before, faster, slower], points[0]) == [before, faster]
    assert contenders([slower, failed, faster], points[0]) == [slower, faster]


def test_early_leavers_are_compared_by_the_rounds_they_had(points):
    before, faster = entrant(points[0], 100.0), entrant(points[1], 90.0, seed=2)
    slower = entrant(points[2], 120.0, seed=3, rounds=5)
    verdict = decide([before, slower, faster], points[0])
    assert verdict.winner is faster
    ratios = {id(each): ratio for each, ratio in verdict.ties}
    assert ratios[id(slower)] == pytest.approx(120 / 90, rel=0.01)
