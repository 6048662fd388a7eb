"""Make a trained checkpoint fit to be given away: half as large, without paths and without other people's captions.

    python -m models.publish runs/pretrained-seed1/checkpoints.pth pretrained/captioner.pth

What is written is an ordinary checkpoint, which every script reads. Its search may be said anew: search.classes=2. Of
consensus.pth, which holds captions, it has only what models.compact_consensus makes of it. A model card is written
beside it, as captioner.md, unless there is one already.
"""

from cli import Parser, run_script, say  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import copy
from pathlib import Path
from typing import Any

import torch

from config import FREE, load_config, marked, setting_names
from models.card import make_card
from models.checkpoint import convert_floats, load_model
from models.compact_consensus import CompactConsensus
from models.consensus import Consensus
from models.encoder import file_sha256
from utils import load_checkpoint, save_checkpoint, write_atomically


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoints.pth of a run")
    parser.add_argument("out", type=Path, metavar="FILE", help="what to write")
    args = parser.parse_options(setting_names())
    model = load_model(args.checkpoint, args.overrides)  # which refuses what is damaged
    checkpoint = load_checkpoint(args.checkpoint)
    checkpoint["config"] = model.config.model_dump()  # without consensus, where there is no consensus.pth
    if isinstance(model.consensus, Consensus):
        checkpoint["consensus"] = CompactConsensus.fit(model.consensus).state
    save_checkpoint(args.out, publishable(checkpoint))
    sha256, card = file_sha256(args.out), args.out.with_suffix(".md")
    say(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, sha256 {sha256}")
    if card.exists():
        say(f"left {card} as it is; remove it to have a new model card")
    else:
        write_atomically(card, make_card(checkpoint, args.checkpoint.parent, args.out, sha256).encode())
        say(f"wrote {card}, a model card; say there what only you know")


def publishable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with its floats as halves, and the settings of its machine as config.yaml has them."""
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
