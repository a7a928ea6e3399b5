"""The command ``meerkat-engine experiment NAME``."""

from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ...engine.atomic_files import write_atomic
from ...engine.extras import require_matplotlib
from ...fed.config.options import GroupedCommand, example, given_options, settings, settings_from_file
from ...fed.setup.threads import choose_threads
from .attacks import Attacks
from .concentration import Concentration
from .corrections import Corrections
from .experiment import Experiment, Results, configuration
from .fewer_forwards.experiment import FewerForwards
from .gradip import GradIPPaths
from .grid import run_all
from .local_steps import LocalSteps
from .mask_source import MaskSource
from .paper import Paper
from .selection import Selection
from .sparsity import Sparsity

EXPERIMENTS: dict[str, Experiment] = {
    entry.name: entry
    for entry in (
        Sparsity(),
        GradIPPaths(),
        Selection(),
        LocalSteps(),
        MaskSource(),
        Concentration(),
        Attacks(),
        Corrections(),
        FewerForwards(),
        Paper(),
    )
}


@click.command(cls=GroupedCommand, epilog=example("meerkat-engine experiment sparsity --seeds 3 --output sparsity"))
@click.argument("name", type=click.Choice(list(EXPERIMENTS)))
@settings()
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="runs per arm, with consecutive seeds"
)
@click.option(
    "--tasks", default="", help="tasks, separated by commas; more than one only if the experiment compares tasks"
)
@click.option(
    "--arms",
    multiple=True,
    metavar="PATTERN",
    help="run only arms whose name matches, such as 'T = 10, *'; may be given several times; the tables come when all "
    "are there",
)
@click.option("--output", type=click.Path(path_type=Path), help="directory [default: experiments/NAME]; runs "
              "that are finished in it are not repeated")  # fmt: skip
def experiment(
    name: str,
    seeds: int,
    tasks: str,
    arms: tuple[str, ...],
    output: Path | None,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Runs one of the paper's experiments and writes its tables and a figure.

    Each experiment is a grid of runs. With the default model it takes minutes on two CPU cores. The same command may be
    started several times at once with one --output: the processes share the runs.
    """
    require_matplotlib()
    selected, directory = EXPERIMENTS[name], output or Path("experiments") / name
    user_settings = settings_from_file(config_file) | given_options(options)
    task_names = [task.strip() for task in tasks.split(",") if task.strip()]
    if task_names and "data" not in user_settings:
        user_settings.setdefault("task", task_names[0])
    choose_threads(configuration(selected, user_settings).model.source)
    results = run_all(selected, user_settings, task_names, seeds, directory, lambda line: tqdm.write(line), arms)
    if results is None:
        click.echo(f"no tables yet: {directory} lacks runs of other arms", err=True)
        return
    click.echo(_write(selected, results, directory))
    click.echo(f"wrote {directory / 'result.md'} and {directory / 'figure.png'}", err=True)


def _write(selected: Experiment, results: Results, directory: Path) -> str:
    """Writes the tables and the figure; returns the tables."""
    paragraphs = [f"**{selected.title}**", selected.table(results), results.not_scored()]
    text = "\n\n".join(filter(None, paragraphs)) + "\n"
    write_atomic(directory / "result.md", text.encode(), replaces=lambda _: True)  # the directory is the experiment's
    selected.draw(results, directory / "figure.png")
    return text


__all__ = ["EXPERIMENTS", "experiment"]
