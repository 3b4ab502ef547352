"""Print what completes verbs, settings and their choices in a shell.

usage: eval "$(python -m src.completion bash)"      in ~/.bashrc, run in the project's root
       eval "$(python -m src.completion zsh)"       in ~/.zshrc
"""

import sys
import typing
from typing import Any, Literal

from src.core import compose, stage
from src.core.errors import ConfigError
from src.settings import verbs

SHELLS = ("bash", "zsh")
NAMED = ("recipe", "tracker")
"""groups whose files name parts of their own, which no schema has"""
# COMP_LINE is taken apart by hand, since bash takes = for the end of a word.
SCRIPT = r"""
_boardwalk() {
  local line=${COMP_LINE:0:COMP_POINT} word verb key
  COMPREPLY=()
  [[ $line =~ (^|[[:space:]/])python[0-9.]*[[:space:]]+-m[[:space:]]+(src\.?[a-z_0-9]*)([[:space:]].*)?$ ]] || return 0
  verb=${BASH_REMATCH[2]:-${match[2]}}
  word=${line##*[[:space:]]}
  if [[ $word == "$verb" ]]; then
    COMPREPLY=($(compgen -W "@VERBS@" -- "$word"))
    return 0
  fi
  verb=${verb#src.}
  if [[ $word == *=* ]]; then
    key=${word%%=*}
    COMPREPLY=($(compgen -W "$(_boardwalk_choices "$verb" "$key")" -- "${word#*=}"))
  else
    compopt -o nospace 2>/dev/null
    COMPREPLY=($(compgen -S = -W "$(_boardwalk_keys "$verb")" -- "$word"))
  fi
}
"""


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip() + "\n\npython -m src.completion bash|zsh")
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ConfigError(f"expected one of {', '.join(SHELLS)}, got: {' '.join(argv) or 'nothing'}", fix="python -m src.completion bash")
    print(script(argv[0]))
    return 0


def script(shell: str) -> str:
    """A function for the shell, with all there is to complete inside it, so that a key pressed starts no Python."""
    known = {verb: settings(verb) for verb in compose.verbs()}
    keys = [f"    {verb}) echo '{' '.join(sorted(choices))}' ;;" for verb, choices in known.items()]
    named = [f"    {verb}:{key}) echo '{' '.join(words)}' ;;" for verb, choices in known.items() for key, words in choices.items() if words]
    parts = [
        *(["autoload -U +X bashcompinit && bashcompinit", "autoload -U +X compinit && compinit -u"] if shell == "zsh" else []),
        "_boardwalk_keys() {\n  case $1 in\n" + "\n".join(keys) + "\n  esac\n}",
        "_boardwalk_choices() {\n  case $1:$2 in\n" + "\n".join(named) + "\n  esac\n}",
        SCRIPT.replace("@VERBS@", " ".join(f"src.{verb}" for verb in known)).strip(),
        "complete -o default -o bashdefault -F _boardwalk python python3",
    ]
    return "\n".join(parts)


def settings(verb: str) -> dict[str, list[str]]:
    """{setting or group: what it may be, empty where that is anything} of a verb, options of its groups included. By the schemas, as reading every file takes seconds."""
    groups = compose.groups_of(verb)
    found = leaves(schema_of(verb))
    for group in groups:
        for option, tree in compose.options(group).items() if group in NAMED else ():
            place = f"{group}.{option}." if group == "tracker" else f"{group}."  # several trackers go together, each by its name
            found |= {place + key: found.get(place + key, []) for key in compose.leaves(tree) if key != "tracker"}
    return found | {group: sorted(options) for group, options in groups.items()}


def schema_of(verb: str) -> type[Any]:
    found: type[Any] = getattr(verbs, "".join(word.title() for word in verb.split("_")) + "Verb", verbs.Verb)
    return found


def leaves(schema: type[Any], prefix: str = "") -> dict[str, list[str]]:
    """{dotted setting: the words that its type allows, of a Literal or of true and false} of a schema and those in it."""
    found: dict[str, list[str]] = {}
    for name, field in schema.model_fields.items():
        members = _members(field.annotation)
        inside = [member for member in members if hasattr(member, "model_fields")]
        for member in inside:
            for key, words in leaves(member, f"{prefix}{name}.").items():
                found[key] = sorted({*found.get(key, ()), *words})
        if not inside:
            found[prefix + name] = sorted({word for member in members for word in _words(member)})
    return found


def _words(member: Any) -> list[str]:
    if typing.get_origin(member) is Literal:
        return [str(one) for one in typing.get_args(member)]
    return ["true", "false"] if member is bool else []


def _members(annotation: Any) -> list[Any]:
    """An annotation taken apart: of unions and Annotated each member, of anything else itself."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (Literal, dict) or not parts:
        return [annotation]
    return [member for part in parts for member in _members(part)]


if __name__ == "__main__":
    sys.exit(stage.guarded(lambda: main(sys.argv[1:])))
