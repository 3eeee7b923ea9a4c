"""Writes chat_templates.json: what transformers renders with chat templates that use the constructs of real ones.

usage: make_chat_vectors.py FILE [TEMPLATES]    (lightrft-data/tests/data/chat_templates.json; needs transformers)

The templates below are this project's own. TEMPLATES, a JSON list of objects with `name` and `template`, is rendered
instead of them, to compare with the templates of models; `cargo test -p lightrft-data --features templates` then reads
the file named by LIGHTRFT_CHAT_VECTORS.
"""
import datetime, json, sys
import transformers
from transformers.utils import chat_template_utils

class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 7, 4)
chat_template_utils.datetime = Fixed

TEMPLATES = {
    # The shape of Qwen2.5's: a default system prompt, tools as JSON, calls and their answers.
    "im tools": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'Be useful.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<answer>\\n' }}{{- message.content }}{{- '\\n</answer>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    # The shape of Llama 3's: header tokens, a date, trimmed content, exceptions.
    "headers": """{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.content is not string %}{{ raise_exception("Only text here, not " ~ message.content|length ~ " parts of " ~ message.role) }}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none and tools %}{{- tools[0] | tojson(indent=4) }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    # The shape of Qwen2-VL's: content in parts, images counted.
    "parts": """{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You see.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # Methods, slices, filters, tests, macros, loop controls, blocks of the assistant, white space.
    "odds and ends": """{# a comment #}
{%- macro line(role, text='') -%}
[{{ role | upper }}] {{ text }}
{% endmacro -%}
{%- set ns = namespace(seen=[], last=none) %}
{%- for m in messages[::-1] %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% break %}{% endif %}{% endfor %}
last user: {{ ns.last }}
{% for m in messages %}
  {% if m.role == 'tool' %}
    {% continue %}
  {% endif %}
  {% if m.content is string and '</think>' in m.content %}
    {% set text = m.content.split('</think>')[-1].lstrip('\\n') %}
  {% elif m.content is string %}
    {% set text = m.content.strip().replace('\\n', ' / ') %}
  {% elif m.content is iterable and m.content is not mapping %}
    {% set text = m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('|') %}
  {% else %}
    {% set text = '-' %}
  {% endif %}
  {{- line(m.role, text) }}
  {%- generation %}{{ m.role.title() }}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{%- endgeneration %}

{% endfor %}
{%- for key, value in messages[0].items() %}{{ key }}={{ value is mapping }};{% endfor %}
{%- if messages|length > 2 %} {{ messages[1:3]|map(attribute='role')|list|join('+') }}{% endif %}
{{ (tools or [])|tojson(separators=(',', ':'), sort_keys=true) }} {{ messages[0].get('name', 'nobody') }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ 'x' * 3 }} {{ 1.0 }} {{ true }} {{ none }} {{ undefined_thing }}
{{ 'Hello World'.startswith('Hello') and 'a,b,,c'.split(',')|length == 4 }} {{ ['b', 'a']|sort|first }} {{ {'a': 1, 'b': [1, 2.5, none, true, 'é"\\\\']}|tojson }} {{ 'é'|tojson(ensure_ascii=true) }}""",
}

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It's <b>the</b> weather & \"more\" — día",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "number", "minimum": 1.0, "maximum": 1e16}}, "required": ["place"], "empty": {}, "none": None}}}]
CALL = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 3, "deep": [1.5, False, None]}}}]
CHATS = {
    "one": [{"role": "user", "content": "Hello?"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "1 < 2 & 'x' \"y\"\n\tok "}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes. 日本 🙂"}, {"role": "user", "content": "Why?"}],
    "tools": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "name": "weather", "content": "{\"t\": 3}", "tool_call_id": "c1"}, {"role": "assistant", "content": "3 degrees."}, {"role": "user", "content": "Thanks"}],
    "parts": [{"role": "user", "content": [{"type": "image", "image": ""}, {"type": "text", "text": "What"}, {"type": "video"}, {"type": "text", "text": " is it?"}]}],
}

templates = json.load(open(sys.argv[2])) if len(sys.argv) > 2 else [dict(name=n, template=t) for n, t in TEMPLATES.items()]
cases = []
for t in templates:
    for name, chat in CHATS.items():
        for tools in (None, TOOLS):
            for add in (False, True):
                extra = {"add_vision_id": True} if tools else {}
                case = dict(template=t["name"], chat=name, tools=tools is not None, add_generation_prompt=add)
                try:
                    case["text"] = chat_template_utils.render_jinja_template([chat], tools=tools, chat_template=t["template"],
                        add_generation_prompt=add, bos_token="<s>", eos_token="</s>", **extra)[0][0]
                except Exception as e:
                    case["error"] = str(e)
                cases.append(case)
with open(sys.argv[1], "w") as f:
    lines = lambda items: ",\n".join(json.dumps(i, ensure_ascii=False) for i in items)
    f.write('{"source": %s,\n"templates": [\n%s\n],\n"tools": %s,\n"chats": [\n%s\n],\n"cases": [\n%s\n]}\n' % (
        json.dumps(f"transformers {transformers.__version__}, jinja2; bos_token <s>, eos_token </s>, add_vision_id with tools, 4 July 2026"),
        lines(dict(name=t["name"], template=t["template"]) for t in templates), json.dumps(json.dumps(TOOLS, ensure_ascii=False), ensure_ascii=False),
        lines(dict(name=n, messages=json.dumps(c, ensure_ascii=False)) for n, c in CHATS.items()), lines(cases)))
print(len(cases), sum("error" in c for c in cases))
