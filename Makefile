# Two commands are enough: make demo, make test. Both set up everything first (scripts/setup), which takes no time when nothing changed.
.DEFAULT_GOAL := help
SEED ?= 1
TASK ?= segmentation
ifneq (,$(findstring command line,$(origin task) $(origin seed)))
$(error TASK and SEED are written in capitals: make demo TASK=classification SEED=2)
endif
.PHONY: help setup demo mlflow federation demo-result demo-clean test test-cluster test-browser pictures check lint lock

help:
	@echo "Wardround: train one medical imaging model across hospitals; the data stays, the model goes round."
	@echo
	@echo "  make demo         three hospitals, an aggregator and MLflow on this machine; ends with one table (SEED=1 TASK=segmentation)"
	@echo "                    TASK=classification: pairs of skin patches, similar or not, in place of brain tissue"
	@echo "  make mlflow       open MLflow over the newest demo: rounds, curves, lineage"
	@echo "  make federation   the newest demo's hospitals, aggregator and MLflow up again, to submit a plan of your own"
	@echo "  make demo-result  result.json of the newest demo; with -s nothing else is printed, for programs"
	@echo "  make demo-clean   remove the demo's folder: hospitals, keys, runs"
	@echo "  make test         everything that must hold: lint, then every test, whole federations too"
	@echo "  make test-cluster the charts on a real Kubernetes of this machine's own; as root, with Go; installs Debian packages, and builds for 8 to 16 minutes the first time"
	@echo "  make test-browser Debian's Chromium against a real MLflow; names the package if it is missing"
	@echo "  make pictures     docs/pictures anew, from the newest demo"
	@echo "  make check        before a commit: lint, then the quick tests"
	@echo "  make lint         style, types, import contracts, generated code"
	@echo "  make lock         pin requirements/*.txt anew after a change of pyproject.toml"
	@echo
	@echo "The first of them installs 5.7 GB into .venv. Downloads are kept in WARDROUND_CACHE (default ~/.cache/wardround) and uv's cache."

setup:
	@scripts/setup

demo: setup
	@.venv/bin/python -m sandbox --seed $(SEED) --task $(TASK)

mlflow: setup
	@.venv/bin/python -m sandbox mlflow

federation: setup
	@.venv/bin/python -m sandbox federation

demo-result:
	@cat demo/result.json 2>/dev/null || { echo "no result yet: run make demo first" >&2; exit 1; }

demo-clean:
	rm -rf demo

test: setup
	scripts/lint
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile

test-cluster: setup
	scripts/cluster packages
	scripts/cluster test

test-browser: setup
	@scripts/browser
	WARDROUND_BROWSER=1 .venv/bin/python -m pytest -x -v tests/browser

pictures: setup
	@scripts/browser
	.venv/bin/python -m tests.browser.pictures

check: setup
	scripts/check

lint: setup
	scripts/lint

lock: setup
	scripts/lock
