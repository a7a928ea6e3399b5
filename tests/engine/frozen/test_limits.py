"""Read-only weights at their limits: devices, autocast, values that a format cannot hold, options without effect."""

import pytest
import torch
from torch import nn

from meerkat_engine import load_model
from meerkat_engine.engine.errors import ConfigError, ModelError
from meerkat_engine.engine.frozen.freeze import freeze
from meerkat_engine.engine.frozen.quantized import Int8Stored
from meerkat_engine.engine.frozen.stored import PlainStored
from meerkat_engine.engine.frozen.weight import FrozenWeight
from meerkat_engine.engine.lm import embedded


def test_a_weight_is_on_the_device_that_its_tensors_name() -> None:
    """torch names a GPU with its index, and users without: "cuda" is no other device than "cuda:0"."""
    given = torch.device("cpu", 0)
    weight = FrozenWeight(PlainStored(torch.ones(2, 2)), torch.float32, given)
    assert weight.device == torch.zeros(1).to(given).device
    assert weight.device == weight.dense().device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_is_never_the_stored_tensor(dtype: torch.dtype) -> None:
    stored = PlainStored(torch.ones(2, 2))
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        stored.dense(dtype, device).zero_()
    assert torch.equal(stored.values, torch.ones(2, 2))
    assert stored.read(torch.float32, stored.values.device) is stored.values


def test_masked_weights_are_added_under_autocast() -> None:
    layer = nn.Sequential(nn.Linear(16, 8))
    freeze(layer, adds=True)
    weight = layer[0].weight
    weight.set_beside(*weight.beside(torch.tensor([3, 40])))  # type: ignore[operator,misc]
    x = torch.randn(4, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        weight.values.add_(1.0)  # type: ignore[operator]
        after = layer(x)
    assert (before != after).any(0).tolist() == [True, False, True, False, False, False, False, False]


def test_a_row_of_zeros_can_be_rounded_to() -> None:
    matrix = torch.randn(3, 64)
    matrix[1] = 0
    stored = Int8Stored.quantize(matrix)
    rounded = stored.rounded(torch.tensor([0.0, 0.5, 0.3]), torch.tensor([64, 65, 2]))
    assert rounded[:2].tolist() == [0, 0]
    assert abs(rounded[2] - 0.3) < 0.02


def test_values_beyond_float16_are_refused_in_int8() -> None:
    with pytest.raises(ConfigError, match="beyond float16"):
        Int8Stored.quantize(torch.full((2, 64), 1e5))


def test_a_read_only_model_is_not_frozen_again() -> None:
    model = nn.Linear(4, 4)
    freeze(model)
    with pytest.raises(ModelError, match="'weight' is read-only already"):
        freeze(model, adds=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "unknown choice quantize='int4'; known: none, as-stored, nf4, int8, torchao-int8"),
        ({"quantize": "nf4", "offload": "gpu"}, "unknown choice offload='gpu'"),
        ({"adds": True}, "give quantize too"),
        ({"offload": "disk"}, "give quantize too"),
    ],
    ids=str,
)
def test_options_of_loading_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(str(embedded.DIRECTORY), **options)  # type: ignore[arg-type]


def test_options_may_be_given_by_name() -> None:
    model = load_model(str(embedded.DIRECTORY), quantize="as-stored").model
    assert all(isinstance(p, FrozenWeight) for p in model.parameters())
    assert not any(
        isinstance(p, FrozenWeight) for p in load_model(str(embedded.DIRECTORY), quantize="none").model.parameters()
    )
