# make demo and make test need nothing but Python 3.11 or newer: they set up .venv by themselves, once.
#   PYTHON=/path/to/python   the Python to set up with (by default the first on the path that is new enough)

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
MARKDOWN := README.md CHANGELOG.md docs
EXTRAS := dev,examples,inspect,docs

# The torches that are supported beside the pin of constraints.txt, which `make test` runs with, and the Pythons.
NEWEST := 2.15.0
TORCHES := 2.11.0 2.14.1 $(NEWEST)
PYTHONS := 3.11 3.12 3.13 3.14
PIN = $(patsubst torch==%,%,$(shell grep ^torch== constraints.txt))

.PHONY: help docs release demo test quick check faults newest matrix fix gpu bench sweep zoo soak mutate clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    decode with a Llama, eagerly and compiled, and compare bit for bit"
	@echo "make test    all checks: format, lint, types, tests (make check is the same)"
	@echo "make faults  plant more than 500 faults in the package, one after the other: does a test notice each?"
	@echo "make quick   the inner loop, less than a minute: format, lint, and the tests that compile little"
	@echo "make newest  the core of the tests on the newest torch, $(NEWEST), in an environment of its own"
	@echo "make matrix  the tests on the torches $(TORCHES), with each of the Pythons $(PYTHONS) that is here"
	@echo "make fix     format, and repair what lint can repair"
	@echo "make gpu     the tests that need a CUDA GPU"
	@echo "make bench   time the replay"
	@echo "make sweep   PyTorch's own ops and modules against eager, bit for bit: SWEEP='--device cuda --processes 16'"
	@echo "make zoo     models of transformers, timm, torchvision and diffusers, likewise: ZOO='--device cuda --processes 8'"
	@echo "make mutate  random mutants of the package against its tests: MUTATE='partition rules --sample 40 --minutes 20'"
	@echo "make soak    MINUTES=8 on a GPU: threads, sizes, evictions, resets, dying models; does anything grow?"
	@echo "make docs    the documentation as a site, in build/site; each link is checked"
	@echo "make release REPOSITORY=https://...  build what is uploaded, and try it as a user would"
	@echo "make clean   remove .venv, .venv-* and caches"

demo: $(READY)
	$(RUN) examples/quickstart.py

test: check

# Two workers with one thread each: the models of the tests are too small to share out. The types are checked while they
# start; what is wrong is said at the end again.
check: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mdformat --check $(MARKDOWN)
	$(RUN) -m mypy & OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not faults" && { wait $$! || $(RUN) -m mypy; }

# Takes half as long as the tests. Continuous integration runs it behind them.
faults: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -q -m "faults and not gpu"

# What a change breaks first, by the second: the parts by themselves, the drivers, and the heart of the contract.
QUICK := ir $(addprefix marks/test_,marking.py structure.py) $(addprefix compiling/test_,partition.py lowering.py) \
	$(addprefix recordings/test_,bridges.py replay.py) $(addprefix calling/test_,eviction.py retries.py) \
	$(addprefix drivers/test_,driver_contract.py ordering.py graph_nodes.py leaving.py) \
	$(addprefix contract/test_contract_,once.py order.py aliases.py random.py exceptions.py gaps.py) \
	$(addprefix project/test_,layering.py public_api.py options.py)
quick: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -q -m "not gpu" $(addprefix tests/,$(QUICK))

# The environments of these two are .venv-<torch>-<python>; with the CUDA builds of PyTorch each takes about 6 GB.
newest: $(READY)
	$(RUN) tests/matrix.py $(NEWEST) --core --or-newer-than $(PIN)

matrix: $(READY)
	$(RUN) tests/matrix.py $(TORCHES) --pythons $(PYTHONS)

fix: $(READY)
	$(RUN) -m ruff format .
	$(RUN) -m mdformat $(MARKDOWN)
	$(RUN) -m ruff check --fix .

gpu: $(READY)
	$(RUN) -m pytest -m gpu

bench: $(READY)
	$(RUN) examples/benchmarks/replay.py

# Takes an hour on two cores; what build/sweep.jsonl has already is not run again.
sweep: $(READY)
	$(RUN) tests/sweep.py $(SWEEP)

# Needs those four libraries; what build/zoo.jsonl has already is not run again.
zoo: $(READY)
	$(RUN) tests/zoo.py $(ZOO)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

release:
	REPOSITORY=$(REPOSITORY) .ci/release.sh

# Not in continuous integration: mutants are for those who write tests.
mutate: $(READY)
	@$(RUN) -c "import cosmic_ray" 2>/dev/null || $(RUN) -m pip install -q -c constraints.txt "cosmic-ray>=8.7"
	OMP_NUM_THREADS=1 nice -n 19 $(RUN) tests/mutate.py $(MUTATE)

MINUTES := 8
soak: $(READY)
	$(RUN) tests/soak.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- set-up -----------------------------------------------------------------------------------------------------------
# The stamp comes last, so a .venv that was left half made is set up again, with what it has.

$(READY): pyproject.toml constraints.txt .ci/setup.sh
	@VENV=$(VENV) EXTRAS=$(EXTRAS) sh .ci/setup.sh
	@touch $@
