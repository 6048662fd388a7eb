"""Simulate a dataset that is larger than memory: `python -m benchmarks.stream 1000000` prints what training takes.

Captions and features are made up and kept as `data.tars` and `data.features` would keep them, then read for an epoch
by the code that trains; of its steps, which take long and whose number memory does not depend on, STEPS are made.
"""

from cli import Parser, run_script

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import EACH, PeakMemory, make_config, make_words
from config import Config, setting_names
from data import tars
from data.dataset import Flickr8kDataset
from data.features import Shard, cache_place, identity
from data.stream import StreamedDataset
from data.transforms import WHOLE
from data.vocab import Vocabulary, build_vocab
from models.model import CaptionModel
from train import Trainer
from training.epoch import Epoch
from utils import pick_device, write_atomically

PICTURES = 1000  # in a tar
DIFFERENT = 2500  # words, few enough that any number of captions has all of them: models are then of one size
STEPS = 200


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=int, help="such as 1000000, a multiple of 5000")
    args = parser.parse_options_and_settings(setting_names())
    with tempfile.TemporaryDirectory() as folder:
        config = write_tars(Path(folder), args.captions)
        print(json.dumps(train(config, Path(folder))))


def write_tars(root: Path, captions: int) -> Config:
    """Write what is left of tars with so many captions once they are encoded, and return how to train on it."""
    last = captions // (PICTURES * EACH) - 1
    config = make_config(root, f"data.shards={root}/{{00000..{last:05}}}.tar", "data.min_count=1")
    rng, device = np.random.default_rng(0), pick_device()
    model = CaptionModel.build(config, Vocabulary(["<pad>", "<sos>", "<eos>", "<unk>"]))
    made_by = identity(model, device, WHOLE)
    rows = rng.random((PICTURES, *model.encoder.feature_shape), dtype=np.float32).astype(np.float16)
    for tar in tars.named(config.data):
        tar.stamp, tar.pictures = [tar.path.name, 0, 0], PICTURES
        names = [f"{number:06}" for number in range(PICTURES)]
        tars.write_index(tar, names, [EACH] * PICTURES, make_words(PICTURES * EACH, rng, DIFFERENT))
        shard = Shard(cache_place(model, made_by) / tar.place.name, tar, model.encoder.feature_shape, made_by)
        shard.place.mkdir(parents=True)
        np.save(shard.place / "features.npy", rows)
        manifest = shard.manifest()[0] | {"rows_done": PICTURES}
        write_atomically(shard.place / "manifest.json", json.dumps(manifest).encode())
    return config


def train(config: Config, root: Path) -> dict[str, Any]:
    """Read an epoch and make some of its steps; returns what was read, and the peak of memory."""
    device = pick_device()
    with PeakMemory() as peak:
        shards = tars.find(config.data)
        vocab = build_vocab(tars.count_words(shards), config.data.min_count)
        model = CaptionModel.build(config, vocab).to(device)
        train_set = StreamedDataset(shards, model, [], device)
        trainer = Trainer(model, train_set, no_captions(model), {}, root / "run", device)
        model.fit_statistics(trainer.sample_features())
        epoch = Epoch(train_set, config.train, 0, trainer.by_image)
        every = max(1, len(epoch) // STEPS)
        for number, (share, batch, _) in enumerate(epoch.read(0)):
            if number % every == 0:
                trainer.step(batch, share, config.train.lr)
    return {
        "captions": len(train_set),
        "vocabulary": len(vocab),
        "windows": len(epoch.windows),
        "batches": len(epoch),
        "memory_gb": peak.gb,
        "bytes_per_caption": sum((tar.place / tars.INDEX).stat().st_size for tar in shards) / len(train_set),
    }


def no_captions(model: CaptionModel) -> Flickr8kDataset:
    table = tars.held_out(model.config.data)
    return Flickr8kDataset(table, model.vocab, Path(), model.transform)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
