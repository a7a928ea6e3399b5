"""Definitions that server and sites share: base model, mask, terms, and the sites' examples."""

from pathlib import Path

from meerkat_engine import SparseMask
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.data import token_batches
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective
from meerkat_engine.fed import Client, ClientData, Replica, Server, Terms
from meerkat_engine.fed.aggregation import Aggregation
from meerkat_engine.fed.partition import Partition, split

SEED = 11
MASK = "mask.safetensors"


def make_mask() -> SparseMask:
    """Makes the mask. This happens once, where the job is made; server and sites get its file next to this one."""
    lm = embedded.load()
    texts, _ = embedded.calibration_texts(256)
    return SparseMask.from_gradients(lm.model, token_batches(texts, lm.tokenizer, 16, 128), density=0.01)


def make_replica(mask: Path) -> Replica:
    """Makes a replica of the base model, at round 1."""
    model = embedded.load().model
    loaded = SparseMask.load(mask, model)
    return Replica(model, loaded, Terms.for_mask(loaded, seed=SEED, eps=1e-3, lr=1e-2, local_steps=5))


def make_server(mask: Path, sites: int) -> Server:
    """Makes the server; it keeps no ledger in this example."""
    return Server(list(range(sites)), make_replica(mask), None, Aggregation())


def make_client(mask: Path, id: int, sites: int) -> Client:
    """Makes a site's client with its share of the examples; in a deployment, a site would read its own examples."""
    lm = embedded.load()
    data = EncodedTask(embedded.TASKS["embedded"], embedded.rows("train"), lm.tokenizer, 128, "embedded")
    share = split(data.labels, sites, Partition.DIRICHLET, SEED, alpha=0.5, at_least=16)[id]
    examples = ClientData(data, share, 16, stream.derived_seed(SEED, "data", id))
    return Client(id, examples, make_replica(mask), Objective.CANDIDATES)
