"""The same questions on a laptop: answered in this process, from its own store and the services of its ports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.__main__ import main
from tasks import audit_endpoint as audit_module
from tasks.audit_endpoint import Audit, AuditRequest, Finding
from tests.flows.pushed_project_kit import MODULE
from tests.flows.test_plan import Folder
from tests.tasks.test_lineage import TRAIN_KEY, registry, store

__all__ = ["registry", "store"]


@pytest.fixture
def folder(tmp_path: Path, registry: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose MLflow is the fake of test_lineage."""
    path = tmp_path / "digits"
    path.mkdir()
    made = Folder(path)
    made.write("digits.py", MODULE)
    port = registry[0].rpartition(":")[2]
    made.write("laptop.toml", f'[place]\nkind = "laptop"\n[ports]\nmlflow = {port}\n')
    made.commit()
    monkeypatch.chdir(path)
    return path


def reprise(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = 0
    try:
        main([*arguments, "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr().out
    return code, json.loads(out) if out else None


def test_a_plan_needs_no_service(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = reprise(capsys, "plan")
    assert (code, plan["pipeline"], plan["data_files"], plan["unchanged"]) == (0, "digits", 2, False)
    (folder / "pipeline.toml").write_text("broken")
    assert reprise(capsys, "plan") == (0, plan), "it is of the commit, whatever stands in the folder"


def test_lineage_with_the_laptop_s_own_store(
    folder: Path, registry: tuple[str, Any], store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = folder / ".reprise" / "store"
    ours.parent.mkdir()
    store.path.rename(ours)
    code, found = reprise(capsys, "trace")
    assert (code, found["version"], found["in_service"]) == (0, "3", True)
    assert [a["cause"] for a in found["attempts"]] == ["spot", "spot", "complete"]
    assert found["keys"]["train_model"] == TRAIN_KEY
    assert found["model_url"] == f"{registry[0]}/#/models/digits/versions/3"
    assert reprise(capsys, "who-uses", "d41d8c")[1][0]["version"] == "3"
    assert reprise(capsys, "trace", "9") == (1, None)
    assert reprise(capsys, "who-uses", "abc") == (2, None)


def test_an_audit_of_its_torchserve(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[AuditRequest] = []
    finding = Finding(what="alias champion", found="2", expected="3")

    def audit(request: AuditRequest) -> Audit:
        asked.append(request)
        return Audit(
            pipeline=request.pipeline, version="3", label="3.a", sha256="e", findings=[finding],
            repaired=request.repair, clean=request.repair,
        )  # fmt: skip

    monkeypatch.setattr(audit_module, "audit_endpoint", audit)
    assert reprise(capsys, "audit")[0] == 1
    code, found = reprise(capsys, "audit", "--repair")
    assert (code, found["repaired"], found["findings"]) == (0, True, [vars(finding)])
    assert [(r.repair, r.cluster, r.pipeline) for r in asked] == [(False, None, "digits"), (True, None, "digits")]
    assert asked[0].management_url.endswith(":18081") and asked[0].inference_url.endswith(":18080")
    assert asked[0].record == str(folder / ".reprise" / "store" / "endpoints")
