# Every target makes the environment it needs, once, in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test reproduce lab export docs clean
.DEFAULT_GOAL := quickstart

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(STAMP) ## train two methods on glyphs and compare them
	$(BIN)/dml_nb quickstart

test: $(STAMP) ## modules name only what they import, agree with clean notebooks; every notebook and every test passes
	$(BIN)/ruff check --quiet dml_nb tests
	$(BIN)/python tests/check_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2

TABLE ?= II
SEEDS ?= 0,1,2
OUT ?= runs

reproduce: $(STAMP) ## run a table of the papers and report it: make reproduce TABLE=II ARGS="--dataset cub --regime frozen --backbone efficientnet_lite0"
	status=0; $(BIN)/dml_nb run $(TABLE) --seeds $(SEEDS) --out $(OUT) --measure $(ARGS) || status=$$?; $(BIN)/dml_nb report $(TABLE) --runs $(OUT) && exit $$status

lab: $(STAMP) ## open the notebooks
	$(BIN)/jupyter lab nbs

export: $(STAMP) ## modules and README from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tests/check_notebooks.py --write-readme

docs: $(STAMP) ## the notebooks as a web site in _docs
	$(BIN)/jupyter nbconvert --to html --output-dir _docs nbs/*.ipynb nbs/rows/*.ipynb

clean: ## remove everything that can be made again
	rm -rf .venv build dist _docs _proc quickstart *.egg-info
