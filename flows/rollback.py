"""Go back to the champion before, at once and on the record."""

from prefect import flow

from flows.promote import name_requester, show_move
from schemas.artifacts import Move
from tasks.registry.promotion import rollback_champion
from tasks.registry.versions import CHAMPION, read_alias


@flow(name="rollback", flow_run_name="roll {name} back")
def rollback(name: str, reason: str = "", requested_by: str = "") -> Move:
    """Make the version behind `previous` champion again, and mark the one that is left.

    Args:
        name: Registered model.
        reason: Why; kept in the audit trail.
        requested_by: Who wants it; kept in the audit trail.
    """
    move = rollback_now(name, reason=reason, who=name_requester(requested_by))
    show_move(move)
    return move


def rollback_now(name: str, *, reason: str, who: str) -> Move:
    """Roll a registered model back.

    Raises:
        ValueError: there is nothing to go back to.
    """
    return rollback_champion(name, expected=read_alias(name, CHAMPION), who=who, why=reason)
