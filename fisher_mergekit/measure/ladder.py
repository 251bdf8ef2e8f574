"""Every parameter of a model has one way to be measured; this is who finds it.

Where a layer's rule does not hold, its parameters climb one rung of this ladder, while the rules
are being verified:

    the layer's own rule                  the price of the ordinary gradient
    the module runs again, by example     `Local` at the module that owns the parameter
    its parent runs again, by example     `Local` there
    loose                                 the whole model runs, one example at a time
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import inf

from torch import nn

from fisher_mergekit.measure.layers import layer_for
from fisher_mergekit.measure.layers.base import own_parameters
from fisher_mergekit.measure.layers.local import Local
from fisher_mergekit.measure.tapped import TappedLayer

LOG = logging.getLogger(__name__)


class Ladder:
    """The parameters to measure, and the modules by whose rules they are.

    Args:
        model: whose they are.
        parameters: those to measure.

    Attributes:
        measured: those.
        owned_twice: those of them that several modules own.
        loose: parameters that no rule covers; the session measures them example by example.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]):
        self.model = model
        self.measured = list(parameters)
        self.loose: dict[nn.Parameter, str] = {}
        self._names = {p: name for name, p in model.named_parameters()}
        self._layers: dict[str, TappedLayer] = {}
        self._sealed = False
        chosen = set(self.measured)
        owners: dict[nn.Parameter, int] = {}
        for name, module in model.named_modules():
            own = {n: p for n, p in own_parameters(module).items() if p in chosen}
            for parameter in own.values():
                owners[parameter] = owners.get(parameter, 0) + 1
            if own and name:
                self._layers[name] = TappedLayer(name, module, layer_for(module), own)
            for parameter in own.values() if not name else ():
                self.loosen(parameter, "the whole model owns it")
        self.owned_twice = {p for p, count in owners.items() if count > 1}
        self._leave_to_children()

    def _leave_to_children(self) -> None:
        """Measure what a module with a rule owns there alone, not in a container that also does.

        A masked language model's head holds its decoder's bias, and lets the decoder add it.
        """
        ruled = self._ruled
        for layer in filter(_is_local, list(self._layers.values())):
            for short in [n for n, p in layer.parameters.items() if p in ruled]:
                self._remove(layer, short)

    @property
    def again(self) -> list[str]:
        """Names of the parameters whose module, or its parent, runs again for each example."""
        local = {p for x in self._layers.values() if _is_local(x) for p in x.parameters.values()}
        return [name for name, p in self.model.named_parameters() if p in local]

    @property
    def most_examples(self) -> float:
        """How many examples a batch may have for the rules that hold something of each of them."""
        return min((x.rule.most_examples(x.parameters) for x in self._layers.values()), default=inf)

    @property
    def is_empty(self) -> bool:
        """Whether no layer has a rule: all is left to the loop over single examples."""
        return not self._layers

    def has_rules_for(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether all of them are measured by their layers' own rules."""
        return self._ruled.issuperset(parameters)

    @property
    def _ruled(self) -> set[nn.Parameter]:
        layers = self._layers.values()
        return {p for x in layers if not _is_local(x) for p in x.parameters.values()}

    def loosen_all(self, reason: str) -> None:
        """Leave all parameters to the loop over single examples, and say so once."""
        if len(self.loose) == len(self.measured):
            return
        LOG.warning("%s is measured one example at a time: %s.", "The whole model", reason)
        for parameter in self.measured:
            self._loosen(parameter)
        self._layers.clear()

    def loosen(self, parameter: nn.Parameter, reason: str) -> None:
        """Leave a parameter to the loop over single examples, and say so."""
        if parameter in self.loose:
            return
        LOG.warning("%s is measured one example at a time: %s.", self._names[parameter], reason)
        self._loosen(parameter)

    def _loosen(self, parameter: nn.Parameter) -> None:
        self.loose[parameter] = self._names[parameter]
        for layer, short in self._homes(parameter):
            self._remove(layer, short)

    def climb(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Measure parameters in the next slower way; those of one module climb together, once."""
        before = {parameter: self._homes(parameter) for parameter in parameters}
        for parameter, homes in before.items():
            if self._homes(parameter) != homes:
                continue  # with another one of its module
            if len(homes) == 1:
                self._climb(*homes[0], reason)
            else:
                self.loosen(parameter, reason)

    def _homes(self, parameter: nn.Parameter) -> list[tuple[TappedLayer, str]]:
        """Return where a parameter is measured, and its name there."""
        return [
            (layer, short)
            for layer in self._layers.values()
            for short, p in layer.parameters.items()
            if p is parameter
        ]

    def _climb(self, layer: TappedLayer, short: str, reason: str) -> None:
        parameter = layer.parameters[short]
        name, path = layer.name, short
        if isinstance(layer.rule, Local):  # from the owner to its parent, and no further
            parent, _, own = name.rpartition(".")
            name, path = ("", "") if "." in short else (parent, f"{own}.{short}")
        home = self._layers.get(name)
        if self._sealed or not name or not (home is None or home is layer or _is_local(home)):
            self.loosen(parameter, reason)
            return
        LOG.info("%s.%s: %s; %s runs again for each example.", layer.name, short, reason, name)
        self._remove(layer, short)
        if name in self._layers and not _is_local(self._layers[name]):
            for other in list(layer.parameters):  # the module has one rule only
                moved = layer.parameters[other]
                self._remove(layer, other)
                self._at_local(name).parameters[other] = moved
        self._at_local(name).parameters[path] = parameter

    def _at_local(self, name: str) -> TappedLayer:
        if name not in self._layers:
            module = self.model.get_submodule(name)
            self._layers[name] = TappedLayer(name, module, Local(), {})
        return self._layers[name]

    def _remove(self, layer: TappedLayer, short: str) -> None:
        del layer.parameters[short]
        if not layer.parameters:
            del self._layers[layer.name]

    def _climb_all(self, layer: TappedLayer, reason: str) -> None:
        for short in list(layer.parameters):
            if short in layer.parameters:
                self._climb(layer, short, reason)

    def unreached(self) -> set[nn.Parameter]:
        """Return the parameters of which no module was called in the last forward pass.

        Such a module can be a mere container, and its parameters be used by another one.
        """
        layers = self._layers.values()
        reached = {p for layer in layers if layer.calls for p in layer.parameters.values()}
        return {p for layer in layers for p in layer.parameters.values()} - reached

    def seal(self) -> None:
        """Trust from now on the layers that the last forward pass reached, and no others.

        A layer that is reached later for the first time has not been compared with plain autograd.
        """
        for layer in self._layers.values():
            layer.settled = layer.calls > 0
        self._sealed = True

    @property
    def _idle(self) -> list[nn.Parameter]:
        """What nothing reached in verification: of no module that was called, and not compared."""
        layers = self._layers.values() if self._sealed else ()
        return [p for layer in layers if not layer.settled for p in layer.parameters.values()]


def _is_local(layer: TappedLayer) -> bool:
    return isinstance(layer.rule, Local)
