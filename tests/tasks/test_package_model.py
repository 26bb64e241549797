"""A .mar: same inputs, same bytes; two at once; what is refused before anything is written."""

from __future__ import annotations

import json
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.errors import ConfigError, GiveUp
from tasks.archive import HANDLER, MANIFEST
from tasks.package_model import PackageRequest, model_config, package_model
from tests.tasks.serving_kit import Toy, make_toy, package_request


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def request_(toy: Toy, tmp_path: Path) -> PackageRequest:
    return package_request(toy, tmp_path / "models")


def test_same_inputs_same_bytes(toy: Toy, tmp_path: Path) -> None:
    """Another second, another folder, another umask and other file times: only content counts."""
    first = package_model(package_request(toy, tmp_path / "a", key="ab" * 20))
    copy = tmp_path / "elsewhere"
    copy.mkdir(mode=0o700)
    for file in toy.folder.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
        os.utime(copy / file.name, (1, 1))
        (copy / file.name).chmod(0o600)
    time.sleep(1.05)  # torch-model-archiver writes the second
    second = package_model(package_request(Toy(folder=copy, sha256=toy.sha256), tmp_path / "b", key="ab" * 20))
    assert first.sha256 == second.sha256
    assert Path(first.mar).read_bytes() == Path(second.mar).read_bytes()
    assert first.label == "1.abababab" and Path(first.mar).name == "toy-1.abababab.mar" and first.validated


def test_content_of_the_archive(request_: PackageRequest, tmp_path: Path) -> None:
    extra = tmp_path / "classes.txt"
    extra.write_text("a b c")
    made = package_model(replace(request_, files=[str(extra)], params={"width": 3}))
    with zipfile.ZipFile(made.mar) as archive:
        assert archive.namelist() == sorted(
            [MANIFEST, HANDLER, "serving.json", "model-config.yaml", "toy.py", "model.safetensors", "classes.txt"]
        )
        about = json.loads(archive.read("serving.json"))
        config = json.loads(archive.read("model-config.yaml"))
    assert about["params"] == {"width": 3} and about["version"] == "1" and about["label"] == made.label
    assert (config["batchSize"], config["maxBatchDelay"], config["minWorkers"]) == (8, 5, 1)
    assert list(Path(made.mar).parent.iterdir()) == [Path(made.mar)]  # nothing private is left


def test_many_at_once_do_not_disturb_each_other(toy: Toy, tmp_path: Path) -> None:
    """torch-model-archiver alone loses 7 of 24 here."""
    request = package_request(toy, tmp_path / "models")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(package_model, [request] * 8))
    assert len({one.sha256 for one in made}) == 1


def test_a_folder_called_like_the_model_survives(
    request_: PackageRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch-model-archiver removes $TMPDIR/<model name> before it starts."""
    victim = tmp_path / "toy" / "precious"
    victim.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    package_model(request_)
    assert victim.is_dir()


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"pipeline": "Toy"}, ConfigError, "lower-case"),
        ({"pipeline": "a" * 54}, ConfigError, "at most 53"),
        ({"pipeline": "../toy"}, ConfigError, "lower-case"),
        ({"version": "1.0"}, GiveUp, "version '1.0' a number"),
        ({"key": "xyz"}, GiveUp, "hexadecimal"),
        ({"weights_sha256": "0" * 64}, GiveUp, "the training recorded 0000"),
        ({"weights": "/nowhere/model.safetensors"}, GiveUp, "not a regular file"),
        ({"files": ["/nowhere/vocabulary.txt"]}, GiveUp, "not a regular file"),
    ],
)
def test_what_is_refused(request_: PackageRequest, change: dict[str, object], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        package_model(replace(request_, **change))  # type: ignore[arg-type]
    store = Path(request_.model_store)
    assert not store.exists() or not list(store.glob("*.mar"))


@pytest.mark.parametrize(
    "name", ["random.py", "json.py", "torch.py", "reprise_handler.py", "two words.py", "model.txt"]
)
def test_a_module_name_that_would_break_the_worker_is_refused(
    request_: PackageRequest, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=r"rename the file|can be imported"):
        package_model(replace(request_, module=str(tmp_path / name)))


def test_two_files_of_one_name_are_refused(request_: PackageRequest, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.txt").write_text(folder)
    with pytest.raises(ConfigError, match=r"two files would be called 'words\.txt'"):
        package_model(replace(request_, files=[str(tmp_path / f / "words.txt") for f in ("x", "y")]))


def test_pickled_weights_are_refused(request_: PackageRequest, tmp_path: Path) -> None:
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"anything")
    with pytest.raises(GiveUp, match="no pickle is served"):
        package_model(replace(request_, weights=str(pickled)))


def test_weights_that_are_no_safetensors_are_refused_by_the_validator(request_: PackageRequest, tmp_path: Path) -> None:
    import hashlib

    fake = tmp_path / "model.safetensors"
    fake.write_bytes(b"\x80\x04pickle pretending")
    with pytest.raises(GiveUp, match="is not safetensors"):
        package_model(
            replace(request_, weights=str(fake), weights_sha256=hashlib.sha256(fake.read_bytes()).hexdigest())
        )
    assert not list(Path(request_.model_store).iterdir())


def test_settings_of_the_model_are_all_set() -> None:
    assert model_config({}) == {
        "minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 5, "responseTimeout": 30,
        "startupTimeout": 120, "jobQueueSize": 100, "maxRetryTimeoutInSec": 300,
    }  # fmt: skip
    tuned = model_config({"workers": 2, "batch_size": 32, "max_batch_delay_seconds": 0.0001, "queue": 7})
    assert (tuned["maxWorkers"], tuned["batchSize"], tuned["maxBatchDelay"], tuned["jobQueueSize"]) == (2, 32, 1, 7)
