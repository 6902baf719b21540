# make setup  the environment in .venv
# make test   lint and tests
# make update the pins of constraints.txt moved to the newest releases, and the tests
# make demo   data → stand-in → training → merge → chat page, on the sample; CHECK=1 asks one question and exits
# make clean  what the demo wrote

PYTHON ?= python3
BIN := .venv/bin
DEMO := output_dir/demo
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup update test lint demo clean

setup: .venv/ready

.venv/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

update:
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/python3 tests/tools/pin.py
	touch .venv/ready
	$(MAKE) test

lint: setup
	ruff check .
	ruff format --check .

test: lint
	python3 -m pytest -m "not slow"

demo: $(DEMO)/merged/config.json
	python3 web_demo.py --model_path $(DEMO)/merged --desc_path data/sample/profiles-zh_desc.json \
		$(if $(CHECK),--ask "你的金箍棒有多重？" --role 孙悟空)

$(DEMO)/merged/config.json: .venv/ready
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	python3 data_helper.py --data_dir data/sample --roles all \
		--train_path $(DEMO)/train.json --test_path $(DEMO)/test.json
	python3 -m support.stand_in --save_dir $(DEMO)/Baichuan2-tiny
	deepspeed --num_gpus 1 --master_port 5545 train.py --train_path $(DEMO)/train.json --test_path $(DEMO)/test.json \
		--model_name_or_path $(DEMO)/Baichuan2-tiny --output_dir $(DEMO)/run --num_train_epochs 30 --save_total_limit 1 \
		--per_device_train_batch_size 8 --learning_rate 5e-3 --lora_dropout 0 --weight_decay 0 --sample_answers 0
	python3 merge_params.py --ori_model_dir $(DEMO)/Baichuan2-tiny --model_dir $(DEMO)/run/epoch-30-step-* \
		--save_model_dir $(DEMO)/merged

clean:
	rm -rf $(DEMO)
