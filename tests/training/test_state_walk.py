"""A remembered walk gives what a fresh one gives, also right after a change of any kind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.state_tree import FlatState, flatten
from training.state_walk import StateWalk


class Net(torch.nn.Module):
    """Tied weights, running statistics, a buffer that is not saved, a parameter that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False)
        self.norm = torch.nn.BatchNorm1d(4)
        self.second.weight = self.first.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def training(**options: Any) -> dict[str, Any]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "own": {"seen": torch.zeros(1), "n": 0}}
    step(state)
    return state


def step(state: dict[str, Any]) -> None:
    state["model"](torch.randn(8, 4)).sum().backward()
    state["optimizer"].step()
    state["scheduler"].step()
    state["own"]["n"] += 1


def assert_same(found: FlatState, expected: FlatState) -> None:
    assert set(found.tensors) == set(expected.tensors)
    assert all(found.tensors[key] is tensor for key, tensor in expected.tensors.items())
    assert (found.steady, found.aliases, found.objects) == (expected.steady, expected.aliases, expected.objects)


def extend(state: dict[str, Any]) -> None:
    state["model"].third = torch.nn.Linear(4, 4)
    state["optimizer"].add_param_group({"params": list(state["model"].third.parameters())})


def move_between_groups(state: dict[str, Any]) -> None:
    groups = state["optimizer"].param_groups
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def hook(state: dict[str, Any]) -> None:
    more = torch.ones(1)
    state["model"].register_state_dict_post_hook(
        lambda module, values, prefix, local: values.update({prefix + "more": more})
    )


def persist(state: dict[str, Any]) -> None:
    state["model"]._non_persistent_buffers_set.clear()


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing": lambda state: None,
    "a step": step,
    "a parameter group and a module more": extend,
    "another group boundary": move_between_groups,
    "a replaced buffer": lambda state: setattr(state["model"].norm, "running_mean", torch.ones(4)),
    "a replaced parameter": lambda state: setattr(state["model"].norm, "weight", torch.nn.Parameter(torch.ones(4))),
    "untied": lambda state: setattr(state["model"].second, "weight", torch.nn.Parameter(torch.ones(4, 4))),
    "a bias gone": lambda state: setattr(state["model"].first, "bias", None),
    "a module gone": lambda state: delattr(state["model"], "norm"),
    "a loaded optimizer": lambda state: state["optimizer"].load_state_dict(state["optimizer"].state_dict()),
    "a hook": hook,
    "a buffer that is saved from now on": persist,
    "another learning rate": lambda state: state["optimizer"].param_groups[0].update(lr=0.5),
    "a tensor more of one's own": lambda state: state["own"].update(more=torch.ones(3)),
    "another model": lambda state: state.update(model=Net()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_walk_gives_what_a_fresh_one_gives(change: str) -> None:
    state = training()
    extend(state)
    step(state)
    walk = StateWalk()
    walk.flatten(state)
    CHANGES[change](state)
    for _ in range(2):
        found = walk.flatten(state)
        assert_same(found, flatten(state))
    state["optimizer"].step()
    assert_same(walk.flatten(state), flatten(state))


def test_the_names_keep_their_order_from_walk_to_walk() -> None:
    state = training(lr=torch.tensor(0.1), capturable=False)
    walk = StateWalk()
    first = list(walk.flatten(state).tensors)
    step(state)
    assert list(walk.flatten(state).tensors) == first


def test_a_replaced_tensor_does_not_live_on() -> None:
    state = training()
    walk = StateWalk()
    walk.flatten(state)
    old = weakref.ref(state["model"].norm.running_mean)
    state["model"].norm.running_mean = torch.ones(4)
    gc.collect()
    assert old() is None


class Custom(torch.nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"n": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_a_module_with_a_state_of_its_own_is_walked_every_time() -> None:
    state: dict[str, Any] = {"model": torch.nn.Sequential(torch.nn.Linear(2, 2), Custom())}
    walk = StateWalk()
    for _ in range(2):
        assert_same(walk.flatten(state), flatten(state))
    assert walk._known is None
