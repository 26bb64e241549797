"""The worker as a service of the laptop: started only for a registered pipeline, with nothing of a server's marks."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import TryAgain
from flows import serve
from flows.place_settings import load_place
from flows.prefect_api import Prefect


def test_without_a_server_or_a_deployment_there_is_nothing_to_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, file = load_place("laptop", tmp_path), tmp_path / "pipeline.toml"
    monkeypatch.setattr("deployments.services.start_all", None)
    assert serve.ensure_worker(file, "digits", place, Prefect(url="http://127.0.0.1:1")) is False
    monkeypatch.setattr(Prefect, "deployment", lambda self, name: None)
    assert serve.ensure_worker(file, "digits", place, Prefect(url="http://x")) is False


def test_how_it_is_started(tmp_path: Path) -> None:
    place = load_place("laptop", tmp_path)
    service = serve.worker_service(tmp_path / "pipeline.toml", place)
    argv, _, cwd = service.command()
    assert list(argv)[1:5] == ["-P", "-m", "flows", "serve"] and cwd == tmp_path
    assert service.folder == place.state.resolve() / "services" / "worker" and service.ports == {}


def test_a_loop_survives_what_goes_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bad looks with the same reason are told once; then it looks again."""
    from types import SimpleNamespace

    class Away:
        looks = 0

        def deployment(self, name: str) -> None:
            Away.looks += 1
            raise TryAgain("Prefect is away")

    stops = iter([False, False, False, True])
    target = SimpleNamespace(prefect=Away(), name="digits")
    serve._look_after(target, SimpleNamespace(state=Path("/nowhere")), lambda seconds: next(stops))  # type: ignore[arg-type]
    assert Away.looks == 3
    assert capsys.readouterr().out.count("Prefect is away") == 1
