"""A Llama-shaped model in fewer kernel launches: the model's own linear layers, with Triton kernels between them.

transformers' model is not changed and remains the reference: :class:`TritonDecoder` uses its modules and weights.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from server.compute.attention import AttentionParams, PagedAttention
from server.compute.cuda.fused_ops import apply_rotary, rms_norm, silu_and_mul
from server.compute.llama import is_llama_shaped
from server.compute.model_inputs import ForwardOutput

log = logging.getLogger(__name__)


class TritonDecoder:
    """The forward pass of a model. A :data:`server.compute.model_inputs.ModelForward`."""

    def __init__(self, model: Any, attention: Mapping[int, AttentionParams]) -> None:
        """For models that :meth:`if_supported` accepts."""
        self._model = model
        self._attention = attention

    @classmethod
    def if_supported(cls, model: Any, attention: Mapping[int, AttentionParams]) -> Self | None:
        """A decoder for ``model``, or None, with a line in the log, if the kernels cannot compute its layers.

        ``attention``: layer -> scale, window and softcap of its attention.
        """
        reason = _unsupported_reason(model)
        if reason is None:
            return cls(model, attention)
        log.info("Norms, rotary positions and activations run as transformers' modules, which is slower: %s", reason)
        return None

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        paged: PagedAttention,
        keep: Tensor | int = 0,
        hidden_rows: Tensor | None = None,
    ) -> ForwardOutput:
        """Token ids [1, rows], positions [1, rows], rows whose logits and hidden states are needed."""
        model = self._model.model
        x: Tensor = model.embed_tokens(ids)[0]
        cosine, sine = (angles[0] for angles in model.rotary_emb(x, positions))
        delta: Tensor | None = None
        for index, layer in enumerate(model.layers):
            delta = self._attend(index, _norm(layer.input_layernorm, x, delta), (cosine, sine), paged)
            mlp, inputs = layer.mlp, _norm(layer.post_attention_layernorm, x, delta)
            delta = mlp.down_proj(silu_and_mul(mlp.gate_proj(inputs), mlp.up_proj(inputs)))
        hidden = None if hidden_rows is None else _norm(model.norm, *_take(x, delta, hidden_rows)).float()
        if isinstance(keep, Tensor):
            x, delta = _take(x, delta, keep)
        logits: Tensor = self._model.lm_head(_norm(model.norm, x, delta))
        return ForwardOutput(logits.float(), hidden)

    def _attend(self, index: int, x: Tensor, angles: tuple[Tensor, Tensor], paged: PagedAttention) -> Tensor:
        """Output of the layer's attention [rows, hidden], to be added to the residual."""
        module = self._model.model.layers[index].self_attn
        q, k, v = (project(x) for project in (module.q_proj, module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            norms = (module.q_norm.weight, module.k_norm.weight)
            apply_rotary(q, k, angles, norms, module.q_norm.variance_epsilon)
        else:
            apply_rotary(q, k, angles)
        q, k, v = (t.view(len(x), -1, module.head_dim) for t in (q, k, v))
        out: Tensor = module.o_proj(paged.attend(index, q, k, v, self._attention[index]).flatten(1))
        return out


def _take(x: Tensor, delta: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Copies of ``rows``."""
    return x[rows], delta if delta is None else delta[rows]


def _norm(module: Any, x: Tensor, delta: Tensor | None) -> Tensor:
    """Add ``delta`` to ``x`` in place and return the norm of that."""
    return rms_norm(x, module.weight, module.variance_epsilon, delta)


def _unsupported_reason(model: Any) -> str | None:
    """Why the kernels cannot compute this model's layers; None if they can."""
    if not is_llama_shaped(model):
        return f"no kernels for the layers of {type(model).__name__}"
    dtype: torch.dtype = model.model.embed_tokens.weight.dtype
    if any(weight.dtype != dtype for weight in _norm_weights(model.model)):
        return f"its norms are not in {dtype}"
    return None


def _norm_weights(model: Any) -> Iterator[Tensor]:
    return (parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight"))
