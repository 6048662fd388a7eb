"""A GPU for tests on machines without one: tensors that are on `cuda` as far as Python sees, and refuse what CUDA does.

Their values lie in memory and PyTorch computes them on the processor, so that all code runs to its end, which it does
not with PyTorch's own FakeTensorMode, whose tensors have no values. What is refused: a tensor of one or more dimensions
that is in memory together with one on the GPU, but for copies and indices; and `.numpy()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
JOINED = {aten.cat, aten.stack}


class OnGpu(torch.Tensor):
    """A tensor on the GPU. PyTorch's C++ code takes it for one without values, and asks FakeGpu to compute with it."""

    value: torch.Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> "OnGpu":
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=GPU)  # which autocast looks at

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.value}, on the GPU"

    def tolist(self) -> Any:
        return self.value.tolist()

    def numpy(self, **_: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def __getitem__(self, place: Any) -> torch.Tensor:
        return super().__getitem__(without_lists(place))

    def __setitem__(self, place: Any, values: Any) -> None:
        super().__setitem__(without_lists(place), values)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return FakeGpu().__torch_dispatch__(func, types, args, kwargs)  # in another thread


class FakeGpu(TorchDispatchMode):
    """Computes with tensors on the GPU by their values, and makes those that are to be there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import takes seconds

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten.is_pinned.default:
            return False
        if func is aten._pin_memory.default:
            if isinstance(args[0], OnGpu):
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            return args[0].clone()
        tensors = list(tensors_in((args, *kwargs.values())))
        here = [each for each in tensors if isinstance(each, OnGpu)]
        if 0 < len(here) < len(tensors):
            assert not any(each.is_meta for each in tensors), "a tensor without values"
            refuse_mixed(func, args, kwargs)
        onto_gpu = bool(here) and func is not aten._local_scalar_dense.default
        if kwargs.get("device") is not None:
            onto_gpu = torch.device(kwargs["device"]).type in ("cuda", "meta")  # C++ says `meta`, as autograd does
            kwargs["device"] = "cpu"
        kwargs = {name: each_of(each, value_of) for name, each in kwargs.items()}
        found, known = func(*each_of(args, value_of), **kwargs), {id(each.value): each for each in here}

        def wrap(each: Any) -> Any:
            if id(each) in known:  # changed in place
                assert known[id(each)].shape == each.shape
                return known[id(each)]
            if not onto_gpu or not isinstance(each, torch.Tensor):
                return each
            if each.is_inference() == torch.is_inference_mode_enabled():
                return OnGpu(each)
            with torch.inference_mode(each.is_inference()):  # a view of an ordinary tensor is one, too
                return OnGpu(each)

        return each_of(found, wrap)


def without_lists(place: Any) -> Any:
    """Return an index whose lists are tensors, since C++ would make them where there are no values."""
    if isinstance(place, tuple):
        return tuple(map(without_lists, place))
    return torch.tensor(place) if isinstance(place, list) else place


@cache
def is_made_of_others(function: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def value_of(each: Any) -> Any:
    return each.value if isinstance(each, OnGpu) else each


def each_of(values: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value, or the values of a tuple or list, changed."""
    if type(values) in (tuple, list):
        return type(values)([each_of(each, change) for each in values])
    return change(values)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for each in values:
            yield from tensors_in(each)


def refuse_mixed(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError where CUDA does, for arguments of which one is on the GPU."""
    kind, first = function.overloadpacket, args[0]
    if kind in COPIES:
        return
    others = (first, *args[2:]) if kind in INDEXED else (args, *kwargs.values())  # indices may be in memory
    in_memory = [each for each in tensors_in(others) if not isinstance(each, OnGpu)]
    changed = kind in INDEXED or function._schema.is_mutable
    if any(each.ndim or kind in JOINED or (changed and each is first) for each in in_memory):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({kind})"
        )


@contextmanager
def fake_gpu(free: int = 1 << 30, bf16: bool = False) -> Iterator[torch.device]:
    """In this context PyTorch finds one GPU with so many bytes that are free, with or without bfloat16."""
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: bf16,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (free, free),
    }
    lifted, replaced = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)  # nn.LSTM is computed without it
        patch.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(is_capturing=lambda: False))
        torch._C._set_only_lift_cpu_tensors(True)  # of torch.tensor([1], device="cuda"), before the copy to the GPU
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
        try:
            with FakeGpu():
                yield GPU
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
            torch.__future__.set_overwrite_module_params_on_conversion(replaced)
