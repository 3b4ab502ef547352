"""The machinery under `finetune`, imported by its worker processes only: rows and batches, attention and loss, the trainer, its reports and checkpoints."""
