"""Ollama's Modelfile prompts as the model's own template does, or has none and says so."""

import shutil
from pathlib import Path

from tasks.exporting.modelfile import write_modelfile
from tasks.tokenization.saving import save_tokenizer
from tasks.tokenization.templates import prepare_tokenizer

DEMO = Path(__file__).parents[3] / "deploy" / "demo" / "base_model"


def test_a_template_is_there_where_it_gives_the_same_prompts(tmp_path: Path) -> None:
    for template, is_there in (("chatml", True), ("zephyr", False)):
        folder = tmp_path / template
        shutil.copytree(DEMO, folder)
        save_tokenizer(prepare_tokenizer(DEMO, template), folder)
        text, note = write_modelfile(folder, "x.gguf", stops=(2047, 2044))
        assert text.startswith("FROM ./x.gguf\n")
        assert 'PARAMETER stop "<|im_end|>"' in text
        assert 'PARAMETER stop "<|endoftext|>"' in text
        assert ("TEMPLATE" in text, note == "") == (is_there, is_there)
