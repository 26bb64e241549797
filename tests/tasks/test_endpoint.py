"""The endpoint's record: what a commit changes, and that a begun transaction changes nothing that serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import GiveUp, TryAgain
from tasks import endpoint
from tasks.endpoint import EndpointRecord, Version


@pytest.fixture
def record(tmp_path: Path) -> EndpointRecord:
    return EndpointRecord(folder=str(tmp_path / "endpoints"), pipeline="digits")


def version(number: int, label: str = "") -> Version:
    label = label or f"{number}.aa"
    return Version(version=str(number), label=label, mar=f"/m/{label}.mar", sha256="0" * 64, golden="/g")


def commit(record: EndpointRecord, target: Version) -> None:
    record.begin("deploy", target, None)
    record.commit(target)
    record.close("in service")


def test_an_empty_record(record: EndpointRecord) -> None:
    assert record.serving() is None and record.previous() is None
    assert record.read()["transaction"] is None
    with pytest.raises(GiveUp, match="never in service; known: none"):
        record.find("1")


def test_only_the_commit_changes_what_serves(record: EndpointRecord) -> None:
    commit(record, version(1))
    record.begin("deploy", version(2), "1")
    for phase in ("registering", "switching", "aliasing"):
        record.phase(phase)
        assert record.serving() == version(1) and record.previous() is None
    record.phase("undoing", why="it was bad")
    assert record.read()["transaction"]["reached"] == "aliasing"
    record.close("rolled back", "it was bad")
    assert record.read()["history"][-1]["why"] == "it was bad" and record.serving() == version(1)
    commit(record, version(2))
    assert record.serving() == version(2) and record.previous() == version(1)


def test_the_same_label_again_keeps_the_one_before(record: EndpointRecord) -> None:
    for number in (1, 2, 2):
        commit(record, version(number))
    assert record.previous() == version(1)


def test_find_by_label_or_newest_of_a_version(record: EndpointRecord) -> None:
    for target in (version(1), version(2, "2.aa"), version(2, "2.bb")):
        commit(record, target)
    assert record.find("1").label == "1.aa"
    assert record.find("2").label == "2.bb" and record.find("2.aa").label == "2.aa"


def test_what_the_alias_was_survives_a_second_begin(record: EndpointRecord) -> None:
    """After a kill the alias may be moved already; that is not what it was."""
    record.begin("deploy", version(1), "7")
    record.begin("deploy", version(1), "1")
    assert record.read()["transaction"]["alias_before"] == "7"
    record.begin("deploy", version(2), "1")
    assert record.read()["transaction"]["alias_before"] == "1"


def test_golden_answers_are_kept(record: EndpointRecord, tmp_path: Path) -> None:
    source = tmp_path / "heldout.jsonl"
    assert record.keep_golden("1.aa", str(source)) == str(source)  # neither exists: the error will name this one
    source.write_text("one")
    kept = record.keep_golden("1.aa", f"file://{source}")
    source.unlink()
    assert Path(kept).read_text() == "one" and record.keep_golden("1.aa", str(source)) == kept
    assert record.keep_golden("1.aa", kept) == kept
    assert record.store.names("endpoints") == []


def test_history_is_bounded(record: EndpointRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "HISTORY", 3)
    for number in range(5):
        commit(record, version(number))
    assert [row["label"] for row in record.read()["history"]] == ["2.aa", "3.aa", "4.aa"]
    record.close("twice")  # nothing under way: nothing happens
    assert len(record.read()["history"]) == 3


def test_the_lock_is_one_per_endpoint(record: EndpointRecord, tmp_path: Path) -> None:
    other = EndpointRecord(folder=record.folder, pipeline="tabular")
    with record.lock(0.0), other.lock(0.0), pytest.raises(TryAgain, match="endpoint-digits"), record.lock(0.0):
        pytest.fail("two held the lock")
