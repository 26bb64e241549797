"""Optimizers without torch's compiler: same numbers, no import of it. In processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, hashlib, torch
from training.light_start import use_light_optimizers
if {light}: use_light_optimizers()
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.{optimizer}(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9)
for _ in range(5):
    model(torch.ones(4, 3)).pow(2).sum().backward()
    optimizer.step(); scheduler.step(); optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print(hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest(), "torch._dynamo" in sys.modules)
"""


def outcome(optimizer: str, *, light: bool) -> tuple[str, str]:
    program = PROGRAM.format(light=light, optimizer=optimizer)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    digest, imported = done.stdout.split()
    return digest, imported


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_same_weights_and_no_compiler(optimizer: str) -> None:
    light, plain = outcome(optimizer, light=True), outcome(optimizer, light=False)
    assert light[0] == plain[0]
    assert light[1] == "False"
    assert plain[1] == "True", "torch does not import its compiler any more: training/light_start.py can go"
