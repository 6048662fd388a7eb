"""What runs on a GPU is what runs on the processor, as far as a machine without a GPU can tell: see `fake_gpu`.

Real tensors flow through all of training and captioning, so that code which mixes devices, or reads a tensor of the GPU
as if it were in memory, fails here as CUDA would let it fail. The GPU's own kernels are not tried: nn.LSTM is computed
without cuDNN, sums are in the processor's order, noise is drawn from the processor's generator (dropout and samples
differ on a real GPU), copies do not run beside computations, and several GPUs are not there. With a real GPU, all other
tests run on it, and these are skipped.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from dataset_files import run
from fake_gpu import fake_gpu

import calibrate
import distributed
import inference_visualize
import train
from captioning import Captioner, encode_dataset
from data.dataset import Batch
from data.features import Features
from data.folders import image_folders
from models.checkpoint import load_model
from models.model import Caption
from training.monitor import Monitor
from utils import PRETRAINED, load_checkpoint, pick_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, on which all other tests run")
SHORT = (
    *(*TINY, "encoder.name=efficientnet_lite0", "encoder.weights=IMAGENET1K_V1"),  # not inside checkpoints: quick
    *("train.epochs=1", "train.warmup_steps=1", "train.ema=0.5", "search.max_length=6", "decoder.num_heads=2"),
    *("search.consensus=5", "search.classes=2", "decoder.dropout=0", "train.log_every=1"),
)
ONE_STEP = "train.batch_size=40"  # all captions
DECODERS = ("lstm", "attention", "transformer")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with fake_gpu() as device:
        assert pick_device() == device
        yield device


def train_on_both(name: str, *words: str) -> None:
    """Train runs/cpu-NAME and runs/gpu-NAME, each with a cache of its own."""
    assert run(train.main, *SHORT, *words, f"run=cpu-{name}", "data.cache=cpu") == 0
    with fake_gpu():
        assert run(train.main, *SHORT, *words, f"run=gpu-{name}", "data.cache=gpu") == 0


@pytest.fixture(scope="module")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny dataset, and runs of each decoder on the CPU and on the GPU."""
    folder = tmp_path_factory.mktemp("devices")
    shutil.copytree(drawn, folder / "archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for decoder in DECODERS:
            train_on_both(decoder, f"decoder.name={decoder}")
    return folder


@pytest.fixture
def runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained / "runs"


def flat(values: Any, place: str = "") -> dict[str, Any]:
    """Return all that a checkpoint holds by its place in it."""
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {name: found for key, each in pairs for name, found in flat(each, f"{place}/{key}").items()}
    return {place: values}


def check_same(one: Path, other: Path) -> None:
    """Two runs have the same weights, averages and moments, and the same log."""
    for file in ("last.pth", "checkpoints.pth"):
        found, expected = (flat(torch.load(each / file, weights_only=True)) for each in (one, other))
        assert found.keys() == expected.keys()
        tensors = {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}
        assert len(tensors) > 10 and all(type(each) is torch.Tensor and each.is_cpu for each in tensors.values())
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert (one / "loss_log.txt").read_text() == (other / "loss_log.txt").read_text()


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_on_a_gpu_is_training_on_the_cpu_and_its_files_need_no_gpu(decoder: str, runs: Path) -> None:
    check_same(runs / f"gpu-{decoder}", runs / f"cpu-{decoder}")
    ours, theirs = (load_checkpoint(runs / f"{device}-{decoder}/consensus.pth") for device in ("gpu", "cpu"))
    torch.testing.assert_close(ours["embeddings"], theirs["embeddings"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_captions_of_a_gpu_are_those_of_the_cpu(decoder: str, runs: Path) -> None:
    """By a beam, ranked by consensus, with what the model looked at drawn."""
    checkpoint = runs / f"gpu-{decoder}" / "checkpoints.pth"
    words = ["--checkpoint", checkpoint, "--num-captions", "2", *(["--attention"] if decoder != "lstm" else [])]
    assert run(inference_visualize.main, *words, "--out", "by-cpu") == 0
    with fake_gpu():
        assert run(inference_visualize.main, *words, "--out", "by-gpu", "data.cache=gpu") == 0
    assert Path("by-gpu/predictions.json").read_text() == Path("by-cpu/predictions.json").read_text()


def test_self_critical_training_with_mirrored_views_and_the_consensus_reward(runs: Path) -> None:
    start = "train.start=runs/cpu-attention/checkpoints.pth"
    rewards = ("train.self_critical_samples=2", "train.self_critical_beam=true", "train.self_critical_consensus=1")
    train_on_both(
        "scst", "decoder.name=attention", "train.loss=self_critical", start, *rewards, "train.mirror=true", ONE_STEP
    )
    check_same(runs / "gpu-scst", runs / "cpu-scst")


def test_a_backbone_is_fine_tuned(runs: Path) -> None:
    train_on_both("fine", "encoder.frozen=false", "encoder.stages=['15']", "search.consensus=0", ONE_STEP)
    check_same(runs / "gpu-fine", runs / "cpu-fine")


def test_a_run_that_was_stopped_on_a_gpu_goes_on_there_and_on_the_cpu(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Monitor.after_step

    def stop(self: Monitor, *numbers: torch.Tensor) -> None:
        own(self, *numbers)
        os.kill(os.getpid(), signal.SIGINT)

    with fake_gpu(), monkeypatch.context() as patch:
        patch.setattr(Monitor, "after_step", stop)
        assert run(train.main, *SHORT, "decoder.name=lstm", "run=gpu-stopped", "data.cache=gpu") == 130
    shutil.copytree(runs / "gpu-stopped", runs / "cpu-stopped")
    with fake_gpu():
        assert run(train.main, "--resume", "--run", "gpu-stopped") == 0
    assert run(train.main, "--resume", "--run", "cpu-stopped", "data.cache=cpu") == 0
    for device in ("gpu", "cpu"):
        check_same(runs / f"{device}-stopped", runs / "cpu-lstm")


def test_bf16_is_the_precision_of_a_gpu_that_has_it(runs: Path) -> None:
    words = ("train.precision=auto", "run=bf16", "data.cache=gpu")
    with fake_gpu(bf16=True):
        assert run(train.main, *SHORT, *words) == 0
    rows = [(runs / name / "loss_log.txt").read_text().splitlines()[1].split() for name in ("bf16", "cpu-lstm")]
    losses = [float(row[4]) for row in rows]
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0] != losses[1]


def test_the_pretrained_captioner_sees_classes_and_says_how_sure_it_is(runs: Path) -> None:
    model = load_model(PRETRAINED, ["data.root=archive", "search.classes=2"])
    assert model.consensus and model.confidence
    features = encode_dataset(model, ["00.jpg"], image_folders(model.config.data))

    def use() -> tuple[Caption, torch.Tensor]:
        evidence, _ = calibrate.caption(model, ["00.jpg"])
        [[best]] = model.generate(features.take(["00.jpg"]))
        return best, evidence

    caption, evidence = use()
    with fake_gpu(bf16=model.precision == torch.bfloat16) as device:  # as here, so that its features are in the cache
        model.to(device)
        found, found_evidence = use()
    assert (found.text, found.perhaps) == (caption.text, caption.perhaps)
    assert found.confidence == pytest.approx(caption.confidence, abs=1e-3)
    torch.testing.assert_close(found_evidence, evidence, rtol=1e-3, atol=1e-3)


def test_an_ensemble_draws_captions(runs: Path) -> None:
    words = ["search.temperature=1", "search.consensus=0"]
    model = Captioner.load(["runs/gpu-attention/checkpoints.pth"] * 2, words).model
    features = torch.rand(3, *model.encoder.feature_shape)

    def draw() -> list[str]:
        torch.manual_seed(0)
        return [each.text for each, *_ in model.generate(features, None, 2, keep_attention=True)]

    on_cpu = draw()
    with fake_gpu() as device:
        model.to(device)
        assert draw() == on_cpu


def test_more_processes_than_gpus_is_one_sentence(
    gpu: torch.device, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "it", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with refused("started 2 processes", "PyTorch finds 1;", "--nproc_per_node=1"), distributed.processes():
        pass


def test_features_are_kept_on_a_gpu_if_they_take_no_more_than_half_of_what_is_free() -> None:
    for free, kept in ((801, True), (800, False)):
        features = Features([torch.arange(200.0).view(4, 50).half()], ["a", "b", "c", "d"])
        with fake_gpu(free) as device:
            features.move(device)
            assert features.files[0].is_cuda == kept
            assert features.take(["c", "a"]).cpu()[:, 0].tolist() == [100.0, 0.0]


def test_a_batch_goes_to_the_gpu_by_pinned_memory(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, own = [], torch.Tensor.pin_memory

    def pin(part: torch.Tensor) -> torch.Tensor:
        pinned.append(part.shape)
        return own(part)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    tokens, index = torch.ones(2, 3, dtype=torch.long), torch.arange(2)
    batch = Batch(torch.rand(2, 5, device=gpu), tokens, index, index, index > 0).to(gpu)
    assert all(part.device == gpu for part in vars(batch).values())
    assert pinned == [(2, 3), (2,), (2,), (2,)]


def test_the_fake_gpu_refuses_what_cuda_refuses(gpu: torch.device) -> None:
    on_gpu, in_memory = torch.arange(3.0, device=gpu), torch.arange(3.0)
    mixed: list[Callable[[], object]] = [
        lambda: on_gpu + in_memory,
        lambda: torch.stack([on_gpu.sum(), in_memory.sum()]),
        lambda: in_memory.sum().add_(on_gpu.sum()),
        lambda: on_gpu.index_put_((torch.tensor([0, 1]),), in_memory[:2]),
        lambda: in_memory[torch.tensor([0], device=gpu)],
        lambda: on_gpu.index_select(0, torch.tensor([0])),
        lambda: torch.nn.functional.linear(on_gpu, in_memory),
    ]
    for each in mixed:
        with pytest.raises(RuntimeError, match="same device"):
            each()
    for read in (on_gpu.numpy, lambda: np.asarray(on_gpu)):
        with pytest.raises(TypeError, match="can't convert cuda"):
            read()
    allowed = [on_gpu[torch.tensor([2, 0])], on_gpu[[2, 0]], on_gpu + torch.tensor(1.0), in_memory.to(gpu)]
    assert [each.device for each in allowed] == [gpu] * 4
    assert [each.tolist() for each in allowed] == [[2, 0], [2, 0], [1, 2, 3], [0, 1, 2]]
    assert type(on_gpu.cpu()) is torch.Tensor and on_gpu.cpu().tolist() == in_memory.copy_(on_gpu).tolist()
