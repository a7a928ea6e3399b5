"""``meerkat-engine experiment NAME``."""

from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ...engine.atomic_files import write_atomic
from ...engine.extras import require_matplotlib
from ...fed.config.options import GroupedCommand, example, from_file, given, settings
from .attacks import Attacks
from .concentration import Concentration
from .gradip import GradIPPaths
from .grid import Experiment, Results, run_all
from .local_steps import LocalSteps
from .mask_source import MaskSource
from .selection import Selection
from .sparsity import Sparsity

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (
        Sparsity(),
        GradIPPaths(),
        Selection(),
        LocalSteps(),
        MaskSource(),
        Concentration(),
        Attacks(),
    )
}


@click.command(cls=GroupedCommand, epilog=example("meerkat-engine experiment sparsity --seeds 3 --output sparsity"))
@click.argument("name", type=click.Choice(list(EXPERIMENTS)))
@settings()
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="runs of each arm")
@click.option("--tasks", default="", help="tasks to compare, separated by commas, where an experiment compares tasks")
@click.option("--output", type=click.Path(path_type=Path), help="directory [default: experiments/NAME]; what is "
              "finished in it is not run again")  # fmt: skip
def experiment(
    name: str, seeds: int, tasks: str, output: Path | None, config_file: Path | None, **options: Any
) -> None:
    """Runs one of the paper's experiments: a grid of runs, one table and one figure.

    Without --model it takes minutes on two CPU cores.
    """
    require_matplotlib()
    chosen, where = EXPERIMENTS[name], output or Path("experiments") / name
    user = from_file(config_file) | given(options)
    named = [task.strip() for task in tasks.split(",") if task.strip()]
    if named and "data" not in user:
        user.setdefault("task", named[0])
    results = run_all(chosen, user, named, seeds, where, lambda line: tqdm.write(line))
    click.echo(_write(chosen, results, where))
    click.echo(f"wrote {where / 'result.md'} and {where / 'figure.png'}", err=True)


def _write(chosen: Experiment, results: Results, where: Path) -> str:
    text = f"**{chosen.title}**\n\n{chosen.table(results)}\n"
    write_atomic(where / "result.md", text.encode())
    chosen.draw(results, where / "figure.png")
    return text


__all__ = ["EXPERIMENTS", "experiment"]
