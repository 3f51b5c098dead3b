"""The command with which vLLM serves a model as it was evaluated, and what a given command does otherwise.

The flags are those of `vllm serve` of vLLM 0.11 to 0.33; vLLM itself is not needed to write or to check a command.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.models import read_context_length
from tasks.serving.call_syntax import CallSyntax
from tasks.storage import digest_folder

_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "half": "float16", "float": "float32"}
_SWITCHES = frozenset({"enable-auto-tool-choice", "trust-remote-code", "enforce-eager", "enable-prefix-caching"})
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class VllmNeeds:
    """What a model needs of the server."""

    folder: Path
    name: str
    context: int | None
    """Most tokens that the model's config allows."""
    trained_length: int | None
    """Longest example of the training, in tokens; None where nobody knows."""
    dtype: str
    """Of the stored weights: float32, bfloat16 or float16."""
    syntax: CallSyntax | None
    stop_ids: frozenset[int]
    """That have to end an answer."""
    template: str
    """Chat template that ships with the model."""
    num_bytes: int
    """Of the weights."""
    quantization: str = ""
    """Method that the model's config names."""
    version: str = ""
    """NAME/VERSION in the registry: the folder is one of this machine's cache then, and is no address for a server."""
    digest: str = ""
    """Of the version's folder."""

    @property
    def copy(self) -> str:
        """Return the folder that a command names: the model's, or the one that a version is copied into."""
        return self.version.replace("/", "-") or str(self.folder)


def read_needs(
    folder: Path,
    name: str,
    *,
    syntax: CallSyntax | None,
    stop_ids: frozenset[int],
    template: str,
    trained_length: int | None = None,
    version: str = "",
    digest: str = "",
) -> VllmNeeds:
    """Read what a model folder needs of the server; see VllmNeeds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = read_context_length(folder)
    return VllmNeeds(
        folder=folder,
        name=name,
        context=context,
        # Tokenization cuts at the model's positions, where its own limit is above them.
        trained_length=trained_length and min(trained_length, context or trained_length),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        syntax=syntax,
        stop_ids=stop_ids,
        template=template,
        num_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        quantization=str((config.get("quantization_config") or {}).get("quant_method") or ""),
        version=version,
        digest=digest,
    )


def name_parser(syntax: CallSyntax | None) -> str | None:
    """Return vLLM's parser for calls in this syntax; None where it has none that is known here."""
    if syntax is None:
        return None
    known = {
        ("json", "<tool_call>"): "hermes",
        ("json", "[TOOL_CALLS]"): "mistral",
        ("json", ""): "llama3_json",
        ("marked", "<tool_call>\n<function="): "qwen3_coder",
        ("marked", "<tool_call>"): "glm45",
        ("named", "to=functions."): "openai",
        ("named", "[TOOL_CALLS]"): "mistral",
        ("named", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"): "deepseek_v3",
    }
    return known.get((syntax.kind, syntax.opening))


def write_command(
    needs: VllmNeeds, *, host: str = "127.0.0.1", port: int = 8000, length: int | None = None, num_gpus: int = 1
) -> list[str]:
    """Return the command's words."""
    words = ["vllm", "serve", needs.copy, "--served-model-name", needs.name]
    words += ["--host", host, "--port", str(port), "--dtype", needs.dtype]
    if length or needs.context:
        words += ["--max-model-len", str(length or needs.context)]
    # As it was evaluated: greedy where a request says nothing.
    words += ["--override-generation-config", json.dumps({"temperature": 0.0})]
    if (parser := name_parser(needs.syntax)) is not None:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if num_gpus > 1:
        words += ["--tensor-parallel-size", str(num_gpus)]
    return words


def count_gpus(needs: VllmNeeds, gpu_bytes: int) -> int:
    """Return how many GPUs hold the weights and as much again for keys and values, a power of two."""
    number = 1
    while 2 * needs.num_bytes > 0.9 * gpu_bytes * number and number < 64:
        number *= 2
    return number


def check_command(words: Sequence[str], needs: VllmNeeds) -> list[str]:
    """Return what a command would do otherwise than the model was evaluated, each with the way out."""
    model, flags = _read_flags(words)
    problems = [
        *_check_model(model, flags, needs),
        *_check_length(flags, needs),
        *_check_numbers(flags, needs),
        *_check_tools(flags, needs),
        *_check_access(flags),
    ]
    missing = sorted(needs.stop_ids - read_stop_ids(needs.folder))
    if missing:
        problems.append(
            f"generation_config.json of {needs.folder} does not name the stop ids {missing}, and vLLM reads them "
            "there: add them to its eos_token_id"
        )
    return problems


def read_stop_ids(folder: Path) -> frozenset[int]:
    """Return the ids at which vLLM ends an answer of a model folder, by its own files."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids |= {eos} if isinstance(eos, int) else set(eos or ())
    return frozenset(ids)


def _read_flags(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the model of a command, and its flags without dashes; a switch is `true`."""
    rest = list(words)
    while rest and rest[0] != "serve":
        rest.pop(0)
    if not rest:
        raise ValueError(f"{shlex.join(words)[:200]!r} is no `vllm serve MODEL …`")
    model, flags = "", {}
    rest.pop(0)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            model = model or word
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if not equals:
            takes = bool(rest) and not rest[0].startswith("--") and name not in _SWITCHES
            value = rest.pop(0) if takes else "true"
        flags[name] = value
    return model or flags.get("model", ""), flags


def _check_model(model: str, flags: dict[str, str], needs: VllmNeeds) -> list[str]:
    problems = []
    if not _is_model(model, needs):
        wanted = (
            f"{needs.version}, which `sft merge {needs.version} {needs.copy}` copies" if needs.version else needs.folder
        )
        problems.append(f"it serves {model or 'no model'}: the model is {wanted}")
    if needs.name not in flags.get("served-model-name", "").split():
        problems.append(f"clients would see a path as the model's name: --served-model-name {needs.name}")
    if (other := flags.get("tokenizer")) and not _is_model(other, needs):
        problems.append(f"--tokenizer {other}: the model's own tokenizer makes the prompts of training: leave it out")
    if (file := flags.get("chat-template")) is not None:
        path = Path(file).expanduser()
        text = path.read_text(encoding="utf-8") if path.is_file() else file
        if text.strip() != needs.template.strip():
            problems.append(f"--chat-template {file[:80]} is not the template of training: leave it out")
    return problems


def _is_model(given: str, needs: VllmNeeds) -> bool:
    """Say whether a folder is the model's, or a copy of the version; a copy of the proposed name may be made yet."""
    folder = Path(given).expanduser()
    if not given or folder.resolve() == needs.folder.resolve():
        return bool(given)
    if needs.digest and folder.is_dir():
        return digest_folder(folder) == needs.digest
    return bool(needs.version) and given == needs.copy


def _check_length(flags: dict[str, str], needs: VllmNeeds) -> list[str]:
    given = flags.get("max-model-len")
    if given is None or given in ("auto", "-1"):
        return []
    factor = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(given[-1:], 1)
    try:
        length = int(float(given[:-1] if factor > 1 else given) * factor)
    except ValueError:
        return [f"--max-model-len {given}: a number of tokens is wanted"]
    if needs.trained_length and length < needs.trained_length:
        return [f"--max-model-len {length}: the model was trained on examples of up to {needs.trained_length} tokens"]
    if needs.context and length > needs.context:
        return [f"--max-model-len {length}: the model's context is {needs.context}"]
    return []


def _check_numbers(flags: dict[str, str], needs: VllmNeeds) -> list[str]:
    problems = []
    given = _DTYPES.get(flags.get("dtype", "auto"), flags.get("dtype", "auto"))
    if given == "auto" and needs.dtype == "float32":
        problems.append(
            "--dtype auto halves weights that are stored in float32: --dtype float32 serves what was tested"
        )
    elif given not in ("auto", needs.dtype):
        problems.append(f"--dtype {given}: the weights are stored in {needs.dtype}")
    if (quantization := flags.get("quantization", flags.get("q", ""))) and quantization != needs.quantization:
        problems.append(f"--quantization {quantization} changes the weights: leave it out")
    if flags.get("kv-cache-dtype", "auto") not in ("auto", needs.dtype):
        problems.append(f"--kv-cache-dtype {flags['kv-cache-dtype']} rounds what attention remembers: leave it out")
    override: Any = json.loads(flags.get("override-generation-config") or "{}")
    if "eos_token_id" in override:
        problems.append("--override-generation-config takes the stop ids away that the model ships with")
    return problems


def _check_tools(flags: dict[str, str], needs: VllmNeeds) -> list[str]:
    parser = name_parser(needs.syntax)
    if parser is None:
        return []
    if flags.get("enable-auto-tool-choice") != "true" or flags.get("tool-call-parser") != parser:
        return [f"calls of tools would stay text or be misread: --enable-auto-tool-choice --tool-call-parser {parser}"]
    return []


def _check_access(flags: dict[str, str]) -> list[str]:
    problems = []
    if flags.get("trust-remote-code") == "true":
        problems.append(
            "--trust-remote-code runs code from the model's folder, and this model needs none: leave it out"
        )
    if flags.get("host", "0.0.0.0") not in _LOOPBACK and "api-key" not in flags:
        problems.append("it is reached from other machines without a key: --host 127.0.0.1, or --api-key")
    return problems
