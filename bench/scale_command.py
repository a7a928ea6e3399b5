"""The command ``meerkat-engine bench-server``: the cost of a round for the server and the network."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import click
import torch

from ..engine.errors import ConfigError
from ..fed.config.options import example
from . import environment, scale, traffic
from .tables import amount, table

_CPU = torch.device("cpu")


@click.command("bench-server", epilog=example("meerkat-engine bench-server --output results"))
@click.option("--clients", "counts", multiple=True, type=click.IntRange(1), default=(1000, 10_000, 100_000),
              show_default=True, help="number of clients; may be repeated")  # fmt: skip
@click.option("--local-steps", type=click.IntRange(1), default=10, show_default=True, help="scalars per client")
@click.option("--repeats", type=click.IntRange(3), default=5, show_default=True, help="rounds per number of clients")
@click.option("--output", type=click.Path(path_type=Path), help="new directory for result.json and result.md")
@click.pass_context
def bench_server(
    context: click.Context, counts: tuple[int, ...], local_steps: int, repeats: int, output: Path | None
) -> None:
    """Times a round of the server, part by part, with replies of synthetic clients.

    Every round is checked before its times are used: the aggregate against its definition, the ledger by reading it.
    """
    if output is not None and output.exists():
        raise ConfigError(f"{str(output)!r} exists; choose a new directory for --output")
    cases, load_before = [], os.getloadavg()[0]
    for count in counts:
        click.echo(f"measuring {count:,} clients", err=True)
        cases.append(scale.measure_round(count, local_steps, repeats))
    result = {
        "command": environment.command_line(context),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": environment.commit(),
        "machine": environment.machine(_CPU) | {"load_before": load_before, "load_after": os.getloadavg()[0]},
        "versions": environment.versions(_CPU),
        "cases": cases,
        "traffic": traffic.traffic_summary(),
    }
    text = markdown(result)
    click.echo(text)
    if output is not None:
        output.mkdir(parents=True)
        (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (output / "result.md").write_text(text)


def markdown(result: dict[str, Any]) -> str:
    """Returns the result's tables in Markdown."""
    machine, versions, cases = result["machine"], result["versions"], result["cases"]
    heading = (
        f"`{result['command']}` on {machine['device']}, {machine['threads']} CPU threads, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}, commit {result['commit'][:7]}, "
        f"{result['date']}. T = {cases[0]['steps']}; medians of {cases[0]['repeats']} "
        "(20th to 80th percentile). Load average "
        f"{machine['load_before']:.1f} before, {machine['load_after']:.1f} after, this process's own 1 included."
    )
    return "\n\n".join([heading, _rounds_table(cases), _parts_table(cases), *_traffic_tables(result["traffic"])]) + "\n"


def _rounds_table(cases: list[dict[str, Any]]) -> str:
    memory_columns = list(cases[0]["memory"])
    columns = ["clients", "seconds a round", "of CPU", "microseconds of CPU a client", "ledger a round",
               f"bytes of memory a client: {memory_columns[0]}", *memory_columns[1:]]  # fmt: skip
    lines = []
    for case in cases:
        elapsed, cpu = case["seconds"]["round"], case["cpu"]["round"]
        lines.append([
            f"{case['clients']:,}",
            f"{elapsed['median']:.3g} ({elapsed['p20']:.3g} to {elapsed['p80']:.3g})",
            f"{cpu['median']:.3g} ({cpu['p20']:.3g} to {cpu['p80']:.3g})",
            f"{cpu['median'] / case['clients'] * 1e6:.3g}",
            amount(case["ledger_bytes"]),
            *(f"{size:,.0f}" for size in case["memory"].values()),
        ])  # fmt: skip
    return table(columns, lines)


def _parts_table(cases: list[dict[str, Any]]) -> str:
    columns = ["part", *(f"{case['clients']:,} clients" for case in cases)]
    lines = []
    for part in (*scale.PARTS, *scale.EXTRA_PARTS):
        microseconds = [case["cpu"][part]["median"] / case["clients"] * 1e6 for case in cases]
        shares = [case["shares"][part] for case in cases]
        lines.append([part, *(f"{cost:.3g} ({share:.1%})" for cost, share in zip(microseconds, shares, strict=True))])
    *extra, last = scale.EXTRA_PARTS
    caption = (
        "Microseconds of CPU per client, and share of the round "
        f"({', '.join(extra)} and {last} are not part of the round):"
    )
    return f"{caption}\n\n{table(columns, lines)}"


def _traffic_tables(traffic: dict[str, Any]) -> list[str]:
    days = traffic["per_day"]
    names = list(days[0]["bytes"])
    lines = []
    for day in days:
        sent = day["bytes"]
        ratios = (sent["LoRA"] / sent[names[0]], sent["weights"] / sent[names[0]])
        lines.append(
            [f"{day['seconds_a_round']:g}", *(amount(sent[n]) for n in names), *(f"{ratio:,.0f}" for ratio in ratios)]
        )
    columns = ["assumed seconds a round", *names, "LoRA over T = 1", "weights over T = 1"]
    away = [
        [f"{c['values']}", f"{c['seconds_a_round']:g}", amount(c["day"]), amount(c["week"]), amount(c["masters"]),
         f"{c['days_until_masters']:,.1f}"]
        for c in traffic["catching_up"]
    ]  # fmt: skip
    head = ["T", "assumed seconds a round", "away a day", "away a week", "masters", "masters are smaller from day"]
    return [
        f"Bytes per day, both directions, {traffic['model']} ({traffic['elements']:,} weights in bfloat16; LoRA of "
        f"rank 8 on q and v, {traffic['lora_elements']:,}), a client that takes part in every round:",
        table(columns, lines),
        "Size of the request to a client that was away, with scalars or with masters (density 0.001, fp32):",
        table(head, away),
    ]


__all__ = ["bench_server", "markdown"]
