"""What a model needs, from its config.json alone: sizes, memory, speed. Under the planner and deploy's preflight; no weights, no torch."""
