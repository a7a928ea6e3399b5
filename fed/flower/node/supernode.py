"""``python -m meerkat_engine.fed.flower.node.supernode``: Flower's SuperNode, looking for messages more often.

It takes the arguments of ``flower-supernode``, and is that program but for what costs most of a round's time where a
round takes less than ten seconds: Flower's looks for a message every three seconds, starts a Python process for each,
and waits a second where a part of a message is late. This one looks ten times a second, forks, and is in step again
after its SuperLink was killed. With ``flower-supernode`` itself the bits are the same.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

from ....engine.errors import TransportError
from ..polling import LOOK, shorten_backoff


def replaced(module: ModuleType, name: str, **attributes: Any) -> None:
    """Gives a module of Flower's another view of a module that it imports.

    Raises:
        TransportError: if it does not import it: this is another version of Flower.
    """
    original = getattr(module, name, None)
    if not isinstance(original, ModuleType):
        raise TransportError(
            f"{module.__name__} of this version of Flower uses no {name}; take flower-supernode itself"
        )
    setattr(module, name, SimpleNamespace(**(vars(original) | attributes)))


def in_step(take: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's ``_pull_and_store_message``, but that it forgets first what is left of earlier messages.

    A message that came while its run ended, the SuperLink being killed and started again, is left with its answer:
    Flower 1.42 would send that in place of the next message's answer, and all from then on one message late.
    """

    @wraps(take)
    def taken(state: Any, **named: Any) -> int | None:
        state.delete_messages()  # a SuperNode answers each message before it takes another
        return take(state=state, **named)

    return taken


def main() -> None:
    """Runs the SuperNode."""
    if not shorten_backoff():
        raise TransportError("this version of Flower waits in another way; take flower-supernode itself")
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    def start(command: list[str], **named: Any) -> "subprocess.Popen[bytes]":
        if command[0] == "flower-superexec":
            command = [sys.executable, "-m", "meerkat_engine.fed.flower.node.superexec", *command[1:]]
        return subprocess.Popen(command, **named)

    # three seconds between looks for a message; half a second between those for its answer, which are free
    replaced(start_client_internal, "time", sleep=lambda seconds: time.sleep(LOOK if seconds > 1 else LOOK / 10))
    replaced(start_client_internal, "subprocess", Popen=start)
    start_client_internal._pull_and_store_message = in_step(start_client_internal._pull_and_store_message)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
