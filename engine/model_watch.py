"""``ModelWatch``: notices, with little work, that masked parameters were moved, cast, or replaced in their model."""

from collections.abc import Sequence
from operator import attrgetter, is_

from torch import Tensor, nn

from .launch_groups import MaskedParameter

_dtype, _parameters = attrgetter("dtype"), attrgetter("_parameters")


class ModelWatch:
    """Checks all masked parameters of a model at once.

    Every pass over the weights needs a check, and a model has hundreds of parameters. So a check compares a few lists.
    Only where these differ are the parameters checked one by one, and the first that changed is named.

    Args:
        model: the model.
        parameters: its masked parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[MaskedParameter]) -> None:
        self._model, self._parameters = model, tuple(parameters)
        self._held = [p.parameter for p in parameters]
        self._some_frozen = any(p.live is not p.parameter for p in parameters)
        self._owners, self._names = [p.owner for p in parameters], [p.own_name for p in parameters]
        self._dicts = [owner._parameters for owner in self._owners]
        self._addresses, self._dtypes = [p.address for p in parameters], [p.dtype for p in parameters]
        # The modules on the way to each parameter: (module, name in it, module of that name), each once.
        links: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        for p in parameters:
            module = model
            for name in p.path[:-1]:
                child = module.get_submodule(name)
                links[id(module), name] = module, name, child
                module = child
        self._links = list(links.values())

    def check_memory(self) -> None:
        """Raises ``ModelChangedError`` if a parameter was moved or cast, or its module has another one now."""
        if not (self._are_held() and self.are_in_place()):
            for p in self._parameters:
                p.check_memory()

    def check_present(self) -> None:
        """Raises ``ModelChangedError`` if a parameter is no longer a parameter of the model."""
        if not (self._are_linked() and self._are_held() and self._have_their_dicts()):
            for p in self._parameters:
                p.check_present(self._model)

    def are_in_place(self) -> bool:
        """Whether all parameters have the addresses and dtypes that they had. An address belongs to one device."""
        live = [p.live for p in self._parameters] if self._some_frozen else self._held
        return list(map(Tensor.data_ptr, live)) == self._addresses and list(map(_dtype, live)) == self._dtypes

    def _are_held(self) -> bool:
        """Whether the modules that held the parameters still do."""
        return all(map(is_, map(dict.get, self._dicts, self._names), self._held))

    def _have_their_dicts(self) -> bool:
        """Whether the modules still have the dictionaries of parameters in which ``_are_held`` looks."""
        return all(map(is_, map(_parameters, self._owners), self._dicts))

    def _are_linked(self) -> bool:
        """Whether these modules are still where they were in the model."""
        return all(module._modules.get(name) is child for module, name, child in self._links)


__all__ = ["ModelWatch"]
