"""Files that are whole or absent."""

import json
import os
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


def write_json_atomically(path: Path, values: dict[str, Any]) -> None:
    """Replace `path` by the new content in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(temporary, path)
