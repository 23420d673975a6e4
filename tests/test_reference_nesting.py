"""Levels in levels in levels, each with a beam: what survives, by hand and against everything scored."""

from __future__ import annotations

import random

import pytest
import torch
from graph_interpreter import evaluate
from plan_cases import DOT, MEAN, blocks, random_tensors, top
from plan_cases import spec as make

from hsgen import passes
from hsgen import spec as language
from hsgen.analysis import laws
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.spec import Attend, Force, Index, Level, Pool, Score, Select, Spec, Tokens

SELECTED = Attend(name="selected", over="leaf")


def chain(sizes: list[int], beams: list[int], k: int, **more: object) -> Spec:
    """Blocks in blocks; size 1 is tokens.  A beam for each level but the last, which keeps k."""
    names = [*(f"level{i}" for i in range(len(sizes) - 1)), "leaf"]
    selects = [*(Select(beam=beam) for beam in beams), top(k)]
    levels = [
        Level(
            name=name,
            within=names[i - 1] if i else None,
            partition=Tokens() if size == 1 else blocks(size),
            pool=None if size == 1 else Pool(keys="max"),
            score=Score(form="dot", scale="none", share="all", reduce="sum"),
            select=select,
        )
        for i, (name, size, select) in enumerate(zip(names, sizes, selects, strict=True))
    ]
    return make("chain", levels, [SELECTED], **more)


def on_line(spec: Spec, keys: list[float]) -> dict[str, list[int]]:
    """What the last row selects where q . k of token s is keys[s], whatever the head."""
    x = random_tensors(spec, len(keys), len(keys))
    x["q"] = torch.zeros_like(x["q"])
    x["q"][..., 0] = 0.25  # four heads, summed
    x["k"][..., 0] = torch.tensor(keys, dtype=torch.float64)[:, None]
    found = reference(spec, x).selection
    picked = {name: chosen.indices[0, -1, 0].tolist() for name, chosen in found.items()}
    return {name: [e for e in row if e >= 0] for name, row in picked.items()}


# Sixteen keys.  By blocks of 8 the best are 9 and 7, of 4: 7 3 5 9, of 2: 7 1 3 2 5 4 0 9.
KEYS = [7, 0, 1, 0, 3, 2, 2, 0, 5, 4, 4, 1, 0, 0, 9, 8]


@pytest.mark.parametrize(
    ("beams", "k", "expected"),
    [
        # one block of 8 is expanded, the one with the 9: of its two blocks of 4 again the later
        ([1, 1, 1], 2, {"level0": [1], "level1": [3], "level2": [7], "leaf": [14, 15]}),
        # two blocks of 4 survive inside it: 5 and 9; then blocks of 2 with 5 and 9
        ([1, 2, 2], 3, {"level0": [1], "level1": [2, 3], "level2": [4, 7], "leaf": [8, 14, 15]}),
        # both blocks of 8: blocks of 4 with 7 and 9, of 2 with 7 and 9; the third best, 5, is lost
        ([2, 2, 2], 3, {"level0": [0, 1], "level1": [0, 3], "level2": [0, 7], "leaf": [0, 14, 15]}),
        # a beam that narrows late: three blocks of 4 live, two of 2
        ([2, 3, 2], 2, {"level0": [0, 1], "level1": [0, 2, 3], "level2": [0, 7], "leaf": [14, 15]}),
        # more than there are: everything that is inside the beam
        ([1, 1, 9], 9, {"level0": [1], "level1": [3], "level2": [6, 7], "leaf": [12, 13, 14, 15]}),
    ],
)
def test_four_levels_by_hand(beams: list[int], k: int, expected: dict[str, list[int]]) -> None:
    assert on_line(chain([8, 4, 2, 1], beams, k), KEYS) == expected


def test_a_survivor_of_a_lower_level_has_surviving_parents() -> None:
    """The best block of 2 lies in a block of 8 that lost: no later level brings it back."""
    assert on_line(chain([8, 4, 2], [1, 2], 4), [9, 0, 0, 0, 0, 0, 0, 0, *[10] * 8]) == {
        "level0": [1],
        "level1": [2, 3],
        "leaf": [4, 5, 6, 7],
    }


def test_blocks_that_no_row_has_reached_are_not_expanded() -> None:
    """16 tokens, the row stands at 9: of blocks of 8 one is complete, the other is raw by force."""
    force = Force(last=1)
    spec = chain([8, 4, 2], [2, 3], 3)
    levels = tuple(
        level.model_copy(update={"select": level.select.model_copy(update={"force": force})})
        for level in spec.levels
    )
    spec = language.verify(spec.model_copy(update={"levels": levels}))
    assert on_line(spec, KEYS[:10]) == {
        "level0": [0, 1],  # the second is begun, and forced
        "level1": [0, 1, 2],  # of its two blocks of 4 the own one is forced, the other not begun
        "leaf": [0, 2, 4],  # 4 holds the row; of the complete ones those with 7 and 3 are best
    }


def test_a_beam_of_ties_keeps_the_older_at_every_level() -> None:
    assert on_line(chain([8, 4, 2, 1], [1, 1, 1], 1), [1.0] * 16) == {
        "level0": [0],
        "level1": [0],
        "level2": [0],
        "leaf": [0],
    }


# --- an unbounded beam is exhaustive selection


def random_chain(choice: random.Random) -> Spec:
    """Three or four levels of any sizes that nest, any forms, sharing and rules the last may have."""
    depth = choice.choice([3, 4])
    sizes = [choice.choice([1, 1, 2, 3])]
    while len(sizes) < depth:
        sizes.insert(
            0, sizes[0] * choice.choice([1, 2, 3]) if sizes[0] > 1 else choice.choice([2, 3])
        )
    share = choice.choice(["head", "group", "all"])
    reduce = None if share == "head" else choice.choice(["sum", "mean", "max"])
    by_index = choice.random() < 0.3
    levels = []
    for i, size in enumerate(sizes):
        score = Score(form="dot", share=share, reduce=reduce)
        if by_index:
            score = Score(form="relu_weighted", share="all")
        force = Force(first=choice.choice([0, 1]), last=choice.choice([0, 1, 2]))
        last = i == depth - 1
        levels.append(
            Level(
                name="leaf" if last else f"level{i}",
                within=f"level{i - 1}" if i else None,
                partition=Tokens() if size == 1 else blocks(size),
                pool=None if size == 1 else Pool(keys=choice.choice(["mean", "max", "sum_rsqrt"])),
                score=score,
                select=Select(top_k=choice.choice([3, 5]), force=force) if last else None,
            )
        )
    # what is not complete is expanded by force alone, so that every level must reach the own entry
    reach = levels[-1].select.force
    for i, level in enumerate(levels[:-1]):
        own = Force(last=max(1, reach.last), first=reach.first)
        levels[i] = level.model_copy(update={"select": Select(beam=64, force=own)})
    index = Index(heads=3, dim=4) if by_index else None
    return language.verify(
        make("drawn", levels, [SELECTED], index=index, causal=choice.random() < 0.7)
    )


def flat(spec: Spec) -> Spec:
    """The last level alone."""
    leaf = spec.levels[-1].model_copy(update={"within": None})
    return language.verify(spec.model_copy(update={"levels": (leaf,)}))


@pytest.mark.parametrize("seed", range(24))
def test_an_unbounded_beam_is_exhaustive_selection(seed: int) -> None:
    spec = random_chain(random.Random(seed))
    x = random_tensors(spec, 21, 25)
    expected = reference(flat(spec), x)
    found = reference(spec, x)
    assert torch.equal(found.selection["leaf"].indices, expected.selection["leaf"].indices)
    torch.testing.assert_close(found.o, expected.o)
    for graph in (plan(spec), passes.run(plan(spec))):
        drawn = evaluate(graph, x)
        assert torch.equal(drawn.selection["leaf"], expected.selection["leaf"].indices)
        torch.testing.assert_close(drawn.o, expected.o)


@pytest.mark.parametrize("seed", range(12))
def test_narrow_beams_of_three_and_four_levels_are_planned_as_meant(seed: int) -> None:
    choice = random.Random(100 + seed)
    spec = random_chain(choice)
    levels = [
        level.model_copy(
            update={"select": level.select.model_copy(update={"beam": choice.choice([3, 4])})}
        )
        for level in spec.levels[:-1]
    ]
    spec = language.verify(spec.model_copy(update={"levels": (*levels, spec.levels[-1])}))
    x = random_tensors(spec, 21, 25)
    expected, found = reference(spec, x), evaluate(passes.run(plan(spec)), x)
    for name, chosen in expected.selection.items():
        assert torch.equal(found.selection[name], chosen.indices), name
    torch.testing.assert_close(found.o, expected.o)


def test_a_wider_beam_never_recalls_less_at_its_own_level() -> None:
    """Of one level's scores, more survivors hold the fewer: beams nest."""
    x = random_tensors(chain([8, 4, 2], [1, 1], 2), 64, 64)
    kept = [
        reference(chain([8, 4, 2], [b, b], 2), x).selection["level0"].indices for b in (1, 3, 5)
    ]
    for few, many in zip(kept, kept[1:], strict=False):
        rows = zip(few.flatten(0, 2).tolist(), many.flatten(0, 2).tolist(), strict=True)
        assert all(set(a) - {-1} <= set(b) for a, b in rows)


def test_dense_attention_when_every_level_keeps_everything() -> None:
    """The law is derived through all levels: each must reach the own entry."""
    reaching = [
        Level(
            name=name,
            within=within,
            partition=blocks(size),
            pool=MEAN,
            score=DOT,
            select=Select(**{rule: 32}, force=Force(last=1)),
        )
        for name, within, size, rule in (
            ("a", None, 8, "beam"),
            ("b", "a", 4, "beam"),
            ("leaf", "b", 2, "top_k"),
        )
    ]
    spec = make("reaching", reaching, [SELECTED])
    assert laws(plan(spec)).dense_when_all_selected
    dense = make("dense", [], [Attend(name="selected", window="all")])
    x = random_tensors(spec, 30, 30)
    torch.testing.assert_close(reference(spec, x).o, reference(dense, x).o)
    blind = [reaching[0], reaching[1].model_copy(update={"select": Select(beam=32)}), reaching[2]]
    assert not laws(plan(make("blind", blind, [SELECTED]))).dense_when_all_selected
