"""Draws the figures of a report as PNG data URIs, once for light and once for dark pages."""

import base64
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .runs import MEASURES

_COLORS = {"light": ("white", "#1b1f24"), "dark": ("#16191d", "#e4e7ea")}
_WINDOW = 10  # number of steps of the moving mean
_LEAST_SPAN = 0.2  # of a y axis, as a share of its largest value


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        light: data URI for light pages.
        dark: data URI for dark pages.
        alt: text that describes the figure.
    """

    light: str
    dark: str
    alt: str


@dataclass(frozen=True)
class Curve:
    """A line of a panel.

    Args:
        name: name in the legend.
        x: x values.
        y: y values, as many.
    """

    name: str
    x: list[float]
    y: list[float]


def draw_curves(panels: Mapping[str, list[Curve]], x_label: str, alt: str, *, x_in_bytes: bool = False) -> Picture:
    """Draws panels below each other, with one curve a run. Small changes stay small: see ``_LEAST_SPAN``.

    Args:
        panels: {label of the y axis: curves}. Curves of the same name have the same colour in all panels.
        x_label: label of the shared x axis.
        alt: text that describes the figure.
        x_in_bytes: whether x is in bytes. The axis begins at 0; above the first bytes it is logarithmic if one curve is
            ten times as long as another.
    """
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator, SymmetricalLogLocator

        rows = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
        handles = {}
        for axes, (label, curves) in zip(rows, panels.items(), strict=True):
            for curve in curves:
                i = names.index(curve.name)
                (handles[i],) = axes.plot(
                    curve.x,
                    curve.y,
                    ["-", "--", ":", "-."][i // 10 % 4],
                    color=f"C{i % 10}",
                    marker="o",
                    markersize=3,
                )
            axes.set_ylabel(label)
            widen(axes)
            axes.grid(visible=True, alpha=0.3)
        if x_in_bytes:
            if (first := _first_of_unequal(panels)) is None:
                rows[-1].xaxis.set_major_locator(MaxNLocator(5))
            else:
                rows[-1].set_xscale("symlog", linthresh=first)
                rows[-1].xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=first))
            rows[-1].xaxis.set_major_formatter(EngFormatter(unit="B"))
            rows[-1].set_xlim(left=0)
        else:
            rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        rows[-1].set_xlabel(x_label)
        _legend(figure, [handles[i] for i in sorted(handles)], [names[i] for i in sorted(handles)])

    return _picture((6.4, 0.8 + 2.1 * len(panels) + 0.2 * len(names)), draw, alt)


def draw_histogram(clients: list[str], labels: list[str], counts: list[list[int]], alt: str) -> Picture:
    """Draws the number of examples of each client as a bar, stacked by label.

    Args:
        clients: names of the K clients.
        labels: names of the C labels.
        counts: number of examples by client and label, [K][C].
        alt: text that describes the figure.
    """

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        axes = figure.subplots()
        left = np.zeros(len(clients))
        bars = []
        for i, column in enumerate(np.array(counts).T):
            color = f"C{i}" if len(labels) <= 10 else colormaps["turbo"]((i + 0.5) / len(labels))
            bars.append(axes.barh(range(len(clients)), column, left=left, color=color))
            left += column
        axes.set_yticks(range(len(clients)), [_short(client, 30) for client in clients])
        axes.set_ylim(len(clients) - 0.4, -0.6)  # the first at the top
        axes.set(xlabel="examples", ylabel="client")
        axes.grid(visible=True, axis="x", alpha=0.3)
        _legend(figure, bars, labels)

    return _picture((6.4, 1.2 + 0.22 * len(clients) + 0.2 * len(labels) / 2), draw, alt)


def draw_paths(paths: Mapping[str, Mapping[str, list[float]]], stopped: set[str], x_label: str, alt: str) -> Picture:
    """Draws |GradIP|, gradient norm and cosine of each client along its path, as moving means.

    The cosine keeps its sign, because its absolute value is the same for all clients, which share the perturbations.

    Args:
        paths: {client: {measure: one value a step}}.
        stopped: clients that were stopped early; they get another colour.
        x_label: label of the x axis.
        alt: text that describes the figure.
    """
    titles = dict(zip(MEASURES, ("|GradIP|", "gradient norm", "cosine"), strict=True))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogFormatter, MaxNLocator

        groups: dict[str, Any] = {}
        for axes, (measure, title) in zip(figure.subplots(len(titles), sharex=True), titles.items(), strict=True):
            # stopped clients are drawn last, on top of the others
            for client in sorted(paths, key=lambda client: client in stopped):
                values = np.array(paths[client][measure], dtype=float)
                mean = _moving_mean(values if measure == "cosine" else np.abs(values))
                steps = np.arange(len(mean)) + len(paths[client][measure]) - len(mean) + 1
                group, color = ("stopped clients", "C3") if client in stopped else ("clients not stopped", "C0")
                (line,) = axes.plot(steps, mean, color=color, linewidth=1, alpha=1 if client in stopped else 0.6)
                groups.setdefault(group, line)
            has_nonzero = any(value for path in paths.values() for value in path[measure])  # a log axis needs one
            if has_nonzero and measure != "cosine":
                axes.set_yscale("log", nonpositive="mask")
                axes.yaxis.set_major_formatter(LogFormatter())
                axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            axes.set_ylabel(title)
            axes.grid(visible=True, alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        _legend(figure, list(groups.values()), list(groups))

    return _picture((6.4, 7.0), draw, alt)


def _moving_mean(values: Any) -> Any:
    """Mean over windows of 10 values; of all values if there are fewer."""
    window = min(_WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid") if window else values


def _first_of_unequal(panels: Mapping[str, list[Curve]]) -> float | None:
    """The smallest x above 0 if one curve is ten times as long as another, else None."""
    curves = [curve for curves in panels.values() for curve in curves]
    positive = [x for curve in curves for x in curve.x if x > 0]
    lengths = [curve.x[-1] for curve in curves if curve.x[-1] > 0]
    return min(positive) if lengths and max(lengths) >= 10 * min(lengths) else None


def widen(axes: Any) -> None:
    """Gives the y axis at least ``_LEAST_SPAN`` of the largest value, so that noise does not look like a result."""
    low, high = axes.get_ylim()
    missing = _LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)


def _legend(figure: Any, handles: list[Any], names: list[str]) -> None:
    # matplotlib leaves names that start with an underscore out of a legend; a zero-width space in front prevents that
    shown = ["\u200b" + _short(name, 60) for name in names]
    columns = 2 if max(map(len, shown), default=0) <= 30 else 1
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, fontsize="small")


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[-length + 1 :]


def _picture(size: tuple[float, float], draw: Callable[[Any], None], alt: str) -> Picture:
    return Picture(_png(size, draw, *_COLORS["light"]), _png(size, draw, *_COLORS["dark"]), alt)


def _png(size: tuple[float, float], draw: Callable[[Any], None], background: str, ink: str) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {f"{name}.facecolor": background for name in ("figure", "axes", "savefig")}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    settings["text.parse_math"] = False  # names from files may hold dollar signs
    file = io.BytesIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        # characters missing in the font become boxes; the page has the names as text too
        warnings.filterwarnings("ignore", message="Glyph ")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="png", dpi=144)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


__all__ = ["Curve", "Picture", "draw_curves", "draw_histogram", "draw_paths", "widen"]
