"""Renders the templates of tests/data/chat_templates.json as transformers 5 does: Jinja 2 in a sandbox, with its
settings, functions and `generation` blocks. Each line of the file is a template and its text, or null for an error.

    pip install jinja2
    python tests/python/make_chat_templates.py tests/data/chat_templates.json

The committed file was made with Jinja 3.1.6. To add a case, add a line with any text and run this.
"""

import datetime
import json
import sys

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

VALUES = {
    "messages": [
        {"role": "system", "content": "Be <brief>."},
        {"role": "user", "content": "Hi 'é' & \"you\"\n"},
        {"role": "assistant", "content": "<think>a\n</think>\n\nb"},
        {"role": "user", "content": "ok?"},
    ],
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
}


class Generation(Extension):
    """A `generation` block, which renders its body as the body of a `call` block."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("render"), [], [], body).set_lineno(line)

    @staticmethod
    def render(caller):
        return caller()


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def fail(message):
    raise jinja2.TemplateError(message)


environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = to_json
environment.globals["raise_exception"] = fail
environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)


def render(template):
    try:
        return environment.from_string(template).render(**VALUES)
    except Exception:
        return None


path = sys.argv[1]
with open(path) as file:
    cases = [[template, render(template)] for template, _ in json.load(file)]
with open(path, "w") as file:
    file.write("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")
