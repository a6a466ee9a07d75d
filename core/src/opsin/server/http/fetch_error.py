"""`FetchError`: why media that a request names by URL cannot be had, and the HTTP status that says so."""

from __future__ import annotations

from http import HTTPStatus

from opsin.errors import RequestError


class FetchError(RequestError):
    """Media named by a URL cannot be had. The message holds nothing that the client did not send itself.

    Attributes:
        status: FORBIDDEN (the URL is not allowed), UNPROCESSABLE_ENTITY (it answers with an error or with
            something that is no picture), BAD_GATEWAY or GATEWAY_TIMEOUT (it may work later).
        param: the request's field that named it.
    """

    def __init__(self, message: str, status: HTTPStatus, param: str = "image_url") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
