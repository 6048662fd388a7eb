"""Train an image captioner: config → table → vocabulary → features → captions → checkpoints and a loss log."""

from cli import Parser, UserError, run_script

import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import distributed
import metrics
from config import Config, load_config, setting_names
from data import annotations, tars
from data.dataset import Batch, Features, Flickr8kDataset, Share, batch_indices
from data.features import encode_pictures
from data.stream import StreamedDataset
from data.words import cut
from models.consensus import MOST, Consensus, forget
from models.model import CaptionModel
from training.begin import build_model, make_datasets, report_data
from training.epoch import Epoch
from training.objectives import Objective, caption_loss
from training.optim import WeightAverage, clip_gradients, learning_rate, make_optimiser
from training.poison import Poison, is_finite, tell
from training.runs import claimed, refuse_existing, resume, start_run, write_log
from training.tensorboard import FOLDER, Board, find_writer
from utils import DAMAGED, RUNS, StopRequest, load_checkpoint, pick_device, pick_precision, save_checkpoint, seed_step

EVAL_BATCH = 256  # captions at once where no gradients are kept
STATISTICS = 2000  # training pictures whose features say how to standardise all
SHOWN = 5  # validation captions printed after each epoch


def main() -> int:
    with distributed.processes(), contextlib.ExitStack() as stack:
        return train(parse_args(), stack)


def train(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    if distributed.restarted():
        resume_after_restart(args)
    config, saved = resume(args) if args.resume else (choose_config(args), None)
    run = RUNS / config.run
    if config.train.tensorboard:
        distributed.on_first_rank(find_writer)
    distributed.on_first_rank(stack.enter_context, claimed(run))
    distributed.on_first_rank(refuse_existing, run, args, config)

    table = annotations.load(config.data, annotations.read_splits(run) if saved else None)
    shards = tars.find(config.data)
    report_data(table, shards, config)
    words = cut(table["caption"].tolist(), config.data.language, Path(config.data.cache))
    if saved:
        model = CaptionModel.from_state(saved, str(run / "last.pth"), args.overrides)
    else:
        in_train = (table["split"] == "train").to_numpy()
        model = build_model(config, lambda: tars.count_words(shards) if shards else words.of(in_train).count())
    device = pick_device()
    model.to(device)
    train_set, val_set = make_datasets(model, table, words, shards, device)

    trainer = Trainer(model, train_set, val_set, annotations.references(table[table["split"] == "val"]), run, device)
    if saved:
        trainer.restore(saved)
        if trainer.is_finished():
            again = f"python train.py --config {run}/config.yaml run=NAME train.start={run}/checkpoints.pth"
            print(f"{run} is finished; to train on: {again}")
        else:
            print(f"going on with {run} from step {trainer.progress.step}")
    else:
        if not config.train.start:
            model.fit_statistics(trainer.sample_features())
        distributed.on_first_rank(start_run, run, config, table)
    return trainer.fit()


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Train a captioner on Flickr8k, or, with no dataset at archive/, on the built-in sample.",
        epilog="Example: python train.py train.epochs=10 run=longer",
    )
    parser.add_argument("--config", metavar="FILE", help="a recipe laid over config.yaml, such as configs/sample.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with a run from its last step")
    parser.add_argument("--run", metavar="NAME", help="with --resume: the run to go on with (default: the newest)")
    parser.add_argument(
        "--overwrite", action="store_true", help="start again where a run of this name exists, and lose what it wrote"
    )
    return parser.parse_options_and_settings(setting_names())


def choose_config(args: argparse.Namespace) -> Config:
    """Return the recipe asked for; nothing asked for and no dataset at hand means the built-in sample."""
    if args.run:
        raise UserError(f"--run goes with --resume; name a new run with run={args.run}")
    config = load_config(args.config, args.overrides)
    asked = args.config or any(word.startswith("data.") for word in args.overrides)
    if asked or annotations.find_captions(config.data):
        return config
    print(f"There is no dataset at {config.data.root}/: training on the built-in sample (see README, Flickr8k).")
    return load_config(Path(__file__).parent / "configs" / "sample.yaml", args.overrides)


def resume_after_restart(args: argparse.Namespace) -> None:
    """Turn the arguments that started the run into ones that resume it, after torchrun has restarted its processes."""
    if args.resume:
        return
    run = choose_config(args).run
    args.resume, args.overwrite = (RUNS / run / "last.pth").is_file(), True
    if args.resume:
        args.run, args.config, args.overrides = run, None, []


@dataclass
class Progress:
    """Where a run stands, as plain values.

    Attributes:
        step: optimiser steps made; epoch: epochs finished.
        batch, words: batches and real words read in the epoch under way.
        history: one row of LOG_COLUMNS per finished epoch.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    words: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def end_epoch(self, row: dict[str, float]) -> None:
        self.history.append(row)
        self.epoch, self.batch, self.words = self.epoch + 1, 0, 0

    @property
    def best(self) -> dict[str, float]:
        """The row of the epoch with the best captions, or of equals the lowest loss; needs a finished epoch."""
        return max(self.history, key=lambda row: (row["val_cider"], -row["val_loss"]))


class Trainer:
    """The training loop and what it leaves in `run`: checkpoints.pth, last.pth and loss_log.txt."""

    def __init__(
        self,
        model: CaptionModel,
        train_set: Flickr8kDataset | StreamedDataset,
        val_set: Flickr8kDataset,
        val_references: dict[str, list[str]],
        run: Path,
        device: torch.device,
    ) -> None:
        self.model, self.run, self.device = model, run, device
        self.train_set, self.val_set, self.val_references = train_set, val_set, val_references
        self.config = model.config.train
        self.optimiser = make_optimiser(model)
        self.tokenise = partial(metrics.by_words, model.vocab.tokenise)
        self.precision = pick_precision(self.config.precision, device)
        self.objective: nn.Module = Objective(model, train_set)
        if distributed.size() > 1:
            self.objective = distributed.parallel(self.objective, self.precision)
        self.by_image = model.decoder.grid or not model.config.encoder.frozen
        self.progress = Progress()
        self.average = WeightAverage(model, self.config.ema)
        self.nll = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.poison = Poison(device)
        self.board = Board(None)
        self.under_way: Epoch | None = None
        self.kept = 0  # the step of last.pth

    def restore(self, saved: dict[str, Any]) -> None:
        try:
            self.optimiser.load_state_dict(saved["optimiser"])
            self.progress = Progress(**saved["progress"])
            self.nll.fill_(saved["nll"] if distributed.rank() == 0 else 0)
            self.average.restore(saved["averaged"])
        except DAMAGED:
            raise UserError(
                f"{self.run / 'last.pth'} is damaged, so training cannot go on; start the run again"
            ) from None
        self.kept = self.progress.step

    def save_last(self) -> None:
        """Write last.pth; to be called in all processes, of which the first one writes."""
        self.refuse_poison(is_finite(self.model))
        self.board.flush()
        [nll] = distributed.total(float(self.nll))
        if distributed.rank() == 0:
            state = {"optimiser": self.optimiser.state_dict(), "progress": asdict(self.progress), "nll": nll}
            save_checkpoint(self.run / "last.pth", self.model.state() | state | {"averaged": self.average.weights})
        self.kept = self.progress.step

    def fit(self) -> int:
        """Train to the last epoch, or until early stopping or an interrupt; returns the exit code."""
        self.save_last()
        distributed.on_first_rank(write_log, self.run / "loss_log.txt", self.progress.history)
        if self.config.tensorboard and distributed.rank() == 0:
            self.board = Board(self.run / FOLDER, self.progress.step + 1)
        with StopRequest() as stop:
            while not self.is_finished():
                if not self.train_epoch(stop):
                    self.save_last()
                    print(f"\nstopped; go on with: python train.py --resume --run {self.run.name}")
                    return 130
                self.finish_epoch()
        if self.progress.epoch < self.config.epochs:
            print(f"no better CIDEr for {self.config.patience} epochs: stopped early")
        if self.model.config.search.consensus:
            self.add_consensus()
        best = self.progress.best
        print(
            f"best epoch {best['epoch']}: CIDEr {best['val_cider']:.1f}, BLEU-4 {best['val_bleu4']:.1f} (greedy, val)"
        )
        print(f"wrote {self.run}/: checkpoints.pth (the best epoch), last.pth (to resume), loss_log.txt, config.yaml")
        scripts = ("inference_visualize.py", "evaluate.py --split val", "visualize_loss.py")
        print(f"next: {', '.join(f'python {script} --run {self.run.name}' for script in scripts)}")
        return 0

    @property
    def critical(self) -> bool:
        """Whether the epoch under way is self-critical, as the last ones may be."""
        return self.progress.epoch >= self.config.epochs - self.config.self_critical_epochs

    def is_finished(self) -> bool:
        """Whether all epochs are over, or the last `train.patience` ones have brought nothing."""
        progress, patience = self.progress, self.config.patience
        stalled = patience and progress.history and progress.epoch - progress.best["epoch"] >= patience
        return progress.epoch >= self.config.epochs or bool(stalled)

    def train_epoch(self, stop: StopRequest) -> bool:
        """Make the steps of the epoch that are still to be made, in an order drawn from (seed, epoch).

        Returns False when it was asked to stop before their end.
        """
        progress, config = self.progress, self.config
        epoch = self.under_way = Epoch(self.train_set, config, progress.epoch, self.by_image or self.critical)
        batches = len(epoch)
        if progress.step == 0 and config.warmup_steps > (steps := config.epochs * batches):
            print(
                f"warning: train.lr is never reached: train.warmup_steps={config.warmup_steps}, of {steps} steps in all"
            )
        self.model.train()
        if self.critical:
            disable_dropout(self.model)
        with tqdm(total=len(self.train_set), unit="caption", disable=distributed.bar_hidden()) as bar:
            bar.set_description(f"epoch {progress.epoch + 1}/{config.epochs}")
            for share, batch, captions in epoch.read(progress.batch):
                loss = self.step(batch, share, self.learning_rate(batches))
                bar.update(captions - bar.n)
                if progress.batch % config.log_every == 0 or progress.batch in epoch.ends:
                    self.log_step(bar, batches, loss)
                if progress.step % config.checkpoint_every == 0:
                    self.save_last()
                if distributed.any_of(stop.requested):
                    return False
        return True

    def learning_rate(self, batches: int) -> float:
        """Return that of the next step: each objective has its own warm-up and its own cosine down to 0."""
        config = self.config
        first, last, peak = 0, config.epochs - config.self_critical_epochs, config.lr
        if self.critical:
            first, last, peak = last, config.epochs, config.self_critical_lr
        step = (self.progress.epoch - first) * batches + self.progress.batch
        return learning_rate(step, (last - first) * batches, config.warmup_steps, peak)

    def step(self, batch: Batch, share: Share, lr: float) -> torch.Tensor:
        """Make one optimiser step, in which the processes weigh by their words; all noise is of (seed, step, rank).

        Returns this process's part of the unsmoothed loss per word.
        """
        config, progress = self.config, self.progress
        moved = batch.to(self.device)
        seed_step(config.seed, progress.step, distributed.rank())
        for group in self.optimiser.param_groups:
            group["lr"] = group["scale"] * lr
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            objective, loss = self.objective(moved, self.critical)
        self.optimiser.zero_grad()
        (objective * (share.part * distributed.size())).backward()
        norm = clip_gradients(self.optimiser, config.clip_norm)
        self.poison.note(progress.step, loss, norm)
        self.optimiser.step()
        self.average.update(progress.step)
        progress.step += 1
        progress.batch += 1
        progress.words += share.words
        part = loss * share.part
        self.nll += part * share.words
        return part

    def refuse_poison(self, healthy: bool = True) -> None:
        """Raise UserError when a loss or gradient was not finite, or what else was looked at; it is never written."""
        step = self.poison.step()
        if step is None and not healthy:
            step = self.progress.step - 1
        if step is not None:
            batch = self.progress.batch + step - self.progress.step
            pictures = self.under_way.pictures(batch) if self.under_way else []
            raise UserError(tell(step, pictures, self.run, self.kept))

    def log_step(self, bar: tqdm, batches: int, part: torch.Tensor) -> None:
        """Show the loss of this step on the bar, or as a line where there is no terminal."""
        self.refuse_poison()
        [loss] = distributed.total(part.item())
        self.board.step(self.progress.step, loss, self.optimiser.param_groups[0]["lr"])
        perplexity = math.exp(min(loss, 700))
        if bar.disable:
            place = f"Epoch [{self.progress.epoch + 1}/{self.config.epochs}] Step [{self.progress.batch}/{batches}]"
            print(f"{place} Loss {loss:.4f} Perplexity {perplexity:.1f}", flush=True)
        else:
            bar.set_postfix(loss=f"{loss:.3f}", perplexity=f"{perplexity:.1f}")

    def finish_epoch(self) -> None:
        """Validate, then write the checkpoints and the log; only last.pth says that the epoch is over."""
        self.refuse_poison(is_finite(self.model))
        self.model.eval()
        with self.average.lent():
            row = self.validate()
            self.progress.end_epoch(row)
            self.nll.zero_()
            if row is self.progress.best and distributed.rank() == 0:
                save_checkpoint(self.run / "checkpoints.pth", forget(self.model.state()) | {"scores": row})
        self.save_last()
        distributed.on_first_rank(write_log, self.run / "loss_log.txt", self.progress.history)

    def validate(self) -> dict[str, float]:
        """Score the validation captions; prints some, and returns the log's row of the epoch under way."""
        progress = self.progress
        val_set = copy.copy(self.val_set)
        val_set.features = self.encoded(val_set, val_set.images)
        loss = self.validation_loss(val_set)
        self.refuse_poison(math.isfinite(loss))
        captions = self.model.caption_all(val_set.features, val_set.images, self.model.config.search.greedy())
        scores = distributed.on_first_rank(metrics.score, captions, self.val_references, self.tokenise).corpus
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": round(self.optimiser.param_groups[0]["lr"], 8),
            "train_loss": round(distributed.total(float(self.nll))[0] / progress.words, 4),
            "val_loss": round(loss, 4),
            "val_perplexity": round(math.exp(min(loss, 700)), 3),
            "val_bleu4": round(scores["bleu4"], 2),
            "val_cider": round(scores["cider"], 2),
        }
        shown = list(captions)[:: max(1, len(captions) // SHOWN)][:SHOWN]
        self.report_epoch(row, {image: captions[image] for image in shown})
        self.board.epoch(row)
        self.board.pictures(progress.step, self.model, val_set, shown)
        return row

    def add_consensus(self) -> None:
        """Give checkpoints.pth, which does without until then, what `search.consensus` asks: what people say."""
        path, config = self.run / "checkpoints.pth", self.model.config.model_dump()
        saved = load_checkpoint(path)
        if saved.get("consensus") and saved["config"] == config:
            return
        known = saved.get("consensus") or self.fit_consensus(saved).state()
        distributed.on_first_rank(save_checkpoint, path, saved | {"consensus": known, "config": config})
        print(f"{path} ranks captions by what people say of {len(known['pictures']):,} training pictures, too")

    def fit_consensus(self, saved: dict[str, Any]) -> Consensus:
        """Return what people say of training pictures, as the backbone of the checkpoint `saved` sees them."""
        if saved["backbone"] is not None:
            self.model.encoder.backbone.load_state_dict(saved["backbone"])
        dataset, images = self.sample_pictures(MOST)
        return Consensus.of(lambda part: self.encoded(dataset, part).take(part), dataset, images)

    def report_epoch(self, row: dict[str, float], captions: dict[str, str]) -> None:
        print(
            f"Epoch [{row['epoch']}/{self.config.epochs}] train loss {row['train_loss']:.3f} | "
            f"teacher-forced val: loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.1f} | "
            f"greedy val captions: BLEU-4 {row['val_bleu4']:.1f}, CIDEr {row['val_cider']:.1f}"
        )
        for image, caption in captions.items():
            print(f"    {image}: {caption}")

    def sample_features(self) -> torch.Tensor:
        """Return features of some training pictures."""
        dataset, images = self.sample_pictures(STATISTICS)
        return self.encoded(dataset, images).take(images)

    def sample_pictures(self, most: int) -> tuple[Flickr8kDataset, list[str]]:
        """Return the first window of training pictures, and the names of at most so many, evenly spread over it."""
        dataset = self.train_set.windows([self.config.seed, 0])[0].open()
        return dataset, dataset.spread(most)

    def encoded(self, dataset: Flickr8kDataset, images: Sequence[str]) -> Features:
        """Return features of these pictures: those at hand, or, where the backbone is trained, fresh ones."""
        if dataset.features is not None:
            return dataset.features
        return encode_pictures(self.model, images, dataset.folder, self.device)

    @torch.inference_mode()
    def validation_loss(self, val_set: Flickr8kDataset) -> float:
        """Return the mean negative log-likelihood per word, by teacher forcing."""
        total, words = 0.0, 0.0
        for indices in distributed.share(batch_indices(val_set, EVAL_BATCH, self.by_image, rng=None)):
            batch = val_set.__getitems__(indices)
            moved = batch.to(self.device)
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                hidden, _ = self.model(moved.pictures, moved.inputs, moved.owner)
                loss = caption_loss(self.model.decoder.output, hidden, moved.targets, smoothing=0)[1]
            total += float(loss) * batch.words
            words += batch.words
        total, words = distributed.total(total, words)
        return total / words


def disable_dropout(model: CaptionModel) -> None:
    """Train on without dropout: the captions drawn are then those whose probability is trained."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        if isinstance(module, nn.LSTM):
            module.dropout = 0.0  # eval() would not do: cuDNN's LSTM has gradients in training mode alone


if __name__ == "__main__":
    sys.exit(run_script(main))
