"""``check_reply``: whether a reply contains the values that were requested, and a plausible number of examples."""

import numpy as np

from .messages import Stale, TrainReply
from .rejection import RejectedError, Rejection
from .terms import Terms


def check_reply(
    reply: TrainReply, terms: Terms, *, steps: int, claimed: int | None, max_scalar: float, max_examples: int
) -> None:
    """Checks a reply of the current round.

    Args:
        reply: the reply.
        terms: the federation's terms.
        steps: number of local steps that were requested.
        claimed: number of examples that the client reported before; None: nothing was accepted from it so far.
        max_scalar: absolute value above which a scalar is rejected.
        max_examples: number of examples above which a reply is rejected; 0: no limit.

    Raises:
        RejectedError: if the reply is rejected.
    """
    if reply.local_steps != steps:
        raise rejection_error(
            reply, Rejection.COUNT, f"sent a reply for {reply.local_steps} local steps, {steps} were requested"
        )
    _check_values(reply, terms, steps, max_scalar)
    _check_examples(reply, terms, claimed, max_examples)


def rejection_error(answer: TrainReply | Stale, rejection: Rejection, text: str) -> RejectedError:
    """Makes the error for an answer that is rejected; ``text`` continues "client N"."""
    return RejectedError(rejection, f"client {answer.client} {text}", answer.client)


def _check_values(reply: TrainReply, terms: Terms, steps: int, max_scalar: float) -> None:
    if terms.sends_weights:
        sent, noun, expected = reply.masters, "master values", terms.elements
    else:
        sent, noun, expected = reply.scalars, "scalars", steps * terms.queries
    if sent is None:
        text = f"sent no {noun}, {expected} were expected (gradient: {terms.gradient})"
        raise rejection_error(reply, Rejection.COUNT, text)
    if len(sent) != expected:
        raise rejection_error(reply, Rejection.COUNT, f"sent {len(sent)} {noun}, {expected} were expected")
    if reply.scalars is not None and len(sent):
        largest = float(np.fmax.reduce(np.abs(sent)))
        if largest > max_scalar:
            text = f"sent a scalar of absolute value {largest:g}, at most {max_scalar:g} is allowed"
            raise rejection_error(reply, Rejection.TOO_LARGE, text)


def _check_examples(reply: TrainReply, terms: Terms, claimed: int | None, max_examples: int) -> None:
    examples = reply.examples
    if examples == 0:
        raise rejection_error(reply, Rejection.EXAMPLES, "reported 0 examples, at least 1 was expected")
    if terms.privacy is not None and examples < terms.privacy.batch_size:
        text = f"reported {examples} examples, at least {terms.privacy.batch_size} (a private batch) were expected"
        raise rejection_error(reply, Rejection.EXAMPLES, text)
    if 0 < max_examples < examples:
        text = f"reported {examples} examples, at most {max_examples} are allowed"
        raise rejection_error(reply, Rejection.EXAMPLES, text)
    if claimed not in (None, examples):
        text = f"reported {examples} examples, {claimed} in an earlier round"
        raise rejection_error(reply, Rejection.EXAMPLES, text)


__all__ = ["check_reply", "rejection_error"]
