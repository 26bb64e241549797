"""What the images of the cluster tests hold where pods are local processes: this working tree and its environment.

    python tests/cluster_images.py > images.json        # image name prefix -> entrypoint, path, folders

Written once for every cluster test and for .ci/cluster. The environment is that of deployments/images/*.Dockerfile.
Not covered: clusters with real images, which know nothing of this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "flow": {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
    "step": {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "DVC_NO_ANALYTICS": "1",
    },
    "train": {},
    "serve": {},
}


def images() -> dict[str, dict[str, Any]]:
    """Our four, and the one that the Training Operator puts before its workers."""
    everywhere = {
        "PYTHONPATH": "/app",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/tmp",
        "DO_NOT_TRACK": "1",
    }
    ours = {
        f"reprise-{kind}:": {
            "entrypoint": [],
            "cmd": ["python", "--version"],
            "path": str(Path(sys.prefix) / "bin"),
            "env": everywhere | own,
            "workdir": "/app",
            "mounts": {"/app": str(ROOT)},
        }
        for kind, own in ENVIRONMENT.items()
    }
    return ours | {"alpine:3.10": {}}


if __name__ == "__main__":
    print(json.dumps(images(), indent=1))
