"""The command ``meerkat-engine chat``."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ...engine.errors import ConfigError, DataError
from ...engine.lm.free_text.rendering import PromptFormat
from ..config.options import GroupedCommand, example, settings
from .columns import printable
from .dialogue import Dialogue, dialogue_of
from .options import given_settings, of_sampling, of_target, sampling
from .target import Target, open_target

_ASK = "> "
_COMMANDS = ("/base", "/tuned", "/reset", "/quit")


@click.command(cls=GroupedCommand, epilog=example("meerkat-engine chat runs/mine"))
@of_target
@click.option("--base", is_flag=True, help="begin with a run's base model")
@click.option("--system", metavar="TEXT", help="system message")
@of_sampling
@settings("prompt_format", "chat_template", "max_length", "device", "dtype", "max_new_tokens")
def chat(
    name: str,
    base: bool,
    system: str | None,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    round: int | None,
    base_model: str | None,
    trust_remote_code: bool,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Talks with a model in the terminal.

    TARGET is a run directory, a checkpoint, a Hugging Face id or a GGUF file. With a run, /base and /tuned switch
    between the model before and after training. /reset forgets the conversation; /quit or Ctrl-D ends it; Ctrl-C stops
    an answer.
    """
    drawn = sampling(temperature, top_p, seed)
    given = given_settings(config_file, options)
    if "chat_template" in given:
        given.setdefault("prompt_format", PromptFormat.CHAT)
    target = open_target(name, given, round=round, base_model=base_model, trust_remote_code=trust_remote_code)
    if base and target.replayed is None:
        raise ConfigError(f"--base is for runs, and {name} is a model alone; leave it out")
    dialogue, how = dialogue_of(target, drawn, system)
    click.echo(f"{how}\n{_version(target, base=base)}; commands: {', '.join(_COMMANDS)}")
    _talk(target, dialogue, base=base)


def _version(target: Target, *, base: bool) -> str:
    if target.replayed is None:
        return f"{target.name} answers"
    return f"{target.name} answers as it was {'before' if base else 'after'} training"


def _talk(target: Target, dialogue: Dialogue, *, base: bool) -> None:
    """Answers lines until there are no more, or the user quits."""
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            dialogue.reset()
            click.echo("the conversation begins anew")
        elif line in ("/base", "/tuned"):
            if target.replayed is None:
                click.echo(f"{target.name} is no run: there is only one version of the model")
            else:
                base = line == "/base"
                click.echo(_version(target, base=base))
        elif line[0] == "/" and line[1:].isalpha():
            click.echo(f"there is no command {line}; the commands are {', '.join(_COMMANDS)}")
        else:
            _answer(target, dialogue, line, base=base)


def _answer(target: Target, dialogue: Dialogue, line: str, *, base: bool) -> None:
    try:
        with target.base() if base or target.replayed is None else target.tuned() as lm:
            dialogue.answer(line, lm, lambda text: click.echo(printable(text), nl=False), click.echo)
    except DataError as error:
        click.echo(f"Error: {error}", nl=False)
    click.echo()


def _lines() -> Iterator[str]:
    """The lines that the user types, without surrounding white space and without empty ones."""
    terminal = sys.stdin.isatty()
    if terminal and importlib.util.find_spec("readline"):
        import readline  # noqa: F401  # lets the user edit lines
    while True:
        try:
            line = input(_ASK) if terminal else _piped()
        except EOFError:
            if terminal:
                click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D ends the conversation")
            continue
        if line.strip():
            yield line.strip()


def _piped() -> str:
    """The next line of a file or pipe, which is shown as if it had been typed; raises ``EOFError`` at the end."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    if line.strip():
        click.echo(f"{_ASK}{printable(line.strip())}")
    return line


__all__ = ["chat"]
