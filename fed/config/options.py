"""The settings of a run as options of a command, grouped by section in its help."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from .run_config import SETTINGS
from .settings import Setting
from .toml import read_toml

_OTHER = "Options"


class _SettingOption(click.Option):
    """An option that sets a setting."""

    def __init__(self, names: Sequence[str], *, setting: Setting, **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.setting = setting


class GroupedCommand(click.Command):
    """Shows the options for settings under their sections, and a command's own options first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click has it, under a heading a section."""
        groups: dict[str, list[tuple[str, str]]] = {_OTHER: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = _heading(parameter.setting) if isinstance(parameter, _SettingOption) else _OTHER
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _heading(setting: Setting) -> str:
    return f"Settings, [{setting.section}] in a file" if setting.section else "Settings, at the top of a file"


def settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options for some settings by their flat names (all, if none is named); those not given reach the command as None.

    With them comes ``--config``, which reaches it as ``config_file``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names or tuple(SETTINGS)):
            command = click.option(f"--{name.replace('_', '-')}", name, **_attributes(SETTINGS[name]))(command)
        return click.option(
            "--config", "config_file", type=click.Path(path_type=Path),
            help="TOML file of settings; options go before it",
        )(command)  # fmt: skip

    return decorate


def _attributes(setting: Setting) -> dict[str, Any]:
    types = get_args(setting.type) or (setting.type,)
    kind = next((each for each in types if each in (int, float)), str)
    shown = f" [default: {setting.shown}]" if setting.shown else ""
    return {"cls": _SettingOption, "setting": setting, "type": kind, "default": None, "help": setting.help + shown}


def example(*lines: str) -> str:
    """A command's epilog: one example, as it is typed."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def from_file(config_file: Path | None) -> dict[str, Any]:
    """The settings of a file, if there is one."""
    return read_toml(config_file) if config_file else {}


__all__ = ["GroupedCommand", "example", "from_file", "given", "settings"]
