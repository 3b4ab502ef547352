"""The terminal of `python -m src.chat` with speakers that say what they are told: `python parrot.py [HISTORY_FILE] [--two]`. No model, so no torch.

A prompt "long" gets a thousand words, slowly; "steer" an answer that would clear the screen; "call" a call of a tool; any other is repeated.
"""

import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.chat.__main__ import Terminal
from src.core import stage
from src.models.speaking import Ended
from src.serving.conversation import Conversation
from src.settings.answers import Decoding

ANSWERS = {
    "long": "word " * 1000,
    "steer": "\x1b[2J\x1b]0;owned\x07\u202edone",
    "call": '{"name": "look", "arguments": {"q": "\\u001b[31mred"}}',
}


class Parrot:
    raw = False

    def __init__(self, name: str):
        self.name = name

    def reply(self, messages, decoding, tools=None):
        asked = messages[-1]["content"]
        text = ANSWERS.get(asked, f"{self.name} heard {asked}")
        for word in re.findall(r"\S+\s*", text):
            time.sleep(0.02 if asked == "long" else 0)
            yield word
        yield Ended(text, "stop", True, 1, 1)


names = ["polly", "lora"] if "--two" in sys.argv else ["polly"]
history = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
decoding = Decoding(temperature=0, top_p=1, max_tokens=24, seed=0, stop=[])
talks = [
    Conversation(Parrot(name), system=None, tools=[{"type": "function", "function": {"name": "look"}}], forgets=True) for name in names
]


def work() -> int:
    Terminal(talks, decoding, history).run()
    return 0


sys.exit(stage.guarded(work))
