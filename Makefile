VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow lint docs lock sbom audit clean

# Learn five tasks of handwritten digits, export, verify and measure: about two minutes on two CPU cores.
demo: $(READY)
	$(BIN)/duallora-edge demo --run out/demo

# The default tier, one thread for each worker; the third works while others wait for something. Tests that need the real
# images run when DUALLORA_EDGE_ASSETS names their folder.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile

# What takes minutes: the runtime in an emulated arm64 Debian (as root, with debootstrap and qemu-user-static).
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p duallora_edge
	$(BIN)/lint-imports

# The site, in out/site. Its sources are the documents where they lie, as a tree of links.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE docs benchmarks examples \
	learner/embedded/MODEL_CARD.md scripts/check-install.py
docs: $(READY)
	rm -rf .build/site && mkdir -p $(addprefix .build/site/,$(sort $(dir $(PAGES))))
	for page in $(PAGES); do ln -s $(CURDIR)/$$page .build/site/$$page; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in out/site."

# requirements-dev.lock has the exact versions and the hashes of everything for one platform. Nothing is built from
# source there but what has no wheel (LOCKED_SOURCES, small Python packages), by the setuptools of the lock.
LOCK := requirements-dev.lock
LOCK_PLATFORM := CPython 3.11 Linux x86_64
LOCKED_SOURCES := tensorrt-rtx,tensorrt-rtx-cu13
PLATFORM := $(shell $(PYTHON) -c "import platform as p; \
	print(p.python_implementation(), '.'.join(p.python_version_tuple()[:2]), p.system(), p.machine())")

$(READY): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
ifeq ($(PLATFORM),$(LOCK_PLATFORM))
	awk '/^[a-z]/ {wanted = /^(pip|setuptools)==/} wanted' $(LOCK) > $(VENV)/build.lock
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r $(VENV)/build.lock
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: --no-binary $(LOCKED_SOURCES) --no-build-isolation -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
else
	@echo "$(LOCK) is for $(LOCK_PLATFORM), this is $(PLATFORM): installing what pyproject.toml allows, without hashes."
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
endif
	touch $@

# Writes the lock anew, keeping the versions it has (UPGRADE=--upgrade: the newest). Needs uv.
lock:
	uv pip compile $(UPGRADE) --generate-hashes --extra dev --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--custom-compile-command "make lock" --quiet --output-file $(LOCK) pyproject.toml

# What the environment of the tests consists of, in the format CycloneDX: names, versions, licences, hashes.
# Checking it against the schema takes most of the time.
SBOM_CHECK := --validate
sbom: $(READY)
	mkdir -p out
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible $(SBOM_CHECK) --of JSON -o out/sbom.cdx.json $(BIN)/python

# Known vulnerabilities of everything in the lock; asks a database on the internet. Strict: what it cannot be asked about
# fails the audit, and does not pass it.
audit: $(READY)
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r $(LOCK) || { \
		echo "The audit did not pass: see above for vulnerabilities, or for the database that could not be asked." >&2; exit 1; }

clean:
	rm -rf $(VENV) .build out
