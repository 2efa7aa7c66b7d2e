"""The exceptions of a running server.

::

    ServerError
    ├── RequestError         one request cannot be served; has ``param`` and ``code`` for the response
    │   ├── InvalidRequest       400
    │   ├── ContextOverflow      400, code ``context_length_exceeded``
    │   ├── UploadTooLarge       413
    │   ├── UnknownModel         404
    │   ├── QueueFull            429
    │   └── Draining             503
    └── EngineError          the server's fault: a step failed, an adapter could not be read; 500

Errors about adapters are in :mod:`adapters.errors`. HTTP statuses are assigned in
:mod:`server.api.http.errors`.
"""

from bases.errors import ManyloraError


class ServerError(ManyloraError):
    """Base of all exceptions of the running server."""


class RequestError(ServerError):
    """A request that cannot be served. ``param`` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param = param
        self.code = code
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
        message = f"The model `{name}` does not exist{hint}." if name else "The name of the model is empty."
        super().__init__(message, param=param, code="model_not_found")


class QueueFull(RequestError):
    """The queue is full: ``max_queue`` requests are waiting."""


class Draining(RequestError):
    """The server shuts down: it finishes open requests and refuses new ones."""


class EngineError(ServerError):
    """A step has failed, an adapter could not be read, a grammar's sandbox was killed, or the engine has stopped."""
