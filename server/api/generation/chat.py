"""From a chat request to a prompt, and to what its answer may have in it: reasoning, tool calls."""

import asyncio
import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from adapters.errors import AdapterError, RegistryUnavailable
from adapters.format.spec import AdapterId
from server.api.generation.adapters import LeasedAdapters
from server.api.generation.structured import ToolsGrammar, prescribes_answer
from server.api.schemas.chat import ChatRequest
from server.api.schemas.tools import NamedTool
from server.api.service import Service
from server.errors import EngineError, InvalidRequest
from server.parsers.answers import AnswerSyntax
from server.parsers.reasoning import opens_reasoning
from server.parsers.tool_grammar import calls_grammar, strict_grammar
from server.parsers.xml_grammar import NotEnforceable
from server.structured.json_schemas import check
from server.structured.spec import GrammarSpec
from server.text.chat_template import ChatTemplate
from server.text.codec import LONG_TEXT, RenderedChat
from server.text.conversation import Conversation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the engine takes it, and how its answer is read."""

    tokens: list[int]
    syntax: AnswerSyntax
    kept: frozenset[int]
    """Special tokens that the answer's text must keep for its parser."""
    grammar: ToolsGrammar | None
    """What the answer must follow for its tool calls."""


async def make_chat_prompt(service: Service, request: ChatRequest, adapters: LeasedAdapters) -> ChatPrompt:
    """Render and encode the conversation of ``request`` with the template of its adapters.

    Raises InvalidRequest, with field and reason, if the template refuses it or cannot do what the request asks for.
    """
    conversation = request.conversation
    named = {applied.shown: applied.id for applied in adapters.applied}
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
            # The reason names contents, which not every client that may use an alias may see.
            names = ", ".join(service.registry.names_of(adapters.values()))
            log.error("The chat template of %s could not be read: %s", names, error)
            raise EngineError("The adapter could not be loaded.") from error
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
        {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in conversation.tools},
        incremental=bool(request.forced_tools),
    )


def _tools_grammar(service: Service, request: ChatRequest, syntax: AnswerSyntax) -> ToolsGrammar | None:
    """Return the grammar of the calls that the request demands, or else one for the calls of its strict functions.

    Raises InvalidRequest if it cannot enforce a function's parameters.
    """
    codec, parallel = service.codec, request.parallel_tool_calls is not False
    try:
        if request.forced_tools:
            tools = [_enforceable(tool) for tool in request.forced_tools]
            parallel = parallel and not isinstance(request.tool_choice, NamedTool)
            source = calls_grammar(syntax, tools, parallel=parallel, token_id=codec.special_id)
            return ToolsGrammar(GrammarSpec("lark", source), "tool_choice", demanded=True)
        tools, strict = _with_strict(request)
        if not strict or prescribes_answer(request):
            return None
        others = codec.special - codec.special_ids(syntax.markers) - service.base.eos_token_ids
        source = strict_grammar(syntax, tools, strict, parallel=parallel, token_id=codec.special_id, others=others)
    except NotEnforceable as error:
        raise InvalidRequest(f"The parameters of a function cannot be enforced: {error}.", param="tools") from error
    return ToolsGrammar(GrammarSpec("lark", source), "tools", demanded=False)


def _with_strict(request: ChatRequest) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """Return the tools that the model may call, and the names of those that are strict."""
    tools = request.callable_tools
    strict = request.strict_functions.intersection(tool["function"]["name"] for tool in tools)
    return [_enforceable(tool) if tool["function"]["name"] in strict else tool for tool in tools], strict


def _enforceable(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool whose parameters a grammar can enforce.

    Raises InvalidRequest for keywords that a grammar would ignore, as they are refused in ``response_format``.
    """
    function = deepcopy(tool["function"])
    if reason := check(function.setdefault("parameters", {})):
        name = function["name"][:80]
        raise InvalidRequest(f"The parameters of the function `{name}` cannot be enforced: {reason}.", param="tools")
    return {"function": function}
