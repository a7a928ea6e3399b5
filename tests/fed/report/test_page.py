"""Reports: one self-contained HTML page about run directories."""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from meerkat_engine.fed import read_ledger
from meerkat_engine.fed.gradip import Trace
from meerkat_engine.fed.ledger.file import LedgerWriter, RoundRecord
from meerkat_engine.fed.report import page as report
from meerkat_engine.fed.report.figures import Curve, Picture, draw_curves, draw_histogram, draw_paths
from meerkat_engine.fed.run.directory import RunDirectory
from meerkat_engine.fed.run.gradip_file import append_traces

from helpers.command import call, summary_of

SMALL = (
    "--rounds",
    "2",
    "--local-steps",
    "2",
    "--calibration-texts",
    "32",
    "--eval-examples",
    "60",
    "--eval-every",
    "1",
)
VOID = {"meta", "img", "source"}  # tags without an end tag
RED = (0xD6, 0x27, 0x28)  # matplotlib's C3


class Page(HTMLParser):
    """A parsed page: its tags with attributes, its table rows and its text. Fails if the tags are not balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells of the only row of that name."""
        (cells,) = [row[1:] for row in self.rows if row[0] == name]
        return cells

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of a tag."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of a random mask, which has no gradient and so no GradIP."""
    root = tmp_path_factory.mktemp("runs")
    for name, lr in (("slow", "0.01"), ("fast", "0.5")):
        result = call("run", *SMALL, "--method", "random-mask", "--lr", lr, "--output", root / name)
        assert result.exit_code == 0, result.output
    return [root / "slow", root / "fast"]


def copy_of(run: Path, to: Path, **more: Any) -> Path:
    """Copies a run directory and adds fields to its summary."""
    shutil.copytree(run, to)
    lines = (to / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({"summary": summary_of(run) | more})
    (to / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return to


def write_gradip(run: Path, rounds: dict[int, dict[str, list[float]]]) -> None:
    """Writes ``gradip.jsonl``, and a ledger with these rounds.

    To be distinguishable, the norm is ten times GradIP and the cosine a tenth.
    """
    header = read_ledger(run / "ledger.jsonl").header
    terms = replace(header.terms, calibration_steps=2 if 0 in rounds else 0)
    (run / "ledger.jsonl").unlink()
    with RunDirectory(run) as directory, LedgerWriter(run / "ledger.jsonl", replace(header, terms=terms)) as ledger:
        for number, clients in rounds.items():
            scalars = [0.0] * (terms.scalars_per_round if number else 0)
            ledger.append(RoundRecord(round=number, lr=terms.learning_rates(number), scalars=scalars, clients={}))
            traces: dict[Any, Trace] = {
                client: Trace(gradip=values, norm=[10 * v for v in values], cosine=[v / 10 for v in values])
                for client, values in clients.items()
            }
            append_traces(directory, number, traces, ledger.crc)


def pixels(uri: str) -> Any:
    """The colours of a PNG, uint8 [N, 3]."""
    from matplotlib import image

    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return (image.imread(io.BytesIO(base64.b64decode(data)))[..., :3] * 255).round().astype(int).reshape(-1, 3)


def share_of(color: tuple[int, int, int], uri: str) -> float:
    """Share of the pixels that have about this colour."""
    return float((np.abs(pixels(uri) - color).sum(1) < 30).mean())


def test_the_page_of_a_run_shows_its_summary(runs: list[Path], tmp_path: Path) -> None:
    run = copy_of(runs[0], tmp_path / "r")
    result = call("report", run)
    assert result.exit_code == 0, result.output
    assert result.output == f"wrote {run / 'report.html'}\n"
    assert sorted(p.name for p in run.iterdir()) == sorted([*(p.name for p in runs[0].iterdir()), "report.html"])
    page, s = Page(run / "report.html"), summary_of(run)
    assert page.row("accuracy, before → after") == [f"{s['accuracy_before']:.4f} → {s['accuracy_after']:.4f}"]
    assert page.row("macro-F1, before → after") == [f"{s['macro_f1_before']:.4f} → {s['macro_f1_after']:.4f}"]
    assert page.row("trained elements") == ["838 of 83,776"]
    assert page.row("bytes up") == [f"{s['bytes_up']:,}"]
    assert page.row("bytes down") == [f"{s['bytes_down']:,}"]
    assert page.row("bytes of the mask, sent to each client once") == ["6,704"]
    assert page.row("local steps, total") == ["16"]
    assert page.row("share of forward passes in a step") == [f"{s['forward_share_of_step']:.1%}"]
    assert page.row("truncated examples, training and held-out") == ["0 and 0"]
    assert page.row("weights, fingerprint") == [s["weights"][:12]]
    for i, counts in enumerate(s["examples_by_client_and_label"]):
        assert page.row(str(i)) == [str(sum(counts)), *map(str, counts)]
    assert f"meerkat-engine run --config {run}/config.toml --output NEW\nmeerkat-engine replay {run}" in page.text
    for absent in ("state", "stopped clients", "precision, recall"):
        assert absent not in [row[0] for row in page.rows]
    assert "GradIP" not in page.text
    assert "flagged" not in page.text


def test_the_page_is_self_contained_and_accessible(runs: list[Path], tmp_path: Path) -> None:
    assert call("report", *runs, "--output", tmp_path / "r.html").exit_code == 0
    page = Page(tmp_path / "r.html")
    assert not page.attributes("script")
    assert not page.attributes("link")
    assert "url(" not in page.text
    assert "@import" not in page.text
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    images = page.attributes("img")
    assert len(images) == 4  # learning, communication, and the examples of each run
    for image in images:
        assert len(image["alt"] or "") > 40
        assert share_of((255, 255, 255), image["src"] or "") > 0.5
    for source in page.attributes("source"):
        assert source["media"] == "(prefers-color-scheme: dark)"
        assert share_of((255, 255, 255), source["srcset"] or "") < 0.02
    assert len(page.attributes("main")) == 1
    assert all(attributes["scope"] in ("row", "col") for attributes in page.attributes("th"))
    assert len(page.attributes("table")) == len([d for d in page.attributes("div") if d.get("role") == "region"]) - 2


def test_several_runs_are_compared_in_one_page(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("report", *runs).output == "wrote report.html\n"
    page = Page(tmp_path / "report.html")
    assert page.row("run") == ["slow", "fast"]
    assert page.row("learning rate") == ["0.01", "0.5"]
    assert "rounds R" not in [row[0] for row in page.rows]
    assert re.search(r"rounds R\s*2\s", page.text)
    assert "dirichlet(0.5), drawn per class" in page.text
    assert page.row("weights, fingerprint") == [summary_of(run)["weights"][:12] for run in runs]


def test_runs_of_the_same_name_are_shown_by_their_paths(runs: list[Path], tmp_path: Path) -> None:
    other = copy_of(runs[0], tmp_path / "slow")
    assert call("report", runs[0], other, "--output", tmp_path / "r.html").exit_code == 0
    assert Page(tmp_path / "r.html").row("run") == [str(runs[0]), str(other)]


def test_curves_have_the_values_of_the_metrics(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def record(panels: dict[str, list[Curve]], *rest: Any, **more: Any) -> Picture:
        drawn.append(panels)
        return draw_curves(panels, *rest, **more)

    monkeypatch.setattr(report, "draw_curves", record)
    report.write_report(runs, tmp_path / "r.html")
    by_round, by_bytes = drawn
    assert list(by_round) == ["accuracy", "macro-F1", "training loss"]
    for i, run in enumerate(runs):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:-1]
        curve = Curve(run.name, [0, 1, 2], [line["accuracy"] for line in lines])
        assert by_round["accuracy"][i] == curve
        assert by_round["macro-F1"][i].y == [line["macro_f1"] for line in lines]
        assert by_round["training loss"][i] == Curve(run.name, [1, 2], [line["loss"] for line in lines[1:]])
        total = summary_of(run)["bytes_up"] + summary_of(run)["bytes_down"]
        first = lines[1]["bytes_up"] + lines[1]["bytes_down"]
        assert by_bytes["accuracy"][i] == Curve(run.name, [0, first, total], curve.y)  # with the start


@pytest.mark.parametrize(
    ("lengths", "scale"), [([[0, 90, 100]], "linear"), ([[0, 10], [0, 99]], "linear"), ([[0, 10], [0, 100]], "symlog")]
)
def test_bytes_begin_at_zero_and_are_logarithmic_only_if_runs_need_it(
    lengths: list[list[float]], scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    save = Figure.savefig

    def record(figure: Figure, *arguments: Any, **others: Any) -> None:
        save(figure, *arguments, **others)
        seen.append((figure.axes[0].get_xscale(), figure.axes[0].get_xlim()[0]))

    monkeypatch.setattr(Figure, "savefig", record)
    curves = [Curve(str(i), x, [0.5 for _ in x]) for i, x in enumerate(lengths)]
    draw_curves({"accuracy": curves}, "bytes", "alt", x_in_bytes=True)
    assert seen == [(scale, 0)] * 2  # light and dark


def test_small_changes_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve from 0.9925 to 0.9975 is nearly level; one from 0.49 fills the figure."""
    spans = []
    save = Figure.savefig

    def record(figure: Figure, *arguments: Any, **others: Any) -> None:
        save(figure, *arguments, **others)
        low, high = figure.axes[0].get_ylim()
        spans.append(high - low)

    monkeypatch.setattr(Figure, "savefig", record)
    draw_curves({"accuracy": [Curve("a", [0, 1], [0.9925, 0.9975])]}, "round", "alt")
    draw_curves({"accuracy": [Curve("a", [0, 1], [0.49, 0.9975])]}, "round", "alt")
    assert all(0.19 < span < 0.21 for span in spans[:2])
    assert all(0.5 < span < 0.6 for span in spans[2:])


def test_text_from_files_is_escaped(runs: list[Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)<"
    words = ["<script>alert(2)</script>", "_$\\bad$"]
    run = copy_of(
        runs[0],
        tmp_path / evil,
        labels=words,
        natural_clients=["<b>", '"quoted"', "_c", "日本"],
        weights="<i>",
        stopped=["<u>"],
        vp_statistics={"<s>": {"rho_later": "<em>", "rho_quie": 1}},
        vp_thresholds={"<q>": "<a>"},
    )
    (run / "config.toml").write_text(
        f'[model]\nsource = "{words[0]}"\n[clients]\npartition = "<p>"\n[data]\nlabels = "<k>"\n'
    )
    write_gradip(run, {1: {"<g>": [1.0]}})
    result = call("report", run, runs[1], "--output", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    text, page = (tmp_path / "r.html").read_text(), Page(tmp_path / "r.html")
    assert {tag for tag, _ in page.tags} & {"script", "b", "i", "u", "s", "em", "q", "a", "k", "g"} == set()
    assert "<script" not in text
    assert page.row("run")[0] == evil
    assert ["client", "examples", *words] in page.rows
    assert [row[0] for row in page.rows if row[0] in ("<b>", '"quoted"', "_c", "日本", "<s>")] == [
        "<b>", '"quoted"', "_c", "日本", "<s>",
    ]  # fmt: skip
    assert page.row("model")[0] == words[0]


@pytest.mark.parametrize("calibrated", [True, False], ids=["virtual path", "training rounds"])
def test_gradip_is_drawn_along_the_path(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:
    run = copy_of(runs[0], tmp_path / "r", stopped=[3], precision=0.5, recall=1.0)
    rounds = {0: {"1": [9.0, 8.0], "3": [7.0]}, 1: {"1": [1.0, 2.0], "3": [3.0]}, 2: {"1": [4.0, 5.0]}}
    write_gradip(run, {r: clients for r, clients in rounds.items() if r > 0 or calibrated})
    with open(run / "gradip.jsonl", "a") as file:
        file.write('{"round": 3, "clie')  # torn
    drawn = []

    def record(*arguments: Any) -> Picture:
        drawn.append(arguments)
        return draw_paths(*arguments)

    monkeypatch.setattr(report, "draw_paths", record)
    report.write_report([run])
    ((paths, stopped, x_label, alt),) = drawn
    one, three = ([9.0, 8.0], [7.0]) if calibrated else ([1.0, 2.0, 4.0, 5.0], [3.0])
    assert paths["1"]["gradip"] == one
    assert paths["3"] == {"gradip": three, "norm": [10 * v for v in three], "cosine": [v / 10 for v in three]}
    assert stopped == {"3"}
    assert x_label == f"local step {'of the virtual path' if calibrated else 'of training, over all rounds'}"
    assert alt.endswith("Stopped clients, in another colour: 3.")
    page = Page(run / "report.html")
    assert page.row("stopped clients") == ["3"]
    assert page.row("precision, recall") == ["0.500, 1.000"]


def test_with_several_queries_the_axis_of_gradip_counts_scalars(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, labels = copy_of(runs[0], tmp_path / "r"), []
    text = (run / "config.toml").read_text()
    assert "queries = 1" in text
    (run / "config.toml").write_text(text.replace("queries = 1", "queries = 2"))
    write_gradip(run, {1: {"1": [1.0, 2.0]}})
    monkeypatch.setattr(report, "draw_paths", lambda *given: (labels.append(given[2]), draw_paths(*given))[1])
    report.write_report([run])
    assert labels == ["scalar (2 a local step) of training, over all rounds"]


def test_gradip_of_another_run_is_an_error(runs: list[Path], tmp_path: Path) -> None:
    one, other = copy_of(runs[0], tmp_path / "one"), copy_of(runs[1], tmp_path / "other")
    for run in (one, other):
        write_gradip(run, {1: {"1": [1.0, 2.0]}})
        ledger = read_ledger(run / "ledger.jsonl")
        (run / "ledger.jsonl").unlink()
        with LedgerWriter(run / "ledger.jsonl", ledger.header) as writer:
            scalars = [float(run is one)] * ledger.header.terms.scalars_per_round
            writer.append(replace(ledger.lines[0], scalars=scalars))
    result = call("report", one)
    assert result.exit_code == 1
    assert "gradip.jsonl, line 1: the checksum does not match" in result.output


def test_stopped_clients_have_another_colour() -> None:
    values = [float(2 + t % 3) for t in range(30)]
    paths = {str(i): dict.fromkeys(("gradip", "norm", "cosine"), values) for i in range(3)}
    assert share_of(RED, draw_paths(paths, {"1"}, "x", "").light) > 1e-4
    assert share_of(RED, draw_paths(paths, set(), "x", "").light) == 0


def test_a_path_is_drawn_as_a_moving_mean_of_absolute_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    plotted = []
    plot = Axes.plot

    def record(axes: Axes, x: Any, y: Any, *rest: Any, **more: Any) -> Any:
        plotted.append((list(x), list(y)))
        return plot(axes, x, y, *rest, **more)

    monkeypatch.setattr(Axes, "plot", record)
    values = [float((-1) ** t * t) for t in range(12)]
    draw_paths({"0": dict.fromkeys(("gradip", "norm", "cosine"), values)}, set(), "x", "")
    assert plotted[0][0] == [10, 11, 12]
    np.testing.assert_allclose(plotted[0][1], [4.5, 5.5, 6.5])


def test_paths_of_zeros_or_of_no_steps_are_drawn() -> None:
    none: dict[str, list[float]] = {"gradip": [], "norm": [], "cosine": []}
    draw_paths({"0": {measure: [0.0, 0.0] for measure in none}, "1": none}, {"1"}, "x", "")


def test_clients_above_both_thresholds_are_flagged(runs: list[Path], tmp_path: Path) -> None:
    """Flagged clients need not be the stopped ones: random-stop stops others."""
    run = copy_of(
        runs[0],
        tmp_path / "r",
        stopped=[2],
        single_label_clients=[10],
        vp_thresholds={"rho_later": 1.5, "rho_quie": 0.25, "sigma": 0.125},
        vp_statistics={
            "10": {"rho_later": 2.0, "rho_quie": 0.5},
            "2": {"rho_later": 2.0, "rho_quie": 0.1},
            "3": {"rho_later": 1.0, "rho_quie": 0.5},
        },
    )
    assert call("report", run).exit_code == 0
    page = Page(run / "report.html")
    start = page.rows.index(["client", "rho_later", "rho_quie", "flagged", "single label"])
    assert page.rows[start + 1 :] == [
        ["2", "2", "0.1", "no", "no"],
        ["3", "1", "0.5", "no", "no"],
        ["10", "2", "0.5", "yes", "yes"],
    ]
    assert "rho_later 1.5, rho_quie 0.25, sigma 0.125." in page.text


@pytest.mark.parametrize("clients", [40, 41])
def test_at_most_forty_clients_are_drawn(runs: list[Path], tmp_path: Path, clients: int) -> None:
    counts = [[i, 1] for i in range(clients)]
    run = copy_of(runs[0], tmp_path / "r", examples_by_client_and_label=counts)
    assert call("report", run).exit_code == 0
    page = Page(run / "report.html")
    assert page.row("39") == ["40", "39", "1"]
    assert ("The first 40 of 41 clients." in page.text) == (clients == 41)
    assert "40" not in [row[0] for row in page.rows]


def test_the_length_of_a_bar_is_its_number_of_examples() -> None:
    picture = draw_histogram(["a", "b"], ["x", "y"], [[10, 0], [0, 30]], "")
    blue, orange = share_of((0x1F, 0x77, 0xB4), picture.light), share_of((0xFF, 0x7F, 0x0E), picture.light)
    assert orange / blue == pytest.approx(3, rel=0.15)


def test_a_run_with_early_stopping_is_shown_with_paths_and_statistics(tmp_path: Path) -> None:
    """With a real run, whose files are not modified."""
    settings = ["--vp-steps", "12", "--vp-initial", "4", "--vp-later", "6", "--vp-null-paths", "3"]
    stop_all = ["--vp-rho-later", "0", "--vp-rho-quie", "0", "--vp-sigma", "1e9"]
    run = tmp_path / "r"
    made = call("run", *SMALL, "--method", "meerkat-vp", *settings, *stop_all, "--output", run)
    assert made.exit_code == 0, made.output
    assert call("report", run).exit_code == 0
    page, s = Page(run / "report.html"), summary_of(run)
    assert page.row("stopped clients") == [", ".join(map(str, s["stopped"]))]
    assert len(s["stopped"]) == 4
    assert "local step of the virtual path" in str([image["alt"] for image in page.attributes("img")])
    rows = [row for row in page.rows if len(row) == 5 and row[0] in s["vp_statistics"]]
    assert [row[3] for row in rows] == ["yes"] * 4


def test_a_run_of_very_many_clients_has_no_section_about_them(runs: list[Path], tmp_path: Path) -> None:
    run = copy_of(runs[0], tmp_path / "r", examples_by_client_and_label="200 clients", natural_clients="200 clients")
    assert call("report", run).exit_code == 0
    assert "Clients of r" not in Page(run / "report.html").text


@pytest.mark.parametrize(
    ("kept", "torn", "state", "accuracy"),
    [(3, "", 2, 2), (2, '{"round": 2, "lo', 1, 1), (2, '{"round": 2, "loß'.encode()[:-1], 1, 1), (0, "", 0, None)],
    ids=["no summary", "torn", "torn within a letter", "before the first evaluation"],
)
def test_unfinished_runs_are_shown_with_their_rounds(
    runs: list[Path], tmp_path: Path, kept: int, torn: str | bytes, state: int, accuracy: int | None
) -> None:
    run = copy_of(runs[0], tmp_path / "r")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    tail = torn if isinstance(torn, bytes) else torn.encode()
    (run / "metrics.jsonl").write_bytes("".join(lines[:kept]).encode() + tail)
    result = call("report", run, runs[1], "--output", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "r.html")
    assert page.row("state") == [f"unfinished: {state} of 2 rounds", "finished"]
    shown = page.row("accuracy, before → after")[0]
    if accuracy is None:
        assert shown == "-"
    else:
        assert shown.endswith(f"→ {json.loads(lines[accuracy])['accuracy']:.4f}")
    assert page.row("weights, fingerprint")[0] == "-"
    assert call("report", run).exit_code == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", '{"round": 0}\n{"rou\n{"round": 1}\n', "metrics.jsonl, line 2: not JSON"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1: not a JSON object"),
        ("metrics.jsonl", '{"round": 0}\n{}\n{"round": 1}\n', "metrics.jsonl: a line has no round"),
        ("gradip.jsonl", '{"round": 1}\n', "gradip.jsonl, line 1: the checksum does not match; the line is damaged"),
        ("config.toml", "rounds =", "cannot read the settings in"),
    ],
)
def test_damaged_files_are_named(runs: list[Path], tmp_path: Path, file: str, text: str, message: str) -> None:
    run = copy_of(runs[0], tmp_path / "r")
    (run / file).write_text(text)
    result = call("report", run)
    assert result.exit_code == 1
    assert message in result.output
    assert str(run) in result.output
    assert not (run / "report.html").exists()


def test_directories_without_a_run_are_errors(runs: list[Path], tmp_path: Path) -> None:
    empty, half = tmp_path / "empty", copy_of(runs[0], tmp_path / "half")
    empty.mkdir()
    (half / "metrics.jsonl").unlink()
    for path, missing in (
        (empty, "it has no config.toml and no metrics.jsonl"),
        (half, "it has no metrics.jsonl"),
        (tmp_path / "nowhere", "there is no such directory"),
    ):
        result = call("report", runs[0], path, "--output", tmp_path / "r.html")
        assert result.exit_code == 1
        assert result.output == f"Error: {path} is not a run directory: {missing}\n"
    assert not (tmp_path / "r.html").exists()


def test_an_existing_file_is_not_overwritten(runs: list[Path], tmp_path: Path) -> None:
    run = copy_of(runs[0], tmp_path / "r")
    (run / "report.html").write_text("mine")
    for arguments in ((run,), (run, "--output", run / "report.html"), (run, "--output", run)):
        result = call("report", *arguments)
        assert result.exit_code == 1
        assert "exists already; choose another file, nothing was changed" in result.output
    assert (run / "report.html").read_text() == "mine"
    result = call("report", run, "--output", tmp_path / "no" / "r.html")
    assert result.output == f"Error: there is no directory {tmp_path / 'no'} to write r.html to; create it first\n"


def test_without_matplotlib_the_error_names_the_extra(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("report", runs[0], "--output", tmp_path / "r.html")
    assert result.exit_code == 1
    assert "pip install -c constraints.txt '.[bench]'" in result.output
    assert not (tmp_path / "r.html").exists()
