"""Fingerprints: what they cover, and that they name what they cannot read."""

import hashlib

import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import fingerprint
from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.parameters import fingerprint_by_kind

from helpers.models import make_model


def of_floats_alone(model: nn.Module) -> str:
    """The fingerprint of a model that has nothing but floating-point parameters."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_floats_has_the_fingerprint_of_their_bytes(architecture: str, dtype: torch.dtype) -> None:
    """Whatever buffers it computes for itself, such as rotary frequencies."""
    model = make_model(architecture, dtype)
    assert fingerprint(model) == of_floats_alone(model)


class Everything(nn.Module):
    """Parameters of all kinds, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.precise = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.int8 = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        self.phases = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.flags = nn.Parameter(torch.ones(2, dtype=torch.bool), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("empty", torch.zeros(0, 3, dtype=torch.int64))
        self.register_buffer("computed", torch.ones(3), persistent=False)


KINDS = {
    "weight": "floating-point parameters", "precise": "floating-point parameters", "int8": "other parameters",
    "phases": "other parameters", "flags": "other parameters", "norm.running_var": "buffers",
    "norm.num_batches_tracked": "buffers",
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_fingerprint_changes_with_any_tensor_that_a_checkpoint_holds(name: str, kind: str) -> None:
    model, changed = Everything(), Everything()
    assert fingerprint(model) == fingerprint(changed)
    tensor = changed.state_dict()[name]
    tensor.copy_(torch.logical_not(tensor))
    assert fingerprint(model) != fingerprint(changed)
    before, after = fingerprint_by_kind(model), fingerprint_by_kind(changed)
    assert [k for k in before if before[k] != after[k]] == [kind]


def test_buffers_that_no_checkpoint_holds_do_not_count() -> None:
    model, changed = Everything(), Everything()
    changed.computed.zero_()  # type: ignore[operator]
    assert fingerprint(model) == fingerprint(changed)


def test_name_dtype_and_shape_of_a_buffer_count() -> None:
    def with_buffer(name: str, buffer: Tensor) -> str:
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        model.register_buffer(name, buffer)
        return fingerprint(model)

    zeros = torch.zeros(4, dtype=torch.int32)
    prints = [
        with_buffer("a", zeros), with_buffer("b", zeros), with_buffer("a", zeros.view(2, 2)),
        with_buffer("a", zeros.view(torch.float32)),
    ]  # fmt: skip
    assert len(set(prints)) == 4


@pytest.mark.parametrize("values", [torch.ones(3, device="meta"), torch.ones(3, 3).to_sparse()], ids=["meta", "sparse"])
def test_a_tensor_without_readable_bytes_is_named(values: Tensor) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("unreadable", values)
    with pytest.raises(ModelError, match=r"no fingerprint: the values of 'unreadable' .* load the model with plain"):
        fingerprint(model)
