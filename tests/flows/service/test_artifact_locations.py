"""No experiment of the MLflow server keeps artifacts in a folder that its creator names."""

import json

import pytest
from flask import Flask

from flows.service.artifact_locations import keep_locations

_PATHS = [
    "/api/2.0/mlflow/experiments/create",
    "/ajax-api/2.0/mlflow/experiments/create",
    "/prefix/api/3.0/mlflow/experiments/create",
]


@pytest.fixture
def app() -> Flask:
    """An application that creates everything it is asked for."""
    app = Flask("mlflow")
    app.add_url_rule("/<path:path>", view_func=lambda path: "created", methods=["GET", "POST"])
    keep_locations(app)
    return app


@pytest.mark.parametrize("path", _PATHS)
@pytest.mark.parametrize("field", ["artifact_location", "artifactLocation"])
@pytest.mark.parametrize("location", ["/etc", "file:///etc", "mlflow-artifacts:/1", "s3://mine", "../x"])
def test_a_location_is_refused_in_every_spelling(app: Flask, path: str, field: str, location: str) -> None:
    body = {"name": "mine", field: location}
    for data in (json.dumps(body), json.dumps(json.dumps(body))):
        answer = app.test_client().post(path, data=data, content_type="application/json")
        assert answer.status_code == 400
        assert "this server chooses" in answer.json["message"]  # type: ignore[index]


def test_without_one_the_experiment_is_created(app: Flask) -> None:
    for body in ({"name": "mine"}, {"name": "mine", "artifact_location": ""}):
        assert app.test_client().post(_PATHS[0], json=body).text == "created"
    assert app.test_client().post("/api/2.0/mlflow/runs/create", json={"artifact_location": "/x"}).text == "created"
