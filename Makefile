PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo test browser simulator clean

install: .venv/.installed

# stlpips_pytorch is taken for its weight file alone: without --no-deps it drags in torchvision.
.venv/.installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[world,report,diffusers,serve,rl,fleet,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps stlpips_pytorch==0.0.2
	touch $@

demo: install
	$(BIN)/holdover demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Only needed to test pages in a browser: Chromium, and what drives it. Without it these tests are skipped.
browser: install
	command -v chromium > /dev/null || { apt-get update --quiet --quiet && \
		apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } || \
		echo "no Chromium, and apt-get cannot install it here: the tests of pages will be skipped"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'

# Only needed to record new clips: Panda3D and an OpenGL driver that renders without a screen.
simulator: install
	apt-get install --yes --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 libgl1
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[simulator]'

clean:
	rm -rf .venv runs
