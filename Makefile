# One vocabulary for people, hooks and CI. Every target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON := .triton
LLAMA := .llama

.PHONY: help install demo docs serve stop test test-kernels test-llama test-gpu check format bench-data bench-gpu bench-run bench-service lock audit sbom release clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

LOCKS := deploy/supply/torch.lock deploy/supply/requirements.lock

$(INSTALLED): pyproject.toml $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || { echo "Python 3.11.5 or later is needed: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python deploy/supply/install.py $(if $(filter no,$(HASHES)),--without-hashes)
	@touch $@

install: $(INSTALLED) ## Make the environment in .venv

demo: $(INSTALLED) ## Fine-tune, evaluate and register the demo model
	@$(BIN)/sft run deploy/configs/demo.yaml

serve: $(INSTALLED) ## Start the Prefect and MLflow servers and the workers on this machine
	@$(BIN)/sft serve

stop: $(INSTALLED) ## Stop the servers, the workers and their runs
	@$(BIN)/sft stop

test: $(INSTALLED) ## Run all tests, those of the running service beside the others
	@$(BIN)/python -m tests.together $(ARGS)

$(TRITON)/.installed:
	@echo "Installing Triton into $(TRITON), for its interpreter"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.9.0
	@touch $@

$(LLAMA)/.installed: tests/tasks/exporting/llama_cpp/package-lock.json
	@echo "Installing llama.cpp (node-llama-cpp) into $(LLAMA), for the tests of GGUF exports"
	@mkdir -p $(LLAMA) && cp tests/tasks/exporting/llama_cpp/package*.json $(LLAMA)/
	@cd $(LLAMA) && npm ci --ignore-scripts --omit=optional --no-audit --no-fund --loglevel=error
	@touch $@

test-kernels: $(INSTALLED) $(TRITON)/.installed ## Test the GPU kernels without a GPU, in Triton's interpreter
	@TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -q tests/tasks/decoder/test_*kernels.py $(ARGS)

test-llama: $(INSTALLED) $(LLAMA)/.installed ## Let llama.cpp read GGUF exports (node-llama-cpp, from npm, on Linux x86_64)
	@$(BIN)/python -m pytest -q tests/tasks/exporting/test_llama_cpp.py tests/end_to_end/test_exporting.py $(ARGS)

test-gpu: $(INSTALLED) ## Use the whole product on this machine's GPU, story after story (ARGS="--at-once 3")
	@$(BIN)/python -m tests.gpu.acceptance $(ARGS)

check: $(INSTALLED) ## Format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED) ## Format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(INSTALLED) ## Build the documentation as a site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --config-file deploy/site/mkdocs.yml --strict --quiet
	@echo "build/site/index.html (with search: $(PYTHON) -m http.server --directory build/site)"

bench-data: $(INSTALLED) ## Time the data preparation (ARGS="--rows 1000000": its memory)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m tests.benchmarks.data $(ARGS)

bench-gpu: $(INSTALLED) ## Time the training on this machine's GPU (ARGS="--peer unsloth=FOLDER": beside a peer)
	@$(BIN)/python tests/benchmarks/gpu.py $(ARGS)

bench-run: $(INSTALLED) ## Time the whole job, raw rows to a registered model (ARGS="--config FILE --peer trl=FOLDER")
	@$(BIN)/python -m tests.benchmarks.run $(ARGS)

bench-service: $(INSTALLED) ## Submit 50 runs at once to servers and workers of its own (ARGS="--runs 10 --minutes 10")
	@$(BIN)/python -m tests.benchmarks.service $(ARGS)

lock: $(INSTALLED) ## Write torch.lock and requirements.lock from constraints.txt, with the hashes that the index has
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m deploy.supply.lock

audit: $(INSTALLED) ## Compare the locked packages with known vulnerabilities (OSV=all.zip: a copy of OSV's database)
	@$(BIN)/python -m deploy.supply.audit $(if $(OSV),--osv $(OSV))

sbom: $(INSTALLED) ## Write what the environment is made of to dist/sbom.cdx.json (CycloneDX)
	@mkdir -p dist
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json $(BIN)/python

release: sbom ## Build the wheel into dist, with the locks, the bill of materials and a sha256 of each
	@rm -f dist/*.whl
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --disable-pip-version-check -w dist .
	@rm -rf build/lib build/bdist.*
	@cp $(LOCKS) dist/
	@cd dist && sha256sum *.whl *.lock sbom.cdx.json > SHA256SUMS && cat SHA256SUMS

clean: ## Remove the environment and what runs left here
	rm -rf $(VENV) $(TRITON) $(LLAMA) .sft
