# make demo   train the tiny preset on real images through the deepspeed launcher, generate, say where to look
# make test   every CPU test but the slow ones
# Both make their own virtual environment (.venv) the first time; the second time they install nothing.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONPATH

.PHONY: install demo test test-slow lint clean

install: $(VENV)/.installed

# The stamp is as new as setup.py exactly when what setup.py asks for has been installed.
$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 3 GB, two minutes) ..."
	$(VENV)/bin/python -m pip install --quiet -e ".[demo,test]"
	@touch $@

demo: install
	python launch/demo.py

# Whole training runs take most of the time, so whoever is idle takes the next test.
test: install
	python -m pytest tests -n 2 --dist worksteal -m "not slow and not gpu" -q

test-slow: install
	python -m pytest tests -m slow -q

lint: install
	ruff check .
	ruff format --check .

clean:
	rm -rf runs data build *.egg-info
