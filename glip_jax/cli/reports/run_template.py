"""The page's HTML: a jinja2 template that `page.render` fills. All of it is one file, light, and made for phones too."""

__all__ = ["PAGE", "STYLE"]

STYLE = """
:root { --ink: #1d2430; --soft: #667085; --line: #e4e7ec; --wash: #f6f7f9; --good: #12805c; --bad: #b42318 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: #fff; margin: 0 }
main { max-width: 78rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p { margin: .25rem 0 .75rem; max-width: 62rem } .soft { color: var(--soft); font-size: .9rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 }
.tile { border: 1px solid var(--line); border-radius: .75rem; padding: .8rem 1rem; background: var(--wash) }
.tile b { display: block; font-size: 1.9rem; line-height: 1.15; font-weight: 650; font-variant-numeric: tabular-nums }
.tile .name { font-weight: 600; overflow-wrap: anywhere } .tile .soft { display: block; font-size: .82rem; line-height: 1.4; margin-top: .2rem }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: .5rem 0 1rem }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
td.main { font-weight: 650 } tr.kind td:first-child { padding-left: 1.2rem; color: var(--soft) }
table.facts td { padding-top: .15rem; padding-bottom: .15rem; text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere }
table.facts td:first-child { white-space: nowrap; color: var(--soft) } table.facts { font-size: .8rem }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
.curves img { width: 100%; max-width: 40rem; height: auto; display: block }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.1rem; margin-top: 1rem }
figure { margin: 0; border: 1px solid var(--line); border-radius: .75rem; overflow: hidden; background: #fff }
figure svg { display: block; width: 100%; height: auto; background: var(--wash) }
figcaption { padding: .6rem .8rem .7rem; font-size: .82rem } .caption { padding: .75rem .9rem; line-height: 1.65; font-size: .98rem }
.caption span { color: #fff; border-radius: .3rem; padding: .08rem .3rem; -webkit-box-decoration-break: clone; box-decoration-break: clone }
.caption span.unasked { opacity: .45; text-decoration: line-through }
.chip { display: inline-block; margin: .12rem .2rem .12rem 0; padding: .05rem .5rem; border-radius: 1rem; border: 1px solid var(--line) }
.chip i { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .3rem }
.chip.right::after { content: " ✓"; color: var(--good); font-weight: 700 } .chip.wrong::after { content: " ✗"; color: var(--bad); font-weight: 700 }
.chip.missed { border: 1px dashed #98a2b3; color: var(--soft) } .chip em { color: var(--soft); font-style: normal; font-size: .74rem }
.file { color: var(--soft); font-size: .74rem; display: block; margin-top: .3rem }
svg text { font: 600 11.5px system-ui, sans-serif; fill: #fff; paint-order: stroke; stroke-width: 4px; stroke-linejoin: round }
.found { fill: none; stroke-width: 2.4 } .light { fill: none; stroke: #fff; stroke-opacity: .6; stroke-width: 4.2 } .halo { fill: none; stroke: #000; stroke-opacity: .55; stroke-width: 2.6 }
.true { fill: none; stroke: #fff; stroke-width: 1.4; stroke-dasharray: 4 3 }
.bars { columns: 17rem; column-gap: 2rem; font-size: .82rem }
.bar { display: grid; grid-template-columns: 1fr 5.5rem 2.6rem; gap: .5rem; align-items: center; break-inside: avoid; padding: .08rem 0 }
.bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.bar u { display: block; height: .5rem; border-radius: .25rem; background: var(--line); overflow: hidden }
.bar u::before { content: ""; display: block; height: 100%; width: var(--share); background: #3b6fd4 } .bar span:last-child { text-align: right }
details { margin: .6rem 0 } summary { cursor: pointer; font-weight: 600; font-size: .95rem } code { font-size: .85em; overflow-wrap: anywhere }
@media (max-width: 36rem) { main { padding: 1.2rem .9rem 3rem } h1 { font-size: 1.4rem } .tiles { grid-template-columns: 1fr 1fr; gap: .5rem }
  .tile { padding: .6rem .7rem } .tile b { font-size: 1.5rem } th, td { padding: .3rem .5rem } }
"""

_MACROS = """
{% macro card(item, alt) %}<figure>{% if item.caption %}<div class="caption">
{%- for piece in item.caption %}{% if piece.colour %}<span style="background:{{ piece.colour }}"
{%- if piece.unasked %} class="unasked" title="beyond the token budget"{% endif %}>{{ piece.text }}</span>
{%- else %}{{ piece.text }}{% endif %}{% endfor %}</div>{% endif -%}
<svg viewBox="0 0 {{ item.width }} {{ item.height }}" role="img" aria-label="{{ alt }}">
<image href="{{ item.uri }}" width="{{ item.width }}" height="{{ item.height }}" preserveAspectRatio="none"/>
{%- for box in item.boxes %}{% set at %}x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="{{ box.height }}"{% endset %}
{%- if box.true %}<rect class="halo" {{ at }}/><rect class="true" {{ at }}/>
{%- else %}<rect class="light" {{ at }} rx="2"/><rect class="found" stroke="{{ box.colour }}" {{ at }} rx="2"/>{% endif %}{% endfor %}
{%- for box in item.boxes if box.words %}<text x="{{ box.words_x }}" y="{{ box.words_y }}" text-anchor="{{ box.anchor }}"
 stroke="{{ box.colour }}">{{ box.words }}</text>{% endfor %}</svg>
<figcaption>{% for chip in item.chips %}<span class="chip {{ chip.state }}">{% if chip.colour %}<i
 style="background:{{ chip.colour }}"></i>{% endif %}{{ chip.words }}{% if chip.kind %} <em>{{ chip.kind }}</em>{% endif %}
{%- if chip.score %} <em>{{ chip.score }}</em>{% endif %}{% if chip.state == "missed" %} <em>missed</em>{% endif %}</span>{% endfor %}
<span class="file">{{ item.file }}</span></figcaption></figure>{% endmacro %}
"""

_TABLES = """
{% if detection %}<h2>Detection</h2>
<p class="soft">Every name of a set is a prompt. <b>AP50 permuted</b>: the same boxes with the names exchanged among each other, the level
of chance for a detector that sees things and does not know their names; <b>× chance</b>: AP50 over it.</p>
<div class="wide"><table><tr><th>set</th><th>images</th><th>names</th><th>AP</th><th>AP50</th><th>AP50 permuted</th><th>× chance</th>
{% for n in numbers %}<th>{{ n }}</th>{% endfor %}</tr>
{% for s in detection %}<tr><td>{{ s.name }}</td><td>{{ s.images }}</td><td>{{ s.names }}</td><td>{{ s.numbers.AP | number }}</td>
<td class="main">{{ s.numbers.AP50 | number }}</td><td>{{ s.permuted | number }}</td><td>{{ s.ratio }}</td>
{% for n in numbers %}<td>{{ s.numbers[n] | number }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
{% if grounding %}<h2>Phrases of captions</h2>
<p class="soft"><b>recall@k</b>: phrases of which one of the k best boxes overlaps a true box by half; <b>merged</b>: the box around all of
the phrase's true boxes instead. Both as on Flickr30k Entities.</p>
<div class="wide"><table><tr><th>set</th><th>captions</th><th>phrases</th>
{% for n in recalls %}<th>{{ n | replace("_recall", " ") }}</th>{% endfor %}<th>not asked</th></tr>
{% for s in grounding %}{% for row in s.rows %}<tr{% if row.kind %} class="kind"{% endif %}><td>{{ row.kind or s.name }}</td>
<td>{{ s.images if not row.kind }}</td><td>{{ row.phrases }}</td>
{% for n in recalls %}<td{% if loop.first %} class="main"{% endif %}>{{ row.numbers[n] | number }}</td>{% endfor %}
<td>{{ s.unasked if not row.kind }}</td></tr>{% endfor %}{% endfor %}</table></div>{% endif %}
"""

_END = """
{% if facts %}<h2>What these numbers rest on</h2>
{% for s in prompts %}<details><summary>{{ s.name }}: {{ s.chunks | length }} {{ "prompt" if s.chunks | length == 1 else "prompts" }}</summary>
{% for chunk in s.chunks %}<p><code>{{ chunk | join(separator) }}</code></p>{% endfor %}</details>{% endfor %}
<div class="wide"><table class="facts">{% for name, value in facts %}<tr><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>{% endfor %}
</table></div>
<details><summary>Settings of the network</summary><div class="wide"><table class="facts">
{% for name, value in network %}<tr><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>{% endfor %}</table></div></details>{% endif %}
"""

PAGE = (
    _MACROS
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + STYLE
    + """</style></head><body><main>
<h1>{{ title }}</h1>{% for line in notes %}<p class="soft">{{ line }}</p>{% endfor %}
{% if sets %}<div class="tiles">{% for s in sets %}<div class="tile"><span class="name">{% for part in s.name.split("_") %}{{ "" if loop.first else "_" }}<wbr>{{ part }}{% endfor %}</span><b>{{ s.headline }}</b>
<span class="soft">{% for line in s.below %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}</span></div>{% endfor %}</div>{% endif %}
"""
    + _TABLES
    + """
{% if curves %}<h2>Curves</h2><div class="curves">{% for name, picture in curves %}<img src="{{ picture }}" alt="{{ name }} by step">
{% endfor %}</div>{% endif %}
{% for s in sets %}<h2>{{ s.name }}</h2>
<p class="soft">The first {{ s.cards | length }} of {{ s.images }} {{ "captions" if s.grounding else "pictures" }}, not chosen. Dashed: true boxes.
In colour: found ones{% if s.grounding %}, the best of each phrase and others{% endif %} from a score of {{ "%.2f" | format(s.least) }} on
{%- if s.chosen %}, where F1 over the set is highest{% endif %}. ✓ right, ✗ wrong by an overlap of one half.</p>
<div class="cards">{% for item in s.cards %}{{ card(item, "picture with true and found boxes") }}{% endfor %}</div>
{% if s.bars %}<details{% if s.bars | length <= 60 %} open{% endif %}><summary>AP50 by name</summary><div class="bars">
{% for name, value in s.bars %}<div class="bar"><span title="{{ name }}">{{ name }}</span>
<u style="--share:{{ (100 * value) | round(1) if value > 0 else 0 }}%"></u><span>{{ value | number }}</span></div>{% endfor %}</div></details>{% endif %}
{% endfor %}
"""
    + _END
    + "</main></body></html>\n"
)
