# archipelag: `make demo` runs it, `make test` tests it.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo setup test check bench lock clean help

demo: setup  ## three Islands and a gateway on this machine, and a first answer from a real model
	@$(BIN)/archi demo $(ARGS)

setup:  ## prepare .venv (first time: some minutes for the native engine)
	@$(PYTHON) native/prepare.py

test: setup  ## all tests, with the real model
	@$(BIN)/python -m pytest $(ARGS)

check: setup  ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@# libp2p depends on trio_typing, whose old trio-stubs would hide trio's own types from pyright.
	@$(BIN)/pyright
	@$(BIN)/lint-imports

bench: setup  ## every benchmark; results and how to read them: docs/benchmarks.md
	@$(BIN)/python -m bench $(or $(ARGS),all)

lock: setup  ## renew the locked dependencies
	@$(BIN)/python native/lock.py

clean:  ## remove .venv and caches
	rm -rf .venv .cache

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort
