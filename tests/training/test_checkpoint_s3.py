"""Checkpoints in an object store, over a real S3 API: the manifest's PUT is the commit, no rename."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from training.checkpoint import Checkpointer, CheckpointWriteError, NoGoodCheckpoint, newest_complete, verify
from training.checkpoint_audit import main
from training.object_store import ObjectStore


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    import boto3

    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3").create_bucket(Bucket="checkpoints")
    return f"s3://checkpoints/{request.node.name}/k"


def state_of(value: float, size: int = 300) -> dict[str, Any]:
    return {"tensors": {"w": torch.full((size, 300), value), "s": torch.tensor(value)}, "python": {"value": value}}


def saved(url: str, *steps: int, **more: Any) -> None:
    checkpointer = Checkpointer(url)
    for step in steps:
        checkpointer.save(step, state_of(step), meta={"step": step}, per_rank={"own": step}, **more)
        checkpointer.wait_durable()
    checkpointer.close()


def client() -> Any:
    import boto3

    return boto3.client("s3")


def objects(url: str) -> list[str]:
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    return [o["Key"] for o in client().list_objects_v2(Bucket=bucket, Prefix=prefix + "/").get("Contents", [])]


def test_save_load_prune(url: str) -> None:
    assert Checkpointer(url).load(state_of(0)) is None
    assert newest_complete(url) is None
    saved(url, 1, 2, 3, complete=True)
    assert [audit.step for audit in verify(url)] == [3, 2]
    assert len(objects(url)) == 4
    state = state_of(0)
    info = Checkpointer(url).load(state)
    assert info is not None and (info.step, info.mine) == (3, {"own": 3}) and info.url.startswith(url)
    assert bool((state["tensors"]["w"] == 3).all()) and state["python"] == {"value": 3}
    complete = newest_complete(url)
    assert complete is not None and complete.step == 3
    assert main([url]) == 0


def test_many_parts(url: str) -> None:
    """More than one upload part (32 MiB each)."""
    checkpointer = Checkpointer(url)
    state = {"tensors": {"w": torch.arange(18 << 20, dtype=torch.float32)}}
    checkpointer.save(1, state, meta={}, per_rank={})
    checkpointer.close()
    other = {"tensors": {"w": torch.zeros(18 << 20)}}
    assert Checkpointer(url).load(other) is not None
    assert other["tensors"]["w"].equal(state["tensors"]["w"])


def test_an_upload_without_its_manifest_does_not_exist_and_is_swept(url: str) -> None:
    saved(url, 1)
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    client().put_object(Bucket=bucket, Key=f"{prefix}/step-0000000002-dead-0001/rank-00000.safetensors", Body=b"x" * 99)
    assert [audit.step for audit in verify(url)] == [1]
    half = f"{prefix}/step-0000000003-dead-0001/rank-00000.safetensors"
    upload = client().create_multipart_upload(Bucket=bucket, Key=half)["UploadId"]
    client().upload_part(Bucket=bucket, Key=half, UploadId=upload, PartNumber=1, Body=b"y" * 99)
    info = Checkpointer(url).load(state_of(0))
    assert info is not None and info.step == 1 and info.skipped == ()
    assert not [key for key in objects(url) if "dead" in key]
    assert not client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads")


def test_a_damaged_object_is_quarantined(url: str) -> None:
    saved(url, 1, 2)
    bucket, key = url.removeprefix("s3://").split("/", 1)[0], next(k for k in objects(url) if "step-0000000002" in k)
    client().put_object(Bucket=bucket, Key=key, Body=b"not what was written")
    state = state_of(0)
    info = Checkpointer(url).load(state)
    assert info is not None and info.step == 1 and len(info.skipped) == 1
    assert bool((state["tensors"]["w"] == 1).all())
    key = next(k for k in objects(url) if "step-0000000001" in k and k.endswith("safetensors"))
    client().delete_object(Bucket=bucket, Key=key)
    for _ in range(2):
        with pytest.raises(NoGoodCheckpoint):
            Checkpointer(url).load(state_of(0))


def test_a_failed_upload_leaves_the_old_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(url, 1)
    checkpointer = Checkpointer(url)
    assert isinstance(checkpointer.store, ObjectStore)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("quota exceeded")

    monkeypatch.setattr(checkpointer.store._fs, "pipe_file", refuse)
    checkpointer.save(2, state_of(2), meta={}, per_rank={})
    with pytest.raises(CheckpointWriteError, match=r"manifest.json.*quota exceeded"):
        checkpointer.wait_durable()
    checkpointer.close()
    assert [audit.step for audit in verify(url)] == [1]
    assert not [key for key in objects(url) if "step-0000000002" in key]


def test_a_missing_bucket_is_told_at_the_first_wait(url: str) -> None:
    checkpointer = Checkpointer("s3://no-such-bucket/k")
    checkpointer.save(1, state_of(1), meta={}, per_rank={})
    with pytest.raises(CheckpointWriteError, match="no-such-bucket"):
        checkpointer.wait_durable()
    checkpointer.close()
