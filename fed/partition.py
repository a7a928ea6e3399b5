"""Which client holds which examples: iid, Dirichlet, single-label, mixed, natural. Each goes to exactly one client.

Dirichlet is drawn per class over clients, as Flower and FedKSeed do (DeComFL draws per client over classes: the same
alpha is then another split). References: Hsu et al., arXiv 1909.06335; Meerkat, arXiv 2506.03337, section 4.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from ..engine import stream
from ..engine.errors import DataError
from ..engine.lm.tasks import Row

# What a field of the data calls a client.
Group = str | int

_ATTEMPTS = 100


class Partition(StrEnum):
    """How examples are dealt to clients."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    SINGLE_LABEL = "single-label"
    MIXED = "mixed"
    NATURAL = "natural"

    def describe(self, alpha: float) -> str:
        """The convention in words, for configurations and summaries."""
        if self is Partition.MIXED:
            return "mixed: the first half of the clients iid, the others of one label each"
        return f"dirichlet({alpha:g}), drawn per class over clients" if self is Partition.DIRICHLET else self.value


def split(
    labels: Tensor,
    clients: int,
    partition: Partition,
    seed: int,
    *,
    alpha: float = 0.5,
    at_least: int = 1,
    groups: Sequence[Group] | None = None,
) -> list[Tensor]:
    """Deals examples to clients.

    Args:
        labels: int64 [n], class of each example.
        clients: ``K``, at least 1.
        partition: the rule.
        seed: of the split, in [0, 2**64).
        alpha: concentration of the Dirichlet rule, positive; the smaller, the less alike the clients.
        at_least: examples that every client must get (a batch, say).
        groups: for the natural rule, n values: what the data call the client of each example.

    Returns:
        For each client the indices of its examples, int64, ascending. Natural clients are in the order of their values.

    Raises:
        DataError: if a client would be left with fewer examples, or there are not as many natural clients as asked for,
            saying which and what to change.
    """
    if partition is Partition.NATURAL:
        return _natural(groups or (), clients, at_least)
    if labels.numel() < clients * at_least:
        raise DataError(
            f"{labels.numel()} examples cannot give {clients} clients {at_least} each; "
            f"use fewer clients or a smaller batch"
        )
    if partition is Partition.IID:
        shares = list(stream.permutation(stream.derived_seed(seed, "part"), labels.numel()).tensor_split(clients))
    elif partition is Partition.SINGLE_LABEL:
        shares = _single_label(labels, clients, seed)
    elif partition is Partition.MIXED:
        shares = _mixed(labels, clients, seed)
    else:
        shares = _dirichlet(labels, clients, seed, alpha, at_least)
    smallest = min(range(clients), key=lambda i: shares[i].numel())
    if shares[smallest].numel() < at_least:
        raise DataError(
            f"client {smallest} of {clients} gets {shares[smallest].numel()} examples under "
            f"{partition.describe(alpha)}, fewer than the {at_least} of a batch; "
            f"use fewer clients, a smaller batch or another partition"
        )
    return [share.sort().values for share in shares]


def histogram(labels: Tensor, shares: list[Tensor], classes: int) -> list[list[int]]:
    """Examples of each class that each client holds: [K][classes]."""
    return [torch.bincount(labels[share], minlength=classes).tolist() for share in shares]


def client_names(rows: Sequence[Row], field: str, where: str) -> list[Group]:
    """What each row's field says, to deal examples by.

    Raises:
        DataError: if a row (named) lacks the field, or it is neither text nor a whole number, or not the same for all.
    """
    found: list[Group] = []
    for number, row in enumerate(rows, 1):
        if field not in row:
            raise DataError(f"{where}, example {number}: natural clients need the field {field!r}; found {sorted(row)}")
        value = row[field]
        if type(value) not in (str, int) or (found and type(value) is not type(found[0])):
            raise DataError(
                f"{where}, example {number}: field {field!r} names a client, as text or as a whole number "
                f"throughout; got {value!r}"
            )
        found.append(value)
    return found


def _natural(groups: Sequence[Group], clients: int, at_least: int) -> list[Tensor]:
    members: dict[Group, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if len(members) != clients:
        raise DataError(
            f"the data name {len(members)} natural clients, and clients is {clients}; set --clients {len(members)}"
        )
    for number, name in enumerate(sorted(members)):
        if len(members[name]) < at_least:
            raise DataError(
                f"client {number} ({name}) holds {len(members[name])} examples, fewer than the {at_least} of a batch; "
                f"use a smaller batch or another partition"
            )
    return [torch.tensor(members[name]) for name in sorted(members)]


def _of_class(labels: Tensor, label: int, seed: int) -> Tensor:
    members = torch.nonzero(labels == label).view(-1)
    return members[stream.permutation(stream.derived_seed(seed, "part", label), members.numel())]


def _single_label(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    classes = labels.unique().tolist()
    if clients < len(classes):
        raise DataError(
            f"single-label clients need at least one client per label: {len(classes)} labels, {clients} clients"
        )
    shares: list[Tensor] = [labels.new_empty(0)] * clients
    for position, label in enumerate(classes):
        holders = range(position, clients, len(classes))
        for holder, share in zip(holders, _of_class(labels, label, seed).tensor_split(len(holders)), strict=True):
            shares[holder] = share
    return shares


def _mixed(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """IID clients, then as many or one fewer of a single label; these take the same share of every class they hold."""
    iid, classes = clients - clients // 2, labels.unique().tolist()
    shares: list[Tensor] = [labels.new_empty(0)] * clients
    rest = []
    for position, label in enumerate(classes):
        members, holders = _of_class(labels, label, seed), range(iid + position, clients, len(classes))
        taken = members.numel() * (clients - iid) // clients if holders else 0
        for holder, share in zip(holders, members[:taken].tensor_split(max(1, len(holders))), strict=False):
            shares[holder] = share
        rest.append(members[taken:])
    pool = torch.cat(rest)
    mixed = pool[stream.permutation(stream.derived_seed(seed, "part"), pool.numel())]
    shares[:iid] = mixed.tensor_split(iid)
    return shares


def _dirichlet(labels: Tensor, clients: int, seed: int, alpha: float, at_least: int) -> list[Tensor]:
    if alpha <= 0:
        raise DataError(f"alpha must be positive, got {alpha}")
    generator = np.random.Generator(np.random.Philox(stream.derived_seed(seed, "diri")))
    members = [_of_class(labels, label, seed) for label in labels.unique().tolist()]
    for _ in range(_ATTEMPTS):
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for of_class in members:
            bounds = np.cumsum(generator.dirichlet([alpha] * clients))[:-1] * of_class.numel()
            pieces = of_class.tensor_split([round(bound) for bound in bounds.tolist()])
            for part, piece in zip(parts, pieces, strict=True):
                part.append(piece)
        shares = [torch.cat(part) for part in parts]
        if min(share.numel() for share in shares) >= at_least:
            break
    return shares


__all__ = ["Group", "Partition", "client_names", "histogram", "split"]
