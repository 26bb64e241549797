"""How a TorchServe is started: every limit set, nothing shared with another server."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import torchserve_launch
from deployments.errors import PreflightError
from deployments.torchserve_launch import (
    TorchServePorts,
    champions,
    free_ports,
    java_home,
    private_tmp,
    render_config,
    stop_signal_pid,
    torchserve_command,
    worker_error,
)
from tests.tasks.serving_kit import wait_for

PORTS = TorchServePorts(inference=1, management=2, metrics=3)


def properties(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def test_every_limit_is_set_and_nothing_is_open() -> None:
    found = properties(render_config(model_store=Path("/store"), ports=PORTS, models={"b": "b.mar", "a": "a.mar"}))
    assert all("$" not in value for value in found.values())
    for name in ("inference", "management", "metrics"):
        assert found[f"{name}_address"].startswith("http://127.0.0.1:")
    assert (found["grpc_inference_port"], found["grpc_management_port"]) == ("4", "5")
    assert found["grpc_inference_address"] == found["grpc_management_address"] == "127.0.0.1"
    assert found["install_py_dep_per_model"] == "false" and found["decode_input_request"] == "false"
    assert found["allowed_urls"] == "closed://nothing" and found["disable_token_authorization"] == "true"
    assert found["load_models"] == "a=a.mar,b=b.mar"
    for limit in ("max_request_size", "max_response_size", "job_queue_size", "default_response_timeout"):
        assert int(found[limit]) > 0


def test_a_network_address_leaves_management_on_loopback() -> None:
    found = properties(render_config(model_store=Path("/s"), ports=PORTS, bind="0.0.0.0", token_auth=True))
    assert found["inference_address"] == "http://0.0.0.0:1" and found["management_address"] == "http://127.0.0.1:2"
    assert found["disable_token_authorization"] == "false"


def test_a_launch_shares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "/somebody/elses")
    monkeypatch.setenv("http_proxy", "http://proxy")
    state = tmp_path / "s"
    (state / "tmp" / "models" / "old").mkdir(parents=True)
    (state / "key_file.json").write_text("{}")
    launch = torchserve_command(state, tmp_path / "models", PORTS)
    assert launch.cwd == state and launch.argv[:3] == [sys.executable, "-m", "ts.model_server"]
    assert "--ncs" in launch.argv and "--foreground" in launch.argv
    assert "TS_CONFIG_FILE" not in launch.env and "http_proxy" not in launch.env
    assert launch.env["TMPDIR"] == launch.env["TEMP"] == str(state / "tmp")
    assert launch.env["LOG_LOCATION"] == str(state / "logs")
    assert list((state / "tmp").iterdir()) == [] and not (state / "key_file.json").exists()
    assert stat.S_IMODE((state / "tmp").stat().st_mode) == 0o700
    assert (state / "config.properties").is_file() and (state / "log4j2.xml").is_file()


def test_a_deep_folder_gets_a_short_temporary_one(tmp_path: Path) -> None:
    """A unix socket's path has 107 bytes; TorchServe's workers have one each."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    short = private_tmp(deep)
    assert len(str(short)) < 60 and short == private_tmp(deep) != private_tmp(tmp_path / ("d" * 61) / ("e" * 60))
    assert str(os.getuid()) in short.name


def test_what_a_restarted_server_loads(tmp_path: Path) -> None:
    """The version in service of each pipeline, if its archive is still there."""
    (tmp_path / "toy-1.ab.mar").write_bytes(b"")
    for name, serving in (("toy", "toy-1.ab.mar"), ("gone", "gone-1.ab.mar"), ("never", "")):
        document = {"serving": {"mar": str(tmp_path / serving)} if serving else None}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / ".toy.json.123.json").write_text("half")
    assert champions(tmp_path) == {"toy": "toy-1.ab.mar"} and champions(tmp_path / "nowhere") == {}


def test_the_last_error_of_a_worker(tmp_path: Path) -> None:
    prefix = "2026-11-24T08:00:00,000 INFO  MODEL_LOG - "
    text = [f"{prefix}Traceback (most recent call last):", f"{prefix}OSError: first", f"{prefix}a.b.OddError: second"]
    (tmp_path / "model_log.log").write_text("\n".join(text) + f"\n{prefix}Frontend disconnected.\n")
    assert worker_error(tmp_path) == "a.b.OddError: second"
    assert worker_error(tmp_path, since=10_000) == worker_error(tmp_path / "nowhere") == ""


def test_free_ports_are_six_different_ones() -> None:
    ports = free_ports()
    assert len({*vars(ports).values()}) == 6


def test_a_temporary_folder_of_somebody_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchserve_launch, "private_tmp", lambda state: tmp_path / "theirs")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    (tmp_path / "theirs").mkdir()
    with pytest.raises(PreflightError, match="theirs belongs to somebody else; set TMPDIR"):
        torchserve_command(tmp_path / "state", tmp_path / "models", PORTS)


def test_java_comes_from_the_wheel_or_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert (java_home() / "bin" / "java").is_file()
    monkeypatch.setenv("JAVA_HOME", "/opt/java")
    assert java_home() == Path("/opt/java")
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setattr(torchserve_launch, "find_spec", lambda name: None)
    with pytest.raises(PreflightError, match="set JAVA_HOME, or install the `serve` extra"):
        java_home()


def test_the_process_to_signal_is_the_wrappers_child() -> None:
    script = "import subprocess, sys; subprocess.Popen(['sleep', '30']); print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as wrapper:
        assert wrapper.stdout and wrapper.stdout.readline() == b"up\n"
        child = stop_signal_pid(wrapper.pid)
        assert child
        wait_for(lambda: Path(f"/proc/{child}/comm").read_text().strip() == "sleep", 10)  # forked, then replaced
        os.kill(child, 9)
        wrapper.kill()
    assert stop_signal_pid(wrapper.pid) is None
