"""Hours, memory and disk of a large text, from the measured rate of one core."""

import re
from dataclasses import dataclass, field, replace

from .errors import DataError
from .mixing import CHARACTERS_PER_TOKEN

UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
TOKEN_BYTES = 2  # of vocabularies up to 65536
# Measured: a task, packing (of each document), ordering (of each row).
TASK_MEMORY_BYTES = 0.4e9
PACK_BYTES_OF_DOCUMENT = 73
ORDER_BYTES_OF_ROW = 28
# Rows are read to count tokens and to score, and read and written to deal them into parts and to place them there.
ORDER_PASSES = 6


@dataclass
class EstimateArguments:
    """What a large text takes, before it is begun."""

    estimate: str | None = field(
        default=None, metadata={"help": "Only print what a text of so many bytes (800GB, 5TB) takes."}
    )
    nodes: int = field(default=1, metadata={"help": "Machines, for the estimate."})
    cores: int = field(default=32, metadata={"help": "Cores of each machine, for the estimate."})
    rate: float = field(default=10.0, metadata={"help": "MB/s that one core filters and tokenizes, for the estimate."})
    disk_rate: float = field(
        default=500.0, metadata={"help": "MB/s at which one process reads and writes files, for the estimate."}
    )
    document_bytes: float = field(default=2200.0, metadata={"help": "Mean document, for the estimate; C4's is 2200."})

    def __post_init__(self) -> None:
        for name in ("nodes", "cores", "rate", "disk_rate", "document_bytes"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.estimate is not None:
            parse_size(self.estimate)


@dataclass(frozen=True)
class Estimate:
    """
    Hours of the tasks side by side, of one process before and after them, and of ordering rows where that is wanted;
    bytes of memory, and of the shared disk beside the text.
    """

    parallel_hours: float
    alone_hours: float
    order_hours: float
    node_memory: float
    rows_memory: float
    disk: float


def parse_size(text: str) -> float:
    """Bytes of `800GB` or `5.4 TB`. Raises [`DataError`]."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB)", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise DataError(f"a size is written 800GB or 5.4TB, got {text!r}")
    return float(match[1]) * UNITS[match[2].upper()]


def estimate(num_bytes: float, arguments: EstimateArguments, row_tokens: int) -> Estimate:
    """
    What `num_bytes` of text take. Nothing is taken off for filters, which only make it less.

    Side by side: filtering and tokenizing. One process: it reads the text once to know its content, and reads the
    tokens and writes the rows. Ordering reads the rows four times and writes them twice, in sequence. The disk holds
    tokens, rows, and the rows once more while they are ordered.
    """
    a = arguments
    token_bytes = num_bytes / CHARACTERS_PER_TOKEN * TOKEN_BYTES
    rows = token_bytes / TOKEN_BYTES / row_tokens
    return Estimate(
        parallel_hours=num_bytes / (a.nodes * a.cores * a.rate * 1e6) / 3600,
        alone_hours=(num_bytes + 2 * token_bytes) / (a.disk_rate * 1e6) / 3600,
        order_hours=ORDER_PASSES * token_bytes / (a.disk_rate * 1e6) / 3600,
        node_memory=a.cores * TASK_MEMORY_BYTES,
        rows_memory=max(PACK_BYTES_OF_DOCUMENT * num_bytes / a.document_bytes, ORDER_BYTES_OF_ROW * rows),
        disk=3 * token_bytes,
    )


def format_estimates(arguments: EstimateArguments, row_tokens: int) -> str:
    """A table for one machine and for `nodes` of them."""
    num_bytes = parse_size(str(arguments.estimate))
    cells = [["nodes", "hours side by side", "hours alone", "hours to order", "memory a node", "for rows", "disk"]]
    for nodes in sorted({1, arguments.nodes}):
        result = estimate(num_bytes, replace(arguments, nodes=nodes), row_tokens)
        hours = (result.parallel_hours, result.alone_hours, result.order_hours)
        sizes = (result.node_memory, result.rows_memory, result.disk)
        cells.append(
            [str(nodes), *(f"{value:,.2f}" for value in hours), *(f"{value / 1e9:,.0f} GB" for value in sizes)]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
    head = (
        f"{num_bytes / 1e9:,.0f} GB of text in rows of {row_tokens} tokens; nodes of {arguments.cores} cores at "
        f"{arguments.rate:g} MB/s"
    )
    return "\n".join([head, *lines])
