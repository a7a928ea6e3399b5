"""``python -m meerkat_engine.bench.experiments.fewer_forwards``: some of the rules, in a process of their own.

It takes the settings of ``run``, and writes what ``meerkat-engine experiment fewer-forwards`` measures to a file. With
``--part FILE`` it puts the results of several processes together.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ....engine.atomic_files import write_atomic
from ....engine.errors import ConfigError, MeerkatError
from ....fed.config.options import GroupedCommand, given_options, settings, settings_from_file
from ....fed.config.run_config import make_config
from ....fed.setup.threads import choose_threads
from .experiment import draw_rules, rules_table
from .methods import METHODS
from .problem import Problem
from .search import compare


@click.command(cls=GroupedCommand)
@click.argument("names", nargs=-1, type=click.Choice(list(METHODS)))
@settings()
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="trials of each rule")
@click.option(
    "--part", "parts", type=click.Path(path_type=Path, exists=True), multiple=True, help="results to put together"
)
@click.option("--figure", type=click.Path(path_type=Path), help="file for a figure of --part")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="file for the results, JSON")
def main(
    names: tuple[str, ...],
    seeds: int,
    parts: tuple[Path, ...],
    figure: Path | None,
    output: Path,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Measures some rules, or puts results together."""
    if bool(names) == bool(parts):
        raise click.UsageError("give names of rules to measure, or --part with results to put together")
    if output.exists():  # before hours of work
        raise click.UsageError(f"{output} exists; choose another --output")
    try:
        _main(names, seeds, parts, figure, output, settings_from_file(config_file) | given_options(options))
    except MeerkatError as error:
        raise click.ClickException(str(error)) from error


def _main(
    names: Sequence[str], seeds: int, parts: Sequence[Path], figure: Path | None, output: Path, given: dict[str, Any]
) -> None:
    """See ``main``."""
    if names:
        config = make_config(given)
        choose_threads(config.model.source)
        measured = compare(Problem.load(config), names, range(config.seed, config.seed + seeds), click.echo)
    else:
        measured = together([json.loads(path.read_bytes()) for path in parts])
        click.echo(rules_table(measured))
        if figure is not None:
            draw_rules(measured, figure)
    write_atomic(output, json.dumps(measured, indent=1).encode())


def together(results: list[Any]) -> Any:
    """Puts results of ``compare`` together.

    Args:
        results: results of different rules, with the same settings and seeds.

    Raises:
        ConfigError: if settings or seeds differ.
    """
    common = [{key: value for key, value in result.items() if key != "methods"} for result in results]
    if any(of_part != common[0] for of_part in common):
        raise ConfigError("the parts were measured with other settings or seeds: only rules may differ")
    return common[0] | {"methods": {name: of_rule for result in results for name, of_rule in result["methods"].items()}}


if __name__ == "__main__":
    main(prog_name="python -m meerkat_engine.bench.experiments.fewer_forwards")
