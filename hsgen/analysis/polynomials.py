"""Costs as functions of the number of tokens, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial:
    """t2 * T^2 + t1 * T + t0, and terms of other powers: (power, factor)."""

    t2: float = 0.0
    t1: float = 0.0
    t0: float = 0.0
    others: tuple[tuple[float, float], ...] = ()

    def __add__(self, other: Polynomial) -> Polynomial:
        powers = sorted({power for power, _ in (*self.others, *other.others)})
        sums = [
            sum(factor for at, factor in (*self.others, *other.others) if at == power)
            for power in powers
        ]
        return Polynomial(
            t2=self.t2 + other.t2,
            t1=self.t1 + other.t1,
            t0=self.t0 + other.t0,
            others=tuple(zip(powers, sums, strict=True)),
        )

    def __mul__(self, factor: float) -> Polynomial:
        return Polynomial(
            t2=self.t2 * factor,
            t1=self.t1 * factor,
            t0=self.t0 * factor,
            others=tuple((power, one * factor) for power, one in self.others),
        )

    def evaluate(self, tokens: int) -> float:
        whole = (self.t2 * tokens + self.t1) * tokens + self.t0
        return whole + sum(factor * tokens**power for power, factor in self.others)

    def __str__(self) -> str:
        powers = {2.0: self.t2, 1.0: self.t1, 0.0: self.t0} | dict(self.others)
        names = {2.0: " T^2", 1.0: " T", 0.0: ""}
        terms = [
            (factor, names.get(power, f" T^{power:.4g}"))
            for power, factor in sorted(powers.items(), reverse=True)
        ]
        shown = [
            f"{value:+}"[0] + f" {quantity(abs(value))}{power}" for value, power in terms if value
        ]
        text = " ".join(shown)
        return text.removeprefix("+ ") or "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A count as a function of T: each piece holds from its start on, to the start of the next."""

    pieces: tuple[tuple[int, Polynomial], ...] = ((0, Polynomial()),)

    def __add__(self, other: Cost) -> Cost:
        starts = sorted({start for start, _ in (*self.pieces, *other.pieces)})
        return Cost(pieces=tuple((start, self._at(start) + other._at(start)) for start in starts))

    def __mul__(self, factor: float) -> Cost:
        return Cost(pieces=tuple((start, piece * factor) for start, piece in self.pieces))

    def _at(self, tokens: int) -> Polynomial:
        return [piece for start, piece in self.pieces if start <= tokens][-1]

    @property
    def start(self) -> int:
        """The T from which on the count is the polynomial that prints."""
        return self.pieces[-1][0]

    def evaluate(self, tokens: int) -> float:
        return self._at(tokens).evaluate(tokens)

    def __str__(self) -> str:
        return str(self.pieces[-1][1])


ZERO = Cost()


def piece_from(start: int, piece: Polynomial) -> Cost:
    """Nothing below `start`."""
    return Cost(pieces=((0, piece),) if start == 0 else ((0, Polynomial()), (start, piece)))


def quantity(value: float) -> str:
    """Three digits and a unit prefix: 1.57M."""
    for prefix in ("", "K", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}E"
