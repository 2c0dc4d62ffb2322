# make demo: distil a student on real data and print the table. make test: the default tests.
# Both create .venv from nothing; PYTHON names the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo evidence pages test test-slow test-cpus test-oldest check format clean

demo: .venv/installed-plots
	$(BIN)/python tools/reproduce.py --plan configs/plans/demo.yaml

# docs/evidence.md: about four hours on two CPU cores. Runs that are done are not run again.
evidence: .venv/installed-plots
	test -f output/shapes/vanilla,res20/student_last || \
		$(BIN)/python tools/train.py --cfg configs/shapes/vanilla/res20.yaml SOLVER.AMP bf16 SOLVER.CHANNELS_LAST True
	$(BIN)/python tools/reproduce.py --report docs/evidence.md --plan configs/plans/methods_digits.yaml \
		configs/plans/evidence_shapes.yaml configs/plans/shapes_gap.yaml configs/plans/acclimation.yaml \
		configs/plans/precision.yaml

# What is made from the code: the pages of methods and options, the picture of the parts, README's table of the papers.
pages: .venv/installed-dev
	for page in methods.md options.md pictures/inside.svg; do $(BIN)/python tools/list.py --page docs/$$page || exit 1; done
	$(BIN)/python tools/list.py --page README.md

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu"

# The tests of numbers under each vector instruction set of this CPU, on one thread and on two: about ten minutes.
test-cpus: .venv/installed-dev
	$(BIN)/python tests/each_cpu.py

# The default tests with the oldest versions that requirements.txt allows, in an environment of their own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest output .pytest_cache .ruff_cache

.venv/installed-%: requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

.venv-oldest/installed: requirements.txt setup.py
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -n 's/>=/==/p' requirements.txt > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c .venv-oldest/oldest.txt
	touch $@
