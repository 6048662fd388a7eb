"""Captions and references → scores, by pycocoevalcap, the scorer that papers use."""

from collections.abc import Callable

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider


def score(
    captions: dict[str, str], references: dict[str, list[str]], tokenise: Callable[[str], list[str]]
) -> dict[str, float]:
    """Score one caption per picture against its raw references, everything by picture id.

    Returns bleu1 … bleu4 and cider (CIDEr-D), x100 as in papers. The tokeniser is the vocabulary's own, which agrees
    with the Java PTBTokenizer on all but a few of Flickr8k's captions.
    """
    candidates = {image: [" ".join(tokenise(caption))] for image, caption in captions.items()}
    raw = {image: [" ".join(tokenise(text)) for text in references[image]] for image in captions}
    bleu, _ = Bleu(4).compute_score(raw, candidates, verbose=0)
    cider, _ = Cider().compute_score(raw, candidates)
    scores = {f"bleu{n}": 100 * value for n, value in enumerate(bleu, 1)}
    return scores | {"cider": 100 * float(cider)}
