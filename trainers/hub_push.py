"""Files of a LoRA into a repository of the Hugging Face Hub, in one commit.

The token is the hub's own (`hf auth login` or HF_TOKEN) and is never passed around or written.
Mirror and offline mode are the hub's own too: HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .checks import require
from .config import is_hub_id


def require_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it is the `owner/name` of a repository. Uses no network."""
    require(
        is_hub_id(repo_id),
        "The repository to upload to is named by its owner and its name, such as "
        f"your-name/my-lora, got {repo_id!r}.",
    )


def require_login() -> None:
    """Raises ValueError without a token of the hub, or if it is told to stay offline. Uses no
    network."""
    from huggingface_hub import constants, get_token

    require(
        not constants.HF_HUB_OFFLINE,
        "HF_HUB_OFFLINE forbids the upload to the Hugging Face Hub. Unset the variable and start "
        "ComfyUI again.",
    )
    require(
        get_token() is not None,
        "There is no login of the Hugging Face Hub. Run `hf auth login` with a token that may "
        "write, or start ComfyUI with HF_TOKEN set; then queue again.",
    )


def push(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    message: str,
    check_stop: Callable[[], None] = lambda: None,
) -> str:
    """Upload `files`, by their paths in the repository, in one commit; returns the page's address.

    The repository is made if it is not there; an existing one stays as public as it is. Files of
    the same path are replaced, others stay. Large files go first: until the commit nobody sees
    them, and a second try does not send them again.

    Args:
        private: of a repository that is made.
        check_stop: called between the large files and the commit; it raises to stop.

    Raises:
        ValueError: the id is none, there is no login, or the hub refuses.
    """
    require_repo_id(repo_id)
    require_login()
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    operations = [
        CommitOperationAdd(name, data if isinstance(data, bytes) else os.fspath(data))
        for name, data in files.items()
    ]
    api = HfApi(token=get_token())
    with _refusals(repo_id):
        page = api.create_repo(repo_id, private=private, exist_ok=True)
        api.preupload_lfs_files(repo_id, operations, free_memory=False)
        check_stop()
        api.create_commit(repo_id, operations, commit_message=message)
    return str(page)


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """What the hub's client raises becomes a sentence, as a ValueError."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError

    # requests' errors are OSErrors, hf_xet's are RuntimeErrors; those of httpx, which the hub uses
    # from 1.0 on, have only this base.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (OSError, RuntimeError, http_error) as error:
        status = _status(error)
        if status == 401:
            raise ValueError(
                f"{ENDPOINT} does not accept the token of your login. Run `hf auth login` again, "
                "or start ComfyUI with another HF_TOKEN."
            ) from error
        if status == 403:
            raise ValueError(
                f"Your token may not write to '{repo_id}'. Use a token of the role 'write', and a "
                "name of your own or of an organisation that you belong to."
            ) from error
        reason = str(error).partition("\n")[0] if status else type(error).__name__
        raise ValueError(
            f"'{repo_id}' could not be uploaded to {ENDPOINT} ({reason}). Nothing was committed: "
            "check the connection and queue again."
        ) from error


def _status(error: BaseException) -> int | None:
    """The status of the answer that the hub gave; uploads wrap it into another error."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    return _status(error.__cause__) if error.__cause__ else None
