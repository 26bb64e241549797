"""The overlays: everything listed is there, every reference, patch and setting hits something, and it builds.

What needs kubectl (building the overlays) is skipped where it is not installed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.deployments.k8s_kit import (
    K8S,
    OVERLAYS,
    build,
    containers,
    kustomization_folders,
    needs_kubectl,
    pods,
    raw,
)
from tests.deployments.kustomize_tree import (
    Part,
    folders,
    kustomization,
    missing,
    selected,
    used_settings,
    value_at,
)


@pytest.mark.parametrize("folder", kustomization_folders(), ids=lambda p: str(p.relative_to(K8S)))
def test_everything_listed_is_there_and_everything_there_is_listed(folder: Path) -> None:
    document = kustomization(folder)
    listed = {n for n in document.get("resources", []) if not n.startswith("github.com/")}
    components = set(document.get("components", []))
    generated = {e.rpartition("=")[2] for g in document.get("configMapGenerator", []) for e in g["files"]}
    patches = {p["path"] for p in document.get("patches", []) if "path" in p}
    for name in listed | components | generated | patches:
        assert (folder / name).exists(), f"{folder.name}: {name} is listed and not there"
    for name in components:
        assert kustomization((folder / name).resolve())["kind"] == "Component", name
    values = {"gpu-operator-values.yaml", "nvidia-device-plugin-values.yaml", "rules.test.yaml", "dashboard.png"}
    there = {p.name for p in folder.iterdir() if p.is_file()} - {"kustomization.yaml", "README.md"} - values
    assert there == {Path(n).name for n in listed | generated | patches if (folder / n).is_file() and "/" not in n}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_patches_and_replacements_hit_something(overlay: str) -> None:
    assert list(missing(K8S / "overlays" / overlay)) == []


def test_a_replacement_in_vain_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {size: 1Gi}\n"
    )
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "kind": "Kustomization",
                "resources": ["settings.yaml"],
                "patches": [{"target": {"kind": "Deployment"}, "patch": "[]"}],
                "replacements": [
                    {
                        "source": {"kind": "ConfigMap", "name": "settings", "fieldPath": "data.sise"},
                        "targets": [{"select": {"kind": "ConfigMap"}, "fieldPaths": ["data.[a=b].c", "data.size"]}],
                    }
                ],
            }
        )
    )
    told = "\n".join(missing(tmp_path))
    assert "a patch hits nothing: {'kind': 'Deployment'}" in told
    assert "data.sise: no sise" in told
    assert "no a=b" in told
    assert "data.size:" not in told


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_setting_is_dead_and_none_is_missing(overlay: str) -> None:
    folder = K8S / "overlays" / overlay
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["metadata"]["annotations"] == {"config.kubernetes.io/local-config": "true"}
    assert all(isinstance(value, str) for value in settings["data"].values()), "a ConfigMap takes strings only"
    used = used_settings(folder)
    assert used <= set(settings["data"])
    spare = set(settings["data"]) - used - {"model"}  # what the queries next to it name
    switched_on = {f.name for f in folders(folder)}
    off = {p.name for p in (K8S / "components").iterdir()} - switched_on
    of_components_that_are_off = {
        r["source"]["fieldPath"].removeprefix("data.")
        for name in off
        for r in kustomization(K8S / "components" / name).get("replacements", [])
    }
    assert spare <= of_components_that_are_off


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_builds(overlay: str) -> None:
    objects = build(overlay)
    ids = Counter(
        (o["apiVersion"], o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in objects
    )
    assert [i for i, n in ids.items() if n > 1] == []
    assert len(objects) == len(raw(overlay)) - 1, "all but the settings"
    assert not [o for o in objects if o["metadata"]["name"] == "settings"]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_setting_arrives(overlay: str) -> None:
    folder = K8S / "overlays" / overlay
    data = yaml.safe_load((folder / "settings.yaml").read_text())["data"]
    built = [Part(path=folder, body=item) for item in build(overlay)]
    for one in folders(folder):
        for replacement in kustomization(one).get("replacements", []):
            wanted = data[replacement["source"]["fieldPath"].removeprefix("data.")]
            for target in replacement["targets"]:
                for part in selected(built, target["select"]):
                    for field in target["fieldPaths"]:
                        assert str(value_at(part.body, field)) == wanted, f"{part.body['metadata']['name']} {field}"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_those_of_the_settings(overlay: str) -> None:
    settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
    images = {value for key, value in settings.items() if key.startswith("image")}
    for name, spec in pods(build(overlay)):
        for container in containers(spec):
            assert container["image"] in images, name
