"""What the audit finds and repairs where a rolling update serves: alias, Deployment, Service, an unfinished update."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import GiveUp
from tasks.deploy_model import deploy_model
from tests.tasks.killed_deployment_kit import killed_after
from tests.tasks.rolling_bench_kit import Bench
from tests.tasks.rolling_kit import DEPLOYMENTS, NAME


def test_the_audit_finds_what_is_not_as_the_record_says_and_repairs_it(bench: Bench) -> None:
    assert bench.audit().clean
    deploy_model(bench.requests["1"])
    deploy_model(bench.requests["2"])
    found = bench.audit()
    assert found.clean and (found.version, found.label) == ("2", bench.label("2"))

    def what() -> list[str]:
        return [finding.what for finding in bench.audit().findings]

    bench.aliases.aliases["toy", "champion"] = "1"
    assert what() == ["alias champion"]
    bench.change_image("by-hand:1")
    assert what() == ["alias champion", "Deployment serve-toy differs in"]
    found = bench.audit(repair=True)
    assert found.repaired and found.clean and bench.truth() == ("2", "2", [bench.label("2")])
    bench.pods.kube.remove(DEPLOYMENTS, NAME)
    bench.pods.kube.wait(lambda: not bench.pods.ready)
    assert what() == ["Deployment serve-toy"]
    assert bench.audit(repair=True).clean and bench.truth() == ("2", "2", [bench.label("2")])
    killed_after(bench.requests["1"], 6)
    assert "unfinished transaction" in what()
    assert bench.audit(repair=True).clean and bench.truth() == ("2", "2", [bench.label("2")])
    bench.pods.digests[bench.label("2")] = "f" * 64
    with pytest.raises(GiveUp, match="loaded other files"):
        bench.audit(repair=True)


def test_what_serves_without_a_record_is_left_over(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    (Path(bench.record.folder) / "toy.json").unlink()
    assert [f.what for f in bench.audit().findings] == ["alias champion", "Deployment serve-toy"]
