"""The command ``meerkat-engine bench``: times the kernels and a step against dense zeroth-order fine-tuning.

Every row is checked before it is timed. A row whose check fails gets no numbers.
"""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..engine.atomic_files import write_atomic
from ..engine.errors import ConfigError
from ..engine.extras import require_matplotlib
from ..engine.lm import embedded
from ..engine.lm.models import DTYPES, check_device
from ..fed.config.options import example
from ..fed.setup.model import load_base_model
from . import environment, forward, kernels, measure, one_pass, report, shapes, step

_CPU = {
    "kernels": [
        (embedded.NAME, "float32"),
        ("pythia-14m", "float32"),
        ("pythia-31m", "float32"),
        ("pythia-31m", "bfloat16"),
        ("smollm2-135m", "float32"),
    ],
    "steps": [(embedded.NAME, "float32"), ("smollm2-135m", "float32")],
}
_GPU = {
    "kernels": [(m, dtype) for dtype in ("bfloat16", "float32") for m in ("llama-3.2-1b", "qwen2-1.5b", "gemma-2-2b")],
    "steps": [("llama-3.2-1b", "bfloat16")],
}
_DENSITIES = (1e-2, 1e-3, 1e-4)
_REPLAYED_STEPS = {"cpu": 100, "cuda": 10_000}


def run_all(
    cases: dict[str, list[tuple[str, str]]],
    *,
    command: str,
    device: torch.device,
    densities: list[float],
    repeats: int,
    batch: tuple[int, int],
    forwards: dict[str, Any] | None = None,
    save: Callable[[report.Result], None] = lambda _: None,
) -> report.Result:
    """Measures all cases.

    Args:
        cases: under "kernels" and "steps", pairs of a model (one of ``shapes.SHAPES``) and a dtype.
        command: the command line, stored in the result.
        device: the device to measure on.
        densities: densities of the masks; ratios are relative to the density nearest to 1e-3.
        repeats: repetitions of each row, at least 3; slow rows are timed in the first 3.
        batch: number of examples of a step, and of tokens per example.
        forwards: the model and the tasks whose forward passes are measured, see ``_forward_case``; None: no passes.
        save: called with the result so far after each case, so that a stop in the middle loses one case only.

    Returns:
        The result, ready for JSON.
    """
    base = min(densities, key=lambda density: abs(density - 1e-3))
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": environment.commit(),
        "machine": environment.machine(device),
        "versions": environment.versions(device),
        "kernels": [],
        "steps": [],
        "forwards": [],
    }
    for name, dtype in cases["kernels"]:
        click.echo(f"measuring the weight passes of {name}, {dtype}", err=True)
        model = shapes.build(name, DTYPES[dtype], device)
        case = {
            "model": name,
            "dtype": dtype,
            "elements": sum(p.numel() for p in model.parameters()),
            "base_density": base,
            "copy_bytes_per_second": measure.copy_bandwidth(device),
            "empty_launch_seconds": measure.empty_launch(device),
        }
        result["kernels"].append(case | {"rows": kernels.measure_rows(model, densities, repeats, base)})
        save(result)
    for name, dtype in cases["steps"]:
        click.echo(f"measuring the step of {name}, {dtype}", err=True)
        model = shapes.build(name, DTYPES[dtype], device)
        closure = step.make_closure(model, *batch)
        rows = step.measure_parts(model, base, closure, repeats)
        optimizer = step.measure_optimizer(model, base, closure, repeats)
        passes: dict[str, Any]
        try:
            passes = one_pass.measure_one_pass(model, base, _REPLAYED_STEPS[device.type])
        except kernels.CheckError as error:
            passes = {"failed": str(error)}
        result["steps"].append(
            {
                "model": name,
                "dtype": dtype,
                "batch": list(batch),
                "rows": rows,
                "optimizer": optimizer,
                "one_pass": passes,
            }
        )
        save(result)
    if forwards is not None:
        click.echo(f"measuring the forward passes of {forwards['model']}, {forwards['dtype']}", err=True)
        result["forwards"].append(_forward_case(**forwards, device=device, repeats=repeats))
        save(result)
    return result


def _forward_case(
    *, model: str, dtype: str, data_dir: Path | None, batch_size: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Measures the forward passes of a model on the tasks of a directory; None: on the embedded tasks."""
    tasks = forward.task_examples(data_dir)  # before the model is loaded: raises if there is no task
    lm = load_base_model(model, dtype, str(device))
    rows = []
    for row in forward.measure_forwards(lm, tasks, batch_size=batch_size, repeats=repeats):
        click.echo(f"  {row['task']}", err=True)
        rows.append(row)
    return {"model": Path(model).name, "dtype": dtype, "batch_size": batch_size, "rows": rows}


def failures(result: report.Result) -> list[str]:
    """Returns the messages of all failed checks."""
    cases = result["kernels"] + result["steps"] + result.get("forwards", [])
    records = [(case, row) for case in cases for row in case["rows"]]
    records += [(case, case["one_pass"]) for case in result["steps"]]
    return [f"{case['model']}, {case['dtype']}: {record['failed']}" for case, record in records if "failed" in record]


def write_json(result: report.Result, directory: Path) -> Path:
    """Writes ``result.json`` into an existing directory, whole or not at all; returns its path."""
    path = directory / "result.json"
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode(), replaces=lambda _: True)
    return path


def _render(result: report.Result, directory: Path, *, figures: bool = True) -> list[Path]:
    """Writes ``result.md`` and the figures; returns their paths."""
    (directory / "result.md").write_text(report.markdown(result))
    return [directory / "result.md", *(report.draw(result, directory) if figures else [])]


def _read(path: Path) -> report.Result:
    try:
        result: report.Result = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not a result of `meerkat-engine bench`: {error}") from error
    if not isinstance(result, dict) or not {"kernels", "steps", "machine", "versions"} <= result.keys():
        raise ConfigError(
            f"{path} is not a result of `meerkat-engine bench`: kernels, steps, machine or versions are missing"
        )
    return result


@click.command(epilog=example("meerkat-engine bench --output results"))
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="auto: cuda if available, else cpu")  # fmt: skip
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(shapes.SHAPES),
    help="model shapes; may be repeated [default: a set for the device]",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    help="dtypes of the weights; may be repeated [default: a set for the device]",
)
@click.option("--density", "densities", multiple=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
              default=_DENSITIES, show_default=True, help="densities of the masks; may be repeated")  # fmt: skip
@click.option("--repeats", type=click.IntRange(3), default=9, show_default=True, help="repetitions of each row")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="examples per step")
@click.option("--length", type=click.IntRange(1), default=24, show_default=True, help="tokens per example")
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="measure forward passes alone, on the tasks of this directory (TASK/train.jsonl)")  # fmt: skip
@click.option("--base-model", default=embedded.NAME, help="with --data-dir: the model, as --model of run",
              show_default="the embedded model")  # fmt: skip
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="directory for result.json (written after each case), result.md and the figures",
)
@click.option("--figures/--no-figures", default=True, show_default=True, help="whether --output draws figures")
@click.option("--render", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="measure nothing; write result.md and the figures of this result.json next to it")  # fmt: skip
@click.pass_context
def bench(
    context: click.Context,
    device: str,
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    densities: tuple[float, ...],
    repeats: int,
    batch_size: int,
    length: int,
    data_dir: Path | None,
    base_model: str,
    output: Path | None,
    figures: bool,
    render: Path | None,
) -> None:
    """Times this engine's passes over the weights, and a complete step, against dense zeroth-order fine-tuning.

    Then forward passes over packed and sorted batches, against padded ones. Every row is checked before it is timed. On
    two CPU cores the command takes less than five minutes.
    """
    if render is not None:
        for path in _render(_read(render), render.parent):
            click.echo(path)
        return
    if output is not None:
        if figures:
            require_matplotlib()
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise ConfigError(f"{str(output)!r} exists; choose a new directory for --output")
        output.mkdir(parents=True, exist_ok=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device = check_device(device)
    cases = _CPU if torch_device.type == "cpu" else _GPU
    if models or dtypes:
        chosen_models = models or dict.fromkeys(model for model, _ in cases["kernels"])
        chosen = [(model, dtype) for model in chosen_models for dtype in dtypes or ("float32",)]
        cases = {"kernels": chosen, "steps": chosen}
    dtype = (*dtypes, "float32")[0]
    forwards = {"model": base_model, "dtype": dtype, "data_dir": data_dir, "batch_size": batch_size}
    if data_dir is not None:
        cases = {"kernels": [], "steps": []}
    result = run_all(
        cases,
        command=environment.command_line(context),
        device=torch_device,
        densities=list(densities),
        repeats=repeats,
        batch=(batch_size, length),
        forwards=None if models and data_dir is None else forwards,
        save=lambda result: None if output is None else click.echo(f"wrote {write_json(result, output)}", err=True),
    )
    click.echo(report.markdown(result))
    if output is not None:
        for path in _render(result, output, figures=figures):
            click.echo(f"wrote {path}", err=True)
    failed = failures(result)
    if failed:
        raise kernels.CheckError("; ".join(failed))


__all__ = ["bench", "failures", "run_all", "write_json"]
