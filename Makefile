# make demo           prepare Shakespeare, train config/tiny.py, print a sample, make its page
# make chat           write a lighthouse keeper's conversations, train on them, and talk to her
# make test           run the tests; those of the page need a browser: make browser
# make browser        install Debian's headless Chromium, where there is apt
# make test-slow      run those that take minutes: many kills and restarts, peaks of memory
# make test-download  run those that fetch a pretrained model and llama.cpp
# make picture        take the README's moving picture of the page that make demo made
# make evaluate       run lm-eval: make evaluate CKPT=out/tiny/step_000600 TASKS=hellaswag
#                     TASKS=own.yaml: a task file over your own questions, as in docs/RUNS.md
# make lint           check style; that of page/ where there is npx
# Each sets up what it needs in .venv first; Python 3.11 or newer is all that must be there.

PYTHON ?= python3
CKPT ?= out/tiny/step_000600
TASKS ?= arc_easy
BIN := .venv/bin
# glibc keeps the memory that is freed: a CPU trains small models 1.2 times as fast.
KEEP_FREED := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

demo: .venv/demo
	$(BIN)/python prepare.py
	$(KEEP_FREED) $(BIN)/python train.py config/tiny.py $(if $(wildcard out/tiny/s*),--resume)
	$(BIN)/python sample.py --ckpt=out/tiny --prompt "KING RICHARD:"
	$(BIN)/python visualize.py --ckpt=out/tiny
	@echo 'for commands of your own: source .venv/bin/activate'
	@echo 'the page is out/tiny/page.html: $(BIN)/python visualize.py --ckpt=out/tiny --open'

chat: .venv/demo
	$(BIN)/python tools/character.py tools/lighthouse.txt data/lighthouse.jsonl
	$(BIN)/python prepare.py data/lighthouse.jsonl --vocab_size=1024
	$(KEEP_FREED) $(BIN)/python train.py config/chat.py --resume
	@if [ -t 0 ]; then $(BIN)/python sample.py --ckpt=out/chat; else \
		printf '%s\n' "Hello!" "What do you see?" "Are you ever bored?" "Why?" \
			"Can you help me with French?" "Goodbye!" \
			| $(BIN)/python sample.py --ckpt=out/chat --chat --seed=0; fi

# One thread a process: the tests share the cores between processes instead.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-slow: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

test-download: .venv/dev
	$(BIN)/python -m pytest -q -m download

browser:
	apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium-headless-shell

picture: .venv/dev
	$(BIN)/python tools/screenshot.py out/tiny/page.html

evaluate: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "lm_eval[hf]==0.4.13"
	$(BIN)/python -m lm_eval --model hf --model_args pretrained=$(CKPT),dtype=float32 --tasks $(TASKS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	if command -v npx >/dev/null; then npx --yes prettier@3.10.1 --check "page/**/*.js"; fi

.venv/demo: requirements-demo.txt requirements.txt
.venv/dev: requirements-dev.txt requirements-demo.txt requirements.txt
.venv/demo .venv/dev:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11+ is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: demo chat test test-slow browser test-download picture evaluate lint
