"""How the user's label words follow the prompt: with a space, directly, or as they are quoted."""

import re

from ..errors import ConfigError

_QUOTED = r'\s*"([^"]*)"\s*'


def follow_prompt(template: str, labels: str) -> tuple[str, tuple[str, ...]]:
    r"""Decides what stands between the prompt and a label word.

    One space does, unless the template ends with a line break or tab, which a label word follows directly. Spaces at
    the end of the template are dropped, because the space belongs to the label word; after a line break, they ask for
    that space. Words in double quotes follow the template exactly as both are written.

    Args:
        template: the prompt, with field names in braces.
        labels: the label words, separated by commas; all of them or none in double quotes.

    Returns:
        The template, and the label words with the white space in front of them.

    Raises:
        ConfigError: if only some of the label words are in quotes.

    Example:
        >>> follow_prompt("{text} It was ", "terrible, great")
        ('{text} It was', (' terrible', ' great'))
        >>> follow_prompt("{text}\nassistant\n", "terrible,great")
        ('{text}\nassistant\n', ('terrible', 'great'))
        >>> follow_prompt("{text} (", '"bad)", "good)"')
        ('{text} (', ('bad)', 'good)'))
    """
    if re.fullmatch(f"{_QUOTED}(,{_QUOTED})*", labels):
        return template, tuple(re.findall(_QUOTED, labels))
    words = [word.strip() for word in labels.split(",")]
    if any(word.startswith('"') for word in words):
        raise ConfigError(f"labels {labels!r}: either all label words are in double quotes or none; quote all")
    trimmed = template.rstrip(" ")
    space = "" if trimmed == template and template[-1:].isspace() else " "
    return trimmed, tuple(space + word for word in words)


__all__ = ["follow_prompt"]
