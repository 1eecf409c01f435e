'use strict';
// What the reader walks through: sizes on the Pareto front, the bit map of a plan and its difference from another, one layer and KV head.
// Data and what was measured: report.js.

const kFp16 = 16;
const chosen = {entry: null, reference: null, layer: 0, head: 0};

// Budgets

/** A point of the front as an entry like a plan's: the owner's with other widths, {effective_bits, predicted_kl, widths} of the report's data. */
function frontEntry(owner, {effective_bits, predicted_kl, widths}) {
  let at = 0;
  const side = ({heads}) => {
    const mapped = heads.map((head) => ({widths: head.widths.map(() => parseInt(widths[at++], 36)), outliers: []}));
    return {heads: mapped, bits: mean(mapped.map((head) => mean(head.widths)))};
  };
  const layers = owner.plan.layers.map((layer) => ({index: layer.index, predicted_kl_share: null, k: side(layer.k), v: side(layer.v)}));
  return {name: `front at ${fixed(effective_bits, 3)} bits`, plan: {...owner.plan, effective_bits, predicted_kl, layers}};
}

/** Sizes to choose from, ascending: {bits, kl, entry, ofFront}. Points of the front have an entry where the report knows their widths, else null. */
function budgets(owner, inside) {
  const own = plans.map((entry) => ({bits: entry.plan.effective_bits, kl: entry.plan.predicted_kl, entry, ofFront: false}));
  const isOwn = (p) => own.some(({bits, kl}) => Math.abs(bits - p.effective_bits) < 1e-9 && Math.abs(kl - p.predicted_kl) <= 1e-9 * kl);
  const points = owner.front_maps.length ? owner.front_maps : owner.plan.front;
  const others = points.filter((p) => inside({x: p.effective_bits, y: p.predicted_kl}) && !isOwn(p))
    .map((p) => ({bits: p.effective_bits, kl: p.predicted_kl, entry: p.widths ? frontEntry(owner, p) : null, ofFront: true}));
  return [...own, ...others].sort((a, b) => a.bits - b.bits);
}

/** The given plan whose map stands for a budget: the largest within it, else the smallest. */
function planWithin(bits) {
  const sizes = [...plans].sort((a, b) => a.plan.effective_bits - b.plan.effective_bits);
  return sizes.findLast(({plan}) => plan.effective_bits <= bits + 1e-9) ?? sizes[0];
}

function budgetText({bits, kl, entry, ofFront}, owner) {
  const size = `${fixed(bits, 3)} effective bits, ${fixed(16 / bits, 2)}× smaller than fp16`;
  const command = `kvplan plan --bits ${fixed(Math.ceil(1e4 * bits) / 1e4, 4)} with the profile and the other options of ${owner.name} makes the plan of this point.`;
  if (entry && ofFront) return `${size}; predicted KL ${significant(kl)}. The map below is that of this point. ${command}`;
  if (entry) {
    const result = planResult(entry);
    return `${entry.name}: ${size}, ${whole(entry.plan.bytes_per_token)} bytes per token; ${kl === null ? 'no predicted KL (imported)' : `predicted KL ${significant(kl)}`}` +
      `${result ? `, measured ${significant(result.kl.mean)} ± ${significant(result.kl.standard_error, 2)}` : ''}. The map below is this plan's.`;
  }
  const near = planWithin(bits);
  const reason = near.plan.effective_bits <= bits + 1e-9 ? 'the largest plan of this report within the budget' : 'the smallest plan of this report, above the budget';
  return `${size}; predicted KL ${significant(kl)}. Of this point the plan file knows only these sums, not the widths (kvplan report --profile finds them): ` +
    `the map below is that of ${near.name} (${fixed(near.plan.effective_bits, 3)} bits), ${reason}. ${command}`;
}

/** Slider over the budgets; `moved` gets the chosen one. */
function budgetControls(stops, owner, moved) {
  const slider = element('input', {type: 'range', id: 'budget', min: 0, max: stops.length - 1, step: 1, 'aria-describedby': 'budget-text'});
  const text = element('output', {id: 'budget-text', for: 'budget', 'aria-live': 'polite'});
  const jump = choice('Plan', plans.map(({name}, i) => [i, name]), (i) => set(stops.findIndex(({entry}) => entry === plans[i])));
  function set(index) {
    const stop = stops[index];
    slider.value = index;
    const given = stop.ofFront ? null : stop.entry;
    slider.setAttribute('aria-valuetext', `${fixed(stop.bits, 2)} bits${given ? `, plan ${given.name}` : ''}`);
    text.textContent = budgetText(stop, owner);
    jump.control.value = plans.indexOf(given ?? planWithin(stop.bits));
    moved(stop);
  }
  slider.addEventListener('input', () => set(Number(slider.value)));
  const label = element('label', {class: 'wide', for: 'budget'}, 'Budget', slider);
  return {controls: element('div', {class: 'controls'}, label, jump), text, begin: () => set(stops.findIndex(({entry}) => entry === first))};
}

function frontSection() {
  if (!first) return section('front');
  const measuredPlans = plans.map((entry) => ({...entry, result: planResult(entry)})).filter(({result}) => result);
  const point = (name, c) => ({x: c.effective_bits, y: c.kl.mean, ...klInterval(c.kl), name});
  const measured = measuredPlans.map(({name, result}) => point(name, result));
  const baselines = (first.validation?.candidates ?? [])
    .filter((c) => !['fp16', 'plan'].includes(c.name) && modeName(c) === modeOf(first.validation)).map((c) => point(c.name, c));
  const predicted = plans.map(({plan}) => ({x: plan.effective_bits, y: plan.predicted_kl}));

  const own = plans.map(({plan}) => plan.effective_bits);
  const xMin = Math.min(1.5, ...own.map((b) => Math.floor(2 * b - 0.5) / 2)), xMax = Math.max(7, ...own.map((b) => Math.ceil(b + 0.5)));
  const inside = ({x, y}) => x >= xMin && x <= xMax && y > 0;
  const outside = baselines.filter((p) => !inside(p)).map((p) => `${p.name} (${fixed(p.x, 2)} bits, KL ${significant(p.y)})`);
  const owner = plans.find(({plan}) => plan.front.length) ?? first;
  const {front} = owner.plan;
  const curve = front.map((p) => ({x: p.effective_bits, y: p.predicted_kl})).filter(inside);
  const marker = [];
  const sets = [
    series(`predicted front of ${owner.name}`, curve, '--key', {showLine: true, pointRadius: 0, pointStyle: 'line'}),
    series('plans, predicted', predicted.filter(inside), '--key', {pointRadius: 5, pointStyle: 'circle', backgroundColor: themed('--paper')}),
    series('plans, measured', measured.filter(inside), '--plan', {pointRadius: 6, pointStyle: 'rectRot'}),
    series('baselines, measured', baselines.filter(inside), '--value', {pointRadius: 5, pointStyle: 'triangle'}),
  ].filter(({data}) => data.length);
  const stops = budgets(owner, inside);
  const {controls, text, begin} = budgetControls(stops, owner, ({bits, kl, entry}) => {
    marker.splice(0, 1, ...(kl > 0 ? [{x: bits, y: kl}] : []));
    drawn?.querySelectorAll('canvas').forEach((canvas) => Chart.getChart(canvas)?.update('none'));
    showMaps(entry ?? planWithin(bits));
  });
  const content = stops.length > 1 ? [controls, text] : [text];
  let drawn = null;
  if (sets.length) {
    const shown = sets.flatMap(({data}) => data.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]));
    if (stops.length > 1) {
      sets.push(series('chosen budget', marker, '--ink', {pointRadius: 10, pointStyle: 'circle', backgroundColor: 'transparent'}));
    }
    // Markers lie above the curve: the first dataset is drawn last unless told otherwise.
    sets.forEach((set, i) => { set.order = sets.length - i; });
    const label = ({raw, dataset}) => `${raw.name ?? dataset.label}: ${fixed(raw.x, 3)} bits, KL ${significant(raw.y)}`;
    drawn = plot('KL divergence against effective bits', 'scatter', {datasets: sets},
      {tall: true, scales: {x: axis('effective bits per element', {min: xMin, max: xMax, ticks: {color: themed('--muted'), stepSize: 0.5}}),
        y: logAxis('KL, nats per token', shown)}, tooltip: {label}});
    content.unshift(drawn);
  }
  const ratios = measuredPlans.map(({plan, result}) => result.kl.mean / plan.predicted_kl).filter(Number.isFinite);
  const comparison = ratios.length ? ` Measured over predicted KL of these plans: ${[...new Set(ratios.map((r) => fixed(r, 2)))].join(', ')}.` : '';
  section('front', 'Pareto front',
    (front.length ? `Least predicted KL at every size${measured.length ? ', with what was measured on held-out text (bars: 95 % intervals)' : ''}.` :
      'These plans hold no prediction, so there is no front.') + comparison +
    `${outside.length ? ` Outside the picture: ${outside.join(', ')}.` : ''}`, ...content);
  return begin;
}

// Bit maps

const meanWidth = (entry, side, layer, head) => mean(entry.plan.layers[layer][side].heads[head].widths);

/** Keys and values of one plan; against a reference, the difference of the mean widths. */
function bitMaps(entry, reference, largest) {
  const {layers, model, variant} = entry.plan;
  const signed = (x) => (Math.abs(x) < 0.05 ? '' : `${x < 0 ? '−' : '+'}${fixed(Math.abs(x), 1)}`);
  return [['Keys', 'k'], ['Values', 'v']].map(([title, side]) => {
    const rows = Array.from({length: model.kv_heads}, (_, h) => layers.map((layer, l) => {
      const {widths, outliers} = layer[side].heads[h], value = meanWidth(entry, side, l, h);
      const kept = outliers.length ? `, ${plural(outliers.length, 'outlier channel')} at ${variant.outlier_bits}` : '';
      const where = `layer ${layer.index}, KV head ${h}: widths ${widths.join(' ')}${kept}`;
      if (!reference) return {value, text: value < kFp16 ? fixed(value, 1) : value, title: where};
      const change = value - meanWidth(reference, side, l, h);
      return {value: change, text: signed(change), title: `${where}; ${reference.name}: ${reference.plan.layers[l][side].heads[h].widths.join(' ')}`};
    }));
    const bits = (of) => of.plan.layers.map((layer) => layer[side].bits);
    const own = bits(entry), other = reference && bits(reference);
    const means = own.map((value, l) => (reference ?
      {value: value - other[l], text: signed(value - other[l]), title: `layer ${layers[l].index}: mean ${fixed(value, 2)} against ${fixed(other[l], 2)}`} :
      {value, text: fixed(value, 1), title: `layer ${layers[l].index}: mean ${fixed(value, 2)}`}));
    const heading = reference ? `${title}: ${entry.name} minus ${reference.name}, mean ${signed(mean(own) - mean(other)) || 'equal'} bits` : `${title}: mean ${fixed(mean(own), 2)} bits`;
    return layerMap(heading, rows, largest, model.kv_heads > 1 ? means : undefined);
  });
}

const sameShape = (a, b) => a.plan.layers.length === b.plan.layers.length && a.plan.model.kv_heads === b.plan.model.kv_heads;

/** Replaces the maps by those of a plan. */
function showMaps(entry) {
  chosen.entry = entry;
  const {reference} = chosen;
  const other = reference && reference !== entry && sameShape(reference, entry) ? reference : null;
  const widths = plans.flatMap(({plan}) => plan.layers.flatMap(({k, v}) => [...k.heads, ...v.heads].map((head) => mean(head.widths))));
  const largest = Math.max(1, Math.ceil(Math.max(...widths.filter((w) => w < kFp16))));
  const note = reference && !other ? (reference === entry ? ` ${entry.name} is compared with itself: its own map is shown.` :
    ` ${reference.name} has another shape and cannot be compared.`) : '';
  document.getElementById('map-of').textContent = (other ?
    `Mean code width of ${entry.name} minus that of ${other.name}, by layer and KV head; blue: more bits, orange: fewer.` :
    `Mean code width by layer and KV head of ${entry.name}.${note}`) +
    ` Point at a cell, or walk with the arrow keys, for the widths of its groups of ${entry.plan.group_size ?? '–'} channels; choose it for details.`;
  const legend = other ? [] : [mapLegend('bits', largest, largest)];
  document.getElementById('maps').replaceChildren(...legend, ...bitMaps(entry, other, other ? Math.ceil(largest / 2) : largest));
  chooseCell(chosen.layer, chosen.head);
}

function bitsSection() {
  if (!first) return section('bits');
  const compare = choice('Compare with', [['', 'none'], ...plans.map(({name}, i) => [i, name])], (i) => {
    chosen.reference = i === '' ? null : plans[i];
    showMaps(chosen.entry);
  });
  compare.control.id = 'reference';
  section('bits', 'Where the bits go', '', ...(plans.length > 1 ? [element('div', {class: 'controls'}, compare)] : []), element('div', {id: 'maps'}));
  document.querySelector('#bits p').id = 'map-of';
}

// One layer and KV head

const cellControls = {};

function chooseCell(layer, head = chosen.head) {
  Object.assign(chosen, {layer, head});
  if (!cellControls.layer) return;
  cellControls.layer.control.value = layer;
  cellControls.head.control.value = head;
  for (const cell of document.querySelectorAll('[role=gridcell]')) {
    cell.setAttribute('aria-selected', Number(cell.dataset.layer) === layer && Number(cell.dataset.head ?? -1) === head);
  }
  const parts = [];
  if (first) {
    const shown = !chosen.entry || plans.includes(chosen.entry) ? plans : [...plans, chosen.entry];
    const rows = shown.flatMap(({name, plan}) => ['k', 'v'].filter(() => plan.layers[layer]?.k.heads[head]).map((side) => {
      const {heads, codec} = plan.layers[layer][side], {widths, outliers} = heads[head];
      return {plan: name === chosen.entry?.name, cells: [name, side === 'k' ? 'keys' : 'values', fixed(mean(widths), 2), widths.join(' '),
        outliers.length ? outliers.join(' ') : '–', codec ?? plan.codec, plan.layers[layer].predicted_kl_share === null ? '–' : percent(plan.layers[layer].predicted_kl_share)]};
    }));
    parts.push(table(['plan', 'side', 'mean bits', 'bits by group', 'outlier channels', 'codec', "layer's share of the predicted KL"], rows, {label: 'Plans at this layer and KV head'}));
  }
  const of = profile?.layers[layer];
  if (of) {
    const {head_dim: width} = profile.model;
    const channels = (side) => of.outlier_channels[side].filter((c) => Math.floor(c / width) === head).map((c) => c % width).join(' ') || 'none';
    parts.push(table(['in the profile', 'keys', 'values'], [
      {cells: ['mean norm of the layer', significant(of.key_norm), significant(of.value_norm)]},
      {cells: ['share of the mean', percent(of.mean_share.k), percent(of.mean_share.v)]},
      {cells: ['sensitivity, nats per token', significant(of.sensitivity.k), significant(of.sensitivity.v)]},
      {cells: ['outlier channels of the head', channels('k'), channels('v')]},
    ], {class: 'facts', label: 'Profile at this layer and KV head'}));
  }
  document.getElementById('cell-figures').replaceChildren(...parts);
}

function cellSection() {
  const {num_layers: layers, kv_heads: heads} = first?.plan.model ?? profile.model;
  const numbers = (count) => Array.from({length: count}, (_, i) => [i, i]);
  cellControls.layer = choice('Layer', numbers(layers), (layer) => chooseCell(Number(layer)));
  cellControls.head = choice('KV head', numbers(heads), (head) => chooseCell(chosen.layer, Number(head)));
  section('cell', 'One layer and head', 'The same choice as a cell of a map.',
    element('div', {class: 'controls'}, cellControls.layer, cellControls.head), element('div', {id: 'cell-figures', 'aria-live': 'polite'}));
}

// Plans side by side

/** The plan's codec, or those that store its sides instead. */
const codecsOf = (plan) => someNames([...new Set(plan.layers.flatMap(({k, v}) => [k, v]).map(({codec}) => codec ?? plan.codec))], 2);

function plansSection() {
  if (plans.length < 2) return section('plans');
  const results = plans.map(planResult);
  const tokens = new Set(plans.filter((_, i) => results[i]).map(({validation}) => tokensKey(validation) + modeOf(validation)));
  const rows = plans.map(({name, plan}, i) => ({plan: name === first.name, cells: [
    name, fixed(plan.effective_bits, 3), `${fixed(16 / plan.effective_bits, 2)}×`, whole(plan.bytes_per_token), plan.policy, codecsOf(plan), plan.code ?? '–',
    plan.predicted_kl === null ? '–' : significant(plan.predicted_kl),
    ...(results[i] ? [`${significant(results[i].kl.mean)} ± ${significant(results[i].kl.standard_error, 2)}`, signedPercent(results[i].perplexity_rise)] : ['–', '–']),
  ]}));
  section('plans', 'Plans', `The headline is about ${first.name}; click a column's name to sort.` +
    `${tokens.size > 1 ? ' These plans were measured on different tokens: their measured columns may not be compared.' : ''}`,
    table(['plan', 'effective bits', 'smaller than fp16', 'bytes per token', 'policy', 'codec', 'code', 'predicted KL', 'measured KL ± s.e.', 'perplexity rise'], rows, {label: 'Plans'}));
}
