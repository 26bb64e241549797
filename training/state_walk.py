"""The walk over a training's state, remembered: a save finds the tensors where the last one found them.

Walking a model and its optimizer and naming every tensor is most of what a save costs the loop. So the first walk notes
each dict that it went through, and the next one only looks whether they still hold the same objects; after any change
(a module added, an optimizer's state replaced, a hook set) it walks again. What may change without a trace (parameter
groups, schedulers, plain dicts) is read anew every time.
Not covered: tensors that take another shape in the same place (training/checkpoint_plan.py compares shapes).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch

from training.state_tree import FlatState, flatten, lifted, settings, unwrapped

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_CONSTANT = {bool, int, float, str, type(None)}
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


class StateWalk:
    """Flattens one training's state, again and again."""

    def __init__(self) -> None:
        self._known: _Known | None = None

    def flatten(self, state: Mapping[str, Any]) -> FlatState:
        """As `training.state_tree.flatten`, up to the order of names; fast when only values have changed."""
        if self._known is not None and (flat := self._known.again(state)) is not None:
            return flat
        flat, self._known = flatten(state), None
        if _can_be_known(state, flat):
            self._known = _Known(state, flat)
            flat.tensors = {name: flat.tensors[name] for name in self._known.names} | flat.tensors
            flat.walk, flat.familiar = self._known, len(self._known.names)
        return flat


def _can_be_known(state: Mapping[str, Any], flat: FlatState) -> bool:
    """Whether nothing but the plain containers of modules and optimizers decides what is in the state."""
    live = list(flat.tensors.values())
    if any(type(tensor) not in _PLAIN for tensor in live) or len(set(map(id, live))) < len(live):
        return False  # a DTensor's local part has a life of its own; one tensor under two names has no one place
    for module in _modules(state):
        if any(getattr(type(module), name) is not getattr(torch.nn.Module, name) for name in _METHODS):
            return False
        if "state_dict" in module.__dict__ or module._state_dict_hooks or module._state_dict_pre_hooks:
            return False
    kept = list(chain.from_iterable(optimizer.state.values() for optimizer in _optimizers(state)))
    if any(type(values) is not dict for values in kept):
        return False
    return all(type(v) in _CONSTANT or isinstance(v, torch.Tensor) for values in kept for v in values.values())


def _modules(state: Mapping[str, Any]) -> list[torch.nn.Module]:
    roots = (unwrapped(value) for value in state.values() if isinstance(value, torch.nn.Module))
    return list(chain.from_iterable(root.modules() for root in roots))


def _optimizers(state: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    return [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]


class _Known:
    """One finished walk: the identity of every object that decides what is where. Tensors are only watched: a replaced
    one must not live on until the next save."""

    def __init__(self, state: Mapping[str, Any], flat: FlatState) -> None:
        self.parts = dict(state)
        self.modules, self.optimizers = _modules(state), _optimizers(state)
        self.transient = [set(module._non_persistent_buffers_set) for module in self.modules]
        dicts = self._dicts()
        self.lengths, found = self._lengths(dicts), self._found(dicts)
        self.identities = list(map(id, found))
        self.gone: list[Any] = []  # filled when one dies: its identity may be another's then
        self.watched = [weakref.ref(value, self.gone.append) for value in found if isinstance(value, torch.Tensor)]
        self.held = [value for value in found if not isinstance(value, torch.Tensor)]
        keys = {id(tensor): key for key, tensor in flat.tensors.items()}
        places = {keys[id(value)]: i for i, value in enumerate(found) if id(value) in keys}
        self.names = [name for name in flat.tensors if name in places]
        self.places = [places[name] for name in self.names]
        self.steady, self.aliases, self.fixed = flat.steady, flat.aliases, flat.objects

    def _dicts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for module in self.modules:
            found += (module._parameters, module._buffers, module._modules)
        for optimizer in self.optimizers:
            found += optimizer.state.values()
        return found

    def _lengths(self, dicts: list[dict[str, Any]]) -> list[int]:
        groups = (len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups)
        return [*map(len, dicts), *groups]

    def _found(self, dicts: Iterable[dict[str, Any]]) -> list[Any]:
        """Names and values of the dicts, the parameters that optimizers have state for, and those in their groups."""
        found = list(chain.from_iterable(chain.from_iterable(map(dict.items, dicts))))
        for optimizer in self.optimizers:
            found += optimizer.state
            for group in optimizer.param_groups:
                found += group["params"]
        return found

    def again(self, state: Mapping[str, Any]) -> FlatState | None:
        """The state as it is now, or None when the walk has to be made anew."""
        if self.gone or list(state) != list(self.parts) or not all(map(is_, state.values(), self.parts.values())):
            return None
        dicts = self._dicts()
        if any(module._state_dict_hooks or module._state_dict_pre_hooks for module in self.modules):
            return None
        if [module._non_persistent_buffers_set for module in self.modules] != self.transient:
            return None
        found = self._found(dicts)
        if self._lengths(dicts) != self.lengths or list(map(id, found)) != self.identities:
            return None
        tensors = dict(zip(self.names, [found[place] for place in self.places], strict=True))
        objects = {name: self._values(name, value, tensors) for name, value in state.items()}
        return FlatState(
            tensors=tensors,
            steady=self.steady,
            objects=objects,
            aliases=self.aliases,
            walk=self,
            familiar=len(self.names),
        )

    def _values(self, name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
        if isinstance(value, torch.nn.Module):
            return self.fixed[name]
        if not isinstance(value, torch.optim.Optimizer):
            return lifted(name, value, tensors)
        pairs = zip(value.param_groups, self.fixed[name]["groups"], strict=True)
        groups = [settings(f"{name}.groups.{g}", group, old["params"], tensors) for g, (group, old) in enumerate(pairs)]
        return {"state": self.fixed[name]["state"], "groups": groups}
