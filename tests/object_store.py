"""A real server of S3's protocol on loopback, for tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "store-user", "AWS_SECRET_ACCESS_KEY": "store-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serve_bucket(name: str) -> Iterator[Any]:
    """Give boto3's client of a store with one empty bucket, whose address and keys the environment has."""
    boto3 = pytest.importorskip("boto3", reason="the s3 extra is not installed")
    moto = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
                patch.setenv(variable, value)
            patch.setenv("NO_PROXY", f"127.0.0.1,{os.environ.get('NO_PROXY', '')}")
            client = boto3.client("s3", region_name=KEYS["AWS_DEFAULT_REGION"])
            client.create_bucket(Bucket=name)
            yield client
    finally:
        server.stop()
