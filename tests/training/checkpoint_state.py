"""A training's state for the tests of checkpoints, with everything that is easily lost, and how to compare two."""

from __future__ import annotations

from typing import Any

import torch

from training.checkpoint import Checkpointer


class Net(torch.nn.Module):
    """Tied weights, running statistics, a buffer that is not saved, half precision beside single."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.low = torch.nn.Parameter(torch.randn(3, 5).to(torch.bfloat16))
        self.head = torch.nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens))) + self.low.float().sum()


def make(seed: int = 0, width: int = 12) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = Net(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 50)
    return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "seen": {"samples": 0}}


def advance(state: dict[str, Any], checkpointer: Checkpointer | None = None) -> None:
    tokens = torch.randint(0, 20, (16,))
    torch.nn.functional.cross_entropy(state["model"](tokens), tokens).backward()
    if checkpointer is not None:
        checkpointer.wait_staged()
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["scheduler"].step()
    state["seen"]["samples"] += 16


def facts(state: dict[str, Any]) -> dict[str, Any]:
    """Everything that must be equal, copied."""
    optimizer = state["optimizer"].state_dict()
    found: dict[str, Any] = {k: v.clone() for k, v in state["model"].state_dict().items()}
    found |= {f"{i}.{k}": torch.as_tensor(v).clone() for i, s in optimizer["state"].items() for k, v in s.items()}
    return found | {
        "groups": [dict(group) for group in optimizer["param_groups"]],
        "scheduler": dict(state["scheduler"].state_dict()),
        "seen": dict(state["seen"]),
    }


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype and torch.equal(value, right[key]), key
        else:
            assert value == right[key], key
