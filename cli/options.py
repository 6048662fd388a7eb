"""The command line of each script, and what is wrong with it, found before PyTorch is imported: that takes seconds."""

from cli import Parser, UserError  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
from importlib.util import find_spec
from pathlib import Path

from config import Config, check_overrides, load_config, setting_names
from data.folders import caption_files, datasets, find_captions, pictures_at
from models.hub import check_name, is_on_hub
from utils import LANGUAGES, find_run

PROJECT = Path(__file__).parents[1]
SPLITS = ["train", "val", "dev", "test"]
TOKENISERS = ["auto", "ptb", "words", "characters"]
LOSS_LOG = "loss_log.txt"
MOST_CAPTIONS = 100  # of a picture, as search.beam has it
MEAN = "mean"  # --attention without a head


def train() -> argparse.Namespace:
    parser = Parser(
        description="Train a captioner on Flickr8k, or, with no dataset at archive/, on the built-in sample.",
        epilog="Example: python train.py train.epochs=10 run=longer",
    )
    recipe = "a recipe laid over config.yaml: a file, or a name in configs/; several are laid one over the other"
    parser.add_argument("--config", action="append", metavar="FILE", help=recipe)
    parser.add_argument("--resume", action="store_true", help="resume a run from its last checkpoint")
    parser.add_argument("--run", metavar="NAME", help="with --resume: which run (default: the newest)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing run of this name; what it wrote is deleted"
    )
    changed = "with --resume: go on although captions or splits have changed since the run began"
    parser.add_argument("--changed-data", action="store_true", help=changed)
    parser.add_argument("--quiet", action="store_true", help="print nothing but what goes wrong")
    args = parser.parse_options(setting_names())
    if args.resume:
        if args.config:
            raise UserError("--resume keeps a run's own settings; leave --config out and name the run: --run NAME")
        names = [word.removeprefix("run=") for word in args.overrides if word.startswith("run=")]
        args.overrides = [word for word in args.overrides if not word.startswith("run=")]
        check_overrides(args.overrides)
        args.run = args.run or next(iter(names), None)
        find_run("last.pth", args.run)
        return args
    if args.run:
        raise UserError(f"--run goes with --resume; name a new run with run={args.run}")
    if args.changed_data:
        raise UserError("--changed-data goes with --resume; a new run takes the data as it is")
    refuse_root()
    choose_config(args)
    return args


def choose_config(args: argparse.Namespace) -> tuple[Config, str]:
    """Return the recipe asked for; with nothing asked for and no dataset at hand, that of the built-in sample, and a
    note that says so.
    """
    config = load_config([find_recipe(name) for name in args.config or []], args.overrides)
    asked = args.config or any(word.startswith("data.") for word in args.overrides)
    parts = [part for _, part in datasets(config.data)]
    if asked or any(map(find_captions, parts)):
        if not config.data.shards and config.data.format != "sample":
            for part in parts:
                caption_files(part)  # which says where there is none
        return config, ""
    note = f"There is no dataset at {config.data.source}/: training on the built-in sample (see README, Flickr8k)."
    return load_config([PROJECT / "configs" / "sample.yaml"], args.overrides), note


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: at this path, here or in the project, or in configs/ under this name."""
    path = Path(name)
    places = [path, PROJECT / path, *(PROJECT / "configs" / each for each in (path.name, f"{path.name}.yaml"))]
    return next((place for place in places if place.is_file()), path if path.suffix else places[-1])


def refuse_root() -> None:
    """Raise UserError in the root of the file system, where runs/ and cache/ would go."""
    here = Path.cwd()
    if here == Path(here.anchor) and here != PROJECT:
        raise UserError(
            f"runs/ and cache/ are written to the current folder, which is {here}; change to another one first: "
            f"cd {PROJECT}"
        )


def inference_visualize() -> argparse.Namespace:
    parser = Parser(
        description="Caption the test (or val) pictures of the newest run, or any pictures of your own.",
        epilog="Example: python inference_visualize.py holiday/ 'cats/*.jpg' --out holiday_captions. "
        "The search can be changed: search.beam=3 search.length_penalty=1, or search.temperature=0.8 "
        "search.top_p=0.9 to draw captions, the same ones each time; config.yaml lists all of search.*",
    )
    add = parser.add_argument
    add("--images", nargs="+", default=[], metavar="PATH", help="picture files, folders or globs")
    add_model = parser.add_mutually_exclusive_group().add_argument
    checkpoint = "a checkpoints.pth, or hf://user/name on the Hugging Face Hub, or hf://user/name@revision "
    checkpoint += "(default: the newest run's; for your own pictures, of those that learned from "
    checkpoint += "photographs, or pretrained/captioner.pth); repeat it and several models write together"
    add_model("--checkpoint", action="append", metavar="FILE", help=checkpoint)
    add_model("--run", metavar="NAME", help="take this run's checkpoint")
    add_model("--language", choices=LANGUAGES, help="take the captioner in pretrained/ that writes English, or Chinese")
    add("--split", choices=SPLITS, help="the pictures, where none are named (default: test, or val where it is empty)")
    add("--limit", type=positive, metavar="N", help="caption the first N pictures only")
    several = f"the best N captions of each picture, by a beam of at least N (default: 1; at most {MOST_CAPTIONS})"
    add("--num-captions", type=captions, default=1, metavar="N", help=several)
    attention = "draw the attention of each word: the mean over the decoder's heads, or one of them, counted from 1"
    add("--attention", nargs="?", const=MEAN, metavar="HEAD", help=attention)
    add("--sidecars", action="store_true", help="write photo.txt beside each picture, too, as image trainers read it")
    existing = "what --sidecars and --embed do where there is a text or description already (default: skip)"
    add("--existing", choices=["skip", "overwrite", "append"], help=existing)
    embed = "write the caption into each picture's metadata (XMP, IPTC), too: of copies, or of the originals themselves"
    add("--embed", nargs="?", const="copies", choices=["copies", "originals"], help=embed)
    add("--out", metavar="FOLDER", help="where to write (default: the run's folder, or with your pictures this one)")
    add("--quiet", action="store_true", help="print captions and what goes wrong, nothing else")
    args = parser.parse_options(setting_names(), "pictures", "--images")
    if args.attention and args.attention != MEAN and Path(args.attention).exists():
        args.pictures, args.attention = [*args.pictures, args.attention], MEAN
    args.images = [*args.pictures, *args.images]
    if (args.sidecars or args.embed) and not args.images:
        raise UserError("--sidecars and --embed write beside or into pictures of your own; name them, too")
    if args.existing and not (args.sidecars or args.embed):
        raise UserError(f"--existing {args.existing} says what --sidecars or --embed do; give one of them, too")
    args.existing = args.existing or "skip"
    if args.embed and not find_spec("pyexiv2"):
        raise UserError("--embed needs pyexiv2; install it: pip install -r requirements-extras.txt")
    if args.images and args.split:
        raise UserError(f"--split {args.split} and {args.images[0]} both say which pictures; give one of them")
    check_overrides(args.overrides)
    for pattern in args.images:
        found, notes = pictures_at(pattern, first=True)
        if not found:
            where = "in the folder" if Path(pattern).is_dir() else "at"
            raise UserError("; ".join([f"there is no picture {where} {pattern}", *(notes or ["check the path"])]))
    check_model(args)
    if args.language and not args.images:
        raise UserError("--language takes a captioner that belongs to no run; name the pictures to caption, too")
    return args


def evaluate() -> argparse.Namespace:
    parser = Parser(
        description="Score the captions of a run, or of another system, against the references of a split.",
        epilog="Example: python evaluate.py --run flickr8k --split val search.beam=3",
    )
    add, add_what = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    several = "a checkpoints.pth, or hf://user/name (default: the newest run's); repeat it to score several models as "
    several += "one ensemble"
    add_what("--checkpoint", action="append", metavar="FILE", help=several)
    add_what("--predictions", metavar="FILE", help="score captions in COCO's results form, of any system")
    add_what("--compare", nargs="+", metavar="RUN", help="one table of runs that were scored before")
    add("--run", metavar="NAME", help="score this run, or with --predictions take its references")
    split = "default: test, or val where it is empty; with --compare val, or test where only that is scored"
    add("--split", choices=SPLITS, help=split)
    tokeniser = "ptb as in papers (needs Java), words (without Java), characters (for Chinese); auto chooses (default)"
    add("--tokeniser", choices=TOKENISERS, default="auto", help=tokeniser)
    add("--out", metavar="FOLDER", help="where to write (default: beside the checkpoint or the predictions)")
    args = parser.parse_options(setting_names(), "runs")
    take_run(args)
    check_overrides(args.overrides)
    if args.checkpoint and args.run:
        raise UserError("--checkpoint and --run both say which model; give one of them")
    if not args.compare and not args.predictions:
        check_model(args)
    return args


def visualize_loss() -> argparse.Namespace:
    example = "Example: python visualize_loss.py --run flickr8k attention"
    parser = Parser(description="Draw the loss curve of a run, or of several to compare them.", epilog=example)
    run = "names or folders of runs (default: the newest)"
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help=run)
    where = "picture to write (default: loss_curve.png, in the folder of the run if it is only one)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    args = parser.parse_options(rest="runs")
    args.run = [*args.runs, *args.run]
    for name in args.run or [None]:
        find_run(LOSS_LOG, name)
    return args


def calibrate() -> argparse.Namespace:
    parser = Parser(
        description="Fit how sure a captioner is of its captions, and store that in its checkpoint.",
        epilog="Example: python calibrate.py --run attention",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", action="append", metavar="FILE", help="a checkpoints.pth (default: the newest run's)"
    )
    which.add_argument("--run", metavar="NAME", help="take this run's checkpoint")
    parser.add_argument("--out", metavar="FOLDER", help="where the diagram is written (default: beside the checkpoint)")
    args = parser.parse_options(setting_names(), "runs")
    take_run(args)
    check_overrides(args.overrides)
    check_model(args)
    for name in filter(is_on_hub, args.checkpoint or []):
        raise UserError(
            f"the calibration is stored in the checkpoint, and {name} is only read; make a file of it to calibrate: "
            f"python -m models.publish {name} mine.pth"
        )
    return args


def serve() -> argparse.Namespace:
    parser = Parser(
        description="Caption pictures over HTTP: POST /caption.",
        epilog="Example: python -m serve --checkpoint hf://user/name --port 9000 search.beam=3",
    )
    which = parser.add_mutually_exclusive_group()
    checkpoint = "a checkpoints.pth, or hf://user/name (default: the newest run's that learned from photographs, or "
    checkpoint += "pretrained/captioner.pth); repeat it and several models write together"
    which.add_argument("--checkpoint", action="append", metavar="FILE", help=checkpoint)
    which.add_argument("--run", metavar="NAME", help="take this run's checkpoint")
    which.add_argument("--language", choices=LANGUAGES, help="take the captioner in pretrained/ for this language")
    host = "the address to listen at (default: 127.0.0.1, which only this machine reaches)"
    parser.add_argument("--host", default="127.0.0.1", help=host)
    parser.add_argument("--port", type=port, default=8000, help="default: 8000; 0 takes any that is free")
    parser.set_defaults(images=True)  # pictures of one's own: which captioner they get by default
    args = parser.parse_options(setting_names())
    check_overrides(args.overrides)
    check_model(args)
    for package in ("fastapi", "fastapi_offline", "uvicorn", "python_multipart"):
        if not find_spec(package):
            raise UserError(f"serving needs {package}; install it: pip install -r requirements-extras.txt")
    return args


def take_run(args: argparse.Namespace) -> None:
    """Take a run or a checkpoint that is named without an option for one with it: `evaluate.py runs/x`."""
    for name in args.runs:
        if args.run or args.checkpoint:
            raise UserError(f"{name} is one model too many; give one, or several with --checkpoint")
        if Path(name).is_file() or is_on_hub(name):
            args.checkpoint = [name]
        else:
            args.run = name


def check_model(args: argparse.Namespace) -> None:
    """Raise UserError where there is no checkpoint of the name given, or of the run; the Hub is not asked yet."""
    for number, path in enumerate(args.checkpoint or []):
        if is_on_hub(path):
            check_name(path)
            continue
        if (Path(path) / "checkpoints.pth").is_file():  # a run's folder
            args.checkpoint[number] = path = f"{path}/checkpoints.pth"
        if not Path(path).is_file():
            raise UserError(f"there is no checkpoint at {path}; check the path, or train one with: python train.py")
    if args.run or not (args.checkpoint or getattr(args, "images", None) or getattr(args, "language", None)):
        find_run("checkpoints.pth", args.run)


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def captions(text: str) -> int:
    if (number := positive(text)) > MOST_CAPTIONS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_CAPTIONS}")
    return number
