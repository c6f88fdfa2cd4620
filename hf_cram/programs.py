"""How programs of the package end."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def ending_in_one_line(
    program: str,
    *errors: type[Exception],
    stopped: str = "stopped",
    tell: Callable[[Exception], str] = str,
) -> Iterator[None]:
    """
    Within the block Ctrl-C ends the process with `stopped` and status 130, one of `errors` with what `tell` says of it and
    status 1: one line on standard error each.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        sys.exit(130)
    except errors as error:
        sys.exit(f"{program}: error: {tell(error)}")
