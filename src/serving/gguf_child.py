"""llama.cpp's server on a GGUF, inside its environment: `python -I gguf_child.py FILE THREADS`.

Stands alone: that environment has xllamacpp but nothing of this project. It says {"url": address} and serves on this machine's own address, by the template and
stop tokens in the file, until stdin ends.
"""

import json
import os
import sys


def main(file: str, threads: int) -> None:
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_parallel, settings.ctx_shift, settings.use_jinja, settings.ui = 1, False, True, False
    server = xllamacpp.Server(settings)
    told.write(json.dumps({"url": server.listening_address}) + "\n")
    told.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
