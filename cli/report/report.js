'use strict';
// Draws the report from `kvplan`: {profile, plans: [{name, plan, validation}]}; profile and validation may be null.
// Field names: docs/formats/. Elements, charts and maps:
// charts.js; what the reader moves: controls.js, explore.js.

const {profile, plans} = kvplan;
const first = plans[0];
// A name stands for one plan.
plans.forEach((entry, i) => {
  const same = plans.slice(0, i).filter(({original}) => original === entry.name).length;
  Object.assign(entry, {original: entry.name, name: same ? `${entry.name} (${same + 1})` : entry.name});
});

// What was measured

/** Mode, and runtime where the cache is not simulated in the forward pass. */
const modeName = ({mode, runtime}) => (runtime === 'cpu' ? mode : `${mode}, ${runtime}`);
const modeOf = (validation) => modeName(validation.candidates[0]);
const planResult = ({validation}) => validation?.candidates.find((c) => c.name === 'plan' && modeName(c) === modeOf(validation));
const seedOf = (plan) => (plan.rotation.kind === 'none' ? plan.seed : plan.rotation.seed);

/** The first few names, and how many more. */
const someNames = (all, most = 4) => all.slice(0, most).join(', ') + (all.length > most ? ` and ${all.length - most} more` : '');
/** Equal for validations of the same tokens, whose figures may stand side by side. */
const tokensKey = (v) => JSON.stringify([v.texts.map((t) => t.sha256), v.part, v.window, v.windows, v.first_scored, v.bos, v.model_sha256]);

/** Validations by the tokens they measured: [{validation, rows: [{name, plan, candidate}]}]; fp16, then plans, then baselines, each once. */
function measurements() {
  const groups = new Map();
  for (const {name, validation} of plans) {
    if (!validation) continue;
    const key = tokensKey(validation);
    if (!groups.has(key)) groups.set(key, {validation, rows: []});
    const {rows} = groups.get(key);
    for (const candidate of validation.candidates) {
      const plan = candidate.name === 'plan';
      const row = {name: plan ? name : candidate.name, plan, candidate};
      const seen = rows.find((r) => r.name === row.name && modeName(r.candidate) === modeName(candidate));
      if (!seen) rows.push(row);
    }
  }
  const rank = ({name, plan}) => (name === 'fp16' ? 0 : plan ? 1 : 2);
  for (const {rows} of groups.values()) rows.sort((a, b) => rank(a) - rank(b));
  return [...groups.values()];
}

/** Whether the plan beats q4_0 at fewer bits: {state, claim, reason}. */
function verdict(validation, measured) {
  const q4 = validation.candidates.find((c) => c.name === 'q4_0' && modeName(c) === modeName(measured));
  if (!q4) return {state: '', claim: 'Not compared with q4_0.', reason: 'Run kvplan validate with --baselines q4_0 to see whether the plan beats it.'};
  const {low, high} = q4.kl_minus_plan;
  const figures = `KL ${significant(measured.kl.mean)} at ${fixed(measured.effective_bits, 2)} bits against ` +
    `${significant(q4.kl.mean)} at ${fixed(q4.effective_bits, 2)} bits; 95 % interval of the difference ` +
    `${significant(low)} … ${significant(high)} over ${plural(validation.windows, 'window')}` +
    `${validation.windows < 8 ? ', too few for more than a rough interval' : ''}.`;
  if (measured.effective_bits >= q4.effective_bits) {
    return {state: '', claim: 'The plan does not use fewer bits than q4_0.', reason: figures};
  }
  if (low > 0) {
    return {state: 'good', claim: 'Yes: the plan beats q4_0 at fewer bits.',
      reason: `${percent(1 - measured.kl.mean / q4.kl.mean, 0)} less divergence in ` +
        `${percent(1 - measured.effective_bits / q4.effective_bits, 0)} fewer bits. ${figures}`};
  }
  if (high < 0) return {state: 'bad', claim: 'No: the plan has fewer bits than q4_0, and more divergence.', reason: figures};
  return {state: '', claim: 'Undecided: at fewer bits, the plan cannot be told from q4_0 on these tokens.', reason: figures};
}

// Sections

function headline() {
  const tiles = document.getElementById('headline');
  const tile = (value, label, small = '') =>
    tiles.append(element('div', {class: 'tile'}, element('b', {}, value, element('small', {}, small)), element('span', {}, label)));
  const model = first?.plan.model ?? profile.model;
  const shape = `${plural(model.num_layers, 'layer')}, ${plural(model.query_heads, 'query head')}, ${plural(model.kv_heads, 'KV head')} of ${model.head_dim} channels`;
  const title = first ? `${model.architecture}: ${first.name} at ${fixed(first.plan.effective_bits, 2)} bits` : `${model.architecture}: profile`;
  document.getElementById('title').textContent = title;
  document.title = `kvplan report · ${title}`;
  document.getElementById('subtitle').textContent = first ?
    `${shape}. ${first.plan.codec[0].toUpperCase()}${first.plan.codec.slice(1)} codec, ${first.plan.policy} policy, context ${whole(first.plan.context)}.` :
    `${shape}. Calibrated on ${whole(profile.tokens)} tokens.`;
  if (!first) {
    tile(whole(profile.tokens), 'tokens in the sums');
    tile(fixed(mean(profile.layers.map((l) => l.norm_ratio)), 1), 'mean ratio of key norm to value norm');
    tile(percent(mean(profile.layers.map((l) => l.mean_share.k)), 0), 'share of the mean in the key energy');
    return;
  }
  const {plan} = first, measured = planResult(first);
  if (measured) {
    const {state, claim, reason} = verdict(first.validation, measured);
    tiles.append(element('div', {class: `tile verdict ${state}`}, element('b', {}, claim), element('span', {}, reason)));
  }
  tile(fixed(plan.effective_bits, 3), `effective bits per element (${fixed(plan.effective_bits_at_context, 3)} at context ${whole(plan.context)})`);
  tile(`${fixed(16 / plan.effective_bits, 2)}×`, `smaller than fp16: ${whole(plan.bytes_per_token)} bytes per token`);
  if (plan.predicted_kl === null) tile('–', 'predicted KL: imported plans hold none');
  else tile(significant(plan.predicted_kl), 'predicted KL, nats per token');
  if (measured) {
    tile(significant(measured.kl.mean), 'measured KL on held-out text, ± standard error', ` ± ${significant(measured.kl.standard_error, 2)}`);
    tile(signedPercent(measured.perplexity_rise), `perplexity against the fp16 cache (95\u00a0%: ${percentRange(measured.perplexity_rise_interval)})`);
  } else {
    tile('–', 'measured KL: none yet; kvplan validate measures it on held-out text');
  }
}

/** A dot with its interval on the scale of the column; the header row holds the marks. */
function rangeCells({min, max, marks}) {
  const at = (x) => (100 * Math.log(x / min)) / Math.log(max / min);
  const rules = () => marks.map((m) => element('i', {class: 'rule', style: `left:${at(m)}%`}));
  const labelled = marks.length > 5 ? marks.filter(isPowerOfTen) : marks;
  const header = element('div', {class: 'range'}, ...labelled.map((m) => element('span', {class: 'mark', style: `left:${at(m)}%`}, significant(m))));
  const cell = (kl) => {
    if (!(kl.mean > 0)) return element('div', {class: 'range'}, ...rules());
    const {low, high} = klInterval(kl);
    const left = Math.max(at(low), 0), right = Math.min(at(high), 100);
    return element('div', {class: 'range'}, ...rules(), element('i', {class: 'interval', style: `left:${left}%;width:${right - left}%`}),
      element('i', {class: 'dot', style: `left:${at(kl.mean)}%`}));
  };
  return {header, cell};
}

function validationSection() {
  const blocks = measurements().map(({validation: v, rows}) => {
    const measured = rows.filter(({candidate}) => candidate.kl.mean > 0).map(({candidate}) => klInterval(candidate.kl));
    const range = rangeCells(logScale(measured.flatMap(({low, high}) => [low, high])));
    const modes = new Set(rows.map(({candidate}) => modeName(candidate)));
    const header = ['candidate', ...(modes.size > 1 ? ['mode'] : []), 'bits', 'KL ± s.e.', range.header, 'p99', 'CVaR95',
      'predicted', 'perplexity', 'rise (95 % interval)', 'same top-1'];
    const body = rows.map(({name, plan, candidate: c}) => ({plan, cells: [
      name, ...(modes.size > 1 ? [modeName(c)] : []), fixed(c.effective_bits, 2),
      c.kl.mean > 0 ? `${significant(c.kl.mean)} ± ${significant(c.kl.standard_error, 2)}` : '0', range.cell(c.kl),
      significant(c.kl.p99), significant(c.kl.cvar95), c.predicted_kl === null ? '–' : significant(c.predicted_kl),
      fixed(c.perplexity, 3),
      c.kl.mean > 0 ? `${signedPercent(c.perplexity_rise)} (${percentRange(c.perplexity_rise_interval)})` : '–', percent(c.same_top1),
    ]}));
    return element('div', {},
      element('p', {}, `${someNames(v.texts.map((t) => t.name))}${partOf(v.part)}: ${plural(v.windows, 'window')} of ${whole(v.window)} tokens, ` +
        `${v.bos ? 'BOS first' : 'no BOS'}, positions from ${whole(v.first_scored)} on scored (${whole(v.scored_tokens)} tokens), mode ${[...modes].join('; ')}.`),
      table(header, body));
  });
  const gates = plans.flatMap(({name, validation}) => (validation?.gates ?? []).map((gate) => element('p', {},
    `${name}, gate ${gate.expression}: measured ${significant(gate.measured)}, `,
    element('b', {class: gate.passed ? 'passed' : 'failed'}, gate.passed ? 'passed' : 'failed'))));
  section('validation', 'Held-out measurements',
    'KL divergence from the fp16 cache in nats per token: mean, 99th percentile, mean of the worst 5 % and prediction. Bars are 95 % intervals of the mean ' +
    '(windows as clusters); those of the perplexity rise come from a paired bootstrap over windows.', ...blocks, ...gates);
}

/** A single draw, or none that differs, has no spread to show. */
const estimateText = ({mean: middle, standard_error: error}, draws) =>
  significant(middle) + (draws > 1 && (middle !== 0 || error !== 0) ? ` ± ${significant(error, 2)}` : '');

/** Task results of all plans: [{validation, rows: [{name, plan, result}]}], candidates in the order of measurements(). */
function taskResults(field) {
  return plans.filter(({validation}) => validation?.[field].length).map(({name, validation}) => ({
    validation, rows: validation[field].map((result) => ({name: result.name === 'plan' ? name : result.name, plan: result.name === 'plan', result})),
  }));
}

/** The mode in a column of its own where there is more than one. */
function modeColumn(rows) {
  const several = new Set(rows.map(({result}) => result.mode)).size > 1;
  return {header: several ? ['mode'] : [], cells: ({mode}) => (several ? [mode] : [])};
}

function byTextSection() {
  const blocks = taskResults('by_text').map(({rows}) => {
    const mode = modeColumn(rows);
    return table(['candidate', ...mode.header, 'text', 'windows', 'perplexity', 'rise', 'KL ± s.e.'], rows.map(({name, plan, result: r}) => ({
      plan, cells: [name, ...mode.cells(r), r.text, whole(r.windows), fixed(r.perplexity, 3),
        r.name === 'fp16' ? '–' : signedPercent(r.perplexity_rise), estimateText(r.kl, r.windows)]})));
  });
  section('by-text', 'By text', 'The same figures for each text by itself: does the plan hold on kinds of text that calibration did not see?', ...blocks);
}

/** Depth down, context across; colour and figure are the share of keys repeated exactly. */
function passkeyMap(name, results) {
  const contexts = [...new Set(results.map((r) => r.context))], depths = [...new Set(results.map((r) => r.depth))];
  const cell = (depth, context) => {
    const r = results.find((x) => x.depth === depth && x.context === context);
    return element('td', {...coloured(r.exact_match.mean), tabindex: 0, 'data-tip': `${name}, ${whole(context)} tokens, depth ${depth}, ${plural(r.trials, 'trial')}: ` +
      `exact match ${estimateText(r.exact_match, r.trials)}, log-probability of the key ${estimateText(r.log_probability, r.trials)}, ` +
      `against fp16 ${estimateText(r.log_probability_change, r.trials)}`}, fixed(r.log_probability.mean, 2));
  };
  const change = mean(results.map((r) => r.log_probability_change.mean));
  return element('figure', {}, element('figcaption', {}, `${name}: ${percent(mean(results.map((r) => r.exact_match.mean)), 0)} repeated` +
    `${change === 0 ? '' : `, log-probability ${change < 0 ? '−' : '+'}${significant(Math.abs(change), 2)} against fp16`}`),
    element('table', {class: 'map passkey'},
      element('thead', {}, element('tr', {}, element('th', {scope: 'col'}, 'depth'), ...contexts.map((c) => element('th', {scope: 'col'}, whole(c))))),
      element('tbody', {}, ...depths.map((depth) => element('tr', {}, element('th', {scope: 'row'}, String(depth)), ...contexts.map((c) => cell(depth, c)))))));
}

function passkeySection() {
  const notes = [];
  const blocks = taskResults('passkey').map(({rows}) => {
    const exact = mean(rows.filter(({name}) => name === 'fp16').map(({result}) => result.exact_match.mean));
    notes.push(`The fp16 cache itself repeats ${percent(exact, 0)} of the keys${exact < 0.5 ?
      ': this model fails the task, and only the change of the log-probability says something about the caches' : ''}.`);
    const mode = modeColumn(rows);
    const groups = new Map();
    for (const {name, result} of rows) {
      const key = [name, ...mode.cells(result)].join(', ');
      groups.set(key, [...(groups.get(key) ?? []), result]);
    }
    return element('div', {class: 'columns narrow'}, ...[...groups].map(([name, results]) => passkeyMap(name, results)));
  });
  section('passkey', 'Passkey retrieval', 'A five-digit key hidden in the text, asked for at the end; context across, depth of the key down. ' +
    'Cells hold the log-probability of the key in nats, their colour the share of trials in which it is repeated exactly (dark: all); ' +
    `point at a cell for standard errors. ${[...new Set(notes)].join(' ')}`, ...blocks);
}

function promptsSection() {
  const blocks = taskResults('prompts').map(({validation, rows}) => {
    const mode = modeColumn(rows), {name: file, max_tokens: most} = validation.prompt_source;
    const header = ['candidate', ...mode.header, 'category', 'prompts', 'tokens', 'same token ± s.e.', 'first change', 'unchanged', 'KL ± s.e.',
      'answer log p', 'change ± s.e.'];
    const optional = (estimate, text) => (estimate ? text(estimate) : '–');
    return element('div', {}, element('p', {}, `${file}, continuations of up to ${plural(most, 'token')}.`),
      table(header, rows.map(({name, plan, result: r}) => ({plan, cells: [
        name, ...mode.cells(r), r.category || 'all', whole(r.prompts), whole(r.tokens),
        percent(r.greedy_agreement.mean) + (r.prompts > 1 ? ` ± ${percent(r.greedy_agreement.standard_error)}` : ''), fixed(r.first_divergence.mean, 1),
        percent(r.identical.mean, 0), estimateText(r.kl, r.prompts), optional(r.answer_log_probability, (e) => significant(e.mean)),
        optional(r.answer_log_probability_change, (e) => estimateText(e, r.answers))]}))));
  });
  section('prompts', 'Prompts', 'Greedy continuations of the fp16 cache, fed to every other cache: share of tokens that stay the most likely ones, ' +
    'tokens before the first that a free run changes, continuations without a change, KL on the same positions, log-probability of the answer.', ...blocks);
}

const hasLayers = profile?.layers.length > 0;
const bothSides = (field) => ({k: profile.layers.map((l) => l[field].k), v: profile.layers.map((l) => l[field].v)});

function normsSection() {
  if (!hasLayers) return section('norms');
  const {layers} = profile;
  const ratios = layers.map((l) => l.norm_ratio);
  const widest = ratios.indexOf(Math.max(...ratios));
  section('norms', 'Key and value norms',
    `Keys are ${fixed(mean(ratios), 1)} times as long as values on average, at most ${fixed(ratios[widest], 1)} times (layer ${layers[widest].index}); ` +
    'long keys are what breaks plain rotation at few bits. The mean share is the part of the energy that centring removes for free.',
    columns(
      layerPlot('Mean norm by layer', 'mean norm', {k: layers.map((l) => l.key_norm), v: layers.map((l) => l.value_norm)}),
      layerPlot('Mean share by layer (keys before rotary)', '', bothSides('mean_share'), axis('‖mean‖² / mean ‖x‖²', {min: 0, max: 1}))));
}

function outliersSection() {
  if (!hasLayers) return section('outliers');
  const {layers, model: {head_dim: width, kv_heads: heads}} = profile;
  const found = {k: [], v: []};
  for (const side of ['k', 'v']) {
    found[side] = Array.from({length: heads}, (_, h) => layers.map((layer) => {
      const channels = layer.outlier_channels[side].filter((c) => Math.floor(c / width) === h).map((c) => c % width);
      const where = `layer ${layer.index}, KV head ${h}`;
      return {value: channels.length, text: channels.length || '', title: channels.length ? `${where}: channels ${channels.join(' ')}` : `${where}: none`};
    }));
  }
  const total = (side) => sum(found[side].flat().map(({value}) => value));
  const share = (side) => `${whole(total(side))} (${percent(total(side) / (layers.length * heads * width))})`;
  const largest = Math.max(...[...found.k, ...found.v].flat().map(({value}) => value));
  section('outliers', 'Outlier channels',
    'Channels whose RMS is above three times the median of their layer, counted by layer and KV head; point at a cell for their numbers.',
    layerMap(`Keys: ${share('k')} of all channels`, found.k, largest), layerMap(`Values: ${share('v')} of all channels`, found.v, largest));
}

function sensitivitySection() {
  const texts = [], parts = [];
  if (hasLayers) {
    texts.push('Sensitivity is what a relative error of 1 would cost, in nats per token (½ tr FC): where bits matter.');
    parts.push(layerPlot('Sensitivity by layer', 'nats per token', bothSides('sensitivity')));
  }
  if (first) {
    const {layers} = first.plan;
    const predicts = first.plan.predicted_kl !== null;
    if (predicts) texts.push('A good plan spreads the predicted KL over the layers.');
    if (predicts) parts.push(plot(`Predicted KL of ${first.name} by layer`, 'bar',
      {labels: layers.map((l) => l.index), datasets: [series('share', layers.map((l) => 100 * l.predicted_kl_share), '--plan', {borderWidth: 0})]},
      {scales: {x: axis('layer', {grid: {display: false}}), y: axis('% of the predicted KL', {beginAtZero: true})},
        tooltip: {title: ([item]) => `layer ${item.label}`, label: ({raw}) => `${fixed(raw, 1)} %`}}));
  }
  section('sensitivity', 'Sensitivity', texts.join(' '), ...(parts.length ? [columns(...parts)] : []));
}

function positionsSection() {
  const validation = first?.validation;
  const colours = ['--value', '--key', '--other', '--muted'];
  const shown = validation?.candidates.filter((c) => c.name !== 'fp16' && modeName(c) === modeOf(validation)) ?? [];
  const bins = shown[0]?.kl_by_position.length ?? 0;
  if (!bins) return section('positions');
  const others = shown.filter((c) => c.name !== 'plan').slice(0, colours.length);
  const lines = [
    ...shown.filter((c) => c.name === 'plan').map((c) => series(first.name, c.kl_by_position, '--plan', {pointStyle: 'rectRot', pointRadius: 4})),
    ...others.map((c, i) => series(c.name, c.kl_by_position, colours[i])),
  ];
  const begin = validation.first_scored, width = (validation.window - 1 - begin) / bins;
  const labels = Array.from({length: bins}, (_, i) => Math.round(begin + width * (i + 0.5)));
  section('positions', 'KL by position', 'Mean KL in equal bins of the scored positions: does quality fall as the context grows?',
    plot('Mean KL by position in the window', 'line', {labels, datasets: lines},
      {scales: {x: axis('position, middle of the bin', {grid: {display: false}}), y: logAxis('KL, nats per token', lines.flatMap((l) => l.data))},
        tooltip: {title: ([item]) => `around position ${item.label}`}}));
}

/** Plans that differ from the first one in nothing but the seed, measured on the same tokens. */
function seedsSection() {
  const settings = ({plan: p, validation: v}) => JSON.stringify([p.codec, p.policy, p.code, p.group_size, p.norm, p.scale_rule, p.centre,
    p.rotation.kind, fixed(p.effective_bits, 2), p.provenance.profile_sha256, tokensKey(v), modeOf(v)]);
  const measured = plans.filter((entry) => planResult(entry));
  const same = measured.filter((entry) => settings(entry) === settings(measured[0]))
    .map((entry) => ({...entry, seed: seedOf(entry.plan), kl: planResult(entry).kl}));
  if (new Set(same.map(({seed}) => seed)).size < 2) return section('seeds');
  const means = same.map(({kl}) => kl.mean);
  const centre = mean(means);
  const sd = Math.sqrt(sum(means.map((m) => (m - centre) ** 2)) / (means.length - 1));
  const point = ({seed, kl}) => ({x: seed, y: kl.mean, ...klInterval(kl)});
  section('seeds', 'Seeds',
    `${same.length} plans that differ only in the seed: mean KL ${significant(centre)}, sd ${significant(sd, 2)} (CV ${percent(sd / centre)}), ` +
    `${significant(Math.min(...means))} … ${significant(Math.max(...means))}.`,
    plot('KL by seed, with 95 % intervals', 'line', {labels: same.map(({seed}) => seed), datasets: [
      series('measured', same.map(point), '--plan', {showLine: false, pointRadius: 6, pointStyle: 'rectRot'}),
      series('predicted', same.map(({plan, seed}) => ({x: seed, y: plan.predicted_kl})), '--key',
        {showLine: false, pointRadius: 5, backgroundColor: themed('--paper')}),
    ]}, {scales: {x: axis('seed', {type: 'category', offset: true, grid: {display: false}}), y: axis('KL, nats per token', {min: 0, suggestedMax: 1.1 * Math.max(...same.map(({kl}) => klInterval(kl).high))})}}));
}

function provenanceSection() {
  const rows = [];
  const row = (what, ...values) => rows.push({cells: [what, values.filter(Boolean).join(', ')]});
  const model = first?.plan.model ?? profile.model;
  row('Model', model.architecture, model.container, `k/v weights ${shortHash(model.kv_weights_sha256)}`);
  if (profile) {
    row('Profile', `${whole(profile.tokens)} tokens in windows of ${whole(profile.window)}`, `first ${profile.sink_tokens} of each left out`,
      `seed ${profile.seed}`, profile.program);
  }
  for (const s of (profile ?? first.plan.provenance).sources) {
    row('Calibration text', `${s.name}${partOf(s.part)}`, `${whole(s.tokens)} tokens in that part`, `weight ${s.weight}`, shortHash(s.sha256));
  }
  for (const {name, plan} of plans) {
    row(`Plan “${name}”`, `policy ${plan.policy}`, `${plan.codec} codec`, plan.code, `groups of ${plan.group_size}`, `norm ${plan.norm}`,
      `scale ${plan.scale_rule}`, plan.centre ? 'centred' : 'not centred', plan.rotation.kind !== 'none' && `rotation ${plan.rotation.kind}`,
      `seed ${seedOf(plan)}`, `${plural(plan.sink_tokens, 'sink token')}`, `profile ${shortHash(plan.provenance.profile_sha256)}`, plan.provenance.program);
  }
  for (const {name, validation: v} of plans) {
    if (!v) continue;
    row(`Validation of “${name}”`, ...v.texts.map((t) => `${t.name} ${shortHash(t.sha256)}`), `plan ${shortHash(v.plan_sha256)}`, v.runtime, v.program);
  }
  section('provenance', 'Provenance', 'What these figures were made from; hashes are the first 12 digits of a SHA-256.', table(['what', 'from'], rows, {class: 'facts'}));
}

headline();
plansSection();
validationSection();
byTextSection();
passkeySection();
promptsSection();
const showBudget = frontSection();
bitsSection();
normsSection();
outliersSection();
sensitivitySection();
positionsSection();
seedsSection();
cellSection();
provenanceSection();
charts.forEach((draw) => draw());
chooseCell(0, 0);
showBudget?.();
