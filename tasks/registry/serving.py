"""The code that travels with a registered model: answers chat requests with the prompt ids of training.

Logged as code ("models from code"), so it stands alone: it imports nothing of this project. Prompts are made by the
copy of `tasks/prompts.py` that the version carries, the module by which the training made them.
"""

import importlib.util
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from transformers import AutoModelForCausalLM, AutoTokenizer

_DEFAULT_MAX_TOKENS = 256


class ChatModel(PythonModel):
    """A causal language model behind MLflow's chat request and response."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load tokenizer, prompts and weights from the version's own folder.

        With `model_config={"weights": False}` a request is answered by its prompt's ids alone.
        """
        folder = context.artifacts["model"]
        self.prompts = _load_module(context.artifacts["prompts"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.settings = self.prompts.load_settings(Path(folder), self.tokenizer)
        self.model: Any = None
        if not (context.model_config or {}).get("weights", True):
            return
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
        self.model = model.to(device).eval()

    def prompt_ids(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Return the ids the model sees before its answer."""
        ids: list[int] = self.prompts.make_prompt(self.tokenizer, self.settings, messages, tools)
        return ids

    # Annotated as a data frame, MLflow takes the signature as it was given and infers none of its own.
    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> Any:
        """Answer one request `{"messages": […], "max_tokens": …, "temperature": …, "stop": …}`."""
        request = _plain(model_input)
        prompt = self.prompt_ids(request["messages"], request.get("tools"))
        if self.model is None:
            return {"prompt_token_ids": prompt}
        ids = self._generate(prompt, request)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        limit = int(request.get("max_tokens") or _DEFAULT_MAX_TOKENS)
        finish_reason = "length" if len(ids) >= limit else "stop"
        for stop in request.get("stop") or []:
            if stop and stop in text:
                text, finish_reason = text.split(stop, 1)[0], "stop"
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": str(self.model.config.name_or_path or "model"),
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
            ],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "total_tokens": len(prompt) + len(ids),
            },
        }

    def _generate(self, prompt: list[int], request: dict[str, Any]) -> list[int]:
        """Return the new ids; greedy unless a temperature above zero is asked for."""
        temperature = float(request.get("temperature") or 0.0)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        if temperature > 0 and request.get("top_p"):
            sampling["top_p"] = float(request["top_p"])
        inputs = torch.tensor([prompt], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=int(request.get("max_tokens") or _DEFAULT_MAX_TOKENS),
                **sampling,
            )
        ids: list[int] = output[0, len(prompt) :].tolist()
        return ids


def _load_module(path: str) -> Any:
    """Load a module from a file, under a name of its own."""
    name = f"prompts_of_{uuid.uuid4().hex}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def _plain(value: Any) -> Any:
    """Return the request as plain lists and dicts, without absent (null) keys of messages and tools."""
    if hasattr(value, "to_dict"):
        rows = value.to_dict(orient="records")
        if len(rows) != 1:
            raise ValueError(f"one chat request a call is served, got {len(rows)}")
        value = rows[0]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


mlflow.models.set_model(ChatModel())
