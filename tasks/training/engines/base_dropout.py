"""The dropout that a base model brings along in its own config; the adapter's is another one.

Most bases of today have none. Where there is some, it is off while an adapter is trained, unless the config asks for
it: the base is frozen, and its noise would only hide from the adapter what the merged model will see.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_NAMES = re.compile(r"drop|jitter")
# Of heads that a language model does not have.
_UNUSED = re.compile(r"classifier|summary")
_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def find_dropout(base: Any) -> dict[str, float]:
    """Return the shares that a base drops, by their names in its config and modules; its adapter's are left out."""
    found = [(name, float(getattr(holder, key)), isinstance(holder, nn.Module)) for name, holder, key in _iterate(base)]
    # The modules have theirs from the config: they are named where it does not name any.
    is_named = any(not of_module for *_, of_module in found)
    return {name: share for name, share, of_module in found if not (of_module and is_named)}


def switch_off_dropout(base: Any) -> dict[str, float]:
    """Set all dropout of a base to 0, its adapter's left alone; return what there was."""
    found = find_dropout(base)
    for _, holder, key in list(_iterate(base)):
        setattr(holder, key, 0.0)
    return found


def describe_dropout(found: dict[str, float], *, is_kept: bool) -> str:
    """Say what the base's own dropout is, and what becomes of it."""
    shares = ", ".join(f"{name} {share:g}" for name, share in sorted(found.items()))
    if is_kept:
        return f"the base model's own dropout is on ({shares}), as training.base_dropout asks: examples are padded"
    return f"the base model's own dropout ({shares}) is off during the training: training.base_dropout keeps it"


def _iterate(base: Any) -> Iterator[tuple[str, Any, str]]:
    """Give each share above 0: a name, the object that holds it, and its attribute."""
    configs = {id(config): config for config in (base.config, base.config.get_text_config())}
    holders = [("", config) for config in configs.values()]
    modules = ((name, module) for name, module in base.named_modules() if ".lora_dropout." not in name)
    holders += [(name.rsplit(".", 1)[-1], module) for name, module in modules]
    for name, holder in holders:
        if isinstance(holder, _MODULES):
            if holder.p > 0:
                yield name, holder, "p"
            continue
        for key, value in list(vars(holder).items()):
            if isinstance(value, float) and value > 0 and _NAMES.search(key) and not _UNUSED.search(key):
                yield key, holder, key
