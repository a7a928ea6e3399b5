"""The commands ``meerkat-engine recipe list`` and ``recipe copy``: files of settings to start from."""

import shutil
from pathlib import Path

import click

from ..engine.errors import ConfigError
from .config.options import example

_DIRECTORY = Path(__file__).resolve().parents[1] / "examples" / "recipes"


def recipes() -> dict[str, Path]:
    """The files of settings that come with the package, by name."""
    return {path.stem: path for path in sorted(_DIRECTORY.glob("*.toml"))}


@click.group(epilog=example("meerkat-engine recipe copy laptop"))
def recipe() -> None:
    """Lists and copies files of settings to start from.

    The first lines of each say what it needs, how long it takes, and what came out where that was measured.
    """


@recipe.command(name="list")
def list_() -> None:
    """Lists the recipes."""
    for name, path in recipes().items():
        click.echo(f"{name:<15} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")


@recipe.command()
@click.argument("name", type=click.Choice(list(recipes())))
@click.option("--output", type=click.Path(path_type=Path), help="new file [default: NAME.toml]")
def copy(name: str, output: Path | None) -> None:
    """Copies a recipe to a new file, and shows its first lines."""
    target = output or Path(f"{name}.toml")
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another --output, nothing was changed")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no directory {target.parent}; create it first")
    shutil.copyfile(recipes()[name], target)
    for line in target.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        click.echo(line.removeprefix("#").removeprefix(" "))
    click.echo(f"copied to {target}")


__all__ = ["recipe", "recipes"]
