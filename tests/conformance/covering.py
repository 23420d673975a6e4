"""A covering array: few cases in which every pair of settings of two factors occurs."""

from itertools import combinations


def pairwise(factors, forbidden=lambda case: False):
    """Rows that cover every pair of levels.

    Args:
        factors: {name: levels}.
        forbidden: says of a whole row that it makes no sense; its pairs are then met elsewhere.

    Returns:
        Dictionaries, always the same ones for the same factors.
    """
    names = list(factors)
    wanted = {
        (a, x, b, y)
        for a, b in combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    rows = []
    while wanted:
        row = _best_row(factors, names, wanted, len(rows), forbidden)
        met = wanted & _pairs(row, names)
        if not met:
            break  # what is left is forbidden
        wanted -= met
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _best_row(factors, names, wanted, turn, forbidden):
    """Start from each pair that is still wanted, and add whatever meets most of the others."""
    best, most = {}, -1
    for seed in sorted(wanted)[:24]:
        row = {seed[0]: seed[1], seed[2]: seed[3]}
        rest = [name for name in names if name not in row]
        rest = rest[turn % len(rest) :] + rest[: turn % len(rest)]
        for name in rest:
            row[name] = max(
                range(len(factors[name])),
                key=lambda level, name=name: len(wanted & _pairs(row | {name: level}, names)),
            )
        met = len(wanted & _pairs(row, names))
        named = {name: factors[name][row[name]] for name in names}
        if met > most and not forbidden(named):
            best, most = row, met
    return best


def _pairs(row, names):
    """The pairs that a row, perhaps unfinished, meets."""
    known = [name for name in names if name in row]
    return {(a, row[a], b, row[b]) for a, b in combinations(known, 2)}
