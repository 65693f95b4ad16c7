# Both main targets set up .venv once; a second call skips the installation.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .

.venv/dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv logs
