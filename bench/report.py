"""From a result (what ``run_all`` returned, or its JSON) to tables and figures."""

from pathlib import Path
from typing import Any

from ..engine.extras import require_matplotlib
from .step import PARTS
from .tables import amount, table

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """The result's tables."""
    return "\n\n".join([_heading(result), *map(_kernels, result["kernels"]), *map(_step, result["steps"])]) + "\n"


def _heading(result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"`{result['command']}` on {machine['device']}, {machine['threads']} CPU threads, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}, commit {result['commit'][:7]}, "
        f"{result['date']}. Times are ratios within one repetition: median (20th to 80th percentile)."
    )


def _kernels(case: dict[str, Any]) -> str:
    bandwidth = case["copy_bytes_per_second"]
    lines = []
    for r in case["rows"]:
        if "failed" in r:
            lines.append([r["row"], _density(r["density"]), f"no numbers: {r['failed']}", "", "", "", "", ""])
            continue
        share = r["bytes"]["perturb"] / r["seconds"]["perturb"]["median"] / bandwidth
        lines.append([
            r["row"],
            _density(r["density"]),
            _spread(r["ratio"]["perturb"]) if "ratio" in r else "",
            _spread(r["ratio"]["step"]) if "ratio" in r else "",
            amount(r["bytes"]["perturb"]),
            f"{share:.1%}",
            amount(r["held_bytes"] + r["peak_bytes"]),
            amount(sum(r["normals"].values()), ""),
        ])  # fmt: skip
    columns = ["row", "density", "perturb", "all passes of a step", "perturb must move", "of copy bandwidth",
               "memory beside the weights", "normals drawn a step"]  # fmt: skip
    title = (
        f"**{case['model']}**, {case['elements']:,} elements, {case['dtype']}; times over those of this engine at "
        f"density {_density(case['base_density'])}, over cold caches:"
    )
    return f"{title}\n\n{table(columns, lines)}"


def _step(case: dict[str, Any]) -> str:
    lines = []
    for r in case["rows"]:
        if "failed" in r:
            lines.append([r["row"], _density(r["density"]), f"no numbers: {r['failed']}", "", "", ""])
            continue
        share = {part: r["share"][part]["median"] for part in PARTS}
        lines.append([
            r["row"],
            _density(r["density"]),
            _spread(r["over_forwards"]),
            f"{share['forward'] + share['second forward']:.1%}",
            f"{share['perturb'] + share['flip']:.1%}",
            f"{share['update']:.1%}",
        ])  # fmt: skip
    batch, length = case["batch"]
    title = f"**A step on {case['model']}**, {case['dtype']}, batch of {batch} x {length} tokens:"
    columns = ["row", "density", "step over its forwards", "forwards", "perturb and flip", "update"]
    whole = (
        "`SparseZO.step` itself, with its seeds, scalars and checks: "
        f"{_spread(case['optimizer']['over_forwards'])} of the two forwards in it."
    )
    return f"{title}\n\n{table(columns, lines)}\n\n{whole}\n\n{_one_pass(case)}"


def _one_pass(case: dict[str, Any]) -> str:
    passes = case["one_pass"]
    if "failed" in passes:
        return f"Many steps in one pass: no numbers: {passes['failed']}"
    lines = [
        [name, way, _spread(found["ratio"])] for name in ("replay", "inner") for way, found in passes[name].items()
    ]
    title = f"{passes['steps']:,} steps over {passes['elements']:,} masked elements, times over those of one pass:"
    return f"{title}\n\n{table(['operation', 'way', 'time'], lines)}"


def _spread(s: dict[str, float]) -> str:
    return f"{s['median']:.3g} ({s['p20']:.3g} to {s['p80']:.3g})"


def _density(density: float) -> str:
    return f"{density:g}" if density < 1 else "dense"


def draw(result: Result, directory: Path) -> list[Path]:
    """Writes the figures as PNG.

    Args:
        result: what was measured.
        directory: that exists.

    Returns:
        The files.
    """
    require_matplotlib()
    written = []
    if result["kernels"]:
        written += [_draw_density(result, directory), _draw_size(result, directory)]
    if result["steps"]:
        written.append(_draw_share(result, directory))
    return written


def _copies(case: dict[str, Any], row: dict[str, Any], key: str = "median") -> float:
    """Time of a perturbation over that of copying the weights once."""
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[case["dtype"]]
    copy = 2 * case["elements"] * itemsize / case["copy_bytes_per_second"]
    return float(row["seconds"]["perturb"][key] / copy)


def _measured(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in case["rows"] if "failed" not in row]


def _draw_density(result: Result, directory: Path) -> Path:
    from matplotlib import pyplot

    case = max(result["kernels"], key=lambda case: case["elements"])
    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    rows = _measured(case)
    densities = sorted({r["density"] for r in rows if r["density"] < 1})
    for i, name in enumerate(dict.fromkeys(r["row"] for r in rows)):
        mine = sorted((r for r in rows if r["row"] == name), key=lambda r: r["density"])
        x = [r["density"] for r in mine]
        if len(mine) == 1:  # its cost does not depend on the density
            mine, x = mine * 2, [densities[0], densities[-1]]
        style = "-" if name.startswith("meerkat") else "--"
        axes.plot(x, [_copies(case, r) for r in mine], style, marker="o", markersize=3, color=f"C{i}", label=name)
        axes.fill_between(
            x,
            [_copies(case, r, "p20") for r in mine],
            [_copies(case, r, "p80") for r in mine],
            alpha=0.2,
            color=f"C{i}",
        )
    axes.set(xscale="log", yscale="log", xlabel="density of the mask")
    axes.set(ylabel="time of a perturbation, in copies of the weights")
    axes.set_title(f"{case['model']}, {case['dtype']}, {result['machine']['device']}")
    return _finished(figure, axes, directory / "density.png")


def _draw_size(result: Result, directory: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    dtype = result["kernels"][0]["dtype"]
    cases = sorted((c for c in result["kernels"] if c["dtype"] == dtype), key=lambda c: c["elements"])
    base = cases[0]["base_density"]
    points: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for r in _measured(case):
            if r["density"] in (1.0, base):
                points.setdefault(r["row"], []).append((case["elements"], r["seconds"]["perturb"]["median"]))
    for i, (name, found) in enumerate(points.items()):
        x, y = zip(*found, strict=True)
        style = "-" if name.startswith("meerkat") else "--"
        axes.plot(x, y, style, marker="o", markersize=3, color=f"C{i}", label=name)
    axes.set(xscale="log", yscale="log", xlabel="elements of the model")
    axes.set(ylabel="time of a perturbation, seconds on this machine")
    axes.set_title(f"density {base:g}, {dtype}, {result['machine']['device']}")
    return _finished(figure, axes, directory / "size.png")


def _draw_share(result: Result, directory: Path) -> Path:
    from matplotlib import pyplot

    bars = [(case, row) for case in result["steps"] for row in _measured(case)][::-1]
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


def _finished(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.grid(visible=True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


__all__ = ["Result", "draw", "markdown"]
