"""Dealing examples to clients."""

import numpy as np
import pytest
import torch

from meerkat_engine.errors import DataError
from meerkat_engine.fed.partition import Partition, histogram, split

LABELS = torch.arange(600) % 3


@pytest.mark.parametrize("partition", list(Partition))
@pytest.mark.parametrize("clients", [3, 7])
def test_every_example_goes_to_one_client(partition: Partition, clients: int) -> None:
    shares = split(LABELS, clients, partition, 5, alpha=1.0)
    assert len(shares) == clients
    assert torch.cat(shares).sort().values.tolist() == list(range(600))
    assert all(torch.equal(share, share.sort().values) for share in shares)
    again = split(LABELS, clients, partition, 5, alpha=1.0)
    assert all(torch.equal(a, b) for a, b in zip(shares, again, strict=True))
    other = split(LABELS, clients, partition, 6, alpha=1.0)
    assert any(not torch.equal(a, b) for a, b in zip(shares, other, strict=True)) or clients == 3


def test_iid_clients_are_alike() -> None:
    shares = split(LABELS, 4, Partition.IID, 1)
    assert [len(share) for share in shares] == [150] * 4
    assert np.abs(np.array(histogram(LABELS, shares, 3)) - 50).max() < 20


def test_single_label_clients_hold_one_label() -> None:
    counts = np.array(histogram(LABELS, split(LABELS, 7, Partition.SINGLE_LABEL, 1), 3))
    assert ((counts > 0).sum(axis=1) == 1).all()
    assert counts.sum(axis=0).tolist() == [200] * 3


def test_dirichlet_is_drawn_per_class_over_clients() -> None:
    """Class shares have the Dirichlet's mean 1/K and variance; small alpha concentrates, large evens out."""
    draws = []
    for seed in range(200):
        counts = np.array(histogram(LABELS, split(LABELS, 4, Partition.DIRICHLET, seed, alpha=0.5), 3))
        draws.append(counts[:, 0] / 200)
    shares = np.array(draws)
    assert np.allclose(shares.mean(axis=0), 0.25, atol=0.06)
    # variance of one share of Dirichlet(0.5 x 4): (1/4)(3/4)/(2+1)
    assert shares[:, 0].var() == pytest.approx(0.0625, rel=0.3)
    even = np.array(histogram(LABELS, split(LABELS, 4, Partition.DIRICHLET, 0, alpha=1e4), 3))
    assert np.abs(even - 50).max() <= 3


def test_partitions_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match="600 examples cannot give 40 clients 16 each"):
        split(LABELS, 40, Partition.IID, 0, at_least=16)
    with pytest.raises(DataError, match=r"client \d+ of 30 gets \d+ examples under dirichlet\(0.01\), .* a batch"):
        split(LABELS, 30, Partition.DIRICHLET, 0, alpha=0.01, at_least=16)
    with pytest.raises(DataError, match="3 labels, 2 clients"):
        split(LABELS, 2, Partition.SINGLE_LABEL, 0)
