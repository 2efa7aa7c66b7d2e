"""Everything the server raises on purpose while it serves.

::

    ServerError
    ├── RequestError         the caller's doing; carries ``param`` and ``code`` for the wire
    │   ├── InvalidRequest       400
    │   ├── ContextOverflow      400, code ``context_length_exceeded``
    │   ├── UploadTooLarge       413
    │   ├── UnknownModel         404
    │   ├── QueueFull            429
    │   └── Draining             503
    └── EngineError          our doing: a step that failed, an adapter that could not be read; 500

Errors about adapters are in :mod:`adapters.errors`. The one table from error to HTTP status is in
:mod:`server.api.http.errors`.
"""

from bases.errors import ManyloraError


class ServerError(ManyloraError):
    """Anything the server raises on purpose."""


class RequestError(ServerError):
    """A request that cannot be served, with the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param = param
        self.code = code
        super().__init__(message)


class InvalidRequest(RequestError):
    """A field has a value that cannot be served."""


class ContextOverflow(RequestError):
    """Prompt and answer together do not fit the context."""

    def __init__(self, limit: int, prompt_tokens: int, max_tokens: int, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the completion).",
            param=param,
            code="context_length_exceeded",
        )


class UploadTooLarge(RequestError):
    """More bytes than any adapter and what may come with it."""


class UnknownModel(RequestError):
    """No model or adapter goes by this name."""

    def __init__(self, name: str, param: str = "model") -> None:
        message = f"The model `{name}` does not exist." if name else "The name of the model is empty."
        super().__init__(message, param=param, code="model_not_found")


class QueueFull(RequestError):
    """As many requests wait as may wait."""


class Draining(RequestError):
    """The server finishes what it has and takes nothing new."""


class EngineError(ServerError):
    """A step failed, or an adapter's bytes could not be read."""
