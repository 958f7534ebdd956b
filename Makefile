# Everything a person types. Needs make and one of these Pythons; .venv is made on demand with the newest that works, or
# with the one you name: make PYTHON=python3.12 ...
PYTHONS := 3.13 3.12 3.11
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PHONE := $(VENV)/.phone
MAIN := $(BIN)/python src/main.py
RUNS := src/config/run

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint types docs bench gpu-check schema clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  $(MAIN)  shows what there is to train"

quickstart: $(READY) ## Pretrain a small model and fine-tune it: about ten minutes on a laptop, no network
	$(MAIN) --config $(RUNS)/quickstart_pretrain.yaml
	$(MAIN) --config $(RUNS)/quickstart_finetune.yaml
	$(MAIN) --config $(RUNS)/quickstart_finetune.yaml task=report name=quickstart \
		'report.runs=[quickstart_pretrain,quickstart_finetune]' report.verify=true
	@echo
	@echo "Both stages are done. Their curves: runs/quickstart/curves.png, all about them: runs/quickstart/report.html"
	@echo "Now ask the model something:"
	@echo "  $(MAIN) --config runs/quickstart_finetune/config.yaml task=generate 'generate.prompt=Return the number of'"

# Each test process keeps to one thread: two of them on two cores are faster than one that has both.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test: $(PHONE) ## Run the tests but for the slow ones and those for a GPU
	$(PYTEST)

test-all: $(PHONE) ## Run all tests
	$(PYTEST) -m ''

lint: $(READY) ## Look for mistakes and bad style (ruff)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(PHONE) ## Check types (pyright)
	$(BIN)/pyright

docs: $(READY) ## Build the site into site/ (mkdocs)
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

BENCH := PYTHONPATH=src $(BIN)/python benchmarks

bench: $(READY) ## Measure every claim on this machine, the slow ones briefly
	$(BENCH)/startup.py
	$(BENCH)/data_preparation.py --rounds 1
	$(BENCH)/loader_speed.py
	$(BENCH)/cross_entropy.py --rounds 3
	$(BENCH)/memory.py
	$(BENCH)/throughput.py --bursts 3
	$(BENCH)/adapters_speed.py --bursts 2 --seconds 2 --sides full lora dora loha lokr
	$(BENCH)/finetune_packing.py --seconds 15
	$(BENCH)/precision.py --steps 30 --seeds 1
	$(BENCH)/time_budget.py --runs 3
	$(BENCH)/time_to_loss.py --minutes 0.5 --seeds 1
	$(BENCH)/ablations.py --seconds 5 --seeds 1 --only 'tied head' 'value embeddings'
	$(BENCH)/distillation.py --seconds 20 --teacher-seconds 40 --seeds 1
	$(BENCH)/processes.py --seconds 10
	$(BENCH)/interconnect.py
	$(BENCH)/agreement.py --steps 8 --processes 2 --optimizers muon
	$(BENCH)/long_context.py --seconds 60
	$(BENCH)/arc.py --base-seconds 20 --seconds 20 --tasks 4 --steps 2 --seeds 1
	$(BENCH)/finetuning.py --quick
	$(BENCH)/quantization.py --quick
	$(BENCH)/generation.py --shapes 30m --repeats 1
	@test ! -e $(PHONE) || $(BENCH)/phone.py --sides eager pte --repeats 2

gpu-check: $(READY) ## Check and measure everything on an NVIDIA GPU, in ten minutes
	$(BENCH)/gpu_check.py --page docs/performance.md

schema: $(READY) ## Write what is made from the code: schema.json, docs/reference.md, docs/architecture.svg
	PYTHONPATH=src $(BIN)/python docs/generate.py
	$(BIN)/python docs/house.py

clean: ## Delete what the tools left; runs/ and cache/ stay
	rm -rf site .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# Says in one line what went wrong, if it did; the next make goes on from there.
MAKE_VENV := sh bin/make-venv.sh '$(PYTHONS)' '$(PYTHON)'

$(READY): req.txt
	@$(MAKE_VENV) req.txt
	@touch $@

# What only exports to phones need, and so the tests of these.
$(PHONE): $(READY) req-phone.txt
	@$(MAKE_VENV) req.txt req-phone.txt
	@touch $@
