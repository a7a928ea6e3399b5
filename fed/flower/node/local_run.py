"""A node's part in a run: the server's settings, the node's own model and examples, the client made of both.

The server is believed what a run needs and nothing else: paths, devices and the permission to run code are the node's.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....engine import stream
from ....engine.errors import ConfigError, MaskError, ModelError
from ....engine.lm import embedded
from ....engine.lm.data import custom_rows
from ....engine.lm.examples import EncodedTask
from ....engine.mask import SparseMask
from ....engine.parameters import fingerprint
from ...client import Client, ClientData
from ...config.run_config import RunConfig, make_config
from ...config.toml import parse_toml, to_toml
from ...methods import Elements
from ...replica import Replica
from ...setup.data import client_shares, encode
from ...setup.mask import make_mask
from ...setup.model import load_language_model
from ...setup.server_and_clients import make_terms

# Settings that are the business of the machine they are on: none of them travels, and none is taken from a message.
_LOCAL = frozenset({"data_dir", "data", "validation", "calibration", "mask", "backend", "device", "snapshot_every",
                   "attack", "attackers"})  # fmt: skip
# What a node may say of itself, by the names of `--node-config`, and the settings that these become.
_OWN = {"model": "model", "data": "data", "data-dir": "data_dir", "mask": "mask", "device": "device",
        "backend": "backend"}  # fmt: skip
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Elements that follow from settings and model alone, so that no mask need travel.
FOLLOWING = frozenset({Elements.ALL, Elements.MAGNITUDE, Elements.RANDOM, Elements.LORA})


def settings_for_nodes(settings: Mapping[str, Any]) -> str:
    """The settings of a run that nodes are told, as TOML."""
    return to_toml({name: value for name, value in settings.items() if name not in _LOCAL})


def settings_on_node(toml: str, node: Mapping[str, Any]) -> RunConfig:
    """A run's settings as they are on this node.

    Args:
        toml: from the server.
        node: the node's own configuration.

    Raises:
        ConfigError: if the two do not go together, or the server names what only the node may name.
    """
    settings = parse_toml(toml, "the server's settings")
    given = {name: value for name, value in settings.items() if name not in _LOCAL}
    model = str(given.get("model", embedded.NAME))
    if "model" not in node and model != embedded.NAME and (not _HUB_ID.fullmatch(model) or Path(model).exists()):
        raise ConfigError(
            f"the run's model is {model!r}, a path; say where it lies here: --node-config 'model=\"DIR\"'"
        )
    if "template" in given and "data" not in node:
        raise ConfigError(
            "the run is on data of the nodes' own; say where they lie: --node-config 'data=\"FILE.jsonl\"'"
        )
    return make_config(given, {name: node[key] for key, name in _OWN.items() if key in node})


@dataclass
class LocalRun:
    """What a node holds of a run between its messages.

    Args:
        config: the settings as they are here.
        replica: the model, which the clients on it share: one in a deployment, all of an actor's in a simulation.
        data: training examples of all clients, or the node's own.
        shares: of each client, the indices of its examples; None where all are the node's own.
    """

    config: RunConfig
    replica: Replica
    data: EncodedTask
    shares: list[Tensor] | None
    _clients: dict[int, Client] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def prepare(cls, settings: str, base: str, mask_digest: str, mask: bytes, node: Mapping[str, Any]) -> "LocalRun":
        """Loads model, mask and examples.

        Args:
            settings: from the server, as ``settings_on_node`` takes them.
            base: fingerprint that the server's base model has.
            mask_digest: of the server's mask.
            mask: its file, or empty.
            node: the node's own configuration.

        Raises:
            MeerkatError: if something is missing here, or is not what the server has.
        """
        config = settings_on_node(settings, node)
        lm = load_language_model(config)
        if (found := fingerprint(lm.model)) != base:
            raise ModelError(
                f"the run's base model is {base[:12]}, the one here ({config.model.source}) is {found[:12]}"
            )
        chosen = _mask(config, mask, lm)
        if chosen.digest != mask_digest:
            raise MaskError(f"the run's mask is {mask_digest[:12]}, the one here is {chosen.digest[:12]}")
        replica = Replica(lm.model, chosen, make_terms(config, chosen), config.model.backend)
        if config.data.file is not None:  # all of them: the server evaluates on examples of its own
            task = config.task
            rows, _ = custom_rows(task, config.data.file, config.data.file, config.seed)
            return cls(config, replica, EncodedTask(task, rows, lm.tokenizer, config.data.max_length, task.name), None)
        data = encode(config, lm.tokenizer)
        return cls(config, replica, data.train, client_shares(config, data))

    def client(self, id: int) -> Client:
        """The client of that id; raises ``ConfigError`` if the run has none."""
        if id not in self._clients:
            if not 0 <= id < self.config.clients.count:
                raise ConfigError(
                    f"the node is client {id}; the run has the clients 0 to {self.config.clients.count - 1}"
                )
            self._clients[id] = self._made(id)
        return self._clients[id]

    def _made(self, id: int) -> Client:
        config, step, privacy = self.config, self.config.step, self.replica.terms.privacy
        indices = torch.arange(len(self.data)) if self.shares is None else self.shares[id]
        # who is in a private batch, and the noise, are nobody's business, the server's the least
        seed = stream.derived_seed(config.seed, "data", id) if privacy is None else secrets.randbits(64)
        noise = None if privacy is None else secrets.randbits(64)
        poisson = privacy is not None
        data = ClientData(self.data, indices, step.batch_size, seed, step.micro_batch_size, poisson=poisson)
        return Client(id, data, self.replica, step.objective, privacy=privacy, noise_seed=noise)


def _mask(config: RunConfig, sent: bytes, lm: Any) -> SparseMask:
    """The node's own, the one that was sent, or the one that follows from the settings."""
    if config.mask.file is not None or (not sent and config.method.recipe.elements in FOLLOWING):
        return make_mask(config, lm)
    if not sent:
        raise MaskError("the server sent no mask; say where it lies here: --node-config 'mask=\"FILE\"'")
    return SparseMask.from_bytes(sent, lm.model)


__all__ = ["FOLLOWING", "LocalRun", "settings_for_nodes", "settings_on_node"]
