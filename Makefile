# Every bar of the project has a command here.

.PHONY: install lint test test-slow test-kill benchmark-data benchmark-throughput benchmark-startup quickstart

install:
	pip install -e '.[dev]'

lint:
	ruff check .
	ruff format --check .
	mypy hf_cram run_mlm_cram.py
	mlinter --no-progress hf_cram

test:
	pytest -n 2

test-slow:
	pytest -m slow

# Kills real runs at 25 random moments, saving included, and compares the weights with the uninterrupted run's.
test-kill:
	pytest -m slow tests/test_run_mlm_cram.py -k killed

benchmark-data:
	python benchmarks/data_pipeline.py

benchmark-throughput:
	python benchmarks/throughput.py

benchmark-startup:
	python benchmarks/startup.py

quickstart:
	accelerate launch run_mlm_cram.py training_args/quickstart.yaml
