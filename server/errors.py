"""The exceptions of a running server.

::

    ServerError
    ├── RequestError         one request cannot be served; has ``param`` and ``code`` for the response
    │   ├── InvalidRequest       400
    │   ├── ContextOverflow      400, code ``context_length_exceeded``
    │   ├── GrammarTooComplex    400, code ``grammar_too_complex``
    │   ├── UploadTooLarge       413
    │   ├── UnknownModel         404
    │   ├── Forbidden            403, code ``insufficient_permissions``
    │   ├── UnknownKey           404
    │   ├── UnknownRun           404
    │   ├── KeyConflict          409
    │   ├── QueueFull            429
    │   ├── RateLimited          429
    │   │   └── QuotaUsedUp          429, code ``insufficient_quota``
    │   ├── Draining             503
    │   └── DeadlineExceeded     504
    └── EngineError          the server's fault: a step failed, an adapter could not be read; 500
        ├── PoisonedRequest      500, code ``poisoned_request``: steps fail with this request, and not without it
        └── OutOfMemory          503, code ``out_of_memory``

Errors about adapters are in :mod:`adapters.errors`. HTTP statuses are assigned in
:mod:`server.api.http.errors`.
"""

from bases.errors import ManyloraError


class ServerError(ManyloraError):
    """Base of all exceptions of the running server."""


class RequestError(ServerError):
    """A request that cannot be served. ``param`` names the field at fault.

    ``retry_after``: seconds after which the client may try again; None says nothing, or what is usual for the status.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        self.param = param
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)


class InvalidRequest(RequestError):
    """A field has a value that is invalid or not supported."""


class ContextOverflow(RequestError):
    """Prompt and answer together are longer than the context."""

    def __init__(self, limit: int, prompt_tokens: int, max_tokens: int, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the completion).",
            param=param,
            code="context_length_exceeded",
        )


class UploadTooLarge(RequestError):
    """An upload has more bytes than any valid adapter folder."""


class UnknownModel(RequestError):
    """No model, adapter or alias has this name."""

    def __init__(self, name: str, param: str = "model", *, hint: str = "") -> None:
        self.name = name
        message = f"The model `{name}` does not exist{hint}." if name else "The name of the model is empty."
        super().__init__(message, param=param, code="model_not_found")


class Forbidden(RequestError):
    """The key of the request does not allow it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="insufficient_permissions")


class UnknownKey(RequestError):
    """No key has this id or, on the command line, this name; or it is revoked."""

    def __init__(self, word: str) -> None:
        super().__init__(f"There is no key `{word}`.", param="id", code="key_not_found")


class UnknownRun(RequestError):
    """No training run has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no training run `{name[:200]}`.", param="name", code="run_not_found")


class KeyConflict(RequestError):
    """A key with this name exists."""


class QueueFull(RequestError):
    """A queue is full: ``max_queue`` requests or ``max_queue_tokens`` tokens are waiting, or too many uploads run."""


class RateLimited(RequestError):
    """A limit of the request's key is reached. ``retry_after``: seconds until it is not; None if that is never."""

    def __init__(self, message: str, retry_after: float | None, code: str = "rate_limit_exceeded") -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class QuotaUsedUp(RateLimited):
    """The key has no tokens left this month."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after, "insufficient_quota")


class Draining(RequestError):
    """The server shuts down: it finishes open requests and refuses new ones."""


class DeadlineExceeded(RequestError):
    """The request cannot be completed within its own timeout."""


class GrammarTooComplex(RequestError):
    """An answer has come to a place where following its grammar takes more than llguidance's limits."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="grammar_too_complex")


class EngineError(ServerError):
    """A step has failed, an adapter could not be read, a grammar's sandbox was killed, or the engine has stopped."""


class PoisonedRequest(EngineError):
    """The model's step fails whenever this request is in it. The same request would fail again."""


class OutOfMemory(EngineError):
    """There is not enough memory for this request alone, or for its adapter. Others are served."""
