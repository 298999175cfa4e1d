"""The error of a request that cannot be answered as asked."""

from __future__ import annotations

from offmoe.errors import OffmoeError


class RequestError(OffmoeError):
    """A request cannot be answered as asked. The message names the field and what would work.

    Args:
        message: One sentence for the person who sent the request.
        param: Path of the field, such as "messages[2].content"; None if no single field is wrong.
        code: A word for programs, such as "context_length_exceeded".
        status: The HTTP status that a server answers with.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status
