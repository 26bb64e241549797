"""The copy that staging makes is exact, waits for its memory, and has the layout of a safetensors file."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load

import training.shard_file
import training.staging
from training.shard_file import CHUNK, PAD, Layout, Piece, lay_out, read_header, tensor_in
from training.staging import BLOCK, HostStaging, OtherShape, Sources


@pytest.fixture(autouse=True, params=[1, 1000], ids=["followed", "after"])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The writer follows the copy where processors are to spare, and comes after it where they are not."""
    monkeypatch.setattr(training.shard_file, "MANY_PROCESSORS", request.param)
    return int(request.param)


def layout_of(tensors: dict[str, torch.Tensor]) -> tuple[Layout, Sources]:
    layout = lay_out((k, t.dtype, tuple(t.shape), (0,) * t.dim(), tuple(t.shape), False) for k, t in tensors.items())
    return layout, [(piece, tensors[piece.key]) for piece in layout.pieces]


TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "wide": torch.arange(5, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
    "large": torch.randn(3 * BLOCK // 4 + 5),
    "int": torch.arange(3, dtype=torch.int16),
}


def test_every_kind_of_tensor_arrives_exactly() -> None:
    layout, sources = layout_of(TENSORS)
    staging = HostStaging(layout)
    snapshot = staging.start(sources, int)
    snapshot.wait()
    raw = layout.header({"note": [1]}) + b"".join(snapshot.chunks())
    snapshot.release()
    staging.close()
    found = load(raw)
    for key, tensor in TENSORS.items():
        assert found.pop(key).equal(tensor), key
    assert all(key.startswith(PAD) for key in found)
    header = read_header(raw)
    assert header.metadata == {"note": [1]}
    buffer = bytearray(raw)
    for piece in header.pieces:
        assert tensor_in(buffer, header, piece).equal(TENSORS[piece.key])


def test_a_part_of_a_tensor_says_where_it_belongs() -> None:
    layout = lay_out([("w", torch.float32, (2, 3), (4, 0), (8, 3), False)])
    assert layout.pieces[0].entry == "w@4,0"
    (piece,) = read_header(layout.header({})).pieces
    assert (piece.key, piece.offsets, piece.whole, piece.shape) == ("w", (4, 0), (8, 3), (2, 3))


def test_the_next_copy_waits_until_the_memory_is_free() -> None:
    layout, sources = layout_of({"a": torch.zeros(10)})
    staging = HostStaging(layout)
    first = staging.start(sources, int)
    first.wait()
    second = staging.start([(layout.pieces[0], torch.ones(10))], int)
    waiting = threading.Thread(target=second.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    assert set(b"".join(first.chunks())) == {0}
    first.release()
    waiting.join(5)
    assert not waiting.is_alive() and set(b"".join(second.chunks())) == {0, 0x3F, 0x80}
    second.release()
    staging.close()


def test_what_goes_wrong_in_the_copy_is_raised_to_whoever_waits() -> None:
    layout, _ = layout_of({"a": torch.zeros(10)})
    staging = HostStaging(layout)
    for other in (torch.zeros(20)[::4], torch.zeros(10, dtype=torch.int32), torch.zeros(10, device="meta")):
        snapshot = staging.start([(layout.pieces[0], other)], int)
        with pytest.raises(OtherShape, match=r"^a: "):
            snapshot.wait()
        with pytest.raises(OtherShape):
            list(snapshot.chunks())
        snapshot.release()
    staging.close()


def test_a_type_that_the_format_lacks_is_named() -> None:
    with pytest.raises(TypeError, match=r"w: tensors of torch.complex128"):
        lay_out([("w", torch.complex128, (2,), (0,), (2,), False)])


def test_groups_start_aligned_and_device_tensors_come_first() -> None:
    part = [
        ("odd", torch.float32, (1,), (0,), (1,), True),
        ("host", torch.float32, (4,), (0,), (4,), False),
        ("even", torch.float32, (16,), (0,), (16,), True),
        ("double", torch.float64, (3,), (0,), (3,), True),
    ]
    layout = lay_out(part)
    starts = {piece.key: piece.start for piece in layout.pieces}
    assert starts == {"double": 0, "even": 64, "odd": 128, "host": 192}
    assert layout.device_bytes == 132 and layout.nbytes == 208
    assert isinstance(layout.pieces[0], Piece) and layout.pads == ((24, 40), (132, 60))


def test_the_writer_follows_the_copy_block_by_block(processors: int) -> None:
    """A strided tensor at the end, which is copied last, holds still until the first chunk has been taken."""
    tensors = {"a": torch.arange(CHUNK // 4, dtype=torch.float32), "b": torch.arange(float(CHUNK // 4)).view(2, -1).t()}
    layout, sources = layout_of(tensors)
    staging = HostStaging(layout)
    told, go_on = threading.Event(), threading.Event()
    copy_strided = training.staging._copy_strided

    def held(*arguments: object) -> None:
        assert go_on.wait(10)
        copy_strided(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.staging, "_copy_strided", held)
        snapshot = staging.start(sources, told.set)
        assert told.wait(0.5) == (processors == 1)
        if processors == 1:
            assert len(next(snapshot.chunks())) == CHUNK
        go_on.set()
        snapshot.wait()
    assert told.wait(5)
    raw = layout.header({}) + b"".join(snapshot.chunks())
    snapshot.release()
    staging.close()
    assert all(tensor.equal(tensors[key]) for key, tensor in load(raw).items())
