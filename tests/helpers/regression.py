"""A tiny regression model with its optimizer, for tests of everything around the steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZO

INPUTS = torch.linspace(-1, 1, 32).view(4, 8)


def make_mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Builds a multilayer perceptron with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype).eval()


def squared_output(model: nn.Module) -> Callable[[], Tensor]:
    """Makes a closure: the mean squared output, in float32."""

    def closure() -> Tensor:
        parameter = next(model.parameters())
        return model(INPUTS.to(parameter.dtype)).float().square().mean()

    return closure


def make_step(model: nn.Module, **options: object) -> tuple[SparseZO, Callable[[], Tensor]]:
    """Makes an optimizer over a random mask of a model, and its closure."""
    mask = SparseMask.random(model, 0.3, seed=1, frozen=True)
    opt = SparseZO(model, mask, **{"lr": 0.1, "backend": "torch", **options})  # type: ignore[arg-type]
    return opt, squared_output(model)


def cast_masters(opt: SparseZO) -> Tensor:
    """The masked weights as the masters say: float32 [k]."""
    return torch.cat(
        [wanted.float() for group in opt.weights._launch_groups for _, _, wanted in group.live_and_wanted()]
    )


def live_weights(opt: SparseZO) -> Tensor:
    """The masked weights as they are: float32 [k]."""
    return torch.cat([live.float() for group in opt.weights._launch_groups for _, live, _ in group.live_and_wanted()])
