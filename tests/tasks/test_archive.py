"""Crafted archives: each one is refused with its reason, and no bytes whatever make the validator crash."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.errors import GiveUp
from tasks import archive
from tasks.archive import HANDLER, MANIFEST, content_digest, validate_archive

WEIGHTS_HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = struct.pack("<Q", len(WEIGHTS_HEADER)) + WEIGHTS_HEADER + b"\0\0\0\0"
MODEL = {
    "modelName": "toy",
    "modelVersion": "1.ab",
    "handler": HANDLER,
    "serializedFile": "model.safetensors",
    "configFile": "model-config.yaml",
}
PLAIN: dict[str, bytes] = {
    MANIFEST: json.dumps({"runtime": "python", "model": MODEL}).encode(),
    HANDLER: b"class Handler: pass\n",
    "model-config.yaml": b'{"batchSize": 8}',
    "model.safetensors": WEIGHTS,
    "serving.json": b'{"label": "1.ab", "model": "toy", "module": "toy.py"}',
    "toy.py": b"x = 1\n",
}


def pack(
    members: dict[str, bytes],
    *,
    method: int = zipfile.ZIP_STORED,
    change: Callable[[zipfile.ZipInfo], None] = lambda info: None,
) -> bytes:
    """A zip of these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o100644 << 16
            info.compress_type = zipfile.ZIP_STORED if name.endswith(".safetensors") else method
            change(info)
            made.writestr(info, data)
    return out.getvalue()


def refused(tmp_path: Path, data: bytes, **more: str) -> str:
    """The reason for which the archive is refused; fails the test if it passes."""
    path = tmp_path / "crafted.mar"
    path.write_bytes(data)
    with pytest.raises(GiveUp) as caught:
        validate_archive(path, **more)
    return str(caught.value)


def with_manifest(**fields: object) -> bytes:
    return pack(PLAIN | {MANIFEST: json.dumps({"runtime": "python", "model": MODEL | fields}).encode()})


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_plain_archive_passes(tmp_path: Path, method: int) -> None:
    path = tmp_path / "plain.mar"
    path.write_bytes(pack(PLAIN, method=method))
    passed = validate_archive(path, expected=PLAIN, pipeline="toy", label="1.ab")
    assert set(passed.entries) == set(PLAIN) and passed.bytes == sum(map(len, PLAIN.values()))
    assert content_digest(path) == passed.content_digest


def test_an_archive_beyond_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes and offsets need wide fields; Python writes them here for anything over 100 bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    data = pack(PLAIN)
    assert b"PK\6\6" in data and b"PK\6\7" in data and data.count(b"\xff\xff\xff\xff") > 6
    path = tmp_path / "wide.mar"
    path.write_bytes(data)
    assert set(validate_archive(path, expected=PLAIN).entries) == set(PLAIN)
    record = data.index(b"PK\6\6")
    for at in (record + 4, record + 24, record + 48, data.index(b"PK\6\7") + 8):
        refused(tmp_path, data[:at] + b"\x7f" + data[at + 1 :])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../escape.py", "only flat file names"),
        ("/etc/cron.d/x", "only flat file names"),
        ("a/../../b.py", "only flat file names"),
        ("..\\windows.py", "only flat file names"),
        ("C:evil.py", "only flat file names"),
        ("sub/deep.py", "only flat file names"),
        ("MAR-INF/other.json", "only flat file names"),
        (".hidden.py", "only flat file names"),
        ("line\nbreak.py", "only flat file names"),
        ("sitecustomize.py", "could run or unpickle"),
        ("payload.pth", "could run or unpickle"),
        ("weights.pkl", "could run or unpickle"),
        ("native.so", "could run or unpickle"),
        ("MODEL.SAFETENSORS", "same name"),
    ],
)
def test_names_that_leave_the_archive_or_run_by_themselves(tmp_path: Path, name: str, why: str) -> None:
    assert why in refused(tmp_path, pack(PLAIN | {name: b"x"}))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("configFile", "../../../etc/passwd", "configFile"),
        ("configFile", "toy.py", "configFile"),
        ("handler", "/tmp/evil.py", "handler"),
        ("handler", "reprise_handler.py:other", "handler"),
        ("serializedFile", "../model.pt", "serializedFile"),
        ("requirementsFile", "requirements.txt", "requirementsFile = 'requirements.txt' is not allowed"),
        ("modelFile", "toy.py", "modelFile"),
        ("envelope", "json", "envelope"),
        ("modelName", "../toy", "modelName"),
        ("modelVersion", "1.0/../../x", "modelVersion"),
        ("modelVersion", 3, "modelVersion"),
    ],
)
def test_manifest_fields_that_leave_the_archive(tmp_path: Path, field: str, value: object, why: str) -> None:
    assert why in refused(tmp_path, with_manifest(**{field: value}))


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({MANIFEST: b"{"}, "no JSON"),
        ({MANIFEST: b"[]"}, "expected an object"),
        ({MANIFEST: b'{"runtime": "python", "runtime": "python"}'}, "a key stands twice"),
        ({MANIFEST: json.dumps({"runtime": "LSP", "model": MODEL}).encode()}, "runtime = 'LSP'"),
        ({MANIFEST: b"[" * 100_000}, "no JSON"),
        ({"model-config.yaml": b"!!python/object/apply:os.system ['id']"}, "no JSON"),
        ({"model-config.yaml": b'{"useVenv": true}'}, "useVenv = True is not allowed"),
        ({"model-config.yaml": b'{"torchrun": {"nproc-per-node": 4}}'}, "torchrun"),
        ({"model-config.yaml": b'{"batchSize": -1}'}, "batchSize = -1"),
        ({"serving.json": b'{"label": "2.ff", "model": "toy", "module": "toy.py"}'}, "the manifest says '1.ab'"),
        ({"serving.json": b'{"label": "1.ab", "model": "toy", "module": "../x.py"}'}, "is not a Python file"),
        ({"model.safetensors": b"\x80\x04\x95pickle....."}, "is not safetensors"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"[]"}, "expected an object"),
        ({"model.safetensors": WEIGHTS[:-1]}, "lies outside the file"),
        ({"more.safetensors": b"\x80\x04\x95pickle....."}, "is not safetensors"),
    ],
)
def test_members_that_are_not_what_they_should_be(tmp_path: Path, members: dict[str, bytes], why: str) -> None:
    assert why in refused(tmp_path, pack(PLAIN | members))


def test_a_symlink_in_the_archive(tmp_path: Path) -> None:
    def link(info: zipfile.ZipInfo) -> None:
        if info.filename == "toy.py":
            info.external_attr = 0o120777 << 16

    assert "is a link" in refused(tmp_path, pack(PLAIN | {"toy.py": b"/etc/passwd"}, change=link))


def test_the_archive_itself_is_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real.mar").write_bytes(pack(PLAIN))
    (tmp_path / "link.mar").symlink_to(tmp_path / "real.mar")
    with pytest.raises(GiveUp, match="not a regular file"):
        validate_archive(tmp_path / "link.mar")


def test_a_zip_bomb(tmp_path: Path) -> None:
    bomb = pack(PLAIN | {"zeros.txt": bytes(50 << 20)}, method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    assert "a zip bomb" in refused(tmp_path, bomb)


def test_a_bomb_that_understates_its_size(tmp_path: Path) -> None:
    """Both headers claim 10 bytes; a reader that believes them and unpacks all would write 50 MB."""
    data = bytearray(pack(PLAIN | {"zeros.txt": bytes(50 << 20)}, method=zipfile.ZIP_DEFLATED))
    real = struct.pack("<I", 50 << 20)
    assert data.count(real) == 2
    assert "holds more than it claims" in refused(tmp_path, bytes(data.replace(real, struct.pack("<I", 10))))


def test_too_many_entries_and_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1006 entries" in refused(tmp_path, pack(PLAIN | {f"f{n}.txt": b"" for n in range(1000)}))
    monkeypatch.setattr(archive, "MAX_BYTES", 100)
    assert "unpacks to" in refused(tmp_path, pack(PLAIN))
    monkeypatch.setattr(archive, "MAX_TEXT", 3)
    assert "beside the weights" in refused(tmp_path, pack(PLAIN))


def test_an_encrypted_member(tmp_path: Path) -> None:
    data = bytearray(pack(PLAIN))
    first, central = data.index(b"PK\3\4"), data.index(b"PK\1\2")
    data[first + 6] |= 1
    data[central + 8] |= 1
    assert "is encrypted or streamed" in refused(tmp_path, bytes(data))


def test_an_unknown_way_of_packing(tmp_path: Path) -> None:
    assert "packed by method 14" in refused(tmp_path, pack(PLAIN, method=zipfile.ZIP_LZMA))


def test_unexpected_and_missing_members(tmp_path: Path) -> None:
    path = tmp_path / "x.mar"
    path.write_bytes(pack(PLAIN | {"surprise.txt": b"x"}))
    with pytest.raises(GiveUp, match=r"unexpected or missing entries: surprise\.txt"):
        validate_archive(path, expected=PLAIN)
    for name in (MANIFEST, HANDLER, "model.safetensors", "serving.json", "model-config.yaml"):
        path.write_bytes(pack({key: value for key, value in PLAIN.items() if key != name}))
        with pytest.raises(GiveUp, match="has no"):
            validate_archive(path)


def test_another_model_or_version_than_asked_for(tmp_path: Path) -> None:
    assert "modelName = 'toy'; expected 'digits'" in refused(tmp_path, pack(PLAIN), pipeline="digits")
    assert "modelVersion = '1.ab'; expected '2.cd'" in refused(tmp_path, pack(PLAIN), label="2.cd")


def test_two_readers_two_archives(tmp_path: Path) -> None:
    """TorchServe's Java reads from the front, Python from the directory at the end: hidden members show only to one."""
    plain = pack(PLAIN)
    evil = b"import os\n"
    header = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(evil), len(evil), len(evil), len("sitecustomize.py"), 0
    )
    hidden = header + b"sitecustomize.py" + evil
    with_prefix = io.BytesIO(hidden)
    with_prefix.seek(0, os.SEEK_END)
    with zipfile.ZipFile(with_prefix, "a") as made:
        for name, data in PLAIN.items():
            made.writestr(zipfile.ZipInfo(name), data)
    assert zipfile.ZipFile(with_prefix).namelist() == list(PLAIN)  # Python does not see the hidden one
    assert "bytes hidden before" in refused(tmp_path, with_prefix.getvalue())

    central = plain.index(b"PK\1\2")
    end = bytearray(plain)
    end[-6:-2] = struct.pack("<I", central + len(hidden))
    assert "bytes hidden before its directory" in refused(
        tmp_path, bytes(end[:central]) + hidden + bytes(end[central:])
    )


def test_two_headers_of_one_member_that_differ(tmp_path: Path) -> None:
    data = bytearray(pack(PLAIN))
    at = data.index(b"toy.pyx = 1")  # in the local header
    data[at : at + 6] = b"ts.py\0"
    assert "its two headers differ" in refused(tmp_path, bytes(data))


def test_damage(tmp_path: Path) -> None:
    plain = pack(PLAIN)
    assert "are no archive" in refused(tmp_path, b"")
    assert "not a zip" in refused(tmp_path, plain[:-1])
    assert "bytes follow its end" in refused(tmp_path, plain + b"\0" * 30)
    at = plain.index(b"x = 1")
    assert "damaged" in refused(tmp_path, plain[:at] + b"y" + plain[at + 1 :])
    truncated = plain[: len(plain) // 2] + plain[-22:]
    refused(tmp_path, truncated)


def test_a_folder_or_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.mar"):
        with pytest.raises(GiveUp, match="not a regular file"):
            validate_archive(path)


STORED, DEFLATED = pack(PLAIN), pack(PLAIN, method=zipfile.ZIP_DEFLATED)


def check_any_bytes(path: Path, data: bytes) -> None:
    """Refused, or Python's reader sees exactly the checked members with the checked bytes."""
    path.write_bytes(data)
    try:
        passed = validate_archive(path)
    except GiveUp as error:
        assert str(error)
        return
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        assert tuple(opened.namelist()) == passed.entries
        assert all("/" not in name or name == MANIFEST for name in opened.namelist())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzz_changed_bytes(tmp_path: Path, data: st.DataObject) -> None:
    base = bytearray(data.draw(st.sampled_from([STORED, DEFLATED])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(base) - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "field"]))
        if kind == "set":
            base[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del base[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            base[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            base[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"PK\1\2", b"PK\3\4", b"PK\5\6"]))
    check_any_bytes(tmp_path / "fuzz.mar", bytes(base))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from([*PLAIN, "a.txt", "../b", "c/d", "A.TXT", "é.py"]), st.binary(max_size=200)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([MANIFEST, "serving.json", "model-config.yaml", "model.safetensors"]),
)
def test_fuzz_members_and_documents(tmp_path: Path, members: dict[str, bytes], document: object, place: str) -> None:
    text = json.dumps(document).encode()
    if place == "model.safetensors":
        text = struct.pack("<Q", len(text)) + text
    check_any_bytes(tmp_path / "fuzz.mar", pack(PLAIN | members | {place: text}))


@pytest.mark.long
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzz_changed_bytes_at_length(tmp_path: Path, data: st.DataObject) -> None:
    base = bytearray(data.draw(st.sampled_from([STORED, DEFLATED])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(base) - 1))
        base[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    check_any_bytes(tmp_path / "fuzz.mar", bytes(base))
