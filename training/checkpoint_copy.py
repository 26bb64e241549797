"""From a training's live state to a copy of it on its way: what this rank copies is planned once per structure.

Most saves find the very tensors of the save before. Then the loop looks no further, and the thread that copies compares
their shapes and types as it goes (`OtherShape`).
Not covered: where the plan comes from (training/checkpoint_plan.py), the copying (training/staging.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from training.agreement import Agreement
from training.checkpoint_plan import Structure, plan_save, structure_of
from training.device_staging import DeviceStaging
from training.shard_file import Layout
from training.staging import HostStaging, Snapshot, Sources, Staging
from training.state_tree import FlatState
from training.state_walk import StateWalk


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which parts of which tensors this rank writes; valid while the state's structure stays the same."""

    structure: Structure
    walk: object  # FlatState.walk of the state that it was last found to fit
    rest: Structure  # of the tensors that are not the walk's
    layout: Layout
    staging: Staging
    copied: frozenset[str]  # keys that do not hold still until the optimizer's step, or are not plain tensors


class Copying:
    """One rank's copying of one training's state. The methods that plan are collective."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._walk = StateWalk()
        self._plan: _Plan | None = None

    @property
    def staging(self) -> Staging | None:
        """The memory and the way of copying of the last plan."""
        return self._plan.staging if self._plan is not None else None

    def flatten(self, state: Mapping[str, Any], until_idle: Callable[[], object]) -> tuple[FlatState, Layout]:
        """The state by name, and the layout of this rank's part of it. `until_idle` returns when no copy is in use; it
        is called before a new plan replaces the old one's memory."""
        flat = self._walk.flatten(state)
        return flat, self._fitting(flat, until_idle).layout

    def plan_anew(self, flat: FlatState, until_idle: Callable[[], object]) -> Layout:
        """The layout after OtherShape: every tensor is looked at."""
        flat.walk = None
        return self._fitting(flat, until_idle).layout

    def start(self, flat: FlatState, when_staged: Callable[[], object]) -> Snapshot:
        """Begin to copy what was planned last; see training.staging.Staging."""
        assert self._plan is not None
        return self._plan.staging.start(self.sources(flat), when_staged)

    def close(self) -> None:
        """Give the memory back; every snapshot must have been released."""
        if self._plan is not None:
            self._plan.staging.close()
            self._plan = None

    def _fitting(self, flat: FlatState, until_idle: Callable[[], object]) -> _Plan:
        old, rest = self._plan, structure_of(flat, flat.familiar)
        if old is not None and old.walk is flat.walk is not None and old.rest == rest:
            return old
        structure = structure_of(flat)
        if old is None or old.structure != structure:
            until_idle()
            self.close()
            layout = plan_save(flat, self._agreement.rank, self._agreement.gather)
            copied = (k for k, t in flat.tensors.items() if k not in flat.steady or hasattr(t, "to_local"))
            old = _Plan(
                structure=structure,
                walk=None,
                rest=rest,
                layout=layout,
                staging=_staging(layout, flat),
                copied=frozenset(copied),
            )
        # copies on a device are queued by the loop itself, from tensors whose shapes were looked at
        walk = flat.walk if isinstance(old.staging, HostStaging) else None
        self._plan = replace(old, walk=walk, rest=rest)
        return self._plan

    def sources(self, flat: FlatState) -> Sources:
        """This rank's parts as local tensors; those that do not hold still until the optimizer's step as copies."""
        assert self._plan is not None
        tensors, copied = flat.tensors, self._plan.copied
        sources = [(piece, tensors[piece.key]) for piece in self._plan.layout.pieces]
        if not copied:
            return sources
        with torch.no_grad():
            for i, (piece, tensor) in enumerate(sources):
                if piece.key in copied:
                    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                    tensors[piece.key] = local if piece.key in flat.steady else local.detach().clone()
                    sources[i] = (piece, tensors[piece.key])
        return sources


def _staging(layout: Layout, flat: FlatState) -> Staging:
    devices = {tensor.device for tensor in flat.tensors.values() if tensor.device.type != "cpu"}
    if not devices:
        return HostStaging(layout)
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        raise TypeError(f"state on {', '.join(map(str, devices))}: one CUDA device per rank is supported")
    return DeviceStaging(layout, devices.pop())
