"""Examples of responses for the OpenAPI document, by the name of their model. A test checks them against the models."""

from collections.abc import Mapping
from typing import Any

BASE = "smollm2-135m-instruct"
CONTENT = "c17b58deb3c1cd38836bdd9c3b2b0bbb421fbaf28f613ce51363b1654e744718"
CREATED = 1795975698

_APPLIED = {
    "model": BASE,
    "system_fingerprint": "fp_0dc39eb7e995",
    "adapter": [{"name": "legal@2", "id": CONTENT, "weight": 1.0}],
}
_GENERATED = {"created": CREATED, **_APPLIED}
_USAGE = {
    "prompt_tokens": 37,
    "completion_tokens": 8,
    "total_tokens": 45,
    "prompt_tokens_details": {"cached_tokens": 32},
}
_END = {"logprobs": None, "finish_reason": "stop", "stop_reason": None}
_MODEL = {
    "id": BASE,
    "object": "model",
    "created": CREATED,
    "owned_by": "manylora",
    "root": BASE,
    "parent": None,
    "max_model_len": 8192,
}
_VERSION = {
    "content": CONTENT,
    "rank": 16,
    "targets": 210,
    "size_bytes": 19_567_616,
    "source": "upload",
    "residency": "device",
    "status": "ready",
}
_ADAPTER = {
    "id": "legal",
    "object": "adapter",
    "active": 2,
    "pinned": False,
    "aliases": ["prod"],
    "versions": [1, 2],
    "created": CREATED,
    **_VERSION,
}
_ALIAS = {
    "id": "prod",
    "object": "alias",
    "created": CREATED,
    "targets": [
        {"adapter": "legal@1", "weight": 90.0, "serves": "legal@1"},
        {"adapter": "german", "weight": 10.0, "serves": "german@3"},
    ],
}
_KEY = {
    "id": "key_5f0c1d7a9b3e2846",
    "object": "key",
    "name": "acme",
    "prefix": "sk-ml-Xq3vY0",
    "scopes": ["infer"],
    "adapters": ["acme/*"],
    "limits": {
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "parallel_requests": None,
        "tokens_per_month": 10_000_000,
    },
    "weight": 1.0,
    "created": CREATED,
    "expires": None,
    "revoked": None,
    "old_secret_until": None,
}

_RUN = {
    "id": "legal",
    "object": "training_run",
    "state": "running",
    "judging": False,
    "base": BASE,
    "base_fingerprint": CONTENT,
    "step": 2,
    "steps": 400,
    "loss": 1.71,
    "best_evaluation": {"step": 2, "loss": 1.84},
    "started": CREATED,
    "ended": None,
    "updated": CREATED + 9,
    "passed": None,
    "reason": None,
    "skipped_lines": 0,
    "skipped_bytes": 0,
}

_USED = {
    "id": "2026-11-29/key_0a1b2c3d4e5f6071/legal@2",
    "object": "usage",
    "day": "2026-11-29",
    "key": "key_0a1b2c3d4e5f6071",
    "adapter": "legal@2",
    "key_name": "acme",
    "requests": 1204,
    "prompt_tokens": 380_112,
    "cached_tokens": 290_304,
    "output_tokens": 61_007,
}
_CHANGE = {
    "id": "17",
    "object": "audit_entry",
    "created": CREATED,
    "action": "adapter.rolled_back",
    "name": "legal",
    "detail": {"version": 1, "before": 2},
    "key": "key_0a1b2c3d4e5f6071",
    "key_name": "acme",
    "address": "192.0.2.7",
    "request_id": "5f0c6a1d2b3e4f60718293a4b5c6d7e8",
}

EXAMPLES: Mapping[str, Any] = {
    "ChatCompletion": {
        "id": "chatcmpl-301c26fee340456ba5abf55f2e2f7251",
        "object": "chat.completion",
        **_GENERATED,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris.", "refusal": None},
                **_END,
            }
        ],
        "usage": _USAGE,
    },
    "ChatCompletionChunk": {
        "id": "chatcmpl-301c26fee340456ba5abf55f2e2f7251",
        "object": "chat.completion.chunk",
        **_GENERATED,
        "choices": [{"index": 0, "delta": {"content": " Paris"}, "logprobs": None, "finish_reason": None}],
    },
    "Completion": {
        "id": "cmpl-301c26fee340456ba5abf55f2e2f7251",
        "object": "text_completion",
        **_GENERATED,
        "choices": [{"index": 0, "text": " Paris.", **_END}],
        "usage": _USAGE,
    },
    "CompletionChunk": {
        "id": "cmpl-301c26fee340456ba5abf55f2e2f7251",
        "object": "text_completion",
        **_GENERATED,
        "choices": [{"index": 0, "text": " Paris", "logprobs": None, "finish_reason": None}],
    },
    "Embeddings": {
        "id": "embd-301c26fee340456ba5abf55f2e2f7251",
        "object": "list",
        "created": CREATED,
        "model": BASE,
        "pooling": "last",
        "adapter": _GENERATED["adapter"],
        "data": [{"object": "embedding", "index": 0, "embedding": [0.28, -0.96]}],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    },
    "Scores": {
        "id": "score-301c26fee340456ba5abf55f2e2f7251",
        "object": "list",
        "created": CREATED,
        "model": BASE,
        "adapter": _GENERATED["adapter"],
        "data": [
            {
                "object": "score",
                "prompt": 0,
                "index": 0,
                "logprob": -0.5,
                "mean_logprob": -0.25,
                "tokens": 2,
                "is_greedy": True,
            }
        ],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    },
    "ResponseObject": {
        "id": "resp_301c26fee340456ba5abf55f2e2f7251",
        "object": "response",
        "created_at": CREATED,
        "completed_at": CREATED + 1,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        **_APPLIED,
        "output": [
            {
                "id": "msg_7a5d3ca9301540379c0a1ff60d4a1b4c",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {
                        "type": "output_text",
                        "text": "The capital of France is Paris.",
                        "annotations": [],
                        "logprobs": [],
                    }
                ],
            }
        ],
        "usage": {
            "input_tokens": 37,
            "input_tokens_details": {"cached_tokens": 32, "cache_write_tokens": 0},
            "output_tokens": 8,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 45,
        },
        "background": False,
        "instructions": None,
        "max_output_tokens": 32,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
        "user": None,
    },
    "ResponseEvent": {
        "type": "response.output_text.delta",
        "sequence_number": 4,
        "item_id": "msg_7a5d3ca9301540379c0a1ff60d4a1b4c",
        "output_index": 0,
        "content_index": 0,
        "delta": " Paris",
        "logprobs": [],
    },
    "MessageObject": {
        "id": "msg_301c26fee340456ba5abf55f2e2f7251",
        "type": "message",
        "role": "assistant",
        **_APPLIED,
        "content": [{"type": "text", "text": "The capital of France is Paris."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 32,
            "output_tokens": 8,
        },
    },
    "MessageEvent": {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": " Paris"},
    },
    "TokenCount": {"input_tokens": 37},
    "Tokens": {"count": 2, "max_model_len": 8192, "tokens": [504, 3575], "token_strs": None},
    "Detokenized": {"prompt": "The capital"},
    "TokenizerInfo": {
        "tokenizer_class": "TokenizersBackend",
        "model_max_length": 8192,
        "chat_template": "{% for message in messages %}...{% endfor %}",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    },
    "Key": _KEY,
    "NewKey": {**_KEY, "secret": "sk-ml-Xq3vY0m1V5bBvPz1mUO8ZQYv0mLqkqk0f1H5rJv2T4c"},
    "Keys": {"object": "list", "data": [_KEY], "has_more": False},
    "Whoami": {
        "object": "whoami",
        "keys": True,
        "id": "key_5f0c1d7a9b3e2846",
        "name": "acme",
        "scopes": ["infer"],
        "adapters": ["acme/*"],
        "limits": _KEY["limits"],
        "expires": None,
        "server": {
            "version": "1.0.0",
            "base": BASE,
            "base_fingerprint": CONTENT,
            "max_model_len": 8192,
            "max_rank": 256,
            "max_device_adapters": 16,
            "max_upload_bytes": 1_252_000_000,
            "max_data_bytes": 67_108_864,
            "max_body_bytes": 2_097_152,
            "model": None,
            "data_dir": None,
        },
        "features": ["chat"],
    },
    "TrainingData": {
        "object": "training_data",
        "report": {
            "files": [{"file": "rows.jsonl", "format": "alpaca", "rows": 200, "kept": 199, "unused_fields": ["id"]}],
            "rows": 200,
            "train": 179,
            "evaluation": 20,
            "general": 0,
            "mixed": 0,
            "tokens": 9120,
            "trained_tokens": 3071,
            "trained_share": 0.337,
            "longest": 120,
            "max_length": 1024,
            "truncated": 0,
            "left_out": {"duplicate": 1},
            "bad": [],
            "histogram": [{"from": 30, "to": 75, "rows": 140}, {"from": 76, "to": 121, "rows": 39}],
            "advice": ["rows.jsonl has fields that are not used: id."],
        },
        "rows": [
            {
                "source": "rows.jsonl:1",
                "tokens": 31,
                "trained": 9,
                "spans": [
                    {"text": "<|im_start|>user\nMay I sublet?<|im_end|>\n<|im_start|>assistant\n", "trained": False},
                    {"text": "Only with consent.<|im_end|>", "trained": True},
                    {"text": "\n", "trained": False},
                ],
            }
        ],
    },
    "Runs": {"object": "list", "data": [_RUN], "has_more": False, "complete": True},
    "RunDetails": {
        **_RUN,
        "settings": {"r": 16, "epochs": 3.0},
        "data": {"train": 180, "evaluation": 20, "tokens": 9120},
        "curves": {
            "loss": [[1, 2.13], [2, 1.71]],
            "evaluation": [[2, 1.84]],
            "learning_rate": [[1, 0.0002], [2, 0.0004]],
        },
        "samples": [
            {
                "source": "rows.jsonl:7",
                "messages": [{"role": "user", "content": "May I sublet?"}],
                "prompt": None,
                "wanted": "Only with consent.",
                "base": "Yes, of course!",
                "adapter": "Only with consent.",
            }
        ],
        "evaluation": None,
        "manifest": None,
        "published": [],
    },
    "Model": _MODEL,
    "Models": {
        "object": "list",
        "data": [_MODEL, {**_MODEL, "id": "legal", "root": CONTENT, "parent": BASE}],
        "has_more": False,
    },
    "Adapter": _ADAPTER,
    "RegisteredAdapter": {**_ADAPTER, "version": 2},
    "AdapterDetails": {
        **_ADAPTER,
        "version_details": [{"version": number, "created": CREATED, **_VERSION} for number in (1, 2)],
        "receipt": {"source": "hf://org/legal@0123456789abcdef0123456789abcdef01234567"},
        "card": {
            "markdown": "# legal\n\nA LoRA adapter.",
            "manifest": {"format": 1, "base_fingerprint": CONTENT},
            "curves": {"loss": [[1, 2.13]], "evaluation": [], "learning_rate": [[1, 0.0002]]},
            "samples": [],
        },
    },
    "Adapters": {
        "object": "list",
        "data": [_ADAPTER],
        "has_more": False,
        "refused": [],
        "store": {"bytes": 19_567_616, "quota_bytes": None},
    },
    "Alias": _ALIAS,
    "Aliases": {"object": "list", "data": [_ALIAS], "has_more": False},
    "Usages": {"object": "list", "data": [_USED], "has_more": False},
    "AuditEntries": {"object": "list", "data": [_CHANGE], "has_more": False},
    "Deleted": {"id": "legal", "object": "adapter", "deleted": True},
    "Status": {"status": "ready"},
    "Status 503": {"status": "draining"},
    "ServerVersion": {"version": "1.0.0", "base_fingerprint": CONTENT},
    "Index": {"name": "manylora", "version": "1.0.0", "model": BASE, "links": {"documentation": "/docs"}},
}
"""Name of a response model, where examples differ with its status -> an example."""

ERRORS: Mapping[int, tuple[str, str | None, str | None]] = {
    400: ("Unknown field `temprature`; did you mean `temperature`?", "temprature", "unknown_parameter"),
    401: ("The API key is not valid: it is unknown, expired or revoked.", None, "invalid_api_key"),
    403: ("This API key lacks the scope `adapters`.", None, "insufficient_permissions"),
    404: ("The model `nobody` does not exist.", "model", "model_not_found"),
    408: ("The body did not arrive in time.", None, None),
    409: ("`prod` is an alias already", None, "name_taken"),
    412: ("`legal` has changed since you looked; look again", "If-Match", "revision_mismatch"),
    413: ("The request body is too large.", None, None),
    415: ("To register an adapter, send `application/json`, or `multipart/form-data` to upload its files.", None, None),
    422: ("The adapter `legal` cannot be served: its rank 64 is above this server's --max-rank 32.", "adapter",
          "adapter_unavailable"),
    429: ("Too many requests are waiting; try again later.", None, "queue_full"),
    500: ("Internal server error. The server's log has the details under this request's id.", None, None),
    503: ("The server is shutting down and takes no new requests.", None, "draining"),
    504: ("The request's timeout has passed.", "timeout", "deadline_exceeded"),
    507: ("The disk has no room for the adapter.", None, "store_full"),
}  # fmt: skip
"""Status -> message, param and code of an example."""
