# Every verb makes its own .venv from pinned dependencies; nothing else is needed than Python 3.11 and make. With a C
# compiler the record codec is built in C, too; its tests (and CI) want one.
# Apache Kafka (for `test`, `peers`, `bench`) comes through Maven and wants Java 17; see tests/services.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

SEEDS ?= 1000

.PHONY: demo test check bench soak fuzz peers simulate clean format

$(READY): requirements-dev.txt pyproject.toml hatch_build.py src/semel/wire/_codec.c src/semel/processing/_quick.c
	$(PYTHON) -c 'import sys; sys.exit("Semel needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $(READY)

demo: $(READY)  ## real purchases in by HTTP, out as rows, while processes are killed
	$(BIN)/semel demo $(DEMO)

# Tests wait for other processes more than they compute: three at once keep two cores busy.
test: $(READY)  ## everything that runs in under ten minutes
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder -m "not soak and not peers" $(TEST)

check: $(READY)  ## lint, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY)  ## ratios, measured in one run on this machine
	$(BIN)/python bench/run.py $(BENCH)

soak: $(READY)  ## the long runs: hundreds of kills, gigabytes of log
	$(BIN)/python -m pytest -m soak --timeout 3600 $(TEST)

simulate: $(READY)  ## the broker and its clients on a simulated network and disk: SEEDS=n new seeds on all cores
	$(BIN)/python -m tests.simulation.run --seeds $(SEEDS) $(SIMULATE)

fuzz: $(READY)  ## arbitrary bytes, guided by coverage; EXECUTIONS=n for another number than a million
	$(BIN)/python -m tests.fuzz --executions $(or $(EXECUTIONS),1000000) $(FUZZ)

peers: $(READY)  ## other clients and their suites against our broker, ours against Apache Kafka
	$(BIN)/python -m pytest -m peers --timeout 3600 $(TEST)
	$(BIN)/python -m tests.peers.test_table

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
