# make study | test | lab | lint: each works on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
PRESET ?= laptop
DEVICE ?= auto
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: setup study quick test lowest lab docs lint publish replicate confirm book clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q dmmlib  # or each of a run's processes does, where PYTHONDONTWRITEBYTECODE is set
	touch $(READY)

study: $(READY)  ## run every notebook through papermill
	$(BIN)/dmm run $(PRESET) --device $(DEVICE)

quick: $(READY)  ## a first true figure in a minute or two: DMM, three baselines and the floor on two forget sets
	$(BIN)/dmm run quick --stage 04 --device $(DEVICE)

test: $(READY)  ## the whole test suite, notebooks included
	DMM_TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

lowest:  ## what reads, stores and commands, on the lowest versions that pyproject.toml declares
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -q --disable-pip-version-check -c constraints-lowest.txt -e . pytest pytest-timeout hypothesis "numcodecs<0.16.4"
	$(VENV)-lowest/bin/python -m pytest -p no:warnings -m "not slow" tests/test_store.py tests/test_presets.py tests/test_data.py \
	  tests/test_files.py tests/test_forget_sets.py tests/test_metrics.py tests/test_plan.py tests/test_report.py tests/test_cli.py \
	  --deselect tests/test_store.py::test_a_disk_that_gives_back_something_else  # which reaches into a later zarr

lab: $(READY)  ## explore in JupyterLab: notebooks/, where `executed` leads to those that were executed last
	@rm -f notebooks/executed; newest="$$(ls -td "$${DMM_RUNS:-runs}"/*/notebooks "$${DMM_RUNS:-runs}"/*/*/notebooks 2> /dev/null | head -1)"; \
	  [ -z "$$newest" ] || { ln -s "$$(cd "$$newest" && pwd)" notebooks/executed && echo "notebooks/executed: $$newest"; }
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

docs: $(READY)  ## the API pages, from docstrings, into docs/api
	$(BIN)/python scripts/api.py

book: $(READY)  ## notebooks, docs and API pages as a static site, into build/book; a warning is an error
	$(BIN)/python scripts/book.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

replicate: $(READY)  ## the main table and cheap attribution on other data, models and seeds, for notebooks 04 and 07
	$(BIN)/python scripts/replicate.py

confirm: $(READY)  ## judge docs/claims.yaml and claims_requests.yaml on seeds that nothing was chosen on
	$(BIN)/python scripts/confirm.py

publish: study  ## put the executed notebooks of the run into notebooks/
	$(BIN)/python scripts/publish.py $(PRESET)

clean:
	rm -rf $(VENV) $(VENV)-lowest build *.egg-info .mypy_cache .ruff_cache .pytest_cache
