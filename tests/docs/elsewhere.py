"""Commands of README and docs that `tests/end_to_end/test_docs_commands.py` does not run, and the test that does.

They start servers that stay, need a GPU or several minutes, or are what runs this test itself. A command that is not
here is run.
"""

_STORY = "tests/end_to_end/test_service_story.py"
_SERVED = f"{_STORY}::test_the_champion_answers_requests_with_the_prompt_ids_of_training"
_SERVICE = "tests/end_to_end/test_service.py::test_started_again_it_does_no_harm"
_TARGETS = "tests/docs/test_pages.py::test_each_target_of_make_that_is_named_has_a_program"
_MODULES = "tests/docs/test_pages.py::test_each_module_that_is_named_as_a_program_is_one"
_POOL = "tests/end_to_end/test_kubernetes_pool.py::test_the_printed_command_makes_the_pool"
_EXTRAS = "tests/docs/test_pages.py::test_each_extra_that_is_named_is_there"

_SERVING = "tests/flows/test_serving.py"
_CURL = "tests/tasks/serving/test_app.py::test_curl_gets_answer_stream_and_error"
_LOOPBACK = f"{_SERVING}::test_the_command_serves_on_loopback_by_its_own_names"
_PROVEN = "tests/flows/test_proving.py::test_a_served_version_is_proven_and_another_one_is_not"
_VLLM = f"{_SERVING}::test_vllms_command_is_printed_and_another_is_checked"

_EVALUATED = "tests/flows/test_evaluating.py::test_every_row_is_accounted_for_and_answers_are_written"

_TEAM = "tests/tasks/training/process/test_team.py"
_GROWN = f"{_TEAM}::test_a_machine_that_comes_grows_the_team_and_a_lost_one_shrinks_it"
_SLURM = "tests/deploy/test_slurm.py"
_JOBSET = "tests/deploy/test_kubernetes_team.py::test_the_set_is_valid"
_NODES = "tests/tasks/test_cluster.py::test_what_is_read_is_sent_and_what_is_made_comes_back_in_order"

ELSEWHERE: dict[str, str] = {
    "export SFT_TEAM=s3://bucket/team SFT_RENDEZVOUS=10.0.0.5:29400": _GROWN,
    ".venv/bin/sft run my.yaml --set training.num_processes=8 --set training.num_nodes=3": _GROWN,
    "SFT_TEAM=s3://bucket/team .venv/bin/sft join": _GROWN,
    "sbatch --export=ALL,SFT_TEAM=/shared/team deploy/slurm/team.sbatch my.yaml": f"{_SLURM}"
    "::test_the_first_node_runs_and_the_others_join",
    "sbatch --array=1-3 --export=ALL,SFT_TEAM=/shared/team deploy/slurm/machine.sbatch": f"{_SLURM}"
    "::test_a_machine_of_an_array_is_queued_again_alone",
    "kubectl create configmap sft-run --namespace sft --from-file=run.yaml=my.yaml": _JOBSET,
    "kubectl apply --filename deploy/kubernetes/team.yaml": _JOBSET,
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=a-long-secret-that-all-machines-have": _NODES,
    ".venv/bin/ray start --head --port=6379 --include-dashboard=false --disable-usage-stats": _NODES,
    ".venv/bin/ray start --address=10.0.0.5:6379 --disable-usage-stats": _NODES,
    ".venv/bin/sft prove http://127.0.0.1:8000 demo-assistant@champion": _PROVEN,
    ".venv/bin/sft serve-model demo-assistant@champion": _LOOPBACK,
    "curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    '-d \'{"messages": [{"role": "user", "content": "What does the quamrin eat?"}]}\'': _CURL,
    "SFT_SERVE_API_KEY=a-long-secret .venv/bin/sft serve-model demo-assistant@champion --host 0.0.0.0 "
    "--allow-host llm.example.org": f"{_SERVING}::test_beyond_loopback_a_key_and_a_name_are_wanted",
    ".venv/bin/sft serve-model demo-assistant@champion --engine vllm": _VLLM,
    ".venv/bin/sft serve-model demo-assistant@champion --engine vllm --check serve.sh": _VLLM,
    ".venv/bin/sft evaluate mine@champion new-rows.jsonl --answers answers.parquet --json figures.json": _EVALUATED,
    "make test": _TARGETS,
    "make serve": _SERVICE,
    "SFT_DATABASE_URL=postgresql://sft:PASSWORD@127.0.0.1:5432/sft make serve": _SERVICE,
    "set -a; . .sft/service/client.env; set +a": _SERVED,
    "PATH=.venv/bin:$PATH mlflow models serve -m models:/demo-assistant@champion --env-manager local "
    "--port 8000": _SERVED,
    "PATH=.venv/bin:$PATH MLFLOW_TRACKING_URI=sqlite:///.sft/mlflow.db mlflow models serve -m models:/mine@champion "
    "--env-manager local": _SERVED,
    "curl http://127.0.0.1:8000/invocations -H 'Content-Type: application/json' "
    '-d \'{"messages": [{"role": "user", "content": "What does the quamrin eat?"}]}\'': _SERVED,
    ".venv/bin/sft publish more.jsonl --name support --recipe support.yaml": f"{_STORY}"
    "::test_published_data_starts_the_run_that_makes_the_next_champion",
    '.venv/bin/sft rollback demo-assistant --reason "too terse"': f"{_STORY}"
    "::test_the_champion_is_taken_back_by_command_and_on_the_page",
}

INLINE: dict[str, str] = {
    "python -m tests.benchmarks.cluster --rows 1000000 --rounds 2 --lose": _MODULES,
    "python -m tests.benchmarks.token_parts": _MODULES,
    "python -m tests.benchmarks.scale_simulation": "tests/benchmarks/test_scale_simulation.py"
    "::test_the_page_has_the_tables_that_are_printed",
    ".venv/bin/sft run my_sft.yaml": "tests/end_to_end/test_llamafactory.py::test_documented_training_runs_as_it_is",
    "sft publish FILE --name support --recipe support.yaml": f"{_STORY}"
    "::test_published_data_starts_the_run_that_makes_the_next_champion",
    "prefect work-pool create gpu --type kubernetes --base-job-template deploy/kubernetes/gpu-pool.json": _POOL,
    "python -m tasks.training.reference CONFIG": "tests/tasks/training/test_reference.py",
    "python -m docs.settings_page": "tests/docs/test_settings_page.py::test_page_is_that_of_the_model",
    "python -m docs.label_pictures": "tests/docs/test_label_pictures.py::test_pictures_are_those_of_the_code",
    "python -m tests.benchmarks.plan --cpu": _MODULES,
    "python -m tests.gpu.long_examples": _MODULES,
    "python -m tests.tasks.evaluation.gate_figures": _MODULES,
    "python -m tests.laboratory.fuzz": _MODULES,
    "python -m tests.laboratory.fuzz --cases 2000": _MODULES,
    "python -m tests.laboratory.crashes": _MODULES,
    "python -m tests.laboratory.crashes --draws 100": _MODULES,
    "python -m tests.laboratory.month": _MODULES,
    "SFT_FAMILIES=all pytest tests/tasks/families/test_matrix.py": _MODULES,
    ".venv/bin/pip install 'sft-pipeline[nf4]'": _EXTRAS,
    ".venv/bin/pip install 'sft-pipeline[flash4]'": _EXTRAS,
    ".venv/bin/pip install 'sft-pipeline[liger]'": _EXTRAS,
    ".venv/bin/pip install 'sft-pipeline[linear]'": _EXTRAS,
    ".venv/bin/pip install 'sft-pipeline[export]'": _EXTRAS,
    ".venv/bin/pip install 'sft-pipeline[compressed]'": _EXTRAS,
    ".venv/bin/pip install 'sft-pipeline[deepspeed]'": _EXTRAS,
}
"""Commands in sentences and tables. `make TARGET` and `sft COMMAND --option` need no entry: they are looked up."""
