"""Talking to the Hub: what went wrong in one line, tried again where that can help."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from httpx2 import InvalidURL
from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

Result = TypeVar("Result")

# Waits between attempts; the client's own quick retries come on top.
RETRY_SECONDS = (5.0, 20.0, 60.0)
LONGEST_RETRY_AFTER_SECONDS = 300.0
# Without it the client waits for ever for a server that has gone silent.
SILENCE_SECONDS = 120.0


class HubError(RuntimeError):
    """
    An exchange with the Hub that failed: the message names the cause, and where there is one the way out, in one line.

    `is_final` says that trying again is of no use; `retry_after_seconds` is what the server asked for.
    """

    def __init__(self, message: str, is_final: bool = True, retry_after_seconds: float = 0.0):
        super().__init__(message)
        self.is_final = is_final
        self.retry_after_seconds = retry_after_seconds


def first_line(error: BaseException) -> str:
    """What an error says, in its first line, and nothing of a token or of a proxy's password."""
    if isinstance(error, InvalidURL):
        return "the address of a proxy is not valid: look at ALL_PROXY and HTTPS_PROXY"
    if _tells_token(error):
        return "the token holds characters that cannot be sent: set HF_TOKEN anew, or run `hf auth login`"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tells_token(error: BaseException) -> bool:
    told = str(error)
    return "Illegal header" in told or "'ascii' codec can't encode" in told  # as a header has to be


def explain(
    error: BaseException, repo_id: str, revision: str | None, id_field: str, is_download: bool = False
) -> HubError:
    """
    What went wrong, in one line, from an error of the Hub's client, in a push or in a download.

    `id_field` is the field that names `repo_id`, `revision` the branch, tag or commit asked for, if any.
    """
    while not isinstance(error, HfHubHTTPError | ValueError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps what happens in its upload threads
    if not isinstance(error, HfHubHTTPError):
        return _explain_without_answer(error)
    response = error.response
    status = response.status_code
    told = " ".join((error.server_message or "").split())
    reason = f", {told}" if told else ""
    if status == 401:
        fault = "the token is not valid" if get_token() else "there is no token"
        if is_download:  # the Hub tells strangers of nothing that is closed to them
            fault = f"there is no {repo_id} that is open to all, and {fault}"
        return HubError(f"{fault} (401): set HF_TOKEN, or run `hf auth login`")
    if status == 403 and is_download:
        return HubError(
            f"the token may not read {repo_id} (403{reason}): ask for access on its page, or take one that may"
        )
    if status == 403:
        return HubError(
            f"the token may not write to {repo_id} (403{reason}): take one that may, or another {id_field}"
        )
    if status == 404:
        return HubError(f"there is no {repo_id} at {revision or 'main'} that the token can see (404)")
    if status in (408, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isdigit() else 0.0
        limit = parse_ratelimit_headers(response.headers)
        if status == 429 and limit is not None and limit.remaining == 0:
            seconds = max(seconds, float(limit.reset_in_seconds))
        seconds = min(seconds, LONGEST_RETRY_AFTER_SECONDS)
        fault = "the Hub asks for fewer requests (429)" if status == 429 else f"the Hub answers {status}"
        return HubError(fault, is_final=False, retry_after_seconds=seconds)
    refused = "download" if is_download else "push"
    return HubError(f"the Hub refuses the {refused}: {told or first_line(error)} ({status})")


def _explain_without_answer(error: BaseException) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("offline mode is on: unset HF_HUB_OFFLINE")
    if isinstance(error, OSError) and error.filename is not None:
        return HubError(f"{error.filename}: {error.strerror}")
    if isinstance(error, ImportError | InvalidURL) or _tells_token(error):
        return HubError(first_line(error))
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        # About what was sent: a card with bad metadata, a name that cannot be.
        return HubError("; ".join(str(error).strip().splitlines()) or type(error).__name__)
    return HubError(f"the Hub cannot be reached ({first_line(error)})", is_final=False)


def with_retries(
    action: Callable[[], Result],
    repo_id: str,
    revision: str | None,
    id_field: str,
    is_download: bool = False,
    wait: Callable[[float], bool | None] = time.sleep,
) -> Result:
    """
    The result of `action` on a repository (the rest as of [`explain`]), tried again where that can help.

    A server that is silent for two minutes counts as lost. `wait` waits for seconds and returns true to give up. Raises
    [`HubError`] with the last cause.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            with _one_voice(SILENCE_SECONDS):
                return action()
        # The client raises HTTP and system errors, its storage backend RuntimeErrors, bad answers are ValueErrors.
        # A proxy that cannot be is an address that is none, or needs another package.
        except (HTTPError, ImportError, InvalidURL, OSError, RuntimeError, ValueError) as error:
            failure = explain(error, repo_id, revision, id_field, is_download)
            if failure.is_final or seconds is None or wait(max(seconds, failure.retry_after_seconds)):
                raise failure from error
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _one_voice(silence_seconds: float) -> Iterator[None]:
    """Keep the client from warning of its own retries, since the caller tells how it went, or from waiting forever."""

    def impatient_client() -> Any:
        client = default_client_factory()
        client.timeout = silence_seconds
        return client

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    set_client_factory(impatient_client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
        hub_logging.set_verbosity(verbosity)
