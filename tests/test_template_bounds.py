"""A chat template from somebody's folder ends soon, whatever it says; those of real models are as they were."""

import time

import pytest
from conftest import CHAT
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from src.chat import encoding, template, template_bounds
from src.core.errors import BadData

GROW = "{%% set ns = namespace(s='xx') %%}{%% for i in range(90) %%}{%% set ns.s = %s %%}{%% endfor %%}"
ENDLESS = (
    "{% for i in range(99999) %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
    "{% for i in 'x' * 9999 %}{% for j in 'x' * 9999 %}x{% endfor %}{% endfor %}",
    "{% for a in 'aaaaaaaaaaaaaaaa' %}" * 8 + "{% endfor %}" * 8,
    "{% for a in messages %}" + "{% for a in messages[0].content %}" * 8 + "{% endfor %}" * 9,
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{{ range(10 ** 19) }}",
    *(GROW % grown for grown in ("ns.s ~ ns.s", "ns.s + ns.s", "ns.s * 2", "[ns.s, ns.s] | join", "ns.s | replace('x', 'xx')")),
    *(
        GROW % grown
        for grown in ("ns.s.replace('x', 'xx')", "'%s%s' % (ns.s, ns.s)", "'%s%s' | format(ns.s, ns.s)", "'{0}{0}'.format(ns.s)")
    ),
    *(
        f"{{{{ {made} }}}}"
        for made in ("10 ** (10 ** 9)", "'x' * 10 ** 10", "[1] * 10 ** 10", "'x'.ljust(10 ** 10)", "'a\\tb'.expandtabs(10 ** 9)")
    ),
    *(f"{{{{ {made} }}}}" for made in ("'x' | center(10 ** 10)", "'x' | indent(10 ** 9, true)", "[1] | slice(10 ** 9) | list")),
    *(f"{{{{ {made} }}}}" for made in ("[1] | batch(10 ** 9, 0) | list", "messages | tojson(indent=10 ** 9)", "lipsum(n=10 ** 9)")),
    *(
        f"{{{{ {made} }}}}"
        for made in ("'%9999999999d' % 1", "'%*d' % (10 ** 9, 1)", "'{:>9999999999}'.format(1)", "'{0:{1}}'.format(1, 10 ** 9)")
    ),
    "{% set s = 'a b ' * 99999 %}{% for i in range(40000) %}{{ s | wordcount }}{% endfor %}",
    "{% set s = 'a b ' * 99999 %}{% for i in range(40000) %}{{ s.count('b a') }}{% endfor %}",
    "{{ ('x' | center(60000)) | replace(' ', 'x' | center(60000)) }}",
)
TALK = [{"role": "user", "content": "Good morning to you all."}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHAT, local_files_only=True)


@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_an_endless_template_is_refused_at_once(template, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    start = time.process_time()  # on whatever machine: without bounds each would take hours
    with pytest.raises(BadData, match="the chat template refuses this conversation"):
        encoding.render(tokenizer, TALK)
    assert time.process_time() - start < 30


def test_long_conversations_are_rendered_as_without_bounds(tokenizer, monkeypatch):
    """Through a template that looks at all later messages for each, as gpt-oss's does, with what templates use."""
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% macro shown(m) %}{{ '%s' % m.role }}{% endmacro %}"
        "{% for m in messages %}{% set ns = namespace(more=0) %}{% for later in messages[loop.index:] %}{% set ns.more = ns.more + 1 %}{% endfor %}"
        "{{ shown(m) ~ loop.last ~ loop.length ~ (loop.revindex + ns.more * 2 ** 3) }}{{ m.content | trim | replace('a', 'b') | center(100000 // 5000) }}"
        "{{ 'x'.join(['a', 'b']) * 2 }}{{ m | tojson(indent=4) }}{{ 123456789 | default(1) }}{{ '{:5}'.format(9999999) }}{% endfor %}"
        "{% for k, v in tools[0] | dictsort %}{{ k }}{{ loop.nextitem }}{% endfor %}{% for t in tools if t.a %}{{ t }}{% else %}no{% endfor %}",
    )
    talk = [message | {"content": message["content"] * 20} for message in TALK * 300]
    tools = [{"a": {"b": list(range(500))}}]
    bounded = encoding.render(tokenizer, talk, tools)
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", template_bounds.ImmutableSandboxedEnvironment)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert encoding.render(tokenizer, talk, tools) == bounded and len(bounded) > 100_000
    chat_template_utils._compile_jinja_template.cache_clear()


def test_every_way_to_a_rendering_is_bounded(tokenizer, monkeypatch):
    template.bound_templates()
    monkeypatch.setattr(tokenizer, "chat_template", ENDLESS[0])
    with pytest.raises(template_bounds.Endless):
        tokenizer.apply_chat_template(TALK, tokenize=False)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert sum(tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)["assistant_masks"])
