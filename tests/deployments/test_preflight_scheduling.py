"""Where pods may run: one change to a sound cluster gives that row, that fix, and no other row."""

from __future__ import annotations

import pytest

from tests.deployments.preflight_faults import (
    GPU_NODES,
    SPOT_NODES,
    Change,
    allocate,
    busy,
    label,
    nodes,
    not_ready,
    on,
    one_row,
    pool,
    resource,
    slice_time,
    taint,
    without,
)

# name: change, verdict, what, words of what is found, words of the fix
SNAPSHOTS: dict[str, tuple[Change, str, str, str, str]] = {
    "missing toleration": (
        nodes(*GPU_NODES, change=taint("team")),
        "FAIL",
        "taints",
        "taint team=true:NoSchedule",
        'key = "team"',
    ),
    "wrong selector": (
        nodes(*GPU_NODES, change=label(accelerator="nvidia-h100")),
        "FAIL",
        "node selector",
        "accelerator=nvidia-a100",
        "kubectl label node",
    ),
    "no spot nodes": (
        nodes(
            *SPOT_NODES, change=lambda n: n["metadata"]["labels"].update({"karpenter.sh/capacity-type": "on-demand"})
        ),
        "FAIL",
        "node selector",
        "karpenter.sh/capacity-type=spot",
        "correct the selector",
    ),
    "MIG name": (
        nodes(*GPU_NODES, change=resource("nvidia.com/gpu", "nvidia.com/mig-1g.10gb")),
        "FAIL",
        "resources",
        "no node has nvidia.com/gpu",
        'gpu_resource = "nvidia.com/mig-1g.10gb"',
    ),
    "renamed shares": (
        nodes(*GPU_NODES, change=resource("nvidia.com/gpu", "nvidia.com/gpu.shared")),
        "FAIL",
        "resources",
        "nvidia.com/gpu.shared",
        'gpu_resource = "nvidia.com/gpu.shared"',
    ),
    "no device plugin": (
        nodes(*GPU_NODES, change=lambda n: n["status"]["allocatable"].pop("nvidia.com/gpu")),
        "FAIL",
        "resources",
        "nor any other device",
        "device plugin",
    ),
    "time slicing, two asked for": (
        nodes(*GPU_NODES, change=slice_time),
        "FAIL",
        "time slicing",
        "one and the same GPU",
        "gpus = 1",
    ),
    "one GPU a node": (
        nodes(*GPU_NODES, change=allocate(**{"nvidia.com/gpu": "1"})),
        "FAIL",
        "resources",
        "2 nvidia.com/gpu, and node gpu-od-0 gives 1",
        "ask for less",
    ),
    "too little memory": (
        nodes(*GPU_NODES, change=allocate(memory="16Gi")),
        "FAIL",
        "resources",
        "32Gi memory",
        "ask for less",
    ),
    "too few nodes for all": (
        nodes(*SPOT_NODES, change=allocate(**{"nvidia.com/gpu": "2", "cpu": "7"})),
        "FAIL",
        "resources",
        "8 cpu",
        "larger nodes",
    ),
    "one spot node": (
        lambda d: (
            without("nodes", "gpu-spot-1")(d),
            nodes("gpu-spot-0", change=allocate(**{"nvidia.com/gpu": "2"}))(d),
        ),
        "FAIL",
        "nodes",
        "needs 2 pods at once (2 x worker), and all nodes that suit take 1",
        "add nodes",
    ),
    "cordoned nodes": (
        nodes(*SPOT_NODES, change=lambda n: n["spec"].update(unschedulable=True)),
        "FAIL",
        "cordoned nodes",
        "gpu-spot-0 is cordoned (and 1 more alike)",
        "kubectl uncordon gpu-spot-0",
    ),
    "nodes that do not answer": (
        nodes(*SPOT_NODES, change=not_ready),
        "WARN",
        "nodes",
        "not ready (NodeStatusUnknown)",
        "kubectl describe node",
    ),
    "GPUs in use": (busy, "WARN", "free capacity", "research/sweep-gpu-spot-0 (3)", "waits until others have ended"),
    "NodePool with another taint": (
        pool(taints=("dedicated",)),
        "FAIL",
        "taints",
        "NodePool gpu-spot has taint dedicated",
        'key = "dedicated"',
    ),
    "NodePool limit too small": (pool(limit="2"), "FAIL", "NodePool limits", "may have 2", "raise spec.limits"),
    "NodePool limit reached": (pool(used="14"), "WARN", "NodePool limits", "14 are in use", "wait until"),
    "volume in another zone": (
        on(
            "persistentvolumes",
            "pvc-1",
            lambda v: v["spec"].update(
                nodeAffinity={
                    "required": {
                        "nodeSelectorTerms": [
                            {
                                "matchExpressions": [
                                    {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["eu-1b"]}
                                ]
                            }
                        ]
                    }
                }
            ),
        ),
        "FAIL",
        "storage zone",
        "cannot be reached from node",
        "shared file system",
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_one_fault_of_the_cluster_is_one_row_with_its_fix(name: str) -> None:
    one_row(*SNAPSHOTS[name])
