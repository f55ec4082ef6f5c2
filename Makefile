PYTHON ?= python3.11
BIN := .venv/bin
# The library alone, from its wheel, for its own tests.
ALONE := .venv-holdover/bin
INSTALL := install --quiet --no-compile --disable-pip-version-check -c constraints.txt
VENV = test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || python3 -m venv $(1)
PYTEST = OMP_NUM_THREADS=1 $(1)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: install demo test check wheels test-holdover test-world browser simulator peers clean

install: .venv/.installed

.venv/.installed: $(wildcard packages/*/pyproject.toml) requirements-dev.txt constraints.txt Makefile
	$(call VENV,.venv)
	$(BIN)/pip $(INSTALL) torch numpy
	$(BIN)/pip $(INSTALL) -r requirements-dev.txt
	$(BIN)/pip $(INSTALL) --no-build-isolation -e packages/holdover -e packages/holdover-world-weights \
		-e 'packages/holdover-world[train,serve,env,fleet,rl]'
	touch $@

demo: install
	$(BIN)/holdover demo

test: check test-holdover test-world

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheels: install
	rm -rf dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist ./packages/*
	$(BIN)/python .ci/wheels.py dist

# First without extras: the command line needs none.
test-holdover: wheels
	$(call VENV,.venv-holdover)
	$(ALONE)/pip $(INSTALL) torch numpy
	$(ALONE)/pip $(INSTALL) --force-reinstall --no-deps dist/holdover-[0-9]*.whl
	$(ALONE)/pip $(INSTALL) dist/holdover-[0-9]*.whl
	$(ALONE)/holdover --version
	$(ALONE)/holdover methods > /dev/null
	$(ALONE)/pip $(INSTALL) "$$(echo dist/holdover-[0-9]*.whl)[report,diffusers]" -r tests/holdover/requirements.txt
	$(call PYTEST,$(ALONE)) tests/holdover

test-world: install
	$(call PYTEST,$(BIN)) tests/lab tests/holdover_world tests/holdover_world_weights

# For the tests of pages in a browser: Chromium, and what drives it. Without them these tests are skipped.
browser: install
	command -v chromium > /dev/null || { apt-get update --quiet --quiet && \
		apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } || \
		echo "no Chromium, and apt-get cannot install it here: the tests of pages will be skipped"
	$(call VENV,.venv-holdover)
	for bin in $(BIN) $(ALONE); do $$bin/pip $(INSTALL) 'playwright>=1.50' 'axe-playwright-python>=0.1.4' || exit 1; done

# To record clips: Panda3D, and an OpenGL driver that renders without a screen.
simulator: install
	apt-get install --yes --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 libgl1
	$(BIN)/pip $(INSTALL) -e 'packages/holdover-world[simulator]'

# For `python -m lab.peers`: the library that it compares with.
peers: install
	$(BIN)/pip $(INSTALL) 'cache-dit>=1.5'

clean:
	rm -rf .venv .venv-holdover dist runs
