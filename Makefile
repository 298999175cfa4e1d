# Thin names for the commands of this repository. Everything runs in the private environment that tools/test makes.
.PHONY: test test-all lint format docs serve-docs bench screens families check

test:            ## the quick tests
	tools/test
test-all:        ## the slow ones too, and those that need a GPU where there is one
	tools/test --all
check:           ## what every change has to pass: lint, types, import contracts, tests
	.ci/run
lint:            ## lint, format, types, import contracts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy tools/gpu_check
	.venv/bin/lint-imports
format:          ## format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
docs:            ## the site, into site/ (pip install -e '.[docs]')
	.venv/bin/mkdocs build --strict
serve-docs:      ## the site at http://127.0.0.1:8000, rebuilt on every change
	.venv/bin/mkdocs serve
bench:           ## what the cache costs when everything is resident, and reading
	.venv/bin/python tools/bench/overhead.py
	.venv/bin/python tools/bench/read.py
screens:         ## the README's pictures and its table of memory
	.venv/bin/python tools/screens.py
families:        ## docs/families.md
	tools/families
