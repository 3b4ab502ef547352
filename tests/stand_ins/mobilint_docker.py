"""A stand-in for the docker client around Mobilint's compiler: an image is a Python interpreter, named by STAND_IN_IMAGES ({image: interpreter}).

It checks the command line of npu-contracts.md (C2) and logs it to STAND_IN_LOG, a line of JSON each; `kill` ends what `run --name` started.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

IMAGES = json.loads(os.environ["STAND_IN_IMAGES"])
LOG = Path(os.environ["STAND_IN_LOG"])


def main(argv: list[str]) -> int:
    with open(LOG, "a") as log:
        log.write(json.dumps(argv) + "\n")
    if argv[:2] == ["image", "inspect"]:
        print("sha256:" + "0" * 64)
        return 0 if argv[-1] in IMAGES else 1
    if argv[0] == "kill":
        os.kill(int((LOG.parent / argv[1]).read_text()), signal.SIGKILL)
        return 0
    return run(argv[1:])


def run(argv: list[str]) -> int:
    name, folder, work = None, None, None
    while argv[0].startswith("-"):
        option = argv.pop(0)
        if option in ("--rm", "--ipc=host", "--gpus=all", "--pull=never"):
            continue
        value = argv.pop(0)
        if option == "--name":
            name = value
        elif option == "-v":
            folder, work = value.rsplit(":", 1)
            assert Path(folder).is_absolute(), value
        elif option == "-w":
            assert value == work, value
        else:
            raise SystemExit(f"unknown flag: {option}")
    image, program, *rest = argv
    if image not in IMAGES:
        print(f"docker: Error response from daemon: No such image: {image}.", file=sys.stderr)
        return 125
    assert program == "python", program
    tool = subprocess.Popen([IMAGES[image], *rest], cwd=folder, start_new_session=True)
    if name:
        (LOG.parent / name).write_text(str(tool.pid))
    code = tool.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
