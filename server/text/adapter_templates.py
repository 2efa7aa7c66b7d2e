"""AdapterTemplates: the chat template for a request, by its adapters."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from threading import Lock

from adapters.errors import AdapterRejected
from adapters.format.files import TEMPLATE
from adapters.format.spec import AdapterId
from server.errors import InvalidRequest
from server.text.chat_template import ChatTemplate, TemplateSources, find_sources
from server.text.codec import Codec
from server.text.template_environment import TemplateFailure
from server.text.template_process import TemplateProcess

MAX_ADAPTERS = 8192
"""Adapters whose template, or that they have none, is remembered."""
MAX_TEMPLATES = 256
"""Templates in memory."""


class AdapterTemplates:
    """An adapter's own template, where it carries one, else the base's. Any thread may use it.

    Templates of adapters come from uploads: they are rendered in a process of their own, unless they are the base's.
    """

    def __init__(self, codec: Codec, read: Callable[[AdapterId], object]) -> None:
        """``read`` returns the ``chat_template`` in an adapter's files; it may have to fetch them."""
        self._codec = codec
        self._read = read
        self._process = TemplateProcess()
        self._lock = Lock()
        self._sources: OrderedDict[AdapterId, TemplateSources | None] = OrderedDict()
        self._templates: OrderedDict[TemplateSources, ChatTemplate] = OrderedDict()

    def close(self) -> None:
        """End the process that renders."""
        self._process.close()

    def are_quick(self, adapters: Collection[AdapterId]) -> bool:
        """Whether :meth:`choose` reads no file, and the template is rendered here."""
        return all(self._sources.get(adapter, ()) is None for adapter in adapters)

    def choose(self, adapters: Mapping[str, AdapterId]) -> ChatTemplate:
        """Return the template for a request with these adapters, by name.

        Raises InvalidRequest if there is none, or if adapters of a mix have different ones: no choice would be right
        for all of them. Raises AdapterError if an adapter's files cannot be read.
        """
        sources = {name: self._sources_of(adapter) for name, adapter in adapters.items()}
        different = {own: name for name, own in sources.items()}
        if len(different) > 1:
            names = " and ".join(f"`{name}`" for name in list(different.values())[:2])
            raise InvalidRequest(
                f"The adapters {names} have different chat templates; use /v1/completions with a prompt that you "
                "have rendered.",
                param="adapter",
            )
        own = next(iter(different), None)
        return self._codec.require_template() if own is None else self._template(own)

    def check(self, adapter: AdapterId) -> None:
        """Raise AdapterRejected if the adapter's own template cannot be compiled, or exceeds a limit."""
        own = self._sources_of(adapter)
        if own is None:
            return
        try:
            self._template(own).check()
        except TemplateFailure as failure:
            if failure.fatal:
                raise AdapterRejected(f"is a chat template that cannot be used: {failure}", file=TEMPLATE) from failure

    def _sources_of(self, adapter: AdapterId) -> TemplateSources | None:
        """Return an adapter's own template; None if it has none, or has the base's."""
        with self._lock:
            if adapter in self._sources:
                self._sources.move_to_end(adapter)
                return self._sources[adapter]
        own = find_sources(self._read(adapter))
        if self._codec.template is not None and own == self._codec.template.sources:
            own = None
        with self._lock:
            self._sources[adapter] = own
            if len(self._sources) > MAX_ADAPTERS:
                self._sources.popitem(last=False)
        return own

    def _template(self, sources: TemplateSources) -> ChatTemplate:
        with self._lock:
            template = self._templates.get(sources)
            if template is None:
                template = self._templates[sources] = self._codec.make_template(sources, self._process.render)
                if len(self._templates) > MAX_TEMPLATES:
                    self._templates.popitem(last=False)
            self._templates.move_to_end(sources)
            return template
