"""preflight, render, gpu and doctor as they are typed, and every other command refusing a cluster in words."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.preflight import preflight
from deployments.snapshot import Snapshot
from flows.__main__ import main
from flows.cluster_settings import load_cluster
from flows.example import create_project
from tasks.records import Store
from tests.loopback_kit import JsonHandler, serving
from training.spec import TrainSpec

ROOT = Path(__file__).resolve().parents[2]
SOUND = ROOT / "tests" / "deployments" / "snapshots" / "sound.json"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "digits"
    create_project("digits", folder)
    return folder


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.delenv("PROMETHEUS_URL", raising=False)
    return made


def reprise(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def broken(tmp_path: Path) -> Path:
    """The sound cluster without a place for GPUs."""
    document = json.loads(SOUND.read_text())
    for node in document["objects"]["nodes"]:
        node["spec"]["unschedulable"] = True
    document["apis"] = {name: plurals for name, plurals in document["apis"].items() if "kubeflow" not in name}
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(document))
    return file


# --- preflight and doctor


def test_preflight_of_the_shipped_place_on_a_sound_cluster(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise("preflight", "--snapshot", str(SOUND), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["verdict"] for row in rows} == {"OK", "WARN"}
    assert {row["what"] for row in rows if row["verdict"] == "WARN"} == {"image"}  # shipped by tag, and said so


@pytest.mark.parametrize("command", [("preflight",), ("doctor", "--place", "cluster")])
def test_one_fail_is_exit_code_3_and_names_it(
    project: Path, tmp_path: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert reprise(*command, "--snapshot", str(broken(tmp_path))) == 3
    out, err = capsys.readouterr()
    assert "FAIL" in out and "PyTorchJob" in out
    assert err.startswith("error: ") and "checks failed" in err and "PyTorchJob" in err


def test_doctor_of_a_cluster_is_its_preflight(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise("doctor", "--place", "cluster", "--snapshot", str(SOUND)) == 0
    doctor = capsys.readouterr().out
    assert reprise("preflight", "--snapshot", str(SOUND)) == 0
    assert capsys.readouterr().out == doctor


def test_what_was_seen_is_kept(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.json"
    assert reprise("preflight", "--snapshot", str(SOUND), "--save", str(copy)) == 0
    first = capsys.readouterr().out
    assert reprise("preflight", "--snapshot", str(copy)) == 0
    assert capsys.readouterr().out == first
    assert reprise("preflight", "--snapshot", str(SOUND), "--save", str(tmp_path / "no" / "file")) == 2
    assert "--save" in capsys.readouterr().err


def test_the_cluster_of_the_project_and_its_settings_count(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[place]\nkind = "cluster"\n[images]\nstep = "r.example/s:1"\ntrain = "r.example/t:1"\n'
        "[resources.train_model]\ngpus = 64\n"
    )
    assert reprise("preflight", "--place", str(own), "--snapshot", str(SOUND)) == 3
    assert "64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preflight", "--snapshot", "none.json"], "none.json"),
        (["preflight", "--place", "laptop"], 'expected "cluster"'),
        (["preflight", "--set", "train.epoch=3", "--snapshot", str(SOUND)], "did you mean"),
        (["doctor", "--snapshot", str(SOUND)], "expected --place cluster"),
        (["render", "--step", "train"], 'did you mean "train_model"?'),
        (["render", "--place", "laptop"], 'expected "cluster"'),
        (["gpu"], "PROMETHEUS_URL"),
        (["gpu", "--prometheus", "http://127.0.0.1:9", "--minutes", "0"], "--minutes 0"),
        (["gpu", "--prometheus", "localhost:9090"], "expected http://HOST:PORT"),
        (["render", "--json"], "expected --server with it"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    project: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reprise(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        ("up", "kubectl apply --server-side -k deployments/k8s/overlays/NAME"),
        ("down", "`reprise cancel --place cluster`"),
        ("verify-resume", "--place laptop"),
        ("tune-serving", "--place laptop"),
        ("serve", "kubectl -n reprise-services rollout status deployment/prefect-worker"),
    ],
)
def test_every_other_command_says_what_to_do_there_instead(
    project: Path, command: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reprise(command, "--place", "cluster") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"`reprise {command}` is for a laptop; " in err and instead in err
    assert not (project / ".reprise").exists()


# --- render


def rendered(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert reprise("render", *more) == 0
    return capsys.readouterr().out


def test_a_run_is_rendered_step_by_step(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects: list[Json] = list(yaml.safe_load_all(rendered(capsys)))
    kinds = [(o["kind"], (o["metadata"]["labels"]).get("reprise.dev/step", "")) for o in objects]
    assert kinds == [
        ("Job", "pull_data"),
        ("PyTorchJob", "train_model"),
        ("Job", "register_model"),
        ("Job", "package_model"),
        ("Job", "deploy_model"),
        ("Service", ""),
        ("PodDisruptionBudget", ""),
        ("Deployment", ""),
        ("Job", "check_endpoint"),
        ("Job", "write_report"),
    ]
    assert {o["metadata"]["namespace"] for o in objects} == {"reprise"}
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)


def test_the_same_commit_gives_the_same_text_without_paths_of_a_machine(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = rendered(capsys)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(clone)], check=True)
    monkeypatch.chdir(clone)
    assert rendered(capsys) == first
    for path in (str(project), str(tmp_path), str(ROOT), str(Path.home()), sys.prefix):
        assert path not in first


def test_the_names_are_those_of_the_plan(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise("plan", "--json", "--set", "train.epochs=7") == 0
    keys = {s["name"]: s["key"] for s in json.loads(capsys.readouterr().out)["steps"]}
    names = [o["metadata"]["name"] for o in yaml.safe_load_all(rendered(capsys, "--set", "train.epochs=7"))]
    assert f"train-{keys['train_model'][:12]}-1" in names
    assert f"pull-data-{keys['pull_data'][:12]}-1" in names


def test_the_training_is_complete_and_its_paths_are_of_the_volume(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = yaml.safe_load(rendered(capsys, "--step", "train_model", "--set", "train.epochs=7"))
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    spec = TrainSpec.from_json(pod["metadata"]["annotations"]["reprise.dev/request"])
    assert (spec.epochs, spec.mlflow_uri) == (7, "http://mlflow.reprise-services:5000")
    for path in (spec.module, spec.data, spec.output, spec.progress, spec.checkpoints.removeprefix("file://")):
        assert path.startswith("/reprise/")
    container = pod["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert pod["spec"]["terminationGracePeriodSeconds"] == 90


def test_one_step_is_a_part_of_the_whole(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = list(yaml.safe_load_all(rendered(capsys)))
    assert list(yaml.safe_load_all(rendered(capsys, "--step", "deploy_model"))) == whole[4:8]


def test_the_sound_cluster_takes_what_is_rendered(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = [o for o in yaml.safe_load_all(rendered(capsys)) if o["kind"] in ("Job", "PyTorchJob")]
    assert [o["spec"]["template"]["spec"]["serviceAccountName"] for o in objects if o["kind"] == "Job"] == [
        *("reprise-step", "reprise-step", "reprise-step", "reprise-deploy", "reprise-step", "reprise-step")
    ]
    place = load_cluster("cluster", tmp_path).cluster_place()
    assert [f for f in preflight(Snapshot.read(SOUND), objects, place) if f.verdict == "FAIL"] == []
    assert any(f.verdict == "FAIL" for f in preflight(Snapshot.read(broken(tmp_path)), objects, place))


def test_no_image_to_serve_with_is_told(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[place]\nkind = "cluster"\n[images]\nstep = "s"\ntrain = "t"\n')
    assert reprise("render", "--place", str(own)) == 2
    assert "[images] serve: no image given" in capsys.readouterr().err


# --- gpu


@pytest.fixture
def prometheus() -> Iterator[str]:
    """A Prometheus whose one GPU was used at 20 % for an hour by the first attempt of a training."""
    now = time.time()

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["query"][0]
            metric = {"exported_pod": f"train-{'a' * 12}-1-master-0", "UUID": "GPU-1", "gpu": "0", "Hostname": "n"}
            values = [[now - 30 * n, "20"] for n in reversed(range(119))]
            running = [
                {"metric": {"key": "a" * 12, "run": run, "capacity": "spot"}, "values": [[now - ago, "1"]]}
                for run, ago in (("digits-7", 2000), ("digits-8", 30))
            ]
            answers = {
                "DCGM_FI_DEV_GPU_UTIL": [{"metric": metric, "values": values}],
                "reprise_training_running": running,
            }
            self.answer(200, {"data": {"result": answers.get(query, [])}})

    with serving(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def with_a_run(root: Path, *, ended: float | None) -> None:
    store, key, now = Store(root=str(root)), "a" * 40, time.time()
    steps = [{"name": "train_model", "key": key}]
    document = {"run": "digits-7", "started": now - 4000, "ended": ended, "steps": steps, "attempts": [{"number": 1}]}
    store.write("runs/digits-7", document)
    folder = root / "trainings" / key
    folder.mkdir(parents=True)
    lines: list[Json] = [{"step": n, "time": now - 3000 + n, "data_seconds": 8.0} for n in range(1, 2900, 10)]
    lines += [{"event": "checkpoint", "stall": 0.1, "time": now - 100}]
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_gpu_tells_run_alert_and_reason(
    project: Path, tmp_path: Path, prometheus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "laptop.toml"
    place.write_text(f'[place]\nkind = "laptop"\nstate = "{tmp_path}/state"\n')
    with_a_run(tmp_path / "state" / "store", ended=None)
    monkeypatch.setenv("PROMETHEUS_URL", prometheus)
    assert reprise("gpu", "--place", str(place), "--json") == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert (run["run"], run["use"], run["alert"]) == ("digits-7", 20.0, True)
    assert run["reason"].startswith("data loading: 80%")


def test_gpu_of_a_cluster_reads_the_state_volume(
    project: Path, tmp_path: Path, prometheus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, state = tmp_path / "cluster.toml", tmp_path / "state"
    place.write_text(f'[place]\nkind = "cluster"\n[images]\nstep = "s"\ntrain = "t"\n[state]\nmount = "{state}"\n')
    with_a_run(state / "store", ended=time.time() - 86400)
    assert reprise("gpu", "--place", str(place), "--prometheus", prometheus) == 0
    assert "no run had a GPU" in capsys.readouterr().out  # that run ended yesterday
    assert reprise("gpu", "--place", str(place), "--prometheus", prometheus, "--minutes", "2000") == 0
    assert "digits-7" in capsys.readouterr().out


def test_gpu_from_outside_takes_the_run_from_the_metrics(
    project: Path, prometheus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reprise("gpu", "--place", "cluster", "--prometheus", prometheus, "--json") == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert (run["run"], run["use"], run["alert"]) == ("digits-8", 20.0, True)
    assert "on the state volume" in run["reason"]


def test_gpu_tells_what_a_profile_said(
    project: Path, tmp_path: Path, prometheus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "laptop.toml"
    place.write_text(f'[place]\nkind = "laptop"\nstate = "{tmp_path}/state"\n')
    with_a_run(tmp_path / "state" / "store", ended=None)
    profile = tmp_path / "state" / "store" / "trainings" / ("a" * 40) / "output" / "profile"
    profile.mkdir(parents=True)
    (profile / "verdict.json").write_text('{"sentence": "small batch: raise batch_size"}')
    assert reprise("gpu", "--place", str(place), "--prometheus", prometheus, "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["reason"] == "its profile: small batch: raise batch_size"


def test_a_prometheus_that_is_away_is_exit_code_3(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise("gpu", "--prometheus", "http://127.0.0.1:9") == 3
    assert "does not answer" in capsys.readouterr().err


def test_looking_at_a_cluster_imports_neither_its_client_nor_prefect() -> None:
    code = (
        "import sys, flows.__main__, flows.cluster_commands, flows.render, flows.cluster_settings;"
        "print([m for m in ('kubernetes', 'prefect', 'torch', 'mlflow', 'dvc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
