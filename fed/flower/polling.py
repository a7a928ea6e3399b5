"""Polling intervals that replace Flower's own."""

# Seconds between two polls, where this engine sets the interval. Flower polls for messages every three seconds.
POLL_SECONDS = 0.1


def shorten_backoff(give_up_after: float | None = None) -> bool:
    """Makes Flower, in this process, ask again after 0.05 s for a missing part of a message; its default is 1 s.

    Args:
        give_up_after: seconds after which Flower gives up on such a part; None keeps Flower's default of two hours.

    Returns:
        Whether this version of Flower has the setting.
    """
    from flwr.supercore.inflatable import inflatable_utils

    keyword_defaults = [getattr(member, "__kwdefaults__", None) or {} for member in vars(inflatable_utils).values()]
    backoff_defaults = [defaults for defaults in keyword_defaults if "initial_backoff" in defaults]
    for defaults in backoff_defaults:
        defaults["initial_backoff"] = POLL_SECONDS / 2
        if give_up_after is not None:
            defaults |= {"max_time": give_up_after, "backoff_cap": 1.0}
    return bool(backoff_defaults)


__all__ = ["POLL_SECONDS", "shorten_backoff"]
