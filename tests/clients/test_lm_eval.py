"""lm-eval's two local models, on a task of our own over a local file: no hub, no download."""

import json
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

CAPITALS = [
    ("France", "Paris", "Bread"),
    ("Italy", "Rome", "Cheese"),
    ("Japan", "Tokyo", "Rice"),
    ("Spain", "Madrid", "Oil"),
]
TASKS = {
    "capital_choice": """
task: capital_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: ["{{capital}}", "{{wrong}}"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "capital_text": """
task: capital_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of {{country}}? Answer with one word."
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
metric_list:
  - metric: exact_match
    regexes_to_ignore: ["The capital of .* is ", "\\\\..*"]
""",
    "capital_perplexity": """
task: capital_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "The capital of {{country}} is {{capital}}."
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [dict(zip(("country", "capital", "wrong"), row, strict=True)) for row in CAPITALS]
    file = folder / "capitals.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: TaskManager, kind: str, address: str, model: str, task: str, **options: Any) -> dict[str, Any]:
    arguments = {"model": model, "base_url": address, "num_concurrent": 2, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **options
    )
    assert found is not None
    results: dict[str, Any] = found["results"][task]
    return results


def test_log_likelihoods(server: str, model: str, tasks: TaskManager) -> None:
    """The tokenizer is the server's: lm-eval asks for it at ``/tokenizer_info``."""
    found = evaluate(tasks, "local-completions", f"{server}/v1/completions", model, "capital_choice")
    assert found["acc,none"] == 1.0


def test_perplexity(server: str, model: str, tasks: TaskManager) -> None:
    found = evaluate(tasks, "local-completions", f"{server}/v1/completions", model, "capital_perplexity")
    assert 1 < found["word_perplexity,none"] < 1e4


def test_generation(server: str, model: str, tasks: TaskManager) -> None:
    found = evaluate(tasks, "local-completions", f"{server}/v1/completions", model, "capital_text")
    assert 0 <= found["exact_match,none"] <= 1


def test_chat(server: str, model: str, tasks: TaskManager) -> None:
    address = f"{server}/v1/chat/completions"
    found = evaluate(tasks, "local-chat-completions", address, model, "capital_text", apply_chat_template=True)
    assert found["exact_match,none"] >= 0.5
