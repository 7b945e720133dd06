# Everything runs in .venv, which is made from requirements.txt when it is missing or stale.
# Needs Python 3.11 or newer and make. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run worker periodiq web sandbox status test test-slow test-browser bench lint format lock env benchenv clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env:  ## make .venv, unless it is up to date
	@$(PYTHON) scripts/environment.py

benchenv:  # what is compared with is no dependency of ours: an environment of its own
	@$(PYTHON) scripts/environment.py benchmarks

run: env  ## everything on this machine: Redis, sandbox, worker, periodiq, web; Ctrl-C ends it
	@exec $(BIN)/lifelogger run

worker: env  ## one worker: runs the syncs
	@exec $(BIN)/lifelogger worker

periodiq: env  ## the timetable: plans the syncs
	@exec $(BIN)/lifelogger periodiq

web: env  ## the status pages, the API and the dashboard
	@exec $(BIN)/lifelogger web

sandbox: env  ## the simulated providers
	@exec $(BIN)/lifelogger sandbox

status: env  ## how everything stands
	@$(BIN)/lifelogger status

# What pytest makes of the tests is kept, whatever the shell says: each process needs five seconds to make it anew.
test test-slow: export PYTHONDONTWRITEBYTECODE =

test: env  ## the tests, in two to three minutes on two cores
	@$(BIN)/pytest -n auto --dist worksteal

# Whole systems that are given so many seconds: nothing else runs beside them.
ALONE := tests/test_run.py tests/test_webhooks.py tests/test_browser.py

test-slow: env  ## the tests that take longer: on PostgreSQL, kills at random, a month of 100 lives
	@$(BIN)/pytest -m slow --timeout 600 $(ALONE)
	@$(BIN)/pytest -m slow --timeout 900 -n auto $(addprefix --ignore ,$(ALONE))

test-browser: env  ## the pages in a browser: needs Debian's chromium and chromium-driver; of test-slow
	@$(BIN)/pytest -m browser

bench: env benchenv  ## measure, as ratios, in some minutes (benchmarks/README.md)
	@$(BIN)/python -m benchmarks.scale --to 100000
	@$(BIN)/python benchmarks/news.py
	@benchmarks/.venv/bin/python -m benchmarks.compare

lint: env  ## ruff, mypy, and which room imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: env  ## let ruff format everything
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: env  ## resolve both requirements.txt anew (needs uv)
	uv pip compile pyproject.toml requirements.in --all-extras --override overrides.txt --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --upgrade \
	  --output-file requirements.txt
	uv pip compile benchmarks/requirements.in --constraint requirements.txt --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --upgrade \
	  --output-file benchmarks/requirements.txt

clean:  ## remove .venv and what was made at run time, var/ with its database
	rm -rf .venv .venv.lock benchmarks/.venv benchmarks/.venv.lock var
