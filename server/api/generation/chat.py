"""From a chat request to a prompt, and to what its answer may have in it: reasoning, tool calls."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import AdapterError, RegistryUnavailable
from adapters.format.spec import AdapterId
from server.api.generation.adapters import LeasedAdapters
from server.api.generation.structured import prescribes_answer
from server.api.schemas.chat import ChatRequest
from server.api.service import Service
from server.errors import EngineError, InvalidRequest
from server.parsers.answers import AnswerSyntax
from server.parsers.reasoning import opens_reasoning
from server.parsers.tool_grammar import calls_grammar
from server.structured.spec import GrammarSpec
from server.text.chat_template import ChatTemplate
from server.text.codec import LONG_TEXT, RenderedChat
from server.text.conversation import Conversation


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the engine takes it, and how its answer is read."""

    tokens: list[int]
    syntax: AnswerSyntax
    kept: frozenset[int]
    """Special tokens that the answer's text must keep for its parser."""
    grammar: GrammarSpec | None
    """What the answer must follow for the tool calls that the request demands."""


async def make_chat_prompt(service: Service, request: ChatRequest, adapters: LeasedAdapters) -> ChatPrompt:
    """Render and encode the conversation of ``request`` with the template of its adapters.

    Raises InvalidRequest, with field and reason, if the template refuses it or cannot do what the request asks for.
    """
    conversation = request.conversation
    named = {applied.name: applied.id for applied in adapters.applied}
    template, rendered = await render_chat(service, conversation, named)
    syntax = _syntax(request, conversation, template, rendered.text)
    kept = service.codec.special_ids(syntax.markers)
    return ChatPrompt(rendered.tokens, syntax, kept, _tools_grammar(service, request, syntax))


async def render_chat(
    service: Service, conversation: Conversation, adapters: Mapping[str, AdapterId]
) -> tuple[ChatTemplate, RenderedChat]:
    """Return the template for these adapters, by name, and what it makes of a conversation. Raises InvalidRequest.

    On a thread if that takes long: a template of an adapter may have to be read, and is rendered in another process.
    """

    def render() -> tuple[ChatTemplate, RenderedChat]:
        try:
            template = service.templates.choose(adapters)
        except RegistryUnavailable:
            raise
        except AdapterError as error:
            raise EngineError(str(error)) from error
        return template, service.codec.render_chat(conversation, template)

    quick = service.templates.are_quick(adapters.values()) and service.codec.is_quick(conversation)
    if quick and conversation.characters <= LONG_TEXT:
        return render()
    return await asyncio.to_thread(render)


def _syntax(request: ChatRequest, conversation: Conversation, template: ChatTemplate, prompt: str) -> AnswerSyntax:
    reasoning = None if prescribes_answer(request) else template.reasoning  # there is no place for it then
    tools = template.tool_format if conversation.tools else None
    if conversation.tools and tools is None:
        raise InvalidRequest(
            "The chat template writes tool calls in a way that is not known. A server started with --tool-parser can "
            "read them.",
            param="tools",
        )
    return AnswerSyntax(
        reasoning,
        reasoning is not None and opens_reasoning(prompt, reasoning),
        tools,
        frozenset(tool["function"]["name"] for tool in conversation.tools),
        incremental=bool(request.forced_tools),
    )


def _tools_grammar(service: Service, request: ChatRequest, syntax: AnswerSyntax) -> GrammarSpec | None:
    tools = request.forced_tools
    if not tools:
        return None
    parallel = request.parallel_tool_calls is not False and request.tool_choice == "required"
    return GrammarSpec("lark", calls_grammar(syntax, tools, parallel=parallel, token_id=service.codec.special_id))
