# Every target makes the environment it needs, once, in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test format reproduce lab export docs clean
.DEFAULT_GOAL := quickstart

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(STAMP) ## train two methods on glyphs and compare them
	$(BIN)/dml_nb quickstart

test: $(STAMP) ## check code style, that modules agree with notebooks, then run every notebook and every test
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . || \
		{ echo "The code style check failed: run 'make format', correct what ruff still reports, and commit the result."; exit 1; }
	$(BIN)/python tests/check_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2

format: $(STAMP) ## format notebooks and Python files, correct what ruff can correct, then export
	$(BIN)/ruff format .
	status=0; $(BIN)/ruff check --fix . || status=$$?; $(MAKE) export && exit $$status

TABLE ?= II
SEEDS ?= 0,1,2
OUT ?= runs

reproduce: $(STAMP) ## run a table of the papers and report it: make reproduce TABLE=II ARGS="--dataset cub --regime frozen --backbone efficientnet_lite0"
	status=0; $(BIN)/dml_nb run $(TABLE) --seeds $(SEEDS) --out $(OUT) --measure $(ARGS) || status=$$?; $(BIN)/dml_nb report $(TABLE) --runs $(OUT) && exit $$status

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

export: $(STAMP) ## write modules and README from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tests/check_notebooks.py --write-readme

docs: $(STAMP) ## the notebooks as a web site in _docs, one folder for each folder of nbs
	find nbs -name '*.ipynb' -not -path '*/.*' -exec dirname {} \; | sort -u | while read -r folder; do \
		$(BIN)/jupyter nbconvert --log-level WARN --to html --output-dir "_docs$${folder#nbs}" "$$folder"/*.ipynb || exit 1; \
	done

clean: ## remove everything that can be made again
	rm -rf .venv build dist _docs _proc quickstart *.egg-info
