"""capture_forward_inputs of 1.3: what the first forward call of a model was given, while it generates."""

import contextlib


@contextlib.contextmanager
def capture_forward_inputs(model):
    found = {}

    def keep(module, args, given):
        if not found:
            found.update({"input_ids": None, "attention_mask": None} | given)

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
    if found.get("input_ids") is None:
        raise ValueError("no forward call with input_ids was seen")
