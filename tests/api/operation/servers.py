"""Servers for tests of whole processes. Each function runs in a process of its own, see :mod:`tests.api.forks`."""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bases import interrupts
from server.api.serve import DrainingServer
from server.api.service import Service
from server.engine.sequence import Batch, StepResult
from server.listener import bind
from server.watchdog import EXIT_STATUS
from tests.api import forks
from tests.api.live import enduring_model, tiny_service
from tests.tiny import VOCABULARY, tiny_model


def serve(service: Service) -> None:
    """Serve until the process ends, as ``manylora serve`` does."""
    logging.basicConfig(level=logging.INFO)
    interrupts.exit_on_sigint()
    with bind("127.0.0.1", 0) as listener, interrupts.sigint_raises():
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is not read stays in the server
        listener.listen()
        forks.ready(listener.getsockname()[1])
        DrainingServer(service).run(sockets=[listener])
    if service.engine.hangs:
        os._exit(EXIT_STATUS)


def enduring(root: Path, **settings: Any) -> None:
    """A server of the model whose answers take seconds."""
    serve(tiny_service(root, enduring_model(), cpu="torch", max_model_len=16384, **settings))


def tiny(root: Path, **settings: Any) -> None:
    """A server of the tiny model."""
    serve(tiny_service(root, tiny_model(), max_rank=16, **settings))


def wide(root: Path, **settings: Any) -> None:
    """A server of a model whose rows take a megabyte each."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=65536,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    serve(tiny_service(root, LlamaForCausalLM(config), cpu="torch", **settings))


def hanging(root: Path, **settings: Any) -> None:
    """A server whose steps hang while there is a file ``hang`` in its folder."""
    service = tiny_service(root, tiny_model(), **settings)
    run = service.engine.runner.run

    def hangs(batch: Batch) -> StepResult:
        while (root / "hang").exists():
            time.sleep(0.05)
        return run(batch)

    service.engine.runner.run = hangs  # type: ignore[method-assign]
    serve(service)
