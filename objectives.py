"""What training makes small."""

import torch
import torch.nn.functional as F

from data.vocab import PAD


def caption_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the label-smoothed objective and the plain negative log-likelihood, both means over real words.

    Args:
        logits: (N, T, V); targets: (N, T), `<pad>` where a caption has ended.
    """
    real = targets != PAD  # (N, T)
    log_probs = F.log_softmax(logits[real].float(), dim=-1)  # (words, V)
    nll = -log_probs.gather(1, targets[real].unsqueeze(1)).mean()
    if smoothing == 0:
        return nll, nll.detach()
    return (1 - smoothing) * nll - smoothing * log_probs.mean(), nll.detach()


def uneven_looking(attention: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the doubly stochastic penalty (Xu et al. 2015, equation 14): each cell wants to be looked at once.

    Args:
        attention: (N, T, A, L), each map of sum 1; targets: (N, T), `<pad>` where a caption has ended.
    """
    real = (targets != PAD)[:, :, None, None]  # (N, T, 1, 1)
    return (1 - (attention * real).sum(1)).square().mean()
