"""Make a version champion, at once and on the record."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.events import AnnouncementError, announce
from schemas.artifacts import Move
from tasks import tracking
from tasks.registry.audit import describe_move, describe_user
from tasks.registry.promotion import promote_version
from tasks.registry.versions import CHALLENGER, CHAMPION, find_by_address, read_alias


@flow(name="promote", flow_run_name="promote {name}")
def promote(
    name: str, version: str = CHALLENGER, reason: str = "", force: bool = False, requested_by: str = ""
) -> Move:
    """Make a version champion. The present champion becomes `previous`.

    Args:
        name: Registered model.
        version: Number of the version, or an alias.
        reason: Why; kept in the audit trail.
        force: Also a version that the gate refused or that was rolled back; a reason is then needed.
        requested_by: Who wants it; kept in the audit trail.
    """
    place = "/" if version.isdigit() else "@"
    move = promote_now(f"{name}{place}{version}", reason=reason, force=force, who=name_requester(requested_by))
    show_move(move)
    return move


def promote_now(address: str, *, reason: str, force: bool, who: str) -> Move:
    """Promote what an address names: NAME (its challenger), NAME/VERSION or NAME@alias.

    Raises:
        ValueError: no such version, or it may not become champion.
    """
    name, version = find_by_address(address, default_alias=CHALLENGER)
    return promote_version(name, version, expected=read_alias(name, CHAMPION), who=who, why=reason, force=force)


def name_requester(requested_by: str) -> str:
    """Return who is behind a flow run: a Prefect server of one's own knows no users."""
    return f"{requested_by or 'unnamed person'} by Prefect run {flow_run.name or '?'} on {describe_user()}"


def show_move(move: Move) -> None:
    """Show a move on the flow run's page, and tell automations that wait for `model.<action>`."""
    page = tracking.version_link(move.name, str(move.version_to))
    what = describe_move(move)
    title = f"[{move.name}]({page})" if page else move.name
    facts = "\n".join(f"- {key}: {value}" for key, value in move.evidence.items())
    text = f"## {title}: {what}\n\n{move.who}: {move.why}\n\n{facts}"
    create_markdown_artifact(text, key="move", description="What moved in the registry")
    get_run_logger().info("%s: %s, by %s: %s", move.name, what, move.who, move.why)
    try:
        tell(move)
    except AnnouncementError as error:
        get_run_logger().warning("%s", error)


def tell(move: Move) -> str | None:
    """Send `model.promote` or `model.rollback`, so that whoever serves can fetch the new champion."""
    payload = {"name": move.name, "version": str(move.version_to), "uri": f"models:/{move.name}/{move.version_to}"}
    return announce(f"model.{move.action}", f"model.{move.name}", payload)
