"""Where experiments of the MLflow server keep artifacts: where the server says, and nowhere else.

MLflow lets everybody who may create an experiment name any folder of the server's machine for its artifacts, and then
lists and sends what lies there. It has no setting against that.
"""

import json

from flask import Flask, Response, request

_CREATE = "/mlflow/experiments/create"
_FIELDS = ("artifact_location", "artifactLocation")  # MLflow's messages take both spellings


def keep_locations(app: Flask) -> None:
    """Let MLflow's application refuse to create an experiment with a location of the caller's."""
    app.before_request(_refuse_location)


def _refuse_location() -> Response | None:
    if request.method != "POST" or not request.path.endswith(_CREATE):
        return None
    if not names_location(request.get_data()):
        return None
    message = "artifact_location: this server chooses where artifacts are kept. Leave it out."
    body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": message})
    return Response(body, status=400, mimetype="application/json")


def names_location(body: bytes) -> bool:
    """Tell whether a request's JSON names a location; old clients send JSON that is a text of JSON."""
    try:
        values = json.loads(body or b"{}")
        values = json.loads(values) if isinstance(values, str) else values
    except ValueError:
        return False  # MLflow refuses it
    return isinstance(values, dict) and any(values.get(name) for name in _FIELDS)
