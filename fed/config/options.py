"""The settings of a run as command-line options, grouped by section in the help."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from .run_config import SETTINGS
from .settings import Setting
from .toml import read_toml

_COMMAND_OPTIONS = "Options"  # heading of the options that are no settings


class _SettingOption(click.Option):
    """An option that gives a value to a setting."""

    def __init__(self, names: Sequence[str], *, setting: Setting, **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.setting = setting


class GroupedCommand(click.Command):
    """A command whose help lists its own options first, then the settings under their sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options in groups, each under its heading."""
        groups: dict[str, list[tuple[str, str]]] = {_COMMAND_OPTIONS: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = _heading(parameter.setting) if isinstance(parameter, _SettingOption) else _COMMAND_OPTIONS
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _heading(setting: Setting) -> str:
    return f"Settings, [{setting.section}] in a file" if setting.section else "Settings, at the top of a file"


def settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds options for settings, and ``--config``, to a command.

    Args:
        names: flat names of the settings; none: all settings. The command gets one keyword argument a setting, None if
            the option was not given, and the path of ``--config`` as ``config_file``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names or tuple(SETTINGS)):
            command = click.option(f"--{name.replace('_', '-')}", name, **_attributes(SETTINGS[name]))(command)
        return click.option(
            "--config", "config_file", type=click.Path(path_type=Path),
            help="TOML file with settings; options on the command line override it",
        )(command)  # fmt: skip

    return decorate


# Longer lists of choices would fill the help's left column; the text beside them names them.
_SHORT = 20


def _attributes(setting: Setting) -> dict[str, Any]:
    default = f" [default: {setting.shown}]" if setting.shown else ""
    return {
        "cls": _SettingOption,
        "setting": setting,
        "type": _option_type(setting),
        "default": None,
        "help": setting.help + default,
        "metavar": setting.metavar or _metavar(setting),
    }


def _option_type(setting: Setting) -> Any:
    types = get_args(setting.type) or (setting.type,)
    if setting.choices:
        return click.Choice(setting.choices)
    if Path in types:
        return click.Path()
    return next((candidate for candidate in types if candidate in (int, float)), str)


def _metavar(setting: Setting) -> str | None:
    """What stands for the value in the help: the name, if there are too many choices to show; None: click's own."""
    too_long = len("|".join(setting.choices)) > _SHORT
    return setting.option.upper().replace("_", "-") if too_long else None


def example(*lines: str) -> str:
    """The epilog of a command's help: one example, as the user types it."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def settings_from_file(config_file: Path | None) -> dict[str, Any]:
    """The settings in a file, by their flat names; empty if ``config_file`` is None."""
    return read_toml(config_file) if config_file else {}


__all__ = ["GroupedCommand", "example", "given_options", "settings", "settings_from_file"]
