"""Train an image captioner.

python train.py                                     Flickr8k at archive/; without it, the built-in sample
python train.py --config configs/attention.yaml train.epochs=10 run=longer
python train.py --resume                            resume the newest run, as if it had never stopped
torchrun --nproc_per_node=8 train.py                data-parallel training
"""

from cli import UserError, answer_early, options, run_script, say

if __name__ == "__main__":
    answer_early(options.train, "PyTorch")  # --help and mistakes, before PyTorch is imported

import contextlib
from functools import partial

import numpy as np
import torch
from torch import nn

import distributed
import metrics
from captioning import caption_dataset, encode_dataset
from data.dataset import Flickr8kDataset, captions_per_step, make_batches, read_shares
from models import consensus
from models.checkpoint import check_parts, model_state
from models.model import CaptionModel
from training.losses import LOSSES, cross_entropy
from training.monitor import Monitor, perplexity
from training.optim import learning_rate
from training.runs import Run, open_run
from training.setup import Captions, features_of, make_datasets, make_model
from training.state import TrainState
from utils import StopRequest, load_checkpoint, save_checkpoint, seed_step

EVAL_BATCH = 256  # captions at once where no gradients are kept
STATISTICS = 2000  # training pictures that the mean and scale of features are estimated from


def main() -> int:
    with distributed.processes(), open_run(options.train()) as run:  # its folder is locked until the end
        # data and model: one row per caption, whatever the source; the vocabulary is built from training captions alone
        captions = Captions(run)
        model = make_model(run, captions)
        train_set, val_set = make_datasets(model, captions)

        # loss: cross-entropy or self-critical; state: optimiser, averaged weights, progress
        loss = LOSSES[run.config.train.loss](model, train_set)
        loss_fn = distributed.parallel(loss, model.precision)  # averages gradients over processes
        state = TrainState(model)
        if run.saved:
            distributed.on_first_rank(run.check_data, captions.table, captions.digests)
            state.restore(run.saved, run.last)
        else:
            if not run.config.train.start:
                model.fit_statistics(features_of(model, train_set, train_set.sample_images(STATISTICS)))
            run.begin(captions.table, captions.digests)  # removes what an earlier run of this name wrote

        if not fit(run, state, loss_fn, train_set, val_set, captions.references("val")):
            say(f"interrupted; resume with: python train.py --resume --run {run.name}")
            return 130
        if run.config.search.consensus:
            write_consensus(run, model, train_set)
        return 0


def fit(
    run: Run,
    state: TrainState,
    loss_fn: nn.Module,
    train_set: Flickr8kDataset,
    val_set: Flickr8kDataset,
    references: dict[str, list[str]],
) -> bool:
    """Train to the last epoch, or to early stopping; returns False if interrupted first."""
    progress, monitor = state.progress, Monitor(run, state)
    monitor.save_checkpoint()
    run.log(progress.history)
    with StopRequest() as stop:
        while not progress.is_finished(run.config.train):
            if not train_one_epoch(state, loss_fn, train_set, monitor, stop):
                monitor.save_checkpoint()
                return False
            monitor.check_finite(weights=True)
            with state.ema.swapped_in():  # validate and save the best checkpoint with the EMA weights
                row, captions = validate(state, val_set, references)
                state.end_epoch(row)
                if row is progress.best:
                    run.keep_best(model_state(state.model) | {"scores": row})
                monitor.show_epoch(row, captions, references, val_set)
            monitor.save_checkpoint()  # the epoch counts as finished once this is written
            run.log(progress.history)
    monitor.show_end()
    return True


def train_one_epoch(
    state: TrainState, loss_fn: nn.Module, dataset: Flickr8kDataset, monitor: Monitor, stop: StopRequest
) -> bool:
    """Take the remaining steps of the current epoch; returns False if interrupted first."""
    model, optimiser, progress, config = state.model, state.optimiser, state.progress, state.model.config.train
    rng = np.random.default_rng([config.seed, progress.epoch])  # for the order of the batches and each image's view
    batches = make_batches(dataset, captions_per_step(config, len(dataset)), groups_by_image(model), rng)
    dataset.start_epoch(config.seed, progress.epoch, rng)
    loss_fn.train()
    left = read_shares(dataset, batches[progress.batch :], config.num_workers, config.accumulate)
    for parts in monitor.watch(left, dataset, batches):
        for group in optimiser.param_groups:
            rate = learning_rate(progress.step, config.epochs * len(batches), config.warmup_steps, config.lr)
            group["lr"] = group["scale"] * rate
        seed_step(config.seed, progress.step, distributed.rank())  # so dropout and samples are repeatable

        optimiser.zero_grad()
        nll = torch.zeros((), device=model.device)
        for share, batch in parts:  # several, where gradients are accumulated
            with model.autocast():
                loss, part_nll = loss_fn(batch.to(model.device))
            (loss * share.fraction * distributed.size()).backward()  # the mean over processes, weighted by words
            nll += part_nll * share.fraction
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimiser.step()

        state.count_step(parts[0][0].batch_words, nll)
        monitor.after_step(nll, norm)  # logs, and saves every `checkpoint_every` steps
        if distributed.any_of(stop.requested):
            return False
    return True


@torch.inference_mode()
def validate(
    state: TrainState, val_set: Flickr8kDataset, references: dict[str, list[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Score the val set by teacher forcing and by greedy captions; returns a row of loss_log.txt, and the captions."""
    model = state.model.eval()
    features = val_set.features or encode_dataset(model, val_set.images, val_set.folders)  # while it is fine-tuned
    val_set = val_set.with_features(features)
    total, words = 0.0, 0
    for [(share, batch)] in read_shares(val_set, make_batches(val_set, EVAL_BATCH, groups_by_image(model), None)):
        batch = batch.to(model.device)
        with model.autocast():
            hidden, _ = model(batch.features, batch.inputs, batch.image_index)  # (N, T, H)
            _, nll = cross_entropy(model.decoder.output, hidden, batch.targets)
        total += float(nll) * share.fraction * share.batch_words
        words += share.batch_words
    loss = distributed.total(total)[0] / words

    captions = caption_dataset(model, features, val_set.images, model.config.search.greedy())
    tokenise, language = metrics.batched(model.vocab.tokenise), model.config.data.language
    score = partial(metrics.evaluate, captions, references, tokenise, language, ["bleu4", "cider"])
    scores = distributed.on_first_rank(score).corpus
    row = {
        "epoch": state.progress.epoch + 1,
        "step": state.progress.step,
        "lr": round(state.optimiser.param_groups[0]["lr"], 8),
        "train_loss": round(state.train_loss(), 4),
        "val_loss": round(loss, 4),
        "val_perplexity": round(perplexity(loss), 3),
        "val_bleu4": round(scores["bleu4"], 2),
        "val_cider": round(scores["cider"], 2),
    }
    return row, captions


def groups_by_image(model: CaptionModel) -> bool:
    """Whether all captions of a picture go into the same batch, so that it is read and encoded only once."""
    loss = LOSSES[model.config.train.loss]
    return loss.by_image or model.decoder.spatial or not model.config.encoder.frozen


def write_consensus(run: Run, model: CaptionModel, train_set: Flickr8kDataset) -> None:
    """Write consensus.pth, which re-ranks the captions of a beam by the human captions of similar training pictures."""
    best, path = load_checkpoint(run.best), run.best.with_name(consensus.FILE)
    check_parts(best, str(run.best))
    if best["config"] != run.config.model_dump():
        distributed.on_first_rank(save_checkpoint, run.best, best | {"config": run.config.model_dump()})
    with contextlib.suppress(UserError):  # missing or damaged: fitted below
        consensus.Consensus.load(path, model.encoder.feature_shape[-1], len(model.vocab))
        return
    if best["backbone"] is not None:
        model.encoder.backbone.load_state_dict(best["backbone"])
    images = train_set.sample_images(consensus.MAX_IMAGES)
    found = consensus.Consensus.fit(lambda part: features_of(model, train_set, list(part)), train_set, images)
    distributed.on_first_rank(found.save, path)
    say(f"wrote {path}: a beam's captions are re-ranked by the human captions of {len(images):,} training pictures")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
