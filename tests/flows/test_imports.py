"""What a worker imports to cancel a run, and what every process of a run imports before its body, stays light."""

import subprocess
import sys
from pathlib import Path

from flows.service.deployments import read_deployments

_HEAVY = {"torch", "transformers", "peft", "pandera", "matplotlib", "sklearn", "datasets"}


def test_the_flows_of_deployments_are_imported_without_what_their_stages_work_with() -> None:
    modules = sorted({deployment["entrypoint"].rpartition(".")[0] for deployment in read_deployments()})
    assert "flows.pipeline" in modules
    code = f"import sys, {', '.join(modules)}; print(*sorted({_HEAVY!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_commands_and_what_they_start_do_without_what_is_only_looked_for() -> None:
    code = "import os, subprocess, sys; from flows.console import prepare_environment; prepare_environment(cache=True);"
    code += "import jsonschema; print('lark' in sys.modules, flush=True);"
    code += (
        "subprocess.run([sys.executable, '-c', 'import jsonschema, sys; print(\"lark\" in sys.modules)'], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_check_imports_neither_the_servers_clients_nor_torch(tmp_path: Path) -> None:
    rows = "".join(f'{{"prompt": "Say {number}.", "completion": "{number}"}}\n' for number in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    code = "import sys; from flows.cli import main; sys.argv = ['sft', 'check', 'rows.jsonl']\ntry:\n    main()\n"
    code += "finally:\n    print(*(name for name in ('torch', 'mlflow', 'prefect') if sys.modules.get(name)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Where every row went" in done.stdout
    assert done.stdout.splitlines()[-1] == ""
