"""The key of a kept result holds every input, whatever it is made of."""

from tasks.caching import stage_cache
from tasks.probing.task import prepare_probes


def test_a_list_of_settings_has_a_key_that_knows_each_of_them() -> None:
    from prefect.context import TaskRunContext

    from schemas.config import ProbeConfig

    context = TaskRunContext.model_construct(task=prepare_probes)  # type: ignore[call-arg]
    first, second = (ProbeConfig(name="a", source="x.jsonl", max_loss=loss) for loss in (0.1, 0.2))

    def key(*probes: ProbeConfig) -> str | None:
        return stage_cache("probing").compute_key(context, {"probes": probes}, {})

    assert key(first) == key(first)
    assert len({key(first), key(second), key(first, second), key(second, first)}) == 4
