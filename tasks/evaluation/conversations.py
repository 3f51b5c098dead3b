"""Which held-out rows come from one source conversation, and are therefore no independent evidence.

A dataset may hold a conversation once for each of its turns: rows that begin with the same exchange.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl


def find_conversations(file: Path) -> dict[str, str]:
    """Return the example_id of each held-out row with the digest of the exchange that it begins with.

    Args:
        file: eval.parquet of a dataset (Conversations).
    """
    rows = pl.read_parquet(file, columns=["example_id", "messages"])
    return {example: digest_opening(json.loads(messages)) for example, messages in rows.iter_rows()}


def digest_opening(messages: list[dict[str, Any]]) -> str:
    """Return the sha256 of the messages up to the first answer; of all where there is none."""
    roles = [message["role"] for message in messages]
    end = roles.index("assistant") + 1 if "assistant" in roles else len(messages)
    opening = [(message["role"], message.get("content")) for message in messages[:end]]
    return hashlib.sha256(json.dumps(opening, sort_keys=True).encode()).hexdigest()
