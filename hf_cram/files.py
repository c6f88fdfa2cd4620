"""Files that are whole or absent."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flush_to_disk(folder: Path) -> None:
    """Ask the system to write every file below `folder` out, so that the rename after it means they are there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(folder: Path, contents: Mapping[str, bytes]) -> None:
    """
    Write files into `folder`, created where it is absent: all under temporary names, then each renamed in one step.

    A disk that fills up leaves the earlier files as they were. Raises `OSError`.
    """
    temporary = {name: (folder / name).with_name(f".{Path(name).name}.{os.getpid()}") for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].parent.mkdir(parents=True, exist_ok=True)
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_json_atomically(path: Path, values: dict[str, Any]) -> None:
    """Replace `path` by the new content in one step."""
    write_atomically(path.parent, {path.name: json.dumps(values).encode() + b"\n"})
