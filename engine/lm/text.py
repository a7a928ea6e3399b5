"""Checks that text consists of characters: JSON can hold halves of surrogate pairs, which no tokenizer can read."""

from ..errors import DataError


def check_text(text: str, where: str) -> None:
    """Checks that a text can be encoded.

    Args:
        text: the text.
        where: where the text comes from, for the error message.

    Raises:
        DataError: if the text holds half of a surrogate pair, such as one of the two that JSON writes for an emoji.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair ({text[error.start]!r}) at character {error.start + 1}, which is no "
            f"character; repair the text, or leave it out"
        ) from None


__all__ = ["check_text"]
