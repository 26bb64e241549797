"""Checkpoints of a CUDA state: with a clone on the device and without, the moment of the save is what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training import device_staging
from training.checkpoint import Checkpointer

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def make(seed: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.LazyLinear(11)
    ).cuda()
    model(torch.randn(2, 3, 9, 9, device="cuda"))
    model = model.to(memory_format=torch.channels_last)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), **options)}


def advance(state: dict[str, Any], checkpointer: Checkpointer | None = None) -> None:
    state["model"](torch.randn(4, 3, 9, 9, device="cuda")).square().mean().backward()
    if checkpointer is not None:
        checkpointer.wait_staged()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def facts(state: dict[str, Any]) -> list[torch.Tensor]:
    moments = [v for s in state["optimizer"].state_dict()["state"].values() for v in s.values()]
    return [t.detach().clone() for t in [*state["model"].state_dict().values(), *moments]]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.device == b.device and a.equal(b) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_the_moment_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(device_staging, "MARGIN", 0.01 if room else 2.0)
    state = make(0, **options)
    advance(state)
    checkpointer = Checkpointer(str(tmp_path))
    for step in range(1, 6):  # back to back: memory is handed on while it is in use
        saved = facts(state)
        random = torch.cuda.get_rng_state()
        checkpointer.save(step, state, meta={}, per_rank={"cuda": random})
        advance(state, checkpointer)
        advance(state)
    checkpointer.wait_durable()
    staging = checkpointer._copying.staging
    assert isinstance(staging, device_staging.DeviceStaging) and (staging.clone is not None) is room
    checkpointer.close()
    other = make(1, **options)
    assert not same(facts(other), saved)
    info = Checkpointer(str(tmp_path)).load(other)
    assert info is not None and info.step == 5
    assert same(facts(other), saved)
    assert info.mine["cuda"].equal(random)
    assert not same(facts(state), saved)  # the live one went on while it was copied


def test_half_precision_beside_single(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(1001, device="cuda").to(torch.bfloat16),
        "single": torch.randn(77, 3, device="cuda"),
        "double": torch.randn(5, device="cuda", dtype=torch.float64),
        "host": torch.randn(9),
        "scalar": torch.tensor(3, device="cuda"),
        "empty": torch.empty(0, device="cuda"),
    }
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, {"t": tensors}, meta={}, per_rank={})
    checkpointer.close()
    other = {key: torch.zeros_like(value) for key, value in tensors.items()}
    assert Checkpointer(str(tmp_path)).load({"t": other}) is not None
    assert all(other[key].equal(value) and other[key].device == value.device for key, value in tensors.items())
