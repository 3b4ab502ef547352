# The six commands people type. `clean` takes caches only: outputs/ and .venv stay.
.PHONY: quickstart test slow lint lock clean

quickstart:
	bash scripts/quickstart.sh

test:
	bash scripts/test.sh

slow:
	bash scripts/test.sh -m slow

lint:
	.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check src benchmarks scripts && .venv/bin/python -m mypy

lock:
	bash scripts/lock.sh

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage && find src tests scripts benchmarks -name __pycache__ -exec rm -rf {} +
