"""Several processes that work as one, started by torchrun: each takes its share, and learns what the others found.

Without torchrun every function here gives everything to the one process there is. Between GPUs, gradients are exchanged
by NCCL; all else, and everything on CPUs, by gloo.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from cli import UserError
from utils import hold

PATIENCE = timedelta(days=1)  # the first process may score or encode for long; of dead ones torchrun knows at once

Item = TypeVar("Item")
Result = TypeVar("Result")


def rank() -> int:
    """Return the number of this process among all; number 0 alone writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def restarts() -> int:
    """Return how often torchrun (`--max-restarts`) has started this job again after a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for the block; raises UserError when another one fails."""
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, each takes a GPU of its own, and "
                f"PyTorch finds {gpus}; start as many with --nproc_per_node={gpus}, or use the processors: put "
                "CUDA_VISIBLE_DEVICES= before the command"
            )
        torch.cuda.set_device(local)
    with contextlib.ExitStack() as stack:
        try:
            store, place, count = next(dist.rendezvous("env://"))
            if on_one_machine():  # under a name of this start: torchrun keeps the addresses of dead processes
                store = dist.PrefixStore(f"start-{restarts()}", store)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=place, world_size=count, timeout=PATIENCE)
            if rank():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
        except UserError:
            # torchrun (`--max-restarts`) on a single machine is not to repeat what only the user can mend
            if os.name == "posix" and on_one_machine() and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > restarts():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun passes it on before the sentence is printed
                os.kill(os.getppid(), signal.SIGTERM)
            raise
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                raise UserError("another process of this job has failed; its last message says why") from error
            raise
    dist.destroy_process_group()


def parallel(module: nn.Module, precision: torch.dtype) -> nn.Module:
    """Return `module` with gradients that are means over all processes; in bfloat16 where that is the precision."""
    if size() == 1:
        return module
    whole = DistributedDataParallel(module, forward_sync_buffers=False, gradient_as_bucket_view=True)
    if precision == torch.bfloat16:
        whole.register_comm_hook(None, bf16_compress_hook)
    return whole


def on_one_machine() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Return every n-th of these items, of n processes, beginning with this one's."""
    return items[rank() :: size()]


def gather(found: list[Result]) -> list[Result]:
    """Return what all processes have found, in the order of their ranks."""
    if size() == 1:
        return found
    parts: list[list[Result]] = [[]] * size()
    dist.all_gather_object(parts, found)
    return [each for part in parts for each in part]


def on_first_rank(function: Callable[..., Result], *args: object) -> Result:
    """Call the function in the first process, once all have come here, and return its result in all."""
    if size() == 1:
        return function(*args)
    wait()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function(*args)
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1]:
        raise box[1] if rank() == 0 else SystemExit(2)  # printed once
    return box[0]


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file `path`, see `utils.hold`, in the first process for all of this job until the block ends."""
    with hold(path, doing) if rank() == 0 else contextlib.nullcontext():
        wait()
        yield


def wait() -> None:
    """Wait until all processes have reached this call."""
    total(0)


def total(*values: float) -> list[float]:
    """Return the sums of these numbers over all processes."""
    if size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def any_of(flag: bool) -> bool:
    """Return whether the flag is up in any process."""
    return total(flag) != [0]


def bar_hidden() -> bool:
    """Whether progress bars stay away: there is no terminal, another process shows them, or nothing is to be shown."""
    return rank() > 0 or not sys.stderr.isatty() or getattr(sys.stdout, "name", "") == os.devnull
