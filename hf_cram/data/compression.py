"""Compressed files as streams of bytes; one that is cut short is an error."""

import gzip
import io
from pathlib import Path
from typing import IO, Any

import zstandard

INPUT_BYTES = 1 << 10  # 32 MB decompressed, at most


def decompressed(raw: IO[bytes], file: Path) -> IO[bytes]:
    """The content of an open file, decompressed where its name ends in .gz or .zst."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    return io.BufferedReader(_ZstdFile(raw)) if suffix == ".zst" else raw


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_has_begun = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._stream.read(INPUT_BYTES)
            if not self._input:
                if self._frame_has_begun:
                    raise EOFError("the compressed file ends early")
                return 0
            self._output = memoryview(self._frame.decompress(self._input))
            self._input, self._frame_has_begun = b"", True
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._frame_has_begun = False
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
