"""The command ``meerkat-engine tune``."""

import shlex
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ...fed.config.options import GroupedCommand, example, given_options, settings, settings_from_file
from ...fed.config.run_config import make_config
from ...fed.run.directory import CONFIG
from ...fed.setup.threads import choose_threads
from .find import find


def _rates(context: click.Context, option: click.Parameter, value: str) -> list[float]:
    """The numbers in the value of ``--lrs``."""
    try:
        return [float(part) for part in value.split(",")] if value else []
    except ValueError as error:
        raise click.BadParameter(f"{error}; give numbers separated by commas: 1e-4,2e-4,4e-4") from error


@click.command(cls=GroupedCommand, epilog=example("meerkat-engine tune --rounds 30 --output tuned"))
@settings()
@click.option("--output", type=click.Path(path_type=Path), required=True,
              help="directory of the search; a search that was stopped goes on in it")  # fmt: skip
@click.option("--lrs", metavar="LR,LR,...", default="", callback=_rates,
              help="learning rates to try, and no others, separated by commas [default: three decades around --lr in "
              "factors of 2, and on if the best lies at the edge]")  # fmt: skip
@click.option("--tune-eps", is_flag=True, help="also try other eps, in factors of 10")
@click.option("--tune-density", is_flag=True, help="also try other densities, in factors of 3.16")
@click.option("--tune-rounds", type=click.IntRange(1), metavar="R",
              help="number of rounds of the longest runs [default: half of --rounds]")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with the model, if there is any")
def tune(
    output: Path,
    lrs: list[float],
    tune_eps: bool,
    tune_density: bool,
    tune_rounds: int | None,
    trust_remote_code: bool,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Finds the learning rate of a run by short runs, judged by the held-out loss.

    Takes all settings of `meerkat-engine run`, and writes config.toml with the best learning rate:
    `meerkat-engine run --config DIR/config.toml` goes on with it.
    """
    config = make_config(settings_from_file(config_file) | given_options(options))
    choose_threads(config.model.source)
    found = find(
        config,
        output,
        tqdm.write,
        lrs=lrs,
        eps=tune_eps,
        density=tune_density,
        rounds=tune_rounds,
        show=click.echo,
        trust_remote_code=trust_remote_code,
    )
    if found.note():
        click.echo(found.note())
    for warning in found.warnings():
        click.echo(f"warning: {warning}")
    click.echo(f"cost: {found.cost()}")
    click.echo(f"to go on: meerkat-engine run --config {shlex.quote(str(output / CONFIG))}")


__all__ = ["tune"]
