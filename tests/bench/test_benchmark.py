"""Tests of ``meerkat-engine bench``: rows are checked before they are timed; bytes and normals are counted right."""

import dataclasses
import functools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from meerkat_engine import SparseMask
from meerkat_engine.bench import kernels, measure, one_pass, report, rows, shapes, step, tables
from meerkat_engine.bench.measure import Spread
from meerkat_engine.cli import main
from meerkat_engine.engine.device_values import DeviceValues
from meerkat_engine.engine.lm import embedded
from meerkat_engine.triton_kernels import ElementTable, reference

from helpers.tensors import flat_weights, same_bits

ROWS = [*rows.SPARSE, *rows.SPARSE_ONCE, *rows.DENSE]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SMALL = ["bench", "--model", "embedded", "--repeats", "3", "--density", "0.01"]


def entry_of(name: str, model: nn.Module, density: float = 0.01) -> kernels.Entry:
    entries = [make_entry() for make_entry in kernels.entry_factories(model, [density], density)]
    return next(entry for entry in entries if entry.name == name)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return embedded.load(request.param).model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    output: Path = tmp_path_factory.mktemp("bench") / "out"
    return CliRunner().invoke(main, [*SMALL, "--output", str(output)]), output


def mean_of_three(spread: dict[str, float]) -> float:
    """The mean of three measurements, from their median and the percentiles that lie between them and it."""
    low, high = ((spread[name] - 0.4 * spread["median"]) / 0.6 for name in ("p20", "p80"))
    return (low + spread["median"] + high) / 3


def test_the_command_prints_and_writes_tables_json_and_figures(finished: tuple[Result, Path]) -> None:
    result, output = finished
    assert result.exit_code == 0, result.output
    record = json.loads((output / "result.json").read_text())
    assert record["command"] == f"meerkat-engine bench --model embedded --density 0.01 --repeats 3 --output {output}"
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert record["commit"]
    (case,) = record["kernels"]
    assert case["elements"] == 83776
    assert case["copy_bytes_per_second"] > 1e8
    assert case["empty_launch_seconds"] is None
    assert [row["row"] for row in case["rows"]] == ROWS
    for row in case["rows"]:
        assert row["row"] in result.output
        assert row["elements"] == (838 if row["density"] < 1 else 83776)
        for operation in ("perturb", "flip", "update", "step"):
            spread = row["seconds"][operation]
            assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
    assert case["rows"][0]["ratio"]["perturb"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    (step_case,) = record["steps"]
    assert step_case["rows"][0]["over_forwards"]["median"] > 1
    # The shares of each of the three steps add up to 1, so their means do; the medians need not.
    assert sum(map(mean_of_three, step_case["rows"][0]["share"].values())) == pytest.approx(1, rel=1e-9)
    assert step_case["optimizer"]["over_forwards"]["median"] > 1
    assert step_case["one_pass"]["replay"]["a pass a step"]["ratio"]["median"] > 1
    assert step_case["one_pass"]["inner"]["one pass, plain torch"]["seconds"]["median"] > 0
    assert (output / "result.md").read_text() in result.output
    for name in ("density.png", "size.png", "step.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_render_makes_the_tables_and_figures_from_the_json(finished: tuple[Result, Path], tmp_path: Path) -> None:
    _, output = finished
    (tmp_path / "result.json").write_text((output / "result.json").read_text())
    again = CliRunner().invoke(main, ["bench", "--render", str(tmp_path / "result.json")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "result.md").read_text() == (output / "result.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in output.iterdir()}


def test_an_existing_output_directory_is_not_overwritten(finished: tuple[Result, Path]) -> None:
    _, output = finished
    before = (output / "result.json").read_text()
    again = CliRunner().invoke(main, ["bench", "--model", "embedded", "--output", str(output)])
    assert again.exit_code == 1
    assert "exists; choose a new directory for --output" in again.output
    assert (output / "result.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "1"], "Invalid value for '--density'"),
        (["--device", "mps"], "Invalid value for '--device'"),
        (["--render", "BROKEN"], "is not a result of `meerkat-engine bench`"),
        (["--render", "OTHER"], "kernels, steps, machine or versions are missing"),
    ],
    ids=str,
)
def test_invalid_input_is_rejected_with_a_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    for name, text in (("BROKEN", "{"), ("OTHER", "[]")):
        (tmp_path / name).write_text(text)
    arguments = [str(tmp_path / argument) if argument.isupper() else argument for argument in arguments]
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code in (1, 2)
    assert message in done.output


def test_it_runs_without_triton_numba_and_matplotlib() -> None:
    """Triton exists for Linux only; the others are extras."""
    script = (
        "import sys\n"
        "for name in ('triton', 'numba', 'matplotlib'): sys.modules[name] = None\n"
        "from meerkat_engine.cli import main\n"
        "main(['bench', '--model', 'embedded', '--repeats', '3', '--density', '0.01'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "meerkat, plain torch" in done.stdout


def test_without_matplotlib_output_is_rejected_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(main, ["bench", "--model", "embedded", "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "pip install -c constraints.txt '.[bench]'" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_passes_its_check_and_the_weights_are_restored(name: str, model: nn.Module) -> None:
    before, addresses = flat_weights(model), [p.data_ptr() for p in model.parameters()]
    entry = entry_of(name, model)
    assert kernels.check(entry, model) > 0
    assert same_bits(flat_weights(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


class _Wrong(rows.Row):
    """A row with one fault."""

    def __init__(self, row: rows.Row, fault: str) -> None:
        self._row, self._fault = row, fault
        self.exact = row.exact

    def perturb(self, seed: int, eps: float) -> None:
        self._row.perturb(seed + (self._fault == "seed"), eps * (1.01 if self._fault == "scale" else 1))

    def flip(self, seed: int, eps: float) -> None:
        if self._fault != "flip":
            self._row.flip(seed, eps)

    def update(self, seed: int, eps: float, c: float) -> None:
        self._row.update(seed, eps, -c if self._fault == "sign" else c)

    def noise(self, seed: int) -> Iterator[torch.Tensor]:
        for z in self._row.noise(seed):
            yield z * 1.2 if self._fault == "noise" else z

    def end_step(self) -> None:
        self._row.end_step()


FAULTS = {"seed": "perturb leaves", "scale": "perturb leaves", "flip": "flip leaves", "sign": "update leaves",
          "noise": "is not standard normal"}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ROWS)
def test_the_check_finds_every_fault(name: str, fault: str) -> None:
    model = embedded.load().model
    before, entry = flat_weights(model), entry_of(name, model)
    wrong = dataclasses.replace(entry, row=_Wrong(entry.row, fault))
    with pytest.raises(kernels.CheckError, match=FAULTS[fault]):
        kernels.check(wrong, model)
    assert same_bits(flat_weights(model), before)


def test_a_row_whose_check_fails_gets_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(model: nn.Module) -> rows.Row:
        return _Wrong(rows.MeZO(model), "sign")

    monkeypatch.setitem(rows.DENSE, "dense, MeZO's loop", wrong)
    monkeypatch.setattr(one_pass.MaskedWeights, "replay_", lambda *_: None)
    arguments = ["bench", "--model", "embedded", "--repeats", "3", "--density", "0.01", "--output", str(tmp_path / "o")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    for case in record["kernels"] + record["steps"]:
        (failed,) = [row for row in case["rows"] if row["row"] == "dense, MeZO's loop"]
        assert set(failed) == {"row", "density", "failed"}
    failure = 'row "dense, MeZO\'s loop" at density 1: update leaves weights that differ from its formula'
    assert f"no numbers: {failure}" in done.output
    assert "Many steps in one pass: no numbers: replay: one pass and a pass a step give different bits" in done.output
    assert "Error: embedded, float32: row" in done.output


def test_ratios_are_taken_within_a_repetition(model: nn.Module) -> None:
    entry = entry_of("meerkat", model)
    base = {"perturb": [1.0, 2.0, 4.0], "flip": [1.0, 2.0, 4.0], "update": [2.0, 4.0, 8.0]}
    seconds = {"perturb": [3.0, 6.0, 12.0], "flip": [1.0, 2.0, 4.0], "update": [4.0, 8.0, 16.0]}
    host = {operation: [1e-6] * 3 for operation in seconds}
    record: dict[str, Any] = kernels._record(entry, 0, kernels.Times(device=seconds, host=host), base)
    assert record["ratio"] == {
        "perturb": {"median": 3.0, "p20": 3.0, "p80": 3.0},
        "step": {"median": 2.0, "p20": 2.0, "p80": 2.0},
    }
    assert record["seconds"]["step"]["median"] == 16.0


def test_bytes_moved_count_sectors_offsets_and_masters() -> None:
    """64 bfloat16 weights lie in four 32-byte sectors; the mask touches two of them. One slot is padding."""
    model = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    mask = dataclasses.replace(SparseMask.random(model, 3 / 64, 0), ids=torch.tensor([0, 15, 40]))
    row = rows.Engine(model, mask)
    offsets, masters, block = 4 * 4, 4 * 4, 32  # bytes
    assert row.bytes_moved["perturb"] == 2 * 2 * 32 + offsets + masters + block
    assert row.bytes_moved["update"] == row.bytes_moved["perturb"] + masters
    assert row.bytes_held == offsets + masters
    assert rows.Indexing(model, mask).bytes_moved["perturb"] == 2 * 2 * 32 + 3 * 8
    dense = rows.DenseFused(model)
    assert dense.bytes_moved["perturb"] == 64 * 2 + 64 * 4 + 32
    assert rows.MeZO(model).bytes_moved == {"perturb": 256, "flip": 256, "update": 512}
    assert rows.FlatNoise(model).bytes_moved["flip"] == 256 + 128
    assert rows.MaskedDense(model, mask).bytes_moved["perturb"] == 256 + 64


@pytest.mark.parametrize("name", ROWS)
def test_reported_normals_are_those_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the normals that a row requests from torch or from the stream."""
    row, drawn = entry_of(name, embedded.load().model).row, [0]
    if isinstance(row, rows._Additive):
        draw_normals = row._draw_normals

        def counted_draw(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
            z = draw_normals(shape, dtype)
            drawn[0] += z.numel()
            return z

        monkeypatch.setattr(row, "_draw_normals", counted_draw)
    else:
        table_normals = reference.table_normals

        def counted(table: ElementTable, seed: torch.Tensor, start: int, stop: int, source: Any) -> torch.Tensor:
            drawn[0] += sum(high - low for _, low, high in table.tensor_slices(start, stop))
            return table_normals(table, seed, start, stop, source)

        monkeypatch.setattr(reference, "table_normals", counted)
    for operation in rows.OPERATIONS:
        before = drawn[0]
        getattr(row, operation)(5, 1e-3, *([1e-3] if operation == "update" else []))
        assert drawn[0] - before == row.normals_drawn[operation], operation
    assert drawn[0] > 0


def test_peak_memory_is_the_largest_allocation_at_one_time() -> None:
    def action() -> None:
        for _ in range(5):
            torch.zeros(1 << 18)

    assert 4 << 18 <= measure.peak_bytes(action, CPU) < 2 * (4 << 18)


def test_spread_has_the_median_and_the_percentiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(median=3.5, p20=2.0, p80=5.0)


def test_a_slow_row_is_timed_in_three_repetitions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedded.load().model
    monkeypatch.setattr(kernels, "_SLOW", 0.0)
    (times,) = kernels.time_rows([entry_of("meerkat", model).row], CPU, 5)
    assert [len(values) for of in (times.device, times.host) for values in of.values()] == [3] * 6


def test_a_row_is_freed_before_it_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense row holds masters of the size of the model, and more, and two copies may not fit into memory."""
    factories, made = kernels.entry_factories, []

    def watched(*arguments: Any) -> list[Any]:
        def make(factory: Any, seen: list[Any]) -> kernels.Entry:
            assert [row() for row in seen] == [None] * len(seen)
            entry: kernels.Entry = factory()
            seen.append(weakref.ref(entry.row))
            made.append(entry.name)
            return entry

        return [functools.partial(make, factory, []) for factory in factories(*arguments)]

    monkeypatch.setattr(kernels, "entry_factories", watched)
    kernels.measure_rows(embedded.load().model, [0.01], 3, 0.01)
    assert made == [name for name in ROWS for _ in range(2)]


def test_a_gpu_is_kept_busy_until_the_host_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, events = measure.Stopwatch(CPU), []
    watch._device = torch.device("cuda")
    monkeypatch.setattr(measure, "_cycles_per_second", lambda _: 1e6)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append(f"busy for {cycles} us"))
    monkeypatch.setattr(
        measure.time, "perf_counter", iter([0.0, 0.0, 0.003, 0.003, 1.0, 1.0, 1.1, 1.1, 2, 2, 3, 3]).__next__
    )
    for _ in range(3):
        moments = watch.cold(lambda: events.append("action"))
        assert moments.host == watch.seconds(moments)
    assert events == ["busy for 1000 us", "action", "busy for 6000 us", "action", "busy for 50000 us", "action"]


def test_the_values_of_a_step_are_sent_before_it_is_timed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("meerkat", "dense, fused noise"):
        row = entry_of(name, model).row
        row.prepare(5, 1e-3, 1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(DeviceValues, "_send", lambda *_: pytest.fail("sends a value within the measured time"))
            row.perturb(5, 1e-3)
            row.flip(5, 1e-3)
            row.update(5, 1e-3, 1e-6)


def test_a_stop_in_the_middle_leaves_the_cases_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "measure_parts", stop)
    assert CliRunner().invoke(main, [*SMALL, "--output", str(tmp_path), "--no-figures"]).exit_code == 1
    record = json.loads((tmp_path / "result.json").read_text())
    assert [case["model"] for case in record["kernels"]] == ["embedded"]
    assert record["steps"] == []


def test_without_figures_no_matplotlib_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert CliRunner().invoke(main, [*SMALL, "--output", str(tmp_path), "--no-figures"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.md"]
    command = json.loads((tmp_path / "result.json").read_text())["command"]
    assert command.endswith(f"--output {tmp_path} --no-figures")


def test_times_of_the_host_are_shown_for_a_gpu(finished: tuple[Result, Path]) -> None:
    record = json.loads((finished[1] / "result.json").read_text())
    (case,) = record["kernels"]
    host = case["rows"][0]["host_seconds"]["perturb"]["median"]
    assert 0 < host < 1
    case["empty_launch_seconds"] = 4e-6
    case["rows"].append({"row": "wrong", "density": 1.0, "failed": "why"})
    lines = [line for line in report.markdown(record).splitlines() if line.startswith("|")]
    assert "host, us a perturbation" in lines[0]
    assert f" {host * 1e6:.3g} " in lines[2]
    assert len({line.count("|") for line in lines[: len(ROWS) + 3]}) == 1


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("embedded", 83_776),
        ("pythia-14m", 14_067_712),
        ("pythia-31m", 30_494_720),
        ("smollm2-135m", 134_515_008),
        ("opt-1.3b", 1_315_758_080),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2-1.5b", 1_543_714_304),
        ("gemma-2-2b", 2_614_341_888),
    ],
)
def test_shapes_have_the_published_number_of_elements(name: str, elements: int) -> None:
    device = CPU if name == "embedded" else torch.device("meta")
    assert sum(p.numel() for p in shapes.build(name, torch.bfloat16, device).parameters()) == elements
    assert name in shapes.SHAPES


def test_the_documentation_shows_the_recorded_result() -> None:
    directory = ROOT / "bench" / "results" / "cpu-2-cores"
    recorded = (directory / "result.md").read_text()
    assert report.markdown(json.loads((directory / "result.json").read_text())) == recorded
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("| meerkat")]
    assert len(shown) > 5
    assert all(line in recorded for line in shown)


def test_amounts_have_si_prefixes_and_densities_are_short() -> None:
    assert [tables.amount(x) for x in (0, 999, 1000, 134_515_008, 2.5e12)] == [
        "0 B", "999 B", "1 kB", "135 MB", "2.5 TB",
    ]  # fmt: skip
    assert report._density(1e-3) == "0.001"
    assert report._density(1.0) == "dense"


def test_a_step_is_timed_by_part() -> None:
    net = embedded.load().model
    records = step.measure_parts(net, 0.01, step.make_closure(net, 2, 8), 3)
    assert all(set(record["seconds"]) == set(step.PARTS) for record in records)
