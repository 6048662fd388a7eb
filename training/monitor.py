"""What a run shows while it trains, its checkpoints every n steps, and the stop at a loss that is not finite."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

import distributed
import metrics
from cli import UserError, say
from data.dataset import Flickr8kDataset, Parts
from models.checkpoint import model_state
from training.boards import Boards
from training.runs import Run
from training.state import TrainState

NO_BAD_STEP = 2**31 - 1
SHOWN_NAMES = 10  # pictures in a message
SHOWN_CAPTIONS = 5  # validation captions printed after each epoch


class Monitor:
    """Watches a run: shows its steps and epochs, and refuses to write weights that are not finite."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state, self.config = run, state, run.config.train
        self.first_bad = torch.tensor(NO_BAD_STEP, dtype=torch.int32, device=state.model.device)
        self.boards = Boards(run.folder, run.config.model_dump(), self.config, state.progress.step)

    def watch(self, steps: Iterable[Parts], dataset: Flickr8kDataset, batches: Sequence[np.ndarray]) -> Iterator[Parts]:
        """Yield the steps behind a progress bar; `batches` are all of the epoch, by which `check_finite` names images.

        Args:
            steps: what this process still has to read.
        """
        progress = self.state.progress
        self.dataset, self.batches = dataset, batches
        done = sum(map(len, batches[: progress.batch]))
        with tqdm(total=len(dataset), initial=done, unit="caption", disable=distributed.bar_hidden()) as self.bar:
            self.bar.set_description(f"epoch {progress.epoch + 1}/{self.config.epochs}")
            yield from steps

    def after_step(self, nll: torch.Tensor, norm: torch.Tensor) -> None:
        """Log the step just taken, and save a checkpoint where one is due.

        Args:
            nll: this process's part of the batch's mean negative log-likelihood; norm: of the gradient.
        """
        progress, config = self.state.progress, self.config
        healthy = torch.stack([nll.detach().float().isfinite(), norm.detach().isfinite()]).all()
        self.first_bad = torch.where(healthy, self.first_bad, self.first_bad.clamp(max=progress.step - 1))
        self.bar.update(len(self.batches[progress.batch - 1]))
        if progress.batch % config.log_every == 0 or progress.batch == len(self.batches):
            self.check_finite()
            [loss] = distributed.total(nll.item())
            rate = self.state.optimiser.param_groups[0]["lr"]
            self.boards.scalars(progress.step, {"step/train_loss": loss, "step/lr": rate})
            if self.bar.disable:
                place = f"Epoch [{progress.epoch + 1}/{config.epochs}] Step [{progress.batch}/{len(self.batches)}]"
                say(f"{place} Loss {loss:.4f} Perplexity {perplexity(loss):.1f}")
            else:
                self.bar.set_postfix(loss=f"{loss:.3f}", perplexity=f"{perplexity(loss):.1f}")
        if progress.step % config.checkpoint_every == 0:
            self.save_checkpoint()
        if config.keep_every and progress.step % config.keep_every == 0:
            self.check_finite(weights=True)
            with self.state.ema.swapped_in():
                self.run.keep_step(progress.step, model_state(self.state.model))

    def save_checkpoint(self) -> None:
        """Write last.pth, unless a weight is not finite."""
        self.check_finite(weights=True)
        self.boards.flush()  # first, so that a resumed run has no gap in its curves
        self.state.save(self.run.last)

    def check_finite(self, weights: bool = False) -> None:
        """Raise UserError if the loss or gradient of a step was NaN or infinite, or, on request, if a weight is.

        The first bad step is kept on the device, so that a GPU is not waited for at every step. Call it on every rank.
        """
        trained = [p for p in self.state.model.parameters() if p.requires_grad] if weights else []
        progress = self.state.progress
        step = min(distributed.gather([int(self.first_bad)]))
        if step == NO_BAD_STEP and all(bool(p.isfinite().all()) for p in trained):
            return
        step = progress.step - 1 if step == NO_BAD_STEP else step
        batch = self.batches[progress.batch + step - progress.step] if hasattr(self, "batches") else ()
        names = list(dict.fromkeys(self.dataset.images[self.dataset.image_of[caption]] for caption in batch))
        shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
        raise UserError(
            f"the loss became NaN or infinite in step {step + 1} of {self.run.folder}, on {shown}; the last good "
            f"checkpoint is of step {self.state.saved_step}: look at these pictures and their captions, or train a new "
            "run with a lower train.lr"
        )

    def show_epoch(
        self,
        row: dict[str, float],
        captions: dict[str, str],
        references: dict[str, list[str]],
        val_set: Flickr8kDataset,
    ) -> None:
        """Show a row of loss_log.txt, the CIDEr-D of each of several datasets, and some captions."""
        shown = list(captions)[:: max(1, len(captions) // SHOWN_CAPTIONS)][:SHOWN_CAPTIONS]
        say(
            f"Epoch [{row['epoch']}/{self.config.epochs}] train loss {row['train_loss']:.3f} | "
            f"teacher-forced val: loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.1f} | "
            f"greedy val captions: BLEU-4 {row['val_bleu4']:.1f}, CIDEr {row['val_cider']:.1f}"
        )
        model, datasets = self.state.model, val_set.folders.group(captions)
        for prefix, _, images in datasets if len(val_set.folders.folders) > 1 else []:
            some, tokenise = {image: captions[image] for image in images}, metrics.batched(model.vocab.tokenise)
            scores = metrics.evaluate(some, references, tokenise, model.vocab.language, ["cider"]).corpus
            say(f"    {prefix.removesuffix('/')}: CIDEr {scores['cider']:.1f}")
        for image in shown:
            say(f"    {image}: {captions[image]}")
        scores = {f"epoch/{name}": row[name] for name in row.keys() - {"epoch", "step", "lr"}}
        self.boards.scalars(self.state.progress.step, scores)
        self.boards.captions(self.state.progress.step, self.state.model, val_set, shown)

    def show_end(self) -> None:
        """Print the best epoch, what was written, and the commands to use it."""
        progress, name = self.state.progress, self.run.name
        if progress.epoch < self.config.epochs:
            say(f"no better CIDEr for {self.config.patience} epochs: stopped early")
        best = progress.best
        say(f"best epoch {best['epoch']}: CIDEr {best['val_cider']:.1f}, BLEU-4 {best['val_bleu4']:.1f} (greedy, val)")
        files = "checkpoints.pth (the best epoch), last.pth (to resume), loss_log.txt, config.yaml"
        say(f"wrote {self.run.folder}/: {files}")
        scripts = ("inference_visualize.py", "evaluate.py --split val", "visualize_loss.py")
        say(f"next: {', '.join(f'python {script} --run {name}' for script in scripts)}")


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))
