"""Renders a result (the value of ``run_all``, or its JSON) as tables and figures."""

from pathlib import Path
from typing import Any

from ..engine.extras import require_matplotlib
from . import forward
from .step import PARTS
from .tables import amount, table

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """Returns the result's tables in Markdown."""
    sections = [_heading(result), *map(_kernel_section, result["kernels"]), *map(_step_section, result["steps"])]
    sections += map(forward.markdown, result.get("forwards", []))
    return "\n\n".join(sections) + "\n"


def _heading(result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"`{result['command']}` on {machine['device']}, {machine['threads']} CPU threads, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}, commit {result['commit'][:7]}, "
        f"{result['date']}. Times are ratios within one repetition: median (20th to 80th percentile)."
    )


def _kernel_section(case: dict[str, Any]) -> str:
    """Returns the table of the weight passes of one model."""
    bandwidth = case["copy_bytes_per_second"]
    on_gpu = case["empty_launch_seconds"] is not None
    lines: list[list[str]] = []
    for row in case["rows"]:
        if "failed" in row:
            lines.append(
                [row["row"], _density(row["density"]), f"no numbers: {row['failed']}"] + [""] * (6 if on_gpu else 5)
            )
            continue
        share = row["bytes"]["perturb"] / row["seconds"]["perturb"]["median"] / bandwidth
        host = [f"{row['host_seconds']['perturb']['median'] * 1e6:.3g}"] if on_gpu else []
        lines.append([
            row["row"],
            _density(row["density"]),
            _spread(row["ratio"]["perturb"]) if "ratio" in row else "",
            _spread(row["ratio"]["step"]) if "ratio" in row else "",
            amount(row["bytes"]["perturb"]),
            f"{share:.1%}",
            amount(row["held_bytes"] + row["peak_bytes"]),
            amount(sum(row["normals"].values()), ""),
            *host,
        ])  # fmt: skip
    columns = ["row", "density", "perturb", "all passes of a step", "perturb must move", "of copy bandwidth",
               "memory beside the weights", "normals drawn a step",
               *(["host, us a perturbation"] if on_gpu else [])]  # fmt: skip
    title = (
        f"**{case['model']}**, {case['elements']:,} elements, {case['dtype']}; times over those of this engine at "
        f"density {_density(case['base_density'])}, over cold caches:"
    )
    return f"{title}\n\n{table(columns, lines)}"


def _step_section(case: dict[str, Any]) -> str:
    """Returns the tables of a step of one model."""
    lines = []
    for row in case["rows"]:
        if "failed" in row:
            lines.append([row["row"], _density(row["density"]), f"no numbers: {row['failed']}", "", "", ""])
            continue
        share = {part: row["share"][part]["median"] for part in PARTS}
        lines.append([
            row["row"],
            _density(row["density"]),
            _spread(row["over_forwards"]),
            f"{share['forward'] + share['second forward']:.1%}",
            f"{share['perturb'] + share['flip']:.1%}",
            f"{share['update']:.1%}",
        ])  # fmt: skip
    batch, length = case["batch"]
    title = f"**A step on {case['model']}**, {case['dtype']}, batch of {batch} x {length} tokens:"
    columns = ["row", "density", "step over its forwards", "forwards", "perturb and flip", "update"]
    optimizer = (
        "`SparseZO.step` itself, with its seeds, scalars and checks: "
        f"{_spread(case['optimizer']['over_forwards'])} of the two forwards in it."
    )
    return f"{title}\n\n{table(columns, lines)}\n\n{optimizer}\n\n{_one_pass_section(case)}"


def _one_pass_section(case: dict[str, Any]) -> str:
    """Returns the table that compares many steps in one pass with one pass per step."""
    passes = case["one_pass"]
    if "failed" in passes:
        return f"Many steps in one pass: no numbers: {passes['failed']}"
    lines = [
        [operation, way, _spread(measured["ratio"])]
        for operation in ("replay", "inner")
        for way, measured in passes[operation].items()
    ]
    title = f"{passes['steps']:,} steps over {passes['elements']:,} masked elements, times over those of one pass:"
    return f"{title}\n\n{table(['operation', 'way', 'time'], lines)}"


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['p20']:.3g} to {spread['p80']:.3g})"


def _density(density: float) -> str:
    return f"{density:g}" if density < 1 else "dense"


def draw(result: Result, directory: Path) -> list[Path]:
    """Writes the figures as PNG files.

    Args:
        result: the measured result.
        directory: an existing directory.

    Returns:
        The paths of the files.
    """
    require_matplotlib()
    paths = []
    if result["kernels"]:
        paths += [_draw_density(result, directory), _draw_size(result, directory)]
    if result["steps"]:
        paths.append(_draw_share(result, directory))
    return paths


def _time_in_copies(case: dict[str, Any], row: dict[str, Any], key: str = "median") -> float:
    """Returns the time of a perturbation divided by that of copying the weights once."""
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[case["dtype"]]
    copy = 2 * case["elements"] * itemsize / case["copy_bytes_per_second"]
    return float(row["seconds"]["perturb"][key] / copy)


def _measured_rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows whose check passed."""
    return [row for row in case["rows"] if "failed" not in row]


def _draw_density(result: Result, directory: Path) -> Path:
    """Draws the time of a perturbation against density, for the largest model."""
    from matplotlib import pyplot

    case = max(result["kernels"], key=lambda case: case["elements"])
    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    rows = _measured_rows(case)
    densities = sorted({row["density"] for row in rows if row["density"] < 1})
    for i, name in enumerate(dict.fromkeys(row["row"] for row in rows)):
        points = sorted((row for row in rows if row["row"] == name), key=lambda row: row["density"])
        x = [row["density"] for row in points]
        if len(points) == 1:  # measured at one density: drawn as a horizontal line
            points, x = points * 2, [densities[0], densities[-1]]
        style = "-" if name.startswith("meerkat") else "--"
        axes.plot(
            x,
            [_time_in_copies(case, row) for row in points],
            style,
            marker="o",
            markersize=3,
            color=f"C{i}",
            label=name,
        )
        axes.fill_between(
            x,
            [_time_in_copies(case, row, "p20") for row in points],
            [_time_in_copies(case, row, "p80") for row in points],
            alpha=0.2,
            color=f"C{i}",
        )
    axes.set(xscale="log", yscale="log", xlabel="density of the mask")
    axes.set(ylabel="time of a perturbation, in copies of the weights")
    axes.set_title(f"{case['model']}, {case['dtype']}, {result['machine']['device']}")
    return _save(figure, axes, directory / "density.png")


def _draw_size(result: Result, directory: Path) -> Path:
    """Draws the time of a perturbation against the number of elements, for all models of one dtype."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    dtype = result["kernels"][0]["dtype"]
    cases = sorted((c for c in result["kernels"] if c["dtype"] == dtype), key=lambda c: c["elements"])
    base = cases[0]["base_density"]
    points: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for row in _measured_rows(case):
            if row["density"] in (1.0, base):
                points.setdefault(row["row"], []).append((case["elements"], row["seconds"]["perturb"]["median"]))
    for i, (name, line) in enumerate(points.items()):
        x, y = zip(*line, strict=True)
        style = "-" if name.startswith("meerkat") else "--"
        axes.plot(x, y, style, marker="o", markersize=3, color=f"C{i}", label=name)
    axes.set(xscale="log", yscale="log", xlabel="elements of the model")
    axes.set(ylabel="time of a perturbation, seconds on this machine")
    axes.set_title(f"density {base:g}, {dtype}, {result['machine']['device']}")
    return _save(figure, axes, directory / "size.png")


def _draw_share(result: Result, directory: Path) -> Path:
    """Draws the share of each part in the time of a step, one bar per model and row."""
    from matplotlib import pyplot

    bars = [(case, row) for case in result["steps"] for row in _measured_rows(case)][::-1]
    figure, axes = pyplot.subplots(figsize=(7.5, 1 + 0.35 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    colors = {"perturb": "C3", "forward": "0.75", "flip": "C1", "second forward": "0.85", "update": "C0"}
    for part in PARTS:
        width = [row["share"][part]["median"] for _, row in bars]
        axes.barh(range(len(bars)), width, left=left, color=colors[part], label=part)
        left = [a + b for a, b in zip(left, width, strict=True)]
    names = [f"{case['model']}: {row['row']}" for case, row in bars]
    axes.set(yticks=range(len(bars)), yticklabels=names, xlim=(0, max(1.0, *left)), xlabel="share of the step's time")
    axes.set_title(result["machine"]["device"])
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize="small")
    path = directory / "step.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _save(figure: Any, axes: Any, path: Path) -> Path:
    """Adds a grid and a legend, writes the figure and closes it."""
    from matplotlib import pyplot

    axes.grid(visible=True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


__all__ = ["Result", "draw", "markdown"]
