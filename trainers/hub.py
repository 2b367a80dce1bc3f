"""A FLUX of a Hugging Face repository, in the hub's own cache; what every use of the hub needs.

Only this, `hub_dataset` and `hub_push` use the network, and only for a repository that the user
named. Token, mirror and offline mode are the hub's own: `hf auth login` or HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from .checks import require
from .config import is_hub_id
from .files import not_written
from .flux import FluxConfig
from .load import flux_config, inspect_flux
from .tensor_files import shapes_in_header

Kind = Literal["model", "dataset"]
"""Of a repository."""

_FOLDER, _INDEX = "transformer/", ".safetensors.index.json"


def require_hub_id(hub_id: str) -> None:
    """Raises ValueError unless it is the `owner/name` of a repository. Uses no network."""
    require(
        is_hub_id(hub_id),
        "A Hugging Face repository is named by its owner and its name, such as "
        f"black-forest-labs/FLUX.1-dev, got {hub_id!r}. Leave hub_id empty if none is meant.",
    )


def fetch_flux(
    hub_id: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """The FLUX of a repository: its folder `transformer` in diffusers' layout, else the only
    safetensors file beside its README, or the shards of one.

    What is whole in the hub's cache is taken without network; else its headers are looked at, and
    files are downloaded into the cache one after the other.

    Args:
        on_progress: called before each file; what it raises ends the download.

    Raises:
        ValueError: if the id is none, the repository is not there, is gated or holds no FLUX, or
            the hub or the disk refuses.
    """
    require_hub_id(hub_id)
    return _cached(hub_id) or _downloaded(hub_id, on_progress)


def inspect_hub_flux(hub_id: str) -> FluxConfig:
    """The sizes of a repository's FLUX. What is not in the hub's cache is not downloaded: only the
    headers of its files are read.

    Raises:
        ValueError: as `fetch_flux`.
    """
    require_hub_id(hub_id)
    path = _cached(hub_id)
    if path is not None:
        return inspect_flux(path).config
    with refusals(hub_id):
        return _config_in_headers(hub_id, _listed_files(hub_id))


def _cached(hub_id: str) -> Path | None:
    """Where the model is in the cache with every tensor of a FLUX, else None."""
    try:
        place = snapshot(hub_id)
        files = [file.relative_to(place).as_posix() for file in place.rglob("*")]
        path = _flux_path(place, _flux_files(hub_id, files))
        inspect_flux(path)
    except (OSError, ValueError):
        return None
    return path


def _downloaded(hub_id: str, on_progress: Callable[[int, int], None]) -> Path:
    from huggingface_hub import hf_hub_download

    with refusals(hub_id):
        names = _listed_files(hub_id)
        _config_in_headers(hub_id, names)  # before gigabytes of something else
        for done, name in enumerate(names):
            on_progress(done, len(names))
            hf_hub_download(hub_id, name)
        return _flux_path(snapshot(hub_id), names)


def _listed_files(hub_id: str) -> list[str]:
    from huggingface_hub import HfApi

    return _flux_files(hub_id, HfApi().list_repo_files(hub_id))


def _config_in_headers(hub_id: str, names: list[str]) -> FluxConfig:
    """Read from the first bytes of the files on the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    stored: dict[str, list[int]] = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                header = HfApi().parse_safetensors_file_metadata(hub_id, name)
            except (SafetensorsParsingError, struct.error) as error:
                raise ValueError(
                    f"'{name}' of the repository '{hub_id}' is not a whole safetensors file. "
                    "Name another repository."
                ) from error
            stored |= {tensor: info.shape for tensor, info in header.tensors.items()}
    return flux_config(shapes_in_header(stored), hub_id)


@contextmanager
def refusals(hub_id: str, kind: Kind = "model") -> Iterator[None]:
    """What the hub's client raises becomes a sentence, as a ValueError."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # requests' errors are OSErrors, hf_xet's are RuntimeErrors; those of httpx, which the hub uses
    # from 1.0 on, have only this base.
    page = f"{ENDPOINT}/{hub_id if kind == 'model' else f'datasets/{hub_id}'}"
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"'{hub_id}' is not in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE forbids "
            "its download. Unset the variable, or leave hub_id empty."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"The repository '{hub_id}' is gated. Accept its licence on {page}, then "
            "log in with `hf auth login`, or start ComfyUI with HF_TOKEN set."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no repository '{hub_id}' at {ENDPOINT}, or it is private. Check its name; "
            "for a private one log in with `hf auth login`, or start ComfyUI with HF_TOKEN set."
        ) from error
    except (OSError, RuntimeError, http_error) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise not_written(_repository(hub_id, kind), error) from error
        is_answer = isinstance(error, HfHubHTTPError)
        reason = str(error).partition("\n")[0] if is_answer else type(error).__name__
        raise ValueError(
            f"'{hub_id}' could not be downloaded from {ENDPOINT} ({reason}). Check the connection "
            "and queue again: what has arrived is kept."
        ) from error


def _repository(hub_id: str, kind: Kind) -> Path:
    """The repository's folder in the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{kind}s--{hub_id.replace('/', '--')}"


def snapshot(hub_id: str, kind: Kind = "model") -> Path:
    """Its main branch in the cache, by the cache's documented layout.

    The hub's own look-ups do not say whether a part of a repository is there, or want all of it.

    Raises:
        OSError: nothing of it was downloaded.
    """
    repository = _repository(hub_id, kind)
    return repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8")


def _flux_files(hub_id: str, files: list[str]) -> list[str]:
    """Those of a repository's files that make its FLUX.

    Raises:
        ValueError: if that cannot be told.
    """
    folder = [
        name
        for name in sorted(files)
        if name.startswith(_FOLDER) and name.endswith((".safetensors", ".json"))
    ]
    if any(name.endswith(".safetensors") for name in folder):
        return folder
    single = [name for name in files if "/" not in name and name.endswith(".safetensors")]
    indexes = [name for name in files if "/" not in name and name.endswith(_INDEX)]
    if len(indexes) == 1:  # a transformer alone, in shards
        return [*indexes, *sorted(single)]
    require(
        len(single) == 1,
        f"The repository '{hub_id}' has no folder transformer, and {len(single)} .safetensors "
        "files instead of one. Download the one you want into models/diffusion_models.",
    )
    return single


def _flux_path(place: Path, names: list[str]) -> Path:
    if names[0].endswith(_INDEX):
        return place
    return place / (_FOLDER if names[0].startswith(_FOLDER) else names[0])
