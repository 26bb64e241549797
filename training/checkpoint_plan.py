"""Which rank writes which part of which tensor, and which stored parts a rank needs: asked of PyTorch's planners.

torch.distributed.checkpoint's planners know DTensor shards, spread replicas over the ranks and reshard between world
sizes. Used here without its storage: the plan is made once per structure of the state, not once per save.
Not covered: the bytes themselves (training/shard_file.py, training/checkpoint_load.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from training.shard_file import Layout, Piece, ShardHeader, lay_out
from training.state_tree import FlatState

Gather = Callable[[str, Any], list[Any]]


Structure = tuple[list[str], list[torch.Size], list[torch.dtype], list[torch.device]]


def structure_of(flat: FlatState, start: int = 0) -> Structure:
    """Equal for two states that the same plan fits, of the tensors from number `start` on. Lists, not a hash: this runs
    in every save, on the loop's time."""
    live = list(flat.tensors.values())[start:]
    return list(flat.tensors)[start:], [t.shape for t in live], [t.dtype for t in live], [t.device for t in live]


def plan_save(flat: FlatState, rank: int, gather: Gather) -> Layout:
    """This rank's file layout. Collective. Replicas are shared out among the ranks by size, except those that forward
    changes (running statistics), which differ between ranks: of them rank 0's are stored."""
    offered = {
        key: tensor
        for key, tensor in flat.tensors.items()
        if rank == 0 or key in flat.steady or hasattr(tensor, "placements")
    }
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(offered, is_coordinator=rank == 0)
    plans, _ = planner.create_global_plan(gather("plan", planner.create_local_plan()))
    parts = []
    for item in plans[rank].items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is planned as bytes"
        on_device = flat.tensors[item.index.fqn].device.type != "cpu"
        shape, offsets, whole = tuple(data.chunk.sizes), tuple(data.chunk.offsets), tuple(data.size)
        parts.append((item.index.fqn, data.properties.dtype, shape, offsets, whole, on_device))
    return lay_out(parts)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Copy `lengths` from `offsets` within the stored `piece` to `target`."""

    piece: Piece
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    target: torch.Tensor


def stored_shapes(headers: Mapping[str, ShardHeader]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Every stored tensor's whole shape and type."""
    return {p.key: (torch.Size(p.whole), p.dtype) for header in headers.values() for p in header.pieces}


def plan_load(headers: Mapping[str, ShardHeader], wanted: dict[str, torch.Tensor]) -> dict[str, list[Read]]:
    """What this rank reads, by file, to fill `wanted`. Not collective: a rank reads only for itself."""
    pieces: dict[str, list[Piece]] = {}
    place: dict[tuple[str, tuple[int, ...]], tuple[str, Piece]] = {}
    for file, header in headers.items():
        for piece in header.pieces:
            pieces.setdefault(piece.key, []).append(piece)
            place[piece.key, piece.offsets] = (file, piece)
    metadata = Metadata(state_dict_metadata={key: _described(parts) for key, parts in pieces.items()})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(wanted, metadata)
    reads: dict[str, list[Read]] = {}
    for item in planner.create_local_plan().items:
        file, piece = place[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        reads.setdefault(file, []).append(
            Read(
                piece=piece,
                offsets=tuple(item.storage_offsets),
                lengths=tuple(item.lengths),
                target=planner.resolve_tensor(item),
            )
        )
    return reads


def _described(parts: Sequence[Piece]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=parts[0].dtype),
        size=torch.Size(parts[0].whole),
        chunks=[ChunkStorageMetadata(offsets=torch.Size(p.offsets), sizes=torch.Size(p.shape)) for p in parts],
    )
