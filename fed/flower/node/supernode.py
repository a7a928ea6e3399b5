"""``python -m meerkat_engine.fed.flower.node.supernode``: Flower's SuperNode with shorter waits.

It takes the arguments of ``flower-supernode`` and is the same program, except for what costs most of the time of
rounds that take less than ten seconds. Flower's SuperNode polls for messages every three seconds, starts a Python
process for each, and waits a second if a part of a message is late. This one polls ten times a second, forks its
processes, and drops leftover messages after its SuperLink was killed. Under ``flower-supernode`` the bits are the same.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

from ....engine.errors import TransportError
from ..polling import POLL_SECONDS, shorten_backoff


def replace_module(module: ModuleType, name: str, **attributes: Any) -> None:
    """Changes some attributes of a module that one of Flower's modules imports, for that module only.

    Args:
        module: Flower's module.
        name: name under which it imports the other module.
        attributes: the new attributes.

    Raises:
        TransportError: if it imports no such module: this version of Flower is another one.
    """
    original = getattr(module, name, None)
    if not isinstance(original, ModuleType):
        raise TransportError(
            f"{module.__name__} of this version of Flower does not import {name}; run flower-supernode instead"
        )
    setattr(module, name, SimpleNamespace(**(vars(original) | attributes)))


def drop_leftover_messages(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Wraps Flower's ``_pull_and_store_message`` so that it first drops what is left of earlier messages.

    A message that arrives while its run ends, because the SuperLink is killed and restarted, stays in the node's state
    with its answer. Flower 1.42 would send that answer instead of the next message's, and every later one a message
    late.
    """

    @wraps(pull)
    def wrapper(state: Any, **named: Any) -> int | None:
        state.delete_messages()  # a SuperNode answers each message before it pulls another
        return pull(state=state, **named)

    return wrapper


def main() -> None:
    """Runs the SuperNode."""
    if not shorten_backoff():
        raise TransportError(
            "this version of Flower has no backoff that can be shortened; run flower-supernode instead"
        )
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    def start(command: list[str], **named: Any) -> "subprocess.Popen[bytes]":
        if command[0] == "flower-superexec":
            command = [sys.executable, "-m", "meerkat_engine.fed.flower.node.superexec", *command[1:]]
        return subprocess.Popen(command, **named)

    def sleep(seconds: float) -> None:
        # Flower sleeps three seconds between polls for a message, half a second between polls for its answer; the
        # latter are local and cost nothing
        time.sleep(POLL_SECONDS if seconds > 1 else POLL_SECONDS / 10)

    replace_module(start_client_internal, "time", sleep=sleep)
    replace_module(start_client_internal, "subprocess", Popen=start)
    start_client_internal._pull_and_store_message = drop_leftover_messages(
        start_client_internal._pull_and_store_message
    )
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
