"""What orchestration on Kubernetes costs: API calls, memory, CPU and threads, at 1, 10 and 100 pipelines at once.

    make bench-cluster          # on the cluster of KUBECONFIG (no-op pods), or on a scripted API without one

Each pipeline is five steps and one attempt of a training, one after the other, as a flow runs them; all pipelines share
one process, which is the worst case for the Runner. A process of its own per number, so that memory is that number's.
Not covered: what the pods cost, and Prefect.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from deployments.cluster import Cluster  # noqa: E402
from deployments.kube_api import connect  # noqa: E402
from deployments.manifests import ClusterPlace  # noqa: E402
from deployments.workload import Resources, Workload  # noqa: E402

STEPS = ("pull_data", "register_model", "package_model", "deploy_model", "check_endpoint")
COUNTS = (1, 10, 100)
SMALL = Resources(cpus=0.01, memory="32Mi")
POD_SECONDS = 0.3  # of a scripted pod


def scripted(folder: str, ready: Any) -> None:
    """An API of this machine whose pods succeed after a moment; runs in a process of its own."""
    from tests.deployments.kube_fake import JOBS, NODES, TRAININGS, KubeFake

    def controller(collection: str, container: str, done: str) -> Any:
        def run(item: dict[str, Any]) -> None:
            name = item["metadata"]["name"]
            pod = kube.pod_for(item, name + "-master-0" * (done == "Succeeded"), container=container)
            time.sleep(POD_SECONDS)
            kube.end_pod(pod["metadata"]["name"], 0, container=container)
            kube.condition(collection, name, done)

        return run

    with KubeFake() as kube:
        kube.put(NODES, {"metadata": {"name": "n1", "labels": {}}, "spec": {}})
        kube.on_create[JOBS] = controller(JOBS, "step", "Complete")
        kube.on_create[TRAININGS] = controller(TRAININGS, "pytorch", "Succeeded")
        kube.kubeconfig(Path(folder))
        ready.set()
        threading.Event().wait()


def pipelines(count: int, kubeconfig: str, namespace: str, tag: str) -> dict[str, Any]:
    """Run that many pipelines at once; what it cost this process."""
    api = connect(kubeconfig=kubeconfig)
    images = {"step": "reprise-step:dev", "train": "reprise-train:dev"}
    cluster = Cluster(ClusterPlace(namespace=namespace, images=images), api=api)
    cluster.state = None
    before, cpu, began = peak(), time.process_time(), time.monotonic()
    threads = [0]

    def pipeline(number: int) -> list[str]:
        causes: list[str] = []
        for place, step in enumerate((STEPS[0], "train_model", *STEPS[1:])):
            image, name = ("train", "train") if step == "train_model" else ("step", step.replace("_", "-"))
            workload = Workload(
                name=f"{name}-{tag}-{number}-{place}",
                image=image,  # type: ignore[arg-type]
                command=("python", "-c", "pass"),
                resources=SMALL,
                labels={"pipeline": f"p{number}", "step": step},
            )
            causes.append(cluster.run(workload).cause)
            threads[0] = max(threads[0], threading.active_count())
        return causes

    with ThreadPoolExecutor(count) as pool:
        causes = [cause for found in pool.map(pipeline, range(count)) for cause in found]
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    cluster.close()
    calls = dict(api.calls)
    return {
        "pipelines": count,
        "complete": sum(cause == "complete" for cause in causes),
        "workloads": len(causes),
        "calls": calls,
        "calls_per_workload": round((sum(calls.values()) - calls.get("WATCH", 0)) / len(causes), 2),
        "watches": calls.get("WATCH", 0),
        "peak_mib": round((peak() - before) / 1024, 1),
        "cpu_ms_per_workload": round(1000 * cpu / len(causes), 1),
        "threads": threads[0],
        "seconds": round(seconds, 1),
    }


def peak() -> int:
    """Peak resident memory of this process so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    """Print one line per number of pipelines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--namespace", default=os.environ.get("REPRISE_BENCH_NAMESPACE", "ns"))
    parser.add_argument("--child", nargs=3, metavar=("COUNT", "KUBECONFIG", "TAG"))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(pipelines(int(args.child[0]), args.child[1], args.namespace, args.child[2])))
        return 0
    real = os.environ.get("KUBECONFIG", "")
    with TemporaryDirectory() as folder:
        kubeconfig = real or f"{folder}/kubeconfig"
        server = None
        if not real:
            context = multiprocessing.get_context("spawn")
            ready = context.Event()
            server = context.Process(target=scripted, args=(folder, ready), daemon=True)
            server.start()
            ready.wait(20)
        print(f"{'API of KUBECONFIG' if real else 'scripted API'}; 6 workloads a pipeline; calls without watches")
        print(
            f"{'pipelines':>9} {'done':>9} {'calls/workload':>15} {'watches':>8} {'MiB':>7} {'CPU ms/workload':>16}",
            end="",
        )
        print(f" {'threads':>8} {'s':>6}")
        for count in map(int, args.counts.split(",")):
            tag = re.sub(r"[^0-9]", "", f"{time.time():.1f}")[-7:]
            argv = [sys.executable, __file__, "--namespace", args.namespace, "--child", str(count), kubeconfig, tag]
            done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return 1
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{row['pipelines']:>9} {row['complete']:>4}/{row['workloads']:<4} {row['calls_per_workload']:>15} "
                f"{row['watches']:>8} {row['peak_mib']:>7} {row['cpu_ms_per_workload']:>16} {row['threads']:>8} "
                f"{row['seconds']:>6}"
            )
        if server is not None:
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
