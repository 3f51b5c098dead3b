"""The champion moves only when it may, only when nobody was faster, and never without a trace."""

import multiprocessing
import os
import threading
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from tasks import tracking
from tasks.registry import audit, lock, promotion, versions
from tasks.registry.versions import get_model
from tests.tasks.registry.conftest import MakeVersion

pytestmark = pytest.mark.usefixtures("tracked")


def _promote(name: str, version: str, *, expected: str | None, why: str = "it is better", force: bool = False) -> None:
    promotion.promote_version(name, version, expected=expected, who="ann", why=why, force=force)


def _rollback(name: str, *, expected: str | None) -> None:
    promotion.rollback_champion(name, expected=expected, who="bob", why="it swears")


def _place(name: str, version: str, *, is_promoted: bool) -> bool:
    candidate = versions.get_version(name, version)
    return promotion.place_version(candidate, is_promoted=is_promoted, expected=None, who="ann", why="it is better")


def _aliases(name: str) -> dict[str, str]:
    found = tracking.client().get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def _three_champions(name: str, make_version: MakeVersion) -> None:
    for number, expected in (("1", None), ("2", "1"), ("3", "2")):
        assert make_version(name) == number
        _promote(name, number, expected=expected)


def test_a_promotion_keeps_the_champion_before_as_previous(make_version: MakeVersion) -> None:
    _three_champions("kept", make_version)
    assert _aliases("kept") == {"champion": "3", "previous": "2"}


def test_rolling_back_twice_goes_two_champions_back_and_then_no_further(make_version: MakeVersion) -> None:
    _three_champions("back", make_version)
    _rollback("back", expected="3")
    assert _aliases("back") == {"champion": "2", "previous": "1"}
    _rollback("back", expected="2")
    assert _aliases("back") == {"champion": "1"}
    with pytest.raises(promotion.PromotionError, match="there is nothing to go back to"):
        _rollback("back", expected="1")


def test_after_a_rollback_the_next_promotion_remembers_where_it_came_from(make_version: MakeVersion) -> None:
    _three_champions("again", make_version)
    _rollback("again", expected="3")
    make_version("again")
    _promote("again", "4", expected="2")
    assert _aliases("again") == {"champion": "4", "previous": "2"}
    _rollback("again", expected="4")
    assert _aliases("again") == {"champion": "2", "previous": "1"}


def test_a_version_without_a_passed_parity_check_gets_no_alias_for_any_reason(make_version: MakeVersion) -> None:
    for parity in ("", "failed: largest logit difference 3"):
        version = make_version("unproven", parity=parity)
        with pytest.raises(promotion.PromotionError, match="carries no passed parity check"):
            _promote("unproven", version, expected=None, force=True, why="I want it")
        with pytest.raises(promotion.PromotionError, match="carries no passed parity check"):
            _place("unproven", version, is_promoted=False)
    assert _aliases("unproven") == {}


def test_what_the_gate_refused_or_was_rolled_back_needs_force_and_a_reason(make_version: MakeVersion) -> None:
    make_version("forced")
    _promote("forced", "1", expected=None)
    make_version("forced", gate="refused")
    for force, why in ((False, "I want it"), (True, " ")):
        with pytest.raises(promotion.PromotionError, match=r"the gate refused it \(nll gained 0.5"):
            _promote("forced", "2", expected="1", force=force, why=why)
    _promote("forced", "2", expected="1", force=True, why="the metric misleads here")
    _rollback("forced", expected="2")
    with pytest.raises(promotion.PromotionError, match=r"it was rolled back .* by bob: it swears"):
        _promote("forced", "2", expected="1")
    _promote("forced", "2", expected="1", force=True, why="it swears no more")
    assert [move.forced for move in audit.list_moves(get_model("forced"))] == [False, True, False, True]


def test_the_champion_itself_is_not_promoted_again(make_version: MakeVersion) -> None:
    make_version("same")
    _promote("same", "1", expected=None)
    with pytest.raises(promotion.PromotionError, match="is champion already"):
        _promote("same", "1", expected="1")
    assert len(audit.list_moves(get_model("same"))) == 1


def test_the_trail_says_who_when_from_where_why_and_on_what_ground(make_version: MakeVersion) -> None:
    _three_champions("trail", make_version)
    _rollback("trail", expected="3")
    moves = audit.list_moves(get_model("trail"))
    assert [(move.number, move.action, move.version_from, move.version_to) for move in moves] == [
        (1, "promote", None, "1"),
        (2, "promote", "1", "2"),
        (3, "promote", "2", "3"),
        (4, "rollback", "3", "2"),
    ]
    assert (moves[3].who, moves[3].why) == ("bob", "it swears")
    assert moves[0].evidence["reasons"] == "nll gained 0.5 over the base model"
    assert moves[0].when.endswith("+00:00")
    description = str(tracking.client().get_registered_model("trail").description)
    assert "champion back to version 2 from version 3 | bob | it swears" in description
    assert description.count("champion to version 2 from version 1") == 1


def test_the_trail_outlives_the_runs_and_the_registered_model(make_version: MakeVersion) -> None:
    make_version("gone")
    _promote("gone", "1", expected=None, why="it was the first")
    client = tracking.client()
    (run_id,) = {move.evidence["mlflow_run"] for move in audit.list_moves(get_model("gone"))}
    client.delete_run(run_id)
    assert audit.list_moves(get_model("gone"))[0].why == "it was the first"
    client.delete_registered_model("gone")
    runs = client.search_runs([tracking.open_experiment(audit.EXPERIMENT)], "tags.`sft.name` = 'gone'")
    (tags,) = [run.data.tags for run in runs]
    assert (tags["sft.version_to"], tags["sft.who"], tags["sft.why"]) == ("1", "ann", "it was the first")
    client.restore_run(run_id)


def test_a_champion_that_was_set_by_other_means_is_noticed_and_written_down(make_version: MakeVersion) -> None:
    _three_champions("hand", make_version)
    versions.set_alias("hand", "champion", "1")
    with pytest.raises(promotion.OvertakenError, match="version 1 is champion now, and not version 3"):
        _rollback("hand", expected="3")
    last = audit.list_moves(get_model("hand"))[-1]
    assert (last.action, last.version_from, last.version_to) == ("found", "3", "1")


def test_what_a_person_wrote_in_the_description_stays(make_version: MakeVersion) -> None:
    make_version("words")
    tracking.client().update_registered_model("words", description="Ask Ann before use.")
    _promote("words", "1", expected=None)
    make_version("words")
    _promote("words", "2", expected="1")
    description = str(tracking.client().get_registered_model("words").description)
    assert description.startswith("Ask Ann before use.")
    assert description.count(audit._BEGIN) == 1


def test_challenger_is_the_newest_version_also_when_an_older_one_arrives_later(make_version: MakeVersion) -> None:
    for _ in range(2):
        make_version("newest")
    for version in ("2", "1"):
        assert not _place("newest", version, is_promoted=False)
    assert _aliases("newest") == {"challenger": "2"}


_ROUNDS = 20


def _race(home: str, who: str, barrier: Barrier, told: "Queue[tuple[int, str, str]]") -> None:
    """Want one's own version in each round, having seen the same champion as the other."""
    os.environ["SFT_HOME"] = home
    own = {"ann": 0, "bob": 1}[who]
    expected: str | None = None
    for number in range(_ROUNDS):
        barrier.wait(timeout=60)
        version = str(1 + 2 * number + own)
        try:
            promotion.promote_version("race", version, expected=expected, who=who, why=f"round {number}")
            told.put((number, who, "won"))
        except promotion.OvertakenError as error:
            told.put((number, who, str(error)))
        barrier.wait(timeout=60)
        expected = versions.read_alias("race", "champion")


def test_of_two_processes_that_promote_at_once_one_wins_and_the_other_is_told(
    make_version: MakeVersion, tracked: Path
) -> None:
    for _ in range(2 * _ROUNDS):
        make_version("race")
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(2), context.Queue()
    people = [context.Process(target=_race, args=(str(tracked), who, barrier, told)) for who in ("ann", "bob")]
    for person in people:
        person.start()
    outcomes = [told.get(timeout=120) for _ in range(2 * _ROUNDS)]
    for person in people:
        person.join(timeout=60)
        assert person.exitcode == 0
    winners = []
    for number in range(_ROUNDS):
        said = {who: words for at, who, words in outcomes if at == number}
        (winner,) = [who for who, words in said.items() if words == "won"]
        loser = {"ann": "bob", "bob": "ann"}[winner]
        assert f"by {winner} at" in said[loser]
        assert f"(round {number})" in said[loser]
        winners.append(str(1 + 2 * number + (winner == "bob")))
    moves = audit.list_moves(get_model("race"))
    assert [move.version_to for move in moves] == winners
    assert [move.version_from for move in moves] == [None, *winners[:-1]]
    assert _aliases("race") == {"champion": winners[-1], "previous": winners[-2]}
    assert tracking.client().search_registered_models("name LIKE 'sft-lock.race%'") == []


def test_a_lock_that_a_dead_holder_left_is_taken_after_its_lease() -> None:
    tracking.client().create_registered_model("sft-lock.orphan", tags={"sft.token": "dead", "sft.holder": "carl"})
    begin = time.monotonic()
    with lock.hold("orphan", holder="ann", lease_seconds=1.0):
        assert time.monotonic() - begin > 1.0
        assert tracking.client().get_registered_model("sft-lock.orphan").tags["sft.holder"] == "ann"
    left = [model.name for model in tracking.client().search_registered_models("name LIKE 'sft-lock.orphan%'")]
    assert left == ["sft-lock.orphan.left-dead"]


def test_a_late_holder_writes_no_more() -> None:
    tracking.client().search_registered_models()  # the database is made before a lease begins
    with lock.hold("slow", holder="carl", lease_seconds=4.0) as check:
        check()
        time.sleep(2.1)
        with pytest.raises(lock.LockError, match="took longer than 2 s"):
            check()


def test_whoever_waits_too_long_is_told_who_holds_the_lock() -> None:
    registry = tracking.client()
    registry.create_registered_model("sft-lock.busy", tags={"sft.token": "0", "sft.holder": "carl"})
    going = threading.Event()

    def change_hands() -> None:  # as when many others come first: no holder is there for longer than the lease
        while not going.wait(0.05):
            registry.set_registered_model_tag("sft-lock.busy", "sft.token", str(time.monotonic()))

    others = threading.Thread(target=change_hands)
    others.start()
    try:
        with (
            pytest.raises(lock.LockError, match="carl has been changing it"),
            lock.hold("busy", holder="ann", lease_seconds=0.5),
        ):
            pass
    finally:
        going.set()
        others.join()
