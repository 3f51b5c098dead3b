"""Clients of object stores: pyarrow's own, for S3, Google's and Azure's.

Credentials come from the environment, in the ways of each one's own tools.
"""

import os
from functools import cache
from typing import Any

STORES = ("s3", "gs", "az")
_AZURE_KEY = "AZURE_STORAGE_ACCOUNT_KEY"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")


def open_store(scheme: str, bucket: str) -> Any:
    """Return the client of a store (pyarrow.fs.FileSystem), whose paths begin with the bucket."""
    if scheme == "az":
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
        return _open_client("AzureFileSystem", account_name=account, account_key=os.environ.get(_AZURE_KEY))
    if scheme == "gs":
        return _open_client("GcsFileSystem")
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        from pyarrow import fs  # type: ignore[import-untyped]

        region = fs.resolve_s3_region(bucket)
    # pyarrow gives up after 3 seconds; a store that lists ten thousand names, or is busy, takes longer.
    options: dict[str, Any] = {"request_timeout": 60, "connect_timeout": 20}
    # A file of less than 10 MB is then one request, and not the three of an upload in parts.
    options["allow_delayed_open"] = True
    return _open_client("S3FileSystem", region=region, endpoint_override=endpoint, **options)


@cache
def _open_client(name: str, **options: Any) -> Any:
    """Return a client of pyarrow's; a process keeps it."""
    from pyarrow import fs

    return getattr(fs, name)(**options)
