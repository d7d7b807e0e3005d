"""Chat templates that try to take more memory or time than a template may: 256 MB, 2 s.

Each is a small program in Jinja. Some stay below any single limit and multiply what they are allowed.
"""

from __future__ import annotations

TALK = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"


def repeated(body: str, times: int = 60, start: str = "'aa'") -> str:
    """A template that does ``body`` over and over to `n.x`, and then writes it."""
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range({times}) %}}{body}{{% endfor %}}"


def grown(expression: str, start: str = "'aa'") -> str:
    return repeated(f"{{% set n.x = {expression} %}}", start=start)


BIG = "{% set big = 'a' * 1000000 %}"
LIST = "{% set many = range(99999) | list %}"
TWICE = grown("[n.x, n.x]", "[1]")
TUPLE = grown("(n.x, n.x)", "(1, 2)")
PAIR = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}"
)
DEEP = repeated("{% set n.x = (n.x,) %}", 99999, "(1,)")
KEPT = "{% set n = namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = n.x + [IT] %}{% endfor %}"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}IT{% endfor %}{% endfor %}"

BOMBS = {
    # Memory: one value
    "text times": "{{ ('a' * 10000000000) | length }}",
    "number times text": "{{ (10000000000 * 'a') | length }}",
    "list times": "{{ ([0] * 10000000000) | length }}",
    "tuple times": "{{ ((0, 1) * 10000000000) | length }}",
    "times times": "{{ ((('a' * 1000) * 1000) * 1000) * 1000 }}",
    "power": "{{ 9 ** 99999999 }}",
    "power of powers": grown("n.x ** 16", "9"),
    "squares": grown("n.x * n.x", "99999"),
    "added numbers": repeated("{% set n.x = n.x + n.x %}", 99999, "99999"),
    "doubling +": grown("n.x + n.x"),
    "doubling ~": grown("n.x ~ n.x"),
    "doubling set": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling list": grown("n.x + n.x", "[1]"),
    "doubling join": grown("[n.x, n.x] | join"),
    "doubling method join": grown("''.join([n.x, n.x])"),
    "doubling %": grown("'%s%s' % (n.x, n.x)"),
    "doubling format": grown("'{0}{0}'.format(n.x)"),
    "doubling replace": grown("'xx' | replace('x', n.x)"),
    "doubling JSON": grown("[n.x, n.x] | tojson"),
    "doubling string": grown("[n.x, n.x] | string"),
    "doubling macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + grown("f(n.x)"),
    "doubling call": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 15
    + "a" * 1000
    + "{% endcall %}" * 15,
    "percent width": "{{ ('%10000000000d' % 1) | length }}",
    "percent widths": "{{ (('%999d' * 9999) % ((1,) * 9999)) * 1000 }}",
    "percent star": "{{ ('%*d' % (10000000000, 1)) | length }}",
    "percent of a mapping": BIG + "{{ (('%(a)s' * 10000) % {'a': big}) | length }}",
    "percent of many": BIG + "{{ (('%s' * 10000) % ((big,) * 10000)) | length }}",
    "percent of JSON": TWICE + "{{ ('%s' % [n.x]) | length }}",
    "odd text": "{{ '%10000000000d' is odd }}",
    "divisible text": BIG + "{{ ('%s' * 10000) is divisibleby((big,) * 10000) }}",
    "format width": "{{ '{:10000000000}'.format(1) | length }}",
    "format width inside": "{{ '{0:{1}}'.format(1, 10000000000) | length }}",
    "format of many": BIG + "{{ ('{0}' * 10000).format(big) | length }}",
    "format_map": BIG + "{{ ('{a}' * 10000).format_map({'a': big}) | length }}",
    "format repr": TWICE + "{{ '{0!r}'.format(n.x) }}",
    "ljust": "{{ 'a'.ljust(10000000000) | length }}",
    "center method": "{{ 'a'.center(10000000000) | length }}",
    "zfill": "{{ '1'.zfill(10000000000) | length }}",
    "expandtabs": "{{ '\t\t'.expandtabs(10000000000) | length }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') | length }}",
    "encode": BIG + "{% for i in range(5000) %}{{ big.encode('utf-32') | length }}{% endfor %}",
    "translate": BIG + "{{ big.translate({97: 'b' * 10000}) | length }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "wordwrap": BIG + "{{ big | wordwrap(1, wrapstring='b' * 10000) | length }}",
    "xmlattr": BIG + "{{ {'a': '<' * 1000000} | xmlattr | urlize }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "round": "{{ 1 | round(-1000000000) }}{{ 3 | round(1000000000, 'ceil') }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) | length }}",
    "replace nothing": BIG + "{{ big.replace('', 'b' * 1000) | length }}",
    "method replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) | length }}",
    "join": "{{ range(99999) | join('b' * 100000) | length }}",
    "method join": "{{ ('b' * 100000).join(['a', 'b'] * 10000) | length }}",
    "join of lazy": BIG + "{{ [big, big] | map('replace', 'a', 'aa') | join(big) | length }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "indent of lines": "{{ ('\n' * 1000000) | indent('b' * 200, blank=true) | length }}",
    "JSON indent": "{{ ([1] * 100000) | tojson(indent=100000) | length }}",
    "JSON indent by depth": repeated("{% set n.x = [n.x] %}", 190, "[1] * 99999") + "{{ n.x | tojson(indent=16) }}",
    "JSON separator": "{{ ([1] * 100000) | tojson(separators=(',' * 100000, ':')) | length }}",
    # Memory: many values, each of a size that is allowed
    "kept texts": BIG + KEPT.replace("IT", "big + i | string"),
    "kept slices": BIG + KEPT.replace("IT", "big[i:]"),
    "kept lists": LIST + KEPT.replace("IT", "many[i:]"),
    "kept upper": BIG + KEPT.replace("IT", "big | upper ~ i"),
    "kept characters": BIG + KEPT.replace("IT", "big | list"),
    "kept parts": "{% set big = 'a ' * 500000 %}" + KEPT.replace("IT", "big.split(' ')"),
    "kept wide": "{% set big = '\U0001f600' * 1000000 %}" + KEPT.replace("IT", "big + i | string"),
    "kept lists in a set": "{% set x %}" + BIG + "{% for i in range(5000) %}{{ big }}{% endfor %}{% endset %}",
    "kept text of the template": "{% set x %}{% for i in range(99999) %}" + "a" * 20000 + "{% endfor %}{% endset %}",
    "long output": "{% for a in range(20000) %}{{ 'a' * 1000 }}{% endfor %}",
    # Nested values: small until somebody walks them
    "list of itself": TWICE + "{{ n.x }}",
    "~ list of itself": TUPLE + "{{ n.x ~ '' }}",
    "JSON of itself": TWICE + "{{ n.x | tojson | length }}",
    "namespace of itself": grown("namespace(a=n.x, b=n.x)", "[1]") + "{{ n.x }}",
    "views of itself": grown("{'a': n.x, 'b': n.x}", "[1]") + "{{ n.x.values() }}",
    "compared with itself": PAIR + "{{ n.x == n.y }}",
    "found in itself": PAIR + "{{ n.x in [n.y] }}",
    "test of itself": PAIR + "{{ n.x is eq(n.y) }}",
    "selected by itself": PAIR + "{{ [n.x] | select('equalto', n.y) | list | length }}",
    "counted in itself": PAIR + "{{ [n.x].count(n.y) }}",
    "index of itself": PAIR + "{{ [n.x].index(n.y) }}",
    "key of itself": TUPLE + "{{ {n.x: 1} | length }}",
    "item of itself": TUPLE + "{{ {'a': 1}[n.x] }}",
    "get of itself": TUPLE + "{{ {'a': 1}.get(n.x) }}",
    "dict of itself": TUPLE + "{{ dict([(n.x, 1)]) | length }}",
    "unique of itself": TUPLE + "{{ [n.x, n.x] | unique | list }}",
    "sort of itself": PAIR + "{{ [n.x, n.y] | sort | length }}",
    "smallest of itself": PAIR + "{{ [n.x, n.y] | min | length }}",
    "lower of itself": TWICE + "{{ n.x | lower }}",
    "is lower of itself": TWICE + "{{ n.x is lower }}",
    "trim of itself": TWICE + "{{ n.x | trim }}",
    "changed of itself": PAIR + "{% for i in [1, 2] %}{{ loop.changed([n.x, n.y][i - 1]) }}{% endfor %}",
    "hash of a deep tuple": DEEP + "{{ {n.x: 1} | length }}",
    "JSON of a deep list": DEEP + "{{ n.x | tojson }}",
    "deep text": DEEP + "{{ n.x }}",
    # Time
    "loops": FOREVER.replace("IT", ""),
    "loops that write": FOREVER.replace("IT", "{{ '' }}"),
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "wide recursive loop": "{% for x in [1] recursive %}{% if loop.depth0 < 3 %}{{ loop(range(99999)) }}{% endif %}"
    "{% endfor %}",
    "loop with a condition": "{% for a in range(99999) for b in c %}{% endfor %}".replace(" for b in c", "")
    + FOREVER.replace("IT", "{% for c in range(99999) if c < 0 %}{% endfor %}"),
    "sorts": LIST + "{% for a in range(5000) %}{{ many | sort(reverse=true) | length }}{% endfor %}",
    "sorts of texts": "{% set many = range(99999) | map('string') | list %}"
    "{% for a in range(5000) %}{{ many | sort | length }}{% endfor %}",
    "sorts of lists": "{% set x = [1] * 90000 %}{{ ([x + [2], x + [1]] * 40000) | sort | length }}",
    "dictsorts": "{% for a in range(5000) %}{{ dict(a=1) | dictsort | length }}{{ range(99999) | sort }}{% endfor %}",
    "uniques": LIST + "{% for a in range(5000) %}{{ many | unique | list | length }}{% endfor %}",
    "sums": "{{ ([[1] * 1000] * 90000) | sum(start=[]) | length }}",
    "searches": BIG + FOREVER.replace("IT", "{% if 'b' in big %}{% endif %}"),
    "searches in lists": LIST + FOREVER.replace("IT", "{% if -1 in many %}{% endif %}"),
    "searches in ranges": FOREVER.replace("IT", "{% if 0.5 in range(99999) %}{% endif %}"),
    "counts": BIG + FOREVER.replace("IT", "{% if big.count('aab') %}{% endif %}"),
    "finds": BIG + FOREVER.replace("IT", "{% if big.find('aab') %}{% endif %}"),
    "starts": BIG + FOREVER.replace("IT", "{% if big.startswith(big) %}{% endif %}"),
    "equals": "{% set a = 'a' * 1000000 %}{% set b = 'a' * 1000000 %}"
    + FOREVER.replace("IT", "{% if a == b %}{% endif %}"),
    "strips": BIG + FOREVER.replace("IT", "{% if big.strip('a') %}{% endif %}"),
    "replaces": BIG + FOREVER.replace("IT", "{% if big.replace('b', '') %}{% endif %}"),
    "maps": LIST + FOREVER.replace("IT", "{% if many | map(attribute='a') | list %}{% endif %}"),
    "rejects": LIST + FOREVER.replace("IT", "{% if many | reject | first %}{% endif %}"),
    "reads": LIST + FOREVER.replace("IT", "{% if many | select('eq', -1) | first %}{% endif %}"),
    "JSONs": LIST + FOREVER.replace("IT", "{% if many | tojson %}{% endif %}"),
    "conditions": FOREVER.replace("IT", "{% if a == b %}{% endif %}" * 1200),
    "integers": "{% set big = '9' * 4000 %}" + FOREVER.replace("IT", "{% if big | int %}{% endif %}"),
    "tags": "<" * 30000 + "{{ ('<' * 900000) | striptags | length }}",
    # Templates that are large themselves
    "many outputs": "{{ 'a' }}" * 3600 + "{{ 'a' * 10000000000 }}",
    "many macros": "".join(
        f"{{% macro f{i}() %}}{{{{ f{i + 1}() }}}}{{{{ f{i + 1}() }}}}{{% endmacro %}}" for i in range(550)
    )
    + "{{ f0() }}",
    "many loops": "{% for a in range(99) %}" * 15 + "{% endfor %}" * 15,
    "many brackets": "{{" + "(" * 16000 + "1" + ")" * 16000 + "}}",
    "many operators": "{{ 1" + " + 1" * 8000 + " }}",
    "many nots": "{{ " + "not " * 8000 + "1 }}",
    "many dots": "{{ a" + ".a" * 16000 + " }}",
    "many comments": "{#" * 16000,
    "many quotes": "{{ '" + "\\" * 32000 + " }}",
    "much text": "a" * 10**8,
}
# What a model's template may well do: all of it goes on working.
HONEST = {
    "a loop that gathers": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.content %}"
    "{% endfor %}",
    "a menu": "{% for i in range(1000) %}{% if i == 5 %}{{ '%s: %02d' % ('a', i) }}{% endif %}{% endfor %}",
    "long separators": "{{ ['a', 'b'] | join('-' * 300) | replace('-' * 300, 'c' * 300) | length }}",
    "JSON": "{{ {'a': [1, 2, {'b': none}]} | tojson(indent=4) }}{{ [3, 1] | sort | string }}",
}
