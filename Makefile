# Everything runs in .venv, made on first use from pyproject.toml with the versions of
# constraints.txt. Needs Python >= 3.11 and make; the network only for the first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup sample test test-ray lint bench bench-peers wheel clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,wandb,dev]'
	@touch $@

# The bundled model on the bundled problems; flags in ARGS, for example ARGS="--num_workers 0".
sample: setup
	$(BIN)/python -m jobs.sample $(ARGS)

# In two processes, whatever the machine; ARGS="-n 0 -k name" runs few tests sooner.
test: setup
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadgroup --no-loadscope-reorder $(ARGS)

# Ray workers, nodes, drivers and submitted jobs that are killed; CHAOS_ROUNDS=20 for more of it.
test-ray: setup
	$(BIN)/python -m pytest -m cluster $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m jobs.benchmark $(ARGS)

# The engines of others that the benchmark can run beside this one; 6 GB, about 12 minutes.
bench-peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r jobs/engines/peers.txt
	.venv-peers/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --no-deps -r jobs/engines/peers-no-deps.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check -r jobs/engines/openvino.txt
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check --no-deps -r jobs/engines/openvino-no-deps.txt

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf .venv .venv-peers .venv-openvino dist
