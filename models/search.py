"""Caption search, written once for every decoder: batched, and knowing nothing but the decoder interface."""

import torch

from data.vocab import EOS, PAD, SOS, UNK
from models.decoder import Decoder


@torch.inference_mode()
def greedy(decoder: Decoder, features: torch.Tensor, max_length: int) -> torch.Tensor:
    """Follow the most probable word at each step, never `<pad>`, `<sos>` or `<unk>`.

    Args:
        features: (B, D) or (B, L, D).
        max_length: number of words after which a caption without `<eos>` is taken as it is.

    Returns word ids (B, T), T ≤ max_length, each row filled with `<eos>` behind its end.
    """
    memory = decoder.prepare(features)
    state = decoder.start(memory)
    token = torch.full((len(features),), SOS, device=features.device)  # (B,)
    ended = torch.zeros_like(token, dtype=torch.bool)
    written = []
    for _ in range(max_length):
        logits, state, _ = decoder.step(token, state, memory)  # (B, V)
        logits[:, [PAD, SOS, UNK]] = -torch.inf
        token = logits.argmax(1).masked_fill(ended, EOS)
        ended |= token == EOS
        written.append(token)
        if ended.all():
            break
    return torch.stack(written, dim=1)  # (B, T)
