"""The command `sft plan`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.config_options import ConfigFile, Overrides, Settings
from flows.console import console, escape, fail, prepare_environment
from schemas.loading import ConfigError
from schemas.plurals import add_up_rows, count_of

if TYPE_CHECKING:
    from flows.planning import RunPlan
    from tasks.planning.estimates import Estimate

app = typer.Typer()
_MOST = 50_000


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    set_: Settings = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Price of an hour of this machine.")] = None,
    sample: Annotated[
        int, typer.Option(min=100, help="Most conversations that are tokenized; of more, so many are drawn.")
    ] = _MOST,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train eight steps here, and note how fast they were and what they took.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run will do before anything heavy starts. Exit code 1 when it would be refused."""
    from flows.importing import load_any
    from schemas.config import RunConfig

    try:
        loaded = load_any(config, overrides or (), set_ or ())
        if not isinstance(loaded, RunConfig):
            raise ConfigError(f"{config}: it trains nothing: there is nothing to plan")
    except ConfigError as error:
        fail(error)
    prepare_environment(cache=True)
    try:
        with console.status("Looking") as status:
            from flows.planning import plan_run

            made = plan_run(loaded, most=sample, rate=rate, measures=measure, on_phase=status.update)
    except ValueError as error:
        fail(error)
    if json_:
        typer.echo(json.dumps(made.as_values(), indent=2, ensure_ascii=False))
    else:
        show_plan(made, Console(highlight=False))
    if made.problems:
        raise typer.Exit(1)


def show_plan(plan: "RunPlan", out: Console) -> None:
    """Print a plan."""
    out.print(f"[bold]{escape(plan.name)}[/]: {escape(plan.base_model)} on {escape(plan.dataset)}", soft_wrap=True)
    for name, text in (
        ("rows", _tell_rows(plan)),
        ("examples", _tell_examples(plan)),
        ("steps", _tell_steps(plan)),
        ("device", _tell_device(plan)),
        ("memory", _tell_memory(plan)),
        ("time", _tell_time(plan)),
    ):
        out.print(f"{name:<9} {escape(text)}", soft_wrap=True)
    for time in plan.times:
        known = "unknown" if time.seconds is None else _write_seconds(time.seconds)
        if time.seconds is not None and not time.seconds.high:
            known = "0 s"
        out.print(f"  {escape(time.stage):<25} {known:<26} [dim]{escape(time.source)}[/]", soft_wrap=True)
    if plan.rate is not None:
        out.print(f"{'price':<9} {_tell_price(plan)}", soft_wrap=True)
    if plan.memory.options:
        out.print("It would fit, by what is counted, with one of these:")
        for option in plan.memory.options:
            out.print(f"  {escape(option.settings)}: {_write_bytes(option.least_bytes)} at least", soft_wrap=True)
    if plan.num_idle_gpus:
        most = plan.num_idle_gpus + plan.num_processes
        number = f"auto, or {most}" if plan.num_sharing == 1 else f"{most}"
        out.print(
            f"[yellow]{count_of(plan.num_idle_gpus, 'GPU')} of this machine would be idle: set "
            f"training.num_processes to {number}[/]",
            soft_wrap=True,
        )
    for warning in plan.warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for problem in plan.problems:
        out.print(f"[bold red]refused:[/] {escape(problem)}", soft_wrap=True)


def _tell_rows(plan: "RunPlan") -> str:
    return f"{plan.rows['rows in']:,} in = {add_up_rows(plan.rows)}"


def _tell_examples(plan: "RunPlan") -> str:
    sizes = plan.sizes
    drawn = f"; from {sizes.num_sampled:,} conversations drawn" if sizes.num_sampled else ""
    return (
        f"{_write_count(sizes.num_examples)} to train with {_write_count(sizes.total_tokens)} tokens, "
        f"{_write_count(sizes.trained_tokens)} of them trained, the longest {sizes.longest:,}; "
        f"{plan.num_eval_examples:,} to evaluate{drawn}"
    )


def _tell_steps(plan: "RunPlan") -> str:
    sizes = plan.sizes
    packs = "" if sizes.num_packs == sizes.num_examples else f", {_write_count(sizes.num_packs)} packs an epoch"
    return (
        f"{_write_count(sizes.num_steps)}, {_write_count(sizes.steps_per_epoch)} an epoch{packs}; "
        f"{_write_count(sizes.seen_tokens)} tokens in all"
    )


def _tell_device(plan: "RunPlan") -> str:
    processes = f", {plan.num_processes} processes" if plan.num_processes > 1 else ""
    shared = f", each {plan.num_sharing} share an example's tokens" if plan.num_sharing > 1 else ""
    return plan.device + processes + shared


def _tell_memory(plan: "RunPlan") -> str:
    memory, need = plan.memory, plan.memory.need
    seen = f"; an earlier training here took {_write_bytes(memory.seen_peak_bytes)}" if memory.seen_peak_bytes else ""
    if (peak := memory.peak_bytes) is not None:
        bar = f"{_write_bytes(int(peak.low))} to {_write_bytes(int(peak.high))}"
        seen = f"; at its highest {_write_bytes(int(peak.value))} ({bar}), {memory.peak_source}"
    if need.loaded_bytes:
        seen = f"; at its start {_write_bytes(need.loaded_bytes)}, until the weights are in 8 bits{seen}"
    if memory.needs_host:
        seen = f"; up to {_write_bytes(need.host_bytes)} of layers' inputs lie in the host's memory{seen}"
    on_each = " on each device" if plan.num_processes > 1 else ""
    part = f" with 1/{plan.num_sharing} of the longest example" if plan.num_sharing > 1 else ""
    weights = _write_bytes(need.weights_bytes - need.passing_bytes)
    spared = need.spared_bytes if memory.needs_host or not memory.is_enough else 0
    smallest, least = need.least_pass_bytes - spared, max(need.whole_bytes - spared, need.loaded_bytes)
    return (
        f"at least {_write_bytes(least)}{on_each} of {_write_bytes(memory.capacity_bytes)}: weights "
        f"{weights}, {need.num_trained:,} trained values with gradient and optimizer "
        f"{_write_bytes(need.trained_bytes)}, the smallest pass{part} {_write_bytes(smallest)}{seen}"
    )


def _tell_time(plan: "RunPlan") -> str:
    if plan.seconds is not None:
        return _write_seconds(plan.seconds)
    if not plan.known_seconds.high:
        return "unknown on this machine until a run has been done here. --measure trains eight steps"
    missing = ", ".join(time.stage for time in plan.times if time.seconds is None)
    return (
        f"unknown on this machine until a run has been done here ({missing}); known of the rest: "
        f"{_write_seconds(plan.known_seconds)}. --measure trains eight steps"
    )


def _tell_price(plan: "RunPlan") -> str:
    price = plan.price
    if price is None:
        known = plan.known_seconds.scale((plan.rate or 0.0) / 3600)
        if not known.high:
            return "unknown, as the time is"
        return f"at least {known.low:,.2f} at {plan.rate:g} an hour; the time is not known"
    return f"{price.value:,.2f} ({price.low:,.2f} to {price.high:,.2f}) at {plan.rate:g} an hour"


def _write_count(number: "Estimate") -> str:
    if number.low == number.high:
        return f"{number.value:,.0f}"
    return f"{number.value:,.0f} (+-{(number.high - number.low) / 2:,.0f})"


def _write_seconds(seconds: "Estimate") -> str:
    longest = seconds.high
    unit, size = ("h", 3600) if longest >= 2 * 3600 else ("min", 60) if longest >= 120 else ("s", 1)
    digits = 0 if seconds.low / size >= 10 else 1
    low, value, high = (f"{part / size:,.{digits}f}" for part in (seconds.low, seconds.value, seconds.high))
    return f"{value} {unit} ({low} to {high})"


def _write_bytes(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**28 else f"{number / 2**20:,.1f} MiB"
