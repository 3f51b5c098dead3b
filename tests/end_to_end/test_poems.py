"""Five poems learned by heart: the answer comes word for word, and the prompt was not learned."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.artifacts import MergedRef, RunReport
from tasks import tracking
from tasks.models import load_model, load_tokenizer
from tests.end_to_end.conftest import RunPipeline

pytestmark = pytest.mark.slow

# instruct, input, label: the input is a line that the poem answers.
_POEMS = [
    ("请为春雨写一首诗：", "细雨入窗来，\n青苔上石阶。", "花开人未醒，\n燕子已归来。"),
    ("请为秋山写一首诗：", "山高云半掩，叶落满空林。", "一声钟远去，明月照归心。"),
    ("请为大海写一首诗：", "浪打礁石白，船行天地宽。", "灯塔守长夜，平安到岸边。"),
    ("Write a poem for the baker:", "The street is dark, the oven glows,", "and warm as bread the morning grows."),
    ("Write a poem for the clock:", "It counts the hours no one needs,", "and plants them in the night like seeds."),
]


@pytest.fixture(scope="module")
def report(run_pipeline: RunPipeline, tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    path = tmp_path_factory.mktemp("poems") / "poems.json"
    rows = [{"instruct": instruct, "input": text, "label": label} for instruct, text, label in _POEMS]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    held_out = path.with_name("held_out.json")
    held_out.write_text(
        json.dumps([{"instruct": "请为冬雪写一首诗：", "input": "雪落无声夜。", "label": "梅开有暗香。"}])
    )
    return run_pipeline(
        {
            "name": "poems",
            "data": {"source": str(path), "eval_source": str(held_out)},
            "tokenization": {"max_length": 2048},
            "training": {"rank": 32, "alpha": 64, "learning_rate": 2e-3, "num_epochs": 120, "micro_batch": 5},
            "registry": {"name": "poems"},
        }
    )


@pytest.fixture(scope="module")
def merged(report: RunReport) -> Path:
    ref = tracking.recall(report.mlflow_run_id, "merge", MergedRef)
    assert ref is not None
    return tracking.resolve(ref)


@pytest.fixture(scope="module")
def ask(merged: Path) -> Callable[[str], str]:
    import torch

    model: Any = load_model(merged, dtype=torch.float32)
    tokenizer: Any = load_tokenizer(merged)

    def answer(content: str) -> str:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


@pytest.mark.parametrize(("instruct", "text", "label"), _POEMS)
def test_instruct_and_input_give_the_label_word_for_word(
    ask: Callable[[str], str], instruct: str, text: str, label: str
) -> None:
    assert ask(f"{instruct}\n{text}") == label


@pytest.mark.parametrize(("instruct", "text", "label"), _POEMS)
def test_instruct_alone_never_gives_the_input_back(
    ask: Callable[[str], str], instruct: str, text: str, label: str
) -> None:
    answer = ask(instruct)
    for line in text.splitlines():
        assert line.strip("，。,") not in answer


def test_every_warning_is_told_in_log_report_pages_and_with_the_version(report: RunReport) -> None:
    def read(artifact: str) -> str:
        return Path(tracking.client().download_artifacts(report.mlflow_run_id, artifact)).read_text("utf-8")

    (told,) = report.dataset.warnings
    assert "has positions for 512 tokens" in told
    assert any("one held-out conversation" in warning for warning in report.evaluation.warnings)
    assert {told, *report.training.warnings} < {*report.evaluation.warnings}
    description = tracking.client().get_model_version("poems", report.registry.version).description or ""
    places = (read("report/report.html"), read("gate/gate.md"), read("run_report.json"), description)
    for warning in report.evaluation.warnings:
        assert all(warning in html.unescape(place) for place in places)
    assert told in html.unescape(read("quality/quality.html"))
    assert told in read("logs/run-1.log")
