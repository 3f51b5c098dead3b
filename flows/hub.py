"""An export on the hub of Hugging Face: what would go there, and the upload."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tasks.exporting.errors import ExportError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def describe_upload(folder: Path, repository: str) -> str:
    """Return what an upload would do, without asking the hub.

    Raises:
        ExportError: the hub takes no repository of this name.
    """
    _check_name(repository)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in files)
    lines = [f"  {file.stat().st_size / 2**20:10,.2f} MiB  {file.relative_to(folder).as_posix()}" for file in files]
    head = f"Would upload {len(files)} files, {total / 2**20:,.2f} MiB, to the private repository {repository}:"
    return "\n".join([head, *lines])


def upload(folder: Path, repository: str, version: str) -> str:
    """Upload a folder in one commit, by the login that huggingface_hub finds; return where it is.

    Raises:
        ExportError: the hub refused.
    """
    _check_name(repository)
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=version)
    except (HfHubHTTPError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"the hub did not take {version} as {repository}: {reason}: see hf auth login") from error
    return f"Uploaded to {done.commit_url}"


def _check_name(repository: str) -> None:
    if _NAME.fullmatch(repository) is None:
        raise ExportError(
            f"--push {repository}: OWNER/NAME is wanted, of letters, digits, dots, dashes and underscores"
        )
