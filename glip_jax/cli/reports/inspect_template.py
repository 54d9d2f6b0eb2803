"""The HTML of `inspect`: a jinja2 template in the style of the page of a run; one file, light, made for phones too.

Its style (`OWN`) and its cards and bars (`CARD`) serve the page of `label` as well.
"""

from glip_jax.cli.reports.run_template import STYLE

__all__ = ["CARD", "INSPECTION", "OWN"]

OWN = """
.caption { max-height: 15.5rem; overflow-y: auto; font-size: .88rem; line-height: 1.7 } .caption s { color: var(--soft); text-decoration: none }
.caption .unknown { text-decoration: underline dotted 2px #b54708; text-underline-offset: 3px } .caption span.unknown { opacity: .8 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem 1.2rem } .plots figure { border: 0; border-radius: 0 }
.plots img { width: 100%; max-width: 30rem; height: auto; display: block } .plots figcaption { padding: 0 0 .2rem; font-weight: 600; font-size: .92rem }
.blank { background: var(--wash); display: grid; place-items: center; min-height: 9rem; color: var(--bad) }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem } .two .bars { columns: auto }
.bar { grid-template-columns: 1fr 7rem 3.6rem } .chip b { font-weight: 600 } .key { display: inline-block; padding: .05rem .4rem; border-radius: .3rem; color: #fff; background: #3b6fd4 }
"""

CARD = """
{% macro card(item) %}<figure>{% if item.uri %}<svg viewBox="0 0 {{ item.width }} {{ item.height }}" role="img" aria-label="{{ item.file }}">
<image href="{{ item.uri }}" width="{{ item.width }}" height="{{ item.height }}" preserveAspectRatio="none"/>
{%- for box in item.boxes %}{% set at %}x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="{{ box.height }}" rx="2"{% endset %}
<rect class="light" {{ at }}/><rect class="found" stroke="{{ box.colour }}" {{ at }}/>{% endfor %}
{%- for box in item.boxes if box.words %}<text x="{{ box.words_x }}" y="{{ box.words_y }}" text-anchor="{{ box.anchor }}"
 stroke="{{ box.colour }}">{{ box.words }}</text>{% endfor %}</svg>{% else %}<div class="blank">no picture</div>{% endif %}
{% if item.caption %}<div class="caption">{% for piece in item.caption %}{% if piece.colour %}<span style="background:{{ piece.colour }}"
{%- if piece.unknown %} class="unknown"{% endif %}>{{ piece.text }}</span>{% elif piece.unknown %}<s class="unknown">{{ piece.text }}</s>
{%- else %}<s>{{ piece.text }}</s>{% endif %}{% endfor %}</div>{% endif %}
<figcaption>{% for words, paint in item.chips %}<span class="chip">{% if paint %}<i style="background:{{ paint }}"></i>{% endif %}{{ words }}</span>{% endfor %}
<span class="file">{{ item.file }}</span></figcaption></figure>{% endmacro %}
{% macro bars(rows) %}<div class="bars">{% for name, value in rows %}<div class="bar"><span title="{{ name }}">{{ name }}</span>
<u style="--share:{{ (100 * value / rows[0][1]) | round(1) }}%"></u><span>{{ "{:,}".format(value) }}</span></div>{% endfor %}</div>{% endmacro %}
"""

INSPECTION = (
    CARD
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + STYLE
    + OWN
    + """</style></head><body><main>
<h1>{{ title }}</h1>{% for line in notes %}<p class="soft">{{ line }}</p>{% endfor %}
<div class="tiles">{% for s in sources %}<div class="tile"><span class="name">{{ s.name }}</span><b>{{ "{:,}".format(s.records) }}</b>
<span class="soft">{% for line in s.below %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}</span></div>{% endfor %}</div>
<h2>Statistics</h2><p class="soft">{{ counted }}</p>
<div class="plots">{% for name, picture in plots %}<figure><figcaption>{{ name }}</figcaption><img src="{{ picture }}" alt="{{ name }}"></figure>{% endfor %}</div>
{% if examples %}<h2>Training examples</h2>
<p class="soft">What the network gets at {{ examples_of }}: pixels after crop, resize, flip and colours, and the caption as its tokens spell it.
<span class="key">coloured</span> tokens are the targets of the box in their colour; grey ones are negative everywhere;
<s class="unknown" style="text-decoration:underline dotted 2px #b54708;text-underline-offset:3px">dotted</s> ones are unknown and give no loss where no box is.</p>
<div class="cards">{% for item in examples %}{{ card(item) }}{% endfor %}</div>{% endif %}
{% for s in sources %}<h2>{{ s.name }}</h2><p class="soft">{{ s.about }}</p>
<div class="two"><div><h3>Most frequent {{ "names" if s.named else "phrases" }}, boxes each</h3>{% if s.top %}{{ bars(s.top) }}{% else %}<p class="soft">none</p>{% endif %}</div>
<div><h3>Dropped by the import</h3>{% if s.drops %}{{ bars(s.drops) }}{% else %}<p class="soft">nothing</p>{% endif %}
{% if s.trained %}<h3>Dropped in training examples ({{ s.trained }} drawn)</h3>{% if s.lost %}{{ bars(s.lost) }}{% else %}<p class="soft">nothing</p>{% endif %}{% endif %}
{% if s.corrupt %}<h3>Corrupt records</h3>{% for line in s.corrupt %}<p class="soft">{{ line }}</p>{% endfor %}{% endif %}</div></div>
<h3>Records as they are stored</h3><div class="cards">{% for item in s.cards %}{{ card(item) }}{% endfor %}</div>
{% endfor %}
</main></body></html>
"""
)
