"""Make a trained checkpoint fit to be given away: half as large, without paths and without other people's captions.

    python -m models.publish runs/pretrained-seed1/checkpoints.pth pretrained/captioner.pth
    python -m models.publish pretrained/captioner.pth hf://user/name

What is written is an ordinary checkpoint, which every script reads, or, on the Hugging Face Hub, a repository, which
they read as --checkpoint hf://user/name. Its search may be said anew: search.classes=2. Of consensus.pth, which holds
captions, it has only what models.compact_consensus makes of it. A model card is written beside it, as captioner.md,
unless there is one already.
"""

from cli import Parser, UserError, run_script, say  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import copy
import hashlib
from pathlib import Path
from typing import Any

import torch

from config import FREE, load_config, marked, setting_names
from models import hub
from models.card import make_card
from models.checkpoint import convert_floats, load_model, model_state
from models.compact_consensus import CompactConsensus
from models.consensus import Consensus
from models.ensemble import Ensemble
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint, write_atomically


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoints.pth of a run, or hf://user/name")
    parser.add_argument("out", metavar="FILE", help="what to write, or hf://user/name")
    parser.add_argument("--private", action="store_true", help="on the Hub: a repository that is made is private")
    card_help = "on the Hub: the model card, where there is none yet (default: CHECKPOINT's .md, or a new one)"
    parser.add_argument("--card", type=Path, metavar="FILE", help=card_help)
    args = parser.parse_options(setting_names())
    on_hub, card = hub.is_on_hub(args.out), args.card or Path(args.checkpoint).with_suffix(".md")
    if on_hub:
        hub.check_name(args.out)
    elif args.private or args.card:
        raise UserError("--private and --card go with a repository on the Hub; write to hf://user/name")
    if args.card and not card.is_file():
        raise UserError(f"there is no model card {card}; check the path, or leave --card out to have one made")
    if not on_hub and Path(args.out).exists():
        load_checkpoint(args.out)  # which refuses to write over anything else
    model = load_model(args.checkpoint, args.overrides)  # which refuses what is damaged
    scores, run = hub.read_checkpoint(args.checkpoint).get("scores"), Path(args.checkpoint).parent
    if on_hub:
        own_card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        say(f"wrote {push(model, args.out, args.private or None, scores=scores, card=own_card, run=run)}")
        say(f"next: python inference_visualize.py photo.jpg --checkpoint {args.out}")
        return
    out, checkpoint = Path(args.out), publishable(model, scores)
    save_checkpoint(out, checkpoint)
    content, card = out.read_bytes(), out.with_suffix(".md")
    say(f"wrote {out}: {len(content) / 1e6:.1f} MB, sha256 {hashlib.sha256(content).hexdigest()}")
    if card.exists():
        say(f"left {card} as it is; remove it to have a new model card")
    else:
        write_atomically(card, make_card(checkpoint, model.config, run, out.stem, out.name, content).encode())
        say(f"wrote {card}, a model card; say there what only you know")


def push(
    model: CaptionModel,
    name: str,
    private: bool | None = None,
    token: str | None = None,
    scores: dict[str, Any] | None = None,
    card: str | None = None,
    run: Path | None = None,
) -> str:
    """Put a model into the repository hf://user/name, with the model card, or one made of its `run`; see `hub.upload`.

    Returns the repository's address.
    """
    if isinstance(model.decoder, Ensemble):
        raise UserError(f"an ensemble is several models, and {name} holds one; put each into a repository of its own")
    hub.check_name(name)
    checkpoint = publishable(model, scores)
    files = hub.separate(checkpoint)
    title = hub.split_name(name)[0].rpartition("/")[2]
    card = card or make_card(checkpoint, model.config, run or Path(), title, hub.TENSORS, files[hub.TENSORS], name)
    return hub.upload(files | {hub.CARD: card.encode()}, name, private, token)


def publishable(model: CaptionModel, scores: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a model's checkpoint with its floats as halves, the settings of its machine as config.yaml has them, and
    a consensus without anybody's captions.
    """
    checkpoint = model_state(model) | ({"scores": scores} if scores else {})
    if model.confidence:
        checkpoint["confidence"] = model.confidence.state()
    kept = CompactConsensus.fit(model.consensus) if isinstance(model.consensus, Consensus) else model.consensus
    if isinstance(kept, CompactConsensus):
        checkpoint["consensus"] = kept.state
    config, usual = copy.deepcopy(checkpoint["config"]), load_config().model_dump()
    for name in marked(FREE):
        section, key = name.split(".")
        config[section][key] = usual[section][key]
    config["train"]["start"] = None  # a path, too
    source = checkpoint["encoder"]["source"]
    encoder = checkpoint["encoder"] | {"source": source and Path(source).name}
    return convert_floats(checkpoint, torch.float32, torch.float16) | {"config": config, "encoder": encoder}


if __name__ == "__main__":
    raise SystemExit(run_script(main))
