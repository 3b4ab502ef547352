"""compile.sh: the compile as a script to carry to a machine that has Pulsar2, and what of it comes back."""

import shlex
from pathlib import Path

from src.deploy.axera import toolchain
from src.deploy.axera.compile import BUILT
from src.deploy.vendor import BY_HAND, whole
from src.settings.targets import Axera

SCRIPT = "compile.sh"


def write(target: Axera, quantization: dict | None, work: Path) -> Path:
    """Write the script into the folder its results are looked for in; it takes the one of Pulsar2's two commands that is there."""
    lent = "".join(f" -e {key}={value}" for key, value in toolchain.environment(target).items())
    exports = "".join(f"export {key}={value}\n" for key, value in toolchain.environment(target).items())
    ways = [(command, _argv(command, target, quantization)) for command in ("llm_build2", "llm_build")]
    known = [(command, words) for command, words in ways if words]
    choice = "".join(
        f"{'el' if place else ''}if $pulsar2 {command} -h 2>/dev/null | grep -q input_path; then\n  set -- {words}\n"
        for place, (command, words) in enumerate(known)
    )
    text = f"""#!/bin/sh
# Compiles the model with AXERA's Pulsar2, on a machine that has it:
#   1. copy this script there, and the model's folder beside it as `model`
#   2. ./compile.sh                                    with pulsar2 on PATH, or
#      PULSAR2="docker run --rm{lent} -v $PWD:/data -w /data pulsar2:VERSION pulsar2" ./compile.sh
#   3. copy build/, compile.log and {BY_HAND} back to where the script came from, and run the deploy again: it goes on from there
set -eu
cd "$(dirname "$0")"
pulsar2=${{PULSAR2:-pulsar2}}
[ -f model/config.json ] || {{ echo "there is no folder 'model' with the model's files beside this script" >&2; exit 3; }}
{exports}{choice}else
  echo "neither {" nor ".join(command for command, _ in known)} answers: $pulsar2" >&2
  exit 7
fi
rm -rf build {BY_HAND}
mkdir build
$pulsar2 "$@" 2>&1 | tee compile.log
grep -q {shlex.quote(BUILT)} compile.log || {{ echo "Pulsar2 did not finish; see compile.log" >&2; exit 13; }}
$pulsar2 version > {BY_HAND} 2>&1
echo "done: copy build/, compile.log and {BY_HAND} back"
"""
    with whole(work / SCRIPT) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o755)
    return work / SCRIPT


def _argv(command: str, target: Axera, quantization: dict | None) -> str:
    """The shell words for one of Pulsar2's commands; empty where the target asks for what it does not have."""
    if (command == "llm_build2" and target.last_kv_cache_len) or (command == "llm_build" and target.decode_step_size):
        return ""
    return shlex.join(toolchain.argv(toolchain.documented(command), target, quantization, "model", "build"))
