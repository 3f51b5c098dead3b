"""Commands of `sft` on what was registered or published: promote, rollback, publish, chat, evaluate."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.config_options import Settings
from flows.console import check_files, console, escape, fail, load_for_data, prepare_environment
from schemas.artifacts import Move

app = typer.Typer()


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="NAME (its challenger), NAME/VERSION or NAME@alias.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")] = "",
    force: Annotated[
        bool, typer.Option(help="Also a version that the gate refused or that was rolled back; needs a reason.")
    ] = False,
) -> None:
    """Make a version champion, at once. The present champion becomes `previous`."""
    prepare_environment(cache=True)
    from flows.promote import promote_now
    from tasks.registry.audit import describe_user

    try:
        move = promote_now(version, reason=reason, force=force, who=describe_user())
    except ValueError as error:
        fail(error)
    _report_move(move)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")] = "",
) -> None:
    """Go back to the champion before, at once."""
    prepare_environment(cache=True)
    from flows.rollback import rollback_now
    from tasks.registry.audit import describe_user

    try:
        move = rollback_now(name, reason=reason, who=describe_user())
    except ValueError as error:
        fail(error)
    _report_move(move)


@app.command()
def publish(
    data: Annotated[str, typer.Argument(help="File, folder or hub name of a dataset.")],
    name: Annotated[str, typer.Option(help="Of the dataset. Default: from its path.")] = "",
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML config to be kept as the dataset's recipe: new versions are trained with it."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML config to check with, of a dataset without a recipe.")
    ] = None,
    set_: Settings = None,
    again: Annotated[bool, typer.Option("--again", help="Send the event also when nothing is new.")] = False,
) -> None:
    """Check a dataset, keep it in MLflow as a version, and tell the Prefect server: `dataset.published`."""
    if recipe is not None and config is not None:
        fail(ValueError("--recipe and --config: a dataset is checked with its recipe: leave --config out"))
    given = load_for_data(data, recipe, set_) if recipe is not None else None
    settings = load_for_data(data, config, set_) if recipe is None else None
    prepare_environment(cache=True)
    from flows.publish import describe_event, describe_place, describe_publication, describe_recipe, publish_now, tell
    from tasks.registry.audit import describe_user

    try:
        chosen = bool(config or set_) and recipe is None
        outcome = publish_now(
            data, name=name, recipe=given, settings=settings, who=describe_user(), settings_chosen=chosen
        )
        published = outcome.published
        console.print(describe_publication(published), style="bold", soft_wrap=True)
        console.print(f"{describe_recipe(outcome)}.", markup=False, soft_wrap=True)
        told = tell(outcome, again=again)
    except ValueError as error:
        fail(error)
    console.print(f"Digest {published.digest}; {describe_place(published)}", soft_wrap=True)
    console.print(f"{describe_event(outcome, told)}.", soft_wrap=True)


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="NAME (its champion), NAME/VERSION, NAME@alias, the folder of a model or an adapter, or a chat YAML "
            "of LLaMA-Factory's. Default: the only champion."
        ),
    ] = "",
    compare: Annotated[str | None, typer.Option(help="base: the base model beside it.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once and print the answer only.")] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0.0, max=5.0, help="0, the default: greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: 512.")] = None,
    seed: Annotated[int, typer.Option(help="Makes drawn answers repeatable.")] = 0,
) -> None:
    """Talk to a registered version or a model folder."""
    if compare not in (None, "base"):
        fail(ValueError(f"--compare {compare}: base is what a version can be compared with"))
    prepare_environment(cache=True)
    from flows.chatting import SamplingConfig, answer_once, converse, open_sessions
    from flows.importing import read_chat

    try:
        wanted = read_chat(model)
        sampling = SamplingConfig(
            temperature=wanted.temperature if temperature is None else temperature,
            max_new_tokens=max_tokens or wanted.max_new_tokens,
            seed=seed,
            system=system,
        )
        with console.status("Loading"):
            sessions = open_sessions(
                wanted.target, compare_base=compare == "base", system=system, base_model=wanted.base_model
            )
        if prompt is not None:
            answer_once(sessions, prompt, sampling)
        else:
            converse(sessions, sampling, Console())
    except ValueError as error:
        fail(error)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="NAME (its champion), NAME/VERSION, NAME@alias, or the folder of a model, an adapter, trained weights "
            "or a checkpoint."
        ),
    ],
    data: Annotated[
        str, typer.Argument(help="File, folder or hub name; as many rows as evaluation.max_examples says are asked.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML config whose data and evaluation settings are used.")
    ] = None,
    set_: Settings = None,
    base_model: Annotated[str, typer.Option(help="Folder or hub name, where the model names none.")] = "",
    beside_base: Annotated[
        bool, typer.Option("--base/--no-base", help="Compare with the base model, where it is known.")
    ] = True,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON here.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every row with its answers as Parquet here.")] = None,
) -> None:
    """Ask a model the rows of a dataset, and its base too: every metric, and what changed with its interval."""
    loaded = load_for_data(data, config, set_)
    check_files(json_=json_, answers=answers)
    prepare_environment(cache=True)
    from flows.evaluating import evaluate_target
    from flows.targets import opening_target
    from flows.terminal import show_evaluated

    def follow(who: str) -> Callable[[int, int], None]:
        return lambda num_done, num_all: status.update(f"{escape(who)}: {num_done:,} of {num_all:,}")

    try:
        with console.status("Loading") as status, opening_target(model, base_model=base_model) as target:
            found = evaluate_target(target, loaded, with_base=beside_base, on_progress=follow)
    except ValueError as error:
        fail(error)
    for path, write in ((json_, found.write_json), (answers, found.write_answers)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    show_evaluated(found)


def _report_move(move: Move) -> None:
    """Say what moved, and who was told."""
    from flows.events import AnnouncementError
    from flows.promote import tell
    from tasks.registry.audit import describe_move

    console.print(f"[bold]{move.name}[/]: {describe_move(move)}", soft_wrap=True)
    console.print(f"Recorded as move {move.number} by {move.who}: ", end="")
    console.print(move.why, markup=False, soft_wrap=True)
    try:
        told = tell(move)
    except AnnouncementError as error:
        console.print(f"[yellow]warning:[/] {error}", soft_wrap=True)
    else:
        if told:
            console.print(f"Event model.{move.action} sent to {told}", soft_wrap=True)
