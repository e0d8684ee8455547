# Everything works from a clean clone with Python 3.11 or newer and make. Nothing is downloaded but packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-peers.txt
CLIENTS := .venv-clients
CLIENTS_PIP := $(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-clients.txt
BROWSER := .venv-browser
BROWSER_PIP := $(BROWSER)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-browser.txt
RAY := .venv-ray
RAY_PIP := $(RAY)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-ray.txt
GPU := .venv-gpu
GPU_EXTRAS ?= gpu,tensorrt,verify
GPU_CONSTRAINTS = constraints$(if $(findstring cu12,$(GPU_EXTRAS)),-cu12).txt
PROMPT ?= a large red star on a blue background

# A half-made environment must not pass for a whole one.
.DELETE_ON_ERROR:

.PHONY: help demo serve demo-export install test lint types pytest peers test-peers clients test-clients browser test-page ray test-ray test-hostile test-references format mini-bundle gallery checkpoints readme bench bench-export bench-build bench-host bench-load bench-lora bench-pareto bench-serve gpu-check clean

help:  ## Say what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

demo: $(VENV)/.runtime  ## A picture from the embedded pair: torch-free, in a new .venv
	@mkdir -p out
	@$(BIN)/trt-generate "$(PROMPT)" --seed 7 -o out/demo.png

serve: $(VENV)/.server  ## The embedded pair for the clients of OpenAI's, AUTOMATIC1111's and ComfyUI's APIs: PORT=8188
	@$(BIN)/trt-serve --port $(or $(PORT),8188)

demo-export: $(VENV)/.full  ## Export the embedded pair at fp16, and a picture from the result
	@mkdir -p out
	@$(BIN)/export-engines --fp16 --out out/bundle
	@$(BIN)/trt-generate "$(PROMPT)" --engines out/bundle --seed 7 -o out/demo-export.png

install: $(VENV)/.full  ## The full development environment in .venv

test: lint types pytest  ## Lint, types and tests

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.full
	$(BIN)/mypy -p sdxl_trt && $(BIN)/mypy examples
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 -p sdxl_trt

pytest: $(VENV)/.full
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore=tests/references -m "not builds and not compares and not hostile"

test-references: $(VENV)/.full  ## Whole runs against diffusers and recorded results of ComfyUI, and whole plans
	$(BIN)/pytest --numprocesses 2 --dist loadfile tests/references
	$(BIN)/pytest --numprocesses 2 --dist loadgroup -m "builds or compares" tests/tensorrt tests/test_parity.py

peers: $(PEERS)/.done  ## The environment of optimum-onnx in .venv-peers

test-peers: $(VENV)/.full $(PEERS)/.done  ## What others' libraries make of what this project writes
	$(PEERS)/bin/python -m pytest --config-file tests/peers/pytest.ini tests/peers

clients: $(CLIENTS)/.done  ## The environment of the clients of trt-serve in .venv-clients

test-clients: $(VENV)/.full $(CLIENTS)/.done  ## Real clients draw on trt-serve, which runs as a process of its own
	$(CLIENTS)/bin/python -m pytest --config-file tests/clients/pytest.ini tests/clients

test-hostile: $(VENV)/.full  ## Bodies, pictures and websockets that attack trt-serve, its signals, and what it tells
	$(BIN)/pytest -m hostile tests/server/hostile

browser: $(BROWSER)/.done  ## The environment that drives a browser in .venv-browser; no browser is downloaded

test-page: $(VENV)/.full $(BROWSER)/.done  ## The page of trt-serve in the system's Chromium: CHROMIUM=/usr/bin/chromium
	$(BROWSER)/bin/python -m pytest --config-file tests/browser/pytest.ini tests/browser

ray: $(RAY)/.done  ## The environment with Ray in .venv-ray

test-ray: $(RAY)/.done  ## trt-serve --ray on a local cluster of two devices, in three minutes
	$(RAY)/bin/python -m pytest --config-file tests/ray/pytest.ini tests/ray tests/server/ray/test_deployments.py

format: $(VENV)/.full  ## Format the code and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded pair is stored once, in its bundle: the export reads it whole before it replaces it.
mini-bundle: $(VENV)/.full  ## Export the embedded pair again to mini/bundle; with PAIR=DIR the pair that publish wrote there
	$(if $(PAIR),$(BIN)/export-engines --base "$(PAIR)/base" --refiner "$(PAIR)/refiner" $(if $(wildcard $(PAIR)/vae_tiny),--tiny-vae "$(PAIR)/vae_tiny") --fp16 --out mini/bundle)
	$(BIN)/export-engines --fp16 --out mini/bundle

gallery: $(VENV)/.runtime  ## Draw the README's contact sheet with the embedded bundle
	@mkdir -p docs
	$(BIN)/python examples/gallery.py docs/gallery.png

checkpoints: $(VENV)/.full  ## Write SDXL's base and refiner with random weights, 13 GB, to out/checkpoints
	$(BIN)/python -m sdxl_trt.benchmarks.full_size.checkpoints --out out/checkpoints

readme: $(VENV)/.full  ## Make the README's benchmark, and the pages beside the results, of benchmarks/results
	@$(BIN)/python -m sdxl_trt.benchmarks.report.readme

bench: $(VENV)/.full $(PEERS)/.done  ## Measure against PyTorch, diffusers, optimum-onnx and OpenVINO
	$(BIN)/python -m sdxl_trt.benchmarks.ten_minutes $(if $(QUICK),--quick --results out/bench/quick.json)

bench-export: $(VENV)/.full  ## Measure the export at SDXL's real size; needs 45 GB of disk under out/
	$(BIN)/python -m sdxl_trt.benchmarks.full_size.export $(if $(QUICK),--quick --results out/bench-export/quick.json)

bench-build: $(VENV)/.full  ## Measure plan builds at SDXL's real size, without a GPU; needs 16 GB of memory, 35 GB of disk
	$(BIN)/python -m sdxl_trt.benchmarks.full_size.build $(if $(QUICK),--quick --results out/bench-build/quick.json)

# The schedulers that need scipy or torchsde run in the peers' environment, if there is one.
bench-host: $(VENV)/.full  ## Measure the host's time per step beside diffusers' schedulers, in minutes
	$(BIN)/python -m sdxl_trt.benchmarks.host_time $(if $(wildcard $(PEERS)/.done),--peers $(PEERS)/bin/python)

bench-load: $(VENV)/.full  ## Measure reading and checking a plan, and simulate a cold run; needs 11 GB of memory, 6 GB of disk
	$(BIN)/python -m sdxl_trt.benchmarks.cold_load $(if $(QUICK),--quick --results out/bench-load/quick.json)

bench-pareto: $(VENV)/.full $(PEERS)/.done  ## Compare faster settings with the full run, and presets with other libraries, in half an hour
	$(BIN)/python -m sdxl_trt.benchmarks.pareto $(if $(QUICK),--quick --results out/bench-pareto/quick.json)

bench-serve: $(VENV)/.full  ## Load trt-serve, and measure it in turns with diffusers behind FastAPI, in twenty minutes
	$(BIN)/python -m sdxl_trt.benchmarks.serving $(if $(QUICK),--quick --results out/bench-serve/quick.json)

bench-lora: $(VENV)/.full  ## Measure switching a LoRA on the CPU at SDXL's size; needs 24 GB of memory, 15 GB of disk
	$(BIN)/python -m sdxl_trt.benchmarks.lora_switch $(if $(QUICK),--quick --results out/bench-lora/quick.json)

# Two packages install one `onnxruntime`, so the one for GPUs has an environment of its own; without a GPU it is not made.
# The driver says first which extras it can run, those for CUDA 12 or 13; --look prints them, or why there is no GPU.
# make -n runs a line that calls make, so nothing else is in it. Only the report goes to stdout.
# Without BUNDLE=DIR or QUICK=1, a pair of SDXL's size is made first, in the environment that exports.
gpu-check: $(VENV)/.runtime  ## On a machine with an NVIDIA GPU: prove what no CPU can, and print a report for an issue
	@$(BIN)/python -m sdxl_trt.benchmarks.gpu_check --look >$(VENV)/.gpu-extras || \
		{ code=$$?; cat $(VENV)/.gpu-extras; exit $$code; }
	@said=$$(cat $(VENV)/.gpu-extras); $(MAKE) -s --no-print-directory GPU_EXTRAS="$$said" "$(GPU)/.done-$$said" >&2
	@$(if $(BUNDLE)$(QUICK),,$(MAKE) -s --no-print-directory $(VENV)/.full >&2)
	@$(if $(BUNDLE)$(QUICK),,$(BIN)/python -m sdxl_trt.benchmarks.gpu_check.pair >&2)
	@$(GPU)/bin/python -m sdxl_trt.benchmarks.gpu_check $(if $(BUNDLE),--bundle "$(BUNDLE)",$(if $(QUICK),--quick)) \
		$(if $(MINUTES),--minutes $(MINUTES))

clean:  ## Remove what make made
	rm -rf $(VENV) $(PEERS) $(CLIENTS) $(BROWSER) $(RAY) $(GPU) out build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[cpu]'
	@touch $@

$(VENV)/.server: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[cpu,server]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.full: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[cpu,openvino,export,server,bench,dev]'
	@touch $@ $(VENV)/.runtime $(VENV)/.server

# The project itself comes without its dependencies: the peers pin older ones than its export needs.
$(PEERS)/.done: pyproject.toml constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	@$(PEERS_PIP) accelerate diffusers msgspec nncf onnx onnxruntime openvino optimum-intel optimum-onnx peft pillow \
		pytest safetensors scipy tokenizers torch torchdiffeq torchsde transformers
	@$(PEERS_PIP) --no-deps k-diffusion
	@$(PEERS_PIP) --no-deps --editable .
	@touch $@

# The project itself is not installed here: a client knows nothing of it but an address.
$(CLIENTS)/.done: constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS_PIP) comfy-api-client comfy-api-simplified openai pytest webuiapi
	@touch $@

$(BROWSER)/.done: constraints-browser.txt
	$(PYTHON) -m venv $(BROWSER)
	@$(BROWSER_PIP) pillow playwright pytest
	@touch $@

# Ray brings packages that nothing else here needs, and pins of its own.
$(RAY)/.done: pyproject.toml constraints-ray.txt
	$(PYTHON) -m venv $(RAY)
	@$(RAY_PIP) --editable '.[cpu,server,ray]' pytest
	@touch $@

# Made anew for other extras: what they install for CUDA 12 and for CUDA 13 must not mix.
$(GPU)/.done-$(GPU_EXTRAS): pyproject.toml $(GPU_CONSTRAINTS)
	rm -rf $(GPU)
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(GPU_CONSTRAINTS) \
		--editable '.[$(GPU_EXTRAS)]'
	@touch $@
