"""What a kubeconfig or a server that is none of ours is told as: one sentence with the file and the fix."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster_place import ClusterPlace
from deployments.errors import ConfigError, PreflightError, Unreachable
from deployments.kube_connect import connect
from deployments.snapshot_take import server_version, take
from tests.deployments.kube_fake import KubeFake

PLACE = ClusterPlace(namespace="ns", images={"step": "s", "train": "t"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{ bad", "cannot be read (while parsing a flow mapping"),
        ("[1, 2]", "cannot be read ("),
        ("", "empty"),
        ("apiVersion: v1\nkind: Config\n", "expected a file that `kubectl get pods` works with"),
    ],
)
def test_a_file_that_is_no_kubeconfig(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        connect(kubeconfig=str(path))
    assert str(error.value).startswith(f"kubeconfig {path}: ")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_and_a_context_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config: there is none; expected"):
        connect(kubeconfig=str(tmp_path / "config"))
    fake = KubeFake()
    with pytest.raises(ConfigError, match=r"\[place\] context = other: .* has no such context; `kubectl config"):
        connect(kubeconfig=fake.kubeconfig(tmp_path), context="other")


def test_a_server_that_is_away_is_told_without_the_librarys_words(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fake = KubeFake()
    fake.port = port
    api = connect(kubeconfig=fake.kubeconfig(tmp_path), patience=0.0)
    with pytest.raises(Unreachable) as error:
        api.request("GET", "/version")
    api.close()
    assert f"http://127.0.0.1:{port} does not answer: GET /version: Connection refused; look" in str(error.value)


@pytest.mark.parametrize(("code", "kind", "exit_code"), [(400, ConfigError, 2), (401, PreflightError, 3)])
def test_a_server_that_is_no_kubernetes_or_refuses_us(code: int, kind: Any, exit_code: int, tmp_path: Path) -> None:
    with KubeFake() as fake:
        fake.fail("GET", "^/version", code, times=9)
        api = connect(kubeconfig=fake.kubeconfig(tmp_path))
        for look in (lambda: server_version(api), lambda: take(api, PLACE)):
            with pytest.raises(kind) as error:
                look()
            assert error.value.exit_code == exit_code
        api.close()


def test_a_snapshot_of_the_scripted_api_is_whole(tmp_path: Path) -> None:
    with KubeFake() as fake:
        api = connect(kubeconfig=fake.kubeconfig(tmp_path))
        seen = json.loads(take(api, PLACE).to_json())
        api.close()
    assert seen["version"] == "v1.36.2"
    assert seen["apis"] == {"kubeflow.org/v1": ["pytorchjobs"]}
    assert [s["metadata"]["name"] for s in seen["objects"]["serviceaccounts"]] == [
        *("reprise-step", "reprise-deploy", "reprise-serve")
    ]
    assert seen["objects"]["nodepools"] == [] and seen["objects"]["autoscalers"] == []
