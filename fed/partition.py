"""Partitions of the training examples among clients: IID, Dirichlet, single-label, mixed, natural.

Each example belongs to exactly one client. The Dirichlet partition is drawn per class over clients, as in Flower and
FedKSeed. (DeComFL draws per client over classes, which gives another split for the same alpha.)

References:
    Hsu et al., arXiv 1909.06335; Meerkat, arXiv 2506.03337, section 4.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from ..engine import stream
from ..engine.errors import DataError
from ..engine.lm.tasks import Row
from ..engine.lm.text import check_text

# Name of a natural client: a value of a field of the data.
Group = str | int

_ATTEMPTS = 100  # draws of a Dirichlet partition in which every client has enough examples


class Partition(StrEnum):
    """Rule by which examples are dealt to clients."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    SINGLE_LABEL = "single-label"
    MIXED = "mixed"
    NATURAL = "natural"

    def describe(self, alpha: float) -> str:
        """Describes the rule in words, for configurations and summaries."""
        if self is Partition.MIXED:
            return "mixed: the first half of the clients iid, the others of one label each"
        if self is Partition.DIRICHLET:
            return f"dirichlet({alpha:g}), drawn per class over clients"
        return self.value


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
        labels: class of each example, int64 [n].
        clients: ``K``, number of clients, at least 1.
        partition: the rule.
        seed: seed of the split, in [0, 2**64).
        alpha: concentration parameter of the Dirichlet rule, positive. A smaller alpha makes clients less alike.
        at_least: minimum number of examples of a client, for example a batch.
        groups: name of the client of each example, [n]; for the natural rule only.

    Returns:
        The indices of each client's examples, int64, ascending. Natural clients are ordered by name.

    Raises:
        DataError: if a client would get fewer than ``at_least`` examples, or if the number of natural clients is not
            ``clients``. The error names the client and says what to change.
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


def label_counts(labels: Tensor, shares: list[Tensor], classes: int) -> list[list[int]]:
    """Counts the examples of each class that each client has: [K][classes]."""
    return [torch.bincount(labels[share], minlength=classes).tolist() for share in shares]


def natural_client_names(rows: Sequence[Row], field: str, places: Sequence[str]) -> list[Group]:
    """Reads the name of each example's natural client.

    Args:
        rows: the examples.
        field: field that names the client.
        places: where each example stands, for error messages.

    Raises:
        DataError: if an example does not have the field, its value is neither text nor an integer, or the type is not
            the same for all examples. The error names the example.
    """
    names: list[Group] = []
    for row, where in zip(rows, places, strict=True):
        if field not in row:
            raise DataError(f"{where}: natural clients need the field {field!r}; found {sorted(row)}")
        value = row[field]
        if type(value) not in (str, int) or (names and type(value) is not type(names[0])):
            raise DataError(
                f"{where}: the field {field!r} must name a client by text or by an integer, the same "
                f"in all examples; got {value!r}"
            )
        if isinstance(value, str):
            check_text(value, f"{where}: field {field!r}")
        names.append(value)
    return names


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
                f"client {number} ({name}) has {len(members[name])} examples, fewer than the {at_least} of a batch; "
                f"use a smaller batch or another partition"
            )
    return [torch.tensor(members[name], dtype=torch.int64, device="cpu") for name in sorted(members)]


def _shuffled_class(labels: Tensor, label: int, seed: int) -> Tensor:
    """Returns the indices of a class's examples in random order."""
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
        for holder, share in zip(holders, _shuffled_class(labels, label, seed).tensor_split(len(holders)), strict=True):
            shares[holder] = share
    return shares


def _mixed(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Deals to IID clients and then to single-label clients, half each (one IID client more if the number is odd).

    The single-label clients get the same share of each class that one of them has.
    """
    iid, classes = clients - clients // 2, labels.unique().tolist()
    shares: list[Tensor] = [labels.new_empty(0)] * clients
    rest = []
    for position, label in enumerate(classes):
        members, holders = _shuffled_class(labels, label, seed), range(iid + position, clients, len(classes))
        dealt = members.numel() * (clients - iid) // clients if holders else 0
        for holder, share in zip(holders, members[:dealt].tensor_split(max(1, len(holders))), strict=False):
            shares[holder] = share
        rest.append(members[dealt:])
    pool = torch.cat(rest)
    mixed = pool[stream.permutation(stream.derived_seed(seed, "part"), pool.numel())]
    shares[:iid] = mixed.tensor_split(iid)
    return shares


def _dirichlet(labels: Tensor, clients: int, seed: int, alpha: float, at_least: int) -> list[Tensor]:
    if alpha <= 0:
        raise DataError(f"alpha must be positive, got {alpha}")
    generator = np.random.Generator(np.random.Philox(stream.derived_seed(seed, "diri")))
    members = [_shuffled_class(labels, label, seed) for label in labels.unique().tolist()]
    for _ in range(_ATTEMPTS):
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for class_members in members:
            bounds = np.cumsum(generator.dirichlet([alpha] * clients))[:-1] * class_members.numel()
            tensor_slices = class_members.tensor_split([round(bound) for bound in bounds.tolist()])
            for part, piece in zip(parts, tensor_slices, strict=True):
                part.append(piece)
        shares = [torch.cat(part) for part in parts]
        if min(share.numel() for share in shares) >= at_least:
            break
    return shares


__all__ = ["Group", "Partition", "label_counts", "natural_client_names", "split"]
