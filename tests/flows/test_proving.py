"""`sft prove` on a registered version: the verdict, its exit code, and what it says where nothing can be shown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from typer.testing import CliRunner

from flows.cli import app
from schemas.artifacts import Ref
from schemas.proofs import ServingProbes
from tasks import tracking
from tasks.registry import versions
from tasks.serving.app import create_app
from tests.tasks.proving.conftest import probes  # noqa: F401  (a fixture)
from tests.tasks.proving.test_faults import opening
from tests.tasks.serving.conftest import listening, parrot  # noqa: F401  (a fixture)
from tests.tasks.serving.parrot import BASE_MODEL

pytestmark = pytest.mark.slow
_runner = CliRunner()


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    probes: ServingProbes,  # noqa: F811
) -> Iterator[Path]:
    """A registry with `parrot/1`, whose answers are recorded, and `parrot/2`, of which nothing is."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        client = tracking.client()
        run = client.create_run(tracking.open_experiment("proofs"), run_name="a run")
        place = folder / "recorded"
        place.mkdir()
        (place / "probes.json").write_text(probes.model_dump_json(), encoding="utf-8")
        uri, digest = tracking.publish(place, str(run.info.run_id), "serving_probes")
        answers = Ref(uri=uri, digest=digest, mlflow_run_id=str(run.info.run_id)).model_dump_json()
        client.create_registered_model("parrot")
        for recorded in (answers, ""):
            tags = {versions.MODEL_TAG: "0" * 64, versions.ANSWERS_TAG: recorded}
            client.create_model_version("parrot", f"{run.info.artifact_uri}/model", str(run.info.run_id), tags=tags)
        client.set_registered_model_alias("parrot", "champion", "1")
        yield folder


def test_a_served_version_is_proven_and_another_one_is_not(home: Path, parrot: Path) -> None:  # noqa: F811
    with opening(parrot) as served, listening(create_app(served)) as url:
        done = _runner.invoke(app, ["prove", f"{url}/v1"])
        assert done.exit_code == 0, done.output
        assert f"{url}/v1 is parrot version 1" in " ".join(done.output.split())
        assert "prompt ids compared" in " ".join(done.output.split())
        assert _runner.invoke(app, ["prove", url, "parrot@champion", "--model", "another"]).exit_code == 1
    with opening(parrot, lambda model: model.load_state_dict(_base())) as served, listening(create_app(served)) as url:
        done = _runner.invoke(app, ["prove", url, "parrot/1", "--json"])
        assert done.exit_code == 1, done.output
        found = json.loads(done.stdout)
        assert found["outcome"] == "different"
        assert any("it answers as its base model does" in reason for reason in found["reasons"])


def _base() -> Any:
    from tasks.models import load_model

    return load_model(BASE_MODEL).state_dict()


def test_a_server_without_log_probabilities_is_undecided(home: Path, probes: ServingProbes) -> None:  # noqa: F811
    """A stub that says what was recorded, and no more."""
    known = {json.dumps(probe.messages): probe for probe in probes.probes}

    async def complete(request: Request) -> JSONResponse:
        asked = await request.json()
        if "logprobs" in asked or "return_token_ids" in asked:
            return JSONResponse({"error": {"message": "logprobs are not supported"}}, 400)
        probe = known[json.dumps(asked["messages"])]
        text = "".join(probes.texts[token] for token in probe.answer.tokens)
        reason = "stop" if probe.answer.ended else "length"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return JSONResponse({"choices": [choice]})

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "stub"}]})

    stub = Starlette(
        routes=[Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", list_models)]
    )
    with listening(stub) as url:
        done = _runner.invoke(app, ["prove", url, "parrot/1"])
    assert done.exit_code == 3, done.output
    assert "may be parrot version 1" in " ".join(done.output.split())
    assert "tells no log-probabilities" in " ".join(done.output.split())


def test_what_cannot_be_asked_is_said(home: Path) -> None:
    for arguments, told in (
        (["http://127.0.0.1:9", "parrot/2"], "registered before answers were recorded"),
        (["http://127.0.0.1:9", "parrot/1"], ": start the server, or correct the address"),
        (["http://127.0.0.1:9", "nobody"], "no registered model 'nobody'"),
        (["http://127.0.0.1:9", "--precision", "int8"], "stored or bf16"),
    ):
        done = _runner.invoke(app, ["prove", *arguments])
        assert done.exit_code == 1
        assert told in " ".join(done.output.split())
