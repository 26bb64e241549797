"""On a GPU: training, interruptions and resuming to the bit with deterministic kernels; prints one JSON document.

    python tests/training/gpu_resume.py [--large] [--output FILE]

Needs torch, numpy and safetensors only. `--large` adds a model of about a billion parameters (12 GB of state);
`--only WORD` keeps the cases whose name has it. Where there are two GPUs, workers with one each, over NCCL: replicated,
sharded (FSDP2), and changing between one and two workers on the way.
Not covered: stalls against peers (the checkpoint benchmark), several hosts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from training.spec import CheckpointPolicy, TrainSpec
from training.verify_resume import NotEqual, verify

MODULE = Path(__file__).parent / "modules" / "tokens.py"
SMALL = {"layers": 4, "width": 256, "samples": 512, "length": 64}
LARGE = {"layers": 18, "width": 2048, "heads": 16, "samples": 256, "length": 128, "vocabulary": 32000}


def prove(
    params: dict[str, Any],
    *,
    kills: int,
    epochs: int,
    every: int,
    processes: int = 1,
    grace: float = 20.0,
    elastic: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """One certificate, with the seconds it took."""
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="gpu-resume-") as folder:
        spec = TrainSpec(
            key="gpu",
            pipeline="gpu",
            module=str(MODULE),
            data=folder,
            checkpoints=f"file://{folder}/checkpoints",
            output=f"{folder}/output",
            epochs=epochs,
            batch_size=16,
            params=params,
            checkpoint=CheckpointPolicy(every_steps=every, notice_seconds=120),
            **changes,
        )
        try:
            certificate = verify(
                spec, kills=kills, seed=5, processes=processes, elastic=elastic, pace=0.02, grace=grace
            )
        except NotEqual as error:
            certificate = {"equal": False, "error": str(error)}
    return {**certificate, "params": params, "total_seconds": round(time.time() - began, 1)}


def main() -> int:
    """The program; exit code 0 when every hash is equal."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", default="", help="the cases whose name has this word")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was proved", file=sys.stderr)
        return 3
    document: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    cases: dict[str, dict[str, Any]] = {
        "small, float32": {"params": SMALL, "kills": 6, "epochs": 6, "every": 20},
        "small, bfloat16": {"params": SMALL, "kills": 4, "epochs": 6, "every": 20, "precision": "bfloat16"},
        "small, two ranks on one GPU": {"params": SMALL, "kills": 4, "epochs": 6, "every": 20, "processes": 2},
    }
    if torch.cuda.device_count() >= 2:
        several: dict[str, Any] = {"params": SMALL, "kills": 6, "epochs": 6, "every": 20, "processes": 2}
        cases |= {
            "two GPUs": several,
            "two GPUs, FSDP2": {**several, "parallel": "fsdp"},
            "two GPUs, one and two workers": {**several, "elastic": True, "shards": 2},
        }
    if args.large:
        large = {"params": LARGE, "kills": 2, "epochs": 1, "every": 8, "precision": "bfloat16", "grace": 60.0}
        cases |= {"a billion parameters": large}
        if torch.cuda.device_count() >= 2:
            cases |= {"a billion parameters, FSDP2 on two GPUs": {**large, "processes": 2, "parallel": "fsdp"}}
    for name, case in ((name, case) for name, case in cases.items() if args.only in name):
        document[name] = prove(**case)
        print(f"{name}: {'equal' if document[name]['equal'] else 'NOT EQUAL'}", flush=True)
        if args.output:  # what is known so far, should the machine go
            args.output.write_text(json.dumps(document, indent=1))
    text = json.dumps(document, indent=1)
    print(text)
    if len(document) == 2:
        print(f"no case here is named like {args.only!r}: {', '.join(cases)}", file=sys.stderr)
        return 2
    return 0 if all(v["equal"] for v in document.values() if isinstance(v, dict)) else 1


if __name__ == "__main__":
    sys.exit(main())
