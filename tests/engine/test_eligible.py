"""Frozen parameters in masks, and models that no mask can be made of."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.errors import MaskError, ModelError
from meerkat_engine.engine.parameters import ParameterTable

from helpers.losses import CALIBRATION_BATCHES, gradient_moments
from helpers.models import make_model

MAKERS: dict[str, Callable[..., SparseMask]] = {
    "sensitivity": lambda model, u, **frozen: SparseMask.from_gradients(model, CALIBRATION_BATCHES, u, **frozen),
    "magnitude": lambda model, u, **frozen: SparseMask.magnitude(model, u, **frozen),
    "random": lambda model, u, **frozen: SparseMask.random(model, u, 3, **frozen),
    "dense": lambda model, _, **frozen: SparseMask.dense(model, **frozen),
}
TRAINABLE = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]


@pytest.fixture
def partly_frozen() -> nn.Module:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in TRAINABLE)
    return model


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("density", [0.02, 0.8])
def test_frozen_parameters_are_left_out_unless_asked_for(
    partly_frozen: nn.Module, maker: Callable[..., SparseMask], density: float
) -> None:
    mask = maker(partly_frozen, density)
    size = sum(partly_frozen.get_parameter(name).numel() for name in TRAINABLE)
    assert len(mask) == (size if mask.source == "dense" else round(density * size))
    assert {name for name, *_ in mask.ranges()} <= set(TRAINABLE)
    assert mask.table == ParameterTable.of(make_model())  # ids do not depend on what is frozen
    assert maker(partly_frozen, density, frozen=True).digest == maker(make_model(), density).digest
    assert [name for name, p in partly_frozen.named_parameters() if p.requires_grad] == TRAINABLE


def test_the_largest_among_the_parameters_that_train_are_chosen(partly_frozen: nn.Module) -> None:
    squares, _ = gradient_moments(make_model())
    weights = torch.cat([p.detach().view(-1).abs() for p in partly_frozen.parameters()])
    trainable = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in partly_frozen.parameters()])
    for scores, mask in (
        (squares, SparseMask.from_gradients(partly_frozen, CALIBRATION_BATCHES, 0.05)),
        (weights, SparseMask.magnitude(partly_frozen, 0.05)),
    ):
        best = torch.topk(scores.where(trainable, -1), len(mask)).indices
        assert set(mask.ids.tolist()) == set(best.tolist())


def test_named_parameters_are_taken_also_if_frozen(partly_frozen: nn.Module) -> None:
    mask = SparseMask.of_parameters(partly_frozen, ["model.layers.0.mlp.up_proj.weight"])
    assert len(mask) == partly_frozen.get_parameter("model.layers.0.mlp.up_proj.weight").numel()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_model_whose_parameters_are_all_frozen_is_told_both_remedies(maker: Callable[..., SparseMask]) -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(MaskError, match=r"call model\.requires_grad_\(True\) to train them all, or pass frozen=True"):
        maker(model, 0.01)
    assert len(maker(model, 0.01, frozen=True)) > 0


@pytest.mark.parametrize("maker", [*MAKERS.values(), lambda model, _: SparseMask.of_parameters(model, ["x"])])
@pytest.mark.parametrize("kind", ["none", "integers"])
def test_a_model_without_floating_point_parameters_is_rejected(maker: Callable[..., SparseMask], kind: str) -> None:
    model = nn.ReLU()
    if kind == "integers":
        model.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MaskError, match="ReLU has no floating-point parameters, and a mask needs at least one element"):
        maker(model, 0.01)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def with_dtensor() -> nn.Module:
    model, mesh = small(), DeviceMesh("cpu", [0])
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))  # type: ignore[index]
    return model


WRAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DDP": (
        lambda: DistributedDataParallel(small()),
        r"wrapped in DistributedDataParallel.*pass the inner module \(`model\.module`\), and return the mean",
    ),
    "DDP inside": (lambda: nn.Sequential(DistributedDataParallel(small())), "wrapped in DistributedDataParallel"),
    "FSDP": (
        lambda: FullyShardedDataParallel(small(), device_id=torch.device("cpu")),
        "sharded over processes.*use a model that every process holds whole",
    ),
    "fully_shard": (lambda: fully_shard(small(), mesh=DeviceMesh("cpu", [0])), "sharded over processes"),
    "DTensor": (with_dtensor, r"parameter '0\.weight' is sharded over processes \(DTensor\)"),
    "lazy": (lambda: nn.LazyLinear(3), "parameter 'weight' has no shape yet; run the model once"),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
@pytest.mark.parametrize(("wrap", "message"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.usefixtures("one_rank")
def test_models_in_several_processes_are_rejected_everywhere(wrap: Callable[[], nn.Module], message: str) -> None:
    model, mask = wrap(), SparseMask.random(small(), 0.5, 1)
    uses: list[Callable[[], object]] = [
        lambda: SparseMask.from_gradients(model, [torch.ones(1, 4)], 0.5, loss=lambda m, x: m(x).sum()),
        lambda: SparseMask.random(model, 0.5, 1),
        lambda: SparseMask.dense(model),
        lambda: SparseMask.magnitude(model, 0.5),
        lambda: SparseMask.of_parameters(model, ["0.weight"]),
        lambda: mask.check(model),
        lambda: SparseZO(model, mask, lr=0.1),
    ]
    for use in uses:
        with pytest.raises(ModelError, match=message):
            use()


@pytest.mark.usefixtures("one_rank")
def test_the_inner_module_of_ddp_can_be_masked() -> None:
    model = DistributedDataParallel(small())
    mask = SparseMask.from_gradients(model.module, [torch.ones(1, 4)], 0.5, loss=lambda m, x: m(x).square().sum())
    assert mask.table == ParameterTable.of(small())


def test_shapes_are_enough_for_a_table_and_a_random_mask() -> None:
    with torch.device("meta"):
        model = make_model()
    assert ParameterTable.of(model) == ParameterTable.of(make_model())
    assert SparseMask.random(model, 0.01, 1).digest == SparseMask.random(make_model(), 0.01, 1).digest


def test_masked_parameters_need_values() -> None:
    model = make_model()
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.to("meta"))  # type: ignore[union-attr]
    masks = [SparseMask.of_parameters(make_model(), [name]) for name in ("model.norm.weight", TRAINABLE[1])]
    with pytest.raises(ModelError, match=r"parameter 'model\.norm\.weight' is on the meta device"):
        SparseZO(model, masks[0], lr=0.1)
    SparseZO(model, masks[1], lr=0.1)
