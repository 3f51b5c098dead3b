"""The code that travels with a registered model: answers chat requests with the prompt ids of training.

Logged as code ("models from code"), so it stands alone: it imports nothing of this project. The prompt is rendered and
tokenized in one step by the shipped tokenizer, so that BOS stands exactly once.
"""

import time
import uuid
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
        """Load weights and tokenizer from the version's own folder."""
        folder = context.artifacts["model"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
        self.model = model.to(device).eval()

    def prompt_ids(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Return the ids the model sees before its answer."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    # Annotated as a data frame, MLflow takes the signature as it was given and infers none of its own.
    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> Any:
        """Answer one request `{"messages": […], "max_tokens": …, "temperature": …, "stop": …}`."""
        request = _plain(model_input)
        prompt = self.prompt_ids(request["messages"], request.get("tools"))
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
