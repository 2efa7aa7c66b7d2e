"""langchain-openai: models, streams, batches, tools, the three methods of structured output, embeddings, responses."""

import asyncio
import json
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Order(BaseModel):
    """An order from a shop."""

    item: Literal["lamp", "chair", "table"]
    quantity: int = Field(ge=1, le=20)
    note: str = Field(max_length=12)


@tool
def opening_hours(day: Literal["Monday", "Sunday"]) -> str:
    """Return the opening hours of the shop on a day."""
    return f"{day}: 9 to 17"


@pytest.fixture
def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=url, api_key="none", temperature=0, max_tokens=60, max_retries=0)


def test_invoke(chat: ChatOpenAI) -> None:
    answer = chat.invoke([("system", "Be brief."), ("human", QUESTION)])
    assert answer.content
    assert answer.usage_metadata
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] in {"stop", "length"}


def test_a_stream_gives_the_same_answer(chat: ChatOpenAI) -> None:
    whole = chat.invoke(QUESTION)
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 3
    joined = sum(chunks[1:], chunks[0])
    assert isinstance(joined, AIMessageChunk)
    assert joined.content == whole.content
    assert joined.usage_metadata
    assert whole.usage_metadata
    assert joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def test_async(url: str) -> None:
    """One event loop for all: LangChain keeps its connections for the next client."""
    names = ("smollm2-135m-instruct", "red")
    chats = [ChatOpenAI(model=name, base_url=url, api_key="none", temperature=0, max_tokens=24) for name in names]

    async def text(chat: ChatOpenAI) -> str:
        return "".join([str(chunk.content) async for chunk in chat.astream(QUESTION)])

    async def both() -> tuple[list[str], list[AIMessage]]:
        streamed = [text(chat) for chat in chats]
        whole = [chat.ainvoke(QUESTION) for chat in chats]
        return await asyncio.gather(*streamed), await asyncio.gather(*whole)

    streamed, whole = asyncio.run(both())
    assert streamed == [answer.content for answer in whole]


def test_batch(chat: ChatOpenAI) -> None:
    questions = [QUESTION, "Count to three.", QUESTION, "Name a colour."]
    answers = [answer.content for answer in chat.batch(questions)]
    assert answers == [chat.invoke(question).content for question in questions]


def test_the_adapter_as_a_field_of_the_request(url: str) -> None:
    def answer(**fields: Any) -> Any:
        chat = ChatOpenAI(base_url=url, api_key="none", temperature=0, max_tokens=24, **fields)
        return chat.invoke(QUESTION).content

    base = "smollm2-135m-instruct"
    assert answer(model=base, extra_body={"adapter": "red"}) == answer(model="red") != answer(model=base)


def test_several_answers_and_log_probabilities(chat: ChatOpenAI) -> None:
    answers = chat.generate([[HumanMessage(QUESTION)]], n=2, logprobs=True, top_logprobs=2, temperature=1)
    assert len(answers.generations[0]) == 2
    for generation in answers.generations[0]:
        assert generation.generation_info is not None
        info = generation.generation_info["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in info)


def test_text_completions(url: str, model: str) -> None:
    llm = OpenAI(model=model, base_url=url, api_key="none", temperature=0, max_tokens=20)
    text = llm.invoke("The capital of France is")
    assert text
    assert "".join(llm.stream("The capital of France is")) == text
    assert llm.batch(["The capital of France is"] * 2) == [text, text], "two prompts in one request"


def test_a_tool_loop(chat: ChatOpenAI) -> None:
    with_tools = chat.bind_tools([opening_hours, Order], tool_choice="opening_hours")
    turns: list[Any] = [HumanMessage("When are you open on Sunday?")]
    called = with_tools.invoke(turns)
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert call["name"] == "opening_hours"
    result = opening_hours.invoke(call)
    assert isinstance(result, ToolMessage)
    turns += [called, result]
    last = chat.bind_tools([opening_hours], tool_choice="none").invoke(turns)
    assert last.content
    assert not last.tool_calls


def test_any_tool_must_be_called(chat: ChatOpenAI) -> None:
    called = chat.bind_tools([opening_hours, Order], tool_choice="any").invoke("Two lamps, please.")
    assert {call["name"] for call in called.tool_calls} <= {"opening_hours", "Order"}
    assert called.tool_calls


def test_streamed_tool_calls(chat: ChatOpenAI) -> None:
    with_tools = chat.bind_tools([Order], tool_choice="Order")
    whole = with_tools.invoke("Two lamps, please.")
    chunks = list(with_tools.stream("Two lamps, please."))
    joined = sum(chunks[1:], chunks[0])
    assert [call["args"] for call in joined.tool_calls] == [call["args"] for call in whole.tool_calls]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Any) -> None:
    order = chat.with_structured_output(Order, method=method, strict=True).invoke("Two lamps, please.")
    assert isinstance(order, Order)


def test_structured_output_as_a_stream(chat: ChatOpenAI) -> None:
    parts = list(chat.with_structured_output(Order, method="json_schema").stream("Two lamps, please."))
    assert isinstance(parts[-1], Order)


def test_json_mode(chat: ChatOpenAI) -> None:
    """Any JSON object: the prompt says which, and only the prompt."""
    asked = chat.with_structured_output(Order.model_json_schema(), method="json_mode", include_raw=True)
    prompt = 'Answer with JSON like {"item": "lamp", "quantity": 1, "note": ""}. Two lamps, please.'
    answer = asked.invoke(prompt)
    assert isinstance(answer, dict)
    raw = answer["raw"]
    if raw.response_metadata["finish_reason"] == "stop":
        assert isinstance(json.loads(raw.content), dict)
        assert answer["parsed"] == json.loads(raw.content)


def test_embeddings_and_a_vector_store(url: str, model: str) -> None:
    # By default LangChain sends ids of OpenAI's own tokenizer, which mean nothing to another model.
    embeddings = OpenAIEmbeddings(model=model, base_url=url, api_key="none", check_embedding_ctx_length=False)
    texts = ["Paris is the capital of France.", "Bread is baked in an oven.", "Cats sleep most of the day."]
    vectors = embeddings.embed_documents(texts)
    assert [len(vector) for vector in vectors] == [576] * 3
    one = embeddings.embed_query(texts[0])
    assert one == pytest.approx(vectors[0], abs=1e-3)
    store = InMemoryVectorStore(embeddings)
    store.add_texts(texts)
    assert store.similarity_search(texts[1], k=1)[0].page_content == texts[1]


def test_the_responses_api(url: str, model: str) -> None:
    chat = ChatOpenAI(
        model=model, base_url=url, api_key="none", temperature=0, max_tokens=60, use_responses_api=True, store=False
    )
    answer = chat.invoke(QUESTION)
    assert answer.text
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == answer.text
    called = chat.bind_tools([Order], tool_choice="Order").invoke("Two lamps, please.")
    assert [call["name"] for call in called.tool_calls] == ["Order"]
    assert isinstance(chat.with_structured_output(Order).invoke("Two lamps, please."), Order)
