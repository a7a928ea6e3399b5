"""Both points of a step in one forward pass: the losses are those of two passes, or the points are computed apart."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine import two_points
from meerkat_engine.engine.errors import ConfigError, ModelError
from meerkat_engine.engine.frozen import weight
from meerkat_engine.engine.frozen.freeze import freeze

from helpers.models import make_model

IDS = torch.arange(4 * 12).remainder(89).add(5).view(4, 12)


def frozen_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, *, adds: bool = False) -> nn.Module:
    model = make_model(architecture, dtype)
    freeze(model, adds=adds)
    return model


def make_optimizer(model: nn.Module, points: str, density: float = 0.05, **options: Any) -> SparseZO:
    mask = SparseMask.random(model, density, 1, frozen=True)
    return SparseZO(model, mask, lr=0.1, eps=1e-2, seed=3, frozen=True, points=points, **options)


def loss_of(model: nn.Module, ids: torch.Tensor = IDS) -> Callable[[], torch.Tensor]:
    def loss() -> torch.Tensor:
        kwargs = {"position_ids": torch.arange(ids.shape[1])[None]}  # one row for all sequences
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **kwargs).loss.float()

    return loss


@pytest.mark.parametrize("adds", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2"])
def test_one_pass_gives_the_losses_of_two(architecture: str, dtype: torch.dtype, adds: bool) -> None:
    """Everything is masked densely: norms, biases, embeddings and linear layers."""
    scalars = []
    for points in ("separate", "together"):
        model = frozen_model(architecture, dtype, adds=adds)
        opt = make_optimizer(model, points, density=0.3)
        for _ in range(3):
            opt.step(loss_of(model))
        scalars.append(torch.tensor(opt.projected_gradients))
        assert opt.not_together is None
    tolerance = 1e-3 if dtype is torch.float32 else 0.5
    assert torch.allclose(*scalars, atol=tolerance, rtol=1e-2)
    assert scalars[0].abs().max() > 20 * tolerance or dtype is torch.bfloat16


def test_the_decoder_computes_the_batch_twice_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen_model()
    rows: list[int] = []
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))  # type: ignore[operator]
    opt = make_optimizer(model, "together")
    opt.step(loss_of(model))
    assert rows == [8, 4, 4, 8]  # the check, once: together and apart; then the step
    rows.clear()
    opt.step(loss_of(model))
    opt.step_many([loss_of(model)] * 2)
    assert rows == [8, 8, 8]
    assert all(p.second is None for p in model.parameters())  # type: ignore[union-attr]
    assert "forward" not in vars(model.model)


def test_a_batch_in_parts_and_several_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = []
    for points in ("separate", "together"):
        model = frozen_model()
        opt = make_optimizer(model, points, queries=2)
        parts = [loss_of(model, part) for part in IDS.split(2)]
        for _ in range(2):
            opt.step(lambda parts=parts: torch.stack([part() for part in parts]).mean())
        scalars.append(torch.tensor(opt.projected_gradients))
    assert torch.allclose(*scalars, atol=1e-3)


def test_a_loss_outside_of_the_decoder_is_computed_at_its_point() -> None:
    """The head, tied to the embeddings, is called by hand after the decoder, as for long answers."""

    def loss(model: Any) -> Callable[[], torch.Tensor]:
        return lambda: model.lm_head(model.model(input_ids=IDS).last_hidden_state[:, -1]).float().logsumexp(-1).mean()

    scalars = []
    for points in ("separate", "together"):
        model = frozen_model()
        opt = make_optimizer(model, points)
        opt.step(loss(model))
        scalars += opt.projected_gradients
    assert scalars[0] == pytest.approx(scalars[1], abs=1e-3)


def test_auto_computes_many_tokens_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen_model()
    rows: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))  # type: ignore
    opt = make_optimizer(model, "auto")
    monkeypatch.setitem(two_points._PAYS_UP_TO, "cpu", 47)
    opt.step(loss_of(model))
    assert rows == [4, 4]
    monkeypatch.setitem(two_points._PAYS_UP_TO, "cpu", 48)
    opt.step(loss_of(model))
    assert rows[-1] == 8


@pytest.mark.parametrize("points", ["auto", "together"])
def test_a_model_that_mixes_rows_is_found(points: str) -> None:
    """Each token's hidden state gets a part of the mean of the batch: nothing that two halves can have."""
    model = frozen_model()
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    layer.register_forward_hook(lambda module, args, out: out + out.mean(0, keepdim=True))  # type: ignore[operator]
    opt = make_optimizer(model, points)
    if points == "together":
        with pytest.raises(ModelError, match="cannot be computed in one forward pass: the hidden states differ by"):
            opt.step(loss_of(model))
        assert opt.weights.restored
        return
    opt.step(loss_of(model))
    assert "computed separately: the hidden states differ" in (opt.not_together or "")
    other = frozen_model()
    other.model.layers[0].register_forward_hook(lambda module, args, out: out + out.mean(0, keepdim=True))  # type: ignore
    apart = make_optimizer(other, "separate")
    apart.step(loss_of(other))
    assert opt.projected_gradients == apart.projected_gradients


def test_an_operation_that_is_not_known_is_found() -> None:
    """Gemma's norms compute ``1 + weight`` before they meet the batch."""
    model = frozen_model("gemma2")
    opt = make_optimizer(model, "auto")
    opt.step(loss_of(model))
    assert "cannot be computed at two points in one forward pass" in (opt.not_together or "")


def test_a_half_at_the_wrong_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check must fail if both halves are computed at the first point."""
    monkeypatch.setattr(weight, "_by_halves", lambda func, weights, args, kwargs: weight._compute(func, args, kwargs))
    model = frozen_model()
    opt = make_optimizer(model, "together")
    with pytest.raises(ModelError, match="the hidden states differ"):
        opt.step(loss_of(model))


def test_parts_on_both_sides_of_the_limit_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small micro-batch is computed at both points, a large one at each; then the closure calls them in order."""
    monkeypatch.setitem(two_points._PAYS_UP_TO, "cpu", 24)
    scalars = []
    for points in ("separate", "auto"):
        model = frozen_model()
        opt = make_optimizer(model, points)
        parts = [loss_of(model, part) for part in (IDS[:3], IDS[3:], IDS[1:])]
        for _ in range(2):
            opt.step(lambda parts=parts: torch.stack([part() for part in parts]).mean())
        scalars.append(opt.projected_gradients)
    assert scalars[0] == pytest.approx(scalars[1], abs=1e-3)


def test_a_copied_layer_is_read_at_the_same_point() -> None:
    scalars = []
    for points in ("separate", "together"):
        model = frozen_model()
        layers = model.model.layers  # type: ignore[union-attr]
        layers[1] = copy.deepcopy(layers[0])  # type: ignore[index,operator]
        opt = make_optimizer(model, points)
        opt.step(loss_of(model))
        scalars += opt.projected_gradients
    assert scalars[0] == pytest.approx(scalars[1], abs=1e-3)


def test_a_batch_that_is_not_finite_is_skipped_and_the_next_is_checked() -> None:
    model, bad = frozen_model(), [True]
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    layer.register_forward_hook(lambda module, args, out: out * float("nan") if bad[0] else out)  # type: ignore[operator]
    opt = make_optimizer(model, "together", nonfinite="skip")
    assert opt.step(loss_of(model)).isnan()
    bad[0] = False
    opt.step(loss_of(model))
    assert torch.tensor(opt.projected_gradients).isnan().tolist() == [True, False]
    assert opt.not_together is None


def test_another_mask_at_the_second_point_is_refused() -> None:
    model = frozen_model()
    ones = torch.ones_like(IDS)
    masks = iter([ones, ones, ones, torch.cat((torch.zeros_like(IDS[:, :1]), ones[:, 1:]), 1)])
    opt = make_optimizer(model, "together")
    positions = torch.arange(12)[None].expand(4, -1)

    def loss() -> torch.Tensor:
        return model(input_ids=IDS, attention_mask=next(masks), position_ids=positions, labels=IDS).loss

    with pytest.raises(ModelError, match="another batch at -eps"):
        [opt.step(loss) for _ in range(2)]


def test_a_model_that_is_no_language_model_is_computed_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    freeze(model)
    opt = make_optimizer(model, "auto", density=0.5)
    opt.step(lambda: model(torch.ones(2, 4)).square().mean())
    with pytest.raises(ModelError):
        make_optimizer(model, "together", density=0.5)


def test_another_batch_at_the_second_point_is_refused() -> None:
    model, batches = frozen_model(), iter([IDS, IDS, IDS, IDS + 1])
    opt = make_optimizer(model, "together")
    opt.step(lambda: model(input_ids=next(batches), labels=IDS).loss)
    before = opt.weights.masters()
    with pytest.raises(ModelError, match="another batch at -eps than at \\+eps"):
        opt.step(lambda: model(input_ids=next(batches), labels=IDS).loss)
    assert torch.equal(opt.weights.masters(), before)
    assert opt.weights.restored
    opt.step(loss_of(model))


def test_fewer_calls_at_the_second_point_are_refused() -> None:
    model, calls = frozen_model(), iter([2, 1])
    opt = make_optimizer(model, "together")
    with pytest.raises(ModelError, match="less often at -eps"):
        opt.step(lambda: torch.stack([loss_of(model)() for _ in range(next(calls))]).mean())


def test_an_error_of_the_closure_leaves_the_model_as_it_was() -> None:
    model = frozen_model()
    opt = make_optimizer(model, "together")

    def fails() -> torch.Tensor:
        loss_of(model)()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        opt.step(fails)
    assert "forward" not in vars(model.model)
    assert all(p.second is None for p in model.parameters())  # type: ignore[union-attr]
    assert not model.model.embed_tokens.weight.points.both  # type: ignore[union-attr]
    reference = frozen_model()
    other = make_optimizer(reference, "separate")
    other.step(loss_of(reference))
    opt.step(loss_of(model))
    assert opt.projected_gradients == pytest.approx(other.projected_gradients, abs=1e-3)


def test_plain_weights_are_refused_or_computed_apart() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens\.weight' is plain"):
        make_optimizer(model, "together")
    opt = make_optimizer(model, "auto")
    opt.step(loss_of(model))
    assert opt.not_together is None


def test_choices_are_checked() -> None:
    model = frozen_model()
    with pytest.raises(ValueError, match="unknown choice points='both'; known: auto, separate, together"):
        make_optimizer(model, "both")
    with pytest.raises(ValueError, match="for the two-point estimator"):
        make_optimizer(model, "together", estimator="forward-difference")
    make_optimizer(model, "auto", estimator="forward-difference").step(loss_of(model))
