"""pull_data from a remote that speaks S3 over HTTP (moto's server): the same words as with a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.tasks.dvc_kit import commit, dvc, make_project
from tests.tasks.test_pull_data import in_process, request_for


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_pulled_then_tampered(endpoint: str, tmp_path: Path) -> None:
    store = boto3.client("s3", endpoint_url=endpoint)
    store.create_bucket(Bucket="data")
    make_project(tmp_path, files=2)
    config = tmp_path / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.remote", "s3://data/x") + f"    endpointurl = {endpoint}\n")
    dvc(tmp_path, ["push", "-q"])
    request = request_for(tmp_path, sha=commit(tmp_path))
    code, said = in_process(request)
    assert code == 0 and "4/4 files verified" in said, said

    names = [row["Key"] for row in store.list_objects_v2(Bucket="data")["Contents"]]
    bad = next(n for n in names if b"heldout 1" in store.get_object(Bucket="data", Key=n)["Body"].read())
    store.put_object(Bucket="data", Key=bad, Body=b"altered")
    code, said = in_process(request_for(tmp_path, folder=tmp_path / ".reprise" / "fresh"))
    expected = "".join(bad.split("/")[-2:])
    assert code == 1
    assert f"data/d/heldout/1.txt: expected md5 {expected}, found md5 " in said and "(altered)" in said, said
