"""What Flower's own strategies send back and forth; see ``stock``."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message

from ...engine.errors import MessageError

SCALARS = "scalars"
_SEEN = "meerkat-sums"


def cumulative_sums(message: Message, context: Context) -> np.ndarray:
    """Keeps what came down in a node's state; float64 [rounds so far, T * queries], of which the last came now.

    Raises:
        MessageError: if this node missed a round: what it missed cannot be told from what is new.
    """
    sums = message.content.array_records["arrays"][SCALARS].numpy().astype(np.float64).reshape(1, -1)
    round = int(str(message.content.config_records["config"]["server-round"]))
    seen = np.empty((0, sums.shape[1]))
    if _SEEN in context.state.array_records:
        seen = context.state.array_records[_SEEN][SCALARS].numpy()[: round - 1]
    if len(seen) != round - 1:
        raise MessageError(f"round {round} came after round {len(seen)}: a node that missed a round cannot follow")
    seen = np.concatenate([seen, sums])
    context.state[_SEEN] = ArrayRecord({SCALARS: Array(seen)})
    return seen


__all__ = ["SCALARS", "cumulative_sums"]
