"""Captioners on the Hugging Face Hub, named hf://user/name or hf://user/name@revision.

A repository holds model.safetensors with all tensors, config.json with all else that a checkpoint has, and README.md,
the model card. What comes from there is not trusted: sizes and kinds are checked, and nothing in it is executed. The
settings of the machine it was made on, such as its folders, are not taken over.

PyTorch is imported by the functions that need it, so that scripts can answer a wrong name before.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from cli import UserError, shorten
from config import FREE, Section, flatten, marked, restore_config
from utils import CHECKPOINT_FORMAT, as_json, load_checkpoint

if TYPE_CHECKING:
    import torch

PREFIX = "hf://"
NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
TENSORS, REST, CARD = "model.safetensors", "config.json", "README.md"
LIMITS = {TENSORS: 8 * 2**30, REST: 16 * 2**20}  # bytes: a backbone of four billion halves, a million words
GROUPS = ("decoder", "backbone", "consensus")  # parts of a checkpoint that are tensors by name
SINGLE = ("feature_mean", "feature_scale")  # and those that are one tensor


class Words(Section):
    words: list[str]
    language: str


class Shown(Section):
    """A `data.transforms.Transform`."""

    image_size: Annotated[int, Field(ge=1, le=1024)]  # as encoder.image_size: a larger one could fill the memory
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]


class Backbone(Section):
    """An `EncoderCNN.identity`."""

    name: str
    source: str | None
    sha256: str
    stride_in_1x1: bool


class Sureness(Section):
    """The state of a `models.confidence.Confidence`."""

    weights: list[float]
    bias: float


class Rest(BaseModel, strict=True):
    """What config.json holds; keys that others have added to it are left out."""

    format: Literal["image-captioning/2"]
    config: dict[str, Any]
    vocabulary: Words
    transform: Shown
    encoder: Backbone
    confidence: Sureness | None = None
    scores: dict[str, Any] | None = None


def is_on_hub(name: str | Path) -> bool:
    """Whether a checkpoint is named as one on the Hub; what only begins like that is explained by `split_name`."""
    return str(name).startswith("hf:")


def split_name(name: str) -> tuple[str, str | None]:
    """Return user/name and the revision in hf://user/name@revision; raises UserError for another form."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(
            f"{shorten(name)} names nothing on the Hugging Face Hub; write hf://user/name or hf://user/name@revision"
        )
    return found[1], found[2]


def check_name(name: str) -> None:
    """Raise UserError for a name that is none, and where the packages for the Hub are missing."""
    split_name(name)
    for package in ("huggingface_hub", "safetensors"):
        if not find_spec(package):
            raise UserError(f"{name} needs {package}; install it: pip install -r requirements-extras.txt")


def read_checkpoint(name: str | Path, token: str | None = None) -> dict[str, Any]:
    """Return the checkpoint in a file, or of a repository on the Hub; see `load_checkpoint` and `download`."""
    if not is_on_hub(name):
        return load_checkpoint(name)
    return read_folder(download(str(name), token), str(name))


def download(name: str, token: str | None = None) -> Path:
    """Return the folder in the Hub's cache with the files of hf://user/name, downloaded where the cache lacks them.

    Without a network, or with HF_HUB_OFFLINE=1, it is what the cache has. `token` is as in huggingface_hub: by default
    that of HF_TOKEN or of `hf auth login`. Raises UserError where there is no such captioner, or no access to it.
    """
    check_name(name)
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, revision = split_name(name)
    with explained(name):
        found: dict[str, int] | None = None
        try:
            found = sizes(HfApi(token=token).model_info(repository, revision=revision, files_metadata=True))
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (errors.HTTPError, errors.OfflineModeIsEnabled):
            pass  # what the cache has may do
        if found is not None:
            check_sizes(found, name)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(LIMITS), token=token))


def sizes(info: Any) -> dict[str, int]:
    """Return the size in bytes of each file that a huggingface_hub.ModelInfo lists."""
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def check_sizes(found: dict[str, int], where: str) -> None:
    """Raise UserError where, of these files, a captioner's are missing or too large to be read."""
    for file in [file for file in LIMITS if file not in found]:
        raise UserError(
            f"{where} holds no {file}, so it is no captioner of this project; name another one, or make one with: "
            "python -m models.publish"
        )
    for file in [file for file, most in LIMITS.items() if found[file] > most]:
        raise UserError(
            f"{file} of {where} has {found[file] / 2**20:,.0f} MiB, and at most {LIMITS[file] / 2**20:,.0f} are read; "
            "name another captioner"
        )


def read_folder(folder: Path, where: str) -> dict[str, Any]:
    """Return the checkpoint in a folder's model.safetensors and config.json, of the form of `models.checkpoint`.

    Settings of the machine that it was made on are this one's. Raises UserError, which names `where` they are from, for
    files that are damaged, or another model's.
    """
    files = [file for file in LIMITS if (folder / file).is_file()]
    check_sizes({file: (folder / file).stat().st_size for file in files}, where)
    try:
        rest = Rest.model_validate_json((folder / REST).read_bytes())
    except ValidationError as error:
        wrong = [".".join(map(str, each["loc"])) for each in error.errors(include_url=False, include_input=False)]
        if "format" in wrong or "" in wrong:
            raise UserError(
                f"{where} is another model, no captioner of this project ({CHECKPOINT_FORMAT}); name another one"
            ) from None
        raise UserError(f"{shorten(wrong[0])} in {REST} of {where} is damaged; name another captioner") from None
    fixed = {name: value for name, value in flatten(rest.config).items() if name not in {*marked(FREE), "train.start"}}
    config = restore_config(fixed, where=where).model_dump()
    source = rest.encoder.source and Path(rest.encoder.source).name  # a path elsewhere is no path here
    known = rest.model_dump(exclude_unset=True) | {"config": config, "transform": rest.transform.model_dump()}
    return known | {"encoder": rest.encoder.model_dump() | {"source": source}} | read_tensors(folder / TENSORS, where)


def read_tensors(path: Path, where: str) -> dict[str, Any]:
    """Return the tensors of a checkpoint by its parts; the backbone is None, and consensus left out, where missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError:
        raise UserError(f"{TENSORS} of {where} is damaged; download it again, or name another captioner") from None
    parts: dict[str, Any] = {group: {} for group in GROUPS}
    for name, tensor in tensors.items():
        group, _, inner = name.partition(".")
        if name not in SINGLE and not (group in GROUPS and inner):
            raise UserError(f"{TENSORS} of {where} holds {shorten(name)}, which no captioner has; name another one")
        (parts[group] if inner else parts)[inner or name] = tensor
    if not parts["consensus"]:
        del parts["consensus"]
    return parts | {"backbone": parts["backbone"] or None}


def separate(checkpoint: dict[str, Any]) -> dict[str, bytes]:
    """Return the files that hold a checkpoint's tensors, named `decoder.output.weight` and so on, and all else."""
    import safetensors.torch

    tensors: dict[str, torch.Tensor] = {name: checkpoint[name] for name in SINGLE}
    for group in GROUPS:
        tensors |= {f"{group}.{name}": tensor for name, tensor in (checkpoint.get(group) or {}).items()}
    rest = {name: checkpoint[name] for name in Rest.model_fields if checkpoint.get(name) is not None}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {TENSORS: safetensors.torch.save(whole), REST: as_json(rest | {"format": CHECKPOINT_FORMAT})}


def upload(files: dict[str, bytes], name: str, private: bool | None = None, token: str | None = None) -> str:
    """Put files into the repository hf://user/name, which is made where there is none; returns its address.

    A model card that is there already stays. Raises UserError where that is not permitted, and where the repository
    holds another model.
    """
    check_name(name)
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    repository, revision = split_name(name)
    api = HfApi(token=token)
    with explained(name, "write"):
        address = api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = sizes(api.model_info(repository, revision=revision, files_metadata=True))
        if LIMITS.keys() & there.keys():
            check_sizes(there, name)
            own = Path(hf_hub_download(repository, REST, revision=revision, token=token)).read_bytes()
            if f'"{CHECKPOINT_FORMAT}"'.encode() not in own:
                raise UserError(f"{name} holds another model, which stays as it is; name another repository")
        added = [
            CommitOperationAdd(file, content) for file, content in files.items() if file != CARD or file not in there
        ]
        api.create_commit(repository, added, commit_message="A captioner", revision=revision)
    return str(address)


@contextlib.contextmanager
def explained(name: str, what: str = "read") -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError of one sentence about hf://user/name."""
    from huggingface_hub import constants, errors

    access = "log in with: hf auth login, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated; ask for access on its page, {constants.ENDPOINT}/{split_name(name)[0]}, then {access}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name.partition('@')[0]} has no revision {split_name(name)[1]}; name another one") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"there is no {name}, or it is private; check the name, or {access}") from None
    except errors.HFValidationError:
        raise UserError(f"{name} is no name that the Hugging Face Hub allows; check it") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = error if isinstance(error, errors.HTTPError) else error.__cause__
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if status in (401, 403):
            raise UserError(f"there is no permission to {what} {name}; {access}, of an account that may") from None
        if status:
            raise UserError(f"{constants.ENDPOINT} answered {status} about {name}; try again later") from None
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{name} is not in the cache, and HF_HUB_OFFLINE is set; unset it to download it") from None
        raise UserError(
            f"cannot reach {constants.ENDPOINT} for {name}, and the cache lacks it; check the network"
        ) from None
