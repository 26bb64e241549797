from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments import ports as tcp
from deployments import processes, services
from deployments.errors import PreflightError
from deployments.processes import JOB_MARK
from deployments.processes import SERVICE_MARK as MARK
from deployments.service_launches import Service, laptop_services, mlflow_launch, prefect_launch

# A server as the real ones are: slow to come up, with a child that ignores SIGTERM and has its own session.
SERVER = """
import http.server, os, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
open("starts", "a").write("x")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ok" else 404)
        self.end_headers()
    def log_message(self, *a): pass
time.sleep(float(sys.argv[2]))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(services, "REPLACE_SECONDS", 0.2)
    yield tmp_path / ".reprise"
    left = {p for p, f in processes.marks(MARK).items() if f.startswith(str(tmp_path))}
    processes.send(left, signal.SIGKILL)


def server(
    state: Path, name: str, port: int, *, code: str = SERVER, delay: float = 0.2, path: str = "ok", setting: str = "web"
) -> Service:
    folder = state.resolve() / "services" / name
    argv = [sys.executable, "-c", code, str(port), str(delay)]
    return Service(
        name=name,
        folder=folder,
        ports={setting: port},
        command=lambda: (argv, dict(os.environ), folder),
        health=(f"{port}/{path}",),
    )


def pids_of(folder: Path) -> set[int]:
    return processes.tree(MARK, str(folder))


def test_started_in_parallel_then_reused_then_down(state: Path) -> None:
    both = [server(state, "a", 18330, delay=0.5), server(state, "b", 18331, delay=0.5)]
    told: list[tuple[str, str]] = []
    began = time.monotonic()
    services.start_all(both, on_progress=lambda name, state, seconds: told.append((name, state)))
    assert time.monotonic() - began < 1.4
    assert {("a", "starting"), ("b", "starting")} <= set(told) and told.count(("a", "ready")) == 1
    told.clear()
    services.start_all(both, on_progress=lambda name, state, seconds: told.append((name, state)))
    assert told == [("a", "reused"), ("b", "reused")]
    assert [(s.name, s.state, s.ports) for s in services.status(state)] == [
        ("a", "running", {"web": 18330}),
        ("b", "running", {"web": 18331}),
    ]
    assert all(s.memory_bytes > 1 << 20 for s in services.status(state))
    before = {pid for service in both for pid in pids_of(service.folder)}
    assert len(before) == 4
    assert services.down(state, grace_seconds=0.5) == ["a", "b"]
    assert all(processes.start_mark(pid) == "" for pid in before)
    assert tcp.free(18330) and tcp.free(18331)
    assert [s.state for s in services.status(state)] == ["stopped", "stopped"]
    assert services.down(state) == []


def test_asking_for_what_runs_is_cheap(state: Path) -> None:
    one = [server(state, "a", 18330)]
    services.start_all(one)
    began = time.perf_counter()
    services.start_all(one)
    assert time.perf_counter() - began < 0.1
    services.down(state, grace_seconds=0.2)


def test_two_callers_at_once_are_one_start(state: Path) -> None:
    one = [server(state, "a", 18330, delay=0.5)]
    told: list[str] = []
    callers = [
        threading.Thread(target=services.start_all, args=(one,), kwargs={"on_progress": lambda n, s, t: told.append(s)})
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (one[0].folder / "starts").read_text() == "x"
    assert (told.count("ready"), told.count("reused")) == (1, 2)
    services.down(state, grace_seconds=0.2)


def test_one_that_was_killed_leaves_nothing_and_is_started_again(state: Path) -> None:
    one = [server(state, "a", 18330)]
    services.start_all(one)
    known = processes.recall(one[0].folder / "process.json")
    assert known is not None
    family = pids_of(one[0].folder)
    os.kill(known[0].pid, signal.SIGKILL)
    while known[0].alive():
        time.sleep(0.01)
    assert services.status(state)[0].state == "stopped"
    services.start_all(one)
    assert family.isdisjoint(pids_of(one[0].folder))
    assert (one[0].folder / "starts").read_text() == "xx"
    services.down(state, grace_seconds=0.2)


def test_a_lost_record_does_not_hide_a_server_of_ours(state: Path) -> None:
    one = [server(state, "a", 18330)]
    services.start_all(one)
    (one[0].folder / "process.json").unlink()
    services.start_all(one)  # the port was its own, so it is no stranger's
    assert len(pids_of(one[0].folder)) == 2
    (one[0].folder / "process.json").unlink()
    assert services.down(state, grace_seconds=0.2) == ["a"]


def test_other_ports_in_the_settings_move_it(state: Path) -> None:
    services.start_all([server(state, "a", 18330)])
    services.start_all([server(state, "a", 18331)])
    assert tcp.free(18330)
    assert services.status(state)[0].ports == {"web": 18331}
    services.down(state, grace_seconds=0.2)


def test_a_record_of_another_boot_is_not_believed(state: Path) -> None:
    one = server(state, "a", 18330)
    one.folder.mkdir(parents=True)
    someone = processes.Identity(pid=os.getpid(), start="feedbeef:1")
    processes.remember(one.folder / "process.json", someone, ports={"web": 18330}, health=["18330/ok"], started=1.0)
    assert services.status(state)[0].state == "stopped"
    assert services.down(state) == []
    services.start_all([one])
    services.down(state, grace_seconds=0.2)


def test_one_that_dies_at_start_shows_the_end_of_its_log(state: Path) -> None:
    code = "import sys; print('\\n'.join(map(str, range(40)))); sys.exit('no such table: models')"
    with pytest.raises(PreflightError, match="a ended while it was starting") as error:
        services.start_all([server(state, "a", 18330, code=code)])
    assert "no such table: models" in str(error.value)
    assert str(state.resolve() / "services" / "a" / "log.txt") in str(error.value)
    assert "| 26" in str(error.value) and "| 3\n" not in str(error.value)
    assert error.value.exit_code == 3


def test_one_that_never_answers_is_given_up(state: Path) -> None:
    with pytest.raises(PreflightError, match="does not answer after 1 s"):
        services.start_all([server(state, "a", 18330, path="not-there")], timeout_seconds=0.8)
    assert services.status(state)[0].state == "not answering"
    assert services.down(state, grace_seconds=0.2) == ["a"]


def test_a_missing_program(state: Path) -> None:
    one = server(state, "a", 18330)
    missing = Service(
        name="a",
        folder=one.folder,
        ports=one.ports,
        command=lambda: (["no-such-program"], {}, one.folder),
        health=("18330/",),
    )
    with pytest.raises(PreflightError, match="no-such-program"):
        services.start_all([missing])


def test_a_taken_port_names_its_holder_and_the_setting_and_starts_nothing(state: Path) -> None:
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 18331)); print(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", listen], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(PreflightError) as error:
            services.start_all([server(state, "a", 18330), server(state, "b", 18331, setting="mlflow")])
        holder.kill()
    message = str(error.value)
    assert "port 18331 for b is taken by python" in message and f"(pid {holder.pid})" in message
    assert "[ports] mlflow = 18332" in message and "laptop.toml" in message
    assert error.value.exit_code == 3
    assert pids_of(state.resolve() / "services" / "a") == set()


def test_a_port_of_another_project_names_its_folder(state: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / ".reprise"
    services.start_all([server(other, "mlflow", 18330)])
    with pytest.raises(PreflightError) as error:
        services.start_all([server(state, "a", 18330)])
    assert f"the mlflow of another project (`reprise down` in {tmp_path / 'other'} ends it)" in str(error.value)
    services.down(state)
    assert services.status(other)[0].state == "running"
    services.down(other, grace_seconds=0.2)


def test_a_service_started_from_within_a_job_survives_it(state: Path) -> None:
    folder = str(state / "jobs" / "deploy")
    code = (
        "from pathlib import Path; from tests.deployments import test_services as t; import time\n"
        f"t.services.start_all([t.server(Path({str(state)!r}), 'a', 18330)]); print('up', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, JOB_MARK: folder, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stdout.readline() == b"up\n"
        assert processes.tree(JOB_MARK, folder) == {job.pid}
        processes.kill_tree(JOB_MARK, folder)
        job.wait()
    assert services.status(state)[0].state == "running"
    services.down(state, grace_seconds=0.2)


def test_a_missing_port_setting() -> None:
    with pytest.raises(PreflightError, match=r"\[ports\] metrics"):
        laptop_services(Path("x"), {"prefect": 1, "mlflow": 2, "inference": 3, "management": 4})


def test_launches_are_local_silent_and_free_of_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://elsewhere.example")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere.example")
    for argv, env, cwd in (prefect_launch(tmp_path, 18330), mlflow_launch(tmp_path, 18330)):
        assert "127.0.0.1" in argv and cwd == tmp_path
        assert "https://elsewhere.example" not in env.values()
        assert env["DO_NOT_TRACK"] == "1"


def test_import_is_light() -> None:
    code = "import time; t = time.process_time(); import deployments.services, sys; print(time.process_time() - t)"
    code += "; assert 'psutil' not in sys.modules and 'http.client' not in sys.modules"
    root = Path(__file__).parents[2]
    assert min(float(subprocess.check_output([sys.executable, "-c", code], cwd=root)) for _ in range(5)) < 0.05


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_real_servers(state: Path) -> None:
    names = ("prefect", "mlflow", "inference", "management", "metrics", "grpc_inference", "grpc_management")
    ports = {name: 18340 + number for number, name in enumerate(names)}
    urls = services.ensure(state, ports=ports)
    assert json.loads(_get(f"{urls['prefect']}/api/admin/version"))
    assert json.loads(_get(f"{urls['prefect']}/ui-settings"))["api_url"] == f"{urls['prefect']}/api"
    assert "models" in json.loads(_get(f"{urls['management']}/models"))
    assert json.loads(_get(f"{urls['inference']}/ping"))["status"] == "Healthy"

    # MLflow: artifacts go through the server, and into its own folder.
    upload = f"{urls['mlflow']}/api/2.0/mlflow-artifacts/artifacts/probe.txt"
    request = urllib.request.Request(upload, data=b"kept", method="PUT")
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200
    assert (state / "services" / "mlflow" / "artifacts" / "probe.txt").read_bytes() == b"kept"
    assert _get(upload) == b"kept"

    # Everything is on loopback only.
    import psutil

    mine = {pid for folder in (state.resolve() / "services").iterdir() for pid in pids_of(folder)}
    listening = [c for c in psutil.net_connections("inet") if c.pid in mine and c.status == psutil.CONN_LISTEN]
    assert {c.laddr.port for c in listening} >= set(ports.values())
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    began = time.monotonic()
    assert services.ensure(state, ports=ports) == urls
    assert time.monotonic() - began < 2

    # The wrapper of TorchServe killed: its JVM must not survive the next start.
    known = processes.recall(state / "services" / "torchserve" / "process.json")
    assert known is not None
    os.kill(known[0].pid, signal.SIGKILL)
    while known[0].alive():
        time.sleep(0.01)
    services.ensure(state, ports=ports)

    mine |= {pid for folder in (state.resolve() / "services").iterdir() for pid in pids_of(folder)}
    assert services.down(state) == ["mlflow", "prefect", "torchserve"]
    assert [pid for pid in mine if processes.start_mark(pid)] == []
    assert all(tcp.free(port) for port in ports.values())
    for name in ("prefect/prefect.db", "mlflow/mlflow.db"):
        with sqlite3.connect(state / "services" / name) as database:
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        database.close()


def test_free_and_next_free() -> None:
    with socket.create_server(("127.0.0.1", 18335)):
        assert not tcp.free(18335)
        assert tcp.next_free(18334) == 18336
        assert f"(pid {os.getpid()})" in tcp.holder(18335)
    assert tcp.free(18335)
