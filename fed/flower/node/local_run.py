"""``LocalRun``: a node's part in a run, made of the server's settings and the node's own model and examples.

A node accepts from the server only the settings that define the run. Paths, devices and the permission to run code are
the node's own.
"""

import logging
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
from ....engine.lm.data import file_rows
from ....engine.lm.example_set import Examples
from ....engine.mask import SparseMask
from ....engine.parameters import fingerprint
from ...client import Client, ClientData
from ...config.run_config import RunConfig, make_config
from ...config.toml import parse_toml, to_toml
from ...methods import Elements
from ...replica import Replica
from ...setup.data import client_shares, describe_examples, encode, encode_rows
from ...setup.mask import make_mask
from ...setup.model import load_language_model
from ...setup.server_and_clients import make_terms
from ...setup.threads import choose_threads

# The node's own log: its lines may quote the node's examples, which the server must not see.
_LOG = logging.getLogger("meerkat.worker")
# Settings of a machine, not of the run: they are not sent, and they are ignored in a message.
_MACHINE_SETTINGS = frozenset({"data_dir", "data", "validation", "calibration", "mask", "backend", "device",
                               "capture", "offload", "calibration_elements", "snapshot_every", "attack",
                               "attackers"})  # fmt: skip
# Settings that a node may choose for itself: name in `--node-config` -> name of the setting.
_NODE_SETTINGS = {"model": "model", "data": "data", "data-dir": "data_dir", "chat-template": "chat_template",
                  "mask": "mask", "device": "device", "backend": "backend", "capture": "capture",
                  "offload": "offload", "calibration-elements": "calibration_elements"}  # fmt: skip
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Kinds of masked elements that follow from settings and model alone: the mask need not be sent.
DERIVED_ELEMENTS = frozenset({Elements.ALL, Elements.MAGNITUDE, Elements.RANDOM, Elements.LORA})


def settings_for_nodes(config: RunConfig) -> str:
    """The settings of a run that are sent to nodes, as TOML. If the data are the server's own, they have no task."""
    return to_toml({name: value for name, value in config.as_given().items() if name not in _MACHINE_SETTINGS})


def settings_on_node(toml: str, node: Mapping[str, Any]) -> RunConfig:
    """Combines the server's settings of a run with the node's own.

    Args:
        toml: the server's settings as TOML.
        node: the node's configuration, by the names of ``--node-config``.

    Raises:
        ConfigError: if the two contradict each other, or the server sets what only the node may set.
    """
    settings = parse_toml(toml, "the server's settings")
    accepted = {name: value for name, value in settings.items() if name not in _MACHINE_SETTINGS}
    model = str(accepted.get("model", embedded.NAME))
    if "model" not in node and model != embedded.NAME and (not _HUB_ID.fullmatch(model) or Path(model).exists()):
        raise ConfigError(
            f"the run's model is the path {model!r}; a node loads a path only if it is started with "
            f"--node-config 'model=\"DIR\"'"
        )
    if "dataset" in accepted:
        _check_data_set(str(accepted["dataset"]))
    elif "task" not in accepted and "data" not in node:
        raise ConfigError(
            "the run uses each node's own examples; start this node with --node-config 'data=\"FILE.jsonl\"'"
        )
    if accepted.pop("chat_template", None) is not None and "chat-template" not in node:
        raise ConfigError(
            "the run has a chat template of its own; start this node with the same file: "
            "--node-config 'chat-template=\"FILE\"'"
        )
    return make_config(accepted, {name: node[key] for key, name in _NODE_SETTINGS.items() if key in node})


def _check_data_set(name: str) -> None:
    """Raises ``ConfigError`` if the name that the server gives may stand for files of this node."""
    if not _HUB_ID.fullmatch(name) or Path(name).exists():
        raise ConfigError(f"the run's data set is the path {name!r}; a node reads no path that the server names")
    if "/" not in name:  # for `datasets`, some of these names are file formats of the working directory
        raise ConfigError(
            f"the run's data set is {name!r}; a node reads only data sets whose name has an owner: "
            f"start the run with --dataset OWNER/{name}"
        )


@dataclass
class LocalRun:
    """A run as a node keeps it between messages.

    Args:
        config: the run's settings on this node.
        replica: the model. All clients on it share it: one client in a deployment, all clients of an actor in a
            simulation.
        data: training examples of all clients, or only the node's own.
        shares: for each client, the indices of its examples in ``data``; None if all of them are the node's own.
    """

    config: RunConfig
    replica: Replica
    data: Examples
    shares: list[Tensor] | None
    _clients: dict[int, Client] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def prepare(cls, settings: str, base: str, mask_digest: str, mask: bytes, node: Mapping[str, Any]) -> "LocalRun":
        """Loads model, mask and examples.

        Args:
            settings: the server's settings as TOML; see ``settings_on_node``.
            base: fingerprint of the server's base model.
            mask_digest: digest of the server's mask.
            mask: contents of the mask's file, or empty.
            node: the node's configuration, by the names of ``--node-config``.

        Raises:
            MeerkatError: if something is missing on this node, or differs from the server's.
        """
        config = settings_on_node(settings, node)
        choose_threads(config.model.source)
        lm = load_language_model(config)
        own_base = fingerprint(lm.model)
        if own_base != base:
            raise ModelError(
                f"the run's base model is {base[:12]}, this node's ({config.model.source}) is {own_base[:12]}"
            )
        own_mask = _choose_mask(config, mask, lm)
        if own_mask.digest != mask_digest:
            raise MaskError(f"the run's mask is {mask_digest[:12]}, this node's is {own_mask.digest[:12]}")
        terms = make_terms(config, own_mask)
        replica = Replica(lm.model, own_mask, terms, config.model.backend, config.model.capture, config.step.points)
        if config.data.file is not None:  # none are held out: the server evaluates on its own examples
            rows = file_rows(config.task, config.data.file)
            examples, shares = encode_rows(config, lm, rows, config.task.name), None
            examples.resolve_layout(config.step.layout, lm.model)
        else:
            data = encode(config, lm)
            examples, shares = data.train, client_shares(config, data)
        for line in describe_examples(examples):
            _LOG.info(line)
        return cls(config, replica, examples, shares)

    def client(self, id: int) -> Client:
        """The client with an id, made when first asked for; raises ``ConfigError`` if the run has no such client."""
        if id not in self._clients:
            if not 0 <= id < self.config.clients.count:
                raise ConfigError(f"this node is client {id}; the run has clients 0 to {self.config.clients.count - 1}")
            self._clients[id] = self._make_client(id)
        return self._clients[id]

    def _make_client(self, id: int) -> Client:
        config, step, privacy = self.config, self.config.step, self.replica.terms.privacy
        indices = torch.arange(len(self.data), device="cpu") if self.shares is None else self.shares[id]
        # in private, batches and noise must be secret, from the server above all
        seed = stream.derived_seed(config.seed, "data", id) if privacy is None else secrets.randbits(64)
        noise = None if privacy is None else secrets.randbits(64)
        poisson = privacy is not None
        data = ClientData(self.data, indices, step.batch_size, seed, step.micro_batch_size, poisson=poisson)
        return Client(id, data, self.replica, config.objective, privacy=privacy, noise_seed=noise)


def _choose_mask(config: RunConfig, sent: bytes, lm: Any) -> SparseMask:
    """Returns the mask of the node's own file, the one that the server sent, or the one derived from the settings."""
    if config.mask.file is not None or (not sent and config.method.recipe.elements in DERIVED_ELEMENTS):
        return make_mask(config, lm)
    if not sent:
        raise MaskError("the server sent no mask; start this node with --node-config 'mask=\"FILE\"'")
    return SparseMask.from_bytes(sent, lm.model)


__all__ = ["DERIVED_ELEMENTS", "LocalRun", "settings_for_nodes", "settings_on_node"]
