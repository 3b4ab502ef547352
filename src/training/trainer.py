"""transformers' Trainer, computing a step as our plan lays it out."""

import contextlib
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_model
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback

from src.chat.encoding import Encoded
from src.core.log import progress
from src.models import adapter_files, lora, seen
from src.models.devices import give_back_memory, trim_sparingly
from src.models.token_rows import folded
from src.training.batches import BatchPlan, Rows, Steps, micro_batch
from src.training.examples import Example
from src.training.head import HeadLoss, Targets, TeacherTargets, loss_sum, share_of_step, token_results
from src.training.layout import arguments_of, as_in_use, inputs_of
from src.training.teacher import TeacherProbs


class ChatTrainer(Trainer):
    """A Trainer for which an item of the data is a whole step: a list of micro-batches for this process (see batches.Plan).

    The loss of a step is summed over its trained tokens on all processes and divided by their number.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    # transformers makes these optional: the model for its own model_init, the others until training begins.

    finished: bool = False
    """what is saved from now on is the result, no longer a checkpoint"""

    masters: dict[str, torch.Tensor] = {}
    """fp32 values to save in place of those that this process trains in 16 bits"""

    eval_seconds = 0.0
    """time spent in evaluations, which training speed leaves out"""

    def __init__(
        self,
        model,
        args,
        plan: BatchPlan,
        examples: Rows,
        validation: Rows,
        *,
        pad: int,
        eos_id: int,
        rates: dict[str, lora.ParameterRate],
        head: HeadLoss | None,
        teacher_probs: TeacherProbs | None = None,
        alpha: float = 0.0,
        eval_rows: int | None = None,
    ):
        """pad, eos_id: ids of padding and of the token that ends an assistant turn, or a document. head: what computes the loss; None: from the model's logits.
        soft, alpha: what a teacher holds likely at the trained tokens of the training rows, and its weight.
        rates: of the parameters that do not take the common rate, by name. eval_rows: how many of the validation rows are measured; None: all."""
        self.plan, self.examples, self.validation = plan, examples, validation
        self.pad, self.eos_id, self.rates, self.head = pad, eos_id, rates, head
        self.teacher_probs, self.alpha = teacher_probs, alpha
        self.eval_rows = len(validation) if eval_rows is None else eval_rows
        self.step_losses: list[torch.Tensor] = []
        self.totals: Counter[str] = Counter()
        self.steps = Steps(plan, examples, args.process_index, pad)
        self.takes_positions = "logits_to_keep" in arguments_of(model)
        super().__init__(model=model, args=args, train_dataset=self.steps)
        self.remove_callback(PrinterCallback)

    # ---- data

    def get_train_dataloader(self):
        # Steps already is this process's part, in its order.
        return torch.utils.data.DataLoader(
            self.steps, batch_size=1, collate_fn=lambda steps: steps[0], pin_memory=self.args.dataloader_pin_memory
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step, and the weight of its trained tokens over all processes."""
        step = next(epoch_iterator)
        return [step], step["weight"]

    def _track_num_input_tokens(self, inputs):
        self.state.num_input_tokens_seen += inputs["tokens"]

    def floating_point_ops(self, inputs):
        return 0

    # ---- a step

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        self.totals.update({name: inputs[name] for name in ("tokens", "trained", "laid")})
        total, last = torch.zeros((), device=self.args.device), len(inputs["micro_batches"]) - 1
        for i, batch in enumerate(inputs["micro_batches"]):
            self.accelerator.gradient_state._set_sync_gradients(i == last)
            waits = i < last and isinstance(model, torch.nn.parallel.DistributedDataParallel)
            with model.no_sync() if waits else contextlib.nullcontext():
                self.tidy()
                loss = share_of_step(self.loss_sum(model, batch), num_items_in_batch, self.args.world_size)
                self.tidy()
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
            total += loss.detach()
        self.step_losses.append(total)
        return total

    def tidy(self) -> None:
        """On a CPU, have glibc give back what is free: what a pass keeps lies scattered between what the last one freed, and comes on top of it.

        Under ZeRO-3 weights and gradients come and go in between, and Python may hold some of them still.
        """
        if self.args.device.type == "cpu":
            give_back_memory() if is_deepspeed_zero3_enabled() else trim_sparingly()

    def loss_sum(self, model, batch: dict) -> torch.Tensor:
        """Sum of the losses of a micro-batch's trained tokens, fp32."""
        results = self.forward(model, batch)
        return results.float().sum() if self.head else loss_sum(results, self.targets(batch))

    def targets(self, batch: dict) -> Targets:
        """What a micro-batch teaches: its tokens and, in training, the teacher's probabilities."""
        known = self.teacher_probs.of(batch["examples"]) if self.teacher_probs and self.model.training and batch["examples"] else None
        weights = batch.get("weights") if self.model.training else None  # what is measured counts every token alike
        return Targets(batch["targets"], TeacherTargets(*known, self.alpha) if known else None, weights).to(self.args.device)

    def forward(self, model, batch: dict, *, losses: bool = True) -> torch.Tensor:
        """What the output layer makes of the trained positions: see HeadLoss, or logits (tokens, vocabulary) without one or without `losses`."""
        inputs, keep = inputs_of(batch, self.args.device), batch["keep"].to(self.args.device)
        with self.head.learning(self.targets(batch)) if self.head and losses else contextlib.nullcontext():
            if self.takes_positions:
                return model(**inputs, logits_to_keep=keep, use_cache=False).logits
            return model(**inputs, use_cache=False).logits[keep]

    # ---- optimizer

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        own = {id(p): self.rates[name] for name, p in self.model.named_parameters() if name in self.rates}
        for group in list(optimizer.param_groups):
            together: dict[lora.ParameterRate, list] = defaultdict(list)
            for parameter in group["params"]:
                if rate := own.get(id(parameter)):
                    together[rate].append(parameter)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            for rate, parameters in together.items():
                decay = group["weight_decay"] if rate.decays else 0.0
                optimizer.add_param_group({"params": parameters, "lr": rate.peak, "weight_decay": decay})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """transformers' schedule a step ahead: it begins its warm-up at a rate of zero, where the first step's conversations teach nothing.

        In W warm-up steps the rate rises from 1/(W + 1) of its peak; no other step's rate is changed.
        """
        if self.lr_scheduler is None:
            optimizer, warmup = optimizer or self.optimizer, self.args.get_warmup_steps(num_training_steps)
            theirs = get_scheduler(self.args.lr_scheduler_type, optimizer, warmup + 1, num_training_steps + 1)
            shares = [lambda step, share=share: share(step + 1) for share in theirs.lr_lambdas]
            self.lr_scheduler, self._created_lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shares), True
        return self.lr_scheduler

    # ---- saving

    def _save(self, output_dir=None, state_dict=None):
        """As transformers', but what it cannot do: an adapter is saved as adapter_files has it, and rows split off a matrix are folded into it in the result, though not in a checkpoint, which must find them again."""
        folder, writes = Path(output_dir or str(self.args.output_dir)), self.args.should_save
        if self.finished and self.masters:
            state_dict = {**(state_dict or self.model.state_dict()), **self.masters}
        if hasattr(self.model, "peft_config"):
            adapter_files.save(self.model, folder, state_dict=state_dict, writes=writes, finished=self.finished)
            return
        if not writes:
            return
        split_off = any(name.endswith(".rows") for name in self.rates)
        if split_off and not self.finished:
            if not self.is_deepspeed_enabled:  # DeepSpeed keeps weights in files of its own
                folder.mkdir(parents=True, exist_ok=True)
                save_model(self.model, str(folder / "model.safetensors"))
            return
        if split_off:
            state_dict = folded(self.model, state_dict or self.model.state_dict())
        # DeepSpeed hands over a tied output layer as a tensor of its own.
        tied = set(self.model._tied_weights_keys or ()) if self.model.config.tie_word_embeddings else set()
        super()._save(output_dir, {name: t for name, t in state_dict.items() if name not in tied} if state_dict else None)

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        start = time.monotonic()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.eval_seconds += time.monotonic() - start
        return metrics

    def validate(self) -> dict:
        """Mean loss in nats, share of right next tokens, trained tokens and share of turns ended, over the validation rows."""
        with as_in_use(self.model):
            loss, tokens, hits, turns, ended = self._measure().tolist()
        return {
            "loss": loss / max(tokens, 1),
            "accuracy": hits / max(tokens, 1),
            "tokens": int(tokens),
            "turns_ended": ended / max(turns, 1),
        }

    def observe(self, examples: list[Encoded]) -> seen.Seen:
        """What the model says at the trained tokens of some rows; every process goes through all of them, as ZeRO-3 needs."""

        def logits(example: Encoded) -> torch.Tensor:
            batch = micro_batch([Example(np.array(example.input_ids), np.array(example.labels))], [0], self.pad, packed=False)
            return self.forward(self.inside, batch, losses=False)

        with as_in_use(self.model):
            return seen.observe(seen.one_by_one(logits, "proof"), examples)

    @property
    def inside(self):
        """The model to call without gradients: DeepSpeed's engine where there is one."""
        return self.model_wrapped if self.is_deepspeed_enabled and hasattr(self.model_wrapped, "forward") else self.model

    @torch.no_grad()
    def _measure(self) -> torch.Tensor:
        """(sum of losses, trained tokens, top-1 hits, turn ends, those predicted) over all ranks and the validation rows, float64.

        Every rank does as many forward passes, as ZeRO-3 needs.
        """
        world, me = self.args.world_size, self.args.process_index
        total = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        order, at = np.argsort(-self.validation.lengths[: self.eval_rows], kind="stable").tolist(), 0
        parts = []
        while at < len(order):
            size = world * max(1, self.plan.capacity // int(self.validation.lengths[order[at]]))
            parts.append(order[at : at + size][me::world])
            at += size
        for mine in progress(parts, "validation"):
            batch = micro_batch(self.validation, mine, self.pad, packed=self.plan.packed)
            results = self.forward(self.inside, batch)
            targets = batch["targets"].to(self.args.device)
            losses, right = (results if self.head else token_results(results, targets)).double().unbind(1)
            ends = (targets == self.eos_id).double()
            total += torch.stack([losses.sum(), torch.ones_like(losses).sum(), right.sum(), ends.sum(), (right * ends).sum()])
        if dist.is_initialized():
            dist.all_reduce(total)
        return total
