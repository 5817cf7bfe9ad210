.PHONY: style check test tiny

style:  ## rewrite the sources in the house style
	ruff check --fix .
	ruff format .

check:  ## style and types, as CI checks them
	ruff check .
	ruff format --check .
	mypy

test:  ## all tests but the slow ones
	pytest

tiny:  ## train the smallest model from scratch, 15 minutes on two CPU cores
	accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/pretrain.py \
		--config recipes/configs/transfusion_tiny_pretrain.yaml
