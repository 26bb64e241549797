"""Which Kubernetes API server is meant, and with which credentials: a kubeconfig, or a pod's own service account.

    api = connect()

The only importer of the `kubernetes` client. A kubeconfig that is missing or unusable is told in one sentence with the
file and the fix. Not covered: requests (kube_api.py).
"""

from __future__ import annotations

from deployments.errors import ConfigError
from deployments.kube_api import PATIENCE, KubeApi


def connect(*, kubeconfig: str = "", context: str = "", patience: float = PATIENCE) -> KubeApi:
    """An API server by kubeconfig ("" means $KUBECONFIG or ~/.kube/config, in a pod its service account).

    Raises ConfigError if there is no usable configuration.
    """
    import os

    import yaml
    from kubernetes import client, config  # 0.3 s of CPU, so only where a cluster is used
    from kubernetes.config.config_exception import ConfigException

    configuration = client.Configuration()
    configuration.connection_pool_maxsize = 64
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and not kubeconfig and "KUBECONFIG" not in os.environ
    try:
        if in_pod:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                kubeconfig or None, context or None, client_configuration=configuration
            )
    except (ConfigException, OSError, yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError) as error:
        where = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
        raise ConfigError(_no_config(where, context, error)) from error
    return KubeApi(client.ApiClient(configuration), patience=patience)


def _no_config(where: str, context: str, error: Exception) -> str:
    from kubernetes.config.config_exception import ConfigException

    expected = "expected a file that `kubectl get pods` works with; --place FILE and KUBECONFIG choose another"
    said = " ".join(str(error).split())
    if not isinstance(error, ConfigException | OSError):
        return f"kubeconfig {where}: cannot be read ({said[:200]}); {expected}"
    if context and f"name {context} in" in said:
        return (
            f"[place] context = {context}: kubeconfig {where} has no such context; "
            "`kubectl config get-contexts -o name` lists what there is"
        )
    if "No configuration found" in said:
        return f"kubeconfig {where}: there is none; {expected}"
    return f"kubeconfig {where}: {said.removeprefix('Invalid kube-config file. ')}; {expected}"
