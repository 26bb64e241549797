"""On a machine with a CUDA device: the proof of exact resume with deterministic kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_every_hash_is_equal_after_kills_on_a_gpu(tmp_path: Path) -> None:
    program = Path(__file__).parent / "gpu_resume.py"
    done = subprocess.run(
        [sys.executable, str(program), "--output", str(tmp_path / "gpu.json")], timeout=800, check=False
    )
    assert done.returncode == 0
    cases = [case for case in json.loads((tmp_path / "gpu.json").read_text()).values() if isinstance(case, dict)]
    assert len(cases) == (6 if torch.cuda.device_count() >= 2 else 3) and all(case["equal"] for case in cases)
