"""What a short trial of packing cannot see: attention that counts from the row's start and not from an example's.

Such a layer keeps packed examples apart in short rows, and mixes them in longer ones.
"""

from typing import Any


def find_row_limit(config: Any) -> tuple[int, str] | None:
    """Return the longest row in which packed examples stay apart, and why; None where there is no such limit.

    Args:
        config: of the text decoder.
    """
    kinds = getattr(config, "layer_types", None) or ()
    limits = []
    if "chunked_attention" in kinds and (chunk := getattr(config, "attention_chunk_size", None)):
        limits.append((int(chunk), f"its attention works in chunks of {chunk:,} tokens from the row's start"))
    if getattr(config, "attn_temperature_tuning", False) and (scale := getattr(config, "floor_scale", None)):
        limits.append((int(scale), f"its attention is scaled by the place in the row from {scale:,} tokens on"))
    if top := getattr(config, "index_topk", None):
        limits.append((int(top), f"its attention chooses {top:,} tokens of the row"))
    if budget := getattr(config, "indexer_budget", None):
        limits.append((0, f"its attention chooses {budget:,} groups of neighbouring tokens of the row"))
    if any("compressed" in kind for kind in kinds):
        limits.append((0, "its attention puts neighbouring tokens of the row together"))
    return min(limits, default=None)
