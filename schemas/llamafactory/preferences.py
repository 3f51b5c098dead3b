"""What LLaMA-Factory's config says of preferences: stage dpo, and the keys that begin with pref."""

from schemas.llamafactory.lines import NOT_GIVEN, Work, to_number

_LOSSES = ("sigmoid", "hinge", "ipo")
_NONE_YET = {"pref_ftx": "a part of the supervised loss is not added", "pref_bco_weight": "BCO is not done"}


def read_objective(work: Work) -> None:
    """Set the objective; of pairs, loss and beta, and a metric that they are judged by."""
    shown, stage = work.take("stage", "sft", str)
    if shown != NOT_GIVEN and stage not in ("sft", "dpo"):
        text = "supervised fine-tuning (sft) and preferences (dpo) are done here, and no other stage"
        work.say("stage", shown, "refused", text)
    elif shown != NOT_GIVEN and stage == "sft":
        work.say("stage", shown, "implied", "supervised fine-tuning is done here")
    beta_shown, beta = work.take("pref_beta", 0.1, to_number)
    loss_shown, loss = work.take("pref_loss", "sigmoid", str)
    smoothing_shown, smoothing = work.take("dpo_label_smoothing", 0.0, to_number)
    further = {name: work.take(name, 0.0, to_number) for name in _NONE_YET}
    if stage != "dpo":
        given = {"pref_beta": beta_shown, "pref_loss": loss_shown, "dpo_label_smoothing": smoothing_shown}
        for name, value in {**given, **{name: each for name, (each, _) in further.items()}}.items():
            if value != NOT_GIVEN:
                work.say(name, value, "implied", "it has no effect in this stage")
        return
    work.put("stage", shown, "training.objective", "dpo")
    work.put("stage", shown, "registry.gate.metric", "preference_loss", "pairs are judged by it")
    work.put("pref_beta", beta_shown, "training.dpo.beta", beta)
    if loss in _LOSSES:
        work.put("pref_loss", loss_shown, "training.dpo.loss", loss)
    else:
        work.say("pref_loss", loss_shown, "refused", f"there are {', '.join(_LOSSES)}")
    work.put("dpo_label_smoothing", smoothing_shown, "training.dpo.label_smoothing", smoothing)
    for name, (each, value) in further.items():
        if value:
            work.say(name, each, "refused", f"{_NONE_YET[name]}: set it to 0")
        elif each != NOT_GIVEN:
            work.say(name, each, "implied", "it is 0")
