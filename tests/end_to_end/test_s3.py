"""Artifacts on an S3-compatible store: the MLflow server alone has its keys, clients need none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service import processes, servers
from flows.service.databases import prepare_databases
from flows.service.settings import ServiceSettings, read_settings
from schemas.artifacts import Ref
from schemas.loading import parse_config
from tasks import storage, tracking
from tests.end_to_end.service import BASE_MODEL, free_port

pytestmark = pytest.mark.slow
boto3 = pytest.importorskip("boto3", reason="the s3 extra is not installed")
moto = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
_KEYS = {"AWS_ACCESS_KEY_ID": "store-user", "AWS_SECRET_ACCESS_KEY": "store-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def store() -> Iterator[str]:
    """A real S3 protocol server on loopback with one empty bucket."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server._port}"
    _client(address).create_bucket(Bucket="models")
    yield address
    server.stop()


@pytest.fixture
def settings(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceSettings]:
    """An MLflow server that keeps artifacts in the store."""
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    variables = {"SFT_MLFLOW_PORT": str(free_port()), "SFT_ARTIFACTS": "s3://models/sft"}
    settings = read_settings(variables)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**_KEYS, "MLFLOW_S3_ENDPOINT_URL": store}.items():
            patch.setenv(name, value)
        settings.folder.mkdir(parents=True)
        servers.start_mlflow(settings, prepare_databases(settings), None)
    processes.wait_until(
        lambda: servers._answers(f"{settings.mlflow_url}/health"), settings.folder, servers.MLFLOW, seconds=180
    )
    yield settings
    processes.stop_all(settings.folder, ())


def test_a_folder_goes_to_the_store_and_comes_back_without_the_keys(
    settings: ServiceSettings, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {*_KEYS} & {*os.environ}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_url)
    config = parse_config({"model": {"base_model": str(BASE_MODEL)}, "data": {"source": "rows.jsonl"}})
    run_id = tracking.create_parent_run(config, run_name="stored", config_digest="none", tags={})
    with storage.new_folder() as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights.bin").write_bytes(bytes(range(256)) * 40_000)  # 10 MB
        uri, digest = tracking.publish(folder / "adapter", run_id, "adapter")
    listed = _client(store).list_objects_v2(Bucket="models")["Contents"]
    (stored,) = [each for each in listed if each["Key"].endswith("/artifacts/adapter/weights.bin")]
    assert stored["Key"].startswith("sft/")
    assert stored["Size"] == 10_240_000
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "another machine"))
    fetched = tracking.resolve(Ref(uri=uri, digest=digest))
    assert (fetched / "weights.bin").read_bytes() == bytes(range(256)) * 40_000


def _client(address: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=address,
        aws_access_key_id=_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=_KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=_KEYS["AWS_DEFAULT_REGION"],
    )
