"""Notices at once that the Hugging Face hub does not answer, and then uses its cache alone.

The hub's clients repeat each request five times, with pauses of up to 8 s, and make several requests for a model or a
data set: without an answer they need a minute and a half to find what is in the cache.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

# Seconds to connect, and to wait for the answer to one request; the clients' own limit for an answer is 10 s.
_CONNECT, _ANSWER = 5.0, 10.0


@contextmanager
def hub_or_cache(what: str) -> Iterator[None]:
    """Makes the hub's clients use their cache alone in this context, if the hub does not answer one request.

    Does nothing where the hub is switched off (``HF_HUB_OFFLINE``).

    Args:
        what: what is loaded in this context, for messages.

    Raises:
        ConnectionError: if the hub does not answer, and a file is not in the cache (the context raises an OSError).
    """
    reason = None if constants.HF_HUB_OFFLINE else _why_silent()
    if reason is None:
        yield
        return
    silent = f"the Hugging Face hub at {constants.ENDPOINT} does not answer ({reason})"
    try:
        with _offline():
            yield
    except OSError as error:  # a file is not in the cache
        raise ConnectionError(
            f"{silent}, and {what} is not in the cache ({_first_line(error)}); check the network, or give a local path"
        ) from error
    warnings.warn(f"{silent}; {what} was read from the cache", stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class HubState:
    """Whether the hub can be used from here.

    Args:
        endpoint: its address.
        answers: whether it answered a request; None if it was not asked.
        answer: the same in words.
        cache: directory of the files that were downloaded.
    """

    endpoint: str
    answers: bool | None
    answer: str
    cache: Path


def hub_state(*, ask: bool) -> HubState:
    """Returns whether the hub can be used.

    Args:
        ask: whether to send it a request, if it is not switched off.
    """
    reason = None if constants.HF_HUB_OFFLINE or not ask else _why_silent()
    if constants.HF_HUB_OFFLINE:
        answers, answer = None, "is switched off (HF_HUB_OFFLINE): only what is in the cache"
    elif not ask:
        answers, answer = None, "was not asked"
    else:
        answers = reason is None
        answer = "answers" if answers else f"does not answer ({reason}): only what is in the cache, and local paths"
    return HubState(endpoint=constants.ENDPOINT, answers=answers, answer=answer, cache=Path(constants.HF_HUB_CACHE))


def _why_silent() -> str | None:
    """Says why the hub gives no answer to a request; None if it gives any."""
    limits = (_CONNECT, _ANSWER, _ANSWER, _CONNECT)  # to connect, read, write, and get a connection
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=limits, follow_redirects=False)
    except Exception as error:  # of the HTTP library's own types
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """Switches the hub's clients off, as ``HF_HUB_OFFLINE=1`` would have when they were imported."""
    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _first_line(error: BaseException) -> str:
    return next((line.rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["HubState", "hub_or_cache", "hub_state"]
