"""How many processes, where: torchrun from Python, so that a user's error keeps its exit code and prints once."""

import importlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from src.core import processes, stage
from src.core.errors import ConfigError
from src.core.log import say, warn
from src.settings.training import Launch


def gpu_count() -> int:
    """GPUs this process may use, told without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def world_size(launch: Launch) -> int:
    """Processes over all machines: torchrun's own count inside it, else what the settings ask for."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return per_node(launch) * launch.nnodes


def per_node(launch: Launch) -> int:
    return max(1, gpu_count()) if launch.nproc_per_node == "auto" else launch.nproc_per_node


def around(verb: str, argv: list[str], launch: Launch, *, zero_stage: int) -> int | None:
    """Start a verb's worker processes, unless one without DeepSpeed is all there is or torchrun has started us; then None."""
    if "WORLD_SIZE" in os.environ or (world_size(launch) == 1 and not zero_stage):
        return None
    return torchrun(f"src.{verb}", argv, launch)


def work(module: str, argv: list[str], threads: int | None) -> None:
    """What a worker that was forked does: `python -m module argv`. threads: None for what the environment said before torch was imported."""
    import torch

    os.setsid()  # a terminal's Ctrl-C reaches the launcher alone, which hands it on: heard twice, it asks for the end at once
    for number in heard():
        signal.signal(number, signal.SIG_DFL)  # not the launcher's handler
    if threads:
        torch.set_num_threads(threads)
    sys.argv = [module, *argv]
    try:
        stage.main(importlib.import_module(module).STAGE)
    except Exception:  # a bug, which torch would keep to itself
        traceback.print_exc()
        raise


def heard() -> list[signal.Signals]:
    """The signals that end a launcher, but for those that are ignored, as nohup has it."""
    return [
        number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(number) != signal.SIG_IGN
    ]


def torchrun(module: str, argv: list[str], launch: Launch) -> int:
    """Run `python -m module argv` in every process and return one exit code: 0, or that of the process that failed first."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A worker says itself why it failed; the agent's own account of it adds nothing.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    one_machine = launch.nnodes == 1
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        # Threads of all processes together should not outnumber the cores; torchrun's own default is one each.
        if (asked := os.environ.get("OMP_NUM_THREADS")) and not asked.isdecimal():  # OpenMP takes a list, accelerate does not
            raise ConfigError(f"OMP_NUM_THREADS={asked} in the environment is no number", fix="unset OMP_NUM_THREADS")
        threads = None if asked else max(1, (os.cpu_count() or 1) // per_node(launch))
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.update(BOARDWALK_WORKER=str(os.getpid()), BOARDWALK_STATUS=str(status))
        config = LaunchConfig(
            min_nodes=launch.nnodes,
            max_nodes=launch.nnodes,
            nproc_per_node=per_node(launch),
            run_id="boardwalk",
            rdzv_backend="c10d" if one_machine else "static",
            rdzv_endpoint=f"{launch.master_addr}:{launch.master_port}",
            rdzv_configs={} if one_machine else {"rank": launch.node_rank},
            max_restarts=0,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(number.name for number in heard()),
        )
        try:
            if processes.serving() and not gpu_count():  # a stage of a road: its workers need not import torch again
                config.start_method = "fork"
                elastic_launch(config, work)(module, argv, threads)
            else:
                elastic_launch(config, sys.executable)("-m", module, *argv)
        except SignalException as stopped:
            say("interrupted; the same command goes on, from the last checkpoint where there is one")
            return 128 + stopped.sigval
        except ChildFailedError as error:
            if status.is_file():
                return int(status.read_text())
            codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
            # The others are terminated once one has failed.
            killed = {rank: code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
            for rank, code in killed.items():
                reason = ", most likely for lack of memory" if code == -signal.SIGKILL else ""
                warn(f"the process of rank {rank} was killed by signal {-code}{reason}; the same command goes on from the last checkpoint")
            code = next(iter(killed.values()), next(iter(codes.values())))
            return 128 - code if code < 0 else code or 1
        return 0
