"""A training's live objects as one flat dict of tensors plus a small tree of Python values, and back.

Modules, optimizers, anything with `state_dict`/`load_state_dict` and plain dicts may be given. Names do not depend on
wrapping (DDP, torch.compile) or on the number of workers: an optimizer's state is filed under its parameter's name,
so that a checkpoint of two workers loads into one. Tied parameters are stored once.
Not covered: FSDP1's ShardedTensor; DTensor (FSDP2 `fully_shard`, tensor parallel) is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from training.state_codec import Encoded, TensorRef, encode


class StateMismatch(ValueError):
    """The checkpoint is sound and does not belong to this model or optimizer."""


@dataclass(kw_only=True)
class FlatState:
    """The state by name. `steady` names the tensors that only the optimizer's step changes: they may be copied while
    forward and backward run; all others (buffers, a scheduler's tensors) have to be copied at once."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    steady: set[str] = field(default_factory=set)
    objects: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # tied name -> the name it is stored under
    walk: object = None  # equal in two states whose first `familiar` tensors are the very same objects
    familiar: int = 0


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return module


def _clean(name: str) -> str:
    if "_orig_mod." in name or "_checkpoint_wrapped_module." in name:
        return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    return name


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Collect the state. No tensor is copied: `tensors` are the live ones. Modules first, for optimizers refer to
    their parameters by name."""
    flat = FlatState()
    names: dict[int, str] = {}
    for name, value in state.items():
        if isinstance(value, torch.nn.Module):
            _flatten_module(name, value, flat, names)
    for name, value in state.items():
        if isinstance(value, torch.optim.Optimizer):
            flat.objects[name] = _flatten_optimizer(name, value, flat, names)
        elif not isinstance(value, torch.nn.Module):
            flat.objects[name] = lifted(name, value, flat.tensors)
    return flat


def lifted(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The Python values of an object or dict as they are now; its tensors go to `tensors`."""
    return _lift(_tree_of(name, value), name, tensors)


def settings(where: str, group: dict[str, Any], labels: list[str], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A parameter group as it is now, `labels` in place of its parameters; its tensors go to `tensors`."""
    rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {**_lift(rest, where, tensors), "params": labels}


def _flatten_module(name: str, module: torch.nn.Module, flat: FlatState, names: dict[int, str]) -> None:
    extra = {}
    tensors, steady = flat.tensors, flat.steady
    for key, value in unwrapped(module).state_dict(keep_vars=True).items():
        key = f"{name}.{_clean(key)}"
        if not isinstance(value, torch.Tensor):
            extra[key] = _lift(value, key, tensors)
            continue
        first = names.setdefault(id(value), key)
        if first is not key:
            flat.aliases[key] = first
            continue
        tensors[key] = value
        if isinstance(value, torch.nn.Parameter):
            steady.add(key)
    flat.objects[name] = {"extra": extra}


def _flatten_optimizer(
    name: str, optimizer: torch.optim.Optimizer, flat: FlatState, names: dict[int, str]
) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    tensors, steady = flat.tensors, flat.steady
    for g, group in enumerate(optimizer.param_groups):
        listed = _parameter_names(group, g, names)
        groups.append(settings(f"{name}.groups.{g}", group, listed, tensors))
        for parameter, label in zip(group["params"], listed, strict=True):
            if not (live := optimizer.state.get(parameter)):
                continue
            saved = states[label] = {}
            for key, value in live.items():
                if isinstance(value, torch.Tensor):
                    full = f"{name}.state.{label}.{key}"
                    tensors[full] = value
                    steady.add(full)
                    saved[key] = TensorRef(full)
                else:
                    saved[key] = _lift(value, f"{name}.state.{label}.{key}", tensors)
    return {"state": states, "groups": groups}


def _parameter_names(group: dict[str, Any], g: int, names: dict[int, str]) -> list[str]:
    return [names.get(id(parameter), f"group{g}.{i}") for i, parameter in enumerate(group["params"])]


def _tree_of(name: str, value: Any) -> Any:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return value.state_dict()
    if isinstance(value, (dict, torch.Tensor)):
        return value
    raise TypeError(
        f"state[{name!r}]: {type(value).__qualname__} has no state_dict/load_state_dict; "
        "give a module, an optimizer, an object with these two methods, a dict or a tensor"
    )


def _lift(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree as a snapshot: its tensors moved to `tensors`, a TensorRef in each one's place, what could change
    encoded. So the rest of the encoding may come later, on another thread."""
    if isinstance(value, torch.Tensor):
        tensors[where] = value
        return TensorRef(where)
    if type(value) is dict:
        return {key: _lift(item, f"{where}.{key}", tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_lift(item, f"{where}.{i}", tensors) for i, item in enumerate(value))
    return value if type(value) in _CONSTANT else Encoded(encode(value, where))


_CONSTANT = {type(None), bool, int, float, str, bytes}


def _lower(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_lift`."""
    if isinstance(value, TensorRef):
        return tensors[value.key]
    if type(value) is dict:
        return {key: _lower(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_lower(item, tensors) for item in value)
    return value


def targets(
    state: Mapping[str, Any],
    objects: Mapping[str, Any],
    aliases: Mapping[str, str],
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> dict[str, torch.Tensor]:
    """Where the stored tensors go, by stored name: a module's own tensors (filled in place), fresh ones for the rest.

    Raises StateMismatch naming the first tensor that is missing, left over or of another shape."""
    live = flatten(state)
    if lost := sorted(set(objects) ^ set(live.objects)):
        kept = "checkpoint" if lost[0] in objects else "training"
        raise StateMismatch(f"state[{lost[0]!r}] exists only in the {kept}; both must name the same objects")
    wanted: dict[str, torch.Tensor] = {}
    fillable = {
        key: tensor
        for key, tensor in live.tensors.items()
        if isinstance(state[key.split(".", 1)[0]], torch.nn.Module) or key in state
    }
    for key, tensor in fillable.items():
        source = key if key in stored else aliases.get(key, key)
        if source not in stored:
            raise StateMismatch(f"{key} is in the model and not in the checkpoint; was the model's code changed?")
        if tuple(stored[source][0]) != tuple(tensor.shape):
            raise StateMismatch(
                f"{key}: {list(stored[source][0])} in the checkpoint, {list(tensor.shape)} in the model"
            )
        if source in wanted:
            raise StateMismatch(f"{key} and {source} are one tensor in the checkpoint and two in the model")
        wanted[source] = tensor.detach()
    parameters = {key: tensor for key, tensor in live.tensors.items() if key in live.steady and key in fillable}
    for key, (shape, dtype) in stored.items():
        if key in wanted or key in live.aliases:
            continue
        owner = key.split(".", 1)[0]
        if owner not in state or isinstance(state[owner], torch.nn.Module):
            raise StateMismatch(f"{key} is in the checkpoint and not in the model; was the model's code changed?")
        like = live.tensors.get(key)
        if like is None and isinstance(state[owner], torch.optim.Optimizer):
            like = parameters.get(key.removeprefix(f"{owner}.state.").rsplit(".", 1)[0])
        if like is not None and tuple(like.shape) == tuple(shape):
            wanted[key] = torch.empty_like(like, dtype=dtype, requires_grad=False)
        else:
            wanted[key] = torch.empty(shape, dtype=dtype)
    return wanted


def restore(state: Mapping[str, Any], objects: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the loaded values back to the live objects. `tensors` are those of `targets`, filled."""
    names = {
        id(parameter): f"{name}.{_clean(key)}"
        for name, value in state.items()
        if isinstance(value, torch.nn.Module)
        for key, parameter in reversed(list(unwrapped(value).named_parameters(remove_duplicate=False)))
    }
    for name, value in state.items():
        saved = objects[name]
        if isinstance(value, torch.nn.Module):
            if extra := {key.removeprefix(f"{name}."): _lower(v, tensors) for key, v in saved["extra"].items()}:
                unwrapped(value).load_state_dict(extra, strict=False)
        elif isinstance(value, torch.optim.Optimizer):
            _restore_optimizer(name, value, saved, tensors, lambda group, g: _parameter_names(group, g, names))
        elif isinstance(value, dict):
            loaded = _lower(saved, tensors)
            value.clear()
            value.update(loaded)
        elif not isinstance(value, torch.Tensor):
            value.load_state_dict(_lower(saved, tensors))


def _restore_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Any,
    tensors: Mapping[str, torch.Tensor],
    names_of: Callable[[dict[str, Any], int], list[str]],
) -> None:
    current = [names_of(group, g) for g, group in enumerate(optimizer.param_groups)]
    if current != [group["params"] for group in saved["groups"]]:
        raise StateMismatch(f"{name}: the optimizer's parameter groups are not those of the checkpoint")
    labels = [label for group in current for label in group]
    place = {label: i for i, label in enumerate(labels)}
    loaded = {
        "state": {place[label]: _lower(values, tensors) for label, values in saved["state"].items()},
        "param_groups": [],
    }
    for group, listed in zip(saved["groups"], current, strict=True):
        rest = _lower({key: value for key, value in group.items() if key != "params"}, tensors)
        loaded["param_groups"].append({**rest, "params": [place[label] for label in listed]})  # type: ignore[attr-defined]
    optimizer.load_state_dict(loaded)
    # load_state_dict casts state to the parameter's dtype; float32 moments of bfloat16 weights would lose bits.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for label, values in saved["state"].items():
        live = optimizer.state[parameters[place[label]]]
        for key, ref in values.items():
            if isinstance(ref, TensorRef) and live[key].dtype != tensors[ref.key].dtype:
                live[key] = tensors[ref.key].to(live[key].device)
