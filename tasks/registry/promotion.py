"""Moving the alias champion: checked, recorded, and one at a time.

A caller says which champion it saw when it decided. The move happens under a lock and only when that is still so: of
two who decide at the same time one wins, and the other is told by whom it was overtaken.
"""

from collections.abc import Callable
from functools import partial

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from schemas.artifacts import Move
from tasks import tracking
from tasks.registry import audit, lock
from tasks.registry.versions import (
    CHALLENGER,
    CHAMPION,
    GATE_TAG,
    PARITY_TAG,
    PREVIOUS,
    REASONS_TAG,
    ROLLED_BACK_TAG,
    drop_alias,
    get_model,
    get_version,
    set_alias,
)


class PromotionError(ValueError):
    """The alias champion may not be moved so."""


class OvertakenError(PromotionError):
    """Another moved the alias between the decision and the move."""


def promote_version(name: str, version: str, *, expected: str | None, who: str, why: str, force: bool = False) -> Move:
    """Make a version champion, and the present champion `previous`.

    Args:
        name: registered model.
        version: that is to become champion.
        expected: champion that the caller saw when it decided; None for no champion.
        who: recorded.
        why: recorded; must not be empty with `force`.
        force: also a version that the gate refused or that was rolled back. One that was not proven to be the model
            that was trained is refused all the same.

    Raises:
        OvertakenError: the champion is another one by now.
        PromotionError: the version may not become champion.
    """
    candidate = get_version(name, version)
    with lock.hold(name, holder=who) as check:
        return _promote(candidate, get_model(name), check, expected=expected, who=who, why=why, force=force)


def place_version(candidate: ModelVersion, *, is_promoted: bool, expected: str | None, who: str, why: str) -> bool:
    """Make a new version `challenger`, unless a newer one is, and champion where the gate promoted it.

    Both under one hold of the lock, so that no third finds it between them.

    Args:
        candidate: as it was registered, with its tags.
        is_promoted: what the gate said.
        expected: champion that the gate compared with; None for no champion.
        who: recorded.
        why: recorded.

    Returns:
        Whether the alias champion moved: a resumed run may find that it did before.

    Raises:
        OvertakenError: the champion is another one by now; the version is challenger all the same.
        PromotionError: the version gets no alias.
    """
    _check_parity(candidate)
    name, version = candidate.name, str(candidate.version)
    with lock.hold(name, holder=who) as check:
        model = get_model(name)
        challenger = _alias(model, CHALLENGER)
        if challenger is None or int(challenger) < int(version):
            check()
            set_alias(name, CHALLENGER, version)
        if not is_promoted or _alias(model, CHAMPION) == version:
            return False
        _promote(candidate, model, check, expected=expected, who=who, why=why)
    return True


def _promote(
    candidate: ModelVersion,
    model: RegisteredModel,
    check: Callable[[], None],
    *,
    expected: str | None,
    who: str,
    why: str,
    force: bool = False,
) -> Move:
    """Move the alias champion to a candidate; the model was read under the lock."""
    name, version = candidate.name, str(candidate.version)
    moves = _take_stock(model, expected, who)
    _check_candidate(candidate, force=force, why=why)
    if version == expected:
        raise PromotionError(f"{name} version {version} is champion already: there is nothing to do")
    move = audit.compose_move("promote", candidate, expected, moves, who=who, why=why, forced=force)
    _carry_out(move, model, previous=expected, moves=moves, check=check)
    if ROLLED_BACK_TAG in candidate.tags:
        tracking.client().delete_model_version_tag(name, version, ROLLED_BACK_TAG)
    return move


def rollback_champion(name: str, *, expected: str | None, who: str, why: str) -> Move:
    """Go back to the version behind the alias `previous`, and mark the one that was left.

    Going back twice goes two champions back, never forth again.

    Raises:
        OvertakenError: the champion is another one by now.
        PromotionError: there is nothing to go back to.
    """
    with lock.hold(name, holder=who) as check:
        model = get_model(name)
        moves = _take_stock(model, expected, who)
        target = _alias(model, PREVIOUS)
        if expected is None or target is None or target == expected:
            champion = f"version {expected}" if expected else "no version"
            raise PromotionError(
                f"{name}: {champion} is champion and the alias {PREVIOUS} points at "
                f"{f'version {target}' if target else 'none'}: there is nothing to go back to; "
                f"name a version: sft promote {name}/VERSION"
            )
        candidate = get_version(name, target)
        if PARITY_TAG in candidate.tags:  # what was champion before there was such a tag can be gone back to
            _check_parity(candidate)
        move = audit.compose_move("rollback", candidate, expected, moves, who=who, why=why, forced=False)
        former = [entry for entry in audit.list_former_champions([*moves, move]) if _exists(name, entry)]
        _carry_out(move, model, previous=former[-1] if former else None, moves=moves, check=check)
        mark = f"{move.when} by {who}: {why or 'no reason given'}"
        tracking.client().set_model_version_tag(name, expected, ROLLED_BACK_TAG, mark)
    return move


def _alias(model: RegisteredModel, alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def _take_stock(model: RegisteredModel, expected: str | None, who: str) -> list[Move]:
    """Return the trail, after a champion that it does not know was entered; refuse when the champion changed."""
    name, moves, champion = model.name, audit.list_moves(model), _alias(model, CHAMPION)
    known = moves[-1].version_to if moves else None
    if champion != known:
        found = Move(
            number=len(moves) + 1,
            action="found",
            name=name,
            version_from=known,
            version_to=champion,
            who="unknown",
            when=audit.now(),
            why=f"noticed by {who}: not moved through this pipeline, or a move was cut short",
            evidence={},
        )
        audit.record_move(found)
        moves.append(found)
    if champion != expected:
        last = moves[-1] if moves else None
        by = f": {audit.describe_move(last)}, by {last.who} at {last.when} ({last.why})" if last else ""
        raise OvertakenError(
            f"{name}: {f'version {champion}' if champion else 'no version'} is champion now, and not "
            f"{f'version {expected}' if expected else 'none'} as when this move was decided{by}. "
            "Nothing was moved: look again and repeat it if it is still wanted"
        )
    return moves


def _check_candidate(candidate: ModelVersion, *, force: bool, why: str) -> None:
    _check_parity(candidate)
    against = []
    if candidate.tags.get(GATE_TAG) != "promoted":
        against.append(f"the gate refused it ({candidate.tags.get(REASONS_TAG, 'no verdict')})")
    if ROLLED_BACK_TAG in candidate.tags:
        against.append(f"it was rolled back ({candidate.tags[ROLLED_BACK_TAG]})")
    if against and not (force and why.strip()):
        raise PromotionError(
            f"{candidate.name} version {candidate.version}: {' and '.join(against)}. "
            "To promote it all the same give --force and a --reason, which are recorded"
        )


def _check_parity(candidate: ModelVersion) -> None:
    """Refuse a version of which nobody has shown that it is base + adapter; no reason outweighs that."""
    if candidate.tags.get(PARITY_TAG, "").split(":")[0] != "passed":
        raise PromotionError(
            f"{candidate.name} version {candidate.version} carries no passed parity check (tag {PARITY_TAG}: "
            f"{candidate.tags.get(PARITY_TAG, 'missing')}), so that it gets no alias: register by a pipeline run"
        )


def _carry_out(
    move: Move, model: RegisteredModel, *, previous: str | None, moves: list[Move], check: Callable[[], None]
) -> None:
    """Record the move, then move the aliases, champion last; make sure that it stands."""
    name, target = move.name, str(move.version_to)
    steps = [partial(audit.record_move, move)]
    if previous is not None:
        steps.append(partial(set_alias, name, PREVIOUS, previous))
    elif PREVIOUS in model.aliases:
        steps.append(partial(drop_alias, name, PREVIOUS))
    for step in (*steps, partial(set_alias, name, CHAMPION, target)):
        check()
        step()
    now = get_model(name)
    found = _alias(now, CHAMPION)
    if found != target:
        raise OvertakenError(
            f"{name}: champion was set to version {target} and is version {found} now: somebody moves it by other "
            "means at this moment; look at the registry"
        )
    audit.show_moves(now, [*moves, move])


def _exists(name: str, version: str) -> bool:
    try:
        get_version(name, version)
    except ValueError:
        return False
    return True
