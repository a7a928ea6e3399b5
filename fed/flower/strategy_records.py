"""Arrays that Flower's own strategies exchange with a node; see ``node.strategy``."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message

from ...engine.errors import MessageError

SCALARS = "scalars"
_SUMS = "meerkat-sums"  # key in a node's state


def cumulative_sums(message: Message, context: Context) -> np.ndarray:
    """Adds a message's sums of scalars to those in the node's state, and returns all of them.

    Returns:
        float64 [rounds so far, T * queries]; the last row is the message's.

    Raises:
        MessageError: if this node missed a round: the scalars of that round and of the next cannot be separated.
    """
    sums = message.content.array_records["arrays"][SCALARS].numpy().astype(np.float64).reshape(1, -1)
    round = int(str(message.content.config_records["config"]["server-round"]))
    seen = np.empty((0, sums.shape[1]))
    if _SUMS in context.state.array_records:
        seen = context.state.array_records[_SUMS][SCALARS].numpy()[: round - 1]
    if len(seen) != round - 1:
        raise MessageError(f"round {round} came after round {len(seen)}: a node that missed a round cannot follow")
    seen = np.concatenate([seen, sums])
    context.state[_SUMS] = ArrayRecord({SCALARS: Array(seen)})
    return seen


__all__ = ["SCALARS", "cumulative_sums"]
