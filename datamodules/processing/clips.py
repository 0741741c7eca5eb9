"""Frames of a stored clip, whichever way it is stored: pictures, one array, or a video file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.shards.decode import Limits, decode_field

if TYPE_CHECKING:
    import av

PICTURES = ("png", "jpg", "jpeg")
ARRAYS = ("frames.npy", "npy")
# The container is fixed by the name: a file must not pass for a playlist that names other files.
CONTAINERS = {"mp4": "mp4", "mov": "mov", "webm": "matroska", "mkv": "matroska", "avi": "avi"}
MICROSECONDS = 1_000_000  # FFmpeg's unit of a file's duration
CUT_SHARE = 0.1  # of a file's duration, missing at its end: more is no rounding of the header
MISSING_PYAV = (
    "reading {name} needs PyAV, which is not installed; install it with `pip install 'qm-lightning[video]'`, or "
    "prepare the clips as frames (000.png, 001.png, ... or frames.npy)"
)


class Clip(Protocol):
    """A clip of which single frames can be read."""

    def __len__(self) -> int: ...

    def read(self, frames: Sequence[int]) -> NDArray[np.uint8]:
        """Chosen frames in ascending order, uint8 [F,h,w,3]."""
        ...


def open_clip(fields: dict[str, bytes]) -> Clip:
    """Find the clip among a sample's members.

    Args:
        fields: numbered pictures (`000.png`, `frame-1.jpg`, ...), `frames.npy` (uint8 [F,h,w] or [F,h,w,3]), or a
            video file.

    Raises:
        DataError: there is none, or it cannot be opened.
    """
    numbered = sorted((_number(name), name) for name in fields if _number(name) >= 0)
    if numbered:
        return PictureClip([(name, fields[name]) for _, name in numbered])
    for name in ARRAYS:
        if name in fields:
            return ArrayClip(decode_field(name, fields[name]))
    for name in fields:
        if name.rsplit(".", 1)[-1] in CONTAINERS:
            return VideoFile(name, fields[name])
    raise DataError(
        f"the sample has no clip among {', '.join(sorted(fields))}; expected frames as 000.png, 001.png, ..., "
        f"frames.npy, or a video file ({', '.join(CONTAINERS)})"
    )


def _number(name: str) -> int:
    """The frame number in a picture's name, -1 if there is none."""
    stem, _, extension = name.rpartition(".")
    digits = stem[len(stem.rstrip("0123456789")) :]
    return int(digits) if extension in PICTURES and digits else -1


class PictureClip:
    """Frames stored as pictures; only those asked for are decoded.

    Args:
        pictures: (name, contents) in order.
    """

    def __init__(self, pictures: list[tuple[str, bytes]]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, frames: Sequence[int]) -> NDArray[np.uint8]:
        """Chosen frames, uint8 [F,h,w,3].

        Raises:
            DataError: one is damaged, or they differ in size.
        """
        decoded = [decode_field(*self._pictures[f]) for f in frames]
        if len(shapes := {d.shape[:2] for d in decoded}) > 1:
            raise DataError(f"the frames differ in size ({sorted(shapes)}), expected one size in a clip")
        return np.stack(decoded)


class ArrayClip:
    """Frames stored as one array.

    Args:
        values: uint8 [F,h,w] or [F,h,w,3].

    Raises:
        DataError: it is of another shape or type.
    """

    def __init__(self, values: NDArray[np.uint8]) -> None:
        shaped = values.ndim == 3 or (values.ndim == 4 and values.shape[-1] == 3)
        if values.dtype != np.uint8 or not shaped or 0 in values.shape[1:]:
            raise DataError(
                f"the clip is {values.dtype} of shape {list(values.shape)}, expected uint8 [F,h,w] or [F,h,w,3] with "
                "at least one pixel"
            )
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, frames: Sequence[int]) -> NDArray[np.uint8]:
        """Chosen frames, uint8 [F,h,w,3]."""
        chosen: NDArray[np.uint8] = self._values[list(frames)]
        return chosen if chosen.ndim == 4 else np.repeat(chosen[..., None], 3, axis=-1)


def _upright(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """The frame as a player shows it: phones film lying down, and note by how many degrees to turn it to the left."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


class VideoFile:
    """Frames of an MP4 or the like, decoded by PyAV up to the last one asked for.

    Args:
        name: field name, whose extension is the container.
        data: the file's contents.
        limits: most pixels of a whole clip.

    Raises:
        DataError: PyAV is missing, or the file holds no readable video, or ends before its header says.
    """

    def __init__(self, name: str, data: bytes, limits: Limits | None = None) -> None:
        self._name, self._data, self._limits = name, data, limits or Limits()
        with self._open() as container:
            stream = self._stream(container)
            # Matroska does not say how many frames it holds; counting packets decodes nothing.
            self._frames = stream.frames or self._count(container, stream)

    def __len__(self) -> int:
        return int(self._frames)

    def read(self, frames: Sequence[int]) -> NDArray[np.uint8]:
        """Chosen frames, uint8 [F,h,w,3].

        Raises:
            DataError: the file is damaged, or ends before a chosen frame.
        """
        import av

        wanted, last = set(frames), max(frames)
        found: dict[int, NDArray[np.uint8]] = {}
        try:
            with self._open() as container:
                for i, frame in enumerate(container.decode(self._stream(container))):
                    if i in wanted:
                        found[i] = _upright(frame)
                    if i >= last:
                        break
        except av.error.FFmpegError as error:
            raise DataError(f"{self._name} is damaged ({error}); {len(self._data)} bytes") from None
        if missing := wanted - found.keys():
            raise DataError(f"{self._name} ends before frame {min(missing)} of {len(self)}; it is cut short")
        return np.stack([found[f] for f in frames])

    def _count(self, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
        """Packets of the track, with the end of all tracks against the duration in the header."""
        packets, end = 0, 0.0
        for packet in container.demux():
            if packet.size:
                packets += packet.stream.index == stream.index
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        promised = (container.duration or 0) / MICROSECONDS  # recorders that stream leave it out
        if end < promised * (1 - CUT_SHARE):
            raise DataError(
                f"{self._name} ends after {end:.1f} s of {promised:.1f} s; it is cut short; fetch or write it again"
            )
        return packets

    def _open(self) -> av.container.InputContainer:
        try:
            import av
        except ModuleNotFoundError:
            raise DataError(MISSING_PYAV.format(name=self._name)) from None
        try:
            kind = CONTAINERS[self._name.rsplit(".", 1)[-1]]
            # Titles and the like are in any encoding, and nobody reads them here.
            return av.open(io.BytesIO(self._data), format=kind, metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise DataError(
                f"{self._name} cannot be opened ({error}); {len(self._data)} bytes, expected a video file"
            ) from None

    def _stream(self, container: av.container.InputContainer) -> av.video.stream.VideoStream:
        if not container.streams.video:
            raise DataError(f"{self._name} holds no video track, expected one")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(
                f"{self._name} is of an unknown codec; {len(self._data)} bytes, it may be damaged"
            )
        if (pixels := stream.width * stream.height) > self._limits.pixels:
            raise DataError(
                f"{self._name} has {pixels} pixels a frame, allowed are {self._limits.pixels}; make it smaller"
            )
        return stream
