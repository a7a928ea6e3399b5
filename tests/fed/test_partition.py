"""Partitions of examples among clients."""

import hashlib

import numpy as np
import pytest
import torch

from meerkat_engine.engine.errors import DataError
from meerkat_engine.fed.partition import Partition, label_counts, natural_client_names, split

LABELS = torch.arange(600) % 3


@pytest.mark.parametrize("partition", [rule for rule in Partition if rule is not Partition.NATURAL])
@pytest.mark.parametrize("clients", [3, 7])
def test_every_example_belongs_to_one_client(partition: Partition, clients: int) -> None:
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
    assert np.abs(np.array(label_counts(LABELS, shares, 3)) - 50).max() < 20


def test_single_label_clients_hold_one_label() -> None:
    counts = np.array(label_counts(LABELS, split(LABELS, 7, Partition.SINGLE_LABEL, 1), 3))
    assert ((counts > 0).sum(axis=1) == 1).all()
    assert counts.sum(axis=0).tolist() == [200] * 3


def test_dirichlet_is_drawn_per_class_over_clients() -> None:
    """The clients' shares of a class have the mean 1/K and the variance of the Dirichlet distribution."""
    draws = []
    for seed in range(200):
        counts = np.array(label_counts(LABELS, split(LABELS, 4, Partition.DIRICHLET, seed, alpha=0.5), 3))
        draws.append(counts[:, 0] / 200)
    shares = np.array(draws)
    assert np.allclose(shares.mean(axis=0), 0.25, atol=0.06)
    # variance of one share of Dirichlet(0.5 x 4): (1/4)(3/4)/(2+1)
    assert shares[:, 0].var() == pytest.approx(0.0625, rel=0.3)
    even = np.array(label_counts(LABELS, split(LABELS, 4, Partition.DIRICHLET, 0, alpha=1e4), 3))
    assert np.abs(even - 50).max() <= 3


def test_a_partition_that_leaves_a_client_without_enough_examples_is_an_error() -> None:
    with pytest.raises(DataError, match="600 examples cannot give 40 clients 16 each"):
        split(LABELS, 40, Partition.IID, 0, at_least=16)
    with pytest.raises(DataError, match=r"client \d+ of 30 gets \d+ examples under dirichlet\(0.01\), .* a batch"):
        split(LABELS, 30, Partition.DIRICHLET, 0, alpha=0.01, at_least=16)
    with pytest.raises(DataError, match="3 labels, 2 clients"):
        split(LABELS, 2, Partition.SINGLE_LABEL, 0)


def test_the_partitions_are_the_same_as_in_earlier_versions() -> None:
    """Files of earlier runs record the settings of a partition, not the partition."""
    digests = {
        Partition.IID: "869dce7a07d26761",
        Partition.DIRICHLET: "307abc7e62ab3e56",
        Partition.SINGLE_LABEL: "e68e38a074a2c048",
    }
    for partition, digest in digests.items():
        shares = split(LABELS, 4, partition, 5, alpha=0.5)
        text = "|".join(",".join(map(str, share.tolist())) for share in shares)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_natural_clients_get_the_examples_with_their_name() -> None:
    groups = [("b", "c", "a")[i // 2 % 3] for i in range(600)]
    shares = split(LABELS, 3, Partition.NATURAL, 5, groups=groups)
    for name, share in zip("abc", shares, strict=True):
        assert share.tolist() == [i for i in range(600) if groups[i] == name]
    by_number = split(LABELS, 12, Partition.NATURAL, 5, groups=[i % 12 for i in range(600)])
    assert [share[0].item() for share in by_number] == list(range(12))  # 10 comes after 9, not after 1


@pytest.mark.parametrize("clients", [2, 4, 700])
def test_the_number_of_natural_clients_must_be_that_of_the_data(clients: int) -> None:
    with pytest.raises(DataError, match=f"name 3 natural clients, and clients is {clients}; set --clients 3"):
        split(LABELS, clients, Partition.NATURAL, 0, groups=["a", "b", "c"] * 200)


def test_a_natural_client_with_less_than_a_batch_is_an_error() -> None:
    groups = ["few"] * 7 + ["many"] * 593
    with pytest.raises(DataError, match=r"client 0 \(few\) has 7 examples, fewer than the 8 of a batch; use a smaller"):
        split(LABELS, 2, Partition.NATURAL, 0, at_least=8, groups=groups)
    assert [len(share) for share in split(LABELS, 2, Partition.NATURAL, 0, at_least=7, groups=groups)] == [7, 593]


def test_names_of_natural_clients_are_text_or_integers() -> None:
    places = ["t, line 1", "t, line 2"]
    assert natural_client_names([{"site": "b"}, {"site": "a"}], "site", places) == ["b", "a"]
    assert natural_client_names([{"site": 3}, {"site": 11}], "site", places) == [3, 11]
    for rows, message in [
        ([{"site": "a"}, {"ward": "b"}], r"t, line 2: natural clients need the field 'site'; found \['ward'\]"),
        ([{"site": None}], "t, line 1: the field 'site' must name a client by text .*; got None"),
        ([{"site": "a"}, {"site": 1}], "t, line 2: the field 'site' .*; got 1"),
        ([{"site": 1}, {"site": True}], "line 2: the field 'site' .*; got True"),
    ]:
        with pytest.raises(DataError, match=message):
            natural_client_names(rows, "site", places[: len(rows)])


@pytest.mark.parametrize(("classes", "clients"), [(2, 8), (6, 10), (3, 5), (2, 1)])
def test_mixed_clients_are_iid_or_of_one_label(classes: int, clients: int) -> None:
    labels = torch.arange(600) % classes
    shares = split(labels, clients, Partition.MIXED, 4)
    assert sorted(torch.cat(shares).tolist()) == list(range(600))
    counts = torch.tensor(label_counts(labels, shares, classes))
    single = (counts > 0).sum(1) == 1
    assert single.tolist() == [False] * (clients - clients // 2) + [True] * (clients // 2)
    class_size, single_label_clients = 600 // classes, clients // 2
    # Examples dealt to single-label clients, of each class that one of them has; the IID clients get the rest.
    dealt = class_size * single_label_clients // clients
    assert counts[~single].sum(0).tolist() == [
        class_size - dealt * (label < single_label_clients) for label in range(classes)
    ]
    assert (counts[~single] > 0).all()
