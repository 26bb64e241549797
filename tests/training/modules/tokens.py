"""A user's module for the proofs on a GPU: a small or large transformer on made-up token sequences.

Parameters: layers, width, heads, vocabulary, length, samples, tied (one weight embeds and answers).
18 layers of width 2048 are about a billion parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """Attention and a perceptron, with dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(self.norm2(x))
        return x


class Transformer(nn.Module):
    """Predicts the class of a sequence from its last position."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        width, heads = int(params.get("width", 64)), int(params.get("heads", 4))
        self.embed = nn.Embedding(int(params.get("vocabulary", 128)), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(int(params.get("layers", 2))))
        self.head = nn.Linear(width, self.embed.num_embeddings if params.get("tied") else 4)
        if params.get("tied"):
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        answer: torch.Tensor = self.head(x[:, -1]).float()
        return answer[:, :4].clone()  # FSDP wants no view


def build_model(params: dict[str, Any]) -> nn.Module:
    return Transformer(params)


def load_split(folder: Path, split: str, params: dict[str, Any]) -> torch.utils.data.TensorDataset:
    count, length = int(params.get("samples", 64)), int(params.get("length", 16))
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    tokens = torch.randint(0, int(params.get("vocabulary", 128)), (count, length), generator=generator)
    return torch.utils.data.TensorDataset(tokens, tokens[:, -1] % 4)


def heldout_requests(folder: Path, split: str, params: dict[str, Any]) -> Iterator[tuple[str, bytes, Any]]:
    data = load_split(folder, split, params)
    for index in range(len(data)):
        tokens, target = data[index]
        yield f"sequence-{index}", tokens.numpy().astype("<i8").tobytes(), int(target)


def preprocess(body: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.int64)


def postprocess(output: torch.Tensor) -> dict[str, Any]:
    return {"label": int(output.argmax())}
