"""Write any dataset as WebDataset tar shards: python -m data.write_tars tars data.root=archive"""

from cli import Parser, UserError, run_script, say  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli.files import read_file
from config import DataConfig, load_config, setting_names
from data import annotations, tars
from data.folders import PICTURE_SUFFIXES, image_folders
from data.splits import SPLIT_SEED


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder for them")
    parser.add_argument("--pictures", type=int, default=5000, metavar="N", help="in each tar (5000)")
    args = parser.parse_options(setting_names())
    config = load_config(overrides=args.overrides).data
    tars.expand("")  # says what to install, before any work
    written = write(config, args.out, max(1, args.pictures))
    pattern = f"{args.out.as_posix()}/{{00000..{written - 1:05}}}.tar"
    say(f'wrote {written:,} tars; train on them with: python train.py "data.shards={pattern}"')


def write(config: DataConfig, folder: Path, pictures: int) -> int:
    """Write a dataset as tars of so many pictures, in an order drawn once; returns how many tars."""
    from webdataset import TarWriter

    table, folders = annotations.load(config), image_folders(config)
    rows = list(table.groupby(["image", "image_id", "split"], sort=False)["caption"])
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} has tars already; name another folder")
    for image in table["image"][~table["image"].str.lower().str.endswith(PICTURE_SUFFIXES)][:1]:  # not found again
        raise UserError(f"{image} ends in none of {', '.join(PICTURE_SUFFIXES)}; rename it, in the captions too")
    starts = range(0, len(rows), pictures)
    for file, first in enumerate(tqdm(starts, unit="tar", disable=None)):
        unfinished = folder / f"{file:05}.unfinished"
        with open(unfinished, "wb") as stream, TarWriter(stream, mtime=0) as tar:
            for number in range(first, min(first + pictures, len(rows))):
                (image, image_id, split), captions = rows[order[number]]
                entry = {"image_id": image_id, "image": image, "captions": captions.tolist(), "split": split}
                ending = Path(image).suffix.lower().removeprefix(".")
                content = read_file(folders.path(image), tars.MOST_BYTES)
                tar.write({"__key__": f"{number:09}", ending: content, "json": json.dumps(entry).encode()})
        unfinished.rename(unfinished.with_suffix(".tar"))
    return len(starts)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
