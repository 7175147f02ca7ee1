# Two commands are enough on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint audit bench campaign faults fuzz libraries clean

demo: $(VENV)/.demo
	$(BIN)/cdc-sync demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not campaign" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check cdc_sync tests docker
	$(BIN)/ruff check cdc_sync tests docker
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Known vulnerabilities of what is installed; without a database within reach it says so and passes.
audit: $(VENV)/.dev
	$(BIN)/python -m tests.audit $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m tests.bench.libraries
	$(BIN)/python -m tests.bench $(ARGS)

campaign: $(VENV)/.deployment
	$(BIN)/python -m pytest -m campaign $(ARGS)

# Inputs of all targets, and a seed to have the same ones again: make fuzz RUNS=1000000 SEED=7
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz --runs $(or $(RUNS),1000000) $(if $(SEED),--seed $(SEED)) $(ARGS)

# For DURATION seconds, drawn from SEED (another one each time); ROUND=n begins with that round.
# WITH=administrators has what administrators do besides, ONLY=... nothing but the events named.
faults: $(VENV)/.dev
	TEST_FAULTS_SECONDS=$(DURATION) TEST_FAULTS_SEED=$(SEED) TEST_FAULTS_ROUND=$(ROUND) \
	TEST_FAULTS_WITH=$(WITH) TEST_FAULTS_ONLY=$(ONLY) $(BIN)/python -m pytest -s tests/faults/test_fault_campaign.py $(ARGS)

# Those libraries warn about each other.
libraries: $(VENV)/.libraries
	$(BIN)/python -m pytest -W default tests/integration/test_presets_*.py tests/integration/test_ray_executor.py $(ARGS)

# --group needs pip 25.1, which is newer than what Python 3.11 to 3.13 bring along.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]' --group dev
	touch $@

$(VENV)/.libraries: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group libraries
	touch $@

$(VENV)/.deployment: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group deployment
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group bench
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group fuzz
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
