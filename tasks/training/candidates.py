"""The candidates of a sweep, by name: every learning rate with every rank and every seed."""

from itertools import product

from schemas.config import SweepConfig, TrainingConfig


def list_settings(config: TrainingConfig, seed: int) -> list[tuple[str, TrainingConfig, int]]:
    """Return name, settings and seed of each candidate.

    Alpha moves with the rank, so that the adapter's scale stays the same.
    """
    sweep = config.sweep
    rates, ranks = sweep.learning_rates or (config.learning_rate,), sweep.ranks or (config.rank,)
    found = []
    for rate, rank, own_seed in product(rates, ranks, sweep.seeds or (seed,)):
        own = {"learning_rate": rate, "rank": rank, "alpha": config.alpha * rank / config.rank, "sweep": SweepConfig()}
        found.append((f"lr-{rate!r}-rank-{rank}-seed-{own_seed}", config.model_copy(update=own), own_seed))
    return found


def name_candidates(config: TrainingConfig, seed: int) -> dict[str, TrainingConfig]:
    """Return the settings of each candidate by its name."""
    return {name: settings for name, settings, _ in list_settings(config, seed)}
