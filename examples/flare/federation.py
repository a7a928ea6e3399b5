"""What server and clients agree on: model, mask, terms, and whose examples are whose."""

from meerkat_engine import SparseMask, embedded, stream
from meerkat_engine.examples import EncodedTask
from meerkat_engine.fed import Client, ClientData, Replica, Server, Terms
from meerkat_engine.fed.aggregation import Aggregation
from meerkat_engine.fed.partition import Partition, split
from meerkat_engine.objective import Objective

SEED = 11


def make_replica() -> Replica:
    """A copy of the base model at the beginning; a mask of your own goes to everybody as a file."""
    model = embedded.load().model
    mask = SparseMask.random(model, 0.01, SEED)
    return Replica(model, mask, Terms.of(mask, seed=SEED, eps=1e-3, lr=5e-2, local_steps=5))


def make_server(clients: int) -> Server:
    """The server, without a ledger."""
    return Server(list(range(clients)), make_replica(), None, Aggregation())


def make_client(id: int, clients: int, replica: Replica | None = None) -> Client:
    """A client with its share of the examples; in a network it reads its own."""
    lm = embedded.load()
    data = EncodedTask(embedded.TASKS["embedded"], embedded.rows("train"), lm.tokenizer, 128, "embedded")
    share = split(data.labels, clients, Partition.DIRICHLET, SEED, alpha=0.5, at_least=16)[id]
    examples = ClientData(data, share, 16, stream.derived_seed(SEED, "data", id))
    return Client(id, examples, replica or make_replica(), Objective.CANDIDATES)
