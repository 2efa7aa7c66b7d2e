"""Answers questions from documents and cites the sentence that each answer rests on.

    make serve                                   # in another terminal
    .venv/bin/python -m pip install openai       # if `make test` has not done it
    .venv/bin/python examples/rag/rag.py         # or: rag.py "How long may I keep a film?"

It shows retrieval-augmented generation with one server for both models that it needs. The sentences of library.md are
embedded by ``POST /v1/embeddings`` and kept in SQLite; the three nearest to a question go into the prompt. The answer
is JSON by a schema in which the quotation is one of those sentences, as an enum: whatever the model says, a citation is
a sentence that is there, word for word, and its source follows from it.

It prints, for each question, the answer, the quotation and its source, and at the end how often the right passage was
found and quoted. ../README.md has what the demo model does well and badly.
"""

import json
import os
import re
import sqlite3
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from openai import OpenAI

FILE = Path(__file__).with_name("library.md")
NEAREST = 3
MEANING = 'This sentence : "{}" means in one word:"'
"""A language model was trained to predict the next token, not to compare texts. Asked for one word, it gathers what a
text means in its last position (PromptEOL, arXiv 2307.16645), whose hidden state ``"pooling": "last"`` asks for."""
ONE_SENTENCE = r"^[A-Z][^.{}]{2,90}\.$"
QUESTIONS = {
    "How long may I keep a film?": "Loans",
    "What does a library card cost?": "Becoming a member",
    "What does it cost if a book is late?": "Late fees",
    "When is the library closed?": "Opening hours",
    "How much is a printed page in colour?": "Printing and copying",
    "Where may I eat my meal?": "Food and drink",
    "How many computers are there?": "Computers and internet",
    "In which villages does the book bus stop?": "The book bus",
    "How long can I park my car?": "Parking and bicycles",
    "What happens if I lose a book?": "Lost and damaged books",
    "When is a story read aloud for children?": "Children",
    "What does a meeting room cost?": "Meeting rooms",
}
"""Question -> title of the passage that answers it."""


class Sentence(NamedTuple):
    """A sentence, and the title of its passage."""

    title: str
    text: str


class Index:
    """Sentences and their vectors, in SQLite."""

    def __init__(self, client: OpenAI, model: str, sentences: list[Sentence]) -> None:
        self._client, self._model = client, model
        self._rows = sqlite3.connect(":memory:")  # the name of a file would keep them
        self._rows.execute("CREATE TABLE sentence (title TEXT, text TEXT, vector BLOB)")
        vectors = self._embed([f"{title}: {text}" for title, text in sentences])
        rows = [(*sentence, vector.tobytes()) for sentence, vector in zip(sentences, vectors, strict=True)]
        self._rows.executemany("INSERT INTO sentence VALUES (?, ?, ?)", rows)

    def nearest(self, question: str, count: int) -> list[Sentence]:
        """Return the sentences whose vectors are nearest to that of the question, the nearest first."""
        rows = self._rows.execute("SELECT title, text, vector FROM sentence").fetchall()
        vectors = np.array([np.frombuffer(vector, np.float32) for *_, vector in rows])
        cosines = vectors @ self._embed([question])[0]  # the server's vectors have length 1
        return [Sentence(*rows[place][:2]) for place in np.argsort(-cosines)[:count]]

    def _embed(self, texts: list[str]) -> np.ndarray:
        inputs = [MEANING.format(text) for text in texts]
        data = self._client.embeddings.create(model=self._model, input=inputs, extra_body={"pooling": "last"}).data
        return np.array([each.embedding for each in data], np.float32)


def read_sentences() -> list[Sentence]:
    """Return the sentences of the file's sections."""
    sections = [section.partition("\n") for section in FILE.read_text(encoding="utf-8").split("\n## ")[1:]]
    return [
        Sentence(title, sentence)
        for title, _, text in sections
        for sentence in re.split(r"(?<=[.;]) ", " ".join(text.split()))
    ]


def answer(client: OpenAI, model: str, question: str, sentences: list[Sentence]) -> tuple[str, str]:
    """Return the quotation that answers a question, and the answer."""
    schema = {
        "type": "object",
        "properties": {
            "quotation": {"enum": [sentence.text for sentence in sentences]},
            "answer": {"type": "string", "pattern": ONE_SENTENCE},
        },
        "required": ["quotation", "answer"],
        "additionalProperties": False,
    }
    # The nearest comes last: a small model heeds what it has just read.
    rules = "\n".join(f"{title}: {text}" for title, text in reversed(sentences))
    completion = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": f"You are a librarian. Answer from these rules:\n{rules}"},
            {"role": "user", "content": question},
        ],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        temperature=0,
        max_tokens=300,
    )
    found = json.loads(completion.choices[0].message.content or "")
    return found["quotation"], found["answer"]


def main() -> None:
    """Ask the questions of the command line, or all of QUESTIONS."""
    client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
    model = client.models.list().data[0].id  # the base
    index = Index(client, model, read_sentences())
    first, found, quoted = 0, 0, 0
    questions = sys.argv[1:] or list(QUESTIONS)
    for question in questions:
        sentences = index.nearest(question, NEAREST)
        quotation, said = answer(client, model, question, sentences)
        source = next(sentence.title for sentence in sentences if sentence.text == quotation)
        print(f'{question}\n  {said}\n  "{quotation}" [{source}]\n')
        right = QUESTIONS.get(question)
        first += sentences[0].title == right
        found += right in [sentence.title for sentence in sentences]
        quoted += source == right
    if not sys.argv[1:]:
        print(f"right passage nearest: {first}, among {NEAREST}: {found}, quoted: {quoted}; of {len(questions)}")


if __name__ == "__main__":
    main()
