"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` and a status.

The clients choose their exception class by status alone (400 BadRequestError, 401 AuthenticationError,
404 NotFoundError, 429 RateLimitError, >= 500 InternalServerError) and retry 408, 409, 429 and >= 500 by
themselves unless `x-should-retry: false` is set; they wait as `retry-after-ms` or `retry-after` says.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gateway.service import Failed, FailureCode

INVALID_REQUEST: Final = "invalid_request_error"
SERVER_ERROR: Final = "server_error"

#: Hint when the mesh gave none: long enough for an Island to finish a short answer or to reconnect.
DEFAULT_RETRY_AFTER_MS: Final = 1_000


class ApiError(Exception):
    """A request that ends in an error response. `param` is the path of the offending field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.as_dict()})

    def as_dict(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """A 400 for something that OpenAI offers and this gateway does not."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def retry_headers(after_ms: int) -> tuple[tuple[str, str], ...]:
    """`Retry-After` (whole seconds, rounded up) and OpenAI's finer `retry-after-ms`."""
    return (("retry-after", str(max(1, -(-after_ms // 1000)))), ("retry-after-ms", str(after_ms)))


_STATUS: Final[dict[FailureCode, tuple[int, str, str]]] = {
    "no-islands": (503, SERVER_ERROR, "no_islands"),
    "busy": (503, SERVER_ERROR, "overloaded"),
    "too-long": (400, INVALID_REQUEST, "context_length_exceeded"),
    "invalid": (400, INVALID_REQUEST, "invalid_value"),
    "deadline": (504, SERVER_ERROR, "deadline_exceeded"),
    "exhausted": (502, SERVER_ERROR, "islands_failed"),
}


def error_of(failed: Failed, *, prompt_param: str) -> ApiError:
    """The mesh's failure as a response.

    'busy' is 503, not 429: the consumer did nothing wrong, and 429 must mean its own rate limit. A missed
    deadline tells clients not to retry by themselves: they would wait for as long again.
    """
    status, kind, code = _STATUS[failed.code]
    headers: tuple[tuple[str, str], ...] = ()
    if status == 503:
        headers = retry_headers(failed.retry_after_ms or DEFAULT_RETRY_AFTER_MS)
    elif status == 504:
        headers = (("x-should-retry", "false"),)
    param = prompt_param if failed.code == "too-long" else None
    return ApiError(status, failed.detail, kind=kind, param=param, code=code, headers=headers)


def internal_error() -> ApiError:
    """A bug of ours. Says nothing of its cause; the log does, by request id."""
    return ApiError(500, "The gateway failed on this request.", kind=SERVER_ERROR, code="internal_error")
