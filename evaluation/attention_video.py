"""Videos in and out by PyAV, frame by frame, so that memory does not grow with their length."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np


VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")  # containers of H.264
_FORMATS = {1: "gray", 3: "rgb24"}  # by number of channels


class Video:
    """The frames of a video's first stream, upright.

    Args:
        path: A file that FFmpeg can read.
        num_channels: 1 or 3, of the frames.

    Attributes:
        rate: Frames per second, on average.
        num_frames: As the file says, 0 if it does not.

    Raises:
        ImportError: PyAV is missing.
        ValueError: a number of channels that frames do not have, no such file, or none with a video; while iterating,
            damaged frames, or none at all.
    """

    def __init__(self, path: Path, num_channels: int):
        if num_channels not in _FORMATS:
            raise ValueError(f"frames of a video have 1 or 3 channels, the model takes {num_channels}")
        self._av = import_av()
        self.path, self._format = path, _FORMATS[num_channels]
        if not path.is_file():
            raise ValueError(f"there is no video {path}")
        try:
            with self._av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{path} has no video in it")
                stream = container.streams.video[0]
                self.rate, self.num_frames = stream.average_rate or stream.guessed_rate, stream.frames
        except self._av.FFmpegError as error:
            raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames (channels, height, width) in uint8."""
        number = 0
        try:
            with self._av.open(str(self.path)) as container:
                container.streams.video[0].thread_type = "AUTO"
                for frame in container.decode(video=0):
                    pixels = frame.to_ndarray(format=self._format)
                    pixels = pixels.reshape(frame.height, frame.width, -1)
                    number += 1
                    yield np.rot90(pixels, frame.rotation // 90).transpose(2, 0, 1)
        except self._av.FFmpegError as error:
            raise ValueError(f"{self.path} cannot be decoded after {number} frames: {error.strerror}") from error
        if number == 0:
            raise ValueError(f"{self.path} has no frames")


def write_video(path: Path, frames: Iterable[np.ndarray], rate: Fraction, origin: str) -> None:
    """Writes frames, each RGB (height, width, 3) in uint8, as H.264 that every player shows (yuv420p).

    Nothing is written if there is no first frame. Sides become even, as the format wants: an odd one loses a pixel.
    The tag `comment` names the origin.
    """
    av = import_av()
    frames = iter(frames)
    first = next(frames)
    height, width = (side // 2 * 2 for side in first.shape[:2])
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = origin
        stream = container.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p")
        stream.options = {"crf": "18"}  # cells keep their edges
        container.mux(stream.encode(_frame(av, first[:height, :width])))
        for pixels in frames:
            container.mux(stream.encode(_frame(av, pixels[:height, :width])))
        container.mux(stream.encode())


def _frame(av, pixels: np.ndarray):
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def import_av():
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'dino-hf[video]'") from error
    return av
