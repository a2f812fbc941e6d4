"""Last part of every engine's step: from a hidden state to the row's next token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from dualkl.heads import PreparedHead, prepare_head
from stages.engine.protocol import Sampling
from stages.engine.sampling import choose
from stages.engine.slots import SlotState
from stages.models import pretrained


class Sampler:
    """Samples each row's next token with a model's head and records it in the row's state."""

    def __init__(self, model: PreTrainedModel, sampling: Sampling, device: torch.device) -> None:
        self._model, self._sampling = model, sampling
        self._eos = torch.tensor(sampling.eos_ids, dtype=torch.long, device=device)
        self._head: PreparedHead | None = None

    def draw(self, state: SlotState, hidden: Float[Tensor, "B d"]) -> Int[Tensor, " B"]:
        """The sampled tokens, including those of dead slots."""
        uniforms, forced = state.next_inputs()
        chosen = choose(self.logits(hidden), uniforms, forced, self._sampling)
        state.record(chosen, self._eos)
        return chosen.token

    def logits(self, hidden: Float[Tensor, "B d"]) -> Float[Tensor, "B V"]:
        """Unrounded float32, as in the loss: rounding to bfloat16 moves logits near 25 by up to 1/16 nat."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            if self._head is None:  # its products are in the dtype of the hidden states
                head = pretrained.head_of(self._model)
                self._head = prepare_head(head, hidden, len(head.weight))
            return self._head.logits(hidden.to(self._head.weight_Vd.dtype))[:, : self._sampling.vocab_size]
