PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
DEMO := output_dir/demo
STAND_IN := $(DEMO)/Baichuan2-tiny
ADAPTER := $(DEMO)/run/epoch-30-step-180
say = @printf '\n── %s\n' "$(strip $(1))"
export PATH := $(CURDIR)/$(BIN):$(PATH)

# A second demo would remove what the first one writes. (macOS has no flock.)
ALONE := $(if $(shell command -v flock),flock --nonblock --conflict-exit-code 75 Makefile)

.PHONY: help setup update lint test demo walk clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

setup: .venv/ready ## the environment, in .venv

.venv/ready: requirements.txt requirements-4bit.txt requirements-dev.txt constraints.txt
	@for python in $(PYTHON) $(wildcard $(BIN)/python3); do \
		$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || \
			{ echo "error: $$python is no Python 3.11 to 3.14: install one, then: rm -rf .venv; make setup PYTHON=python3.12" >&2; exit 1; }; \
		$$python -c 'import ensurepip' 2>/dev/null || \
			{ echo "error: $$python has no venv: apt-get install $$(basename $$python)-venv" >&2; exit 1; }; \
	done
	$(call say,Installing into .venv: one to three minutes; 2 GB; with CUDA several GB more. 安装环境)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt -c constraints.txt
	@touch $@

update: ## the pins of constraints.txt moved to the newest releases, and the tests
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/python3 tests/tools/pin.py
	touch .venv/ready
	$(MAKE) test

lint: setup ## the form of the code
	ruff check .
	ruff format --check .

test: lint ## lint, then the tests, JOBS=2 at a time
	python3 -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The demo walks the scripts in the order of the README. Each stage writes its target whole or not at all, and training
# goes on from its last epoch, so a demo that was stopped goes on where it was. New code or packages start it anew.
demo: ## data → stand-in → training → merge → chat page; CHECK=1 ends before the page
	@$(ALONE) $(MAKE) --no-print-directory walk || \
		{ test $$? -ne 75 || echo "error: make demo runs in another terminal: wait for its end" >&2; false; }

walk: $(DEMO)/merged/config.json
	$(call say,Before and after: the same question to both models. 训练前后，同一个问题)
	python3 -m tests.tools.taught --train_path $(DEMO)/train.json --before $(STAND_IN) --after $(DEMO)/merged
ifndef CHECK
	$(call say,Chat: open the page below in a browser; Ctrl-C ends it. 聊天：在浏览器里打开下面的地址)
	python3 web_demo.py --model_path $(DEMO)/merged --desc_path data/sample/profiles-zh_desc.json
endif

# Of the two files this one is written last.
$(DEMO)/test.json: .venv/ready Makefile $(wildcard *.py baichuan/*.py support/*.py support/*/*.py)
	$(call say,1/4 Data: the dialogues of five roles become training samples. 数据：五个角色的对话)
	@rm -rf $(DEMO)
	python3 data_helper.py --data_dir data/sample --roles all \
		--train_path $(DEMO)/train.json --test_path $(DEMO)/test.json

$(STAND_IN)/config.json: $(DEMO)/test.json
	$(call say,2/4 Stand-in: a small Baichuan2 knows the sentences and not whose answer they are. 替身：一个很小的模型)
	python3 -m support.model.stand_in --save_dir $(STAND_IN) --train_path $(DEMO)/train.json

# A single process needs no launcher. For several GPUs, `deepspeed` takes the place of `python3`.
$(ADAPTER)/adapter_config.json: $(STAND_IN)/config.json
	$(call say,3/4 Training: LoRA adapters learn which answer belongs to which question. 训练：学会谁会怎样回答)
	python3 train.py --train_path $(DEMO)/train.json --test_path $(DEMO)/test.json \
		--model_name_or_path $(STAND_IN) --output_dir $(DEMO)/run --num_train_epochs 30 --save_total_limit 1 \
		--per_device_train_batch_size 8 --learning_rate 5e-3 --lora_dropout 0 --weight_decay 0 --sample_answers 0 --resume

$(DEMO)/merged/config.json: $(ADAPTER)/adapter_config.json
	$(call say,4/4 Merge: the adapters go into the weights; a proof shows that it is the trained model. 合并：把适配器并入权重)
	python3 merge_params.py --ori_model_dir $(STAND_IN) --model_dir $(ADAPTER) --save_model_dir $(DEMO)/merged

clean: ## remove what the demo wrote
	rm -rf $(DEMO)
