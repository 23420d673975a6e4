"""Two records of one key into one: which of them wins, and what is left of the other."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from hsgen.tuned.records import MAX_ALTERNATES, Alternate, Tuned, dump

LEAST_GAIN = 0.01


def merge(records: Iterable[Tuned]) -> tuple[Tuned, ...]:
    """One record a key, sorted; the order in which they come changes nothing."""
    by_key = dict[str, list[Tuned]]()
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    # newest first, equal ones in the order of their text
    merged = [
        functools.reduce(merged_pair, sorted(sorted(held, key=dump), key=_date, reverse=True))
        for held in by_key.values()
    ]
    return tuple(sorted(merged, key=lambda record: record.place))


def merged_pair(a: Tuned, b: Tuned) -> Tuned:
    """One record of two with the same key.

    The faster wins if both were timed with the same versions, and the gap exceeds the noise; else the
    newer does, whose kernels are more likely those of today.  The loser is an alternate of the winner
    where it is of the same kernels.
    """
    assert a.key == b.key, "records of different keys do not merge"
    winner, loser = (a, b) if _wins(a, b) else (b, a)
    if _texts(winner) != _texts(loser):
        return winner
    scale = loser.time.median_us / winner.time.median_us
    others = [
        *winner.alternates,
        Alternate(kernels=loser.configs, ratio=scale, orders=loser.orders),
        *(replace(each, ratio=each.ratio * scale) for each in loser.alternates),
    ]
    return replace(winner, alternates=_best(winner, others))


def _wins(a: Tuned, b: Tuned) -> bool:
    if _comparable(a, b):
        fast, slow = sorted((a.time.median_us, b.time.median_us))
        noise = max(LEAST_GAIN, 2 * max(a.time.noise, b.time.noise))
        if slow / fast - 1 > noise:
            return a.time.median_us == fast
    if _date(a) != _date(b):
        return _date(a) > _date(b)
    return (a.time.median_us, dump(a)) <= (b.time.median_us, dump(b))


def _comparable(a: Tuned, b: Tuned) -> bool:
    versions = [(p.torch, p.cuda, p.driver) for p in (a.provenance, b.provenance)]
    return versions[0] == versions[1] and _texts(a) == _texts(b)


def _date(record: Tuned) -> str:
    return record.provenance.date


def _texts(record: Tuned) -> Mapping[str, str]:
    """By kernel; of records with other orders the kernels differ too."""
    return {name: choice.text for name, choice in record.kernels.items()}


def _best(winner: Tuned, others: Iterable[Alternate]) -> tuple[Alternate, ...]:
    """The fastest that differ from each other and from the winner."""
    seen = {_words(winner.configs, winner.orders)}
    best = list[Alternate]()
    for each in sorted(others, key=lambda one: (one.ratio, _words(one.kernels, one.orders))):
        words = _words(each.kernels, each.orders)
        if words not in seen:
            seen.add(words)
            best.append(each)
    return tuple(best[:MAX_ALTERNATES])


def _words(configs: Mapping[str, Mapping[str, int]], orders: Mapping[str, str]) -> str:
    return json.dumps([{k: dict(v) for k, v in configs.items()}, dict(orders)], sort_keys=True)
