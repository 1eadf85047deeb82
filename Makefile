# The two commands of a fresh clone. Each needs Python 3.11 or newer, the package registries and nothing else; a second
# call skips what the first has installed. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(VENV)/bin/influent demo

# More than one thread a process, beside pytest's two processes, is slower on two cores.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python -m pytest -n 2

clean:
	rm -rf $(VENV)

# A stamp is made when all before it worked, so an interrupted install is taken up again.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[test]'
	touch $@

# torch first, by its own: so that the pinned build is chosen before anything else asks for "torch".
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("influent needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@
