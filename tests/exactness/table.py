"""Owns the table of what was measured: for the terminal in full, for a README in short."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exactness.cases import DTYPES, FLOAT32_FACTOR, FLOAT64_BOUND, Size
from exactness.compare import Comparison


@dataclass(frozen=True)
class Row:
    """One comparison with plain Keras."""

    feature: str
    world_size: int
    size: Size
    dtype: str
    found: Comparison


SHOWN = ("weights", "history")


def full(rows: Sequence[Row]) -> str:
    """One line for each feature and size: the largest difference for each N and dtype, and the bound."""
    worlds = sorted({row.world_size for row in rows})
    head = f"{'feature':<30}{'rows/batch':>11} "
    head += "".join(f"|{f'{group} {dtype}':^{8 * len(worlds) + 9}}" for dtype in DTYPES for group in SHOWN)
    names = "".join(f"{f'N={n}':>8}" for n in worlds) + f"{'bound':>8} "
    lines = [head, " " * 42 + ("|" + names) * (len(DTYPES) * len(SHOWN))]
    grouped: dict[tuple[str, Size], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.feature, row.size].append(row)
    for (feature, size), members in grouped.items():
        line = f"{feature:<30}{size!s:>11} "
        for dtype in DTYPES:
            for group in SHOWN:
                found = {row.world_size: row.found for row in members if row.dtype == dtype}
                cells = [_number(found[n].differences[group]) if n in found else "" for n in worlds]
                bound = _number(next(iter(found.values())).bounds[group]) if found else ""
                line += "|" + "".join(f"{cell:>8}" for cell in [*cells, bound]) + " "
        lines.append(line.rstrip())
    return "\n".join(lines)


def short(rows: Sequence[Row]) -> str:
    """Markdown: one line for each feature, the largest difference over all N and sizes."""
    lines = [
        "| Feature | N | rows/batch | float64: weights | history | float32: weights | of the bound |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for feature in dict.fromkeys(row.feature for row in rows):
        members = [row for row in rows if row.feature == feature]
        by_dtype = {dtype: [row for row in members if row.dtype == dtype] for dtype in DTYPES}
        sizes = list(dict.fromkeys(str(row.size) for row in members))
        cells = [
            feature.replace("_", " "),
            _span({row.world_size for row in members}),
            sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes",
            _largest(by_dtype["float64"], "weights"),
            _largest(by_dtype["float64"], "history"),
            _largest(by_dtype["float32"], "weights"),
            _part_of_bound(by_dtype["float32"], "weights"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Bounds: float64 {FLOAT64_BOUND:g}; float32 {FLOAT32_FACTOR:g} times what plain Keras differs from itself"
        " with the rows inside each mini-batch permuted and, at 8 sizes, with each mini-batch computed in 2 and in 3"
        " parts (0 where that is 0; a history also has that many units in the last place). Adam runs in float32 with"
        " epsilon=1e-3.",
    ]
    return "\n".join(lines) + "\n"


def _largest(rows: Iterable[Row], group: str) -> str:
    values = [row.found.differences[group] for row in rows]
    return _number(max(values)) if values else ""


def _part_of_bound(rows: Iterable[Row], group: str) -> str:
    parts = [
        row.found.differences[group] / row.found.bounds[group] if row.found.bounds[group] else 0.0
        for row in rows
        if row.found.differences[group] or row.found.bounds[group]
    ]
    return f"{max(parts):.0%}" if parts else ""


def _span(worlds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(worlds)))


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"
