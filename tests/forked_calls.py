"""Calls in processes of their own that share one start: the imports are paid once, each call is a fork of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import REPOSITORY

IMPORTS = "import atexit, gc, json, os, runpy, signal, sys, time, types\n"
# `run(job)` of the program answers a job and returns an exit status; what it writes goes to the job's log.
LOOP = """
gc.collect()
gc.freeze()  # what is there is not looked through again, in each fork
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.alarm(600)  # ends it, whatever it waits for
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            status = run(job)
        except SystemExit as end:  # as the interpreter takes it
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print("pid", pid, flush=True)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
atexit._run_exitfuncs()
os._exit(0)
"""


def logged_in_environment(url: str, token: str, home: Path) -> dict[str, str]:
    """A machine that is logged in at the Hub `url`, with this checkout in its path."""
    paths = [path for path in sys.path if path not in ("", str(REPOSITORY))]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))},
        "HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *paths]),
    }  # fmt: skip


@contextmanager
def forked_calls(program: str, environment: dict[str, str], folder: Path) -> Iterator[Callable[..., tuple[int, Path]]]:
    """
    A function that runs a job, its keywords, in a fork of `program`: (exit status, log in `folder`). `on_start`, if
    given, is called with the fork's process id while it runs.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS + program + LOOP],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"

    def call(on_start: Callable[[int], None] = lambda _: None, **job: object) -> tuple[int, Path]:
        log = folder / f"{len(list(folder.glob('*.log')))}.log"
        process.stdin.write(json.dumps({**job, "log": str(log)}) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline().split()[1])
        try:
            on_start(pid)
        finally:
            status = int(process.stdout.readline().split()[1])
        return status, log

    yield call
    process.stdin.close()
    process.wait()
    process.stdout.close()
