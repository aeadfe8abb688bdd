"""A figure of an experiment's results, as PNG: points with their 95 % intervals, chance dashed, trained bands shaded.

    python -m evals.figures runs/experiments/overlay.json               overlay.png
    python -m evals.figures --markdown runs/experiments/overlay.json    a table, with intervals

Needs matplotlib (requirements-figures.txt), which nothing else here does.
"""

import json
import sys
from pathlib import Path

from commandline import Parser, run


def read(path: Path) -> dict:
    """An experiment's results. ValueError: the file holds none."""
    try:
        said = json.loads(path.read_text())
    except (ValueError, RecursionError):
        said = None
    number = (int, float)
    needed = {"series": str, "x": (str, *number), "accuracy": number, "low": number, "high": number, "chance": number}
    rows = said.get("rows") if isinstance(said, dict) and said.keys() >= {"experiment", "model"} else None
    if not isinstance(rows, list) or not rows or not all(
        isinstance(row, dict) and isinstance(row.get(key), kind) for row in rows for key, kind in needed.items()
    ):
        raise ValueError(f"{path} holds no results; expected what evals.experiments has written, such as overlay.json")
    return said


def draw(path: Path) -> Path | None:
    """Beside results.json its figure; None, and a line that says so, where there is no matplotlib."""
    said = read(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: matplotlib is not here (pip install -r requirements-figures.txt)", file=sys.stderr)
        return None
    groups = panels(said["rows"])
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    wide = 9 if columns == 1 else 4.2 * columns
    figure = Figure(figsize=(wide, 0.5 + (4.5 if columns == 1 else 3 * lines)), layout="constrained")
    for k, panel in enumerate(groups, 1):
        _panel(figure.add_subplot(lines, columns, k), panel)
    figure.suptitle(f"{said['experiment']}: {said.get('measure', 'exact answers')}, in percent (model {said['model']})")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    return path.with_suffix(".png")


def panels(rows: list[dict]) -> list[dict[str, list[dict]]]:
    """Series, by their names, that share a panel: those with the same values of x and the same chance, without units."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["series"], []).append(row)
    found: dict[tuple, dict[str, list[dict]]] = {}
    for series, some in groups.items():
        alone = "unit" in some[0]
        found.setdefault(series if alone else tuple((row["x"], row["chance"]) for row in some), {})[series] = some
    return list(found.values())


def _panel(axes, panel: dict[str, list[dict]]) -> None:
    for k, (series, rows) in enumerate(panel.items()):
        named = isinstance(rows[0]["x"], str)
        shift = 0.8 * ((k + 0.5) / len(panel) - 0.5) if named else 0.0
        xs = [i + shift if named else row["x"] for i, row in enumerate(rows)]
        ys = [row["accuracy"] for row in rows]
        bars = [[y - row["low"] for y, row in zip(ys, rows)], [row["high"] - y for y, row in zip(ys, rows)]]
        style = {"color": f"C{k}" if k < 10 else f"{(k - 9) / 4}", "markersize": 3, "linewidth": 1, "capsize": 2}
        axes.errorbar(xs, ys, bars, fmt="o" if named else "o-", label=series, **style)
        inside = [x for x, row in zip(xs, rows) if row.get("trained")]
        if inside:
            for low, high in [(x - 0.4, x + 0.4) for x in inside] if named else [(min(inside), max(inside))]:
                axes.axvspan(low, high, color="0.9", zorder=0)
    rows = next(iter(panel.values()))  # all series of a panel have the same chance
    xs = range(len(rows)) if named else [row["x"] for row in rows]
    axes.plot(xs, [row["chance"] for row in rows], "--", color="0.5", linewidth=1, label="chance")
    if named:
        axes.set_xticks(range(len(rows)), [row["x"] for row in rows], rotation=40, ha="right", fontsize=7)
    axes.set_ylim(0, 103)
    axes.set_xlabel(rows[0].get("unit", ""), fontsize=7)
    if len(panel) > 1:
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.set_title(next(iter(panel)), fontsize=9)


def markdown(path: Path) -> str:
    """The same as tables, a line a series."""
    tables = []
    for panel in panels(read(path)["rows"]):
        rows = next(iter(panel.values()))
        lines = [["", *(str(row["x"]) for row in rows)], ["---"] * (1 + len(rows))]
        for series, some in panel.items():
            lines.append([series, *("{accuracy:.1f} ({low:.1f} to {high:.1f})".format(**row) for row in some)])
        lines.append(["chance", *(f"{row['chance']:.1f}" for row in rows)])
        tables.append("\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines))
    return "\n\n".join(tables)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m evals.figures", description="Figures, or tables, of results.")
    parser.add_argument("results", type=Path, nargs="+", help="what evals.experiments has written")
    parser.add_argument("--markdown", action="store_true", help="print tables instead")
    args = parser.parse_args(argv)
    for path in args.results:
        if not path.is_file():
            raise ValueError(f"no file {path}; expected what evals.experiments has written")
        if args.markdown:
            print(markdown(path))
        elif figure := draw(path):
            print(figure)
        else:
            sys.exit(2)


if __name__ == "__main__":
    sys.exit(run(main))
