'use strict';
// Draws the report from `kvplan`: {profile, plans: [{name, plan, validation}]}; profile and validation may be null.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const fixed = (x, n) => x.toFixed(n);
const significant = (x, n = 3) => (x === 0 ? '0' : Math.abs(x) < 1e-4 ? x.toExponential(n - 1) : String(Number(x.toPrecision(n))));
const signedPercent = (x) => `${x < 0 ? '−' : '+'}${Math.abs(100 * x).toFixed(2)} %`;
const {profile, plans} = kvplan;
const first = plans[0];

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Fills a section with a heading, an explanation and content; a section without data is removed. */
function section(id, heading, text, ...content) {
  const node = document.getElementById(id);
  if (content.length === 0) return node.remove();
  node.append(element('h2', {}, heading), element('p', {}, text), ...content);
}

const charts = [];
function plot(label, type, data, options) {
  const canvas = element('canvas', {role: 'img', 'aria-label': label});
  charts.push(() => new Chart(canvas, {
    type, data,
    options: {
      animation: false, maintainAspectRatio: false, interaction: {mode: 'nearest', intersect: false},
      plugins: {legend: {labels: {color: css('--ink')}}},
      ...options,
    },
  }));
  return element('div', {class: 'plot'}, canvas);
}

const axis = (title, more = {}) => ({
  title: {display: true, text: title, color: css('--muted')}, grid: {color: css('--line')}, ticks: {color: css('--muted')}, ...more,
});
const logAxis = (title) => axis(title, {type: 'logarithmic', ticks: {color: css('--muted'), callback: (v) => significant(v, 2)}});
const layerAxis = () => axis('layer');
const line = (label, data, colour, more = {}) => ({
  label, data, borderColor: css(colour), backgroundColor: css(colour), pointRadius: 2.5, borderWidth: 2, ...more,
});

function table(header, rows) {
  return element('div', {class: 'scroll'}, element('table', {},
    element('thead', {}, element('tr', {}, ...header.map((h) => element('th', {scope: 'col'}, h)))),
    element('tbody', {}, ...rows.map(({cells, plan}) =>
      element('tr', plan ? {class: 'plan'} : {}, ...cells.map((c) => element('td', {}, c)))))));
}

function planResult(entry, mode) {
  return entry.validation?.candidates.find((c) => c.name === 'plan' && (!mode || c.mode === mode));
}

function headline() {
  const tiles = document.getElementById('headline');
  const tile = (value, label) => tiles.append(element('div', {class: 'tile'}, element('b', {}, value), element('span', {}, label)));
  if (first) {
    const {plan} = first;
    document.getElementById('title').textContent = `${plan.model.architecture}: ${fixed(plan.effective_bits, 2)}-bit plan “${first.name}”`;
    tile(fixed(plan.effective_bits, 3), `effective bits per element (${fixed(plan.effective_bits_at_context, 3)} at context ${plan.context})`);
    tile(`${(16 / plan.effective_bits).toFixed(2)}×`, `smaller than fp16: ${plan.bytes_per_token.toLocaleString('en')} bytes per token`);
    tile(significant(plan.predicted_kl), 'predicted KL, nats per token');
    const measured = planResult(first);
    if (measured) {
      tile(`${significant(measured.kl.mean)} ± ${significant(measured.kl.standard_error, 2)}`, 'measured KL on held-out text, ± standard error');
      tile(signedPercent(measured.perplexity_rise), 'perplexity against the fp16 cache');
      const q4 = first.validation.candidates.find((c) => c.name === 'q4_0' && c.mode === measured.mode);
      if (q4) {
        const wins = measured.kl.mean < q4.kl.mean && measured.effective_bits < q4.effective_bits;
        tiles.append(element('div', {class: `tile verdict${wins ? '' : ' no'}`},
          `${wins ? 'Better and smaller than q4_0' : 'Not better than q4_0 at fewer bits'}: KL ${significant(measured.kl.mean)} at ` +
          `${fixed(measured.effective_bits, 2)} bits against ${significant(q4.kl.mean)} at ${fixed(q4.effective_bits, 2)} bits.`));
      }
    }
  }
  const model = first?.plan.model ?? profile?.model;
  if (model) {
    document.getElementById('subtitle').textContent =
      `${model.num_layers} layers, ${model.query_heads} query heads, ${model.kv_heads} KV heads of ${model.head_dim}`;
  }
}

function validationTable() {
  const measured = plans.filter((p) => p.validation);
  section('validation', 'Held-out measurements',
    'KL divergence from the fp16 cache in nats per token; intervals are 95 % paired bootstrap over windows.',
    ...measured.map(({name, validation: v}) => element('div', {},
      element('p', {}, `${name}: ${v.texts.map((t) => t.name).join(', ')} [${v.part.join(':')}], ${v.windows} windows of ${v.window} tokens, ${v.scored_tokens.toLocaleString('en')} scored`),
      table(['candidate', 'mode', 'bits', 'perplexity', 'rise', 'rise 95 %', 'KL', '± s.e.', 'p99', 'CVaR95', 'same top-1'],
        v.candidates.map((c) => ({
          plan: c.name === 'plan',
          cells: [c.name, c.mode, fixed(c.effective_bits, 3), fixed(c.perplexity, 3), signedPercent(c.perplexity_rise),
            `${signedPercent(c.perplexity_rise_interval.low)} … ${signedPercent(c.perplexity_rise_interval.high)}`,
            significant(c.kl.mean), significant(c.kl.standard_error, 2), significant(c.kl.p99), significant(c.kl.cvar95),
            `${(100 * c.same_top1).toFixed(1)} %`],
        }))))));
}

function front() {
  if (!first) return section('front');
  const points = first.plan.front.map((p) => ({x: p.effective_bits, y: p.predicted_kl}));
  const measured = [], others = [];
  for (const entry of plans) {
    for (const c of entry.validation?.candidates ?? []) {
      if (c.mode !== entry.validation.candidates[0].mode || c.name === 'fp16') continue;
      const point = {x: c.effective_bits, y: c.kl.mean, name: c.name === 'plan' ? entry.name : c.name};
      (c.name === 'plan' ? measured : others).push(point);
    }
  }
  const limit = Math.min(...[...measured, ...others].map((p) => p.y), ...points.filter((p) => p.x < 7).map((p) => p.y)) / 2;
  const label = (item) => `${item.raw.name ?? 'predicted'}: ${fixed(item.raw.x, 3)} bits, KL ${significant(item.raw.y)}`;
  section('front', 'Pareto front', 'Least predicted KL at every size, with what was measured on held-out text.',
    plot('KL against effective bits', 'scatter', {datasets: [
      line('predicted', points.filter((p) => p.y > limit), '--key', {showLine: true, pointRadius: 0}),
      line('plans, measured', measured, '--plan', {pointRadius: 6, pointStyle: 'rectRot'}),
      line('baselines, measured', others, '--value', {pointRadius: 5, pointStyle: 'triangle'}),
    ]}, {scales: {x: axis('effective bits per element'), y: logAxis('KL, nats per token')},
      plugins: {legend: {labels: {color: css('--ink'), usePointStyle: true}}, tooltip: {callbacks: {label}}}}));
}

/** Colour of a width: light for few bits, dark for many, readable in both schemes. */
const bitColour = (bits) => `hsl(205 70% ${90 - 9 * Math.min(bits, 8)}%)`;
const bitInk = (bits) => (bits > 3.6 ? '#fff' : '#1b2430');

function bitMap(title, layers, side) {
  const heads = layers[0][side].heads.length;
  const mean = (widths) => widths.reduce((a, b) => a + b, 0) / widths.length;
  return element('div', {},
    element('table', {class: 'map'},
      element('caption', {}, title),
      element('thead', {}, element('tr', {}, element('th', {}, 'layer'), ...Array.from({length: heads}, (_, h) => element('th', {scope: 'col'}, `h${h}`)))),
      element('tbody', {}, ...layers.map((layer) => element('tr', {}, element('th', {scope: 'row'}, layer.index),
        ...layer[side].heads.map((head, h) => {
          const bits = mean(head.widths);
          const outliers = head.outliers.length ? `, ${head.outliers.length} outlier channels at 8` : '';
          return element('td', {style: `background:${bitColour(bits)};color:${bitInk(bits)}`,
            title: `layer ${layer.index}, KV head ${h}: widths ${head.widths.join(' ')}${outliers}`}, fixed(bits, 1));
        }))))));
}

function bits() {
  if (!first) return section('bits');
  const legend = element('div', {class: 'legend'}, 'bits', ...[0, 1, 2, 3, 4, 5, 6].flatMap((b) => {
    const swatch = element('i', {style: `background:${bitColour(b)}`});
    return [swatch, String(b)];
  }));
  section('bits', 'Where the bits go', 'Mean width per layer and KV head; hover for the widths of the channel groups.', legend,
    element('div', {class: 'maps'}, bitMap('Keys', first.plan.layers, 'k'), bitMap('Values', first.plan.layers, 'v')));
}

function profilePlots() {
  if (!profile) return ['norms', 'outliers', 'sensitivity'].forEach((id) => section(id));
  const layers = profile.layers;
  const labels = layers.map((_, l) => l);
  const of = (field, side) => layers.map((l) => (side ? l[field][side] : l[field]));
  section('norms', 'Key and value norms', 'Mean vector norm per layer; a high ratio is what breaks plain rotation at few bits. The mean share is the part of the key energy that centring removes for free.',
    plot('Mean key and value norm by layer', 'line', {labels, datasets: [line('key norm', of('key_norm'), '--key'), line('value norm', of('value_norm'), '--value')]},
      {scales: {x: layerAxis(), y: logAxis('mean norm')}}),
    plot('Share of the mean in the energy by layer', 'line', {labels, datasets: [line('keys (before rotary)', of('mean_share', 'k'), '--key'), line('values', of('mean_share', 'v'), '--value')]},
      {scales: {x: layerAxis(), y: axis('mean share', {min: 0, max: 1})}}));
  section('outliers', 'Outlier channels', 'Channels whose RMS is above three times the median of their layer.',
    plot('Outlier channels by layer', 'bar', {labels, datasets: [
      line('keys', of('outlier_channels', 'k').map((c) => c.length), '--key'), line('values', of('outlier_channels', 'v').map((c) => c.length), '--value')]},
      {scales: {x: layerAxis(), y: axis('channels')}}));
  section('sensitivity', 'Sensitivity', 'Nats per token that a relative error of 1 would cost (½ tr FC): where bits matter.',
    plot('Sensitivity by layer', 'bar', {labels, datasets: [line('keys', of('sensitivity', 'k'), '--key'), line('values', of('sensitivity', 'v'), '--value')]},
      {scales: {x: layerAxis(), y: logAxis('nats per token')}}));
}

function positions() {
  const validation = first?.validation;
  if (!validation) return section('positions');
  const colours = ['--plan', '--value', '--key', '--other', '--muted'];
  const shown = validation.candidates.filter((c) => c.name !== 'fp16' && c.mode === validation.candidates[0].mode).slice(0, colours.length);
  const bins = shown[0]?.kl_by_position.length ?? 0;
  const start = validation.first_scored, width = (validation.window - 1 - start) / bins;
  section('positions', 'KL by position', 'Mean KL in equal bins of the scored positions: does quality fall as the context grows?',
    plot('KL by position', 'line', {labels: Array.from({length: bins}, (_, i) => Math.round(start + width * (i + 0.5))),
      datasets: shown.map((c, i) => line(c.name, c.kl_by_position, colours[i]))},
    {scales: {x: axis('position in the window'), y: logAxis('KL, nats per token')}}));
}

function seeds() {
  const measured = plans.filter((p) => planResult(p)).map((p) => ({seed: p.plan.seed, bits: p.plan.effective_bits, kl: planResult(p).kl, name: p.name}));
  const same = measured.filter((m) => Math.abs(m.bits - measured[0].bits) < 0.01);
  if (new Set(same.map((m) => m.seed)).size < 2) return section('seeds');
  const mean = same.reduce((a, m) => a + m.kl.mean, 0) / same.length;
  const sd = Math.sqrt(same.reduce((a, m) => a + (m.kl.mean - mean) ** 2, 0) / (same.length - 1));
  section('seeds', 'Seeds', `Same budget, other rotation seeds: KL mean ${significant(mean)}, sd ${significant(sd)}, CV ${significant(sd / mean)}, ` +
      `${significant(Math.min(...same.map((m) => m.kl.mean)))} … ${significant(Math.max(...same.map((m) => m.kl.mean)))}.`,
    plot('KL by seed', 'bar', {labels: same.map((m) => `seed ${m.seed}`), datasets: [line('measured KL', same.map((m) => m.kl.mean), '--plan')]},
      {scales: {x: axis('rotation seed'), y: axis('KL, nats per token', {beginAtZero: true})}}));
}

function provenance() {
  const rows = [];
  for (const {name, plan} of plans) {
    rows.push({cells: [name, `policy ${plan.policy}, codec ${plan.codec}, groups of ${plan.group_size}, norm ${plan.norm}, seed ${plan.seed}`]});
    for (const s of plan.provenance.sources) rows.push({cells: ['calibrated on', `${s.name} [${s.part.join(':')}], ${s.tokens} tokens, sha256 ${s.sha256.slice(0, 12)}`]});
    rows.push({cells: ['profile sha256', plan.provenance.profile_sha256.slice(0, 16)]});
    rows.push({cells: ['k/v weights sha256', plan.model.kv_weights_sha256.slice(0, 16)]});
  }
  if (!rows.length && profile) for (const s of profile.sources) rows.push({cells: ['calibrated on', `${s.name}, ${s.tokens} tokens`]});
  section('provenance', 'Provenance', 'What these figures were made from.', table(['what', 'value'], rows));
}

headline();
validationTable();
front();
bits();
profilePlots();
positions();
seeds();
provenance();
charts.forEach((draw) => draw());
