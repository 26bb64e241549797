"""What orchestration on Kubernetes costs: API calls, memory, CPU and threads, at 1, 10 and 100 pipelines at once.

    make bench-cluster                              # on a scripted API of this machine
    KUBECONFIG=... make bench-cluster               # on that cluster: a namespace of its own, pods that run `true`
    .ci/cluster make bench-cluster                  # on a control plane of this machine

Each pipeline is five steps and one attempt of a training, one after the other, as a flow runs them; all pipelines share
one process, which is the worst case for the Runner. A process of its own per number, so that memory is that number's.
`watches` are those opened: three stand at once, and a server ends each after minutes. `held` is what grows with the
pipelines that run: peak memory beyond the process before its first pipeline, a pipeline.
Not covered: what the pods cost, and Prefect.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from deployments.cluster import Cluster  # noqa: E402
from deployments.cluster_place import ClusterPlace  # noqa: E402
from deployments.kube_connect import connect  # noqa: E402
from deployments.workload import Resources, Workload  # noqa: E402
from tests.cluster_kit import cluster_images, make_namespace  # noqa: E402

STEPS = ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint")
COUNTS = (1, 10, 100)
SMALL = Resources(cpus=0.01, memory="32Mi")
POD_SECONDS = 0.3  # of a scripted pod
COLUMNS = ("pipelines", "complete", "calls/workload", "watches", "held KiB", "CPU ms/workload", "threads", "seconds")


def scripted(folder: str, ready: Any) -> None:
    """An API of this machine whose pods succeed after a moment; runs in a process of its own."""
    from tests.deployments.kube_fake import KubeFake
    from tests.deployments.kube_store import JOBS, NODES, ROOM, TRAININGS

    def controller(collection: str, container: str, done: str) -> Any:
        def run(item: dict[str, Any]) -> None:
            name = item["metadata"]["name"]
            pod = kube.pod_for(item, name + "-master-0" * (done == "Succeeded"), container=container)
            time.sleep(POD_SECONDS)
            kube.end_pod(pod["metadata"]["name"], 0, container=container)
            kube.condition(collection, name, done)

        return run

    with KubeFake() as kube:
        labels = {"karpenter.sh/capacity-type": "on-demand"}
        kube.put(NODES, {"metadata": {"name": "n1", "labels": labels}, "spec": {}, "status": {"allocatable": ROOM}})
        kube.on_create[JOBS] = controller(JOBS, "step", "Complete")
        kube.on_create[TRAININGS] = controller(TRAININGS, "pytorch", "Succeeded")
        kube.kubeconfig(Path(folder))
        ready.set()
        threading.Event().wait()


def pipelines(count: int, kubeconfig: str, namespace: str) -> dict[str, Any]:
    """Run that many pipelines at once; what it cost this process."""
    api = connect(kubeconfig=kubeconfig)
    cluster = Cluster(ClusterPlace(namespace=namespace, images=cluster_images()), api=api)
    cluster.state = None
    cluster.run(workload(f"warm-{count}", "pull_data"))  # imports, connections and watches are not a pipeline's
    warm = api.calls.copy()
    before, cpu, began = peak(), time.process_time(), time.monotonic()
    threads = [0]

    def pipeline(number: int) -> list[str]:
        causes: list[str] = []
        for step in STEPS:
            causes.append(cluster.run(workload(f"{count}-{number}", step)).cause)
            threads[0] = max(threads[0], threading.active_count())
        return causes

    with ThreadPoolExecutor(count) as pool:
        causes = [cause for found in pool.map(pipeline, range(count)) for cause in found]
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    calls = api.calls - warm
    watches = api.calls["WATCH"]
    cluster.close()
    return {
        "pipelines": count,
        "complete": f"{sum(cause == 'complete' for cause in causes)}/{len(causes)}",
        "calls/workload": round((sum(calls.values()) - calls["WATCH"]) / len(causes), 2),
        "watches": watches,
        "held KiB": round((peak() - before) / count),
        "CPU ms/workload": round(1000 * cpu / len(causes), 1),
        "threads": threads[0],
        "seconds": round(seconds, 1),
    }


def workload(tag: str, step: str) -> Workload:
    """A no-op."""
    training = step == "train_model"
    return Workload(
        name=f"{step.replace('_', '-')}-{tag}",
        image="train" if training else "step",
        command=("true",),
        resources=SMALL,
        labels={"pipeline": f"p{tag}", "step": step},
    )


def peak() -> int:
    """Peak resident memory of this process so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def cluster_of(kubeconfig: str, folder: str) -> Iterator[tuple[str, str]]:
    """A kubeconfig and a namespace of its own there; a scripted API where no kubeconfig is given."""
    if kubeconfig:
        api, name = connect(kubeconfig=kubeconfig), f"reprise-bench-{os.getpid()}"
        make_namespace(api, name)
        yield kubeconfig, name
        api.delete(f"/api/v1/namespaces/{name}")
        api.close()
        return
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    server = context.Process(target=scripted, args=(folder, ready), daemon=True)
    server.start()
    ready.wait(20)
    yield f"{folder}/kubeconfig", "ns"
    server.terminate()
    server.join()


def main() -> int:
    """Print one line per number of pipelines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--child", nargs=3, metavar=("COUNT", "KUBECONFIG", "NAMESPACE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(pipelines(int(args.child[0]), *args.child[1:])))
        return 0
    real = os.environ.get("KUBECONFIG", "")
    print(
        f"{'API of KUBECONFIG' if real else 'scripted API'}; {len(STEPS)} workloads a pipeline; calls without watches"
    )
    print("  ".join(COLUMNS))
    with TemporaryDirectory() as folder, cluster_of(real, folder) as (kubeconfig, namespace):
        for count in args.counts.split(","):
            argv = [sys.executable, __file__, "--child", count, kubeconfig, namespace]
            done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return 1
            row = json.loads(done.stdout.splitlines()[-1])
            print("  ".join(str(row[column]).rjust(len(column)) for column in COLUMNS), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
