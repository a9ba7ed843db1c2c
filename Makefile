VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
OUTPUT = output/quickstart

.PHONY: quickstart test test-fast lint

# trains on images that come along, measures and draws: three to eight minutes on two CPU cores
quickstart: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m training.quickstart $(OUTPUT)/images
	HF_HUB_OFFLINE=1 $(BIN)/python -m training --config configs/quickstart.yaml \
		--dataset_name $(OUTPUT)/images --output_dir $(OUTPUT) --overwrite_output_dir
	HF_HUB_OFFLINE=1 $(BIN)/python -m evaluation attention --model $(OUTPUT) \
		--dataset_name $(OUTPUT)/images --output $(OUTPUT)/attention.png
	HF_HUB_OFFLINE=1 $(BIN)/python -m evaluation knn --model $(OUTPUT) untrained:$(OUTPUT) raw_pixels:$(OUTPUT) \
		--dataset_name $(OUTPUT)/images --k 10 20 --output $(OUTPUT)/knn.json

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-fast: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/ready: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
