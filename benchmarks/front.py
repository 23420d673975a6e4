"""The README's table: ten systems beside the best that can be run, on one card, of one date.  Needs no GPU.

    python -m benchmarks.headline      # writes it, with docs/headline.md

Eight are of `benchmarks.speed --systems ...`, kept as speed_ten_CARD_DATE.json; two of
`benchmarks.peers_speed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from benchmarks import common, peer_kernels, speed_report
from hsgen.quality import Json
from hsgen.spec import load

SPEED, PEERS = "speed_ten_", "peers_"  # how files of results begin
SYSTEMS = ("nsa", "moba", "flash_moba", "infllm_v2", "minimax_m3", "quest", "hisa", "dsa_gqa")
BESIDE_AUTHORS = ("nsa_xunhao", "nsa_fla")  # their kernels run at heads of 128, without a window
PLACE = re.compile(r"(<!-- speed:begin -->\n).*(<!-- speed:end -->\n)", re.DOTALL)

TEXT = """One {card}, {date}, forward, bf16, one causal sequence of real heads repeated to length,
milliseconds of whole calls, choosing included; each output was held against the reference before it was
timed.  In brackets: the fastest other that ran there over ours, dense attention or somebody else's kernel of
the same system.  All of it: [docs/speed.md](docs/speed.md), [docs/peers.md](docs/peers.md).  What authors
claim beside what is measured here: [docs/headline.md](docs/headline.md).

"""


class Cell(NamedTuple):
    """One system at one length: ours, and all others by name."""

    tokens: int
    ours: float
    others: Mapping[str, float]

    def __str__(self) -> str:
        name, best = min(self.others.items(), key=lambda each: each[1], default=("", 0.0))
        beside = f"{best / self.ours:.2f}× {name}" if name else "no other ran"
        return f"{common.number(self.ours)} ({beside})"


def table(results: Mapping[str, Json]) -> str:
    """The table with what stands above it, of the newest such run.  results: by the names of their files"""
    speed = max((x for file, x in results.items() if file.startswith(SPEED)), key=_made)
    made, card = _made(speed)
    peers = {
        file: result
        for file, result in results.items()
        if file.startswith(PEERS) and _made(result) == (made, card)
    }
    lengths: list[int] = []
    rows: dict[str, tuple[str, dict[int, Cell]]] = {}
    for system in (*SYSTEMS, *BESIDE_AUTHORS):
        of = peers.values() if system in BESIDE_AUTHORS else (speed,)
        cases = [
            (result, case)
            for result in of
            for case in result["cases"].values()
            if (case["system"], case["inputs"]) == (system, "real")
        ]
        cells = [cell for result, case in cases for cell in _cells(result, case)]
        if cells:
            (query, kv), dims = cases[0][1]["heads"], cases[0][1]["head_dim"]
            dim = "/".join(map(str, dict.fromkeys(dims if isinstance(dims, list) else [dims])))
            rows[system] = f"{query}/{kv} of {dim}", {cell.tokens: cell for cell in cells}
            lengths += [cell.tokens for cell in cells if cell.tokens not in lengths]
    lengths.sort()
    head = ["system", "source", "heads", *(f"{tokens:,}" for tokens in lengths)]
    lines = [
        [system, load(system).source or common.MISSING, heads]
        + [str(cells[tokens]) if tokens in cells else common.MISSING for tokens in lengths]
        for system, (heads, cells) in rows.items()
    ]
    text = TEXT.format(card=card, date=made)
    return text + common.table(head, lines).replace("---:", "---")


def written(readme: str, results: Mapping[str, Json]) -> str:
    """The README with the table in its place."""
    return PLACE.sub(lambda found: found[1] + table(results) + found[2], readme)


def _made(result: Json) -> tuple[str, str]:
    first = result["runs"][0]
    return first["date"], first["card"]


def _cells(result: Json, case: Json) -> Iterator[Cell]:
    """Of a case of either kind: in one ours is `total`, in the other `hsgen whole`."""
    ours = speed_report.milliseconds(case, "total") or speed_report.milliseconds(
        case, "hsgen whole"
    )
    if ours is None:
        return
    others: dict[str, float] = {}
    same = (
        "tokens",
        "heads",
        "head_dim",
    )  # systems of one kind of heads share their dense attention
    for other in result["cases"].values():
        alike = all(other[fact] == case[fact] for fact in same)
        if alike and (dense := speed_report.best_dense(result, other)):
            others[dense["by"].partition(",")[0]] = dense["ms"]["median"]
    for name, peer in peer_kernels.PEERS.items():
        if ms := speed_report.milliseconds(case, f"{name} whole"):
            others[peer.title] = ms
    yield Cell(case["tokens"], ours, others)
