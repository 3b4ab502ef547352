"""Serve a model behind an OpenAI-compatible endpoint on this machine, with a page to talk to it, or to two of them side by side.

    python -m src.serve PATH [key=value ...]

Its greedy answers are evaluate's. It listens on this machine's own address; on another one only with a key, which comes from the environment. Ctrl-C or
SIGTERM ends it. docs/chat.md has more.
"""

import ipaddress
from pathlib import Path

from src import ROOT
from src.core import compose, room, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError
from src.core.log import say
from src.serving import opening, server
from src.serving.protocol import key_in
from src.settings.verbs import ServeVerb

PAGE = ROOT / "assets" / "chat.html"
SHORTEST = 16
"""characters of a key that keeps others out"""


def serve(overrides: list[str]) -> int:
    cfg = compose.compose("serve", compose.with_path(overrides, "source"), ServeVerb)
    key = check_key(cfg)
    run = stage.Run(Path(cfg.outputs) / cfg.run, dry=cfg.dry_run)
    found = [opening.find(run, cfg.source)] + ([opening.find(run, cfg.compare)] if cfg.compare else [])
    for line in plan(cfg, found):
        say(f"serve: {line}")
    if cfg.dry_run:
        return 0
    listen = cfg.listen
    bound = server.Server(listen.host, listen.port, key=key, decoding=cfg.decoding, waiting=listen.waiting, page=PAGE.read_bytes())
    try:
        opened = server.named(
            [opening.open_speaker(one, None if number else cfg.base, cfg.environment) for number, one in enumerate(found)]
        )
    except BaseException:
        bound.server_close()
        raise
    bound.listen(opened)
    say(
        f"serve: {' and '.join(opened)} at {bound.url}/v1, a page to talk in at {bound.url}/"
        + (f"; the key is {listen.key_env}'s" if key else "")
    )
    try:
        bound.run()
    except KeyboardInterrupt:
        say("serve: ended")
    return 0


def check_key(cfg: ServeVerb) -> str | None:
    """The key that requests have to bear. Raises ConfigError where others could reach the server without one."""
    name, key = cfg.listen.key_env, key_in(cfg.listen.key_env)
    if is_own(cfg.listen.host):
        return key
    if key is None:
        raise ConfigError(
            f"listen.host={cfg.listen.host} lets others in, and {name} holds no key",
            fix=[f"export {name}=... with a key of your own", "listen.host=127.0.0.1 is for this machine alone"],
        )
    if len(key) < SHORTEST:
        raise ConfigError(f"the key in {name} is shorter than {SHORTEST} characters", fix=f'export {name}="$(openssl rand -hex 16)"')
    return key


def is_own(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def plan(cfg: ServeVerb, found: list[Artifact]) -> list[str]:
    lines = [opening.check(one) for one in found]
    return [*lines, room.check(opening.needs(found), room.here(Path(cfg.outputs)), ignore=cfg.room == "ignore")]


if __name__ == "__main__":
    stage.main_uncomposed("serve", __doc__, ServeVerb, serve)
