"""Prompt templates: text with field names in braces."""

import string
from collections.abc import Mapping

from ..errors import ConfigError


def template_fields(template: str) -> tuple[str, ...]:
    """Returns the names of a template's fields, each once, in the order of first use.

    Args:
        template: text with field names in braces; a literal brace is doubled.

    Raises:
        ConfigError: if a brace is unmatched, a field has a format or conversion, a field has no plain name, or there
            are no fields.

    Example:
        >>> template_fields("{passage} So, {question}? In {{braces}}: {question}?")
        ('passage', 'question')
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(
            f"template {template!r}: {error}; fields stand in braces, and a literal brace is written twice"
        ) from None
    for name, form, conversion in parts:
        if form or conversion:
            written = f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
            raise ConfigError(
                f"template {template!r}: {written} has a format, which templates do not support; write {{{name}}}"
            )
        if not name or name.isdigit() or set(name) & set(".["):
            raise ConfigError(
                f"template {template!r}: {{{name}}} does not name a field; write the field's name, like {{text}}"
            )
    if not parts:
        raise ConfigError(f"template {template!r} has no field; write a field's name in braces, like {{text}}")
    return tuple(dict.fromkeys(str(name) for name, _, _ in parts))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Fills in the fields of a template. Surrounding white space of the values is removed.

    Args:
        template: see ``template_fields``.
        values: text of each field.

    Example:
        >>> fill("{text} It was", {"text": " A film. "})
        'A film. It was'
    """
    return template.format_map({name: value.strip() for name, value in values.items()})


__all__ = ["fill", "template_fields"]
