"""llama-index's ``OpenAILike`` and ``OpenAILikeEmbedding``."""

import asyncio
from typing import Any, Literal

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the capital of France?"


class Order(BaseModel):
    """An order from a shop."""

    model_config = ConfigDict(extra="forbid")  # else the schema admits further fields, and the model invents some
    item: Literal["lamp", "chair", "table"]
    quantity: int = Field(ge=1, le=20)
    note: str = Field(max_length=12)


def make(url: str, model: str, **fields: Any) -> OpenAILike:
    options: dict[str, Any] = {"is_chat_model": True, "context_window": 2048, "temperature": 0, "max_tokens": 60}
    return OpenAILike(model=model, api_base=url, api_key="none", max_retries=0, **options | fields)


@pytest.fixture
def llm(url: str, model: str) -> OpenAILike:
    return make(url, model)


@pytest.fixture
def calling(url: str, model: str) -> OpenAILike:
    return make(url, model, is_function_calling_model=True)


@pytest.fixture
def embedding(url: str, model: str) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(model_name=model, api_base=url, api_key="none")


def test_chat(llm: OpenAILike) -> None:
    answer = llm.chat([ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)])
    assert answer.message.content


def test_a_streamed_chat_gives_the_same_answer(llm: OpenAILike) -> None:
    chunks = list(llm.stream_chat([ChatMessage(QUESTION)]))
    assert chunks[-1].message.content == llm.chat([ChatMessage(QUESTION)]).message.content
    assert "".join(chunk.delta or "" for chunk in chunks) == chunks[-1].message.content


def test_async_chat(llm: OpenAILike) -> None:
    answer = asyncio.run(llm.achat([ChatMessage(QUESTION)]))
    assert answer.message.content == llm.chat([ChatMessage(QUESTION)]).message.content


@pytest.mark.parametrize("chat_model", [True, False])
def test_complete(url: str, model: str, chat_model: bool) -> None:
    """By the chat endpoint, or by ``/v1/completions``."""
    llm = make(url, model, is_chat_model=chat_model, max_tokens=30)
    whole = llm.complete("The capital of France is").text
    assert whole
    assert list(llm.stream_complete("The capital of France is"))[-1].text == whole


def test_structured_output(url: str, model: str) -> None:
    """By ``response_format``: llama-index must be told that the server has it."""
    llm = make(url, model, should_use_structured_outputs=True)
    order = llm.structured_predict(Order, PromptTemplate("{order}"), order="Two lamps, please.")
    assert isinstance(order, Order)


def test_structured_output_by_a_tool(calling: OpenAILike) -> None:
    order = calling.structured_predict(
        Order, PromptTemplate("{order}"), order="Two lamps, please.", llm_kwargs={"tool_choice": "required"}
    )
    assert isinstance(order, Order)
    answer = calling.as_structured_llm(Order).complete("Two lamps, please.")
    assert isinstance(answer.raw, Order)


def test_tools(calling: OpenAILike) -> None:
    def price(item: Literal["lamp", "chair"]) -> int:
        """Return the price of an item in euros."""
        return 20

    tool = FunctionTool.from_defaults(price)
    answer = calling.chat_with_tools([tool], user_msg="What does a lamp cost?", tool_required=True)
    (call, *_) = calling.get_tool_calls_from_response(answer)
    assert call.tool_name == "price"
    assert set(call.tool_kwargs) == {"item"}
    result = ChatMessage("20", role="tool", tool_call_id=call.tool_id)
    last = calling.chat([ChatMessage("What does a lamp cost?"), answer.message, result])
    assert last.message.content


def test_embeddings_and_an_index(llm: OpenAILike, embedding: OpenAILikeEmbedding) -> None:
    texts = ["Paris is the capital of France.", "Bread is baked in an oven.", "Cats sleep most of the day."]
    vectors = embedding.get_text_embedding_batch(texts)
    assert [len(vector) for vector in vectors] == [576] * 3
    index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedding)
    assert index.as_retriever(similarity_top_k=1).retrieve(texts[1])[0].text == texts[1]
    answer = index.as_query_engine(llm=llm, similarity_top_k=1).query("How is bread baked?")
    assert str(answer)
    assert answer.source_nodes
