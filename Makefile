# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
RUN := $(DEMO)/outputs/rooms/snd-tiny/first
CHECKPOINT := $(RUN)/nerfstudio_models/step-000000299.ckpt
# threads that wait must not spin: PyTorch's and numba's pools share the cores
export OMP_WAIT_POLICY ?= PASSIVE

# a file's tests share what they trained; in the order of names no long file is left for the end
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all install check-system format docs clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# nerfstudio 1.1 pins timm==0.6.7 without using it, so a newer timm can only be installed in a second run; pip then
# reports that conflict as an error, which is harmless
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@echo "Installing timm on top of nerfstudio's unused pin; pip will call that an error, and it is not one:"
	$(BIN)/pip install -q "timm>=1.0.20,<2"
	@touch $@

check-system: install
	@$(BIN)/python -c "import open3d" 2>/dev/null || { \
		echo "Open3D cannot be loaded. On Debian and Ubuntu: apt-get install libusb-1.0-0 libgl1 libx11-6 libgomp1"; exit 1; }

demo: $(DEMO)/eval.json $(DEMO)/backbone/timm/manifest.json
	@echo
	@echo "Rooms:     $(DEMO)/rooms"
	@echo "Run:       $(RUN)"
	@echo "Metrics:   $(DEMO)/eval.json      Pictures: $(DEMO)/pictures"
	@echo "Backbone:  $(DEMO)/backbone/timm"
	@echo "Look at it in a browser:  $(BIN)/ns-viewer --load-config $(RUN)/config.yml"

$(DEMO)/rooms/metadata/nvs_sem_val.txt: | check-system
	$(BIN)/python -m snd_nerfstudio.scenes.rooms --out $(DEMO)/rooms --scenes 4 --seed 0 --height 112 --width 168

$(CHECKPOINT): $(DEMO)/rooms/metadata/nvs_sem_val.txt
	$(BIN)/ns-train snd-tiny --data $(DEMO)/rooms --output-dir $(DEMO)/outputs --experiment-name rooms \
		--timestamp first --vis tensorboard

$(DEMO)/eval.json: $(CHECKPOINT)
	$(BIN)/ns-eval --load-config $(RUN)/config.yml --output-path $@ --render-output-path $(DEMO)/pictures

$(DEMO)/backbone/timm/manifest.json: $(CHECKPOINT)
	$(BIN)/ns-export snd-backbone --load-config $(RUN)/config.yml --output-dir $(DEMO)/backbone

test: check-system
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(PYTEST) -m "not slow"

test-all: check-system
	$(PYTEST)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/pip install -q -e ".[docs]" && $(BIN)/pip install -q "timm>=1.0.20,<2"
	$(BIN)/sphinx-build -W -b html docs docs/_build

clean:
	rm -rf $(DEMO) docs/_build .pytest_cache .ruff_cache
