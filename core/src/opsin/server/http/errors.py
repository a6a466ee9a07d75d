"""Whatever goes wrong with a request -> status and body, always ``{"error": {...}}``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pydantic import BaseModel
from starlette.responses import Response

from opsin.errors import FetchError, OpsinError, RequestError

_TYPES: Mapping[int, str] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")
_MAX_CHARS = 2000


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorDetail


class ApiError(OpsinError):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        param: the request's field that is at fault, if it is one.
        retry_after_s: when to try again, for conditions that pass.
        closes: whether the connection ends, because its request was not read to the end.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self.closes = closes

    def body(self) -> ErrorBody:
        """As the client sees it, without addresses in memory, which only a library's text could hold."""
        message = _ADDRESS.sub("0x...", str(self))[:_MAX_CHARS]
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.status))

    def response(self) -> Response:
        """The HTTP response."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))
        if self.closes:
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(
            self.body().model_dump_json(), self.status, headers=headers, media_type="application/json"
        )


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param)


def api_error(error: BaseException, request_id: str) -> ApiError:
    """Any exception as an answer; what was not raised on purpose is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FetchError):
        return ApiError(error.status, str(error), param=error.param)
    if isinstance(error, RequestError):
        return bad_request(str(error))
    return ApiError(500, f"internal error; the server's log has the details under request id {request_id}")
