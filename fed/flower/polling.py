"""How long Flower's programs wait before they look again."""

# Seconds between looks, where this engine says so. Flower's own: three, for messages.
LOOK = 0.1


def shorten_backoff(most: float | None = None) -> bool:
    """Has Flower, in this process, ask again soon for a part of a message that is not there yet, not after a second.

    Args:
        most: seconds after which it gives such a part up; None leaves Flower's two hours.

    Returns:
        Whether this version of Flower lets itself be told.
    """
    from flwr.supercore.inflatable import inflatable_utils

    defaults = [getattr(each, "__kwdefaults__", None) or {} for each in vars(inflatable_utils).values()]
    found = [each for each in defaults if "initial_backoff" in each]
    for each in found:
        each["initial_backoff"] = LOOK / 2
        if most is not None:
            each |= {"max_time": most, "backoff_cap": 1.0}
    return bool(found)


__all__ = ["LOOK", "shorten_backoff"]
