"""Evaluates the champion on the rows of this run, so that the gate can compare with it."""

from flows.gpu_stages import evaluate
from schemas.artifacts import Champion, EvalReport, TokensRef
from schemas.config import RunConfig
from tasks.registry.task import find_champion


def evaluate_champion(
    config: RunConfig, tokens: TokensRef, after: EvalReport, parent_run_id: str
) -> tuple[Champion | None, EvalReport | None]:
    """Return the champion and its evaluation on the rows of this run.

    What its own run measured is taken where everything but the model was the same; else it answers again. A champion
    that cannot be evaluated is returned with the reason: the gate then leaves it in its place.
    """
    champion = find_champion(config.registry.name, tokens)
    if champion is None or champion.obstacle is not None or champion.model is None:
        return champion, None
    if not after.num_examples:
        return champion.model_copy(update={"obstacle": "no row is held out that both could answer"}), None
    if champion.evaluation is not None and champion.evaluation.conditions == after.conditions:
        return champion, champion.evaluation
    try:
        return champion, evaluate(champion.model, tokens, config.evaluation, parent_run_id=parent_run_id)
    except ValueError as error:
        return champion.model_copy(update={"obstacle": f"it could not be evaluated: {error}"}), None
