"""The one figure a person asks of an artifact."""

from typing import Any

from src.core.artifact import Artifact


def headline(a: Artifact) -> str:
    """In a few words; empty for a stage that has none."""
    m = a.metrics
    if a.stage == "data":
        return f"{m['train_rows']} train, {m['val_rows']} val, {m['calib_rows']} calib of {m['rows_in']} rows"
    if a.stage in ("finetune", "pretrain", "cpt"):
        if "val_loss" in m:
            return f"validation loss {m['val_loss_first']:.3f} -> {m['val_loss']:.3f} in {m['steps']} steps"
        return f"training loss {m['train_loss_first']:.3f} -> {m['train_loss_last']:.3f} in {m['steps']} steps"
    if a.stage == "merge":
        return lost(m) or f"logits within {m['logit_error']:.0e} of adapter on base"
    if a.stage == "quantize":
        return lost(m) or f"logits within {m['logit_error']:.1%} of the unquantized"
    if a.stage == "evaluate":
        parts = [f"perplexity {m['perplexity']:.3f}"] if "perplexity" in m else []
        if "parent_perplexity" in m:
            parts.append(f"parent {m['parent_perplexity']:.3f}")
        if "kl" in m:
            parts.append(f"KL {m['kl']:.4f}")
        if "expected" in m:
            parts.append(f"{m['expected']}/{m['prompts']} as expected")
        if "same_answers" in m:
            parts.append(f"{m['same_answers']:.0%} of answers as the parent's")
        if "first_token_seconds" in m:
            parts.append(f"first token {m['first_token_seconds']:.2f} s")
        if "tokens_per_second" in m:
            parts.append(f"{m['tokens_per_second']:.1f} tokens/s")
        return ", ".join(parts)
    if a.stage == "answer":
        return f"{m['answered']:,} of {m['prompts']:,} prompts answered, {m['answers_ended']:.0%} with a turn's end"
    if a.stage == "deploy":
        return ", ".join(filter(None, (lost(m), m["summary"])))
    return ""


def lost(m: dict[str, Any]) -> str:
    """From what was trained to what this holds, on held-out conversations; empty where that was not measured."""
    return f"held-out loss {m['loss_before']:.4f} -> {m['loss_after']:.4f}, KL {m['kl']:.4f}" if "kl" in m else ""
