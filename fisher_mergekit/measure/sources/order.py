"""Which of a model's parameters each state of an optimizer belongs to.

An optimizer's state has numbers, not names: parameters are counted as its groups list them. Most
programs make one group of all parameters, or two: those with weight decay, then those without. Who
decays has changed over the years, and every rule here is tried. None is believed: the number of
groups, of parameters in each, every shape and the groups' weight decay must agree, and all rules
that agree must say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.sources.optimizer import AdamState, Moment, ParameterGroup

Order = list[list[str]]
"""Names of parameters, in the order of each group."""


def _trainer(model: nn.Module) -> set[str]:
    """Not decayed: LayerNorms, and names with `bias` or `norm`; the installed Trainer's rule."""
    from transformers import Trainer  # a second's import that nothing else here needs

    return set(Trainer.get_decay_parameter_names(None, model))


def _layer_norms(model: nn.Module) -> set[str]:
    """Not decayed: LayerNorms, and names with `bias`; transformers before it looked for `norm`."""
    return _outside(model, [nn.LayerNorm])


def _norm_classes(model: nn.Module) -> set[str]:
    """Not decayed: norms of every class, and names with `bias`; the same, where it knew them."""
    norms = list({type(m) for m in model.modules() if type(m).__name__.endswith("Norm")})
    return _outside(model, norms)


def _outside(model: nn.Module, classes: list[type[nn.Module]]) -> set[str]:
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if not isinstance(module, tuple(classes))
        for name, _ in module.named_parameters(recurse=False)
        if "bias" not in f"{path}.{name}"
    }


def _scripts(model: nn.Module) -> set[str]:
    """Not decayed: names with `bias` or `LayerNorm.weight`; transformers' example scripts."""
    parts = ("bias", "LayerNorm.weight", "layer_norm.weight")
    return {n for n, _ in model.named_parameters() if not any(part in n for part in parts)}


def _matrices(model: nn.Module) -> set[str]:
    """Not decayed: what has fewer than two axes; common in training loops of one's own."""
    return {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}


DECAYED: tuple[Callable[[nn.Module], set[str]], ...] = (
    _trainer,
    _layer_norms,
    _norm_classes,
    _scripts,
    _matrices,
)


def assign(state: AdamState, model: nn.Module) -> dict[str, Moment | None]:
    """Return every parameter's state by its name; parameters that the optimizer lacks are absent.

    Args:
        state: of the optimizer that trained the model.
        model: may be on the meta device.

    Raises:
        MeasureError: they do not belong together, or nobody can tell in which order.
    """
    orders = _orders(state, model)
    fitting = [order for order in orders if _misfit(order, state.groups, model) is None]
    distinct = list({str(order): order for order in fitting}.values())
    if len(distinct) > 1:
        first, second = ([n for group in order for n in group] for order in distinct[:2])
        one, other = next((a, b) for a, b in zip(first, second, strict=True) if a != b)
        raise MeasureError(
            f"{state.path} does not say whose its states are: by its groups and shapes one could "
            f"be of {one} or of {other}. Save it from an optimizer that was given "
            "model.named_parameters()."
        )
    if not distinct:
        raise MeasureError(_complaint(orders, state, model))
    return {
        name: moment
        for names, group in zip(distinct[0], state.groups, strict=True)
        for name, moment in zip(names, group.moments, strict=True)
    }


def _named(state: AdamState, model: nn.Module) -> Order:
    """Return the optimizer's own names; a tied parameter may have another of its names there."""
    owners = {id(p): name for name, p in model.named_parameters()}
    aliases = {name: owners[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    order = []
    for group in state.groups:
        plain = [name.removeprefix("module.") for name in group.names or ()]  # of a DDP wrapper
        order.append([aliases.get(name, name) for name in plain])
    return order


def _orders(state: AdamState, model: nn.Module) -> list[Order]:
    """Return every order of this many groups that a program could have used."""
    if all(group.names is not None for group in state.groups):
        return [_named(state, model)]
    if len(state.groups) == 1:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        return [[[name for name, _ in model.named_parameters()]], [trained]]
    if len(state.groups) == 2:
        return list(_split(model, *(group.weight_decay for group in state.groups)))
    return []


def _split(model: nn.Module, first_decay: float, second_decay: float) -> Iterator[Order]:
    """Yield the two groups of every rule, the one with more weight decay where it must be."""
    for rule in DECAYED:
        decayed = rule(model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        more = [name for name in trained if name in decayed]
        less = [name for name in trained if name not in decayed]
        if first_decay >= second_decay:
            yield [more, less]
        if first_decay <= second_decay:
            yield [less, more]


def _misfit(order: Order, groups: Sequence[ParameterGroup], model: nn.Module) -> str | None:
    """Say where an order and an optimizer's groups do not agree, or return None."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for names, group in zip(order, groups, strict=True):
        if len(names) != len(group):
            return "lengths"
        for name, moment in zip(names, group.moments, strict=True):
            if name not in shapes:
                return f"it has a state of {name}, which the model has not"
            if moment is not None and tuple(moment.values.shape) != shapes[name]:
                return (
                    f"a state of shape {list(moment.values.shape)} stands where {name} "
                    f"{list(shapes[name])} would"
                )
    return None


def _complaint(orders: list[Order], state: AdamState, model: nn.Module) -> str:
    """Say what does not agree, of the order that comes nearest."""
    kind = type(model).__name__
    counts = [len(group) for group in state.groups]
    held = f"{sum(counts)} parameters" + (
        f" in groups of {' and '.join(map(str, counts))}" if len(counts) > 1 else ""
    )
    expected = len(list(model.named_parameters()))
    reasons = [_misfit(order, state.groups, model) for order in orders]
    nearest = next((reason for reason in reasons if reason not in (None, "lengths")), None)
    start = f"{state.path} does not belong to this {kind}: "
    if nearest is not None:
        return start + f"{nearest}. Name the optimizer of the training that made this model."
    if sum(counts) < expected:
        why = "An adapter (LoRA) was trained, or part of the model, or another model."
    elif sum(counts) > expected:
        why = "Another model was trained, or with a version that builds it of other parts."
    else:
        why = "Its program grouped them in a way that is not known."
    return start + (
        f"it keeps the states of {held}, the model has {expected}. {why} If it is the right one, "
        "save it from an optimizer that was given model.named_parameters()."
    )
