"""Clips, whichever way they are stored."""

import io
import struct
import sys

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.processing.clips import open_clip
from datamodules.sources.encoding import npy_bytes, png_bytes


def frames(count: int = 6, edge: int = 16) -> np.ndarray:
    """Each frame grey, its level tells its number."""
    return np.stack([np.full((edge, edge), 30 * f % 256, np.uint8) for f in range(count)])


def film(pictures: np.ndarray, container: str = "mp4") -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as made:
        made.metadata["title"] = "Zoe"
        stream = made.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.repeat(picture[..., None], 3, -1), format="rgb24")
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return file.getvalue()


def test_numbered_pictures_are_sorted_by_number() -> None:
    fields = {f"frame{f}.png": png_bytes(p) for f, p in enumerate(frames(12))}
    clip = open_clip(fields)
    assert len(clip) == 12
    read = clip.read([1, 2, 10])
    assert read.shape == (3, 16, 16, 3)
    assert read[:, 0, 0, 0].tolist() == [30, 60, 300 % 256]


@pytest.mark.parametrize("colours", [False, True])
def test_an_array(colours: bool) -> None:
    values = np.repeat(frames()[..., None], 3, -1) if colours else frames()
    clip = open_clip({"frames.npy": npy_bytes(values), "patches.npy": npy_bytes(np.zeros((6, 4), np.uint8))})
    assert len(clip) == 6
    assert clip.read([0, 5]).shape == (2, 16, 16, 3)
    assert clip.read([0, 5])[:, 3, 3, 1].tolist() == [0, 150]


def test_a_video_file() -> None:
    clip = open_clip({"mp4": film(frames())})
    assert len(clip) == 6
    read = clip.read([0, 2, 5])
    assert read.shape == (3, 16, 16, 3)
    np.testing.assert_allclose(read.mean(axis=(1, 2, 3)), [0, 60, 150], atol=6)  # the codec loses a little


def test_a_film_of_a_phone_held_upright_is_turned() -> None:
    """The matrix in the track's header says: a quarter to the right, so that left becomes top."""
    lying = frames(2, 32)
    lying[:, :, :16] = 250
    as_shot = film(lying[:, :16])  # 16 rows, 32 columns

    def matrix(*corner: int) -> bytes:
        a, b, c, d = (value << 16 for value in corner)
        return struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)

    head, tail = as_shot.split(b"tkhd", 1)
    assert matrix(1, 0, 0, 1) in tail
    turned = head + b"tkhd" + tail.replace(matrix(1, 0, 0, 1), matrix(0, 1, -1, 0), 1)
    assert open_clip({"mp4": as_shot}).read([1]).shape == (1, 16, 32, 3)
    read = open_clip({"mp4": turned}).read([1])
    assert read.shape == (1, 32, 16, 3)
    assert read[0, :12].mean() > 230
    assert read[0, 20:].mean() < 60


def test_a_cut_video_file_is_refused() -> None:
    whole = film(frames(30, 64))
    with pytest.raises(DataError, match="mp4"):
        open_clip({"mp4": whole[: len(whole) // 2]}).read([29])
    with pytest.raises(DataError, match="cannot be opened"):
        open_clip({"mp4": b"#EXTM3U\nfile:///etc/passwd\n"})


def test_a_cut_file_whose_header_does_not_count_its_frames() -> None:
    moving = np.random.default_rng(0).integers(0, 256, (40, 64, 64), dtype=np.uint8)
    whole = film(moving, "matroska")
    assert len(open_clip({"mkv": whole})) == 40
    with pytest.raises(DataError, match=r"mkv ends after [\d.]+ s of 4.0 s; it is cut short"):
        open_clip({"mkv": whole[: len(whole) // 2]})


def test_a_title_that_is_not_utf8_does_not_matter() -> None:
    data = film(frames())
    assert data.count(b"Zoe") == 1
    assert len(open_clip({"mp4": data.replace(b"Zoe", b"Zo\xeb")})) == 6


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(DataError, match="avi is of an unknown codec"):
        open_clip({"avi": film(frames(), "avi").replace(b"FMP4", b"ZZZZ")})


def test_without_pyav_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"needs PyAV.*pip install 'qm-lightning\[video\]'"):
        open_clip({"mp4": b"0"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"png": b"1", "txt": b"a"}, "no clip among png, txt"),
        ({"frames.npy": npy_bytes(np.zeros((2, 4, 4), np.float32))}, "float32"),
        ({"frames.npy": npy_bytes(np.zeros((4, 4), np.uint8))}, r"\[4, 4\]"),
    ],
)
def test_what_is_no_clip(fields: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_clip(fields)


def test_frames_of_unequal_size() -> None:
    fields = {"0.png": png_bytes(frames()[0]), "1.png": png_bytes(frames(edge=8)[0])}
    with pytest.raises(DataError, match="differ in size"):
        open_clip(fields).read([0, 1])
