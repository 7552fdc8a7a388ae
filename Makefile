# Every target makes the environment it needs, once, in .venv: runs need the package, everything else also its tools.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
RUNS := .venv/.installed-for-runs
TOOLS := .venv/.installed-tools
SITE_TOOLS := .venv/.installed-site-tools
TIMES := .venv/notebook-times.txt

.PHONY: quickstart test format reproduce gpu lab export docs clean
.DEFAULT_GOAL := quickstart

$(RUNS): settings.ini setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) ".[lite]"
	touch $@

$(TOOLS): $(RUNS)
	$(INSTALL) ".[dev]"
	touch $@

$(SITE_TOOLS): $(TOOLS)
	$(INSTALL) ".[docs]"
	touch $@

quickstart: $(RUNS) ## fine-tune a pretrained network on photographs of products with two methods, and compare them
	$(BIN)/dml_nb quickstart

test: $(TOOLS) ## check code style, that modules agree with notebooks, then run every notebook and every test
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . || \
		{ echo "The code style check failed: run 'make format', correct what ruff still reports, and commit the result."; exit 1; }
	$(BIN)/python tests/check_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing > $(TIMES) || { cat $(TIMES); exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --durations 10
	@echo "The ten slowest notebooks:"; grep ' secs$$' $(TIMES) | head -n 10

format: $(TOOLS) ## format notebooks and Python files, correct what ruff can correct, then export
	$(BIN)/ruff format .
	status=0; $(BIN)/ruff check --fix . || status=$$?; $(MAKE) export && exit $$status

TABLE ?= II
SEEDS ?= 0,1,2
OUT ?= runs

reproduce: $(RUNS) ## run a table of the papers and report it: make reproduce TABLE=II ARGS="--dataset cub --regime frozen --backbone efficientnet_lite0"
	status=0; $(BIN)/dml_nb run $(TABLE) --seeds $(SEEDS) --out $(OUT) --measure $(ARGS) || status=$$?; $(BIN)/dml_nb report $(TABLE) --runs $(OUT) && exit $$status

gpu: $(TOOLS) ## on a machine with a GPU: its tests, benchmarks and table rows, resumable; a trial anywhere: make gpu ARGS="--tiny"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lab: $(TOOLS) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

export: $(TOOLS) ## write modules and README from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tests/check_notebooks.py --write-readme

docs: $(SITE_TOOLS) ## the notebooks as a web site in _docs, with a check of its links; it needs no network
	$(BIN)/python tests/make_docs.py

clean: ## remove everything that can be made again
	rm -rf .venv build dist _docs _proc quickstart *.egg-info
