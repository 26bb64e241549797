from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import PreflightError, Unreachable
from deployments.kube_api import KubeApi
from deployments.kube_connect import connect
from deployments.kube_watch import Following, SharedWatch, is_gone, trimmed
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS

Json = dict[str, Any]


@pytest.fixture
def api(kube: KubeFake, tmp_path: Path) -> Iterator[KubeApi]:
    connection = connect(kubeconfig=kube.kubeconfig(tmp_path), patience=1.0)
    yield connection
    connection.close()


@pytest.fixture
def watch(api: KubeApi) -> Iterator[SharedWatch]:
    shared = SharedWatch(api, JOBS)
    yield shared
    shared.close()


def job(name: str, workload: str = "w", **more: Any) -> Json:
    labels = {"app.kubernetes.io/managed-by": "reprise", "reprise.dev/workload": workload}
    return {"metadata": {"name": name, "labels": labels, **more}, "spec": {}, "status": {}}


def names(following: Following) -> set[str]:
    return {i["metadata"]["name"] for i in following.objects() if not is_gone(i)}


def test_a_follower_sees_what_is_there_what_comes_and_what_goes(kube: KubeFake, watch: SharedWatch) -> None:
    kube.put(JOBS, job("old"))
    kube.put(JOBS, job("another's", "v"))
    event = threading.Event()
    with watch.follow("w", event) as following:
        assert names(following) == {"old"}
        kube.put(JOBS, job("new"))
        assert event.wait(3)
        kube.wait(lambda: names(following) == {"old", "new"})
        kube.change(JOBS, "old", last="word")
        kube.remove(JOBS, "old")
        kube.wait(lambda: names(following) == {"new"})
        last = next(i for i in following.objects() if is_gone(i))
        assert last["status"] == {"last": "word"}  # the last state is kept
    assert watch._followers == {}


def test_only_labelled_objects_are_asked_for(kube: KubeFake, watch: SharedWatch) -> None:
    kube.put(JOBS, {"metadata": {"name": "foreign", "labels": {}}})
    with watch.follow("w", threading.Event()):
        assert kube.count("GET", r"labelSelector=app.kubernetes.io%2Fmanaged-by%3Dreprise") >= 1
        assert watch.known == {}


def test_many_followers_cost_one_list_and_one_watch(kube: KubeFake, watch: SharedWatch) -> None:
    event = threading.Event()
    with watch.follow("a", event), watch.follow("b", event), watch.follow("c", event):
        kube.put(JOBS, job("x", "b"))
        assert event.wait(3)
    assert kube.count("GET", "/jobs") == 2


def test_a_cut_watch_goes_on_where_it_was(kube: KubeFake, watch: SharedWatch) -> None:
    with watch.follow("w", threading.Event()) as following:
        kube.put(JOBS, job("a"))
        kube.wait(lambda: names(following) == {"a"})
        kube.cut()
        kube.put(JOBS, job("b"))
        kube.wait(lambda: names(following) == {"a", "b"})
        assert kube.count("GET", "limit=500") == 1  # no new list


def test_half_an_event_is_read_again(kube: KubeFake, watch: SharedWatch) -> None:
    kube.cut_after = 1
    with watch.follow("w", threading.Event()) as following:
        for name in ("a", "b", "c"):
            kube.put(JOBS, job(name))
        kube.wait(lambda: names(following) == {"a", "b", "c"})


def test_too_old_lists_again_and_finds_what_is_gone(kube: KubeFake, watch: SharedWatch) -> None:
    kube.put(JOBS, job("a"))
    with watch.follow("w", threading.Event()) as following:
        kube.wait(lambda: kube.count("GET", "watch=1") == 1)
        kube.stop()
        kube.remove(JOBS, "a")
        kube.put(JOBS, job("b"))
        kube.oldest = kube.version  # what we know is too old by now
        kube.start()
        kube.wait(lambda: names(following) == {"b"})
        assert [i["metadata"]["name"] for i in following.objects() if is_gone(i)] == ["a"]
        assert kube.count("GET", "limit=500") == 2


def test_events_twice_or_late_change_nothing(watch: SharedWatch, kube: KubeFake) -> None:
    with watch.follow("w", threading.Event()) as following:
        first = kube.put(JOBS, job("a"))
        second = kube.change(JOBS, "a", n=2)
        kube.wait(lambda: following.objects() and following.objects()[0]["status"] == {"n": 2})
        following.put(first)
        assert following.objects()[0]["status"] == {"n": 2}
        kube.remove(JOBS, "a")
        kube.wait(lambda: names(following) == set())
        following.put(second)
        assert names(following) == set()  # a late event does not bring it back


def test_what_a_request_answered_is_seen_at_once(watch: SharedWatch, kube: KubeFake) -> None:
    with watch.follow("w", threading.Event()) as following:
        made = kube.put(JOBS, job("a"))
        following.put(made)
        assert names(following) == {"a"}


def test_long_lists_come_in_pages(kube: KubeFake, watch: SharedWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.kube_watch.PAGE", "10")
    for number in range(35):
        kube.put(JOBS, job(f"j{number}"))
    with watch.follow("w", threading.Event()) as following:
        assert len(following.objects()) == 35
    assert kube.count("GET", "limit=10") == 4


def test_a_right_that_is_missing_reaches_every_waiter(kube: KubeFake, watch: SharedWatch) -> None:
    said = 'User "u" cannot list resource "jobs" in API group "batch" in the namespace "ns"'
    kube.fail("GET", "/jobs", 403, message=said)
    with pytest.raises(PreflightError, match='"verbs": \\["list"\\]'), watch.follow("w", threading.Event()):
        pytest.fail("it was let in")
    with watch.follow("w", threading.Event()) as following:  # granted meanwhile
        assert following.objects() == []


def test_a_server_that_stays_away_is_told_after_the_patience(kube: KubeFake, watch: SharedWatch) -> None:
    event = threading.Event()
    with watch.follow("w", event) as following:
        kube.stop()
        time.sleep(0.5)
        assert following.objects() == []  # not yet
        assert event.wait(5)
        with pytest.raises(Unreachable, match="has not answered for"):
            following.objects()


def test_what_nobody_reads_is_not_kept() -> None:
    item = job("a", managedFields=[1], annotations={"reprise.dev/request": "x" * 1000, "keep": "y"})
    item["spec"] = {"template": {"spec": {}}, "suspend": True, "containers": [1], "nodeName": "n"}
    kept = trimmed(item)
    assert kept["metadata"]["annotations"] == {"keep": "y"} and "managedFields" not in kept["metadata"]
    assert kept["spec"] == {"suspend": True, "nodeName": "n"}
    assert item["spec"]["containers"] == [1]  # the caller's own is left as it was


def test_close_ends_the_thread(kube: KubeFake, api: KubeApi) -> None:
    shared = SharedWatch(api, JOBS)
    with shared.follow("w", threading.Event()):
        pass
    began = time.monotonic()
    shared.close()
    assert time.monotonic() - began < 2 and shared._thread is not None and not shared._thread.is_alive()
