"""Conversations as text are what transformers makes of the same template, and templates can do no harm."""

import pytest

from llm_jax.config import UserError
from llm_jax.data.templates import TRANSCRIPT, pieces, render

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] | trim ~ '<|im_end|>\\n' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
STRICT = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('no "system" here') }}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
<{{ message.role }}>{{ message.content | tojson }}{{ {'b': 1, 'a': 'é<'} | tojson(indent=2) }}
{% endfor %}"""
TALK = [
    {"role": "user", "content": " <Hi> & 'é' "},
    {"role": "assistant", "content": "Hello.\n"},
    {"role": "user", "content": "Bye"},
]


WRAPPED = """\
{% for m in messages %}{% if m.role != 'assistant' %}<|user|>{{ m.content }}<|end|>
{% elif loop.index < 3 %}<|assistant|>{% generation %}{{ m.content ~ '<|end|>\n' }}{% endgeneration %}
{%- else %}<|assistant|>{{ m.content ~ '<|end|>\n' }}{% endif %}{% endfor %}"""
TWICE = """\
{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}
{%- generation %}{{ m.content[:2] }}{% endgeneration %}, {% generation -%}
  {{ m.content[2:] }} {% endgeneration %}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("template", [CHATML, WRAPPED, TWICE])
def test_what_generation_wraps_is_what_the_assistant_says_as_for_transformers(template):
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    talk = [*TALK, {"role": "assistant", "content": "no"}]
    texts, spans = module.render_jinja_template(
        [talk], chat_template=template, return_assistant_tokens_mask=True
    )
    theirs = [texts[0][start:end] for start, end in spans[0]]
    ours = pieces(template, talk, {}, ("<|end|>", "<|im_end|>"))
    assert [text for text, said in ours if said] == theirs and theirs
    assert "".join(text for text, _ in ours) == texts[0] == render(template, talk, {}, answer=False)


@pytest.mark.parametrize("template", [CHATML, STRICT, TRANSCRIPT])
@pytest.mark.parametrize("answer", [True, False])
def test_templates_are_rendered_as_by_transformers(template, answer):
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = module.render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=answer, bos_token="<s>"
    )
    assert render(template, TALK, {"bos_token": "<s>"}, answer) == theirs[0]


def test_a_transcript_goes_on_where_the_assistant_speaks():
    text = render(TRANSCRIPT, [{"role": "system", "content": "Be kind."}, *TALK[1:]], {})
    assert text == "Be kind.\nAssistant: Hello.\n\nUser: Bye\nAssistant:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, 'the chat template: no "system" here'),
        ("{% for %}", "the chat template: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ missing.thing }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "the chat template: ZeroDivisionError: division by zero"),
        ("{% for i in range(10**7) %}{% endfor %}", "the chat template: OverflowError"),
        ("{{ '%d' % 'x' }}", "the chat template: TypeError"),
        ("{{ 'a' * 10**15 }}", "the chat template: MemoryError"),
    ],
)
def test_a_template_that_breaks_refuses_or_reaches_out_is_one_line(template, message):
    with pytest.raises(UserError, match=message):
        render(template, [{"role": "system", "content": "x"}], {"bos_token": "<s>"})
