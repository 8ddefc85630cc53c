VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow lint clean

# Learn five tasks of handwritten digits, export, verify and measure: about two minutes on two CPU cores.
demo: $(READY)
	$(BIN)/duallora-edge demo --run out/demo

# The default tier, one thread a worker; tests that need the real images run when DUALLORA_EDGE_ASSETS names their folder.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# What takes minutes: the runtime in an emulated arm64 Debian (as root, with debootstrap and qemu-user-static).
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# mypy does not follow the package mapping of an editable install, so it gets a tree of links.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .build/types && mkdir -p .build/types
	cp -rs $(CURDIR)/duallora_edge .build/types/duallora_edge
	for part in learner export runtime device_profiles; do ln -s $(CURDIR)/$$part .build/types/duallora_edge/$$part; done
	cd .build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p duallora_edge

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .build out
