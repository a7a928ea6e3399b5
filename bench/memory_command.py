"""The command ``meerkat-engine bench-memory``: memory and time of a step by how the base weights are kept."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import click
import torch

from ..engine.errors import ConfigError, MeerkatError
from ..engine.lm.models import DTYPES, check_device
from ..engine.lm.quantize import Quantize
from ..fed.config.options import example
from . import environment
from .memory import Case, cases, computed_bytes, in_own_process, measure_times
from .shapes import SHAPES
from .tables import amount, table


@click.command("bench-memory", epilog=example("meerkat-engine bench-memory --model smollm2-135m"))
@click.option("--model", default="smollm2-135m", show_default=True,
              help="a shape, with random weights, or a Hugging Face id, directory or GGUF file")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--quantize", "kinds", multiple=True, type=click.Choice([kind.value for kind in Quantize]),
              help="how base weights are kept; may be repeated; default: all of them")  # fmt: skip
@click.option("--dtype", type=click.Choice(list(DTYPES)), show_default="bfloat16 on a GPU, else float32",
              help="what models with read-only weights compute in")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="sequences of a batch")
@click.option("--length", type=click.IntRange(2), default=20, show_default=True, help="tokens of each sequence")
@click.option("--layers", type=click.IntRange(1),
              help="make only so many blocks of a shape; what all of them take is computed")  # fmt: skip
@click.option("--repeats", type=click.IntRange(0), default=5, show_default=True, help="timed steps; 0: none")
@click.option("--output", type=click.Path(path_type=Path), help="new directory for result.json and result.md")
@click.pass_context
def bench_memory(
    context: click.Context,
    model: str,
    device: str,
    kinds: tuple[str, ...],
    dtype: str | None,
    batch_size: int,
    length: int,
    layers: int | None,
    repeats: int,
    output: Path | None,
) -> None:
    """Measures steps with base weights in place, as stored, in int8 and in NF4.

    Memory is measured in a process for each, times in turn with weights in place.
    """
    if layers is not None and model not in SHAPES:
        raise ConfigError(f"--layers is for a shape, one of {', '.join(SHAPES)}")
    if output is not None and output.exists():
        raise ConfigError(f"{str(output)!r} exists; choose a new directory for --output")
    where, load_before = check_device(device), os.getloadavg()[0]
    records, plain = [], None
    for case in cases(model, device, batch_size, length, layers or 0, dtype):
        if kinds and plain is not None and case.quantize not in kinds:
            continue
        click.echo(f"measuring {case.name}", err=True)
        plain = plain or case
        record: dict[str, Any] = {"name": case.name, "memory": in_own_process(case)}
        if layers is not None and "failed" not in record["memory"]:
            record["memory"] |= computed_bytes(case) | {"mapped": 0, "process": 0}
            # Masters, offsets twice, live values; of a correction at most columns, base, rows and starts too.
            record["memory"]["masked"] = (32 if case.adds else 16) * record["memory"]["masked_elements"]
        if repeats and "failed" not in record["memory"]:
            record["time"] = _times(case, plain, repeats)
        records.append(record)
    result = {
        "command": environment.command_line(context),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": environment.commit(),
        "machine": environment.machine(where) | {"load_before": load_before, "load_after": os.getloadavg()[0]},
        "versions": environment.versions(where),
        "cases": records,
    }
    text = markdown(result)
    click.echo(text)
    if output is not None:
        output.mkdir(parents=True)
        (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (output / "result.md").write_text(text)


def _times(case: Case, plain: Case, repeats: int) -> dict[str, Any]:
    try:
        return measure_times(case, plain, repeats)
    except (MeerkatError, torch.OutOfMemoryError) as error:
        return {"failed": str(error)}


def markdown(result: dict[str, Any]) -> str:
    """Returns the result as a table in Markdown."""
    rows, plain = [], next((c["memory"] for c in result["cases"] if "failed" not in c["memory"]), None)
    for record in result["cases"]:
        memory, time = record["memory"], record.get("time", {})
        if "failed" in memory:
            rows.append([record["name"], memory["failed"], *[""] * 6])
            continue
        rows.append([
            record["name"],
            amount(memory["base"]) + (f", {amount(memory['mapped'])} mapped" if memory["mapped"] else ""),
            amount(memory["masked"]),
            amount(memory["step"]),
            amount(_total(memory)),
            f"{_bound_ratio(memory, plain):.3f}",
            f"{time['over_forwards']:.3f}" if "over_forwards" in time else time.get("failed", ""),
            f"{time['over_plain']:.2f}" if "over_plain" in time else "",
        ])  # fmt: skip
    machine, versions = result["machine"], result["versions"]
    head = ["base weights", "stored", "masked", "a step allocates", "together", "of the bound", "step / its forwards",
            "step / in place"]  # fmt: skip
    text = ", ".join(f"{name} {value}" for name, value in versions.items())
    return (
        f"`{result['command']}`, {machine['device']}, {machine['threads']} threads, {text}, commit "
        f"{result['commit'][:12]}\n\n{table(head, rows)}\n"
    )


def _bound_ratio(memory: dict[str, Any], plain: dict[str, Any] | None) -> float:
    """Bytes of a step over base + 24 B a masked element + activations + one layer."""
    activations = plain["step"] if plain is not None else memory["step"]
    bound = memory["base"] + 24 * memory["masked_elements"] + activations + memory["layer"]
    return float(_total(memory) / bound)


def _total(memory: dict[str, Any]) -> int:
    return int(memory["base"] + memory["masked"] + memory["step"])


__all__ = ["bench_memory", "markdown"]
